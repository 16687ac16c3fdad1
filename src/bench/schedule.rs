//! Which request of a run is next, when it is due, and whether there is one.
use super::arrivals::Arrivals;
use super::driver::{Load, Until};
use crate::error::Result;
use std::time::Duration;

/// So late a sending may be without being given up at the end of the time. Timers wake late, by milliseconds, and on a
/// busy machine by more: what was due just before the end is no sign of a slow generator.
const SLACK: Duration = Duration::from_millis(50);

/// The sendings of a run; times count from its start. A function of load, seed and the clock that it is told.
#[derive(Debug)]
pub(super) struct Schedule {
    /// None in a closed loop.
    arrivals: Option<Arrivals>,
    until: Until,
    index: u64,
    due: Option<Duration>,
}

impl Schedule {
    /// From the first request on.
    ///
    /// # Errors
    /// `InvalidArgument` where the load has no such arrivals.
    pub fn new(load: Load, until: Until, seed: u64) -> Result<Self> {
        let mut arrivals = match load {
            Load::Rate { rate, cv } => Some(Arrivals::new(rate, cv, seed)?),
            Load::Concurrency(_) => None,
        };
        let due = arrivals.as_mut().and_then(Iterator::next);
        Ok(Schedule { arrivals, until, index: 0, due })
    }

    /// When the next request is to be sent; none: as soon as there is room for it.
    pub fn due(&self) -> Option<Duration> {
        self.due
    }

    /// Whether nothing is sent any more. Time ends it by the clock: a plan of more than the generator can send takes no
    /// longer than it should.
    pub fn is_over(&self, now: Duration) -> bool {
        match (self.until, self.due) {
            (Until::Requests(n), _) => self.index >= n,
            (Until::Elapsed(time), None) => now >= time,
            (Until::Elapsed(time), Some(due)) => due >= time || now >= time.saturating_add(SLACK),
        }
    }

    /// The number of the request to send now; then it is the turn of the one after it.
    pub fn advance(&mut self) -> u64 {
        let index = self.index;
        self.index += 1;
        self.due = self.arrivals.as_mut().and_then(Iterator::next);
        index
    }

    /// Requests that were due when sending ended at `now`, but are not sent.
    pub fn unsent(self, now: Duration) -> usize {
        let late = now.saturating_sub(SLACK);
        let (most, end) = match self.until {
            Until::Requests(n) => (n.saturating_sub(self.index), late),
            Until::Elapsed(time) => (u64::MAX, late.min(time)),
        };
        let times = self.due.into_iter().chain(self.arrivals.into_iter().flatten());
        times.take(usize::try_from(most).unwrap_or(usize::MAX)).take_while(|due| *due < end).count()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const EVEN: Load = Load::Rate { rate: 100.0, cv: 0.0 };

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Sends at most `capacity` requests a second, each not before it is due: how many, and how many were left.
    fn run(until: Until, capacity: u32) -> (u64, usize) {
        let (mut schedule, mut now, mut sent) = (Schedule::new(EVEN, until, 0).unwrap(), Duration::ZERO, 0);
        while !schedule.is_over(now) {
            now = now.max(schedule.due().unwrap());
            assert_eq!(schedule.advance(), sent);
            sent += 1;
            now += Duration::from_secs(1) / capacity;
        }
        (sent, schedule.unsent(now))
    }

    #[test]
    fn all_that_is_due_before_the_end_is_sent() {
        assert_eq!(run(Until::Elapsed(ms(1000)), 1000), (100, 0));
        assert_eq!(run(Until::Requests(30), 1000), (30, 0));
        // The whole number of requests is sent, however long it takes.
        assert_eq!(run(Until::Requests(30), 10), (30, 0));
    }

    #[test]
    fn time_ends_by_the_clock_and_what_was_due_is_counted() {
        // Twenty a second where a hundred are due: until 1.05 s.
        assert_eq!(run(Until::Elapsed(ms(1000)), 20), (21, 79));
        let closed = Schedule::new(Load::Concurrency(3), Until::Elapsed(ms(1000)), 0).unwrap();
        assert_eq!((closed.is_over(ms(999)), closed.is_over(ms(1000)), closed.unsent(ms(2000))), (false, true, 0));
    }

    #[test]
    fn a_timer_that_wakes_late_loses_no_request() {
        let mut schedule = Schedule::new(EVEN, Until::Elapsed(ms(1000)), 0).unwrap();
        for _ in 0..99 {
            schedule.advance();
        }
        assert_eq!(schedule.due(), Some(ms(990)));
        assert!(!schedule.is_over(ms(1003)));
        schedule.advance();
        assert!(schedule.is_over(ms(1003)));
        assert_eq!(schedule.unsent(ms(1003)), 0);
    }

    #[test]
    fn a_run_that_is_stopped_was_behind_only_with_what_was_long_due() {
        let mut schedule = Schedule::new(EVEN, Until::Requests(1000), 0).unwrap();
        for _ in 0..10 {
            schedule.advance();
        }
        // Number 10 is due at 100 ms, number 44 at 440 ms.
        assert_eq!(schedule.unsent(ms(500)), 35);
    }
}
