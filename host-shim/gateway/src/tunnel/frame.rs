//! yamux's frames: twelve bytes, and behind a data frame's its body.
//!
//! ```text
//!  0         1      2        4            8           12
//!  │ version │ kind │ flags  │ stream id  │ length    │ body of `length` bytes, of a data frame alone
//!      0       0 data          big-endian   window update: the credit; ping: its value; go away: why
//!              1 window update
//!              2 ping          flags: 1 SYN, 2 ACK, 4 FIN, 8 RST
//!              3 go away
//! ```
//!
//! Source: github.com/hashicorp/yamux, spec.md.

use bytes::{BufMut, Bytes, BytesMut};

use super::session::Violation;

/// Bytes of a frame without its body.
pub const HEADER_SIZE: usize = 12;

/// The only version that there is.
const VERSION: u8 = 0;

/// Opens a stream.
pub const SYN: u16 = 1;
/// Accepts a stream; answers a ping.
pub const ACK: u16 = 2;
/// The sender has no more to send on the stream.
pub const FIN: u16 = 4;
/// Ends the stream at once, both ways.
pub const RST: u16 = 8;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Bytes of a stream.
    Data = 0,
    /// More credit for a stream.
    WindowUpdate = 1,
    /// Is the other end there?
    Ping = 2,
    /// The sender is about to leave.
    GoAway = 3,
}

/// A frame without its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it is.
    pub kind: Kind,
    /// [`SYN`], [`ACK`], [`FIN`], [`RST`].
    pub flags: u16,
    /// The stream, 0 for the whole session.
    pub stream: u32,
    /// The body's length, or what the kind makes of it.
    pub length: u32,
}

impl Header {
    /// A window update: credit, or a flag alone.
    pub fn window_update(stream: u32, flags: u16, credit: u32) -> Self {
        Self { kind: Kind::WindowUpdate, flags, stream, length: credit }
    }

    /// As it is sent.
    pub fn encode(self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[0] = VERSION;
        bytes[1] = self.kind as u8;
        bytes[2..4].copy_from_slice(&self.flags.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.stream.to_be_bytes());
        bytes[8..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// Reads a header.
    pub fn decode(bytes: [u8; HEADER_SIZE]) -> Result<Self, Violation> {
        let [version, kind, f0, f1, s0, s1, s2, s3, l0, l1, l2, l3] = bytes;
        if version != VERSION {
            return Err(Violation::Version { version });
        }
        let kind = match kind {
            0 => Kind::Data,
            1 => Kind::WindowUpdate,
            2 => Kind::Ping,
            3 => Kind::GoAway,
            kind => return Err(Violation::Kind { kind }),
        };
        let flags = u16::from_be_bytes([f0, f1]);
        if flags & !(SYN | ACK | FIN | RST) != 0 {
            return Err(Violation::Flags { flags });
        }
        let stream = u32::from_be_bytes([s0, s1, s2, s3]);
        Ok(Self { kind, flags, stream, length: u32::from_be_bytes([l0, l1, l2, l3]) })
    }
}

/// A data frame, whole. The body must be shorter than 4 GiB: ours are cut to [`super::relay::CHUNK`].
pub(super) fn data(stream: u32, flags: u16, body: &[u8]) -> Bytes {
    let header = Header { kind: Kind::Data, flags, stream, length: body.len() as u32 };
    let mut frame = BytesMut::with_capacity(HEADER_SIZE + body.len());
    frame.put_slice(&header.encode());
    frame.put_slice(body);
    frame.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_what_the_page_shows() {
        let header = Header { kind: Kind::Data, flags: SYN | FIN, stream: 0x0102_0304, length: 5 };
        assert_eq!(header.encode(), [0, 0, 0, 5, 1, 2, 3, 4, 0, 0, 0, 5]);
        assert_eq!(Header::decode(header.encode()), Ok(header));
        assert_eq!(&data(7, FIN, b"end")[..], b"\0\0\0\x04\0\0\0\x07\0\0\0\x03end");
        let mut bytes = header.encode();
        bytes[1] = 4;
        assert_eq!(Header::decode(bytes), Err(Violation::Kind { kind: 4 }));
        bytes[0] = 1;
        assert_eq!(Header::decode(bytes), Err(Violation::Version { version: 1 }));
        let reserved = Header { flags: 16, ..header };
        assert_eq!(Header::decode(reserved.encode()), Err(Violation::Flags { flags: 16 }));
    }
}
