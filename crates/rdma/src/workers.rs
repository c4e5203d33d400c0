//! A few threads for what takes long.

use crate::limits::THREAD_STACK_BYTES;
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

type Job = Box<dyn FnOnce() + Send>;

/// Dropping it lets the threads end when the jobs given so far are done, and waits for them: no job may
/// own it.
pub(crate) struct Workers {
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Queue {
    jobs: Mutex<Jobs>,
    given: Condvar,
}

#[derive(Default)]
struct Jobs {
    waiting: VecDeque<Job>,
    closed: bool,
}

impl Workers {
    pub(crate) fn start(what: &str, threads: usize) -> io::Result<Self> {
        let mut workers = Workers { queue: Arc::default(), threads: Vec::new() };
        for at in 0..threads {
            let queue = workers.queue.clone();
            let name = format!("aquifer-{what}-{at}");
            let work = move || {
                while let Some(job) = queue.next() {
                    job();
                }
            };
            workers.threads.push(thread::Builder::new().name(name).stack_size(THREAD_STACK_BYTES).spawn(work)?);
        }
        Ok(workers)
    }

    pub(crate) fn give(&self, job: impl FnOnce() + Send + 'static) {
        self.queue.lock().waiting.push_back(Box::new(job));
        self.queue.given.notify_one();
    }
}

impl Queue {
    fn next(&self) -> Option<Job> {
        let mut jobs = self.lock();
        loop {
            if let Some(job) = jobs.waiting.pop_front() {
                return Some(job);
            }
            if jobs.closed {
                return None;
            }
            jobs = self.given.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Jobs> {
        // Each change is a single push, pop or store; jobs run without the lock.
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.queue.lock().closed = true;
        self.queue.given.notify_all();
        for thread in self.threads.drain(..) {
            // A job that panicked took its thread with it, and was reported by the panic itself.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Workers({})", self.threads.len())
    }
}
