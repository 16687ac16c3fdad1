//! The wish to end early.
use tokio::sync::watch;

/// Tells all [`Stop`]s. Dropped without [`Stopper::stop`], it tells nothing.
#[derive(Debug)]
pub struct Stopper(watch::Sender<bool>);

/// Hears of it; cheap to clone.
#[derive(Clone, Debug)]
pub struct Stop(watch::Receiver<bool>);

impl Stopper {
    /// Nobody wants to stop yet.
    pub fn new() -> (Self, Stop) {
        let (tell, hear) = watch::channel(false);
        (Stopper(tell), Stop(hear))
    }

    /// End soon, and report what there is.
    pub fn stop(&self) {
        self.0.send_replace(true);
    }
}

impl Stop {
    /// Whether it was said.
    pub fn is_stopped(&self) -> bool {
        *self.0.borrow()
    }

    /// Waits until it is said.
    pub async fn stopped(&self) {
        let mut hear = self.0.clone();
        if hear.wait_for(|stopped| *stopped).await.is_err() {
            // Nobody is left who could say it.
            std::future::pending::<()>().await;
        }
    }
}
