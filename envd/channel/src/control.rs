//! Control messages over any byte stream, in the [`Framing`] that fits it.

use std::io;
use std::marker::PhantomData;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::{line, record};

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
        Self { stream, decoder, buffer, message: PhantomData }
    }

    /// The next message; `None` when the stream ended. What is whole but no message of this type is an error of the
    /// kind `InvalidData`.
    ///
    /// Cancel safe: what was read stays for the next call.
    pub async fn receive(&mut self) -> io::Result<Option<(u64, M)>> {
        loop {
            if let Some(message) = self.decoder.message()? {
                return Ok(Some(message));
            }
            let count = self.stream.read(&mut self.buffer).await?;
            if count == 0 {
                return Ok(None);
            }
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
}
