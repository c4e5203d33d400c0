//! What the kernel says of this machine and of a process.

use crate::units;
use anyhow::{Context, Result, bail};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Of the memory that is available, the part that benches may take: the rest is for the kernel's
/// own buffers and for whoever else is here. Guess.
const USABLE_PERCENT: u64 = 90;
/// No default size is less.
const SIZE_BYTES_MIN: u64 = 64 << 20;

/// What a result must be read with.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Machine {
    date_utc: String,
    version: &'static str,
    build: &'static str,
    kernel: String,
    cpu: String,
    cores: usize,
    memory_bytes: u64,
    available_bytes: u64,
    /// Of the last minute, before the bench began.
    load: String,
}

impl Machine {
    pub(super) fn here() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let (cpus, load) = (read("/proc/cpuinfo"), read("/proc/loadavg"));
        let cpu = cpus.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": ")).map(|(_, name)| name);
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        Machine {
            date_utc: date(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()),
            version: env!("CARGO_PKG_VERSION"),
            build: if cfg!(debug_assertions) { "debug" } else { "release" },
            kernel: format!("Linux {release} {}", std::env::consts::ARCH),
            cpu: cpu.unwrap_or("unknown").to_string(),
            cores: cores(),
            memory_bytes: meminfo("MemTotal").unwrap_or(0),
            available_bytes: available_bytes(),
            load: load.split(' ').next().unwrap_or_default().to_string(),
        }
    }

    pub(super) fn text(&self) -> String {
        format!(
            "{} UTC, aquifer {} ({} build)\n{}, {}, {} cores, {} of memory ({} available), load {}",
            self.date_utc,
            self.version,
            self.build,
            self.kernel,
            self.cpu,
            self.cores,
            units::bytes(self.memory_bytes),
            units::bytes(self.available_bytes),
            self.load
        )
    }
}

