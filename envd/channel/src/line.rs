//! Control messages as lines of JSON, for streams that lose nothing: vsock and Unix sockets.
//!
//! ```text
//! {"generation":1,"hello":{"protocolVersion":1,"agentVersion":"0.1.0",...}}\n      agent
//! {"generation":1,"id":"7","configure":{"hostname":"lunchbox"}}\n                  host
//! {"generation":1,"response":{"id":"7"}}\n                                         agent
//! ```
//!
//! One object on each line: the message in protobuf's JSON mapping, with `generation` (a number) beside its fields.
//! Unknown fields are ignored, blank lines too. Any language with sockets and JSON speaks this in twenty lines, which
//! is why these streams do not carry [records](crate::record): there is nothing to find again on them.

use bytes::BytesMut;
use envd_proto::limits::MAX_CONTROL_LINE;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// What is wrong with a line.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The line is longer than [`MAX_CONTROL_LINE`].
    #[error("a control line of more than {MAX_CONTROL_LINE} bytes")]
    TooLong,
    /// The line is no message of this type.
    #[error(
        "a control line that is no message ({0}): expected {{\"generation\":N, ...}} in protobuf's JSON mapping"
    )]
    Invalid(#[from] serde_json::Error),
}

/// What stands beside the message's own fields.
#[derive(Deserialize)]
struct Beside {
    generation: Number,
}

/// Protobuf's JSON mapping has 64-bit numbers as strings, and takes both.
#[derive(Deserialize)]
#[serde(untagged)]
enum Number {
    Number(u64),
    Text(String),
}

/// The line of one message, with its end.
pub fn encode<M: Serialize>(generation: u64, message: &M) -> Result<Vec<u8>, Error> {
    let fields = serde_json::to_string(message)?;
    // A message is an object: what follows its opening brace follows the generation.
    let rest = fields.strip_prefix('{').unwrap_or("}");
    let comma = if rest == "}" { "" } else { "," };
    let line = format!("{{\"generation\":{generation}{comma}{rest}\n");
    if line.len() > MAX_CONTROL_LINE { Err(Error::TooLong) } else { Ok(line.into_bytes()) }
}

/// The generation and the message of a line, given without its end.
pub fn decode<M: DeserializeOwned>(line: &[u8]) -> Result<(u64, M), Error> {
    let Beside { generation } = serde_json::from_slice(line)?;
    let generation = match generation {
        Number::Number(generation) => generation,
        Number::Text(text) => text.parse().map_err(|_| {
            <serde_json::Error as serde::de::Error>::custom(format!("generation {text:?} is no number"))
        })?,
    };
    Ok((generation, serde_json::from_slice(line)?))
}

/// Finds lines in a stream that arrives in pieces.
#[derive(Debug, Default)]
pub struct Decoder {
    input: BytesMut,
    /// Bytes at the front that are known to have no end of line.
    searched: usize,
}

impl Decoder {
    /// Takes the bytes that arrived; call [`Decoder::line`] until it gives none.
    pub fn push(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
    }

