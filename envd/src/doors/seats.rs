//! How many connections a door serves at one time, and who goes when there is no room.
//!
//! A flood of connections that never ask for anything must not shut out a client that does. When every seat is taken,
//! the one that was taken first among those that were not used yet is given away; only when all are in use is a
//! newcomer turned away.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

/// The seats of one door. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Seats {
    size: usize,
    taken: Arc<Mutex<Taken>>,
}

#[derive(Debug, Default)]
struct Taken {
    next: u64,
    /// In the order in which they were taken; true once used.
    seats: BTreeMap<u64, (bool, CancellationToken)>,
}

impl Seats {
    pub(super) fn new(size: usize) -> Self {
        Self { size, taken: Arc::default() }
    }

    /// A seat; `None` when all are taken by connections that are in use.
    pub(super) fn take(&self) -> Option<Seat> {
        let mut taken = self.lock();
        if taken.seats.len() >= self.size {
            let unused = taken.seats.iter().find(|(_, (used, _))| !used).map(|(number, _)| *number)?;
            if let Some((_, gone)) = taken.seats.remove(&unused) {
                gone.cancel();
            }
        }
        let number = taken.next;
        taken.next += 1;
        let gone = CancellationToken::new();
        taken.seats.insert(number, (false, gone.clone()));
        Some(Seat { seats: self.clone(), number, gone })
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection's seat, free again when it is dropped.
#[derive(Debug)]
pub(super) struct Seat {
    seats: Seats,
    number: u64,
    gone: CancellationToken,
}

impl Seat {
    /// The connection is somebody's who may use it: it keeps the seat for as long as it lasts.
    pub(super) fn used(&self) {
        if let Some((used, _)) = self.seats.lock().seats.get_mut(&self.number) {
            *used = true;
        }
    }

    /// Waits until the seat was given to another.
    pub(super) async fn given_away(&self) {
        self.gone.cancelled().await;
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.seats.lock().seats.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_unused_seat_is_given_away() {
        let seats = Seats::new(3);
        let (first, second, third) = (seats.take().unwrap(), seats.take().unwrap(), seats.take().unwrap());
        first.used();
        let fourth = seats.take().unwrap();
        assert!(second.gone.is_cancelled() && !first.gone.is_cancelled() && !third.gone.is_cancelled());
        third.used();
        fourth.used();
        assert!(seats.take().is_none(), "every seat is in use");
        // Dropping one that was given away frees nothing twice.
        drop(second);
        assert!(seats.take().is_none());
        drop(first);
        assert!(seats.take().is_some());
    }
}