pub(super) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Works on each item on a thread of its own; what came of each, in their order, or the first error.
pub(super) fn each<T: Send, R: Send>(
    items: impl Iterator<Item = T>,
    work: impl Fn(T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let work = &work;
    std::thread::scope(|scope| {
        let threads: Vec<_> = items.map(|item| scope.spawn(move || work(item))).collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

/// The size to measure with: `asked`, or the largest of `default` and its halves that memory
/// suffices for. `copies` is how often a bench has its bytes in memory.
pub(super) fn size(asked: Option<u64>, default: u64, copies: u64) -> Result<u64> {
    size_within(available_bytes() / 100 * USABLE_PERCENT, asked, default, copies)
}

fn size_within(usable: u64, asked: Option<u64>, default: u64, copies: u64) -> Result<u64> {
    let needed = |size: u64| size.saturating_mul(copies);
    match asked {
        Some(0) => bail!("--size must be at least 1"),
        Some(size) if needed(size) <= usable => Ok(size),
        Some(size) => bail!(
            "--size {} is too much: it is in memory {copies} times here, and {} of memory may be used; try --size {}MiB",
            units::bytes(size),
            units::bytes(usable),
            (usable / copies) >> 20
        ),
        None => {
            let halves = std::iter::successors(Some(default), |size| Some(size / 2));
            let mut halves = halves.take_while(|size| *size >= SIZE_BYTES_MIN);
            halves.find(|size| needed(*size) <= usable).with_context(|| {
                let least = units::bytes(needed(SIZE_BYTES_MIN));
                format!("there is too little memory: {} may be used, at least {least} are needed", units::bytes(usable))
            })
        }
    }
}

/// Fails if a file system has not room for `bytes`.
pub(super) fn check_room(dir: &Path, bytes: u64) -> Result<()> {
    let found = rustix::fs::statvfs(dir).with_context(|| format!("cannot look at {}", dir.display()))?;
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    if free < bytes {
        bail!(
            "{} has {} free and {} are needed: choose another with --dir, or a smaller --size",
            dir.display(),
            units::bytes(free),
            units::bytes(bytes)
        );
    }
    Ok(())
}

/// Memory that may be used without anything being driven out: the machine's, or what is left to
/// this control group.
fn available_bytes() -> u64 {
    let machine = meminfo("MemAvailable").unwrap_or(0);
    let group = |file: &str| fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok()?.trim().parse::<u64>().ok();
    match (group("memory.max"), group("memory.current")) {
        (Some(limit), Some(used)) => machine.min(limit.saturating_sub(used)),
        _ => machine,
    }
}

fn meminfo(key: &str) -> Option<u64> {
    kibibytes(&fs::read_to_string("/proc/meminfo").ok()?, key)
}

/// CPU seconds of this process so far, all threads, user and system: what getrusage(2) says, but
/// to the nanosecond.
pub(super) fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::try_from(time).unwrap_or_default().as_secs_f64()
}

/// CPU seconds of another process so far, to the clock tick (10 ms mostly).
pub(super) fn cpu_seconds_of(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let ticks = ticks_in(&text).with_context(|| format!("{path} is not understood"))?;
    #[expect(clippy::cast_precision_loss, reason = "ticks are counted in thousands")]
    Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// User and system time, the 14th and 15th field of proc_pid_stat(5). The second may hold spaces and
/// parentheses itself.
fn ticks_in(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

/// A size in /proc/PID/status, such as `VmHWM`; `None` for the process itself.
pub(super) fn status_bytes(pid: Option<u32>, key: &str) -> u64 {
    let pid = pid.map_or("self".to_string(), |pid| pid.to_string());
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    kibibytes(&text, key).unwrap_or(0)
}

/// The value of a line like `MemTotal:  1024 kB`, in bytes.
fn kibibytes(text: &str, key: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    Some(value.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()? << 10)
}

/// `2026-11-26 15:04` of a time since 1970. Howard Hinnant's `civil_from_days`, for years to come.
fn date(since_1970: Duration) -> String {
    let minutes = since_1970.as_secs() / 60;
    let days = minutes / 1440 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = era * 400 + year + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}", minutes / 60 % 24, minutes % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        let at = |seconds| date(Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01 00:00");
        assert_eq!(at(951_782_400), "2000-02-29 00:00");
        assert_eq!(at(1_795_705_648), "2026-11-26 15:07");
        assert_eq!(at(4_102_444_799), "2099-12-31 23:59");
    }

    #[test]
    fn sizes_that_fit() {
        const GIB: u64 = 1 << 30;
        assert_eq!(size_within(8 * GIB, Some(4 * GIB), GIB, 2).unwrap(), 4 * GIB);
        assert_eq!(size_within(8 * GIB, None, 4 * GIB, 3).unwrap(), 2 * GIB);
        let refused = size_within(8 * GIB, Some(5 * GIB), GIB, 2).unwrap_err().to_string();
        assert!(refused.contains("in memory 2 times") && refused.contains("--size 4096MiB"), "{refused}");
        assert!(size_within(GIB, None, GIB, 100).is_err());
        assert!(size_within(GIB, Some(u64::MAX), GIB, 2).is_err());
    }

    #[test]
    fn what_the_kernel_says() {
        assert_eq!(kibibytes("VmHWM:\t    12 kB\nVmRSS:\t 3 kB\n", "VmHWM"), Some(12 << 10));
        assert_eq!(kibibytes("VmHWM2: 1 kB\n", "VmHWM"), None);
        assert_eq!(ticks_in("7 (a) b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14"), Some(23));
        assert!(status_bytes(None, "VmHWM") > 0 && meminfo("MemTotal") > Some(0));
        let mut sum = 0u64;
        let before = cpu_seconds();
        while cpu_seconds() < before + 0.03 {
            sum = std::hint::black_box(sum + 1);
        }
        assert!(cpu_seconds_of(std::process::id()).unwrap() >= 0.02);
    }
}
