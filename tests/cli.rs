//! The program from outside: what it prints, and the code it ends with. Nothing here leaves this
//! machine, and nothing of the user's own configuration is read.

use std::path::PathBuf;
use std::process::{Command, Output};
use tempfile::TempDir;

/// A home of its own for each test.
struct Home {
    dir: TempDir,
}

impl Home {
    fn new() -> Self {
        Home { dir: tempfile::tempdir().expect("a temporary directory") }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().expect("it lies in the home")).expect("a directory");
        std::fs::write(&path, text).expect("a file");
        path
    }

    /// The program, with this home and none of the user's options.
    fn aquifer(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_aquifer"));
        for (name, _) in std::env::vars_os() {
            if ["AQUIFER_", "XDG_"].iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
                command.env_remove(name);
            }
        }
        command.args(args).env("HOME", self.dir.path()).current_dir(self.dir.path());
        command
    }

    fn run(&self, args: &[&str]) -> Ran {
        Ran::of(&mut self.aquifer(args))
    }
}

/// How a run ended.
#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Ran {
    fn of(command: &mut Command) -> Self {
        let Output { status, stdout, stderr } = command.output().expect("the program starts");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("it prints UTF-8");
        Ran { code: status.code(), out: text(stdout), err: text(stderr) }
    }
}

#[test]
fn a_reason_is_given_once() {
    let ran = Home::new().run(&["manifest", "show", "nope"]);
    assert_eq!(ran.code, Some(1));
    assert_eq!(ran.err, "aquifer: cannot read nope: No such file or directory (os error 2)\n");
    assert_eq!(ran.out, "");
}

#[test]
fn an_empty_variable_is_not_set() {
    let home = Home::new();
    home.write("mesh.key", "not a key");
    let mut command = home.aquifer(&["pull", "some/channel", "--to", "here", "--mesh-key", "mesh.key"]);
    for name in ["PEER", "LISTEN", "MDNS", "DATA_LISTEN", "STATE", "NAME", "UPLOAD_WINDOW", "LOG", "CONFIG"] {
        command.env(format!("AQUIFER_{name}"), "");
    }
    let ran = Ran::of(&mut command);
    // It got as far as the key, past everything that is empty.
    assert_eq!(ran.code, Some(1));
    assert!(ran.err.contains("aquifer: mesh.key is not a mesh key"), "{}", ran.err);
}

#[test]
fn a_configuration_file_that_is_wrong_says_where() {
    let home = Home::new();
    home.write(".config/aquifer/aquifer.toml", "mesh-key = 'mesh.key'\npeer = 5\n");
    let ran = home.run(&["agent", "--channel", "some/channel"]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.err.contains("aquifer.toml: 'peer': ") && ran.err.lines().count() == 1, "{}", ran.err);
}

#[test]
fn what_others_would_not_take_is_refused_at_the_start() {
    let home = Home::new();
    home.run(&["keygen", "mesh", "--out", "mesh.key"]);
    let refused = |args: &[&str], reason: &str| {
        let ran = home.run(args);
        assert_eq!((ran.code, ran.err.contains(reason)), (Some(1), true), "{}", ran.err);
    };
    let channels = (0..65).map(|i| format!("c/{i}")).collect::<Vec<_>>().join(",");
    let agent = ["agent", "--mesh-key", "mesh.key", "--trust", &"ab".repeat(32), "--channel"];
    refused(&[&agent[..], &[&channels]].concat(), "65 channels");
    refused(&[&agent[..], &["c", "--name", &"n".repeat(257)]].concat(), "--name has 257 bytes");
    let note = ["publish", "model", "--channel", "c", "--publisher-key", "none", "--note", &"n".repeat(1025)];
    refused(&note, "--note has 1025 bytes");
    refused(&["pull", &"ab".repeat(31), "--to", "here"], "62 digits");
}
