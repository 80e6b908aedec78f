//! What the host believes of a guest's yamux frames, before yamux reads them.
//!
//! ```text
//!  guest ──► Guard ──► yamux ──► MuxStream ──► client
//!              │ frames in           │ bytes read
//!              └──────► Ledger ◄─────┘
//! ```
//!
//! yamux bounds the bytes that a peer may send ahead, and keeps each frame in an allocation of its own: a window of
//! frames of one byte takes sixty times its size. The ledger counts the frames that nobody has read, and the stream that
//! has the most of them is cut when there are too many. What no honest agent says ends the session: it opens no streams,
//! and says nothing on those that were never opened.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::compat::Compat;

/// Frames of a session that nobody has read. Two streams of single bytes that nobody reads at all fit; each frame costs
/// yamux and the ledger some hundred bytes, so this is some 50 MiB.
pub const MAX_UNREAD_FRAMES: usize = 1 << 19;

/// The frame header of yamux: version, type, flags, stream, length (hashicorp/yamux, `spec.md`).
const HEADER_SIZE: usize = 12;

const DATA: u8 = 0;
const WINDOW_UPDATE: u8 = 1;
const GO_AWAY: u8 = 3;
const SYN: u16 = 1;

/// A stream that never is: what yamux does not know it does not keep.
const NO_STREAM: u32 = u32::MAX;

/// A stream that can be taken from whoever holds it.
pub(super) type Shared = Arc<Mutex<Option<Compat<yamux::Stream>>>>;

/// The open streams of a session, and what was not read of each.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    streams: HashMap<u32, Unread>,
    last: u32,
    frames: usize,
}

#[derive(Debug)]
struct Unread {
    stream: Shared,
    /// The sizes of the frames, the oldest first; what was read of it is taken off.
    sizes: VecDeque<u32>,
}

impl Ledger {
    /// A stream was opened, and is counted from now on.
    pub(super) fn open(&mut self, id: u32, stream: Shared) {
        self.last = self.last.max(id);
        self.streams.insert(id, Unread { stream, sizes: VecDeque::new() });
    }

    /// What is said on the stream from now on is thrown away.
    pub(super) fn close(&mut self, id: u32) {
        if let Some(closed) = self.streams.remove(&id) {
            self.frames -= closed.sizes.len();
        }
    }

    /// So many bytes of the stream were read.
    pub(super) fn read(&mut self, id: u32, mut bytes: usize) {
        let Some(unread) = self.streams.get_mut(&id) else { return };
        while let Some(size) = unread.sizes.front_mut() {
            if let Some(left @ 1..) = (*size as usize).checked_sub(bytes) {
                // No more than the size, which is an u32.
                *size = left as u32;
                return;
            }
            bytes -= *size as usize;
            unread.sizes.pop_front();
            self.frames -= 1;
        }
    }

    /// A data frame has come. Gives a stream that must be cut, and whether the frame's own is open.
    fn received(&mut self, id: u32, length: u32) -> (Option<Shared>, bool) {
        let Some(unread) = self.streams.get_mut(&id) else { return (None, false) };
        if length > 0 {
            unread.sizes.push_back(length);
            self.frames += 1;
        }
        let mut cut = None;
        if self.frames > MAX_UNREAD_FRAMES
            && let Some(most) = self.streams.iter().max_by_key(|(_, unread)| unread.sizes.len())
        {
            let most = *most.0;
            cut = self.streams.get(&most).map(|unread| Arc::clone(&unread.stream));
            self.close(most);
        }
        (cut, self.streams.contains_key(&id))
    }
}

/// The transport of a session, as yamux is shown it.
#[derive(Debug)]
pub(super) struct Guard<T> {
    transport: T,
    ledger: Arc<Mutex<Ledger>>,
    header: [u8; HEADER_SIZE],
    /// Bytes of the header that were read, and that yamux was given.
    read: usize,
    given: usize,
    /// Bytes of the frame's body that yamux was not given yet.
    body: usize,
    said: Said,
}

/// Where yamux is in what it says.
#[derive(Debug, Default)]
struct Said {
    header: Vec<u8>,
    body: usize,
}

impl Said {
    /// Whether what comes next is a GoAway: yamux's word for a peer that breaks its rules, which would be heard on.
    fn is_go_away(&self, next: &[u8]) -> bool {
        self.body == 0 && self.header.is_empty() && next.get(1) == Some(&GO_AWAY)
    }

