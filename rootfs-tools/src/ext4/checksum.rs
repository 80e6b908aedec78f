//! crc32c as ext4 uses it (`metadata_csum`), and the identity that seeds it.

use sha2::{Digest, Sha256};

/// A running crc32c with ext4's convention: started with all ones, not inverted at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Crc(u32);

impl Crc {
    /// The state before any byte.
    pub(super) const START: Self = Self(!0);

    /// A state that was stored (`s_checksum_seed`).
    pub(super) fn resume(state: u32) -> Self {
        Self(state)
    }

    /// The state after `bytes`.
    pub(super) fn update(self, bytes: &[u8]) -> Self {
        // The crate inverts on the way in and out; ext4 does neither.
        Self(!crc32c::crc32c_append(!self.0, bytes))
    }

    /// The checksum.
    pub(super) fn value(self) -> u32 {
        self.0
    }
}

/// What tells one file system from another: its UUID and the seed of its directory hashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// `s_uuid`.
    pub(crate) uuid: [u8; 16],
    /// `s_hash_seed`.
    pub(crate) hash_seed: [u32; 4],
}

impl Identity {
    /// Derives both from `seed`: the same seed gives the same file system.
    pub(crate) fn derive(seed: &[u8]) -> Self {
        let digest = Sha256::new().chain_update(b"tiffin ext4\0").chain_update(seed).finalize();
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&digest[..16]);
        // RFC 9562: version 8 is for ids that an application derives in its own way.
        uuid[6] = uuid[6] & 0x0f | 0x80;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        let mut hash_seed = [0; 4];
        for (word, bytes) in hash_seed.iter_mut().zip(digest[16..].chunks_exact(4)) {
            *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        Self { uuid, hash_seed }
    }

    /// The seed of every metadata checksum.
    pub(super) fn seed(&self) -> Crc {
        Crc::START.update(&self.uuid)
    }

    /// The seed of the checksums of what belongs to one inode. Generations are all zero.
    pub(super) fn inode_seed(&self, inode: u32) -> Crc {
        self.seed().update(&inode.to_le_bytes()).update(&0u32.to_le_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc_is_the_kernels() {
        // crc32c("123456789") is 0xe3069283 with the final inversion that ext4 leaves out.
        assert_eq!(!Crc::START.update(b"123456789").value(), 0xe306_9283);
        assert_eq!(Crc::START.update(b"1234").update(b"56789"), Crc::START.update(b"123456789"));
    }

    #[test]
    fn identities_follow_the_seed() {
        assert_eq!(Identity::derive(b"a"), Identity::derive(b"a"));
        assert_ne!(Identity::derive(b"a").uuid, Identity::derive(b"b").uuid);
        assert_eq!(Identity::derive(b"a").uuid[6] >> 4, 8);
    }
}
