//! Work on many pieces, on as many threads as are useful.
//!
//! Every thread takes the next piece and does all that there is to do with it; there is no queue, and a piece is in the
//! cache of one core from its read to its hash.

use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};

/// More threads than this wait for memory, not for a core; and other sandboxes want to run too.
const MAX_THREADS: usize = 4;

/// Does `work` for every index below `count`, with a `buffer` for each thread. The results are in the order of the
/// indices; after the first error no further piece is begun.
pub(super) fn for_each<B, T: Send, E: Send>(
    count: usize,
    buffer: impl Fn() -> B + Sync,
    work: impl Fn(&mut B, usize) -> Result<T, E> + Sync,
) -> Result<Vec<T>, E> {
    let next = AtomicUsize::new(0);
    let turn = || -> Result<Vec<(usize, T)>, E> {
        let mut buffer = buffer();
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return Ok(done);
            }
            let result = work(&mut buffer, index);
            if result.is_err() {
                next.store(count, Ordering::Relaxed);
            }
            done.push((index, result?));
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    let threads = cores.min(MAX_THREADS).min(count);
    let mut results = std::thread::scope(|scope| {
        // This thread is one of them.
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(turn)).collect();
        let mut results = turn();
        for other in others {
            let theirs = match other.join() {
                Ok(theirs) => theirs,
                Err(panic) => std::panic::resume_unwind(panic),
            };
            match (&mut results, theirs) {
                (Ok(all), Ok(theirs)) => all.extend(theirs),
                (Ok(_), Err(error)) => results = Err(error),
                (Err(_), _) => {}
            }
        }
        results
    })?;
    results.sort_unstable_by_key(|(index, _)| *index);
    Ok(results.into_iter().map(|(_, result)| result).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_piece_is_done_once_and_in_order() {
        for count in [0, 1, 2, 1000] {
            let done = for_each(
                count,
                || 0,
                |seen, index| {
                    *seen += 1;
                    Ok::<_, ()>((index, *seen))
                },
            );
            let done = done.unwrap();
            assert!(done.iter().map(|(index, _)| *index).eq(0..count));
            assert!(count == 0 || done.iter().any(|(_, seen)| *seen == 1));
        }
    }

    #[test]
    fn the_first_error_ends_the_work() {
        let begun = AtomicUsize::new(0);
        let failed = for_each(
            usize::MAX / 2,
            || (),
            |(), index| {
                begun.fetch_add(1, Ordering::Relaxed);
                if index == 10 { Err("no") } else { Ok(()) }
            },
        );
        assert_eq!(failed.unwrap_err(), "no");
        assert!(begun.into_inner() >= 11);
    }
}
