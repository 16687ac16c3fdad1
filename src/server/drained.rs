//! From SIGTERM to exit 0.
use crate::error::{Context, Kind, Result};
use crate::rpc::{Services, drain::Drain};
use std::time::Duration;
use tokio::sync::oneshot;
use tonic::service::Routes;
use tonic::transport::{Server, server::TcpIncoming};
use tonic_health::{ServingStatus, server::HealthReporter};

/// Idle connections get so long to hear the good-bye once all work is done.
const GOODBYE: Duration = Duration::from_secs(1);

/// Serving that ends in a drain.
pub(super) struct Drained {
    pub drain: Drain,
    pub health: HealthReporter,
    /// For running requests.
    pub grace: Duration,
}

impl Drained {
    /// Serves until `shutdown`. Then, in this order: health says NOT_SERVING and new work gets UNAVAILABLE;
    /// running work ends or its grace does; connections are closed.
    pub async fn serve(
        self,
        mut server: Server,
        routes: Routes,
        incoming: TcpIncoming,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<()> {
        let (close, closed) = oneshot::channel::<()>();
        let serving = server.add_routes(routes).serve_with_incoming_shutdown(incoming, async {
            // A sender that is gone closes as well.
            let _ = closed.await;
        });
        tokio::pin!(serving);
        tokio::select! {
            ended = &mut serving => return ended.or_kind(Kind::Internal, "listener"),
            () = self.until_idle(shutdown) => {}
        }
        drop(close);
        match tokio::time::timeout(GOODBYE, serving).await {
            Ok(ended) => ended.or_kind(Kind::Internal, "listener"),
            // Clients that keep their connection open do not keep us.
            Err(_) => Ok(()),
        }
    }

    async fn until_idle(&self, shutdown: impl Future<Output = ()> + Send) {
        shutdown.await;
        self.drain.close();
        for name in Services::NAMES.into_iter().chain([""]) {
            self.health.set_service_status(name, ServingStatus::NotServing).await;
        }
        let (running, seconds) = (self.drain.working(), self.grace.as_secs());
        tracing::info!(running, seconds, "draining");
        match tokio::time::timeout(self.grace, self.drain.idle()).await {
            Ok(()) => tracing::info!("drained"),
            Err(_) => tracing::warn!(running = self.drain.working(), "the grace period is over"),
        }
    }
}

/// Ready at the first SIGTERM or SIGINT. Where the system refuses to tell, never: the server then runs until it is
/// killed.
pub async fn terminated() {
    let interrupt = async {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        () = interrupt => {}
        () = terminate() => {}
    }
}

#[cfg(unix)]
async fn terminate() {
    use tokio::signal::unix::{SignalKind, signal};
    match signal(SignalKind::terminate()) {
        Ok(mut signals) => drop(signals.recv().await),
        Err(_) => std::future::pending().await,
    }
}

#[cfg(not(unix))]
async fn terminate() {
    std::future::pending().await
}
