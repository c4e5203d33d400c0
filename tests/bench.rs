//! `aquifer bench` from outside, at sizes that say nothing: it runs, what it prints can be read, and
//! nothing of it is left.

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::Value;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
/// No machine has a GPU of that name.
const TWIN: &str = "GPU-eeeeeeee-eeee-eeee-eeee-eeeeeeeeeeee";

/// The program in a directory of its own, where its files are made too.
fn bench(home: &TempDir, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_aquifer"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("AQUIFER_")) {
        command.env_remove(name);
    }
    command.arg("bench").args(args).env("HOME", home.path()).env("TMPDIR", home.path()).current_dir(home.path());
    command
}

/// Runs a bench to its end and reads what it prints.
fn run(args: &[&str]) -> Value {
    let home = tempfile::tempdir().expect("a temporary directory");
    let Output { status, stdout, stderr } =
        bench(&home, &[args, &["--json", "--runs", "2"]].concat()).output().expect("the program starts");
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    assert_empty(home.path());
    let document: Value = serde_json::from_slice(&stdout).expect("one JSON document");
    assert_eq!(document["failures"], serde_json::json!([]));
    assert!(document["machine"]["cores"].as_u64() > Some(0));
    document
}

/// What is said of one bench: its figures and ratios are numbers above zero.
fn check(report: &Value, bench: &str, series: &[&str], ratios: &[&str]) {
    let names = |list: &Value| -> Vec<String> {
        list.as_array().expect("a list").iter().map(|x| x["name"].as_str().expect("a name").to_string()).collect()
    };
    assert_eq!(report["bench"], bench);
    assert_eq!(names(&report["series"]), series);
    assert_eq!(names(&report["ratios"]), ratios);
    for thing in report["series"].as_array().expect("a list") {
        assert!(is_positive(&thing["gb_per_s"]) && is_positive(&thing["cpu_s_per_gb"]), "{thing}");
        for process in thing["processes"].as_array().expect("a list") {
            assert!(process["peak_bytes"].as_u64() > Some(0), "{process}");
        }
    }
    assert!(report["ratios"].as_array().expect("a list").iter().all(|r| is_positive(&r["value"])), "{report}");
}

/// JSON has no infinity: what is not finite is null there.
fn is_positive(spread: &Value) -> bool {
    let figures = ["min", "median", "max"].map(|key| spread[key].as_f64().unwrap_or(0.0));
    figures[0] > 0.0 && figures.is_sorted()
}

fn assert_empty(dir: &Path) {
    let left: Vec<_> = fs::read_dir(dir).expect("a directory").map(|e| e.expect("an entry").file_name()).collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}

const TRANSFER: [&str; 4] = ["aquifer over TCP", "plain TCP", "BLAKE3-plus-receive", "BLAKE3"];

#[test]
fn limits() {
    let document = run(&["limits", "--size", "20MiB", "--twin-gpu", TWIN]);
    let report = &document["benches"][0];
    let names: Vec<&str> =
        report["series"].as_array().expect("a list").iter().filter_map(|s| s["name"].as_str()).collect();
    let ratios = ["BLAKE3 on all cores", "hashing while in cache", "a second connection"];
    assert!(names.len() == 18 && names.contains(&"disk read") && names.contains(&"GPU, host to device"), "{names:?}");
    check(report, "limits", &names, &ratios);
}

#[test]
fn transfer_from_memory() {
    let document = run(&["transfer", "--size", "9MiB", "--conns", "2", "--chunk", "1MB", "--window", "3"]);
    check(&document["benches"][0], "transfer", &TRANSFER, &["CPU", "time"]);
}

#[test]
fn transfer_by_tls() {
    let document = run(&["transfer", "--size", "9MiB", "--transport", "tls"]);
    check(&document["benches"][0], "transfer", &["aquifer over TLS", "aquifer over TCP"], &["CPU", "rate"]);
}

