//! A certificate and its key in two files.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

use super::TlsError;

/// The longest file; chains have some KiB.
const MAX_PEM: u64 = 1 << 20;

/// A key that others than its owner and group may read is said to be one.
const OTHERS: u32 = 0o007;

/// A certificate's file, with the chain up to the authority, and its key's. Both PEM.
#[derive(Clone, Debug)]
pub struct PairFiles {
    /// The chain, the server's own certificate first.
    pub cert: PathBuf,
    /// The private key: PKCS#8, PKCS#1 or SEC1.
    pub key: PathBuf,
}

/// What tells one state of the two files from another; `None` where there is no file.
pub(super) type Stamps = [Option<Stamp>; 2];

/// Device and inode, because files are replaced; size and times, because they are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp(u64, u64, u64, (i64, i64), (i64, i64));

impl PairFiles {
    pub(super) fn stamps(&self) -> Stamps {
        [&self.cert, &self.key].map(|path| {
            let of = |found: fs::Metadata| {
                let modified = (found.mtime(), found.mtime_nsec());
                Stamp(found.dev(), found.ino(), found.len(), modified, (found.ctime(), found.ctime_nsec()))
            };
            // Links are followed: what they lead to counts.
            fs::metadata(path).ok().map(of)
        })
    }

    /// Reads both, and checks that they belong together.
    pub(super) fn read(&self) -> Result<CertifiedKey, TlsError> {
        let (cert, _) = read(&self.cert)?;
        let (key, mode) = read(&self.key)?;
        let invalid = |path: &Path, expected, error: rustls::pki_types::pem::Error| TlsError::Invalid {
            path: path.to_owned(),
            expected,
            got: match error {
                rustls::pki_types::pem::Error::NoItemsFound => "none".to_owned(),
                error => error.to_string(),
            },
        };
        let chain = CertificateDer::pem_slice_iter(&cert)
            .collect::<Result<Vec<_>, _>>()
            .and_then(|chain| match chain.is_empty() {
                true => Err(rustls::pki_types::pem::Error::NoItemsFound),
                false => Ok(chain),
            })
            .map_err(|error| invalid(&self.cert, "certificates in PEM", error))?;
        let private = PrivateKeyDer::from_pem_slice(&key)
            .map_err(|error| invalid(&self.key, "a private key in PEM, without a passphrase", error))?;
        if mode & OTHERS != 0 {
            let key = self.key.display();
            tracing::warn!(%key, mode = format!("{:03o}", mode & 0o777), "everybody on this machine may use the TLS key");
        }
        CertifiedKey::from_der(chain, private, &ring::default_provider()).map_err(|source| TlsError::Pair {
            cert: self.cert.clone(),
            key: self.key.clone(),
            source,
        })
    }
}

/// A file's bytes and mode.
fn read(path: &Path) -> Result<(Vec<u8>, u32), TlsError> {
    let io = |source| TlsError::Io { path: path.to_owned(), source };
    let invalid = |got: String| TlsError::Invalid { path: path.to_owned(), expected: "a PEM file", got };
    let found = fs::metadata(path).map_err(io)?;
    // A pipe would be waited for.
    if !found.is_file() {
        return Err(invalid("something that is no file".into()));
    }
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(MAX_PEM + 1).read_to_end(&mut bytes)).map_err(io)?;
    if bytes.len() as u64 > MAX_PEM {
        return Err(invalid(format!("more than {MAX_PEM} bytes")));
    }
    Ok((bytes, found.mode()))
}
