//! Chunks as they travel: packed, as the store has them.
//!
//! A chunk that came from elsewhere is kept in the bytes that it came in, so that who sends it on sends the same ones, and
//! a place that has them by their digest has them still.

use std::fs::File;
use std::path::PathBuf;

use super::{ChunkError, ChunkStore, ChunkWriter, ContentDigest};
use crate::Error;

/// The longest packed form of a chunk of that length.
pub fn packed_limit(length: u64) -> u64 {
    // Chunks are at most 16 MiB.
    zstd::zstd_safe::compress_bound(length as usize) as u64
}

impl ChunkStore {
    /// The file of a chunk, which must be there. Its bytes are not checked.
    pub fn packed(&self, digest: ContentDigest) -> Result<(PathBuf, File), Error> {
        let path = self.path_of(digest);
        let file = self.open_chunk(digest, &path)?;
        Ok((path, file))
    }
}

impl ChunkWriter<'_> {
    /// Adds a chunk in its packed form, if it is that of `length` bytes with that digest. Says whether it is new.
    pub fn add_packed(&self, digest: ContentDigest, length: u64, packed: &[u8]) -> Result<bool, Error> {
        let damaged = |expected: String, got: String| {
            Error::from(ChunkError::Damaged { digest, expected, got, path: PathBuf::from("what came") })
        };
        let bytes = super::store::unpack(packed, length, &damaged)?;
        let got = ContentDigest::of(&bytes);
        if got != digest {
            return Err(damaged(digest.to_string(), got.to_string()));
        }
        Ok(self.put_packed(digest, packed)?.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ChunkSize, join, split};
    use super::*;

    #[test]
    fn a_chunk_keeps_its_bytes_on_its_way_and_others_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        let contents: Vec<u8> = (0..20_000u32).flat_map(|number| (number / 3).to_le_bytes()).collect();
        std::fs::write(&file, &contents).unwrap();
        let from = ChunkStore::open_or_create(&dir.path().join("from")).unwrap();
        let to = ChunkStore::open_or_create(&dir.path().join("to")).unwrap();
        let (manifest, _) = split(&file, &from, ChunkSize::new(16 << 10).unwrap()).unwrap();
        let writer = to.writer().unwrap();
        for (digest, length) in manifest.stored() {
            let packed = std::fs::read(from.packed(digest).unwrap().0).unwrap();
            assert!(packed.len() as u64 <= packed_limit(length));
            for bad in [&packed[..packed.len() - 1], b"", b"(\xb5/\xfd"] {
                assert!(writer.add_packed(digest, length, bad).is_err());
            }
            assert!(writer.add_packed(digest, length - 1, &packed).is_err());
            assert!(writer.add_packed(ContentDigest::of(b"other"), length, &packed).is_err());
            assert!(writer.add_packed(digest, length, &packed).unwrap());
            assert!(!writer.add_packed(digest, length, &packed).unwrap());
        }
        writer.finish().unwrap();
        for (digest, _) in manifest.stored() {
            let read = |store: &ChunkStore| std::fs::read(store.packed(digest).unwrap().0).unwrap();
            assert_eq!(read(&from), read(&to));
        }
        let back = dir.path().join("back");
        join(&manifest, &to, &back).unwrap();
        assert_eq!(std::fs::read(back).unwrap(), contents);
    }
}
