//! Digests of a snapshot's files.
//!
//! RAM and disks are sparse, and a copy may have other holes than its original. So their digest is one of the contents,
//! not of the layout, costs nothing for holes, and can be computed by several threads:
//!
//! ```text
//! sha256+sparse = SHA-256( "tiffin-sparse-1\0" ‖ length of the file
//!                          ‖ for each 1 MiB chunk that is not all zero:  its offset ‖ SHA-256( bitmap ‖ blocks ) )
//! bitmap: bit i (of byte i/8, from the lowest) says that block i of the chunk is not all zero; 32 bytes
//! blocks: those blocks of 4096 bytes, one after the other; the last of a file may be shorter
//! ```
//!
//! Integers are 64 bits, little-endian. Any byte that changes changes the digest: a block that becomes zero leaves the
//! bitmap, one that stops being zero enters it.

use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use sha2::{Digest as _, Sha256};

use super::Digest;
use super::sparse::{self, BLOCK, CHUNK, Chunk};

const SPARSE_MAGIC: &[u8; 16] = b"tiffin-sparse-1\0";
const SPARSE_PREFIX: &str = "sha256+sparse:";
const PLAIN_PREFIX: &str = "sha256:";

/// Hexadecimal digits of a SHA-256.
const DIGITS: usize = 64;

/// How a file's digest is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// `sha256:`, of the bytes.
    Plain,
    /// `sha256+sparse:`, of the blocks that are not zero.
    Sparse,
}

impl Scheme {
    /// Whether `digest` is one of this scheme.
    pub fn made(self, digest: &Digest) -> bool {
        let prefix = match self {
            Self::Plain => PLAIN_PREFIX,
            Self::Sparse => SPARSE_PREFIX,
        };
        let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        digest
            .as_ref()
            .strip_prefix(prefix)
            .is_some_and(|digits| digits.len() == DIGITS && digits.bytes().all(hex))
    }
}

/// The digest of all of `file`.
pub fn digest(file: &File, scheme: Scheme) -> io::Result<Digest> {
    match scheme {
        Scheme::Plain => plain(file),
        Scheme::Sparse => sparse(file),
    }
}

/// The plain digest of bytes.
pub(super) fn digest_of(bytes: &[u8]) -> Digest {
    text(PLAIN_PREFIX, Sha256::digest(bytes).as_slice())
}

