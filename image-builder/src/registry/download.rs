//! Fetching a blob, from where the last attempt ended.

use reqwest::header::{CONTENT_RANGE, RANGE};
use reqwest::{Response, StatusCode};

use super::failure::Failure;
use super::limits::MAX_BLOB;
use super::session::{Request, Session};
use super::text::with_causes;
use oci::Descriptor;

/// A transfer that brought so much before it broke off counts its attempts anew.
const PROGRESS: u64 = 1 << 20;

/// Where the bytes of a blob go, in their order.
pub(super) trait Sink: Send {
    /// Takes the next bytes.
    fn write(&mut self, bytes: &[u8]) -> Result<(), Failure>;
}

impl Session<'_> {
    /// Fetches as many bytes as the descriptor promises, no more and no fewer. Their digest is the sink's to check.
    pub(super) async fn fetch_blob(&self, blob: &Descriptor, sink: &mut dyn Sink) -> Result<(), Failure> {
        let what = format!("blob {}", blob.digest());
        if blob.size() > MAX_BLOB {
            return Err(Failure::Final(format!(
                "{what} has {} bytes, at most {MAX_BLOB} are fetched",
                blob.size()
            )));
        }
        let url = self.url(&format!("blobs/{}", blob.digest()))?;
        let (mut done, mut attempt, mut mark) = (0, 1, 0);
        loop {
            let mut request = Request::get(url.clone(), what.clone());
            if done > 0 {
                request = request.with(RANGE, &format!("bytes={done}-"));
            }
            let failure = match self.attempt(&request, &[StatusCode::OK, StatusCode::PARTIAL_CONTENT]).await {
                Ok(response) => match self.take(&what, blob.size(), response, &mut done, sink).await {
                    Ok(()) => return Ok(()),
                    Err(failure) => failure,
                },
                Err(failure) => failure,
            };
            if done - mark >= PROGRESS {
                (attempt, mark) = (1, done);
            }
            self.pause(&failure, attempt).await.ok_or(failure)?;
            attempt += 1;
        }
    }

    /// Takes what the answer has behind the first `done` bytes of the blob.
    async fn take(
        &self,
        what: &str,
        size: u64,
        mut response: Response,
        done: &mut u64,
        sink: &mut dyn Sink,
    ) -> Result<(), Failure> {
        let mut skip = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let range = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
                let first = range.and_then(first_byte);
                if first != Some(*done) {
                    return Err(Failure::Final(format!(
                        "{what}: asked for byte {done} and on, the answer is of {:?}",
                        range.unwrap_or("nothing that it names")
                    )));
                }
                0
            }
            // It does not do ranges: what we have comes again.
            _ => *done,
        };
        let expected = size - *done + skip;
        if let Some(length) = response.content_length().filter(|length| *length > expected) {
            return Err(Failure::Final(format!(
                "{what}: {size} bytes expected, the registry sends {length}"
            )));
        }
        let limits = self.limits();
        let (mut window, mut moved) = (tokio::time::Instant::now() + limits.window, 0);
        loop {
            // What says its length has ended there; of the rest it is seen that nothing follows.
            if *done == size && response.content_length().is_some() {
                return Ok(());
            }
            let stalled = || {
                Failure::transient(format!(
                    "{what}: less than {} bytes in {} s",
                    limits.least,
                    limits.window.as_secs_f32()
                ))
            };
            let chunk = match tokio::time::timeout_at(window, response.chunk()).await {
                Ok(Ok(Some(chunk))) => chunk,
                _ if *done == size => return Ok(()),
                Ok(Ok(None)) => {
                    return Err(Failure::transient(format!("{what}: it ended after {done} of {size} bytes")));
                }
                Ok(Err(error)) => {
                    return Err(Failure::transient(format!(
                        "{what}: it broke off after {done} of {size} bytes: {}",
                        with_causes(&error)
                    )));
                }
                Err(_) => return Err(stalled()),
            };
            moved += chunk.len() as u64;
            if moved >= limits.least {
                (window, moved) = (tokio::time::Instant::now() + limits.window, 0);
            }
            let known = skip.min(chunk.len() as u64);
            skip -= known;
            let new = &chunk[known as usize..];
            if new.len() as u64 > size - *done {
                return Err(Failure::Final(format!(
                    "{what}: {size} bytes expected, the registry sends more"
                )));
            }
            sink.write(new)?;
            *done += new.len() as u64;
        }
    }
}

/// The first byte that `Content-Range: bytes 5-9/10` names.
fn first_byte(range: &str) -> Option<u64> {
    range.strip_prefix("bytes ")?.split_once('-')?.0.parse().ok()
}
