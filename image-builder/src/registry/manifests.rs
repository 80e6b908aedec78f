//! Manifests and indexes of a registry.

use oci::{Descriptor, Digest, Hasher, MediaType};
use reqwest::header::{ACCEPT, CONTENT_TYPE};
use reqwest::{Method, StatusCode};

use super::failure::Failure;
use super::limits::MAX_MANIFEST;
use super::payload::Payload;
use super::session::{Request, Session};
use super::text::printable;

/// What we can read, in the order of preference.
const ACCEPTED: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";
const DIGEST: &str = "docker-content-digest";

/// Which manifest is meant.
pub(super) enum Wanted<'a> {
    Tag(&'a str),
    Digest(&'a Digest),
    /// One that an index names: also its length is known.
    Named(&'a Descriptor),
}

impl Session<'_> {
    /// The manifest's bytes, which have the digest that was asked for or that the registry names, and its descriptor.
    pub(super) async fn manifest(&self, wanted: Wanted<'_>) -> Result<(Descriptor, Vec<u8>), Failure> {
        let (reference, expected, size) = match wanted {
            Wanted::Tag(tag) => (tag.to_owned(), None, None),
            Wanted::Digest(digest) => (digest.to_string(), Some(digest), None),
            Wanted::Named(named) => (named.digest().to_string(), Some(named.digest()), Some(named.size())),
        };
        let what = format!("manifest {reference}");
        let url = self.url(&format!("manifests/{reference}"))?;
        let request = Request::get(url, what.clone()).with(ACCEPT, ACCEPTED);
        let mut attempt = 1;
        let (bytes, promised) = loop {
            let response = self.send(&request, &[StatusCode::OK]).await?;
            let promised =
                response.headers().get(DIGEST).and_then(|value| value.to_str().ok()).map(str::to_owned);
            let failure = match self.http().body(&what, response, MAX_MANIFEST).await {
                Ok(bytes) => break (bytes, promised),
                Err(failure) => failure,
            };
            self.pause(&failure, attempt).await.ok_or(failure)?;
            attempt += 1;
        };
        let digest = Hasher::digest_of(&bytes);
        if let Some(expected) = expected.filter(|expected| **expected != digest) {
            return Err(Failure::Final(format!(
                "manifest {expected}: the registry sends one with the digest {digest}"
            )));
        }
        // Another algorithm's digest cannot be checked, and nothing depends on it.
        if let Some(promised) = promised.filter(|it| it.starts_with("sha256:") && it != digest.as_ref()) {
            let promised = printable(&promised);
            return Err(Failure::Final(format!("{what}: the registry says {promised} and sends {digest}")));
        }
        if let Some(size) = size.filter(|size| *size != bytes.len() as u64) {
            return Err(Failure::Final(format!(
                "{what}: it has {} bytes, its index says {size}",
                bytes.len()
            )));
        }
        let media_type =
            oci::media_type_of(&bytes).map_err(|error| Failure::Final(format!("{what}: {error}")))?;
        Ok((Descriptor::new(media_type, bytes.len() as u64, digest), bytes))
    }

    /// Puts a manifest under a tag or its digest.
    pub(super) async fn put_manifest(
        &self,
        reference: &str,
        media_type: &MediaType,
        bytes: Vec<u8>,
    ) -> Result<(), Failure> {
        let digest = Hasher::digest_of(&bytes);
        let url = self.url(&format!("manifests/{reference}"))?;
        let request = Request::new(Method::PUT, url, format!("manifest {reference}"))
            .with(CONTENT_TYPE, media_type.as_ref())
            .carrying(Payload::from(bytes));
        let answer = self.send(&request, &[StatusCode::CREATED, StatusCode::OK]).await?;
        match answer.headers().get(DIGEST).and_then(|value| value.to_str().ok()) {
            Some(kept) if kept.starts_with("sha256:") && kept != digest.as_ref() => Err(Failure::Final(
                format!("manifest {reference}: {digest} was sent, the registry keeps {}", printable(kept)),
            )),
            _ => Ok(()),
        }
    }
}
