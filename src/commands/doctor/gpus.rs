//! The doctor on GPUs.

use super::{Gpus, port_name};
use crate::units;
use aquifer_cuda::{DeviceUuid, GpuSurvey};
use aquifer_rdma::Survey;
use serde_json::{Value, json};

/// What the program does with what is found: as long as that is all, it is said here.
pub(super) fn uses(gpus: &Gpus) -> String {
    match gpus {
        Ok(found) if !found.gpus.is_empty() => {
            "For engines on GPUs: chunks come to host memory, go from there to each GPU over PCIe, and are verified on it; \
             from one GPU to another directly, where they have peer access. Others are served from host memory, through \
             which also comes what lies on a GPU alone. dma-buf is not used."
                .into()
        }
        _ => "For engines: host memory, since no GPU can be used.".into(),
    }
}

pub(super) fn advice(gpus: &Gpus) -> Vec<String> {
    match gpus {
        Ok(found) if !found.gpus.is_empty() && !found.is_told_of_batches => vec![format!(
            "The NVIDIA driver knows CUDA {}: one of 12.8 or newer is told of many copies at once, which saves some of the time of loads.",
            found.cuda
        )],
        _ => Vec::new(),
    }
}

pub(super) fn lines(gpus: &Gpus, rdma: &Survey) -> Vec<String> {
    let found = match gpus {
        Ok(found) if found.gpus.is_empty() => return vec!["  the NVIDIA driver is here; no GPU is".into()],
        Ok(found) => found,
        Err(error) => return vec![format!("  none: {error}")],
    };
    let driver = found.driver.as_deref().unwrap_or("unknown");
    let mut lines = vec![format!("  driver {driver}, CUDA {}", found.cuda)];
    lines.extend(found.gpus.iter().flat_map(|gpu| gpu_lines(gpu, rdma)));
    lines
}

fn gpu_lines(gpu: &GpuSurvey, rdma: &Survey) -> [String; 4] {
    let ports = match (nearest(gpu, rdma), rdma.usable().is_empty()) {
        (_, true) => "none".into(),
        (near, _) if near.is_empty() => "not known: the kernel names no NUMA nodes".into(),
        (near, _) => near.join(", "),
    };
    let [peers, dma_buf] = [peers(&gpu.peers), if gpu.dma_buf { "yes" } else { "no" }.into()];
    [
        format!("  {}: {}", gpu.uuid, gpu.name),
        format!("    {} of memory, compute capability {}", units::bytes(gpu.memory_bytes), capability(gpu)),
        format!("    PCI {}, NUMA node {}", gpu.pci, gpu.numa_node.map_or("unknown".into(), |node| node.to_string())),
        format!("    peer access: {peers}; dma-buf: {dma_buf}; nearest RDMA ports: {ports}"),
    ]
}

fn nearest(gpu: &GpuSurvey, rdma: &Survey) -> Vec<String> {
    gpu.numa_node.map(|node| rdma.nearest(node).iter().map(port_name).collect()).unwrap_or_default()
}

fn peers(peers: &[DeviceUuid]) -> String {
    match peers {
        [] => "none".into(),
        peers => peers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    }
}

fn capability(gpu: &GpuSurvey) -> String {
    format!("{}.{}", gpu.capability.0, gpu.capability.1)
}

pub(super) fn as_json(gpus: &Gpus, rdma: &Survey) -> Value {
    let found = match gpus {
        Ok(found) => found,
        Err(error) => return json!({"driver": null, "cuda": null, "devices": [], "problem": error.to_string()}),
    };
    let problem = found.gpus.is_empty().then_some("the NVIDIA driver is here; no GPU is");
    let devices: Vec<Value> = found.gpus.iter().map(|gpu| gpu_json(gpu, rdma)).collect();
    json!({"driver": found.driver, "cuda": found.cuda, "devices": devices, "problem": problem})
}

fn gpu_json(gpu: &GpuSurvey, rdma: &Survey) -> Value {
    json!({
        "uuid": gpu.uuid.to_string(),
        "name": gpu.name,
        "memory_bytes": gpu.memory_bytes,
        "compute_capability": capability(gpu),
        "pci": gpu.pci,
        "numa_node": gpu.numa_node,
        "peers": gpu.peers.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "dma_buf": gpu.dma_buf,
        "nearest_rdma_ports": nearest(gpu, rdma),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use aquifer_cuda::{DeviceError, Survey as GpuFinds};

    fn nothing() -> Survey {
        Survey { devices: Ok(Vec::new()), memory_lock_bytes: None }
    }

    fn two() -> Gpus {
        let gpu = |id: u8| GpuSurvey {
            uuid: DeviceUuid([id; 16]),
            name: "NVIDIA H200".into(),
            memory_bytes: 141 << 30,
            capability: (9, 0),
            pci: format!("0000:{id:02x}:00.0"),
            numa_node: (id == 1).then_some(0),
            dma_buf: true,
            peers: vec![DeviceUuid([3 - id; 16])],
        };
        Ok(GpuFinds {
            driver: Some("580.159.04".into()),
            cuda: "12.4".into(),
            is_told_of_batches: false,
            gpus: vec![gpu(1), gpu(2)],
        })
    }

    #[test]
    fn people_are_told_of_every_gpu() {
        let text = lines(&two(), &nothing()).join("\n");
        let first = DeviceUuid([1; 16]).to_string();
        for part in [
            "driver 580.159.04, CUDA 12.4",
            &format!("{first}: NVIDIA H200"),
            "141.0 GiB of memory, compute capability 9.0",
            "PCI 0000:01:00.0, NUMA node 0",
            "PCI 0000:02:00.0, NUMA node unknown",
            &format!("peer access: {first}; dma-buf: yes; nearest RDMA ports: none"),
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        assert!(uses(&two()).contains("over PCIe") && advice(&two())[0].contains("12.8"));
    }

    #[test]
    fn programs_are_told_the_same() {
        let told = as_json(&two(), &nothing());
        assert_eq!(told["devices"][1]["peers"][0], DeviceUuid([1; 16]).to_string());
        assert_eq!((&told["devices"][0]["numa_node"], &told["devices"][1]["numa_node"]), (&json!(0), &Value::Null));
        assert_eq!((&told["devices"][0]["compute_capability"], &told["problem"]), (&json!("9.0"), &Value::Null));
    }

    #[test]
    fn without_a_driver_one_line_says_so() {
        let gpus = Err(DeviceError::NoDriver);
        let lines = lines(&gpus, &nothing());
        assert!(lines.len() == 1 && lines[0].starts_with("  none: no NVIDIA driver is here"), "{lines:?}");
        assert!(uses(&gpus).contains("host memory") && advice(&gpus).is_empty());
        assert!(as_json(&gpus, &nothing())["problem"].is_string());
    }
}
