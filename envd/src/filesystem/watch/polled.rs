//! Watchers whose events are fetched.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use envd_proto::filesystem::FilesystemEvent;
use prost::Message;
use tokio::sync::Notify;

use super::tree::Tree;
use super::{Slot, pump};
use crate::connect::{Code, Error};

/// What the events of one watcher may take until they are fetched: some 8,000 of them.
const MAX_QUEUED: usize = 1 << 20;

/// What an event takes besides its encoded form.
const EVENT_OVERHEAD: usize = 96;

/// A watcher that nobody polls for so long has lost its client.
const IDLE: Duration = Duration::from_secs(60 * 60);

/// The polled watchers, by id.
#[derive(Clone, Debug, Default)]
pub(super) struct Polled {
    watchers: Arc<Mutex<HashMap<String, Arc<Watcher>>>>,
}

#[derive(Debug, Default)]
struct Watcher {
    queue: Mutex<Queue>,
    polled: Notify,
    removed: Notify,
}

/// Events until they are fetched.
#[derive(Debug, Default)]
struct Queue {
    events: Vec<FilesystemEvent>,
    bytes: usize,
    /// Why there are gaps; until that is told, nothing is collected.
    lost: Option<Error>,
}

impl Queue {
    fn push(&mut self, events: Vec<FilesystemEvent>) {
        if self.lost.is_some() {
            return;
        }
        self.bytes += events.iter().map(|event| event.encoded_len() + EVENT_OVERHEAD).sum::<usize>();
        self.events.extend(events);
        if self.bytes > MAX_QUEUED {
            let message = "events were lost: more were collected than can be kept; fetch them more often, and look \
                           at the directory now";
            self.lose(Error::new(Code::ResourceExhausted, message));
        }
    }

    fn lose(&mut self, error: Error) {
        *self = Self { lost: Some(error), ..Self::default() };
    }

    fn drain(&mut self) -> Result<Vec<FilesystemEvent>, Error> {
        let Self { events, lost, .. } = std::mem::take(self);
        lost.map_or(Ok(events), Err)
    }
}

impl Polled {
    /// Begins to collect; `open` gives the tree, and gives it anew when events of it were lost.
    pub(super) async fn create<F>(
        &self,
        open: impl Fn() -> F + Send + 'static,
        slot: Slot,
    ) -> Result<String, Error>
    where
        F: Future<Output = Result<Tree, Error>> + Send,
    {
        let mut events = pump(open().await?);
        let id = id().map_err(|error| Error::new(Code::Internal, format!("making an id: {error}")))?;
        let watcher = Arc::new(Watcher::default());
        self.lock().insert(id.clone(), Arc::clone(&watcher));
        let (table, key) = (self.clone(), id.clone());
        tokio::spawn(async move {
            let _slot = slot;
            let mut idle = Box::pin(tokio::time::sleep(IDLE));
            loop {
                tokio::select! {
                    Some(next) = events.recv() => match next {
                        Ok(batch) => watcher.lock().push(batch),
                        Err(error) => {
                            watcher.lock().lose(error);
                            match open().await {
                                Ok(tree) => events = pump(tree),
                                Err(error) => watcher.lock().lose(error),
                            }
                        }
                    },
                    () = watcher.polled.notified() => idle.as_mut().reset(tokio::time::Instant::now() + IDLE),
                    () = watcher.removed.notified() => break,
                    () = &mut idle => break,
                }
            }
            table.lock().remove(&key);
        });
        Ok(id)
    }

    /// Takes what was collected.
    pub(super) fn drain(&self, id: &str) -> Result<Vec<FilesystemEvent>, Error> {
        let watcher = self.lock().get(id).cloned().ok_or_else(|| unknown(id))?;
        watcher.polled.notify_one();
        watcher.lock().drain()
    }

    /// Ends a watcher.
    pub(super) fn remove(&self, id: &str) -> Result<(), Error> {
        self.lock().remove(id).ok_or_else(|| unknown(id))?.removed.notify_one();
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Watcher>>> {
        self.watchers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watcher {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unknown(id: &str) -> Error {
    Error::new(Code::NotFound, format!("watcher with id {id} not found"))
}

fn id() -> std::io::Result<String> {
    let mut bytes = [0; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(format!("{:032x}", u128::from_ne_bytes(bytes)))
}

#[cfg(test)]
mod tests {
    use super::super::Watchers;
    use super::super::tree::Order;
    use super::*;
    use crate::root::Root;
    use std::sync::atomic::Ordering;

    #[test]
    fn a_queue_that_is_full_fails_once_and_goes_on() {
        let event = |n: usize| FilesystemEvent { name: format!("{n:0100}"), ..Default::default() };
        let mut queue = Queue::default();
        queue.push((0..10).map(event).collect());
        assert_eq!(queue.drain().unwrap().len(), 10);
        assert_eq!(queue.drain(), Ok(Vec::new()));
        for n in 0..10_000 {
            queue.push(vec![event(n)]);
        }
        assert_eq!(queue.drain().unwrap_err().code(), Code::ResourceExhausted);
        queue.push(vec![event(1)]);
        assert_eq!(queue.drain().unwrap().len(), 1);
    }

    #[tokio::test]
    async fn a_watcher_that_nobody_polls_ends_and_gives_its_place_back() {
        let folder = tempfile::tempdir().unwrap();
        let watchers = Watchers::default();
        let (path, directories) = (folder.path().to_owned(), Arc::clone(&watchers.directories));
        let open = move || {
            let (path, directories) = (path.clone(), Arc::clone(&directories));
            async move {
                let order =
                    Order { path, recursive: false, include_entry: false, allow_network_mounts: false };
                Tree::open(&Root::own(), order, &directories).await
            }
        };
        let id = watchers.polled.create(open, watchers.slot().unwrap()).await.unwrap();
        // From here on time passes only where it is told to.
        tokio::time::pause();
        let settle = async || {
            for _ in 0..10 {
                tokio::task::yield_now().await;
            }
        };
        settle().await;
        for _ in 0..3 {
            tokio::time::advance(IDLE - Duration::from_secs(1)).await;
            settle().await;
            assert_eq!(watchers.polled.drain(&id), Ok(Vec::new()), "a poll keeps it");
            settle().await;
        }
        assert_eq!(watchers.count.load(Ordering::Relaxed), 1);
        tokio::time::advance(IDLE + Duration::from_secs(1)).await;
        settle().await;
        assert_eq!(watchers.polled.drain(&id).unwrap_err().code(), Code::NotFound);
        assert_eq!(watchers.count.load(Ordering::Relaxed), 0);
    }
}
