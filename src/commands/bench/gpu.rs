//! `aquifer bench gpu`: what a GPU does with chunks, beside plain copies of as many bytes.

mod chosen;
mod chunks;
mod copies;
mod registrar;
mod shapes;

pub(super) use chosen::Chosen;
pub(super) use chunks::Chunks;
pub(super) use copies::{Copies, Setup as CopiesSetup, Task as Copy};
pub(super) use registrar::Registrar;

use super::args::{Card, Size};
use super::figures::{Asked, Ratio, Run, Series};
use super::lab::{Lab, Thing};
use super::report::Report;
use anyhow::{Context, Result};
use chunks::{Changed, LONG, MIDDLE, Origin, Ready, SHORT, Source, Task, UNALIGNED};
use serde_json::json;

const COPY_IN: &str = "plain copy, host to GPU";
const COPY_WITHIN: &str = "plain copy, on the GPU";
const IN_ORDER: &str = "load, in order";
const ANY_ORDER: &str = "load, any order";
const PAGEABLE: &str = "load, not registered";
const SHADOW_IN_ORDER: &str = "apply from shadow, in order";
const SHADOW: &str = "apply from shadow, any order";
const SHADOW_SOME: &str = "apply from shadow, 2 %";
const HOST: &str = "apply from host, any order";
const HOST_SOME: &str = "apply from host, 2 %";
const HASH_LONG: &str = "BLAKE3, 4 MiB";
const HASH_SHORT: &str = "BLAKE3, 256 KiB";
const CALLED_LONG: &str = "BLAKE3 called, 4 MiB";
const CALLED_SHORT: &str = "BLAKE3 called, 256 KiB";
const TOUCH: &str = "first touch";
const REGISTER: &str = "registering";

const THINGS: [Thing<Task>; 17] = [
    thing(Task::Copy(Copy::In), COPY_IN, "registered memory in one piece: the limit of a load"),
    thing(Task::Load(Source::InOrder), IN_ORDER, "registered chunks to the GPU, every one hashed there"),
    thing(Task::Load(Source::AnyOrder), ANY_ORDER, "the same, lying in another order on the host"),
    thing(Task::Load(Source::Pageable), PAGEABLE, "the same, by way of staging memory"),
    thing(Task::Copy(Copy::Out), "plain copy, GPU to host", "as many bytes"),
    thing(Task::Copy(Copy::Within), COPY_WITHIN, "as many bytes, each read and written"),
    thing(
        Task::Apply(Origin::Shadow, Changed::AllInOrder),
        SHADOW_IN_ORDER,
        "from the first copy queued to the last done",
    ),
    thing(Task::Apply(Origin::Shadow, Changed::AllAnyOrder), SHADOW, "the same, by one launch of a kernel"),
    thing(Task::Apply(Origin::Shadow, Changed::Some), SHADOW_SOME, "one chunk of 50"),
    thing(Task::Apply(Origin::Host, Changed::AllAnyOrder), HOST, "from registered memory, verified before"),
    thing(Task::Apply(Origin::Host, Changed::Some), HOST_SOME, "one chunk of 50"),
    thing(Task::HashThere(LONG), HASH_LONG, "many chunks of that length in one launch, by the GPU's clock"),
    thing(Task::HashThere(MIDDLE), "BLAKE3, 1 MiB", "the same"),
    thing(Task::HashThere(SHORT), HASH_SHORT, "the same"),
    thing(Task::HashThere(UNALIGNED), "BLAKE3, 5,000,001 bytes", "the same; 15 of 16 at unaligned addresses"),
    thing(Task::HashCalled(LONG), CALLED_LONG, "the same, from the call until the digests are on the host"),
    thing(Task::HashCalled(SHORT), CALLED_SHORT, "the same"),
];

const REGISTRATION: [Thing<registrar::Task>; 2] = [
    Thing { key: registrar::Task::Touch, name: TOUCH, what: "fresh shared memory made present, by all cores" },
    Thing { key: registrar::Task::Register, name: REGISTER, what: "the same memory pinned for copies, by all cores" },
];

const fn thing(key: Task, name: &'static str, what: &'static str) -> Thing<Task> {
    Thing { key, name, what }
}

pub(super) fn run(lab: &Lab, card: &Card, size: Size) -> Result<Report> {
    let device = Chosen::of(card)?;
    let setup = chunks::Setup { device: device.clone(), size_bytes: size.size };
    let (mut chunks, ready) = lab.start::<Chunks>(&setup)?;
    let mut series = lab.by_turns(&THINGS, |task| Ok(chunks.ask(&task)?.alone()))?;
    // Its memory is free when the next has as much.
    drop(chunks);
    let setup = registrar::Setup { device, bytes: ready.size_bytes };
    let (mut registrar, ()) = lab.start::<Registrar>(&setup)?;
    series.extend(lab.by_turns(&REGISTRATION, |task| Ok(registrar.ask(&task)?.alone()))?);

    let settings = json!({
        "gpu": ready.name,
        "size_bytes": ready.size_bytes,
        "checkpoint_bytes": ready.checkpoint_bytes,
        "chunks": ready.chunks,
        "runs": lab.runs(),
    });
    let mut report = Report::new("gpu", settings);
    report.ratios = ratios(&series, &ready)?;
    report.notes = vec![
        "loads and applications are of Llama 8B's tensors in bfloat16, in chunks of at most 4 MiB, as many as --size has room for; hashing and registration are of --size".into(),
        "after every run digests were compared with the CPU's; before it, every byte was wrong; a flipped bit was found. CPU time counts these checks too".into(),
    ];
    if !ready.is_whole {
        report.notes.push("less than all of Llama 8B: nothing is asked of these figures".into());
    }
    report.series = series;
    Ok(report)
}

