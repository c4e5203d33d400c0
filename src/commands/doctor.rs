//! `aquifer doctor`: what this machine offers for moving chunks, what Aquifer will use of it, and what
//! would make it faster.

mod gpus;

use crate::output::{plain, print_json, print_line};
use crate::units;
use anyhow::Result;
use aquifer_cuda::DeviceError;
use aquifer_rdma::verbs::LinkLayer;
use aquifer_rdma::{DeviceSurvey, PortSurvey, RdmaConfig, Survey, survey};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::process::ExitCode;

/// Less than this is soon not enough to register chunk stores and engines' memory. A guess: some of the
/// smallest checkpoints.
const MEMORY_LOCK_BYTES_MIN: u64 = 1 << 30;
/// Of a packet on a link whose interfaces take jumbo frames.
const MTU_BYTES_MAX: u32 = 4096;

/// What there is of GPUs, or why there is nothing.
type Gpus = Result<aquifer_cuda::Survey, DeviceError>;

pub(crate) fn run(json: bool) -> Result<ExitCode> {
    let (rdma, gpus) = (survey(&RdmaConfig::default()), aquifer_cuda::survey());
    match json {
        true => print_json(&as_json(&rdma, &gpus))?,
        false => print_line(as_text(&rdma, &gpus).trim_end())?,
    };
    Ok(ExitCode::SUCCESS)
}

fn uses(survey: &Survey, gpus: &Gpus) -> Vec<String> {
    let mut uses = vec!["Between processes of one user on this machine: shared memory.".to_string()];
    let ports: Vec<String> = survey.usable().iter().map(port_name).collect();
    uses.push(match ports.is_empty() {
        true => "Between machines: TCP.".to_string(),
        false => format!("Between machines: RDMA over {}, with nodes that have it too; else TCP.", ports.join(", ")),
    });
    uses.push(gpus::uses(gpus));
    uses
}

fn port_name((device, port): &(&DeviceSurvey, &PortSurvey)) -> String {
    format!("{} port {}", device.name, port.port.number)
}

/// What a person could change, the most important first.
fn advice(survey: &Survey, gpus: &Gpus) -> Vec<String> {
    let mut advice = Vec::new();
    match &survey.devices {
        Err(error) => advice.push(format!("{error}. Only RDMA needs that; everything else works.")),
        Ok(devices) if devices.is_empty() => {
            advice.push("With an RDMA network card, chunks would come past the CPUs of those that hold them.".into());
        }
        Ok(devices) => devices.iter().for_each(|device| advice.extend(device_advice(device))),
    }
    if let Some(bytes) = survey.memory_lock_bytes.filter(|bytes| *bytes < MEMORY_LOCK_BYTES_MIN)
        && !survey.usable().is_empty()
    {
        advice.push(format!(
            "This user may lock only {} of memory, and what RDMA reads must be locked: raise it (ulimit -l, LimitMEMLOCK=infinity in the service's unit). What does not fit goes over TCP.",
            units::bytes(bytes)
        ));
    }
    advice.extend(gpus::advice(gpus));
    advice
}

fn device_advice(device: &DeviceSurvey) -> Vec<String> {
    let found = match &device.found {
        Ok(found) => found,
        Err(error) => return vec![format!("{} cannot be used: {error}", device.name)],
    };
    let mut advice = Vec::new();
    if !found.limits.windows {
        advice.push(format!(
            "{} has no memory windows (type 2B): without them a node that may read a chunk could read the memory around it, so this node copies each chunk before it is read.",
            device.name
        ));
    }
    for port in &found.ports {
        let name = format!("{} port {}", device.name, port.port.number);
        match &port.choice {
            Err(reason) => advice.push(format!("{name} is not used: {reason}.")),
            Ok(_) if port.port.mtu_bytes() < MTU_BYTES_MAX && port.port.link == LinkLayer::Ethernet => {
                advice.push(format!(
                    "{name} moves {} bytes in a packet: with an MTU of 4200 or more on {} and its switches it would move {MTU_BYTES_MAX}.",
                    port.port.mtu_bytes(),
                    if port.interface.is_empty() { "its interface" } else { &port.interface }
                ));
            }
            Ok(_) => {}
        }
    }
    advice
}

