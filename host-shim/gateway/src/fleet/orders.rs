//! What is asked of a sandbox's keeper: to pause it, and to let it go on.

use std::time::Duration;

use axum::http::StatusCode;
use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot};

use super::keeper::Next;
use super::{Fleet, Sandbox, end_after};
use crate::ApiError;
use crate::store::{OnTimeout, Stage};

/// Orders that wait for a keeper; who finds no room waits before it.
pub(super) const QUEUE: usize = 64;

/// The shortest time that a request gives the sandbox that it resumes: its client knows nothing of timeouts.
const AUTO_RESUME_TIMEOUT: Duration = Duration::from_secs(300);

/// Something for a keeper to do.
#[derive(Debug)]
pub(super) enum Order {
    /// To pause it; whether it was awake.
    Pause(Reply),
    /// To let it go on; whether it was asleep.
    Resume { wish: Resume, reply: Reply },
}

pub(super) type Reply = oneshot::Sender<Result<bool, ApiError>>;

/// How a sandbox goes on.
#[derive(Clone, Copy, Debug)]
pub struct Resume {
    /// Its time from then on.
    pub timeout: Duration,
    /// What happens at its end, where that changes.
    pub on_timeout: Option<OnTimeout>,
}

impl Order {
    pub(super) fn next(self) -> Next {
        match self {
            Self::Pause(_) => Next::Pause(Some(self)),
            Self::Resume { .. } => Next::Resume(self),
        }
    }

    /// Tells who asked. Nobody may wait for it any more.
    pub(super) fn answer(self, answer: Result<bool, ApiError>) {
        let (Self::Pause(reply) | Self::Resume { reply, .. }) = self;
        let _ = reply.send(answer);
    }
}

impl Resume {
    /// When its time is up that begins now.
    pub(super) fn end_at(&self) -> Result<Timestamp, ApiError> {
        end_after(Timestamp::now(), self.timeout)
    }
}

impl Sandbox {
    pub(super) fn take_orders(&self) -> Option<mpsc::Receiver<Order>> {
        self.received.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take()
    }

    async fn order(&self, order: impl FnOnce(Reply) -> Order) -> Result<bool, ApiError> {
        let (reply, answer) = oneshot::channel();
        let gone = || ApiError::no_sandbox(self.id().as_str());
        tokio::select! {
            biased;
            () = self.gone() => Err(gone()),
            answer = async {
                self.orders.send(order(reply)).await.map_err(|_| gone())?;
                answer.await.unwrap_or_else(|_| Err(gone()))
            } => answer,
        }
    }
}

impl Fleet {
    /// Pauses a sandbox: nothing of it runs when this returns, and it goes on where it is. Whether it was awake.
    pub async fn pause(&self, sandbox: &Sandbox) -> Result<bool, ApiError> {
        sandbox.order(Order::Pause).await
    }

    /// Lets a paused sandbox go on; callers at the same time share one resume. Whether it was asleep.
    pub async fn resume(&self, sandbox: &Sandbox, wish: Resume) -> Result<bool, ApiError> {
        sandbox.order(|reply| Order::Resume { wish, reply }).await
    }

    /// Sees to it that a sandbox can take a request: one that is asleep and was created with that wish goes on. Whether it
    /// can.
    pub async fn wake(&self, sandbox: &Sandbox) -> Result<bool, ApiError> {
        let record = sandbox.record();
        match record.stage {
            Stage::Running => Ok(true),
            // Somebody has asked for that already.
            Stage::Resuming => self.resume(sandbox, auto(record.life.timeout_s)).await.map(|_| true),
            Stage::Pausing | Stage::Paused if record.life.auto_resume => {
                self.resume(sandbox, auto(record.life.timeout_s)).await.map(|_| true)
            }
            _ => Ok(false),
        }
    }
}

fn auto(timeout_s: u64) -> Resume {
    Resume { timeout: Duration::from_secs(timeout_s).max(AUTO_RESUME_TIMEOUT), on_timeout: None }
}

/// 409: what is asked for is done with a running sandbox only.
pub(crate) fn must_run(sandbox: &Sandbox) -> Result<(), ApiError> {
    let id = sandbox.id();
    match sandbox.record().stage {
        Stage::Running => Ok(()),
        Stage::Pausing | Stage::Paused | Stage::Resuming => {
            let message = format!("Sandbox \"{id}\" is paused: connect to it first, which resumes it");
            Err(ApiError::new(StatusCode::CONFLICT, message))
        }
        Stage::Starting | Stage::Ending => Err(ApiError::no_sandbox(id.as_str())),
    }
}
