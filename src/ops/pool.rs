//! The CPU ops' threads: a small persistent pool whose workers spin for a moment, then park.
//!
//! The caller is worker 0 and never waits for a worker that has not started: a core that the operating system
//! gave to somebody else (tokio, a neighbour) costs its share of the speed, not a scheduler slice.
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Arc, Mutex, TryLockError};
use std::thread::{JoinHandle, Thread};

/// Keeps candle's own pool empty: its threads spin against ours and tokio's on few cores, and what is left to it (sums of
/// gradients) is small. Call it first thing in `main`; a `CANDLE_NUM_THREADS` that is set stays.
pub fn quiet_candle() {
    if std::env::var_os("CANDLE_NUM_THREADS").is_none() {
        // SAFETY: the process has one thread as yet, so nobody reads the environment meanwhile.
        unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
    }
}

type Job = *const (dyn Fn(usize) + Sync);

const EPOCH: u64 = 1 << 16;
const OPEN: u64 = 1 << 15;
const ACTIVE: u64 = OPEN - 1;
/// `pause`s before a worker parks or the waiting caller yields: some ten microseconds, the gap between two ops.
const SPIN: usize = 2_000;

struct State {
    /// epoch << 16 | OPEN | number of workers inside the job
    state: AtomicU64,
    stop: AtomicBool,
    panicked: AtomicBool,
    parked: Vec<AtomicBool>,
    job: UnsafeCell<Option<Job>>,
}
// SAFETY: `job` is written only under `Pool::lock` while no worker is inside; it is read only by a worker that
// has entered (a compare-and-swap on `state` while OPEN).
unsafe impl Send for State {}
// SAFETY: as above.
unsafe impl Sync for State {}

/// A fixed set of threads that run one job at a time.
pub struct Pool {
    state: Arc<State>,
    threads: Vec<Thread>,
    handles: Vec<JoinHandle<()>>,
    lock: Mutex<()>,
}

impl Pool {
    /// A pool of `threads`, the caller counted; 0 means one a core. Threads that the system refuses are done without.
    pub fn new(threads: usize) -> Self {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let workers = (if threads == 0 { cores() } else { threads }).clamp(1, 256) - 1;
        let state = Arc::new(State {
            state: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            parked: (0..workers).map(|_| AtomicBool::new(false)).collect(),
            job: UnsafeCell::new(None),
        });
        let spawn = |i: usize| {
            let state = state.clone();
            let builder = std::thread::Builder::new().name(format!("prefixd-cpu-{}", i + 1));
            builder.spawn(move || worker(&state, i)).ok()
        };
        let handles: Vec<_> = (0..workers).map_while(spawn).collect();
        let threads = handles.iter().map(|h| h.thread().clone()).collect();
        Pool { state, threads, handles, lock: Mutex::new(()) }
    }

    /// Threads that share a job, the caller counted.
    pub fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Runs `f(0..n)` over the threads, each index once, in no particular order.
    pub fn for_each(&self, n: usize, f: impl Fn(usize) + Sync) {
        if n < 2 {
            return (0..n).for_each(f);
        }
        let next = AtomicUsize::new(0);
        self.run(&|_| {
            loop {
                let i = next.fetch_add(1, Relaxed);
                if i >= n {
                    break;
                }
                f(i);
            }
        });
    }

    /// Calls `f(0)` here and offers `f(1)..` to the workers. `f` must claim work from a shared counter until none
    /// is left, so that `f(0)` alone suffices: a worker that has not entered when `f(0)` returns is not waited
    /// for, and a busy pool (another caller, a nested call) means that the caller works alone. Neither changes a
    /// result: no op depends on who computes what.
    pub fn run(&self, f: &(dyn Fn(usize) + Sync)) {
        let guard = match self.lock.try_lock() {
            Ok(guard) if !self.threads.is_empty() => guard,
            // A job panicked, and `Close` has ended it: the pool is as good as new.
            Err(TryLockError::Poisoned(poisoned)) if !self.threads.is_empty() => poisoned.into_inner(),
            _ => return f(0),
        };
        let _guard = guard;
        let state = &*self.state;
        // Of a job whose caller panicked too.
        state.panicked.store(false, Relaxed);
        // SAFETY: erases the lifetime. This function does not return (nor unwind: see `Close`) while a worker is
        // inside `f`, and none enters once OPEN is cleared.
        unsafe { *state.job.get() = Some(std::mem::transmute::<*const (dyn Fn(usize) + Sync), Job>(f)) };
        let epoch = state.state.load(Relaxed) / EPOCH + 1;
        state.state.store((epoch * EPOCH) | OPEN, SeqCst);
        for (thread, parked) in self.threads.iter().zip(&state.parked) {
            if parked.load(SeqCst) {
                thread.unpark();
            }
        }
        let close = Close(state);
        f(0);
        drop(close);
        if state.panicked.swap(false, Relaxed) {
            panic!("a worker of the CPU pool panicked");
        }
    }
}

