//! The door: open while the server serves, closed for new work while it drains.
use crate::error::{Error, Result};
use std::sync::Arc;
use tokio::sync::watch;

/// Counts the work in progress and refuses new work once closed. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Drain {
    state: Arc<watch::Sender<Door>>,
}

/// Work in progress; the drain waits until it is dropped.
#[derive(Debug)]
pub struct Work {
    state: Arc<watch::Sender<Door>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Door {
    closed: bool,
    working: usize,
}

impl Default for Drain {
    fn default() -> Self {
        Drain { state: Arc::new(watch::Sender::new(Door::default())) }
    }
}

impl Drain {
    /// Begins a piece of work.
    ///
    /// # Errors
    /// `Unavailable` once [`Drain::close`] was called.
    pub fn enter(&self) -> Result<Work> {
        let mut closed = false;
        self.state.send_modify(|door| {
            closed = door.closed;
            door.working += usize::from(!closed);
        });
        if closed {
            return Err(Error::unavailable("the server is draining and takes no new work"));
        }
        Ok(Work { state: Arc::clone(&self.state) })
    }

    /// Takes no new work from here on.
    pub fn close(&self) {
        self.state.send_modify(|door| door.closed = true);
    }

    /// Returns once [`Drain::close`] was called.
    pub async fn closed(&self) {
        // The sender lives in `self`, so the wait cannot fail.
        let _ = self.state.subscribe().wait_for(|door| door.closed).await;
    }

    /// Returns once no work is left.
    pub async fn idle(&self) {
        // The sender lives in `self`, so the wait cannot fail.
        let _ = self.state.subscribe().wait_for(|door| door.working == 0).await;
    }

    /// Pieces of work in progress.
    pub fn working(&self) -> usize {
        self.state.borrow().working
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.state.send_modify(|door| door.working -= 1);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::error::Kind;

    #[tokio::test]
    async fn closed_door_refuses_and_waits_for_work_at_hand() {
        let drain = Drain::default();
        let work = drain.enter().unwrap();
        drain.close();
        assert_eq!(drain.enter().unwrap_err().kind(), Kind::Unavailable);
        assert_eq!(drain.working(), 1);
        drop(work);
        drain.idle().await;
    }
}
