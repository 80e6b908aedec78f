//! One WebSocket: its calls, its subscriptions, its end.
//!
//! ```text
//! frames ──► parse ──► calls (at most MAX_CALLS at once, MAX_CALL_BYTES of text) ──► outbox ──► frames
//!                                             processes, watches, ports ────────────────┘
//! ```
//!
//! Calls run at once, as on the old server; those that write to one input take turns in the order in which they came.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::ws::{Message as WsMessage, WebSocket};
use futures::stream::{FuturesUnordered, SplitSink, SplitStream};
use futures::{FutureExt, SinkExt, StreamExt};
use sandbox_folder::client::Code;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio::task::AbortHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::call::{Call, Key, Topic};
use super::outbox::{Outbox, Queue, outbox};
use super::rpc::{self, Frame, Message, RpcError};
use super::session::{Seat, Session, Subscriber};
use super::{feeds, files, run};
use crate::identity::{hex, random};

/// The longest message of a client: a file of this size goes in as text.
pub(super) const MAX_MESSAGE: usize = 16 << 20;

/// Calls of one connection that run at once.
const MAX_CALLS: usize = 64;

/// Text of the calls that run: beyond it no more are read until some are done.
const MAX_CALL_BYTES: usize = MAX_MESSAGE;

/// What a batch's answers may hold together.
const MAX_BATCH_ANSWER: usize = 2 * MAX_MESSAGE;

/// Subscriptions of one connection. A process has three.
const MAX_SUBSCRIPTIONS: usize = 512;

/// How long a call may take. The published client gives up after 10 seconds, and nobody waits for what is later.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// Time between pings: a client that is gone without a word must be noticed, since its processes end with it.
const PING_INTERVAL: Duration = Duration::from_secs(30);

/// How long a client may be silent, answers to pings included.
const SILENCE: Duration = Duration::from_secs(90);

/// What a subscription is for.
enum Subscription {
    Channel(Key),
    Feed(AbortHandle),
}

/// What the calls of a connection share.
struct Connection {
    seat: Seat,
    out: Outbox,
    subscriptions: Mutex<HashMap<Arc<str>, Subscription>>,
}

/// Serves a connection until its client or its sandbox is gone.
pub(super) async fn serve(seat: Seat, socket: WebSocket, gone: impl Future<Output = ()>) {
    let (sink, frames) = socket.split();
    let (out, queue) = outbox();
    let connection = Connection { seat, out, subscriptions: Mutex::default() };
    tokio::select! {
        () = read(&connection, frames) => {}
        () = write(sink, queue) => {}
        () = gone => {}
    }
}

async fn write(mut sink: SplitSink<WebSocket, WsMessage>, mut queue: Queue) {
    let mut ping = tokio::time::interval(PING_INTERVAL);
    loop {
        let sent = tokio::select! {
            next = queue.next() => match next {
                Some((text, _room)) => sink.send(WsMessage::Text(text.into())).await,
                None => return,
            },
            _ = ping.tick() => sink.send(WsMessage::Ping(Default::default())).await,
        };
        if sent.is_err() {
            return;
        }
    }
}

