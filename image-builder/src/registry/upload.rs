//! Bringing a blob to a registry: not at all where it is, else in one piece, gone on with where it broke off.

use std::path::Path;
use std::sync::Arc;

use oci::Descriptor;
use reqwest::header::{CONTENT_RANGE, CONTENT_TYPE, RANGE};
use reqwest::{Method, Response, StatusCode, Url};

use super::failure::Failure;
use super::payload::Payload;
use super::session::{Request, Session};

/// A blob up to this length goes with the request that ends its upload. More than one turn for so little is waste; more
/// than this is worth an upload that can be gone on with.
const AT_ONCE: u64 = 1 << 20;

/// How a blob came to be in the registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Upload {
    /// It was there.
    Existed,
    /// It was in another repository, and is in this one too now.
    Mounted,
    /// Its bytes went over the line.
    Sent,
}

/// A blob, and what is known of it.
pub(super) struct Local<'a> {
    pub(super) blob: &'a Descriptor,
    pub(super) contents: Contents<'a>,
    /// Another repository of the registry that may have it.
    pub(super) mount_from: Option<&'a str>,
    pub(super) progress: Arc<dyn Fn(u64) + Send + Sync>,
}

/// Where the bytes of a blob are.
pub(super) enum Contents<'a> {
    File(&'a Path),
    Bytes(Vec<u8>),
}

impl Local<'_> {
    fn payload(&self, offset: u64) -> Payload {
        match &self.contents {
            Contents::Bytes(bytes) => Payload::from(bytes[offset as usize..].to_vec()),
            Contents::File(path) => Payload::File {
                path: path.to_path_buf(),
                offset,
                length: self.blob.size() - offset,
                progress: self.progress.clone(),
            },
        }
    }
}

impl Session<'_> {
    /// Whether the registry has the blob.
    pub(super) async fn has_blob(&self, blob: &Descriptor) -> Result<bool, Failure> {
        let url = self.url(&format!("blobs/{}", blob.digest()))?;
        let request = Request::new(Method::HEAD, url, format!("blob {}", blob.digest()));
        match self.send(&request, &[StatusCode::OK]).await {
            Ok(_) => Ok(true),
            Err(Failure::Missing(_)) => Ok(false),
            Err(failure) => Err(failure),
        }
    }

    /// Brings the blob to the registry.
    pub(super) async fn push_blob(&self, local: &Local<'_>) -> Result<Upload, Failure> {
        if self.has_blob(local.blob).await? {
            (local.progress)(local.blob.size());
            return Ok(Upload::Existed);
        }
        let what = format!("blob {}", local.blob.digest());
        let mut attempt = 1;
        let mut mount = local.mount_from;
        loop {
            let failure = match self.try_push(&what, local, &mut mount).await {
                Ok(upload) => return Ok(upload),
                Err(failure) => failure,
            };
            self.pause(&failure, attempt).await.ok_or(failure)?;
            attempt += 1;
        }
    }

    async fn try_push(
        &self,
        what: &str,
        local: &Local<'_>,
        mount: &mut Option<&str>,
    ) -> Result<Upload, Failure> {
        let mut url = self.url("blobs/uploads/")?;
        if let Some(from) = mount.take() {
            url.query_pairs_mut()
                .append_pair("mount", local.blob.digest().as_ref())
                .append_pair("from", from);
        }
        let begin =
            Request::new(Method::POST, url.clone(), what.to_owned()).carrying(Payload::from(Vec::new()));
        let begun = self.send(&begin, &[StatusCode::ACCEPTED, StatusCode::CREATED]).await?;
        if begun.status() == StatusCode::CREATED {
            (local.progress)(local.blob.size());
            return Ok(Upload::Mounted);
        }
        let mut place = self.led_to(what, &url, begun.headers())?;
        let size = local.blob.size();
        if size > AT_ONCE {
            place = self.send_parts(what, local, place).await?;
        }
        place.query_pairs_mut().append_pair("digest", local.blob.digest().as_ref());
        let rest = if size > AT_ONCE { Payload::from(Vec::new()) } else { local.payload(0) };
        let end = Request::new(Method::PUT, place, what.to_owned())
            .with(CONTENT_TYPE, "application/octet-stream")
            .carrying(rest);
        // Once: an upload that was ended is not there to be ended again.
        self.attempt(&end, &[StatusCode::CREATED, StatusCode::NO_CONTENT]).await?;
        Ok(Upload::Sent)
    }

    /// Sends the blob to an upload, and gives the address that ends it. In one request where nothing breaks: registries
    /// that want parts of their own size are many. What a registry keeps of a broken one is not sent again.
    async fn send_parts(&self, what: &str, local: &Local<'_>, mut place: Url) -> Result<Url, Failure> {
        let size = local.blob.size();
        let (mut offset, mut attempt) = (0, 1);
        loop {
            let mut part = Request::new(Method::PATCH, place.clone(), what.to_owned())
                .with(CONTENT_TYPE, "application/octet-stream")
                .carrying(local.payload(offset));
            if offset > 0 {
                part = part.with(CONTENT_RANGE, &format!("{offset}-{}", size - 1));
            }
            let failure = match self.attempt(&part, &[StatusCode::ACCEPTED, StatusCode::NO_CONTENT]).await {
                Ok(answer) => return self.led_to(what, &place, answer.headers()),
                Err(failure) => failure,
            };
            self.pause(&failure, attempt).await.ok_or(failure)?;
            attempt += 1;
            let ask = Request::get(place.clone(), what.to_owned());
            let kept = self.send(&ask, &[StatusCode::NO_CONTENT]).await;
            let kept = match kept {
                Ok(kept) => kept,
                // The registry has thrown the upload away: the blob is begun anew.
                Err(Failure::Missing(reason) | Failure::Final(reason)) => {
                    return Err(Failure::transient(reason));
                }
                Err(failure) => return Err(failure),
            };
            offset = next_byte(&kept).filter(|offset| *offset < size).ok_or_else(|| {
                Failure::transient(format!("{what}: the registry does not say what it has of the upload"))
            })?;
            if kept.headers().contains_key(reqwest::header::LOCATION) {
                place = self.led_to(what, &place, kept.headers())?;
            }
        }
    }
}

/// The byte behind those that `Range: 0-9` says are there. An upload without any may say `0-0` (distribution), or nothing.
fn next_byte(kept: &Response) -> Option<u64> {
    let Some(range) = kept.headers().get(RANGE) else { return Some(0) };
    let range = range.to_str().ok()?;
    let (first, last) = range.strip_prefix("bytes=").unwrap_or(range).split_once('-')?;
    if first != "0" {
        return None;
    }
    match last.parse().ok()? {
        0 => Some(0),
        last => u64::checked_add(last, 1),
    }
}
