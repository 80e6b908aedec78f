//! SHA-256 while the bytes pass.

use std::fmt::Write as _;
use std::io::{self, Read};
use std::str::FromStr;

use oci_spec::image::{Digest, DigestAlgorithm};
use sha2::{Digest as _, Sha256};

use crate::Error;

/// Computes the digest and the length of what it is fed.
#[derive(Clone, Default)]
pub struct Hasher {
    state: Sha256,
    length: u64,
}

impl Hasher {
    /// A hasher that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// The digest of `bytes`.
    pub fn digest_of(bytes: &[u8]) -> Digest {
        let mut hasher = Self::new();
        hasher.update(bytes);
        hasher.finish().0
    }

    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.state.update(bytes);
        self.length += bytes.len() as u64;
    }

    /// The number of bytes so far.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The digest and the number of bytes.
    pub fn finish(self) -> (Digest, u64) {
        let mut text = String::with_capacity(71);
        text.push_str("sha256:");
        for byte in self.state.finalize() {
            let _ = write!(text, "{byte:02x}");
        }
        // 64 lowercase hexadecimal digits are a valid digest by construction.
        (Digest::from_str(&text).expect("hexadecimal SHA-256 is a digest"), self.length)
    }
}

impl io::Write for Hasher {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The bytes are not those that the digest names.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}: expected {expected}, got {got}; the copy is damaged: fetch or build it again")]
pub struct DigestMismatch {
    /// The thing with that digest, as "layer sha256:..".
    pub what: String,
    /// The digest (or the size) that was promised.
    pub expected: String,
    /// The digest (or the size) of the bytes.
    pub got: String,
}

impl From<DigestMismatch> for io::Error {
    fn from(mismatch: DigestMismatch) -> Self {
        io::Error::new(io::ErrorKind::InvalidData, mismatch)
    }
}

/// Passes bytes on and fails, with [`DigestMismatch`] inside an `InvalidData` error, when they end and are not what was
/// promised, or as soon as there are too many.
pub struct VerifyingReader<R> {
    inner: R,
    hasher: Option<Hasher>,
    what: String,
    digest: Digest,
    size: Option<u64>,
}

impl<R: Read> VerifyingReader<R> {
    /// Checks `inner` against `digest` and, where it is known, `size`; `what` names it in errors.
    pub fn new(inner: R, what: impl Into<String>, digest: Digest, size: Option<u64>) -> Result<Self, Error> {
        if *digest.algorithm() != DigestAlgorithm::Sha256 {
            return Err(Error::unsupported(format!("digest {digest}"), "only sha256 digests are"));
        }
        Ok(Self { inner, hasher: Some(Hasher::new()), what: what.into(), digest, size })
    }

    fn mismatch(&self, expected: String, got: String) -> io::Error {
        DigestMismatch { what: self.what.clone(), expected, got }.into()
    }
}

impl<R: Read> Read for VerifyingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() || self.hasher.is_none() {
            return Ok(0);
        }
        let count = self.inner.read(buffer)?;
        let Some(hasher) = &mut self.hasher else { return Ok(0) };
        hasher.update(&buffer[..count]);
        let length = hasher.length();
        if let Some(size) = self.size.filter(|size| length > *size || (count == 0 && length != *size)) {
            let more = if length > size { "at least " } else { "" };
            return Err(self.mismatch(format!("{size} bytes"), format!("{more}{length} bytes")));
        }
        if count == 0 {
            let (digest, _) = self.hasher.take().unwrap_or_default().finish();
            if digest != self.digest {
                // A second read must not look like a clean end.
                self.hasher = Some(Hasher::new());
                return Err(self.mismatch(self.digest.to_string(), digest.to_string()));
            }
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8], promised: &[u8], size: Option<u64>) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        VerifyingReader::new(bytes, "blob x", Hasher::digest_of(promised), size)
            .unwrap()
            .read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn the_empty_digest_is_the_known_one() {
        assert_eq!(
            Hasher::digest_of(b"").to_string(),
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }

    #[test]
    fn only_the_promised_bytes_pass() {
        assert_eq!(read(b"abc", b"abc", Some(3)).unwrap(), b"abc");
        for (bytes, size) in [(&b"abd"[..], Some(3)), (b"ab", Some(3)), (b"abcd", Some(3)), (b"abcd", None)] {
            let error = read(bytes, b"abc", size).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            let inner = error.get_ref().unwrap().downcast_ref::<DigestMismatch>().unwrap();
            assert_eq!(inner.what, "blob x");
        }
    }
}