async fn read(connection: &Connection, mut frames: SplitStream<WebSocket>) {
    let mut calls = FuturesUnordered::new();
    let mut bytes = 0;
    loop {
        tokio::select! {
            // First: a call that has come is begun before the next one is read.
            biased;
            Some(length) = calls.next(), if !calls.is_empty() => bytes -= length,
            frame = tokio::time::timeout(SILENCE, frames.next()),
                if calls.len() < MAX_CALLS && bytes < MAX_CALL_BYTES =>
            {
                let Ok(Some(Ok(frame))) = frame else { return };
                let text = match frame {
                    WsMessage::Text(text) => text.as_str().to_owned(),
                    WsMessage::Binary(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
                    WsMessage::Ping(_) | WsMessage::Pong(_) => continue,
                    WsMessage::Close(_) => return,
                };
                let length = text.len();
                bytes += length;
                calls.push(async move { connection.answer(text).await }.map(move |()| length));
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let subscriptions = self.subscriptions.get_mut().unwrap_or_else(PoisonError::into_inner);
        for (id, subscription) in subscriptions.drain() {
            match subscription {
                Subscription::Channel(key) => self.seat.session().unsubscribe(&key, &id),
                Subscription::Feed(task) => task.abort(),
            }
        }
    }
}

impl Connection {
    /// Answers a frame.
    async fn answer(&self, text: String) {
        // What a call makes known is known once its answer is on its way; these go at the end.
        let mut made = Vec::new();
        let answer = match rpc::parse(&text) {
            Ok(Frame::Single(message)) => self.one(message, &mut made).await,
            Ok(Frame::Batch(messages)) => self.batch(messages, &mut made).await,
            Err(error) => Some(rpc::answer(None, &Err(error))),
        };
        if let Some(answer) = answer {
            self.out.send(answer).await;
        }
    }

    async fn batch(&self, messages: Vec<Message<'_>>, made: &mut Vec<DropGuard>) -> Option<String> {
        let mut answers = Vec::new();
        let mut length = 0;
        for message in messages {
            let Some(mut answer) = self.one(message, made).await else { continue };
            length += answer.len();
            if length > MAX_BATCH_ANSWER {
                let error = RpcError { code: -32003, message: "response too large".to_owned() };
                answer = rpc::answer(None, &Err(error));
                answers.push(answer);
                break;
            }
            answers.push(answer);
        }
        (!answers.is_empty()).then(|| rpc::batch(&answers))
    }

    async fn one(&self, message: Message<'_>, made: &mut Vec<DropGuard>) -> Option<String> {
        match message {
            Message::Call { id, method, params } => {
                Some(rpc::answer(Some(id), &self.within(&method, params, made).await))
            }
            Message::Notification { method, params } => {
                // Nobody wants to know how it went.
                let _ = self.within(&method, params, made).await;
                None
            }
            Message::Response => None,
            Message::Invalid { id } => {
                Some(rpc::answer(id, &Err(RpcError::invalid_request("invalid request"))))
            }
        }
    }

    async fn within(
        &self,
        method: &str,
        params: Option<&RawValue>,
        made: &mut Vec<DropGuard>,
    ) -> Result<Value, RpcError> {
        let call = Call::parse(method, params)?;
        let done = tokio::time::timeout(CALL_TIMEOUT, self.call(call, made)).await;
        done.unwrap_or_else(|_| Err(RpcError::timeout()))
    }

    async fn call(&self, call: Call, made: &mut Vec<DropGuard>) -> Result<Value, RpcError> {
        let session = self.seat.session();
        let client = || async { session.client().await.map_err(|error| RpcError::failed(error.to_string())) };
        match call {
            Call::Subscribe(key, topic) => {
                let (subscriber, known) = self.subscriber(topic)?;
                let id = Arc::clone(&subscriber.id);
                self.keep(&id, Subscription::Channel(key.clone()))?;
                session.subscribe(key, subscriber);
                made.push(known);
                Ok(json!(&*id))
            }
            Call::WatchDir(path) => {
                let watch = feeds::watch(client().await?, &path)
                    .await
                    .map_err(files::failed("watching dir", &path))?;
                self.feed(made, |subscriber| feeds::tell_changes(watch, path, subscriber))
            }
            Call::ScanPorts => {
                let client = client().await?.clone();
                self.feed(made, |subscriber| feeds::tell_ports(client, subscriber))
            }
            Call::Unsubscribe(id) => self.unsubscribe(&id),
            Call::Start(start) => {
                let id = start.key.id.clone();
                run::start(session, start).await?;
                Ok(json!(id))
            }
            Call::Input(key, data) => {
                let run = session.run(&key);
                let live = run.as_ref().and_then(|run| run.live.get()).ok_or_else(|| missing(&key))?;
                let written = live.input.lock().await.write(data.into()).await;
                written
                    .map_err(|error| RpcError::failed(format!("cannot write to '{}': {error}", key.id)))?;
                Ok(Value::Null)
            }
            Call::Resize(key, cols, rows) => {
                let pid = pid(session, &key).ok_or_else(|| missing(&key))?;
                let size = envd_proto::process::pty::Size { cols, rows };
                let resized = client().await?.resize(pid, size).await;
                resized.map_err(|error| RpcError::failed(format!("cannot resize '{}': {error}", key.id)))?;
                Ok(Value::Null)
            }
            Call::Kill(key) => {
                let Some(pid) = pid(session, &key) else { return Ok(Value::Null) };
                match run::kill(client().await?, pid).await {
                    // One that ended is as dead as one that was killed; the old server did not complain either.
                    Err(error) if error.code() != Some(Code::NotFound) => {
                        Err(RpcError::failed(format!("cannot kill '{}': {error}", key.id)))
                    }
                    _ => Ok(Value::Null),
                }
            }
            Call::List(path) => files::list(client().await?, &path).await,
            Call::Read(path, form) => files::read(client().await?, &path, form).await,
            Call::Write(path, contents) => files::write(client().await?, &path, contents).await,
            Call::Remove(path) => files::remove(client().await?, &path).await,
            Call::MakeDir(path) => files::make_dir(client().await?, &path).await,
        }
    }

    fn subscriber(&self, topic: Topic) -> Result<(Subscriber, DropGuard), RpcError> {
        let id = random::<16>().map_err(|error| RpcError::failed(error.to_string()))?;
        let known = CancellationToken::new();
        let id = format!("0x{}", hex(&id).trim_start_matches('0')).into();
        Ok((Subscriber { id, topic, out: self.out.clone(), known: known.clone() }, known.drop_guard()))
    }

    fn keep(&self, id: &Arc<str>, subscription: Subscription) -> Result<(), RpcError> {
        let mut subscriptions = self.subscriptions.lock().unwrap_or_else(PoisonError::into_inner);
        if subscriptions.len() >= MAX_SUBSCRIPTIONS {
            if let Subscription::Feed(task) = subscription {
                task.abort();
            }
            let message = format!("{MAX_SUBSCRIPTIONS} subscriptions on this connection: end one first");
            return Err(RpcError::failed(message));
        }
        subscriptions.insert(Arc::clone(id), subscription);
        Ok(())
    }

    /// A subscription of this connection alone, fed by a task.
    fn feed<F>(
        &self,
        made: &mut Vec<DropGuard>,
        task: impl FnOnce(Subscriber) -> F,
    ) -> Result<Value, RpcError>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (subscriber, known) = self.subscriber(Topic::Data)?;
        let id = Arc::clone(&subscriber.id);
        let task = tokio::spawn(task(subscriber));
        self.keep(&id, Subscription::Feed(task.abort_handle()))?;
        made.push(known);
        Ok(json!(&*id))
    }

    fn unsubscribe(&self, id: &str) -> Result<Value, RpcError> {
        let taken = self.subscriptions.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        match taken {
            Some(Subscription::Channel(key)) => self.seat.session().unsubscribe(&key, id),
            Some(Subscription::Feed(task)) => task.abort(),
            None => return Err(RpcError::failed("subscription not found")),
        }
        Ok(json!(true))
    }
}

fn pid(session: &Session, key: &Key) -> Option<u32> {
    Some(session.run(key)?.live.get()?.pid)
}

fn missing(key: &Key) -> RpcError {
    RpcError::failed(format!("{} '{}' not found", key.kind.namespace(), key.id))
}
