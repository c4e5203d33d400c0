//! The program from outside: what it prints, and the code it ends with. Nothing here leaves this
//! machine, and nothing of the user's own configuration is read.

use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

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

/// A child that does not outlive its test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // Either call fails only if it has ended and been waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn signal(child: &Child, signal: Signal) {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).expect("a pid");
    kill_process(pid, signal).expect("it is there");
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

/// A checkpoint with one tensor of four bytes and a name of its own.
fn safetensors(name: &str) -> Vec<u8> {
    let header = serde_json::json!({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).to_string();
    let length = u64::try_from(header.len()).expect("it is short").to_le_bytes();
    [&length, header.as_bytes(), &[0; 4]].concat()
}

#[test]
fn a_reader_that_goes_is_no_failure() {
    let home = Home::new();
    for i in 0..100 {
        home.write(&format!("model/{i}.txt"), &"x".repeat(i));
    }
    std::fs::write(home.path("model/model.safetensors"), safetensors("t")).expect("a checkpoint");
    std::fs::write(home.path("other.safetensors"), safetensors("u")).expect("a checkpoint");
    for (args, code) in [
        (vec!["manifest", "show", "model"], 0),
        (vec!["manifest", "diff", "model", "other.safetensors"], 4),
        (vec!["keygen", "mesh"], 0),
        (vec!["--help"], 0),
    ] {
        let mut child = home.aquifer(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("a child");
        drop(child.stdout.take());
        let mut err = String::new();
        child.stderr.take().expect("a pipe").read_to_string(&mut err).expect("text");
        assert!(!err.contains("panic") && !err.contains("aquifer:"), "{err}");
        assert_eq!(child.wait().expect("it ends").code(), Some(code), "{args:?}");
    }
}

/// A safetensors file of U8 tensors.
fn tensors(contents: &[(&str, &[u8])]) -> Vec<u8> {
    let mut data = Vec::new();
    let mut header = serde_json::Map::new();
    for (name, bytes) in contents {
        let offsets = [data.len(), data.len() + bytes.len()];
        let entry = serde_json::json!({"dtype": "U8", "shape": [bytes.len()], "data_offsets": offsets});
        header.insert((*name).into(), entry);
        data.extend_from_slice(bytes);
    }
    let header = serde_json::Value::Object(header).to_string();
    let length = u64::try_from(header.len()).expect("it is short").to_le_bytes();
    [&length, header.as_bytes(), &data].concat()
}

#[test]
fn what_is_known_of_tensors_in_packs_is_said() {
    let home = Home::new();
    let long = vec![7; 100_000];
    let file = |scale: &'static [u8], long: &[u8]| tensors(&[("a", b"same"), ("b", scale), ("long", long)]);
    std::fs::write(home.path("old.safetensors"), file(b"one", &long)).expect("a checkpoint");
    std::fs::write(home.path("new.safetensors"), file(b"two", &long)).expect("a checkpoint");
    std::fs::write(home.path("long.safetensors"), file(b"one", &[8; 100_000])).expect("a checkpoint");
    let json = |args: &[&str]| -> serde_json::Value { serde_json::from_str(&home.run(args).out).expect("JSON") };

    let shown = json(&["manifest", "show", "old.safetensors", "--json"]);
    assert_eq!(shown["packs"].as_array().map(Vec::len), Some(1));
    assert_eq!(shown["packs"][0][1], 7);
    assert_eq!(shown["tensors"][1]["packed"], serde_json::json!({"pack": 0, "begin": 4}));
    assert_eq!(shown["tensors"][1]["bytes"], 3);
    assert!(shown["tensors"][2]["chunks"].is_array() && shown["tensors"][2]["packed"].is_null());
    let shown = home.run(&["manifest", "show", "old.safetensors"]).out;
    assert!(shown.contains("3 tensors, 1 packs") && shown.contains("in pack 0  a\n"), "{shown}");

    let compared = json(&["manifest", "diff", "old.safetensors", "new.safetensors", "--json"]);
    assert_eq!(compared["tensors_in_changed_packs"], serde_json::json!(["a", "b"]));
    assert_eq!(compared["tensors_changed"], serde_json::json!([]));
    assert_eq!((&compared["chunks_to_move"], &compared["bytes_to_move"]), (&1.into(), &7.into()));
    let compared = home.run(&["manifest", "diff", "old.safetensors", "new.safetensors"]).out;
    assert!(compared.contains("? a\n? b\n") && compared.contains("2 in packs that changed"), "{compared}");
    let compared = json(&["manifest", "diff", "old.safetensors", "long.safetensors", "--json"]);
    assert_eq!(compared["tensors_changed"], serde_json::json!(["long"]));
    assert_eq!(compared["tensors_in_changed_packs"], serde_json::json!([]));
}

#[test]
fn names_cannot_command_the_terminal() {
    let home = Home::new();
    std::fs::write(home.path("a.safetensors"), safetensors("\x1b[2Jt\nu")).expect("a checkpoint");
    std::fs::write(home.path("b.safetensors"), safetensors("b")).expect("a checkpoint");
    let shown = home.run(&["manifest", "show", "a.safetensors"]);
    assert!(shown.out.contains(r"\u{1b}[2Jt\nu") && !shown.out.contains('\x1b'), "{}", shown.out);
    let compared = home.run(&["manifest", "diff", "a.safetensors", "b.safetensors"]);
    assert!(compared.out.contains(r"- \u{1b}[2Jt\nu") && !compared.out.contains('\x1b'), "{}", compared.out);
    let refused = home.run(&["manifest", "show", "\x1b[2J"]);
    assert!(refused.err.contains(r"cannot read \u{1b}[2J: No such file"), "{}", refused.err);
}

#[test]
fn a_publisher_that_nobody_listens_to_goes_on_serving() {
    let home = Home::new();
    home.run(&["keygen", "mesh", "--out", "mesh.key"]);
    let public = home.run(&["keygen", "publisher", "--out", "publisher.key", "--json"]);
    let public: serde_json::Value = serde_json::from_str(&public.out).expect("JSON");
    std::fs::write(home.path("model.safetensors"), safetensors("t")).expect("a checkpoint");
    // A port that was free a moment ago.
    let address = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").to_string();
    let mesh = ["--mesh-key", "mesh.key", "--data-listen", "127.0.0.1:0", "--listen"];
    let publish = ["publish", "model.safetensors", "--channel", "c", "--publisher-key", "publisher.key"];
    let mut publisher = home.aquifer(&[&publish[..], &mesh[..], &[&address]].concat());
    let mut publisher = Killed(publisher.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("a child"));
    drop((publisher.0.stdout.take(), publisher.0.stderr.take()));

    let trust = public["public"].as_str().expect("a key");
    let pull = ["pull", "c", "--to", "copy", "--trust", trust, "--timeout", "60", "--peer", &address];
    let pulled = home.run(&[&pull[..], &mesh[..], &["127.0.0.1:0"]].concat());
    signal(&publisher.0, Signal::TERM);
    let ended = publisher.0.wait().expect("it ends");
    assert_eq!(pulled.code, Some(0), "{}", pulled.err);
    assert_eq!(ended.code(), Some(0));
}

#[test]
fn watching_outlasts_the_agent_and_ends_when_asked() {
    let home = Home::new();
    home.run(&["keygen", "mesh", "--out", "mesh.key"]);
    let trust = "ab".repeat(32);
    let listen = ["--listen", "127.0.0.1:0", "--data-listen", "127.0.0.1:0", "--socket", "agent.sock"];
    let agent = ["agent", "--channel", "c", "--trust", &trust, "--mesh-key", "mesh.key", "--name", "n"];
    let status = ["status", "--socket", "agent.sock"];
    let absent = home.run(&[&status[..], &["--watch"]].concat());
    assert_eq!(absent.code, Some(1));
    assert!(absent.err.contains("no agent is listening on agent.sock"), "{}", absent.err);

    let mut agent = home.aquifer(&[&agent[..], &listen[..]].concat());
    let mut agent = Killed(agent.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("a child"));
    let deadline = Instant::now() + PATIENCE;
    while home.run(&status).code != Some(0) {
        assert!(Instant::now() < deadline, "the agent did not start");
        std::thread::sleep(Duration::from_millis(20));
    }
    let watch = |json: &[&str]| {
        let mut command = home.aquifer(&[&status[..], &["--watch"], json].concat());
        Killed(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("a child"))
    };
    let mut unread = watch(&[]);
    drop(unread.0.stdout.take());
    assert_eq!(unread.0.wait().expect("it ends").code(), Some(0));

    let mut watching = watch(&["--json"]);
    let mut lines = BufReader::new(watching.0.stdout.take().expect("a pipe")).lines();
    let state: serde_json::Value = serde_json::from_str(&lines.next().expect("a line").expect("text")).expect("JSON");
    assert_eq!(state["name"], "n");
    signal(&agent.0, Signal::TERM);
    assert_eq!(agent.0.wait().expect("it ends").code(), Some(0));
    let mut told = BufReader::new(watching.0.stderr.take().expect("a pipe")).lines();
    let told = told.next().expect("a line").expect("text");
    assert!(told.starts_with("aquifer: the agent is away ("), "{told}");
    signal(&watching.0, Signal::INT);
    assert_eq!(watching.0.wait().expect("it ends").code(), Some(0));
}

/// With or without RDMA and GPUs: what is here must not matter.
#[test]
fn the_doctor_speaks_on_any_machine() {
    let home = Home::new();
    let said = home.run(&["doctor"]);
    assert_eq!(said.code, Some(0), "{}", said.err);
    for part in ["RDMA", "GPUs", "Memory this user may lock", "What Aquifer will use", "shared memory", "TCP"] {
        assert!(said.out.contains(part), "{}", said.out);
    }
    let json = home.run(&["doctor", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json.out).expect("JSON");
    let rdma = &json["rdma"];
    let without = rdma["problem"].as_str();
    assert!(rdma["devices"].is_array());
    assert!(without.is_none_or(|why| why.contains("libibverbs cannot be used") || why.contains("kernel")), "{rdma}");
    let gpus = &json["gpus"];
    let names = gpus["devices"].as_array().expect("a list").iter().filter(|gpu| gpu["uuid"].is_string()).count();
    assert_eq!(names == 0, gpus["problem"].is_string(), "{gpus}");
    assert!(json["uses"].as_array().is_some_and(|uses| uses.len() == 3));
}

#[test]
fn output_that_is_lost_is_a_failure() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("a disk that is full");
    let home = Home::new();
    let mut child = home.aquifer(&["keygen", "mesh"]).stdout(full).stderr(Stdio::piped()).spawn().expect("a child");
    let mut err = String::new();
    child.stderr.take().expect("a pipe").read_to_string(&mut err).expect("text");
    assert!(err.starts_with("aquifer: cannot write the output: No space left"), "{err}");
    assert_eq!(child.wait().expect("it ends").code(), Some(1));
}