    /// The next line that is not blank, without its end.
    pub fn line(&mut self) -> Result<Option<BytesMut>, Error> {
        loop {
            let Some(at) = self.input[self.searched..].iter().position(|&byte| byte == b'\n') else {
                self.searched = self.input.len();
                return if self.searched >= MAX_CONTROL_LINE { Err(Error::TooLong) } else { Ok(None) };
            };
            let line = self.input.split_to(self.searched + at + 1);
            self.searched = 0;
            if line.len() > MAX_CONTROL_LINE {
                return Err(Error::TooLong);
            }
            if !line.trim_ascii().is_empty() {
                return Ok(Some(line));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use envd_proto::control::{Configure, FromHost, Shutdown, from_host::Request};
    use proptest::prelude::*;

    fn decode_all(bytes: &[u8], step: usize) -> Result<Vec<(u64, FromHost)>, Error> {
        let mut decoder = Decoder::default();
        let mut found = Vec::new();
        for chunk in bytes.chunks(step) {
            decoder.push(chunk);
            while let Some(line) = decoder.line()? {
                found.push(decode(&line)?);
            }
        }
        Ok(found)
    }

    fn configure(env: Vec<(String, String)>) -> FromHost {
        let configure = Configure { env: env.into_iter().collect(), ..Configure::default() };
        FromHost { id: u64::MAX, request: Some(Request::Configure(configure)) }
    }

    #[test]
    fn a_line_is_what_the_page_shows() {
        let message = FromHost { id: 7, request: Some(Request::Shutdown(Shutdown { grace_ms: 5 })) };
        let line = String::from_utf8(encode(3, &message).unwrap()).unwrap();
        assert_eq!(line, "{\"generation\":3,\"id\":\"7\",\"shutdown\":{\"graceMs\":5}}\n");
        assert_eq!(encode(3, &FromHost::default()).unwrap(), b"{\"generation\":3}\n");
        // By hand: plain numbers, either spelling, a carriage return, what a newer version has.
        for by_hand in [
            "{\"id\":7,\"shutdown\":{\"grace_ms\":5},\"generation\":3}\r\n",
            "\n \r\n{\"later\":{\"x\":[1]},\"generation\":\"3\",\"id\":\"7\",\"shutdown\":{\"graceMs\":\"5\",\"why\":1}}\n",
        ] {
            assert_eq!(decode_all(by_hand.as_bytes(), 9).unwrap(), [(3, message.clone())], "{by_hand}");
        }
        let newer = decode_all(b"{\"generation\":1,\"id\":\"9\",\"notYet\":{}}\n", 64).unwrap();
        assert_eq!(newer, [(1, FromHost { id: 9, request: None })]);
    }

    #[test]
    fn what_is_no_message_is_an_error_and_says_what_is_missing() {
        for bad in [
            "x",
            "[]",
            "1",
            "{}",
            "{\"id\":1}",
            "{\"generation\":-1}",
            "{\"generation\":\"x\"}",
            "{\"generation\":1,\"generation\":1}",
            "{\"generation\":1,\"id\":1,\"id\":2}",
            "{\"generation\":1,\"shutdown\":{},\"configure\":{}}",
            "{\"generation\":1}{\"generation\":1}",
            "{\"generation\":1,\"id\":\u{0}}",
            "\u{0}",
        ] {
            let error = decode_all(format!("{bad}\n").as_bytes(), 64).unwrap_err().to_string();
            assert!(error.contains("expected {\"generation\":N"), "{bad}: {error}");
        }
        let deep = format!("{{\"generation\":1,\"x\":{}\n", "[".repeat(200_000));
        assert!(matches!(decode_all(deep.as_bytes(), 4096), Err(Error::Invalid(_))));
    }

    #[test]
    fn a_line_without_end_is_refused_at_the_limit() {
        let mut decoder = Decoder::default();
        let mut pushed = 0;
        let refused = loop {
            decoder.push(&[b' '; 4096]);
            pushed += 4096;
            if let Err(error) = decoder.line() {
                break error;
            }
        };
        assert!(matches!(refused, Error::TooLong));
        assert_eq!(pushed, MAX_CONTROL_LINE);
        let whole = [&[b' '; MAX_CONTROL_LINE][..], b"\n"].concat();
        assert!(matches!(decode_all(&whole, whole.len()), Err(Error::TooLong)));
        assert!(matches!(
            encode(1, &configure(vec![("A".into(), "\u{1}".repeat(200_000))])),
            Err(Error::TooLong)
        ));
    }

    proptest! {
        #[test]
        fn messages_survive_any_cut(
            envs in prop::collection::vec(prop::collection::vec((".*", ".*"), 0..4), 1..4),
            step in 1usize..300,
        ) {
            let sent: Vec<_> = envs.into_iter().map(configure).zip(0u64..).map(|(m, g)| (u64::MAX - g, m)).collect();
            let bytes: Vec<u8> = sent.iter().flat_map(|(g, m)| encode(*g, m).unwrap()).collect();
            prop_assert_eq!(decode_all(&bytes, step).unwrap(), sent);
        }

        #[test]
        fn hostile_bytes_never_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..600),
            text in "[\\PC\"{}\\[\\]:,0-9\n]{0,200}",
            step in 1usize..64,
        ) {
            let _ = decode_all(&bytes, step);
            let _ = decode_all(text.as_bytes(), step);
            let begun = format!("{{\"generation\":1,\"configure\":{text}}}\n");
            let _ = decode_all(begun.as_bytes(), step);
        }
    }
}
