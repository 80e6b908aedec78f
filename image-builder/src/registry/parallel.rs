//! Several transfers at once; the first that fails ends the others.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use futures::future::{Either, select};
use tokio::runtime::Runtime;
use tokio::sync::watch;

use super::failure::Failure;
use super::limits::PARALLEL;

/// Does `transfer` for each of `items`, some at once, each on a thread of its own: what they write and hash holds up
/// nobody else's connection.
pub(super) fn each<'a, T: Sync, F>(
    runtime: &Runtime,
    items: &'a [T],
    transfer: impl Fn(&'a T) -> F + Sync,
) -> Result<(), Failure>
where
    F: Future<Output = Result<(), Failure>>,
{
    let next = AtomicUsize::new(0);
    let (stop, stopped) = watch::channel(false);
    let failed = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..PARALLEL.min(items.len()) {
            let mut stopped = stopped.clone();
            let (next, stop, failed, transfer) = (&next, &stop, &failed, &transfer);
            scope.spawn(move || {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let end = runtime.block_on(async {
                        let stopped = pin!(stopped.wait_for(|stopped| *stopped));
                        match select(pin!(transfer(item)), stopped).await {
                            Either::Left((end, _)) => Some(end),
                            Either::Right(_) => None,
                        }
                    });
                    match end {
                        Some(Ok(())) => {}
                        None => return,
                        Some(Err(failure)) => {
                            failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(failure);
                            stop.send_replace(true);
                            return;
                        }
                    }
                }
            });
        }
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}
