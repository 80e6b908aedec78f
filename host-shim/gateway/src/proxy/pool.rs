//! Connections to agents that wait for their next request, so that a small call costs no dial.
//!
//! For the agent's door alone: it keeps an idle connection for a minute, and authorises each request by itself. A tenant's
//! server may count connections, or serve one at a time; each request has its own there.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sandbox_folder::SandboxId;

use super::upstream::Upstream;

/// Idle connections to one agent. More at once are made as needed and closed after their request.
const MAX_IDLE: usize = 8;

/// How long one waits. Less than the agent's own limit (60 s), so that it is not the agent that ends one just as a request
/// is written to it.
const IDLE_TIMEOUT: Duration = Duration::from_secs(20);

/// How often those that waited too long, or were closed by the agent, are let go.
pub(super) const SWEEP: Duration = Duration::from_secs(10);

#[derive(Default)]
pub(super) struct Pool {
    idle: Mutex<HashMap<SandboxId, Vec<(Instant, Upstream)>>>,
}

impl Pool {
    /// The connection that was used last, if one can take a request now.
    pub(super) fn take(&self, id: &SandboxId) -> Option<Upstream> {
        let mut idle = self.lock();
        let waiting = idle.get_mut(id)?;
        let ready = waiting.iter_mut().rposition(|(since, upstream)| is_fresh(*since) && upstream.is_ready());
        let taken = ready.map(|place| waiting.remove(place).1);
        if waiting.is_empty() {
            idle.remove(id);
        }
        taken
    }

    /// Keeps a connection whose answer was read to its end.
    pub(super) fn put(&self, id: &SandboxId, mut upstream: Upstream) {
        if upstream.is_closed() {
            return;
        }
        let mut idle = self.lock();
        let waiting = idle.entry(id.clone()).or_default();
        if waiting.len() >= MAX_IDLE {
            waiting.remove(0).1.finish();
        }
        waiting.push((Instant::now(), upstream));
    }

    /// Lets go of what waited too long or was closed.
    pub(super) fn sweep(&self) {
        self.lock().retain(|_, waiting| {
            let goes =
                |(since, upstream): &mut (Instant, Upstream)| !is_fresh(*since) || upstream.is_closed();
            for (_, upstream) in waiting.extract_if(.., goes) {
                upstream.finish();
            }
            !waiting.is_empty()
        });
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SandboxId, Vec<(Instant, Upstream)>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_fresh(since: Instant) -> bool {
    since.elapsed() < IDLE_TIMEOUT
}
