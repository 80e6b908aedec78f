//! Control messages over any byte stream, in the [`Framing`] that fits it.

use std::io;
use std::marker::PhantomData;

use envd_proto::limits::MAX_CONTROL_LINE;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::{line, record};

/// Bytes that may come without a whole message among them: what a host that is gone has left on a serial port, and the
/// longest message. More is from somebody who has nothing to say.
const MAX_MEANINGLESS: usize = 2 * MAX_CONTROL_LINE;

/// How messages are told apart on a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// Protobuf in [records](crate::record): for a serial port, which can lose its host in the middle of one.
    Records,
    /// JSON in [lines](mod@crate::line): for vsock and Unix sockets.
    Lines,
}

/// Reads messages of one type, each with the generation that its sender was in.
#[derive(Debug)]
pub struct ControlReader<R, M> {
    stream: R,
    decoder: Decoder,
    buffer: Box<[u8]>,
    /// Bytes since the last message.
    meaningless: usize,
    message: PhantomData<fn() -> M>,
}

#[derive(Debug)]
enum Decoder {
    Records(record::Decoder),
    Lines(line::Decoder),
}

impl<R, M> ControlReader<R, M>
where
    R: AsyncRead + Unpin,
    M: prost::Message + DeserializeOwned + Default,
{
    /// Reads from `stream`.
    pub fn new(stream: R, framing: Framing) -> Self {
        let buffer = vec![0; 4 * record::RECORD_SIZE].into_boxed_slice();
        let decoder = match framing {
            Framing::Records => Decoder::Records(record::Decoder::default()),
            Framing::Lines => Decoder::Lines(line::Decoder::default()),
        };
        Self { stream, decoder, buffer, meaningless: 0, message: PhantomData }
    }

    /// The next message; `None` when the stream ended. What is whole but no message of this type is an error of the
    /// kind `InvalidData`, and so is garbage that does not end.
    ///
    /// Cancel safe: what was read stays for the next call.
    pub async fn receive(&mut self) -> io::Result<Option<(u64, M)>> {
        loop {
            if let Some(message) = self.decoder.message()? {
                self.meaningless = 0;
                return Ok(Some(message));
            }
            if self.meaningless > MAX_MEANINGLESS {
                return Err(invalid(format!("more than {MAX_MEANINGLESS} bytes without a control message")));
            }
            let count = self.stream.read(&mut self.buffer).await?;
            if count == 0 {
                return Ok(None);
            }
            self.meaningless += count;
            self.decoder.push(&self.buffer[..count]);
        }
    }
}

impl Decoder {
    fn push(&mut self, bytes: &[u8]) {
        match self {
            Self::Records(records) => records.push(bytes),
            Self::Lines(lines) => lines.push(bytes),
        }
    }

    fn message<M: prost::Message + DeserializeOwned + Default>(&mut self) -> io::Result<Option<(u64, M)>> {
        match self {
            Self::Records(records) => {
                let Some(message) = records.message() else { return Ok(None) };
                let decoded = M::decode(&message.payload[..]).map_err(invalid)?;
                Ok(Some((message.generation, decoded)))
            }
            Self::Lines(lines) => match lines.line().map_err(invalid)? {
                Some(line) => line::decode(&line).map(Some).map_err(invalid),
                None => Ok(None),
            },
        }
    }
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Writes messages of one type.
#[derive(Debug)]
pub struct ControlWriter<W, M> {
    stream: W,
    encoder: Encoder,
    message: PhantomData<fn(M)>,
}

#[derive(Debug)]
enum Encoder {
    Records(record::Encoder),
    Lines,
}

impl<W: AsyncWrite + Unpin, M: prost::Message + Serialize> ControlWriter<W, M> {
    /// Writes to `stream`.
    pub fn new(stream: W, framing: Framing) -> Self {
        let encoder = match framing {
            Framing::Records => Encoder::Records(record::Encoder::default()),
            Framing::Lines => Encoder::Lines,
        };
        Self { stream, encoder, message: PhantomData }
    }

    /// Sends one message of this generation.
    pub async fn send(&mut self, generation: u64, message: &M) -> io::Result<()> {
        let bytes = match &mut self.encoder {
            Encoder::Records(records) => records
                .encode(generation, &message.encode_to_vec())
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?,
            Encoder::Lines => line::encode(generation, message)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?,
        };
        self.stream.write_all(&bytes).await?;
        self.stream.flush().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use envd_proto::control::{Configure, FromHost, from_host::Request};

    #[tokio::test]
    async fn a_long_configure_arrives_in_both_framings() {
        for (framing, before) in
            [(Framing::Records, &b"what the last host left\x89TFN"[..]), (Framing::Lines, &b"\r\n\n"[..])]
        {
            let (mut near, far) = tokio::io::duplex(777);
            let configure = Configure {
                env: (0..200).map(|n| (format!("NAME_{n}"), "x".repeat(100))).collect(),
                ..Configure::default()
            };
            let message = FromHost { id: 7, request: Some(Request::Configure(configure)) };
            let sent = message.clone();
            let writing = tokio::spawn(async move {
                near.write_all(before).await.unwrap();
                ControlWriter::new(near, framing).send(4, &sent).await.unwrap();
            });
            let mut reader = ControlReader::<_, FromHost>::new(far, framing);
            assert_eq!(reader.receive().await.unwrap(), Some((4, message)));
            assert_eq!(reader.receive().await.unwrap(), None);
            writing.await.unwrap();
        }
    }

    #[tokio::test]
    async fn records_on_a_stream_of_lines_are_refused() {
        let (mut near, far) = tokio::io::duplex(8192);
        near.write_all(&record::Encoder::default().encode(1, b"\x08\x07\n").unwrap()).await.unwrap();
        drop(near);
        let error = ControlReader::<_, FromHost>::new(far, Framing::Lines).receive().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[tokio::test]
    async fn what_never_becomes_a_message_is_given_up() {
        let mut encoder = record::Encoder::default();
        let long = encoder.encode(1, &[7; 2 * record::RECORD_PAYLOAD]).unwrap();
        let never_whole = &long[..record::RECORD_SIZE];
        for (framing, garbage) in [
            (Framing::Records, &[0x89; 1024][..]),
            (Framing::Records, &b"\x89TFNCTL\n".repeat(128)),
            (Framing::Records, never_whole),
            (Framing::Lines, &[b'\n'; 1024]),
        ] {
            let (mut near, far) = tokio::io::duplex(4096);
            let garbage = garbage.to_vec();
            let flood = tokio::spawn(async move { while near.write_all(&garbage).await.is_ok() {} });
            let mut reader = ControlReader::<_, FromHost>::new(far, framing);
            let error = reader.receive().await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            drop(reader);
            flood.await.unwrap();
        }
    }
}
