//! What a registry may cost us: times, attempts, sizes.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// A registry that does not take a connection within this time is not there. Ten seconds are several retransmissions.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Registries take manifests of up to 4 MiB (distribution-spec 1.1, section "Pushing Manifests").
pub(super) const MAX_MANIFEST: u64 = oci::MAX_MANIFEST;
/// The largest blob that is fetched: as much as a layer may have after decompression.
pub(super) const MAX_BLOB: u64 = oci::MAX_UNCOMPRESSED_LAYER;
/// The longest answer of a token service. Tokens are some kilobytes.
pub(super) const MAX_TOKEN_ANSWER: u64 = 1 << 20;
/// How much of the text of a refusal is read.
pub(super) const MAX_REFUSAL: u64 = 8 << 10;
/// Redirects of one request: a registry to its storage is one, with a content network before it two.
pub(super) const MAX_REDIRECTS: usize = 5;
/// How often one request may be answered with "unauthorized": once for the challenge, once for a token that has expired.
pub(super) const MAX_CHALLENGES: usize = 2;
/// Blobs under way at once, each way. Docker has 3 and 5.
pub(super) const PARALLEL: usize = 4;
/// How often a connection is tried to where nobody is. A name that does not resolve, or a port that is refused, is mostly a
/// mistake, and who made it waits for the answer.
pub(super) const CONNECT_ATTEMPTS: u32 = 3;
/// How many manifests an index may name: Docker's official images have some twenty.
pub(super) const MAX_INDEX_ENTRIES: usize = 256;

/// Times and attempts. Tests have shorter ones.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    /// The longest wait for the beginning of an answer, and for the whole of a small one.
    pub(crate) answer: Duration,
    /// The longest wait for the answer to the end of an upload, when a registry moves the blob to its place.
    pub(crate) commit: Duration,
    /// A transfer that moves less than [`Limits::least`] bytes in this time has stalled.
    pub(crate) window: Duration,
    /// See [`Limits::window`].
    pub(crate) least: u64,
    /// How often something is tried that fails for a while only. A transfer that went on in between counts anew.
    pub(crate) attempts: u32,
    /// The wait before the second attempt; it doubles with each.
    pub(crate) pause: Duration,
    /// The longest wait that a registry may ask for.
    pub(crate) longest_pause: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            answer: Duration::from_secs(60),
            commit: Duration::from_secs(300),
            window: Duration::from_secs(60),
            // Half a kilobyte in a second is slower than any line that a layer is fetched over.
            least: 32 << 10,
            attempts: 5,
            pause: Duration::from_millis(500),
            longest_pause: Duration::from_secs(60),
        }
    }
}

impl Limits {
    /// How long to wait after attempt `attempt`, counted from 1: doubled each time, and between half and all of that, so
    /// that clients which failed together do not come back together.
    pub(super) fn pause_after(&self, attempt: u32) -> Duration {
        let whole = self.pause.saturating_mul(1 << attempt.saturating_sub(1).min(16)).min(self.longest_pause);
        // The keys of a new RandomState are random; that is all that is wanted.
        let random = RandomState::new().hash_one(attempt) as u32;
        whole / 2 + (whole / 2).mul_f64(f64::from(random) / f64::from(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_and_end() {
        let limits = Limits::default();
        for (attempt, most) in [(1, 500), (2, 1000), (3, 2000), (20, 60_000), (u32::MAX, 60_000)] {
            let pause = limits.pause_after(attempt).as_millis();
            assert!((most / 2..=most).contains(&pause), "{attempt}: {pause}");
        }
    }
}
