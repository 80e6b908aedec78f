//! The envelopes of the Connect protocol's streams: a flag byte, a big-endian length, a message.
//!
//! Source: connectrpc.com/docs/protocol, "Streaming RPCs".

use bytes::{Buf, BufMut, Bytes, BytesMut};
use envd_proto::limits::MAX_CONNECT_MESSAGE;

/// The flag of the envelope that ends a stream.
pub const END_OF_STREAM: u8 = 0b10;

const COMPRESSED: u8 = 0b01;
/// What stands before the message.
pub const HEADER_SIZE: usize = 5;

/// What is wrong with an envelope.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The message is longer than [`MAX_CONNECT_MESSAGE`].
    #[error("message of {length} bytes in an envelope, at most {MAX_CONNECT_MESSAGE} allowed")]
    TooLong {
        /// The length that the envelope gave.
        length: usize,
    },
    /// The message is compressed, which was not negotiated.
    #[error("compressed envelope without a negotiated compression")]
    Compressed,
    /// The flag byte has bits that the protocol does not define.
    #[error("unknown envelope flags {flags:#04x}")]
    Flags {
        /// The flag byte.
        flags: u8,
    },
}

/// One envelope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// Whether it ends the stream.
    pub end: bool,
    /// The message, or the end's JSON.
    pub message: Bytes,
}

/// An envelope as bytes. The message must not be longer than [`MAX_CONNECT_MESSAGE`].
pub fn encode(flags: u8, message: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(HEADER_SIZE + message.len());
    out.put_u8(flags);
    // Our own messages are bounded by MAX_OUTPUT_CHUNK and the like, far below u32.
    out.put_u32(message.len() as u32);
    out.put_slice(message);
    out.freeze()
}

/// Makes an envelope of a message that was written behind [`HEADER_SIZE`] bytes of room, without a copy.
///
/// # Panics
///
/// When the room is not there.
pub fn seal(flags: u8, mut bytes: Vec<u8>) -> Bytes {
    // As in `encode`, far below u32.
    let length = (bytes.len() - HEADER_SIZE) as u32;
    bytes[0] = flags;
    bytes[1..HEADER_SIZE].copy_from_slice(&length.to_be_bytes());
    bytes.into()
}

/// Finds envelopes in a body that arrives in pieces.
#[derive(Debug, Default)]
pub struct Decoder {
    input: BytesMut,
}

impl Decoder {
    /// Takes the bytes that arrived; call [`Decoder::envelope`] until it gives none.
    pub fn push(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
    }

    /// Whether the input ended between two envelopes.
    pub fn is_empty(&self) -> bool {
        self.input.is_empty()
    }

    /// The next whole envelope.
    pub fn envelope(&mut self) -> Result<Option<Envelope>, Error> {
        let Some(header) = self.input.get(..HEADER_SIZE) else { return Ok(None) };
        let flags = header[0];
        let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
        if flags & COMPRESSED != 0 {
            return Err(Error::Compressed);
        }
        if flags & !END_OF_STREAM != 0 {
            return Err(Error::Flags { flags });
        }
        if length > MAX_CONNECT_MESSAGE {
            return Err(Error::TooLong { length });
        }
        if self.input.len() < HEADER_SIZE + length {
            return Ok(None);
        }
        self.input.advance(HEADER_SIZE);
        let message = self.input.split_to(length).freeze();
        Ok(Some(Envelope { end: flags & END_OF_STREAM != 0, message }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn envelopes_survive_any_cut(
            messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..6),
            step in 1usize..500,
        ) {
            let mut bytes = Vec::new();
            for message in &messages {
                bytes.extend_from_slice(&encode(0, message));
            }
            bytes.extend_from_slice(&encode(END_OF_STREAM, b"{}"));
            let sealed = messages.first().map(|message| seal(0, [&[7; HEADER_SIZE][..], message].concat()));
            prop_assert_eq!(sealed, messages.first().map(|message| encode(0, message)));
            let mut decoder = Decoder::default();
            let mut found = Vec::new();
            for chunk in bytes.chunks(step) {
                decoder.push(chunk);
                while let Some(envelope) = decoder.envelope().unwrap() {
                    found.push(envelope);
                }
            }
            prop_assert!(decoder.is_empty());
            let end = found.pop().unwrap();
            prop_assert!(end.end);
            prop_assert_eq!(found.into_iter().map(|e| e.message.to_vec()).collect::<Vec<_>>(), messages);
        }

        #[test]
        fn hostile_bytes_never_panic_or_allocate_ahead(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            while let Ok(Some(_)) = decoder.envelope() {}
        }
    }

    #[test]
    fn what_cannot_be_read_is_refused_at_its_header() {
        let refused = |bytes: &[u8]| {
            let mut decoder = Decoder::default();
            decoder.push(bytes);
            decoder.envelope().unwrap_err()
        };
        assert_eq!(refused(&[1, 0, 0, 0, 0]), Error::Compressed);
        assert_eq!(refused(&[8, 0, 0, 0, 0]), Error::Flags { flags: 8 });
        assert_eq!(refused(&[0, 0xff, 0, 0, 0]), Error::TooLong { length: 0xff00_0000 });
    }
}
