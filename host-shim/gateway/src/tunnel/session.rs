//! The gateway's end of a yamux session, without any I/O: which streams there are, and how much may come on each.
//!
//! ```text
//!   bytes, cut anywhere ──► header ──► body ──► Streams: open, data, end, reset, credit, send
//!                             │ checked: version, kind, flags, whose id, the window, the credit
//!                             └─ Violation: the session is over
//! ```
//!
//! Of its own, because what the crate `yamux` does with a hostile peer does not fit a door to the network: it keeps each
//! data frame in an allocation of its own, so one stream's window of single bytes costs some 16 MiB; it answers a
//! violation and goes on; one stream too many ends the session; and a stream that was reset reads like one that has
//! ended, so that half of an upload looks like a whole one. That crate is the other side in the tests.
//!
//! Only the client opens streams: its ids are odd, and an even one is a mistake. Frames for streams that are not there
//! any more are dropped: they were under way when the stream ended.

use std::collections::HashMap;

use super::frame::{ACK, FIN, HEADER_SIZE, Header, Kind, RST, SYN};

/// What may come on a stream before credit for more is given: yamux's own number, which both sides begin with.
pub const WINDOW: u32 = 256 << 10;

/// Credit is given back once this much was taken; each costs a frame.
const CREDIT_STEP: u32 = WINDOW / 2;

/// Streams at once in one session: twice what a client is told to keep to, since a stream that is through for the client may
/// still count here. The channel into a sandbox carries 256.
pub const MAX_STREAMS: usize = 128;

/// What a client must not send. The session cannot go on: nobody knows any longer what the bytes mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// No version of yamux.
    #[error("yamux version {version}, expected 0")]
    Version {
        /// What it was.
        version: u8,
    },
    /// No kind of frame.
    #[error("a frame of kind {kind}, expected 0 to 3")]
    Kind {
        /// What it was.
        kind: u8,
    },
    /// Flags that are not defined.
    #[error("a frame with the flags {flags:#06x}, only 0x000f are defined")]
    Flags {
        /// What they were.
        flags: u16,
    },
    /// The id is not one of the client's.
    #[error("stream {stream}: a client's streams have odd ids")]
    Id {
        /// What it was.
        stream: u32,
    },
    /// The id is in use.
    #[error("stream {stream} is opened twice")]
    Twice {
        /// What it was.
        stream: u32,
    },
    /// More than the window allows.
    #[error("stream {stream}: a frame of {length} bytes, {window} are left of the window")]
    Window {
        /// The stream.
        stream: u32,
        /// The frame's length.
        length: u32,
        /// What would have been allowed.
        window: u32,
    },
    /// Data behind the stream's end.
    #[error("stream {stream}: data after its end")]
    Ended {
        /// The stream.
        stream: u32,
    },
    /// More credit than can be counted.
    #[error("stream {stream}: more than 4 GiB of credit")]
    Credit {
        /// The stream.
        stream: u32,
    },
}

/// Where a session's streams go.
pub trait Streams {
    /// A stream was opened.
    fn open(&mut self, stream: u32);
    /// Bytes came; together never more than [`WINDOW`] beyond what was given to [`Session::taken`].
    fn data(&mut self, stream: u32, bytes: &[u8]);
    /// The client sends no more on it.
    fn end(&mut self, stream: u32);
    /// It is gone: nothing comes, and nothing is to be sent.
    fn reset(&mut self, stream: u32);
    /// The client takes that much more. False: more than can be counted.
    fn credit(&mut self, stream: u32, bytes: u32) -> bool;
    /// A frame is to be sent.
    fn send(&mut self, header: Header);
}

/// A session.
#[derive(Debug, Default)]
pub struct Session {
    header: [u8; HEADER_SIZE],
    /// How much of `header` is there.
    filled: usize,
    body: Option<Body>,
    streams: HashMap<u32, Stream>,
    leaving: bool,
}

/// The rest of a data frame's body.
#[derive(Debug)]
struct Body {
    stream: u32,
    left: u32,
    ends: bool,
}

#[derive(Debug)]
struct Stream {
    /// What may still come.
    window: u32,
    /// What was taken since credit was given.
    taken: u32,
    /// The client sends no more.
    ended: bool,
}

