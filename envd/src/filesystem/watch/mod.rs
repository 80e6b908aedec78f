//! Watches on directories: WatchDir (a stream), and CreateWatcher, GetWatcherEvents, RemoveWatcher (polled).
//!
//! ```text
//! inotify ──► record ──► core ──► tree ──► a task of each watcher ──► the stream of its client
//!                                                                 └─► a bounded queue, until the next poll
//! ```
//!
//! Events that are lost are told: a stream ends with `resource_exhausted`, and the next poll of a polled watcher fails
//! once with it; that watcher then goes on.

mod core;
mod polled;
mod record;
mod tree;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use envd_proto::filesystem::watch_dir_response::{Event, KeepAlive, StartEvent};
use envd_proto::filesystem::{
    CreateWatcherRequest, CreateWatcherResponse, FilesystemEvent, GetWatcherEventsRequest,
    GetWatcherEventsResponse, RemoveWatcherRequest, RemoveWatcherResponse, WatchDirRequest, WatchDirResponse,
};
use futures::{Stream, StreamExt};
use http::HeaderMap;
use tokio::sync::mpsc;

use self::polled::Polled;
use self::tree::{Order, Tree};
use super::FilesystemService;
use super::service::absolute;
use crate::connect::{self, Code, Error};
use crate::root::Root;
use crate::sandbox::Session;

/// Watchers at one time. Each takes one of the kernel's inotify instances, of which root has 128
/// (`fs.inotify.max_user_instances`), its processes in the container included.
const MAX_WATCHERS: usize = 64;

/// The watchers of a sandbox.
#[derive(Clone, Debug, Default)]
pub(super) struct Watchers {
    count: Arc<AtomicUsize>,
    directories: Arc<AtomicUsize>,
    polled: Polled,
}

/// One of [`MAX_WATCHERS`].
#[derive(Debug)]
struct Slot(Arc<AtomicUsize>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Watchers {
    fn slot(&self) -> Result<Slot, Error> {
        let slot = Slot(Arc::clone(&self.count));
        if self.count.fetch_add(1, Ordering::Relaxed) < MAX_WATCHERS {
            return Ok(slot);
        }
        let message = format!("{MAX_WATCHERS} watchers are active: remove some");
        Err(Error::new(Code::ResourceExhausted, message))
    }
}

/// The events of a tree, in a task of its own, so that waiting for them can be interrupted. It ends with the receiver.
fn pump(mut tree: Tree) -> mpsc::Receiver<Result<Vec<FilesystemEvent>, Error>> {
    // While nobody takes them, they wait in the kernel.
    let (events, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            let next = tokio::select! {
                next = tree.next() => next,
                () = events.closed() => return,
            };
            let ended = next.is_err();
            if events.send(next).await.is_err() || ended {
                return;
            }
        }
    });
    receiver
}

impl FilesystemService {
    /// The changes in a directory, as they happen.
    pub async fn watch_dir(
        &self,
        session: &Session,
        r: WatchDirRequest,
        headers: &HeaderMap,
    ) -> Result<impl Stream<Item = Result<WatchDirResponse, Error>> + Send + 'static + use<>, Error> {
        let keepalive = connect::keepalive(headers)?;
        let user = session.user(&self.sandbox, headers).await?;
        let slot = self.watchers.slot()?;
        let order = Order {
            path: absolute(session, &user, &r.path)?,
            recursive: r.recursive,
            include_entry: r.include_entry,
            allow_network_mounts: r.allow_network_mounts,
        };
        let tree = Tree::open(self.sandbox.root(), order, &self.watchers.directories).await?;
        let start = futures::stream::iter([Ok(Event::Start(StartEvent {}))]);
        let events = start.chain(events(pump(tree), keepalive, slot));
        Ok(events.map(|event| event.map(|event| WatchDirResponse { event: Some(event) })))
    }

    /// Begins to collect the changes in a directory.
    pub async fn create_watcher(
        &self,
        session: &Session,
        r: CreateWatcherRequest,
        headers: &HeaderMap,
    ) -> Result<CreateWatcherResponse, Error> {
        let user = session.user(&self.sandbox, headers).await?;
        let slot = self.watchers.slot()?;
        let order = Order {
            path: absolute(session, &user, &r.path)?,
            recursive: r.recursive,
            include_entry: r.include_entry,
            allow_network_mounts: r.allow_network_mounts,
        };
        let (root, directories) = (self.sandbox.root().clone(), Arc::clone(&self.watchers.directories));
        let open = move || {
            let (root, order, directories): (Root, _, _) =
                (root.clone(), order.clone(), Arc::clone(&directories));
            async move { Tree::open(&root, order, &directories).await }
        };
        let watcher_id = self.watchers.polled.create(open, slot).await?;
        Ok(CreateWatcherResponse { watcher_id })
    }

    /// What was collected since the last call.
    pub fn watcher_events(&self, r: &GetWatcherEventsRequest) -> Result<GetWatcherEventsResponse, Error> {
        Ok(GetWatcherEventsResponse { events: self.watchers.polled.drain(&r.watcher_id)? })
    }

    /// Ends a watcher.
    pub fn remove_watcher(&self, r: &RemoveWatcherRequest) -> Result<RemoveWatcherResponse, Error> {
        self.watchers.polled.remove(&r.watcher_id)?;
        Ok(RemoveWatcherResponse {})
    }
}

fn events(
    receiver: mpsc::Receiver<Result<Vec<FilesystemEvent>, Error>>,
    keepalive: Duration,
    slot: Slot,
) -> impl Stream<Item = Result<Event, Error>> + Send + 'static {
    let batches = futures::stream::unfold((receiver, slot), move |(mut receiver, slot)| async move {
        let batch = match tokio::time::timeout(keepalive, receiver.recv()).await {
            Ok(batch) => batch?.map(|events| events.into_iter().map(Event::Filesystem).collect()),
            Err(_) => Ok(vec![Event::Keepalive(KeepAlive {})]),
        };
        Some((batch, (receiver, slot)))
    });
    batches.flat_map(|batch: Result<Vec<Event>, Error>| {
        futures::stream::iter(match batch {
            Ok(events) => events.into_iter().map(Ok).collect(),
            Err(error) => vec![Err(error)],
        })
    })
}
