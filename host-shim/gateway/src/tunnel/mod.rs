//! The tunnel: one WebSocket that carries many streams to a sandbox's ports, for clients behind proxies.
//!
//! ```text
//!   client ══ WebSocket, binary messages ══► session ── stream 1 ─► relay ─► port 3000
//!             bytes of yamux                    │  └──── stream 3 ─► relay ─► port 8080
//!             text, garbage: closed             └─ windows, places: bounded
//! ```
//!
//! `tunnel.md` beside this crate is the protocol's page. A stream is slow by itself: its window bounds what waits for it
//! here, and the loop that reads the WebSocket never waits for any stream. Frames to the client go by turns.

mod close;
pub mod frame;
mod outbox;
mod relay;
pub mod session;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::ws::{Message, WebSocket};
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use sandbox_folder::SandboxId;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::Gateway;
use crate::fleet::Sandbox;
use crate::metrics::StreamKind;
use close::End;
use frame::Header;
use outbox::{Outbox, Queue, outbox};
use relay::{Credit, Inbox, News, Relay, Report};
use session::{Session, Streams, WINDOW};

/// The longest message of a client: the longest frame that a window allows fits twice.
pub(crate) const MAX_MESSAGE: usize = 2 * WINDOW as usize;

/// Tunnels to one sandbox at once. Each may hold a window for each of its streams, 32 MiB.
const MAX_TUNNELS: usize = 4;

/// Time between pings: proxies cut a connection on which nothing happens, many after a minute.
const PING_INTERVAL: Duration = Duration::from_secs(30);

/// How long a client may say nothing, answers to pings included.
const SILENCE: Duration = Duration::from_secs(90);

/// How long a tunnel may be without a stream: it holds a place among the gateway's connections.
const IDLE: Duration = Duration::from_secs(30 * 60);

/// Reports of streams that wait; a stream waits for room, the session never does.
const REPORTS: usize = 64;

/// How many tunnels each sandbox has.
#[derive(Debug, Default)]
pub(crate) struct Seats(Arc<Mutex<HashMap<SandboxId, usize>>>);

/// A tunnel's place.
#[derive(Debug)]
pub(crate) struct Seat {
    seats: Arc<Mutex<HashMap<SandboxId, usize>>>,
    id: SandboxId,
}

impl Seats {
    /// A place for one more; none when there are too many.
    pub(crate) fn take(&self, id: &SandboxId) -> Option<Seat> {
        let mut seats = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = seats.entry(id.clone()).or_default();
        if *taken >= MAX_TUNNELS {
            return None;
        }
        *taken += 1;
        Some(Seat { seats: Arc::clone(&self.0), id: id.clone() })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut seats = self.seats.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(taken) = seats.get_mut(&self.id) {
            *taken -= 1;
            if *taken == 0 {
                seats.remove(&self.id);
            }
        }
    }
}

/// Serves a tunnel until its client or its sandbox is gone, or `cut`.
pub(crate) async fn serve(
    gateway: Arc<Gateway>,
    sandbox: Arc<Sandbox>,
    socket: WebSocket,
    cut: CancellationToken,
) {
    let _open = gateway.metrics.stream_opened(StreamKind::Tunnel);
    let (mut sink, mut messages) = socket.split();
    let (outbox, queue) = outbox();
    let end = tokio::select! {
        end = read(&gateway, &sandbox, &mut messages, outbox) => end,
        end = write(&mut sink, queue) => end,
        () = sandbox.gone() => End::Sandbox,
        () = cut.cancelled() => End::Stopping,
    };
    tracing::debug!(?end, "a tunnel ended");
    close::close(sink, messages, &end).await;
}

async fn write(sink: &mut SplitSink<WebSocket, Message>, mut queue: Queue) -> End {
    let mut ping = tokio::time::interval(PING_INTERVAL);
    loop {
        tokio::select! {
            frames = queue.next() => {
                for frame in frames {
                    if sink.feed(Message::Binary(frame)).await.is_err() {
                        return End::Lost;
                    }
                }
            }
            _ = ping.tick() => {
                if sink.feed(Message::Ping(Default::default())).await.is_err() {
                    return End::Lost;
                }
            }
        }
        if sink.flush().await.is_err() {
            return End::Lost;
        }
    }
}