impl Session {
    /// Takes bytes as they come. After a violation nothing more makes sense.
    pub fn receive(&mut self, mut bytes: &[u8], to: &mut impl Streams) -> Result<(), Violation> {
        while !bytes.is_empty() {
            if let Some(body) = &mut self.body {
                let count = bytes.len().min(body.left as usize);
                let (now, later) = bytes.split_at(count);
                bytes = later;
                // No more than `left`, a u32.
                body.left -= count as u32;
                let (stream, ended) = (body.stream, body.left == 0 && body.ends);
                if body.left == 0 {
                    self.body = None;
                }
                if self.streams.contains_key(&stream) {
                    to.data(stream, now);
                    if ended {
                        self.end(stream, to);
                    }
                }
                continue;
            }
            let count = bytes.len().min(HEADER_SIZE - self.filled);
            let (now, later) = bytes.split_at(count);
            bytes = later;
            self.header[self.filled..self.filled + count].copy_from_slice(now);
            self.filled += count;
            if self.filled == HEADER_SIZE {
                self.filled = 0;
                self.frame(Header::decode(self.header)?, to)?;
            }
        }
        Ok(())
    }

    /// Bytes of a stream were taken; gives their credit back when it is worth a frame.
    pub fn taken(&mut self, stream: u32, bytes: u32, to: &mut impl Streams) {
        let Some(known) = self.streams.get_mut(&stream) else { return };
        known.taken = known.taken.saturating_add(bytes);
        if known.taken >= CREDIT_STEP && !known.ended {
            let credit = std::mem::take(&mut known.taken);
            known.window = known.window.saturating_add(credit);
            to.send(Header::window_update(stream, 0, credit));
        }
    }

    /// A stream is through: nothing more of it is to be sent or to be taken. Its place is free again.
    pub fn release(&mut self, stream: u32) {
        self.streams.remove(&stream);
    }

    /// Streams that have a place.
    pub fn open_streams(&self) -> usize {
        self.streams.len()
    }

    /// Whether the client has said that it opens no more, and all streams are through.
    pub fn is_over(&self) -> bool {
        self.leaving && self.streams.is_empty()
    }

    fn frame(&mut self, header: Header, to: &mut impl Streams) -> Result<(), Violation> {
        match header.kind {
            Kind::Data | Kind::WindowUpdate => self.stream_frame(header, to),
            // We ask by the WebSocket's own pings, so an answer is to nothing.
            Kind::Ping if header.flags & ACK != 0 => Ok(()),
            Kind::Ping => {
                to.send(Header { flags: ACK, stream: 0, ..header });
                Ok(())
            }
            Kind::GoAway => {
                self.leaving = true;
                Ok(())
            }
        }
    }

    fn stream_frame(&mut self, header: Header, to: &mut impl Streams) -> Result<(), Violation> {
        let Header { kind, flags, stream, length } = header;
        if stream % 2 == 0 {
            return Err(Violation::Id { stream });
        }
        if flags & SYN != 0 && flags & RST == 0 {
            self.open(stream, to)?;
        }
        let ends = flags & FIN != 0;
        let known = self.streams.get_mut(&stream);
        if kind == Kind::Data {
            if let Some(known) = known {
                if known.ended && length > 0 {
                    return Err(Violation::Ended { stream });
                }
                let window = known.window;
                known.window =
                    window.checked_sub(length).ok_or(Violation::Window { stream, length, window })?;
            } else if length > WINDOW {
                // Of a stream that is gone, or was refused: what was under way is dropped, and that is bounded too.
                return Err(Violation::Window { stream, length, window: WINDOW });
            }
            if length > 0 {
                self.body = Some(Body { stream, left: length, ends });
            }
        } else if known.is_some() && length > 0 && !to.credit(stream, length) {
            return Err(Violation::Credit { stream });
        }
        if flags & RST != 0 {
            if self.streams.remove(&stream).is_some() {
                to.reset(stream);
            }
        } else if ends && self.body.is_none() {
            self.end(stream, to);
        }
        Ok(())
    }

    fn open(&mut self, stream: u32, to: &mut impl Streams) -> Result<(), Violation> {
        if self.streams.contains_key(&stream) {
            return Err(Violation::Twice { stream });
        }
        if self.streams.len() >= MAX_STREAMS || self.leaving {
            to.send(Header::window_update(stream, RST, 0));
            return Ok(());
        }
        self.streams.insert(stream, Stream { window: WINDOW, taken: 0, ended: false });
        to.send(Header::window_update(stream, ACK, 0));
        to.open(stream);
        Ok(())
    }

    fn end(&mut self, stream: u32, to: &mut impl Streams) {
        let Some(known) = self.streams.get_mut(&stream) else { return };
        if !std::mem::replace(&mut known.ended, true) {
            to.end(stream);
        }
    }
}

#[cfg(test)]
mod tests;
