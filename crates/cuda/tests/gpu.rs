//! Everything that needs an NVIDIA GPU, and `python3` with PyTorch as the engine whose memory is opened:
//! `cargo test -p aquifer-cuda --features gpu-tests`.
#![allow(clippy::unwrap_used, unreachable_pub, reason = "tests")]

mod common;

use aquifer_core::ChunkHash;
use aquifer_cuda::landing::{Landing, Placement};
use aquifer_cuda::{Device, DeviceError, DeviceUuid, Gpu, HandleError, RegionHandle, worker};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

fn gpu() -> Gpu {
    let all = Gpu::list().expect("these tests need a GPU");
    Gpu::open(all.first().expect("these tests need a GPU").0).unwrap()
}

#[test]
fn it_hashes_at_every_boundary() {
    common::hashes_at_every_boundary(&gpu());
}

#[test]
fn it_hashes_any_batch() {
    common::hashes_any_batch(&gpu(), 200);
}

#[test]
fn it_sees_a_flipped_bit() {
    common::sees_a_flipped_bit(&gpu(), 100);
}

#[test]
fn it_lands_and_verifies() {
    common::lands_and_verifies(&gpu());
}

#[test]
fn it_applies() {
    common::applies(&gpu());
}

/// Of this very device, and of each other one that is here.
#[test]
fn it_takes_from_another() {
    let gpu = gpu();
    common::takes_from_another(&gpu, &gpu);
    let others: Vec<DeviceUuid> = Gpu::list().unwrap().into_iter().map(|(uuid, _)| uuid).skip(1).collect();
    if others.is_empty() {
        eprintln!("copies from one GPU to another were not tried: there is one");
    }
    for other in others {
        common::takes_from_another(&gpu, &Gpu::open(other).unwrap());
        common::takes_from_another(&Gpu::open(other).unwrap(), &gpu);
    }
}

/// What an engine has in its memory is copied out of it, and to another place, while it keeps it.
#[test]
fn chunks_come_out_of_an_engines_tensor() {
    let gpu = gpu();
    let mut engine = Engine::start("");
    let memory = gpu.open(&engine.tensor(1_000_003)).unwrap();
    let bytes = common::random(11, 1_000_003);
    let chunk = Placement { from: common::registered(&gpu, &bytes), to: memory.clone(), hash: ChunkHash::of(&bytes) };
    assert!(Landing::new(gpu.clone()).land(&[chunk]).unwrap().wrong.is_empty());
    let (worker, out) = (worker(gpu.clone()), common::host(&vec![0; bytes.len()]));
    worker.bring_out(&[(memory.clone(), out.clone())]).unwrap();
    assert_eq!(out.hash().unwrap(), ChunkHash::of(&bytes));
    let staged = worker.stage_across(&[(memory, ChunkHash::of(&bytes))]).unwrap();
    assert!(common::downloaded(&gpu, staged[0].as_ref().unwrap()) == bytes);
}

#[test]
fn it_refuses_what_is_wrong() {
    common::refuses_what_is_wrong(&gpu());
}

#[test]
fn a_gpu_is_found_by_its_uuid_alone() {
    let gpu = gpu();
    let again: DeviceUuid = gpu.uuid().to_string().parse().unwrap();
    assert_eq!(Gpu::open(again).unwrap().uuid(), gpu.uuid());
    let error = Gpu::open(DeviceUuid([0xee; 16])).unwrap_err();
    assert!(error.to_string().contains(&gpu.uuid().to_string()), "{error}");
}

#[test]
fn too_much_memory_is_an_error_that_says_how_much_there_is() {
    let gpu = gpu();
    let (_, total) = gpu.memory().unwrap();
    let error = gpu.allocate(2 * total).unwrap_err();
    assert!(matches!(error, DeviceError::OutOfMemory { .. }), "{error}");
    common::refuses_what_is_wrong(&gpu);
}

#[test]
fn chunks_land_in_an_engines_tensor() {
    let gpu = gpu();
    let mut engine = Engine::start("");
    let region = engine.tensor(1_000_003);
    assert_eq!(region.device(), gpu.uuid());
    let memory = gpu.open(&region).unwrap();
    let bytes = common::random(7, 1_000_003);
    let chunk = Placement { from: common::registered(&gpu, &bytes), to: memory.clone(), hash: ChunkHash::of(&bytes) };
    assert!(Landing::new(gpu.clone()).land(&[chunk]).unwrap().wrong.is_empty());
    assert_eq!(engine.ask("sum"), bytes.iter().map(|byte| u64::from(*byte)).sum::<u64>().to_string());
    // The same allocation, open already.
    assert!(common::downloaded(&gpu, &gpu.open(&region).unwrap()) == bytes);
}

