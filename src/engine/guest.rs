//! When the engine's guest may run: always when nobody waits, a share of the time otherwise.
use super::Guest;
use crate::error::Result;
use crate::model::Model;
use std::time::{Duration, Instant};

/// Time that may be saved up or owed: a pause of serving gives no right to a long one of training.
const MOST_CREDIT: Duration = Duration::from_millis(100);

/// The guest and its account.
pub struct Hosting {
    guest: Option<Guest>,
    /// It said that there is nothing to do, and nobody has woken us since.
    asleep: bool,
    /// Seconds that it may take while requests run; below 0 it has taken too much.
    credit: f64,
}

impl Hosting {
    /// Nothing is owed at the start.
    pub fn new(guest: Option<Guest>) -> Self {
        Hosting { asleep: guest.is_none(), guest, credit: 0.0 }
    }

    /// There may be work again.
    pub fn wake(&mut self) {
        self.asleep = self.guest.is_none();
    }

    /// Whether it may have work.
    pub fn awake(&self) -> bool {
        !self.asleep
    }

    /// A step of serving took `time`: the guest's share of it is added to its account.
    pub fn served(&mut self, time: Duration) {
        let share = self.guest.as_ref().map_or(0.0, |g| g.share.clamp(0.0, 0.99));
        self.credit = (self.credit + time.as_secs_f64() * share / (1.0 - share)).min(MOST_CREDIT.as_secs_f64());
    }

    /// Runs slices: one if nobody waits, else what the account allows. A GPU has done each before its time is taken: what is
    /// only queued would be on serving's account, and before a request that comes meanwhile.
    ///
    /// # Errors
    /// When the GPU is lost.
    pub fn run(&mut self, model: &Model, busy: bool) -> Result<()> {
        let Some(guest) = &mut self.guest else { return Ok(()) };
        if !busy {
            // Asleep or not: a wake-up that found the inbox full is made good here.
            self.asleep = !guest.work.slice(model);
            self.credit = 0.0;
            return model.synchronize();
        }
        while !self.asleep && self.credit > 0.0 {
            let began = Instant::now();
            self.asleep = !guest.work.slice(model);
            model.synchronize()?;
            self.credit -= began.elapsed().as_secs_f64();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::model::background::Background;
    use crate::model::{LoadOptions, source};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    /// Counts its slices and has nothing to do.
    struct Idle(Arc<AtomicUsize>);

    impl Background for Idle {
        fn slice(&mut self, _: &Model) -> bool {
            self.0.fetch_add(1, Relaxed);
            false
        }
    }

    /// Works, and says for how long it did.
    struct Busy(Arc<AtomicUsize>);

    impl Background for Busy {
        fn slice(&mut self, _: &Model) -> bool {
            let began = Instant::now();
            std::thread::sleep(Duration::from_millis(1));
            self.0.fetch_add(began.elapsed().as_micros() as usize, Relaxed);
            true
        }
    }

    /// While requests run, the guest has what its share of their time earned it, and one slice more at most.
    #[test]
    fn a_guest_takes_no_more_than_its_share_while_requests_run() {
        let model = Model::load(&source::resolve("embedded").unwrap(), LoadOptions::default()).unwrap();
        for (share, part) in [(0.3, 0.3 / 0.7), (0.0, 0.0)] {
            let worked = Arc::new(AtomicUsize::new(0));
            let mut hosting =
                Hosting::new(Some(Guest { work: Box::new(Busy(worked.clone())), share, device_bytes: 0 }));
            let mut most = 0;
            for steps in 1..=200 {
                let before = worked.load(Relaxed);
                hosting.served(Duration::from_millis(2));
                hosting.run(&model, true).unwrap();
                most = most.max(worked.load(Relaxed) - before);
                let earned = steps as f64 * 2000.0 * part;
                assert!(worked.load(Relaxed) as f64 <= earned + most as f64, "after {steps} steps");
            }
            // And it has all of it.
            let earned = 200.0 * 2000.0 * part;
            assert!(share == 0.0 || worked.load(Relaxed) as f64 > 0.5 * earned);
            // When nobody waits it may run at once, whatever it has taken.
            let before = worked.load(Relaxed);
            hosting.run(&model, false).unwrap();
            assert!(worked.load(Relaxed) > before);
        }
    }

    /// A wake-up that finds the inbox full is not sent: whoever sleeps is asked again when nobody waits, and only then.
    #[test]
    fn a_sleeper_is_asked_again_when_nobody_waits() {
        let model = Model::load(&source::resolve("embedded").unwrap(), LoadOptions::default()).unwrap();
        let slices = Arc::new(AtomicUsize::new(0));
        let work = Box::new(Idle(slices.clone()));
        let mut hosting = Hosting::new(Some(Guest { work, share: 0.5, device_bytes: 0 }));
        for (busy, want) in [(false, 1), (true, 1), (false, 2)] {
            hosting.served(Duration::from_millis(10));
            hosting.run(&model, busy).unwrap();
            assert_eq!(slices.load(Relaxed), want, "busy {busy}");
            assert!(!hosting.awake());
        }
    }
}
