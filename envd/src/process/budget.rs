//! What the logs of all processes may take together.
//!
//! Each log has [`MIN_SHARE`] for itself. What it wants beyond that comes from a pool; when that is empty, logs of ended
//! processes give back first, those that ended first before the others, then the largest of the live ones, each only what
//! no reader waits for. A log that gets nothing is full at the size that it has.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError, Weak};

use super::log::OutputLog;
use super::table::MAX_PROCESSES;

/// What every log may take, however many there are.
pub(super) const MIN_SHARE: usize = 4 << 10;

/// What all logs may take together.
const LOG_BUDGET: usize = 64 << 20;

/// What they share beyond their minimum.
const POOL: usize = LOG_BUDGET - MAX_PROCESSES * MIN_SHARE;

/// The pool of a table's logs.
#[derive(Debug)]
pub(super) struct Budget {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    free: usize,
    /// The logs that have something of the pool.
    holders: HashMap<u64, Weak<OutputLog>>,
    ended: u64,
}

impl Default for Budget {
    fn default() -> Self {
        Self::new(POOL)
    }
}

impl Budget {
    pub(super) fn new(pool: usize) -> Self {
        Self { state: Mutex::new(State { free: pool, holders: HashMap::new(), ended: 0 }) }
    }

    /// Takes bytes for a log, whose lock must not be held; false when there are none.
    pub(super) fn take(&self, bytes: usize, id: u64, log: &Weak<OutputLog>) -> bool {
        if self.try_take(bytes, id, log) {
            return true;
        }
        let holders: Vec<_> = self.lock().holders.values().filter_map(Weak::upgrade).collect();
        let mut ranked: Vec<_> =
            holders.iter().filter(|holder| holder.id() != id).map(|log| (log.rank(), log)).collect();
        ranked.sort_unstable_by_key(|(rank, _)| *rank);
        for (_, holder) in ranked {
            holder.give_back();
            if self.try_take(bytes, id, log) {
                return true;
            }
        }
        false
    }

    fn try_take(&self, bytes: usize, id: u64, log: &Weak<OutputLog>) -> bool {
        let mut state = self.lock();
        let Some(free) = state.free.checked_sub(bytes) else { return false };
        state.free = free;
        state.holders.insert(id, Weak::clone(log));
        true
    }

    /// Takes bytes back that a log did not need after all.
    pub(super) fn put_back(&self, bytes: usize) {
        self.lock().free += bytes;
    }

    /// Gives all that a log had back.
    pub(super) fn give(&self, bytes: usize, id: u64) {
        let mut state = self.lock();
        state.free += bytes;
        state.holders.remove(&id);
    }

    /// A number for the next log that ends.
    pub(super) fn next_end(&self) -> u64 {
        let mut state = self.lock();
        state.ended += 1;
        state.ended
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