#[test]
fn an_engine_that_dies_takes_nothing_along() {
    let gpu = gpu();
    let mut engine = Engine::start("");
    let region = engine.tensor(100_000);
    let memory = gpu.open(&region).unwrap();
    engine.kill();
    // Open memory outlives its engine, or reading it fails: either way this process goes on.
    let bytes = common::random(8, 100_000);
    let chunk = Placement { from: common::registered(&gpu, &bytes), to: memory, hash: ChunkHash::of(&bytes) };
    eprintln!("landing in a dead engine's memory: {:?}", Landing::new(gpu.clone()).land(&[chunk]));
    let error = gpu.open(&region).map(|_| "opened").unwrap_err();
    assert!(matches!(error, DeviceError::Handle(HandleError::Dead { .. })), "{error}");
    common::refuses_what_is_wrong(&gpu);
}

#[test]
fn regions_that_cannot_be_are_refused() {
    let gpu = gpu();
    let mut engine = Engine::start("");
    let region = engine.line(4096);
    let parse = |uuid: DeviceUuid, len| RegionHandle::parse(uuid, &region.handle, region.offset, len).unwrap();
    let wrong = gpu.open(&parse(DeviceUuid([0xee; 16]), 4096)).unwrap_err();
    assert!(matches!(wrong, DeviceError::Handle(HandleError::OtherDevice { .. })), "{wrong}");
    let long = gpu.open(&parse(gpu.uuid(), 1 << 40)).unwrap_err();
    assert!(matches!(long, DeviceError::Handle(HandleError::TooShort { .. })), "{long}");
    let garbage = RegionHandle::parse(gpu.uuid(), &[0x5a; 64], 0, 1).unwrap();
    let error = gpu.open(&garbage).unwrap_err();
    assert!(matches!(error, DeviceError::Handle(HandleError::Dead { .. })), "{error}");

    let mut engine = Engine::start("expandable_segments:True");
    let line = engine.line(4096);
    let error = RegionHandle::parse(gpu.uuid(), &line.handle, line.offset, 4096).unwrap_err();
    assert_eq!(error, HandleError::Expandable);
}

/// A process that holds a PyTorch tensor.
struct Engine {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

struct Line {
    uuid: String,
    handle: Vec<u8>,
    offset: u64,
}

const ENGINE: &str = r#"
import sys, torch
held = []
for line in sys.stdin:
    words = line.split()
    if words[0] == "tensor":
        # Behind another one, so that its offset is not zero.
        held += [torch.zeros(777, dtype=torch.uint8, device="cuda"), torch.zeros(int(words[1]), dtype=torch.uint8, device="cuda")]
        torch.cuda.synchronize()
        shared = held[-1].untyped_storage()._share_cuda_()
        print(torch.cuda.get_device_properties(0).uuid, shared[1].hex(), shared[3], flush=True)
    elif words[0] == "sum":
        print(held[-1].sum(dtype=torch.int64).item(), flush=True)
"#;

impl Engine {
    fn start(allocator: &str) -> Self {
        let mut python = Command::new("python3");
        python.args(["-c", ENGINE]).env("PYTORCH_CUDA_ALLOC_CONF", allocator);
        let mut child =
            python.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("these tests need python3 with PyTorch");
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Engine { child, input, output }
    }

    fn ask(&mut self, question: &str) -> String {
        writeln!(self.input, "{question}").unwrap();
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "the engine ended: is PyTorch with CUDA here?");
        line.trim().to_string()
    }

    fn line(&mut self, len: u64) -> Line {
        let line = self.ask(&format!("tensor {len}"));
        let words: Vec<_> = line.split(' ').collect();
        let byte = |at: usize| u8::from_str_radix(&words[1][at..at + 2], 16).unwrap();
        let handle: Vec<u8> = (0..words[1].len()).step_by(2).map(byte).collect();
        eprintln!("a handle of {} bytes begins with {:?}", handle.len(), &handle[..2]);
        Line { uuid: words[0].into(), handle, offset: words[2].parse().unwrap() }
    }

    fn tensor(&mut self, len: u64) -> RegionHandle {
        let line = self.line(len);
        RegionHandle::parse(line.uuid.parse().unwrap(), &line.handle, line.offset, len).unwrap()
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
