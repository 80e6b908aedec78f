//! Control records and the mux's preamble: garbage is skipped however it is cut, what is found is bounded, and a message
//! behind any garbage is found.
//!
//! Input: one byte for the size of the pieces, one for the generation, then the stream.
#![no_main]

use envd_channel::preamble::{self, PREAMBLE_SIZE, Scanner};
use envd_channel::record::{Decoder, Encoder, Message, RECORD_SIZE};
use envd_proto::control::{FromAgent, FromHost};
use envd_proto::limits::MAX_CONTROL_MESSAGE;
use libfuzzer_sys::fuzz_target;
use prost::Message as _;

fuzz_target!(|input: &[u8]| {
    let [step, generation, stream @ ..] = input else { return };
    let (step, generation) = (usize::from(*step) * 8 + 1, u64::from(*generation));

    let found = messages(stream, step);
    assert_eq!(found, messages(stream, stream.len().max(1)));
    for message in &found {
        // A last record's padding may be used: a whole number of records bounds it.
        assert!(message.payload.len() <= MAX_CONTROL_MESSAGE + RECORD_SIZE);
        // Whatever it says, reading it does not panic.
        let _ = FromHost::decode(&message.payload[..]);
        let _ = FromAgent::decode(&message.payload[..]);
    }

    // The stream as garbage, and as a payload.
    let records = Encoder::default().encode(generation, stream).unwrap_or_default();
    let after = [stream, &records[..]].concat();
    let behind = messages(&after, step);
    let sent = Message { generation, payload: stream.to_vec() };
    // Garbage that ends like the begin of a record can swallow the one behind it only if it is one itself.
    assert!(records.is_empty() || behind.last() == Some(&sent) || behind.len() >= found.len());
    assert_eq!(messages(&records, step), if records.is_empty() { vec![] } else { vec![sent] });

    let wanted = preamble::encode(generation);
    let expected = stream.windows(PREAMBLE_SIZE).position(|window| window == wanted);
    let mut scanner = Scanner::new(generation);
    let end = stream.iter().position(|&byte| scanner.push(byte));
    assert_eq!(end.map(|end| end + 1 - PREAMBLE_SIZE), expected);
    if let Some(start) = expected {
        assert_eq!(scanner.discarded(), start as u64);
    }
});

fn messages(stream: &[u8], step: usize) -> Vec<Message> {
    let mut decoder = Decoder::default();
    let mut found = Vec::new();
    for piece in stream.chunks(step) {
        decoder.push(piece);
        found.extend(std::iter::from_fn(|| decoder.message()));
    }
    assert!(decoder.skipped() <= stream.len() as u64);
    found
}
