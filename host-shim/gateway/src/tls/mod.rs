//! HTTPS on the gateway's port: whose certificate, since when, and what is said to those who come without.
//!
//! ```text
//!   --tls-cert, --tls-key ── read ──┐                      ┌── the next handshake takes it
//!     changed, or SIGHUP: again     ├─► a whole ServerConfig
//!   --tls-self-signed ── issue ─────┘   in the place of the last; one that cannot be made leaves that and says so
//!     DATA/tls/DOMAIN/authority.pem       ▲
//!     renewed before it ends ─────────────┘
//! ```
//!
//! A connection keeps the certificate that it began with. Files are looked at every few seconds rather than watched: who
//! renews certificates swaps symbolic links in folders above them (certbot, Kubernetes), which a watch of the files misses.

mod authority;
mod files;
mod handshake;
mod validity;

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use jiff::Timestamp;
use rustls::ServerConfig;
use rustls::crypto::ring;

use rustls::sign::{CertifiedKey, SingleCertAndKey};
use tokio::sync::Notify;

use crate::Gateway;

pub use authority::Authority;
pub use files::PairFiles;
pub(crate) use handshake::{Handshake, HandshakeFailure, refuse_plain};

/// What a certificate is looked at for: that its files changed, or that it is to be renewed.
const LOOK: Duration = Duration::from_secs(5);

/// A certificate that ends this soon is worth a line in the log each time that it is read. Let's Encrypt's renew 30 days ahead.
const SOON: jiff::SignedDuration = jiff::SignedDuration::from_hours(14 * 24);

/// HTTP/2 and HTTP/1.1, in that order (RFC 7301 names).
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// A certificate could not be had.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A file holds something else.
    #[error("{}: expected {expected}, got {got}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What should be in it.
        expected: &'static str,
        /// What is.
        got: String,
    },
    /// Two files that do not belong together, or that this program cannot use.
    #[error("the certificate {} with the key {}: {source}", cert.display(), key.display())]
    Pair {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's.
        key: PathBuf,
        /// What is wrong.
        source: rustls::Error,
    },
    /// TLS cannot be set up.
    #[error("TLS: {0}")]
    Setup(#[from] rustls::Error),
    /// A certificate could not be made.
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
    /// The clock shows no time that a certificate can have.
    #[error("cannot make a certificate: the clock shows {0}")]
    Clock(Timestamp),
}

/// Where certificates come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// From the operator.
    Files(PairFiles),
    /// From an authority of our own.
    SelfSigned(Authority),
}

/// The certificate of now.
#[derive(Debug)]
pub struct Tls {
    source: Source,
    current: RwLock<Current>,
    asked: Notify,
}

#[derive(Debug)]
struct Current {
    config: Arc<ServerConfig>,
    ends: Option<Timestamp>,
    /// What was last tried, also in vain.
    tried: Tried,
}

/// What says whether another try is due.
#[derive(Clone, Debug, PartialEq)]
enum Tried {
    Files(files::Stamps),
    RenewAt(Timestamp),
}

impl Tls {
    /// Has a certificate, or fails.
    pub fn open(source: Source) -> Result<Self, TlsError> {
        let (tried, had) = obtain(&source, Timestamp::now());
        let (config, ends) = had?;
        warn_of_end(ends);
        let current = RwLock::new(Current { config, ends, tried });
        Ok(Self { source, current, asked: Notify::new() })
    }

    /// Where the certificates come from.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// Asks for a fresh look, whatever the files seem to be: for SIGHUP.
    pub fn reload(&self) {
        self.asked.notify_one();
    }

    /// Follows the source for as long as it is polled.
    pub async fn keep(self: Arc<Self>, gateway: Arc<Gateway>) {
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            gateway.metrics.certificate_ends(self.ends());
            let asked = tokio::select! {
                _ = look.tick() => false,
                () = self.asked.notified() => true,
            };
            let tls = Arc::clone(&self);
            let looked = tokio::task::spawn_blocking(move || tls.refresh(asked, Timestamp::now())).await;
            match looked {
                Ok(Ok(false)) => {}
                Ok(Ok(true)) => {
                    tracing::info!(ends = self.ends_shown(), "another TLS certificate from now on")
                }
                Ok(Err(error)) => {
                    tracing::error!(%error, ends = self.ends_shown(), "the TLS certificate stays the one it was");
                }
                Err(panic) => tracing::error!(%panic, "the TLS certificate stays the one it was"),
            }
        }
    }

    /// Takes what the source has where that is something new, or where it was asked for.
    fn refresh(&self, asked: bool, now: Timestamp) -> Result<bool, TlsError> {
        let tried = self.current().tried.clone();
        let due = match (&self.source, &tried) {
            (Source::Files(files), Tried::Files(stamps)) => files.stamps() != *stamps,
            (_, Tried::RenewAt(at)) => now >= *at,
            (Source::SelfSigned(_), Tried::Files(_)) => true,
        };
        if !due && !asked {
            return Ok(false);
        }
        let (tried, had) = obtain(&self.source, now);
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        current.tried = tried;
        (current.config, current.ends) = had?;
        warn_of_end(current.ends);
        Ok(true)
    }

    fn current(&self) -> std::sync::RwLockReadGuard<'_, Current> {
        self.current.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.current().config)
    }

    fn ends(&self) -> Option<Timestamp> {
        self.current().ends
    }

    fn ends_shown(&self) -> String {
        self.ends().map_or_else(|| "unknown".to_owned(), |ends| ends.to_string())
    }
}

/// How long after an authority failed it is asked again: a full disk may have room by then.
const AGAIN: jiff::SignedDuration = jiff::SignedDuration::from_mins(10);

type Had = Result<(Arc<ServerConfig>, Option<Timestamp>), TlsError>;

fn obtain(source: &Source, now: Timestamp) -> (Tried, Had) {
    match source {
        Source::Files(files) => {
            // Before they are read: a change while they are is seen at the next look.
            let stamps = files.stamps();
            let had = files.read().and_then(|pair| {
                let ends = pair.cert.first().and_then(|cert| validity::not_after(cert));
                Ok((server_config(pair)?, ends))
            });
            (Tried::Files(stamps), had)
        }
        Source::SelfSigned(authority) => match authority.issue(now) {
            Ok(issued) => {
                let had = server_config(issued.pair).map(|config| (config, Some(issued.ends)));
                (Tried::RenewAt(issued.renew_at), had)
            }
            Err(error) => (Tried::RenewAt(now.checked_add(AGAIN).unwrap_or(now)), Err(error)),
        },
    }
}

/// A fresh one for each certificate: what a client may resume is of the certificate that it saw.
fn server_config(pair: CertifiedKey) -> Result<Arc<ServerConfig>, TlsError> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(pair)));
    config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).into();
    Ok(Arc::new(config))
}

fn warn_of_end(ends: Option<Timestamp>) {
    let Some(ends) = ends else { return };
    let left = ends.duration_since(Timestamp::now());
    if left.is_negative() {
        tracing::warn!(%ends, "the TLS certificate has ended: clients refuse it");
    } else if left < SOON {
        tracing::warn!(%ends, "the TLS certificate ends soon");
    }
}

#[cfg(test)]
mod tests;
