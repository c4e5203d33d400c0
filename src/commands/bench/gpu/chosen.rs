//! Which GPU is measured, and how much of it.

use super::super::args::Card;
use super::super::machine;
use crate::units;
use anyhow::{Context, Result, bail};
use aquifer_cuda::{DeviceError, DeviceUuid, Gpu};
use serde::{Deserialize, Serialize};

/// Unless another is asked for: what holds Llama 8B's 16.06 GB.
const SIZE_BYTES: u64 = 16 << 30;
/// The least that has a chunk of each length that is hashed.
const SIZE_BYTES_MIN: u64 = 8 << 20;
/// GPU memory that is left for what kernels are told, staging buffers and whoever else is there. Guess.
const SPARE_BYTES: u64 = 256 << 20;
/// How often the bytes lie on the GPU: where an engine reads them, and what is copied there.
const GPU_COPIES: u64 = 2;
/// How often they lie in host memory; with a twin, its copies do too.
const HOST_COPIES: u64 = 1;

/// A GPU, by the name that every process knows it by.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in super::super) struct Chosen {
    uuid: String,
    /// Made of host memory.
    pub(super) is_twin: bool,
}

impl Chosen {
    /// The one that was asked for, or else the first. An error says that there is none, and why.
    pub(in super::super) fn of(card: &Card) -> Result<Self, DeviceError> {
        let named = |uuid: DeviceUuid, is_twin| Ok(Chosen { uuid: uuid.to_string(), is_twin });
        if let Some(twin) = card.twin_gpu {
            return named(twin, true);
        }
        let all = Gpu::list()?;
        let found = || all.iter().map(|(uuid, _)| uuid.to_string()).collect::<Vec<_>>().join(", ");
        match (card.gpu, all.first()) {
            (Some(wanted), _) if all.iter().all(|(uuid, _)| *uuid != wanted) => {
                Err(DeviceError::NotFound { wanted, found: found() })
            }
            (Some(wanted), _) => named(wanted, false),
            (None, Some((first, _))) => named(*first, false),
            (None, None) => Err(DeviceError::NoGpu),
        }
    }

    pub(super) fn uuid(&self) -> Result<DeviceUuid> {
        self.uuid.parse().context("the GPU that was chosen")
    }

    /// How often bytes are in host memory that are once there and [`GPU_COPIES`] times on this GPU.
    pub(in super::super) fn host_copies(&self) -> u64 {
        if self.is_twin { HOST_COPIES + GPU_COPIES } else { HOST_COPIES }
    }

    /// How much to measure with: `asked`, or what fits both the host and the `free` bytes of the GPU.
    pub(super) fn size(&self, asked: Option<u64>, free: u64) -> Result<u64> {
        let size = machine::size(asked.map(at_least).transpose()?, SIZE_BYTES, self.host_copies())?;
        on_gpu(size, asked.is_some(), free)
    }
}

fn at_least(asked: u64) -> Result<u64> {
    match asked {
        0..SIZE_BYTES_MIN => bail!("--size must be at least {}", units::bytes(SIZE_BYTES_MIN)),
        _ => Ok(asked),
    }
}

/// Of `free` bytes, those that may be used for one of the copies.
pub(super) fn room(free: u64) -> u64 {
    free.saturating_sub(SPARE_BYTES) / GPU_COPIES
}

fn on_gpu(size: u64, is_asked: bool, free: u64) -> Result<u64> {
    let room = room(free);
    let halves = std::iter::successors(Some(size), |size| Some(size / 2));
    let fits = halves.take_while(|size| *size >= SIZE_BYTES_MIN).find(|size| *size <= room);
    match fits {
        Some(fits) if fits == size || !is_asked => Ok(fits),
        _ => bail!(
            "--size {} is too much: it is on the GPU {GPU_COPIES} times, and {} are free there; try --size {}MiB",
            units::bytes(size),
            units::bytes(free),
            room >> 20
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn half_of_what_a_gpu_has_free_is_used_at_most() {
        assert_eq!(on_gpu(16 * GIB, false, 80 * GIB).unwrap(), 16 * GIB);
        assert_eq!(on_gpu(16 * GIB, false, 32 * GIB).unwrap(), 8 * GIB);
        assert_eq!(on_gpu(GIB, true, 3 * GIB).unwrap(), GIB);
        let refused = on_gpu(16 * GIB, true, 24 * GIB).unwrap_err().to_string();
        assert!(refused.contains("on the GPU 2 times") && refused.ends_with("--size 12160MiB"), "{refused}");
        assert!(on_gpu(GIB, false, SPARE_BYTES).is_err());
    }

    #[test]
    fn less_than_a_chunk_of_each_length_is_refused() {
        let twin = Chosen { uuid: DeviceUuid([1; 16]).to_string(), is_twin: true };
        assert!(twin.size(Some(SIZE_BYTES_MIN - 1), u64::MAX).unwrap_err().to_string().contains("at least 8.0 MiB"));
        assert_eq!(twin.size(Some(SIZE_BYTES_MIN), u64::MAX).unwrap(), SIZE_BYTES_MIN);
    }
}