fn as_text(survey: &Survey, gpus: &Gpus) -> String {
    let mut text = String::new();
    let mut line = |words: String| {
        // A string takes any text.
        let _ = writeln!(text, "{}", plain(&words));
    };
    line("RDMA".into());
    match &survey.devices {
        Err(error) => line(format!("  none: {error}")),
        Ok(devices) if devices.is_empty() => line("  libibverbs is here; no device is".into()),
        Ok(devices) => devices.iter().flat_map(device_lines).for_each(&mut line),
    }
    line("GPUs".into());
    gpus::lines(gpus, survey).into_iter().for_each(&mut line);
    line(match survey.memory_lock_bytes {
        Some(bytes) => format!("Memory this user may lock: {}", units::bytes(bytes)),
        None => "Memory this user may lock: all".into(),
    });
    line(String::new());
    line("What Aquifer will use".into());
    uses(survey, gpus).into_iter().for_each(|words| line(format!("  {words}")));
    let advice = advice(survey, gpus);
    if !advice.is_empty() {
        line(String::new());
        line("What would make it faster, or safer".into());
        advice.into_iter().for_each(|words| line(format!("  {words}")));
    }
    text
}

fn device_lines(device: &DeviceSurvey) -> Vec<String> {
    let numa = device.numa_node.map_or(String::new(), |node| format!(", NUMA node {node}"));
    let found = match &device.found {
        Ok(found) => found,
        Err(error) => return vec![format!("  {}: {error}", device.name)],
    };
    let limits = &found.limits;
    let windows = if limits.windows { "memory windows" } else { "no memory windows" };
    let mut lines = vec![format!(
        "  {}: firmware {}{numa}, {windows}, {} reads at a time",
        device.name,
        if limits.firmware.is_empty() { "unknown" } else { &limits.firmware },
        limits.reads_out_max.min(limits.reads_in_max)
    )];
    for port in &found.ports {
        let state = if port.port.active { "up" } else { "down" };
        let link = match port.port.link {
            LinkLayer::InfiniBand => "InfiniBand",
            LinkLayer::Ethernet => "Ethernet",
        };
        let mtu = format!("MTU {}", port.port.mtu_bytes());
        let mut words = vec![state, link, &mtu, &port.rate, &port.interface];
        words.retain(|word| !word.is_empty());
        lines.push(format!("    port {}: {}", port.port.number, words.join(", ")));
        for gid in &port.port.gids {
            let chosen = if port.choice.as_ref() == Ok(gid) { "   <- used" } else { "" };
            lines.push(format!("      {gid}{chosen}"));
        }
    }
    lines
}

fn as_json(survey: &Survey, gpus: &Gpus) -> Value {
    let (devices, problem) = match &survey.devices {
        Ok(devices) => (devices.iter().map(device_json).collect(), Value::Null),
        Err(error) => (Vec::new(), json!(error.to_string())),
    };
    json!({
        "rdma": {"devices": devices, "problem": problem},
        "gpus": gpus::as_json(gpus, survey),
        "memory_lock_bytes": survey.memory_lock_bytes,
        "uses": uses(survey, gpus),
        "advice": advice(survey, gpus),
    })
}

fn device_json(device: &DeviceSurvey) -> Value {
    let found = match &device.found {
        Ok(found) => found,
        Err(error) => return json!({"name": device.name, "problem": error.to_string()}),
    };
    let ports: Vec<Value> = found.ports.iter().map(port_json).collect();
    json!({
        "name": device.name,
        "firmware": found.limits.firmware,
        "numa_node": device.numa_node,
        "memory_windows": found.limits.windows,
        "reads_out_max": found.limits.reads_out_max,
        "reads_in_max": found.limits.reads_in_max,
        "ports": ports,
        "problem": Value::Null,
    })
}

fn port_json(port: &PortSurvey) -> Value {
    let gids: Vec<Value> = (port.port.gids.iter())
        .map(|gid| {
            let used = port.choice.as_ref() == Ok(gid);
            json!({"index": gid.index, "address": gid.ip().to_string(), "kind": format!("{:?}", gid.kind), "used": used})
        })
        .collect();
    json!({
        "number": port.port.number,
        "active": port.port.active,
        "link": format!("{:?}", port.port.link),
        "mtu_bytes": port.port.mtu_bytes(),
        "rate": port.rate,
        "interface": port.interface,
        "gids": gids,
        "problem": port.choice.as_ref().err(),
    })
}
