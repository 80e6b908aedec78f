//! Control records: fixed size, checksummed, resynchronising.
//!
//! ```text
//! offset  size  field          (integers are big-endian)
//!      0     8  magic          "\x89TFNCTL\n"
//!      8     8  generation     which boot or restore the message belongs to
//!     16     4  message        number of the message, to keep the records of two messages apart
//!     20     2  index          of this record in the message
//!     22     2  count          of records in the message, at least 1
//!     24     2  length         of the payload used
//!     26   994  payload        zero beyond length
//!   1020     4  crc32c         of bytes 0 to 1019
//! ```

use bytes::{Buf, BytesMut};
use envd_proto::limits::MAX_CONTROL_MESSAGE;

/// The size of every record.
pub const RECORD_SIZE: usize = 1024;

const MAGIC: [u8; 8] = *b"\x89TFNCTL\n";
const HEADER_SIZE: usize = 26;
const CHECKSUM_AT: usize = RECORD_SIZE - 4;

/// The payload that one record carries at most.
pub const RECORD_PAYLOAD: usize = CHECKSUM_AT - HEADER_SIZE;

const _: () = assert!(RECORD_PAYLOAD == 994, "the record layout is part of the wire contract");
const _: () = assert!(MAX_CONTROL_MESSAGE.div_ceil(RECORD_PAYLOAD) <= u16::MAX as usize);

/// A message is longer than [`MAX_CONTROL_MESSAGE`].
#[derive(Debug, thiserror::Error)]
#[error("control message of {length} bytes, at most {MAX_CONTROL_MESSAGE} allowed")]
pub struct TooLong {
    /// The message's length in bytes.
    pub length: usize,
}

/// A whole message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// The generation that the sender was in.
    pub generation: u64,
    /// The encoded protobuf message.
    pub payload: Vec<u8>,
}

/// Cuts messages into records.
#[derive(Debug, Default)]
pub struct Encoder {
    next_message: u32,
}

impl Encoder {
    /// The records of one message, back to back.
    pub fn encode(&mut self, generation: u64, payload: &[u8]) -> Result<Vec<u8>, TooLong> {
        if payload.len() > MAX_CONTROL_MESSAGE {
            return Err(TooLong { length: payload.len() });
        }
        let message = self.next_message;
        self.next_message = message.wrapping_add(1);
        let count = payload.len().div_ceil(RECORD_PAYLOAD).max(1);
        let mut out = Vec::with_capacity(count * RECORD_SIZE);
        for index in 0..count {
            let chunk = &payload[index * RECORD_PAYLOAD..payload.len().min((index + 1) * RECORD_PAYLOAD)];
            let start = out.len();
            out.extend_from_slice(&MAGIC);
            out.extend_from_slice(&generation.to_be_bytes());
            out.extend_from_slice(&message.to_be_bytes());
            for field in [index, count, chunk.len()] {
                // Each is at most MAX_CONTROL_MESSAGE / RECORD_PAYLOAD or RECORD_PAYLOAD, both asserted to fit.
                out.extend_from_slice(&(field as u16).to_be_bytes());
            }
            out.extend_from_slice(chunk);
            out.resize(start + CHECKSUM_AT, 0);
            let checksum = crc32c::crc32c(&out[start..]);
            out.extend_from_slice(&checksum.to_be_bytes());
        }
        Ok(out)
    }
}

/// Finds records in a byte stream and joins them to messages.
///
/// Garbage between records is skipped, a record with a wrong checksum is dropped, and a message that misses a record
/// is dropped when another begins. Holds at most one message and one record.
#[derive(Debug, Default)]
pub struct Decoder {
    input: BytesMut,
    partial: Option<Partial>,
    skipped: u64,
}

#[derive(Debug)]
struct Partial {
    generation: u64,
    message: u32,
    count: u16,
    next: u16,
    payload: Vec<u8>,
}

impl Decoder {
    /// Bytes that were no part of a whole record.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Takes the bytes that arrived; call [`Decoder::message`] until it gives none.
    pub fn push(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
    }

    /// The next whole message.
    pub fn message(&mut self) -> Option<Message> {
        loop {
            self.skip_to_magic();
            if self.input.len() < RECORD_SIZE {
                return None;
            }
            let record = &self.input[..RECORD_SIZE];
            let stored = u32::from_be_bytes([record[1020], record[1021], record[1022], record[1023]]);
            if crc32c::crc32c(&record[..CHECKSUM_AT]) != stored {
                // Another record can begin inside this one: only its first byte is surely garbage.
                self.skip(1);
                continue;
            }
            let record = self.input.split_to(RECORD_SIZE);
            if let Some(message) = self.join(&record) {
                return Some(message);
            }
        }
    }