/// What is asked is asked of all of Llama 8B, on an NVIDIA H200.
fn ratios(series: &[Series], ready: &Ready) -> Result<Vec<Ratio>> {
    let asked = |asked| if ready.is_whole { asked } else { Asked::Nothing };
    let rate = |name, of: &str, bound| {
        let what = format!("GB/s of '{of}'");
        let runs = find(series, of)?.runs.iter().map(Run::gb_per_s);
        anyhow::Ok(Ratio { unit: " GB/s", ..Ratio::new(name, what, asked(bound), runs) })
    };
    let to_copy = |name, of: &str, copy: &str, bound| {
        let (of, copy) = (find(series, of)?, find(series, copy)?);
        let turns = of.runs.iter().zip(&copy.runs).map(|(of, copy)| of.gb_per_s() / copy.gb_per_s());
        anyhow::Ok(Ratio::new(name, format!("GB/s of '{}' to '{}'", of.name, copy.name), asked(bound), turns))
    };
    let pause = |name, of: &str, bound| {
        let what = format!("what the GPU takes of the pause: '{of}'");
        let runs = find(series, of)?.runs.iter().map(|run| run.seconds * 1e3);
        anyhow::Ok(Ratio { unit: " ms", ..Ratio::new(name, what, asked(bound), runs) })
    };
    let (touch, register) = (find(series, TOUCH)?, find(series, REGISTER)?);
    let ready_after = touch.runs.iter().zip(&register.runs).map(|(touch, register)| touch.seconds + register.seconds);
    let what = format!("'{TOUCH}' and '{REGISTER}'");
    Ok(vec![
        rate("hashing, 4 MiB", HASH_LONG, Asked::AtLeast(1600.0))?,
        rate("hashing, 256 KiB", HASH_SHORT, Asked::AtLeast(1000.0))?,
        rate("hashing called, 4 MiB", CALLED_LONG, Asked::Nothing)?,
        rate("hashing called, 256 KiB", CALLED_SHORT, Asked::Nothing)?,
        to_copy("in order, to a plain copy", IN_ORDER, COPY_IN, Asked::AtLeast(0.95))?,
        to_copy("any order, to a plain copy", ANY_ORDER, COPY_IN, Asked::AtLeast(0.95))?,
        to_copy("not registered, to a plain copy", PAGEABLE, COPY_IN, Asked::Nothing)?,
        to_copy("apply, to a plain copy", SHADOW, COPY_WITHIN, Asked::Nothing)?,
        pause("pause, from shadow", SHADOW, Asked::AtMost(15.0))?,
        pause("pause, from shadow, 2 %", SHADOW_SOME, Asked::AtMost(2.0))?,
        pause("pause, from host", HOST, Asked::AtMost(350.0))?,
        pause("pause, from host, 2 %", HOST_SOME, Asked::Nothing)?,
        Ratio { unit: " s", ..Ratio::new("ready to be copied from", what, asked(Asked::AtMost(1.0)), ready_after) },
    ])
}

fn find<'a>(series: &'a [Series], name: &str) -> Result<&'a Series> {
    series.iter().find(|s| s.name == name).with_context(|| format!("'{name}' was not measured"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each thing as fast as the second argument says, in GB/s; all runs are of Llama 8B.
    fn measured(gb_per_s: impl Fn(&str) -> f64) -> Vec<Series> {
        const BYTES: u64 = 16_060_522_496;
        let names = THINGS.iter().map(|t| t.name).chain(REGISTRATION.iter().map(|t| t.name));
        let series = |name| {
            let run = Run { bytes: BYTES, seconds: 16.060_522_496 / gb_per_s(name), processes: vec![] };
            Series { name, what: String::new(), runs: vec![run; 3] }
        };
        names.map(series).collect()
    }

    fn ready(is_whole: bool) -> Ready {
        Ready { name: "a GPU".into(), size_bytes: 1, checkpoint_bytes: 1, chunks: 1, is_whole }
    }

    #[test]
    fn figures_are_held_against_what_is_asked_of_a_whole_checkpoint() {
        let fast = |name: &str| match name {
            HASH_LONG | HASH_SHORT | SHADOW | COPY_WITHIN => 2000.0,
            SHADOW_SOME => 50_000.0,
            _ => 50.0,
        };
        let met = |ready, slow: &str| -> Vec<Option<bool>> {
            let series = measured(|name| if name == slow { 40.0 } else { fast(name) });
            ratios(&series, &ready).unwrap().iter().map(Ratio::is_met).collect()
        };
        let asked: Vec<_> = met(ready(true), "").into_iter().flatten().collect();
        assert_eq!(asked, [true; 8]);
        let too_slow = |slow| met(ready(true), slow).into_iter().flatten().filter(|met| !met).count();
        let each = [HASH_LONG, HASH_SHORT, IN_ORDER, ANY_ORDER, SHADOW, SHADOW_SOME, HOST];
        assert_eq!(each.map(too_slow), [1; 7]);
        assert_eq!(met(ready(false), "").into_iter().flatten().count(), 0);
        assert!(ratios(&[], &ready(true)).is_err());
    }
}
