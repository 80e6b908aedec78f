//! Control messages over any byte stream: protobuf in [records](crate::record).

use std::io;
use std::marker::PhantomData;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::record::{Decoder, Encoder};

/// Reads messages of one type, each with the generation that its sender was in.
#[derive(Debug)]
pub struct ControlReader<R, M> {
    stream: R,
    decoder: Decoder,
    buffer: Box<[u8]>,
    message: PhantomData<fn() -> M>,
}

impl<R: AsyncRead + Unpin, M: prost::Message + Default> ControlReader<R, M> {
    /// Reads from `stream`.
    pub fn new(stream: R) -> Self {
        let buffer = vec![0; 4 * crate::record::RECORD_SIZE].into_boxed_slice();
        Self { stream, decoder: Decoder::default(), buffer, message: PhantomData }
    }

    /// The next message; `None` when the stream ended. A message that is whole but not of this type is an error.
    ///
    /// Cancel safe: what was read stays for the next call.
    pub async fn receive(&mut self) -> io::Result<Option<(u64, M)>> {
        loop {
            if let Some(message) = self.decoder.message() {
                let decoded = M::decode(&message.payload[..])
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                return Ok(Some((message.generation, decoded)));
            }
            let count = self.stream.read(&mut self.buffer).await?;
            if count == 0 {
                return Ok(None);
            }
            self.decoder.push(&self.buffer[..count]);
        }
    }
}

/// Writes messages of one type.
#[derive(Debug)]
pub struct ControlWriter<W, M> {
    stream: W,
    encoder: Encoder,
    message: PhantomData<fn(M)>,
}

impl<W: AsyncWrite + Unpin, M: prost::Message> ControlWriter<W, M> {
    /// Writes to `stream`.
    pub fn new(stream: W) -> Self {
        Self { stream, encoder: Encoder::default(), message: PhantomData }
    }

    /// Sends one message of this generation.
    pub async fn send(&mut self, generation: u64, message: &M) -> io::Result<()> {
        let records = self
            .encoder
            .encode(generation, &message.encode_to_vec())
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        self.stream.write_all(&records).await?;
        self.stream.flush().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use envd_proto::control::{Configure, FromHost, from_host::Request};

    #[tokio::test]
    async fn a_long_configure_arrives_behind_garbage() {
        let (mut near, far) = tokio::io::duplex(777);
        let configure = Configure {
            env: (0..200).map(|n| (format!("NAME_{n}"), "x".repeat(100))).collect(),
            ..Configure::default()
        };
        let message = FromHost { id: 7, request: Some(Request::Configure(configure)) };
        let sent = message.clone();
        let writing = tokio::spawn(async move {
            near.write_all(b"what the last host left\x89TFN").await.unwrap();
            ControlWriter::new(near).send(4, &sent).await.unwrap();
        });
        let mut reader = ControlReader::<_, FromHost>::new(far);
        assert_eq!(reader.receive().await.unwrap(), Some((4, message)));
        assert_eq!(reader.receive().await.unwrap(), None);
        writing.await.unwrap();
    }
}
