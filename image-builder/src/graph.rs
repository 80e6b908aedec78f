//! What lets the stages of a build run side by side.
//!
//! ```text
//! stage 0 --steps--> Board::post(0) ------+
//! stage 1 --steps--> Board::post(1) --+   |        each stage is a thread, which waits where it needs another one;
//! stage 2 --FROM 0, wait(0) ----------|---+        Jobs bounds how many work at the same time, and one that waits
//!         --COPY --from=1, wait(1) ---+            for another holds no place
//! ```
//!
//! Stages need each other in one direction only (the plan refuses circles), so somebody can always go on. Work that several
//! of them need (the same step, the same base image) is a flight: the first does it, the others wait for it.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Condvar, Mutex, MutexGuard};

use crate::error::Error;

/// The results of stages.
#[derive(Debug)]
pub(crate) struct Board<T> {
    state: Mutex<BoardState<T>>,
    changed: Condvar,
}

#[derive(Debug)]
struct BoardState<T> {
    posted: HashMap<usize, T>,
    failed: bool,
}

impl<T: Clone> Board<T> {
    pub(crate) fn new() -> Self {
        Self {
            state: Mutex::new(BoardState { posted: HashMap::new(), failed: false }),
            changed: Condvar::new(),
        }
    }

    /// The result of a stage, once it is there. [`Error::Interrupted`] when it never will be.
    pub(crate) fn wait(&self, stage: usize) -> Result<T, Error> {
        let state = lock(&self.state);
        let state = self
            .changed
            .wait_while(state, |state| !state.failed && !state.posted.contains_key(&stage))
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        state.posted.get(&stage).cloned().ok_or(Error::Interrupted)
    }

    /// Gives the result of a stage to those that wait for it; none tells them that it failed.
    pub(crate) fn post(&self, stage: usize, result: Option<T>) {
        let mut state = lock(&self.state);
        match result {
            Some(result) => drop(state.posted.insert(stage, result)),
            None => state.failed = true,
        }
        self.changed.notify_all();
    }
}

/// Places for work that keeps the machine busy.
#[derive(Debug)]
pub(crate) struct Jobs {
    free: Mutex<usize>,
    changed: Condvar,
}

/// A place; dropping it makes it free.
pub(crate) struct Job<'a>(&'a Jobs);

impl Jobs {
    pub(crate) fn new(places: usize) -> Self {
        Self { free: Mutex::new(places.max(1)), changed: Condvar::new() }
    }

    /// Waits for a free place. Whoever holds one must not wait for another stage or flight.
    pub(crate) fn place(&self) -> Job<'_> {
        let free = lock(&self.free);
        let free = self.changed.wait_while(free, |free| *free == 0);
        *free.unwrap_or_else(|poisoned| poisoned.into_inner()) -= 1;
        Job(self)
    }
}

impl Drop for Job<'_> {
    fn drop(&mut self) {
        *lock(&self.0.free) += 1;
        self.0.changed.notify_one();
    }
}

/// Work that is done once, however many want it.
#[derive(Debug)]
pub(crate) struct Flights<K, V> {
    /// Without a result: somebody is at it.
    state: Mutex<HashMap<K, Option<V>>>,
    changed: Condvar,
}

impl<K: Clone + Eq + Hash, V: Clone> Flights<K, V> {
    pub(crate) fn new() -> Self {
        Self { state: Mutex::new(HashMap::new()), changed: Condvar::new() }
    }

    /// The result, and whether it was this caller who did the work. After a failure the next one tries.
    pub(crate) fn once<E>(&self, key: &K, work: impl FnOnce() -> Result<V, E>) -> Result<(V, bool), E> {
        let state = lock(&self.state);
        let mut state = self
            .changed
            .wait_while(state, |state| matches!(state.get(key), Some(None)))
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(Some(result)) = state.get(key) {
            return Ok((result.clone(), false));
        }
        state.insert(key.clone(), None);
        drop(state);
        // Also when the work panics.
        let mut landing = Landing { flights: self, key, result: None };
        let result = work()?;
        landing.result = Some(result.clone());
        Ok((result, true))
    }
}

struct Landing<'a, K: Clone + Eq + Hash, V: Clone> {
    flights: &'a Flights<K, V>,
    key: &'a K,
    result: Option<V>,
}

impl<K: Clone + Eq + Hash, V: Clone> Drop for Landing<'_, K, V> {
    fn drop(&mut self) {
        let mut state = lock(&self.flights.state);
        match self.result.take() {
            Some(result) => drop(state.insert(self.key.clone(), Some(result))),
            None => drop(state.remove(self.key)),
        }
        self.flights.changed.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use super::*;

    #[test]
    fn a_stage_waits_for_the_one_that_it_needs() {
        let board = Board::new();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| board.wait(0));
            board.post(0, Some("done"));
            assert_eq!(waiting.join().unwrap().unwrap(), "done");
            let never = scope.spawn(|| board.wait(1));
            board.post(2, None);
            assert!(matches!(never.join().unwrap(), Err(Error::Interrupted)));
        });
        assert_eq!(board.wait(0).unwrap(), "done", "what is there stays");
    }

    #[test]
    fn the_same_work_is_done_once_and_again_after_a_failure() {
        let (flights, count) = (Flights::new(), AtomicUsize::new(0));
        assert!(flights.once(&"key", || Err::<usize, _>("failed")).is_err());
        let did: usize = thread::scope(|scope| {
            let work = || flights.once(&"key", || Ok::<_, ()>(count.fetch_add(1, Ordering::SeqCst))).unwrap();
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(work)).collect();
            threads.into_iter().map(|thread| usize::from(thread.join().unwrap().1)).sum()
        });
        assert_eq!((did, count.load(Ordering::SeqCst)), (1, 1));
    }

    #[test]
    fn no_more_work_at_once_than_there_are_places() {
        let (jobs, at_work, most) = (Jobs::new(2), AtomicUsize::new(0), AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let _job = jobs.place();
                    most.fetch_max(at_work.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    thread::yield_now();
                    at_work.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        assert!(most.load(Ordering::SeqCst) <= 2);
    }
}
