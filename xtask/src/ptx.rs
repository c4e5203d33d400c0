//! The PTX of the GPU's kernels: made from their CUDA source by NVRTC, and committed beside it.

use crate::run::{root, show, target};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// NVRTC of CUDA 12.0, the oldest with a wheel: its PTX (ISA 8.0) loads with every driver since 525.
const NVRTC: &str = "nvidia-cuda-nvrtc-cu12==12.0.140";
/// The oldest cards it runs on: Ampere. PTX for compute_90 has nothing more to offer these kernels.
const OPTIONS: [&str; 2] = ["--gpu-architecture=compute_80", "-std=c++17"];
const KERNELS: [&str; 2] = ["blake3", "copy"];

/// Makes the PTX anew.
pub(crate) fn generate() -> Result<()> {
    let nvrtc = fetched().map_or_else(fetch, Ok)?;
    for kernel in KERNELS {
        std::fs::write(committed(kernel), made(&nvrtc, kernel)?)?;
        println!("{}", committed(kernel).display());
    }
    Ok(())
}

/// Whether the committed PTX was made from the committed source: by what its first line says, and where NVRTC
/// is at hand by making it again.
pub(crate) fn check() -> Result<()> {
    for kernel in KERNELS {
        let path = committed(kernel);
        let ptx = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let nvrtc = fetched();
        let fresh = match &nvrtc {
            Some(nvrtc) => ptx == made(nvrtc, kernel)?,
            None => ptx.starts_with(&first_line(kernel)?),
        };
        if !fresh {
            bail!("{} was not made from its source as it is: run `cargo xtask ptx`", path.display());
        }
        let how = if nvrtc.is_some() { "made again, it is the same" } else { "by its first line; NVRTC is not here" };
        println!("{kernel}.ptx is fresh ({how})");
    }
    Ok(())
}

fn made(nvrtc: &Path, kernel: &str) -> Result<String> {
    let out = nvrtc.join(format!("{kernel}.ptx"));
    let mut python = Command::new("python3");
    python.arg(root().join("crates/cuda/kernels/nvrtc.py")).arg(nvrtc).arg(source(kernel)).arg(&out).args(OPTIONS);
    let output = python.output().context("cannot run python3")?;
    if !output.status.success() {
        bail!("NVRTC on {kernel}.cu: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(first_line(kernel)? + &std::fs::read_to_string(out)?)
}

fn first_line(kernel: &str) -> Result<String> {
    let path = source(kernel);
    let text = std::fs::read(&path).with_context(|| path.display().to_string())?;
    Ok(format!("// {kernel}.cu {} {NVRTC} {}\n", blake3::hash(&text).to_hex(), OPTIONS.join(" ")))
}

fn source(kernel: &str) -> PathBuf {
    root().join(format!("crates/cuda/kernels/{kernel}.cu"))
}

fn committed(kernel: &str) -> PathBuf {
    root().join(format!("crates/cuda/kernels/{kernel}.ptx"))
}

fn wheel_dir() -> PathBuf {
    target().join("nvrtc")
}

fn fetched() -> Option<PathBuf> {
    let dir = wheel_dir();
    dir.join("nvidia/cuda_nvrtc/lib").is_dir().then_some(dir)
}

fn fetch() -> Result<PathBuf> {
    let dir = wheel_dir();
    std::fs::create_dir_all(&dir)?;
    let mut download = Command::new("python3");
    download.args(["-m", "pip", "download", "-q", "--no-deps", "-d"]).arg(&dir).arg(NVRTC);
    let (ok, _) = show("NVRTC", &mut download)?;
    for entry in std::fs::read_dir(&dir)?.flatten().filter(|e| e.path().extension().is_some_and(|x| x == "whl")) {
        let mut unpack = Command::new("python3");
        show("unpack NVRTC", unpack.args(["-m", "zipfile", "-e"]).arg(entry.path()).arg(&dir))?;
        std::fs::remove_file(entry.path())?;
    }
    match fetched() {
        Some(dir) if ok => Ok(dir),
        _ => bail!("{NVRTC} could not be fetched with python3 -m pip"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_ptx_is_of_the_committed_source() {
        for kernel in KERNELS {
            let ptx = std::fs::read_to_string(committed(kernel)).unwrap();
            assert!(ptx.starts_with(&first_line(kernel).unwrap()), "{kernel}: run `cargo xtask ptx`");
        }
    }
}
