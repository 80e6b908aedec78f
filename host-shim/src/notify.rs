//! What the service manager is told (sd_notify(3)). Where there is none, nobody.
//!
//! ```text
//! READY=1 ── STOPPING=1 ── the end          EXTEND_TIMEOUT_USEC, while an end that was asked for has to wait
//! ```

use std::pin::pin;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio_util::sync::CancellationToken;

/// How much longer the service manager is to wait, each time it is told.
const EXTENSION: Duration = Duration::from_secs(30);

/// How often it is told: one that comes late must not be the end.
const INTERVAL: Duration = Duration::from_secs(10);

/// The sandbox is ready; `status` is what `systemctl status` shows.
pub fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// The sandbox is what `status` says.
pub fn status(status: &str) {
    tell(&[NotifyState::Status(status)]);
}

/// The sandbox ends, whoever wanted it.
pub fn stopping(status: &str) {
    tell(&[NotifyState::Stopping, NotifyState::Status(status)]);
}

/// Does work that cannot be cut short. When the end is asked for meanwhile, the service manager gets to know that it has to
/// wait for that.
pub async fn patiently<T>(work: impl Future<Output = T>, end: &CancellationToken) -> T {
    let mut work = pin!(work);
    tokio::select! {
        biased;
        done = &mut work => return done,
        () = end.cancelled() => {}
    }
    loop {
        let more = u32::try_from(EXTENSION.as_micros()).unwrap_or(u32::MAX);
        tell(&[
            NotifyState::ExtendTimeoutUsec(more),
            NotifyState::Status("stopping once its snapshot is whole"),
        ]);
        tokio::select! {
            biased;
            done = &mut work => return done,
            () = tokio::time::sleep(INTERVAL) => {}
        }
    }
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, ?states, "cannot tell the service manager");
    }
}