fn plain(file: &File) -> io::Result<Digest> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; CHUNK as usize];
    let mut position = 0;
    loop {
        match file.read_at(&mut buffer, position) {
            Ok(0) => return Ok(text(PLAIN_PREFIX, hash.finalize().as_slice())),
            Ok(count) => {
                hash.update(&buffer[..count]);
                position += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn sparse(file: &File) -> io::Result<Digest> {
    let size = file.metadata()?.len();
    let chunks = sparse::chunks(file, size)?;
    let found = sparse::for_each(file, &chunks, |chunk, bytes| Ok(chunk_digest(chunk, bytes)))?;
    let mut hash = Sha256::new();
    hash.update(SPARSE_MAGIC);
    hash.update(size.to_le_bytes());
    for (offset, digest) in found.into_iter().flatten() {
        hash.update(offset.to_le_bytes());
        hash.update(digest);
    }
    Ok(text(SPARSE_PREFIX, hash.finalize().as_slice()))
}

/// The offset of a chunk and its digest; nothing if it is all zero.
fn chunk_digest(chunk: Chunk, bytes: &[u8]) -> Option<(u64, [u8; 32])> {
    let runs = sparse::data_runs(bytes);
    if runs.is_empty() {
        return None;
    }
    let offset = chunk.start / CHUNK * CHUNK;
    let first = (chunk.start - offset) as usize / BLOCK;
    let mut bitmap = [0_u8; CHUNK as usize / BLOCK / 8];
    for run in &runs {
        for block in run.start / BLOCK..run.end.div_ceil(BLOCK) {
            bitmap[(first + block) / 8] |= 1 << ((first + block) % 8);
        }
    }
    let mut hash = Sha256::new();
    hash.update(bitmap);
    for run in runs {
        hash.update(&bytes[run]);
    }
    Some((offset, hash.finalize().into()))
}

fn text(prefix: &str, hash: &[u8]) -> Digest {
    let mut text = String::with_capacity(prefix.len() + DIGITS);
    text.push_str(prefix);
    for byte in hash {
        let _ = write!(text, "{byte:02x}");
    }
    // Letters, one separator and hexadecimal digits are a valid digest by construction.
    Digest::try_from(text).expect("an algorithm and hexadecimal digits are a digest")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The scheme once more, as slowly and as plainly as it can be written.
    fn reference(contents: &[u8]) -> String {
        let mut all = SPARSE_MAGIC.to_vec();
        all.extend((contents.len() as u64).to_le_bytes());
        for (index, chunk) in contents.chunks(CHUNK as usize).enumerate() {
            let (mut bitmap, mut data) = ([0_u8; 32], Vec::new());
            for (block, bytes) in chunk.chunks(BLOCK).enumerate() {
                if bytes.iter().any(|&byte| byte != 0) {
                    bitmap[block / 8] |= 1 << (block % 8);
                    data.extend_from_slice(bytes);
                }
            }
            if !data.is_empty() {
                all.extend((index as u64 * CHUNK).to_le_bytes());
                all.extend(Sha256::digest([bitmap.to_vec(), data].concat()));
            }
        }
        text(SPARSE_PREFIX, Sha256::digest(all).as_slice()).to_string()
    }

    fn contents() -> Vec<u8> {
        let mut contents = vec![0; 3 * CHUNK as usize + 2 * BLOCK + 17];
        for at in [
            0,
            5 * BLOCK + 1,
            9 * BLOCK,
            CHUNK as usize - 1,
            2 * CHUNK as usize + BLOCK,
            3 * CHUNK as usize + 2 * BLOCK + 16,
        ] {
            contents[at] = at as u8 | 1;
        }
        contents
    }

    fn file_of(contents: &[u8], holes: bool) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(contents.len() as u64).unwrap();
        for (index, block) in contents.chunks(BLOCK).enumerate() {
            if !holes || !sparse::is_zero(block) {
                file.write_all_at(block, (index * BLOCK) as u64).unwrap();
            }
        }
        file
    }

    #[test]
    fn the_sparse_digest_is_of_the_contents_and_not_of_the_holes() {
        let contents = contents();
        let expected = reference(&contents);
        for holes in [true, false] {
            let digest = digest(&file_of(&contents, holes), Scheme::Sparse).unwrap();
            assert_eq!(digest.as_ref(), expected);
            assert!(Scheme::Sparse.made(&digest) && !Scheme::Plain.made(&digest));
        }
        // What a folder on disk says must mean the same to every later version.
        assert_eq!(
            expected,
            "sha256+sparse:30d609f98b64d53b0bd16a5fa186e7db9b77bb95794ec101fc5b32a3c950ee62"
        );
        let empty = digest(&file_of(&[], true), Scheme::Sparse).unwrap();
        assert_eq!(empty.as_ref(), reference(&[]));
    }

    #[test]
    fn every_changed_byte_and_length_changes_the_sparse_digest() {
        let original = contents();
        let file = file_of(&original, true);
        let before = digest(&file, Scheme::Sparse).unwrap();
        for at in [0, 1, 5 * BLOCK + 1, 7 * BLOCK, CHUNK as usize, 2 * CHUNK as usize - 1, original.len() - 1]
        {
            let changed = [original[at] ^ 1];
            file.write_all_at(&changed, at as u64).unwrap();
            assert_ne!(digest(&file, Scheme::Sparse).unwrap(), before, "byte {at}");
            file.write_all_at(&original[at..=at], at as u64).unwrap();
            assert_eq!(digest(&file, Scheme::Sparse).unwrap(), before);
        }
        for longer in [1, BLOCK, CHUNK as usize] {
            file.set_len((original.len() + longer) as u64).unwrap();
            assert_ne!(digest(&file, Scheme::Sparse).unwrap(), before, "{longer} bytes longer");
        }
    }

    #[test]
    fn the_plain_digest_is_sha256sum() {
        let bytes = vec![b'a'; 1_000_000];
        let expected = "sha256:cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0";
        assert_eq!(digest(&file_of(&bytes, false), Scheme::Plain).unwrap().as_ref(), expected);
        assert_eq!(digest_of(&bytes).as_ref(), expected);
        assert!(Scheme::Plain.made(&digest_of(&bytes)) && !Scheme::Sparse.made(&digest_of(&bytes)));
        for text in ["sha512:00", "sha256+sparse:00", "sha256+sparse:zz"] {
            let other = Digest::try_from(text.to_owned());
            assert!(other.is_err() || !Scheme::Sparse.made(&other.unwrap()), "{text}");
        }
    }
}
