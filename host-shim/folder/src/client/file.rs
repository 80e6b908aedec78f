//! Files in and out of the sandbox, streamed.

use std::io;

use bytes::Bytes;
use futures::TryStreamExt;
use http::{Method, header};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio_util::io::ReaderStream;

use super::{ClientError, SandboxClient, empty, invalid, refusal};

impl SandboxClient {
    /// Writes a file, with its parents, from a stream.
    pub async fn upload(
        &self,
        path: &str,
        contents: impl AsyncRead + Send + 'static,
    ) -> Result<(), ClientError> {
        let frames = ReaderStream::new(contents).map_ok(Frame::data);
        let request = self
            .request(Method::POST, &target(path.as_bytes()))
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .body(BodyExt::boxed_unsync(StreamBody::new(frames)))
            .map_err(invalid)?;
        let response = self.send(request).await?;
        if response.status().is_success() {
            // Read to its end: the file is whole only when the sandbox has said so.
            return super::collect(response).await.map(drop);
        }
        Err(refusal(response).await)
    }

    /// Writes a file, with its parents.
    pub async fn write_file(&self, path: &str, contents: impl Into<Bytes>) -> Result<(), ClientError> {
        self.upload(path, io::Cursor::new(contents.into())).await
    }

    /// Reads a file into `out`; returns its length.
    pub async fn download(
        &self,
        path: &str,
        out: &mut (impl AsyncWrite + Unpin),
    ) -> Result<u64, ClientError> {
        let request = self.request(Method::GET, &target(path.as_bytes())).body(empty()).map_err(invalid)?;
        let response = self.send(request).await?;
        if !response.status().is_success() {
            return Err(refusal(response).await);
        }
        let mut body = response.into_body();
        let mut length = 0;
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame?.into_data() {
                length += data.len() as u64;
                out.write_all(&data).await?;
            }
        }
        out.flush().await?;
        Ok(length)
    }

    /// Reads a file into memory.
    pub async fn read_file(&self, path: &str) -> Result<Vec<u8>, ClientError> {
        let mut contents = Vec::new();
        self.download(path, &mut contents).await?;
        Ok(contents)
    }
}

pub(super) fn target(path: &[u8]) -> String {
    let mut target = String::from("/files?path=");
    for &byte in path {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'-' | b'_' | b'~' => {
                target.push(byte.into())
            }
            _ => target.push_str(&format!("%{byte:02X}")),
        }
    }
    target
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_path_is_one_query_value() {
        assert_eq!(target("/tmp/a b&c=é?#%".as_bytes()), "/files?path=/tmp/a%20b%26c%3D%C3%A9%3F%23%25");
    }
}