/// Ends a job: lets nobody in any more and waits for those inside.
struct Close<'a>(&'a State);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        self.0.state.fetch_and(!OPEN, AcqRel);
        let mut spins = 0;
        while self.0.state.load(Acquire) & ACTIVE != 0 {
            spins += 1;
            if spins < SPIN { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
    }
}

fn worker(state: &State, index: usize) {
    let mut seen = 0;
    loop {
        let mut spins = 0;
        let mut now = state.state.load(Acquire);
        while now / EPOCH == seen {
            if spins < SPIN {
                spins += 1;
                std::hint::spin_loop();
            } else {
                // SeqCst store and load on both sides: either `run` sees the flag or this thread sees the epoch.
                state.parked[index].store(true, SeqCst);
                while state.state.load(SeqCst) / EPOCH == seen {
                    std::thread::park();
                }
                state.parked[index].store(false, Relaxed);
            }
            now = state.state.load(Acquire);
        }
        seen = now / EPOCH;
        if state.stop.load(Acquire) {
            return;
        }
        // Enter, unless this epoch is closed already.
        let enter = |s: u64| (s & OPEN != 0 && s / EPOCH == seen).then_some(s + 1);
        if state.state.fetch_update(AcqRel, Acquire, enter).is_err() {
            continue;
        }
        // SAFETY: entered, hence published and alive until this thread leaves.
        let job = unsafe { (*state.job.get()).map(|job| &*job) };
        let run = std::panic::AssertUnwindSafe(|| job.map(|job| job(index + 1)));
        if std::panic::catch_unwind(run).is_err() {
            state.panicked.store(true, Relaxed);
        }
        state.state.fetch_sub(1, Release);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.state.stop.store(true, Release);
        self.state.state.fetch_add(EPOCH, SeqCst);
        self.threads.iter().for_each(Thread::unpark);
        // A worker catches panics of jobs, so there is nothing to hear from it.
        self.handles.drain(..).for_each(|h| drop(h.join()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_index_runs_once_under_contention() {
        let pool = Pool::new(3);
        let hits: Vec<AtomicUsize> = (0..64).map(|_| AtomicUsize::new(0)).collect();
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    (0..500).for_each(|_| {
                        pool.for_each(64, |i| {
                            hits[i].fetch_add(1, Relaxed);
                        })
                    })
                });
            }
        });
        assert!(hits.iter().all(|h| h.load(Relaxed) == 2000));
    }

    #[test]
    fn survives_a_panic_in_a_worker() {
        let pool = Pool::new(2);
        let entered = AtomicBool::new(false);
        let job = std::panic::AssertUnwindSafe(|| {
            pool.run(&|i| match i {
                // Wait for the worker, so that its panic does happen.
                0 => (0..).take_while(|_| !entered.load(SeqCst)).for_each(|_| std::thread::yield_now()),
                _ => {
                    entered.store(true, SeqCst);
                    panic!("expected by this test");
                }
            })
        });
        assert!(std::panic::catch_unwind(job).is_err());
        // Its threads still share the work: each waits here for the other.
        let inside = AtomicUsize::new(0);
        pool.run(&|_| {
            inside.fetch_add(1, SeqCst);
            (0..).take_while(|_| inside.load(SeqCst) < 2).for_each(|_| std::thread::yield_now());
        });
        // A caller's own panic, too.
        let job = std::panic::AssertUnwindSafe(|| pool.run(&|i| assert!(i > 0, "expected by this test")));
        assert!(std::panic::catch_unwind(job).is_err());
        inside.store(0, SeqCst);
        pool.run(&|_| {
            inside.fetch_add(1, SeqCst);
            (0..).take_while(|_| inside.load(SeqCst) < 2).for_each(|_| std::thread::yield_now());
        });
    }
}