#[test]
fn transfer_by_shared_memory() {
    let document = run(&["transfer", "--size", "9MiB", "--transport", "shm"]);
    check(&document["benches"][0], "transfer", &["aquifer by shared memory", "memcpy", "BLAKE3"], &["rate"]);
}

#[test]
fn transfer_from_a_file() {
    let document = run(&["transfer", "--size", "9MiB", "--source", "file"]);
    check(&document["benches"][0], "transfer", &TRANSFER, &["CPU", "time"]);
}

#[test]
fn publish() {
    let document = run(&["publish", "--size", "16MiB"]);
    let report = &document["benches"][0];
    check(report, "publish", &["aquifer publish", "BLAKE3, mmap", "BLAKE3, pread"], &["rate"]);
    assert!(report["tables"]["publisher_memory"][0]["peak_bytes"].as_u64() > Some(0), "{report}");
}

#[test]
fn publish_of_a_file_that_is_there() {
    let home = tempfile::tempdir().expect("a temporary directory");
    fs::write(home.path().join("model.bin"), vec![7; 3_000_000]).expect("a file");
    let document = run(&["publish", home.path().to_str().expect("a path")]);
    assert_eq!(document["benches"][0]["settings"]["size_bytes"], 3_000_000);
}

#[test]
fn swarm() {
    let document = run(&["swarm", "--size", "16MiB", "--nodes", "2"]);
    let report = &document["benches"][0];
    let ratios = ["time", "time with first touch", "CPU"];
    check(report, "swarm", &["aquifer", "plain TCP", "BLAKE3", "first touch"], &ratios);
    let payload = report["tables"]["payload_in_the_last_run"].as_array().expect("a list");
    let sum = |key: &str| payload.iter().filter_map(|row| row[key].as_f64()).sum::<f64>();
    assert_eq!(payload.len(), 3);
    assert!(sum("GB_in") > 0.02 && sum("GB_out") >= sum("GB_in") * 0.99, "{payload:?}");
}

#[test]
fn gossip() {
    let document = run(&["gossip", "--seconds", "1"]);
    let report = &document["benches"][0];
    check(report, "gossip", &["aquifer over TCP"], &["control p99", "gossip p99", "control to plain TCP"]);
    let trips = report["tables"]["round_trips"].as_array().expect("a list");
    assert_eq!(trips.len(), 6);
    assert!(
        trips.iter().all(|row| row["count"].as_u64() > Some(10) && row["p50_ms"].as_f64() > Some(0.0)),
        "{trips:?}"
    );
}

/// The program does with a GPU what it does here with one that is made of host memory.
#[test]
fn gpu() {
    let document = run(&["gpu", "--size", "9MiB", "--twin-gpu", TWIN]);
    let report = &document["benches"][0];
    let series = [
        "plain copy, host to GPU",
        "load, in order",
        "load, any order",
        "load, not registered",
        "plain copy, GPU to host",
        "plain copy, on the GPU",
        "apply from shadow, in order",
        "apply from shadow, any order",
        "apply from shadow, 2 %",
        "apply from host, any order",
        "apply from host, 2 %",
        "BLAKE3, 4 MiB",
        "BLAKE3, 1 MiB",
        "BLAKE3, 256 KiB",
        "BLAKE3, 5,000,001 bytes",
        "BLAKE3 called, 4 MiB",
        "BLAKE3 called, 256 KiB",
        "first touch",
        "registering",
    ];
    let ratios = [
        "hashing, 4 MiB",
        "hashing, 256 KiB",
        "hashing called, 4 MiB",
        "hashing called, 256 KiB",
        "in order, to a plain copy",
        "any order, to a plain copy",
        "not registered, to a plain copy",
        "apply, to a plain copy",
        "pause, from shadow",
        "pause, from shadow, 2 %",
        "pause, from host",
        "pause, from host, 2 %",
        "ready to be copied from",
    ];
    check(report, "gpu", &series, &ratios);
    assert_eq!(
        (&report["settings"]["chunks"], &report["settings"]["checkpoint_bytes"]),
        (&2.into(), &(8 << 20).into())
    );
    assert_eq!(report["series"][17]["bytes"], 9 << 20);
}

