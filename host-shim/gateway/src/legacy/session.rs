//! What all connections to one sandbox share: who listens to which process, and what runs.
//!
//! ```text
//! subscribe (onExit, p1) ──► channel p1 ◄── start (p1) ──► a task reads the process and tells the subscribers
//!                               │
//!             last subscriber lost: killed; ended and nobody subscribed: forgotten
//! ```
//!
//! A client subscribes before it starts, so a channel is there before its process. Connections share them: a process
//! outlives a connection when another one subscribed to it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use sandbox_folder::client::{ClientError, Code, SandboxClient, Stdin};
use tokio::sync::{Notify, OnceCell};
use tokio_util::sync::CancellationToken;

use super::call::{Key, Topic};
use super::outbox::Outbox;
use super::rpc::{RpcError, notification};
use super::text::Unfinished;
use crate::fleet::Sandbox;

/// Connections to one sandbox: whoever knows its id may open them.
const MAX_CONNECTIONS: usize = 32;

/// Processes and terminals that run at once in one sandbox, over this protocol.
const MAX_RUNS: usize = 128;

/// Whom everything is done as, where the image has that user.
const USER: &str = "user";

/// The sessions of all sandboxes, by their folders. One lives as long as a connection or a process of it.
static SESSIONS: LazyLock<Mutex<HashMap<PathBuf, Weak<Session>>>> = LazyLock::new(Mutex::default);

/// What all connections to one sandbox share.
pub(super) struct Session {
    client: SandboxClient,
    user: OnceCell<SandboxClient>,
    connections: AtomicUsize,
    channels: Mutex<HashMap<Key, Channel>>,
    /// What unfinished lines hold.
    pub unfinished: Arc<Unfinished>,
}

#[derive(Default)]
struct Channel {
    subscribers: Vec<Subscriber>,
    run: Option<Arc<Run>>,
}

/// Somebody who wants to hear of a process.
#[derive(Clone, Debug)]
pub(super) struct Subscriber {
    /// The subscription's id.
    pub id: Arc<str>,
    /// What of it.
    pub topic: Topic,
    /// The way to the client.
    pub out: Outbox,
    /// Cancelled once the client was sent the id: nothing may overtake it.
    pub known: CancellationToken,
}

/// A process or terminal that runs, or is being started.
#[derive(Default)]
pub(super) struct Run {
    /// Told when nobody subscribes any more.
    pub abandoned: Notify,
    /// Set once it runs.
    pub live: OnceLock<Live>,
}

/// What a running process has.
pub(super) struct Live {
    /// Its process id in the sandbox.
    pub pid: u32,
    /// Its input; taken in turns, in the order of the calls.
    pub input: tokio::sync::Mutex<Stdin>,
}

/// A connection's place in a session.
pub(super) struct Seat(Arc<Session>);

impl Session {
    /// The session of a sandbox.
    pub(super) fn of(sandbox: &Sandbox) -> Arc<Self> {
        let mut sessions = SESSIONS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(session) = sessions.get(&sandbox.dir).and_then(Weak::upgrade) {
            return session;
        }
        sessions.retain(|_, session| session.strong_count() > 0);
        let session = Arc::new(Self {
            client: sandbox.client(),
            user: OnceCell::new(),
            connections: AtomicUsize::new(0),
            channels: Mutex::default(),
            unfinished: Arc::default(),
        });
        sessions.insert(sandbox.dir.clone(), Arc::downgrade(&session));
        session
    }

    /// A place for one more connection; none when there are too many.
    pub(super) fn seat(self: Arc<Self>) -> Option<Seat> {
        let taken = self.connections.fetch_add(1, Ordering::Relaxed);
        let seat = Seat(self);
        (taken < MAX_CONNECTIONS).then_some(seat)
    }

    /// A client of the agent as `user`, or as the sandbox's default user where the image has no such one.
    pub(super) async fn client(&self) -> Result<&SandboxClient, ClientError> {
        let find = || async {
            let client = self.client.clone().with_user(USER);
            match client.stat("/").await {
                Ok(_) => Ok(client),
                Err(error) if error.code() == Some(Code::Unauthenticated) => Ok(self.client.clone()),
                Err(error) => Err(error),
            }
        };
        self.user.get_or_try_init(find).await
    }

    fn channels(&self) -> MutexGuard<'_, HashMap<Key, Channel>> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a subscriber, to a process that may not be there yet.
    pub(super) fn subscribe(&self, key: Key, subscriber: Subscriber) {
        self.channels().entry(key).or_default().subscribers.push(subscriber);
    }

    /// Takes a subscriber away; the last one takes the process along.
    pub(super) fn unsubscribe(&self, key: &Key, id: &str) {
        let mut channels = self.channels();
        let Some(channel) = channels.get_mut(key) else { return };
        channel.subscribers.retain(|subscriber| &*subscriber.id != id);
        if channel.subscribers.is_empty() {
            match &channel.run {
                Some(run) => run.abandoned.notify_one(),
                None => drop(channels.remove(key)),
            }
        }
    }

    /// A place for a process to be started; none when one of that name is there already.
    pub(super) fn begin(&self, key: &Key) -> Result<Option<Arc<Run>>, RpcError> {
        let mut channels = self.channels();
        if channels.get(key).is_some_and(|channel| channel.run.is_some()) {
            return Ok(None);
        }
        if channels.values().filter(|channel| channel.run.is_some()).count() >= MAX_RUNS {
            let message = format!("{MAX_RUNS} processes and terminals run already: end one first");
            return Err(RpcError::failed(message));
        }
        let run = Arc::new(Run::default());
        channels.entry(key.clone()).or_default().run = Some(Arc::clone(&run));
        Ok(Some(run))
    }

    /// What runs under a name, or is being started.
    pub(super) fn run(&self, key: &Key) -> Option<Arc<Run>> {
        self.channels().get(key)?.run.clone()
    }

    /// It ended: the name is free again.
    pub(super) fn end(&self, key: &Key) {
        let mut channels = self.channels();
        if let Entry::Occupied(mut channel) = channels.entry(key.clone()) {
            channel.get_mut().run = None;
            if channel.get().subscribers.is_empty() {
                channel.remove();
            }
        }
    }

    /// Tells the subscribers of a topic; waits for the slowest.
    pub(super) async fn tell(&self, key: &Key, topic: Topic, result: &impl serde::Serialize) {
        let subscribers: Vec<Subscriber> = match self.channels().get(key) {
            Some(channel) => {
                channel.subscribers.iter().filter(|subscriber| subscriber.topic == topic).cloned().collect()
            }
            None => Vec::new(),
        };
        for subscriber in subscribers {
            subscriber.tell(key.kind.namespace(), result).await;
        }
    }
}

impl Subscriber {
    /// Tells one thing.
    pub(super) async fn tell(&self, namespace: &str, result: &impl serde::Serialize) {
        self.known.cancelled().await;
        self.out.send(notification(namespace, &self.id, result)).await;
    }
}

impl Seat {
    /// The session.
    pub(super) fn session(&self) -> &Arc<Session> {
        &self.0
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}
