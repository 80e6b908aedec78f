//! What the requests of all clients together may hold in memory.
//!
//! ```text
//! body   first SMALL bytes ──► pool of small bodies
//!        the rest          ──► pool of large bodies ── full: wait, then `resource_exhausted`
//! ```
//!
//! Each message is bounded by itself, but there can be thousands at one time: on every connection, and on every stream of
//! one. What a call holds is counted until the call has ended, since the message that its body became is as large.
//! Most calls are small, and pass also while large ones fill their pool.

use std::time::Duration;

use envd_proto::limits::MAX_CONNECT_MESSAGE;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::{Code, Error};

/// All large bodies: eight of the longest, or the inputs of 512 processes that read nothing, 64 KiB for each. Decoding takes
/// as much again for a moment. The box leaves the agent 32 MiB; beyond that the kernel takes it from the box.
const LARGE_POOL: usize = 8 * MAX_CONNECT_MESSAGE;

/// All small bodies, and the beginnings of the large ones: thousands of the usual calls.
const SMALL_POOL: usize = 4 << 20;

/// What a body takes from the small pool. A call's usual body is far below it.
const SMALL: usize = 8 << 10;

/// What is counted: a permit for each begun unit.
const UNIT: usize = 1 << 10;

/// How long a body waits for room: a large one is read and handled in far less.
const PATIENCE: Duration = Duration::from_secs(5);

/// The pools of one agent.
#[derive(Debug)]
pub(super) struct Budget {
    small: Semaphore,
    large: Semaphore,
}

/// All requests of this agent.
static REQUESTS: Budget = Budget::new(SMALL_POOL, LARGE_POOL);

impl Budget {
    const fn new(small: usize, large: usize) -> Self {
        Self { small: Semaphore::const_new(small / UNIT), large: Semaphore::const_new(large / UNIT) }
    }
}

/// What one request holds; given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Room<'a> {
    budget: &'a Budget,
    small: Option<SemaphorePermit<'a>>,
    large: Option<SemaphorePermit<'a>>,
}

impl Room<'static> {
    /// Room for nothing yet.
    pub(crate) fn new() -> Self {
        Self::in_budget(&REQUESTS)
    }
}

impl<'a> Room<'a> {
    fn in_budget(budget: &'a Budget) -> Self {
        Self { budget, small: None, large: None }
    }

    /// Makes room for `bytes` in all; waits when there is none, but not for long.
    pub(crate) async fn grow_to(&mut self, bytes: usize) -> Result<(), Error> {
        if self.try_grow_to(bytes) {
            return Ok(());
        }
        let (small, large) = parts(bytes);
        let growing = async {
            grow(&mut self.small, &self.budget.small, small).await;
            grow(&mut self.large, &self.budget.large, large).await;
        };
        tokio::time::timeout(PATIENCE, growing).await.map_err(|_| {
            let message = "the requests of all clients together take all the memory that they may: try again";
            Error::new(Code::ResourceExhausted, message)
        })
    }

    /// Makes room for `bytes` in all, if there is some now.
    pub(crate) fn try_grow_to(&mut self, bytes: usize) -> bool {
        let (small, large) = parts(bytes);
        try_grow(&mut self.small, &self.budget.small, small)
            && try_grow(&mut self.large, &self.budget.large, large)
    }

    /// Gives back all but the room for `bytes`.
    pub(crate) fn shrink_to(&mut self, bytes: usize) {
        let (small, large) = parts(bytes);
        shrink(&mut self.small, small);
        shrink(&mut self.large, large);
    }
}

/// Units of the small and of the large pool for so many bytes.
fn parts(bytes: usize) -> (usize, usize) {
    let small = bytes.min(SMALL);
    (small.div_ceil(UNIT), (bytes - small).div_ceil(UNIT))
}

fn missing(held: &Option<SemaphorePermit<'_>>, units: usize) -> u32 {
    let missing = units.saturating_sub(held.as_ref().map_or(0, SemaphorePermit::num_permits));
    // A message's length is far below u32; one that were longer would get no room.
    u32::try_from(missing).unwrap_or(u32::MAX)
}

fn add<'a>(held: &mut Option<SemaphorePermit<'a>>, more: SemaphorePermit<'a>) {
    match held {
        Some(held) => held.merge(more),
        None => *held = Some(more),
    }
}

async fn grow<'a>(held: &mut Option<SemaphorePermit<'a>>, pool: &'a Semaphore, units: usize) {
    // The pools are never closed.
    if let missing @ 1.. = missing(held, units)
        && let Ok(more) = pool.acquire_many(missing).await
    {
        add(held, more);
    }
}

fn try_grow<'a>(held: &mut Option<SemaphorePermit<'a>>, pool: &'a Semaphore, units: usize) -> bool {
    match missing(held, units) {
        0 => true,
        missing => match pool.try_acquire_many(missing) {
            Ok(more) => {
                add(held, more);
                true
            }
            Err(_) => false,
        },
    }
}

fn shrink(held: &mut Option<SemaphorePermit<'_>>, units: usize) {
    if let Some(permit) = held {
        drop(permit.split(permit.num_permits().saturating_sub(units)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: usize = 1 << 10;

    #[tokio::test(start_paused = true)]
    async fn large_bodies_wait_and_small_ones_pass() {
        let budget = Budget::new(64 * KIB, 100 * KIB);
        let mut first = Room::in_budget(&budget);
        first.grow_to(SMALL + 60 * KIB).await.unwrap();
        let mut second = Room::in_budget(&budget);
        second.grow_to(SMALL + 40 * KIB).await.unwrap();
        let refused = second.grow_to(SMALL + 40 * KIB + 1).await.unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted);
        Room::in_budget(&budget).grow_to(SMALL).await.unwrap();
        assert!(!Room::in_budget(&budget).try_grow_to(SMALL + 1));
        // What is given back goes to the one that waits.
        let (grown, ()) = tokio::join!(second.grow_to(SMALL + 80 * KIB), async {
            tokio::time::sleep(PATIENCE / 2).await;
            first.shrink_to(SMALL + 20 * KIB);
        });
        grown.unwrap();
        drop((first, second));
        assert_eq!((budget.small.available_permits(), budget.large.available_permits()), (64, 100));
    }
}
