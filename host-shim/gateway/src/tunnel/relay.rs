//! One stream of a tunnel: its line, and then bytes to a port of the sandbox and back.
//!
//! ```text
//!   CONNECT 3000\n ──► dial ──► OK\n          session ─► Inbox ─► the port      reports: taken, over
//!                        └────► ERR 502 …\n    client ◄─ Outbox ◄─ the port      within the client's credit
//! ```

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::BytesMut;
use sandbox_folder::client::Stream;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, mpsc};

use super::frame::{self, FIN, RST};
use super::outbox::Outbox;
use crate::Gateway;
use crate::fleet::Sandbox;
use crate::metrics::{Direction, StreamKind};
use crate::proxy::{self, DialError};

/// The longest body of a frame to the client: many streams take turns, so none should hold the line for long.
pub(super) const CHUNK: usize = 16 << 10;

/// `CONNECT 65535\n`, and some room: what the agent's own door takes.
const MAX_LINE: usize = 32;

/// How long a client may take for its line, as at the agent's door.
const LINE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the client may go on to send after the port has ended, or was refused: as long as the agent listens then.
const LINGER: Duration = Duration::from_secs(60);

/// What the session learns from a stream's task.
#[derive(Clone, Copy, Debug)]
pub(super) struct Report {
    pub(super) stream: u32,
    /// The task's number: ids may be used again.
    pub(super) number: u64,
    pub(super) news: News,
}

/// What happened on a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum News {
    /// Bytes of the client's were passed on.
    Taken(u32),
    /// It is through, both ways.
    Over,
}

/// What the client has sent and the port has not taken yet; the session's window bounds it.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    held: Mutex<(BytesMut, bool)>,
    came: Notify,
}

impl Inbox {
    pub(super) fn push(&self, bytes: &[u8]) {
        // Copied: a part of a message must not hold the whole of it.
        self.change(|(held, _)| held.extend_from_slice(bytes));
    }

    pub(super) fn end(&self) {
        self.change(|(_, ended)| *ended = true);
    }

    fn change<T>(&self, change: impl FnOnce(&mut (BytesMut, bool)) -> T) -> T {
        let changed = change(&mut self.held.lock().unwrap_or_else(PoisonError::into_inner));
        self.came.notify_one();
        changed
    }

    /// Up to `most` bytes; none at the end. For one reader.
    async fn take(&self, most: usize) -> BytesMut {
        loop {
            {
                let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
                if !held.0.is_empty() {
                    let count = held.0.len().min(most);
                    return held.0.split_to(count);
                }
                if held.1 {
                    return BytesMut::new();
                }
            }
            self.came.notified().await;
        }
    }
}

/// What the client takes at the moment.
#[derive(Debug)]
pub(super) struct Credit {
    left: AtomicU32,
    grown: Notify,
}

impl Credit {
    pub(super) fn new(left: u32) -> Self {
        Self { left: AtomicU32::new(left), grown: Notify::new() }
    }

    /// False: more than can be counted.
    pub(super) fn grow(&self, by: u32) -> bool {
        let grown = self.left.fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| left.checked_add(by));
        self.grown.notify_one();
        grown.is_ok()
    }

    /// Between one and `most` of it. For one taker.
    async fn take(&self, most: usize) -> usize {
        loop {
            let most = u32::try_from(most).unwrap_or(u32::MAX);
            let taken = self.left.load(Ordering::Acquire).min(most);
            if taken > 0 {
                self.left.fetch_sub(taken, Ordering::AcqRel);
                return taken as usize;
            }
            self.grown.notified().await;
        }
    }
}

/// A stream's task.
#[derive(Debug)]
pub(super) struct Relay {
    pub(super) stream: u32,
    pub(super) inbox: Arc<Inbox>,
    pub(super) credit: Arc<Credit>,
    pub(super) outbox: Outbox,
    pub(super) reports: mpsc::Sender<Report>,
    pub(super) number: u64,
}

/// Why a stream was not connected, as the client is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Refused(u16, &'static str);

impl Relay {
    /// Carries the stream to its end.
    pub(super) async fn run(self, gateway: Arc<Gateway>, sandbox: Arc<Sandbox>) {
        let connected = async {
            let port = tokio::time::timeout(LINE_TIMEOUT, self.line())
                .await
                .unwrap_or(Err(Refused(408, "no line `CONNECT <port>` within 10 seconds")))?;
            proxy::open(&sandbox, port).await.map_err(|error| match error {
                DialError::Closed => Refused(502, "the sandbox is running but port is not open"),
                DialError::Gone => Refused(502, "the sandbox was not found"),
                DialError::Broken(_) => Refused(504, "the sandbox did not open the port"),
            })
        };
        let outcome = match connected.await {
            Ok(port) => {
                let _open = gateway.metrics.stream_opened(StreamKind::TunnelStream);
                self.send(b"OK\n").await;
                self.carry(&gateway, port).await
            }
            Err(Refused(code, reason)) => {
                self.send(format!("ERR {code} {reason}\n").as_bytes()).await;
                self.finish().await;
                tokio::time::timeout(LINGER, self.discard()).await.map_err(io::Error::from)
            }
        };
        if outcome.is_err() {
            // Behind the data: clients throw away what they have not read when a reset comes.
            self.outbox.data(frame::data(self.stream, RST, b"")).await;
        }
        self.report(News::Over).await;
    }