    fn join(&mut self, record: &[u8]) -> Option<Message> {
        let mut header = &record[MAGIC.len()..HEADER_SIZE];
        let generation = header.get_u64();
        let message = header.get_u32();
        let (index, count, length) = (header.get_u16(), header.get_u16(), usize::from(header.get_u16()));
        let fits = length <= RECORD_PAYLOAD
            && index < count
            && usize::from(count) <= MAX_CONTROL_MESSAGE.div_ceil(RECORD_PAYLOAD);
        if !fits {
            self.partial = None;
            return None;
        }
        if index == 0 {
            self.partial = Some(Partial { generation, message, count, next: 0, payload: Vec::new() });
        }
        let mut partial = self.partial.take()?;
        let continues = partial.generation == generation
            && partial.message == message
            && partial.count == count
            && partial.next == index;
        if !continues {
            return None;
        }
        partial.payload.extend_from_slice(&record[HEADER_SIZE..HEADER_SIZE + length]);
        partial.next += 1;
        if partial.next == count {
            return Some(Message { generation, payload: partial.payload });
        }
        self.partial = Some(partial);
        None
    }

    fn skip_to_magic(&mut self) {
        let at = (0..self.input.len())
            .find(|&start| {
                let window = &self.input[start..self.input.len().min(start + MAGIC.len())];
                MAGIC.starts_with(window)
            })
            .unwrap_or(self.input.len());
        self.skip(at);
    }

    fn skip(&mut self, count: usize) {
        self.skipped += count as u64;
        self.input.advance(count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decode(bytes: &[u8], step: usize) -> (Vec<Message>, u64) {
        let mut decoder = Decoder::default();
        let mut messages = Vec::new();
        for chunk in bytes.chunks(step) {
            decoder.push(chunk);
            messages.extend(std::iter::from_fn(|| decoder.message()));
        }
        (messages, decoder.skipped())
    }

    #[test]
    fn an_empty_message_is_one_record() {
        let bytes = Encoder::default().encode(1, b"").unwrap();
        assert_eq!(bytes.len(), RECORD_SIZE);
        assert_eq!(decode(&bytes, 7).0, vec![Message { generation: 1, payload: vec![] }]);
    }

    #[test]
    fn a_message_too_long_is_refused() {
        let payload = vec![0; MAX_CONTROL_MESSAGE + 1];
        assert_eq!(Encoder::default().encode(1, &payload).unwrap_err().length, payload.len());
    }

    #[test]
    fn a_message_that_lost_a_record_is_dropped_and_the_next_one_arrives() {
        let mut encoder = Encoder::default();
        let long = encoder.encode(1, &[7; 3 * RECORD_PAYLOAD]).unwrap();
        let next = encoder.encode(1, b"next").unwrap();
        let bytes = [&long[..RECORD_SIZE], &long[2 * RECORD_SIZE..], &next].concat();
        assert_eq!(decode(&bytes, 4096).0, vec![Message { generation: 1, payload: b"next".to_vec() }]);
    }

    proptest! {
        #[test]
        fn messages_survive_garbage_and_any_cut(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..3000), 1..5),
            garbage in prop::collection::vec(any::<u8>(), 0..2000),
            step in 1usize..2000,
        ) {
            let mut encoder = Encoder::default();
            let mut bytes = Vec::new();
            let mut expected = Vec::new();
            for payload in payloads {
                bytes.extend_from_slice(&garbage);
                bytes.extend(encoder.encode(3, &payload).unwrap());
                expected.push(Message { generation: 3, payload });
            }
            let (messages, skipped) = decode(&bytes, step);
            prop_assert_eq!(skipped, (garbage.len() * expected.len()) as u64);
            prop_assert_eq!(messages, expected);
        }

        #[test]
        fn a_flipped_bit_never_gives_another_message(flip in 0usize..RECORD_SIZE * 8) {
            let mut encoder = Encoder::default();
            let mut bytes = encoder.encode(1, b"first").unwrap();
            bytes[flip / 8] ^= 1 << (flip % 8);
            bytes.extend(encoder.encode(1, b"second").unwrap());
            prop_assert_eq!(decode(&bytes, 333).0, vec![Message { generation: 1, payload: b"second".to_vec() }]);
        }
    }
}