async fn read(
    gateway: &Arc<Gateway>,
    sandbox: &Arc<Sandbox>,
    messages: &mut SplitStream<WebSocket>,
    outbox: Outbox,
) -> End {
    let (reports, mut news) = mpsc::channel(REPORTS);
    let mut session = Session::default();
    let mut tunnel = Tunnel {
        gateway: Arc::clone(gateway),
        sandbox: Arc::clone(sandbox),
        outbox,
        reports,
        relays: HashMap::new(),
        last: 0,
        flooded: false,
    };
    let (mut heard, mut used) = (Instant::now(), Instant::now());
    loop {
        if tunnel.flooded {
            return End::Flood;
        }
        if session.is_over() {
            return End::Left;
        }
        if session.open_streams() > 0 {
            used = Instant::now();
        }
        tokio::select! {
            message = messages.next() => {
                heard = Instant::now();
                let bytes = match message {
                    Some(Ok(Message::Binary(bytes))) => bytes,
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => continue,
                    Some(Ok(Message::Text(_))) => return End::Text,
                    Some(Ok(Message::Close(_))) => return End::Closed,
                    Some(Err(error)) => return End::of(error),
                    None => return End::Lost,
                };
                if let Err(violation) = session.receive(&bytes, &mut tunnel) {
                    return End::Violation(violation);
                }
            }
            Some(report) = news.recv() => tunnel.report(&mut session, report),
            () = tokio::time::sleep_until(heard + SILENCE) => return End::Silent,
            () = tokio::time::sleep_until(used + IDLE), if session.open_streams() == 0 => return End::Idle,
        }
    }
}

/// The streams of a tunnel.
struct Tunnel {
    gateway: Arc<Gateway>,
    sandbox: Arc<Sandbox>,
    outbox: Outbox,
    reports: mpsc::Sender<Report>,
    relays: HashMap<u32, Running>,
    /// The last relay's number.
    last: u64,
    flooded: bool,
}

struct Running {
    number: u64,
    inbox: Arc<Inbox>,
    credit: Arc<Credit>,
    _task: AbortOnDropHandle<()>,
}

impl Tunnel {
    fn report(&mut self, session: &mut Session, Report { stream, number, news }: Report) {
        // Of a stream that was reset, and whose id may be another's by now.
        if self.relays.get(&stream).is_none_or(|relay| relay.number != number) {
            return;
        }
        match news {
            News::Taken(bytes) => session.taken(stream, bytes, self),
            News::Over => {
                session.release(stream);
                self.relays.remove(&stream);
            }
        }
    }
}

impl Streams for Tunnel {
    fn open(&mut self, stream: u32) {
        self.last += 1;
        let (inbox, credit) = (Arc::<Inbox>::default(), Arc::new(Credit::new(WINDOW)));
        let relay = Relay {
            stream,
            number: self.last,
            inbox: Arc::clone(&inbox),
            credit: Arc::clone(&credit),
            outbox: self.outbox.clone(),
            reports: self.reports.clone(),
        };
        let task = tokio::spawn(relay.run(Arc::clone(&self.gateway), Arc::clone(&self.sandbox)));
        let running = Running { number: self.last, inbox, credit, _task: AbortOnDropHandle::new(task) };
        self.relays.insert(stream, running);
    }

    fn data(&mut self, stream: u32, bytes: &[u8]) {
        if let Some(relay) = self.relays.get(&stream) {
            relay.inbox.push(bytes);
        }
    }

    fn end(&mut self, stream: u32) {
        if let Some(relay) = self.relays.get(&stream) {
            relay.inbox.end();
        }
    }

    fn reset(&mut self, stream: u32) {
        self.relays.remove(&stream);
    }

    fn credit(&mut self, stream: u32, bytes: u32) -> bool {
        self.relays.get(&stream).is_none_or(|relay| relay.credit.grow(bytes))
    }

    fn send(&mut self, header: Header) {
        self.flooded |= !self.outbox.header(header);
    }
}
