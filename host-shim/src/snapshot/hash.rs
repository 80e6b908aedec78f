//! Digests of a snapshot's files.

use std::fs::File;
use std::io;

use super::Digest;

/// How a file's digest is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// `sha256:`, of the bytes.
    Plain,
    /// `sha256+sparse:`, of the pages that are not zero.
    Sparse,
}

/// The digest of all of `file`.
pub fn digest(file: &File, scheme: Scheme) -> io::Result<Digest> {
    let _ = (file, scheme);
    todo!()
}