#[test]
fn a_gpu_that_is_not_there_is_told_of() {
    let home = tempfile::tempdir().expect("a temporary directory");
    for args in [["gpu", "--gpu", TWIN], ["limits", "--gpu", TWIN]] {
        let output = bench(&home, &args).output().expect("the program starts");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        let reason = format!("aquifer: bench {}: no ", args[0]);
        assert!(output.status.code() == Some(1) && told.contains(&reason), "{args:?}: {told}");
    }
    assert_empty(home.path());
}

#[test]
fn all() {
    let document = run(&["all", "--size", "9MiB", "--seconds", "1"]);
    let benches: Vec<&str> =
        document["benches"].as_array().expect("a list").iter().filter_map(|b| b["bench"].as_str()).collect();
    let everywhere = benches.strip_suffix(&["gpu"]).unwrap_or(&benches);
    assert_eq!(everywhere, ["limits", "transfer", "transfer", "transfer", "transfer", "publish", "swarm", "gossip"]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let home = tempfile::tempdir().expect("a temporary directory");
    for (args, reason) in [
        (["transfer", "--size", "9TiB"], "of memory may be used"),
        (["transfer", "--conns", "9"], "--conns 9 is too many"),
        (["publish", "--size", "9TiB"], "of memory may be used"),
        (["limits", "--dir", "nowhere"], "cannot make a directory in nowhere"),
    ] {
        let output = bench(&home, &args).output().expect("the program starts");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && told.contains(reason), "{args:?}: {told}");
    }
    assert_empty(home.path());
}

/// Bench processes below `pid`, with all that they started.
fn descendants(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let children = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let children: Vec<u32> =
        children.flat_map(|c| c.split(' ').filter_map(|p| p.parse().ok()).collect::<Vec<_>>()).collect();
    children.iter().flat_map(|child| std::iter::once(*child).chain(descendants(*child))).collect()
}

fn pid(raw: u32) -> Pid {
    i32::try_from(raw).ok().and_then(Pid::from_raw).expect("a pid")
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Starts a bench that takes long and waits until it has children.
fn start(home: &TempDir, args: &[&str], children: usize) -> (Child, Vec<u32>) {
    let mut command = bench(home, &[args, &["--runs", "1000"]].concat());
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the program starts");
    wait_until("the bench starts no processes", || descendants(child.id()).len() >= children);
    let started = descendants(child.id());
    (child, started)
}

fn wait_for_end(started: &[u32]) {
    wait_until("a process is left", || started.iter().all(|p| test_kill_process(pid(*p)).is_err()));
}

#[test]
fn an_interrupted_bench_leaves_nothing() {
    let home = tempfile::tempdir().expect("a temporary directory");
    let (mut child, started) = start(&home, &["transfer", "--size", "16MiB"], 4);
    kill_process(pid(child.id()), Signal::INT).expect("it is there");
    let mut told = String::new();
    child.stderr.take().expect("a pipe").read_to_string(&mut told).expect("text");
    assert_eq!(child.wait().expect("it ends").code(), Some(1));
    assert_eq!(told.lines().last(), Some("aquifer: interrupted"), "{told}");
    wait_for_end(&started);
    assert_empty(home.path());
}

#[test]
fn a_killed_bench_leaves_no_process() {
    let home = tempfile::tempdir().expect("a temporary directory");
    // The publisher's maker, both ends of TCP, or the agents and engines themselves.
    for (args, children) in [(["gossip", "--seconds", "9"], 2), (["swarm", "--size", "16MiB"], 6)] {
        let (mut child, started) = start(&home, &args, children);
        child.kill().expect("it is there");
        child.wait().expect("it ends");
        wait_for_end(&started);
    }
}