    /// The port that the stream's first line names.
    async fn line(&self) -> Result<u16, Refused> {
        let bad = Refused(400, "expected the line `CONNECT <port>`");
        let mut line = Vec::new();
        loop {
            match self.inbox.take(1).await.first() {
                Some(b'\n') => break,
                Some(byte) if line.len() < MAX_LINE => line.push(*byte),
                _ => return Err(bad),
            }
        }
        // At most MAX_LINE and its end.
        self.report(News::Taken(line.len() as u32 + 1)).await;
        parse(&line).ok_or(bad)
    }

    async fn carry(&self, gateway: &Gateway, port: Stream) -> io::Result<()> {
        let (from_port, to_port) = tokio::io::split(port);
        let mut up = std::pin::pin!(self.up(gateway, to_port));
        let mut down = std::pin::pin!(self.down(gateway, from_port));
        tokio::select! {
            ended = &mut down => {
                ended?;
                Ok(tokio::time::timeout(LINGER, up).await?)
            }
            () = &mut up => down.await,
        }
    }

    /// What the client sends, until it sends no more. A server may answer and hang up before it has read everything: its
    /// answer still counts, so what it does not read is thrown away.
    async fn up(&self, gateway: &Gateway, mut port: impl AsyncWrite + Unpin) {
        loop {
            let bytes = self.inbox.take(CHUNK).await;
            if bytes.is_empty() {
                // Who hung up needs no end.
                let _ = port.shutdown().await;
                return;
            }
            if port.write_all(&bytes).await.is_err() || port.flush().await.is_err() {
                return self.discard().await;
            }
            gateway.metrics.proxied(Direction::In, bytes.len() as u64);
            // At most CHUNK.
            self.report(News::Taken(bytes.len() as u32)).await;
        }
    }

    async fn discard(&self) {
        loop {
            let bytes = self.inbox.take(CHUNK).await;
            if bytes.is_empty() {
                return;
            }
            self.report(News::Taken(bytes.len() as u32)).await;
        }
    }

    async fn down(&self, gateway: &Gateway, mut port: impl AsyncRead + Unpin) -> io::Result<()> {
        let mut buffer = vec![0; CHUNK].into_boxed_slice();
        loop {
            let count = port.read(&mut buffer).await?;
            if count == 0 {
                self.finish().await;
                return Ok(());
            }
            gateway.metrics.proxied(Direction::Out, count as u64);
            self.send(&buffer[..count]).await;
        }
    }

    async fn send(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(self.credit.take(bytes.len()).await);
            bytes = later;
            self.outbox.data(frame::data(self.stream, 0, now)).await;
        }
    }

    async fn finish(&self) {
        self.outbox.data(frame::data(self.stream, FIN, b"")).await;
    }

    async fn report(&self, news: News) {
        // Closed: the session is over, and with it this task.
        let _ = self.reports.send(Report { stream: self.stream, number: self.number, news }).await;
    }
}

/// The port of `CONNECT <port>`, with the spaces that the agent's door allows.
fn parse(line: &[u8]) -> Option<u16> {
    let port = std::str::from_utf8(line).ok()?.strip_prefix("CONNECT ")?.trim();
    port.bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| port.parse().ok())
        .flatten()
        .filter(|port| *port > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_names_a_port_or_nothing() {
        for (line, port) in [
            ("CONNECT 3000", Some(3000)),
            ("CONNECT 65535\r", Some(65535)),
            ("CONNECT 0", None),
            ("CONNECT 65536", None),
            ("CONNECT +80", None),
            ("CONNECT ", None),
            ("connect 80", None),
            ("CONNECT 80 81", None),
            ("CONNECT \u{661}", None),
        ] {
            assert_eq!(parse(line.as_bytes()), port, "{line:?}");
        }
        assert_eq!(parse(b"CONNECT \xff"), None);
    }

    #[tokio::test]
    async fn credit_is_taken_as_far_as_it_goes() {
        let credit = Arc::new(Credit::new(5));
        assert_eq!(credit.take(3).await, 3);
        assert_eq!(credit.take(3).await, 2);
        let waiting = tokio::spawn({
            let credit = Arc::clone(&credit);
            async move { credit.take(9).await }
        });
        assert!(credit.grow(4));
        assert_eq!(waiting.await.unwrap(), 4);
        assert!(credit.grow(u32::MAX) && !credit.grow(1));
    }

    #[tokio::test]
    async fn what_came_before_the_end_is_still_there() {
        let inbox = Inbox::default();
        inbox.push(b"abc");
        inbox.end();
        assert_eq!(&inbox.take(2).await[..], b"ab");
        assert_eq!(&inbox.take(2).await[..], b"c");
        assert!(inbox.take(2).await.is_empty());
    }
}