    fn add(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.body > 0 {
                let count = self.body.min(bytes.len());
                (self.body, bytes) = (self.body - count, &bytes[count..]);
                continue;
            }
            let (taken, rest) = bytes.split_at(bytes.len().min(HEADER_SIZE - self.header.len()));
            self.header.extend_from_slice(taken);
            bytes = rest;
            if let [_, kind, .., l0, l1, l2, l3] = self.header[..]
                && self.header.len() == HEADER_SIZE
            {
                self.body = if kind == DATA { u32::from_be_bytes([l0, l1, l2, l3]) as usize } else { 0 };
                self.header.clear();
            }
        }
    }
}

impl<T> Guard<T> {
    pub(super) fn new(transport: T, ledger: Arc<Mutex<Ledger>>) -> Self {
        Self {
            transport,
            ledger,
            header: [0; HEADER_SIZE],
            read: 0,
            given: 0,
            body: 0,
            said: Said::default(),
        }
    }

    /// Judges a header that is whole.
    fn check(&mut self) -> io::Result<()> {
        let [_, kind, f0, f1, s0, s1, s2, s3, l0, l1, l2, l3] = self.header;
        let flags = u16::from_be_bytes([f0, f1]);
        let stream = u32::from_be_bytes([s0, s1, s2, s3]);
        let length = u32::from_be_bytes([l0, l1, l2, l3]);
        if !matches!(kind, DATA | WINDOW_UPDATE) {
            return Ok(());
        }
        let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        if flags & SYN != 0 {
            return Err(broken(format!("the guest opened the stream {stream}: only the host opens streams")));
        }
        if stream % 2 == 0 || stream > ledger.last {
            return Err(broken(format!("the guest spoke on the stream {stream}, which was never opened")));
        }
        if kind == DATA {
            let (cut, open) = ledger.received(stream, length);
            drop(ledger);
            if let Some(cut) = cut {
                take_away(&cut);
            }
            if !open {
                self.header[4..8].copy_from_slice(&NO_STREAM.to_be_bytes());
            }
            self.body = length as usize;
        }
        Ok(())
    }
}

/// Takes a stream away from its holder, with all that was not read of it. yamux keeps a stream that was dropped for as long
/// as a reset cannot be sent, which a guest that reads nothing can draw out.
fn take_away(stream: &Shared) {
    let Some(mut taken) = stream.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
    let mut context = Context::from_waker(Waker::noop());
    let mut away = [0; 16 << 10];
    loop {
        let mut read = ReadBuf::new(&mut away);
        match Pin::new(&mut taken).poll_read(&mut context, &mut read) {
            Poll::Ready(Ok(())) if !read.filled().is_empty() => {}
            _ => return,
        }
    }
}

fn broken(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

impl<T: AsyncRead + Unpin> AsyncRead for Guard<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if out.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        if this.given == HEADER_SIZE && this.body == 0 {
            (this.read, this.given) = (0, 0);
        }
        while this.read < HEADER_SIZE {
            let mut header = ReadBuf::new(&mut this.header[this.read..]);
            ready!(Pin::new(&mut this.transport).poll_read(cx, &mut header))?;
            match header.filled().len() {
                // yamux takes a cut inside of a header for what it is only when it was given the beginning.
                0 if this.read == 0 => return Poll::Ready(Ok(())),
                0 => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                count => this.read += count,
            }
            if this.read == HEADER_SIZE {
                this.check()?;
            }
        }
        if this.given < HEADER_SIZE {
            let count = out.remaining().min(HEADER_SIZE - this.given);
            out.put_slice(&this.header[this.given..this.given + count]);
            this.given += count;
            return Poll::Ready(Ok(()));
        }
        let room = out.remaining().min(this.body);
        let mut body = ReadBuf::new(out.initialize_unfilled_to(room));
        ready!(Pin::new(&mut this.transport).poll_read(cx, &mut body))?;
        let count = body.filled().len();
        this.body -= count;
        out.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Guard<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.said.is_go_away(bytes) {
            return Poll::Ready(Err(broken("the guest broke the rules of yamux".to_owned())));
        }
        let count = ready!(Pin::new(&mut self.transport).poll_write(cx, bytes))?;
        self.said.add(&bytes[..count]);
        Poll::Ready(Ok(count))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.transport).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.transport).poll_shutdown(cx)
    }
}
