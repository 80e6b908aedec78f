//! The manifest: which chunks make a file.
//!
//! ```json
//! {"schema_version":1,"chunk_size":65536,"size":200704,"digest":"sha256:..","chunks":[
//!   {"digest":"sha256:..","length":65536},{"zeros":2},{"digest":"sha256:..","length":4096}]}
//! ```
//!
//! A file has exactly one manifest for a chunk size: chunks of zeros are always counted together, every chunk but the last
//! has the whole size, and the fields come in this order without blanks. So equal files have equal manifests, and a
//! manifest has a digest that means something.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::{ChunkError, ContentDigest};
use crate::Error;
use crate::error::at;
use crate::format::Sink;
use crate::output::Output;

/// The version of manifests that are written and read.
pub const SCHEMA_VERSION: u64 = 1;

/// The longest file: what an ext4 of ours can be.
pub const MAX_SIZE: u64 = 16 << 40;

/// The most chunks that are not zero: 64 GiB of data at the usual size, in some 40 MiB of memory.
pub const MAX_STORED_CHUNKS: usize = 1 << 20;

/// The most lines of `chunks`: a run of zeros before and behind each stored chunk.
const MAX_ENTRIES: usize = 2 * MAX_STORED_CHUNKS + 1;

/// The longest manifest: MAX_STORED_CHUNKS lines of 104 bytes and as many for the zeros between them.
const MAX_MANIFEST: u64 = 160 << 20;

/// How many bytes a chunk has: a power of two from 4 KiB, the block of a file system, to 16 MiB, which bounds what one
/// chunk can take of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkSize(u32);

impl ChunkSize {
    /// Of a power of two from 4096 to 16 MiB.
    pub fn new(bytes: u64) -> Option<Self> {
        let valid = bytes.is_power_of_two() && (4 << 10..=16 << 20).contains(&bytes);
        valid.then_some(Self(bytes as u32))
    }

    /// The number of bytes.
    pub fn bytes(self) -> u64 {
        self.0.into()
    }
}

impl Default for ChunkSize {
    fn default() -> Self {
        Self(64 << 10)
    }
}

/// A line of a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
pub enum Entry {
    /// A chunk that a store has.
    Stored {
        /// The digest of its contents.
        digest: ContentDigest,
        /// Its length in bytes.
        length: u64,
    },
    /// So many chunks of nothing but zeros, which no store has.
    Zeros {
        /// At least one.
        zeros: u64,
    },
}

/// Which chunks make a file. One that was parsed covers its file exactly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    chunk_size: ChunkSize,
    size: u64,
    digest: ContentDigest,
    entries: Vec<Entry>,
}

#[derive(Serialize)]
struct Written<'a> {
    schema_version: u64,
    chunk_size: u64,
    size: u64,
    digest: ContentDigest,
    chunks: &'a [Entry],
}

/// What is read first, because the rest may look different in another version.
#[derive(Deserialize)]
struct Version {
    schema_version: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    #[serde(rename = "schema_version")]
    _schema_version: u64,
    chunk_size: u64,
    size: u64,
    digest: ContentDigest,
    chunks: BoundedEntries,
}

impl Manifest {
    /// Reads a manifest file.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let mut text = Vec::new();
        let file = File::open(path).map_err(at(path))?;
        file.take(MAX_MANIFEST + 1).read_to_end(&mut text).map_err(at(path))?;
        Ok(Self::parse(&path.display().to_string(), &text)?)
    }

    /// Parses a manifest and checks everything about it that can be checked without its chunks. `name` is what it is
    /// called in errors.
    pub fn parse(name: &str, text: &[u8]) -> Result<Self, ChunkError> {
        let invalid = |reason: String| ChunkError::Manifest { manifest: name.to_owned(), reason };
        if text.len() as u64 > MAX_MANIFEST {
            return Err(invalid(format!("it has more than {MAX_MANIFEST} bytes")));
        }
        let Version { schema_version } = serde_json::from_slice(text)
            .map_err(|error| invalid(format!("expected JSON with a schema_version: {error}")))?;
        if schema_version != SCHEMA_VERSION {
            let manifest = name.to_owned();
            return Err(ChunkError::Version { manifest, expected: SCHEMA_VERSION, got: schema_version });
        }
        let raw: Raw = serde_json::from_slice(text).map_err(|error| invalid(error.to_string()))?;
        Self::check(raw).map_err(invalid)
    }

    fn check(raw: Raw) -> Result<Self, String> {
        let Raw { chunk_size, size, digest, chunks: BoundedEntries(entries), .. } = raw;
        let bytes = chunk_size;
        let chunk_size = ChunkSize::new(bytes)
            .ok_or_else(|| format!("chunk_size is {bytes}, expected a power of two from 4 KiB to 16 MiB"))?;
        if size > MAX_SIZE {
            return Err(format!("size is {size}, expected at most {MAX_SIZE}"));
        }
        let (mut position, mut stored, mut after_zeros) = (0u64, 0, false);
        for (index, entry) in entries.iter().enumerate() {
            let left = size - position;
            let length = match *entry {
                Entry::Stored { length, .. } => {
                    stored += 1;
                    let expected = left.min(bytes);
                    if length == 0 || length != expected {
                        return Err(format!(
                            "chunk {index} at byte {position} has {length} bytes, expected {expected} (size is {size})"
                        ));
                    }
                    length
                }
                Entry::Zeros { zeros } => {
                    if zeros == 0 || after_zeros || zeros > left.div_ceil(bytes) {
                        return Err(format!(
                            "line {index} at byte {position} counts {zeros} chunks of zeros, expected 1 to {} and none right \
                             behind others",
                            left.div_ceil(bytes)
                        ));
                    }
                    left.min(zeros * bytes)
                }
            };
            after_zeros = matches!(entry, Entry::Zeros { .. });
            position += length;
        }
        if position != size {
            return Err(format!("its chunks make {position} bytes, its size is {size}"));
        }
        if stored > MAX_STORED_CHUNKS {
            return Err(format!("it has {stored} chunks, at most {MAX_STORED_CHUNKS} are taken"));
        }
        Ok(Self { chunk_size, size, digest, entries })
    }

    /// The one text of this manifest.
    pub fn to_json(&self) -> Vec<u8> {
        let Self { chunk_size, size, digest, entries } = self;
        let written = Written {
            schema_version: SCHEMA_VERSION,
            chunk_size: chunk_size.bytes(),
            size: *size,
            digest: *digest,
            chunks: entries,
        };
        let mut text = serde_json::to_vec(&written).expect("integers and strings are always JSON");
        text.push(b'\n');
        text
    }

    /// Writes the manifest to `path`, where it appears when it is whole and on disk. Gives its digest.
    pub fn write(&self, path: &Path) -> Result<oci::Digest, Error> {
        let mut output = Output::create_hashed(path)?;
        output.write(&self.to_json())?;
        output.publish_hashed()
    }

    /// The length of the file.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The digest of the file.
    pub fn digest(&self) -> ContentDigest {
        self.digest
    }

    /// How long chunks are.
    pub fn chunk_size(&self) -> ChunkSize {
        self.chunk_size
    }

    /// The lines, which cover the file from its beginning to its end.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The chunks that a store must have, in the order of the file, as often as they are in it.
    pub fn stored(&self) -> impl Iterator<Item = (ContentDigest, u64)> + Clone {
        self.entries.iter().filter_map(|entry| match entry {
            Entry::Stored { digest, length } => Some((*digest, *length)),
            Entry::Zeros { .. } => None,
        })
    }
}

/// A manifest in the making.
pub(super) struct Builder {
    chunk_size: ChunkSize,
    entries: Vec<Entry>,
    stored: usize,
}

impl Builder {
    pub(super) fn new(chunk_size: ChunkSize) -> Self {
        Self { chunk_size, entries: Vec::new(), stored: 0 }
    }

    /// The next chunk is zeros.
    pub(super) fn zero(&mut self) {
        match self.entries.last_mut() {
            Some(Entry::Zeros { zeros }) => *zeros += 1,
            _ => self.entries.push(Entry::Zeros { zeros: 1 }),
        }
    }

    /// The next chunk is that one. Gives the number of stored chunks.
    pub(super) fn stored(&mut self, digest: ContentDigest, length: u64) -> usize {
        self.entries.push(Entry::Stored { digest, length });
        self.stored += 1;
        self.stored
    }

    /// The chunks make a file of `size` bytes with that digest.
    pub(super) fn finish(self, size: u64, digest: ContentDigest) -> Manifest {
        Manifest { chunk_size: self.chunk_size, size, digest, entries: self.entries }
    }
}

/// A list that ends with an error when it is longer than any manifest of ours.
struct BoundedEntries(Vec<Entry>);

impl<'de> Deserialize<'de> for BoundedEntries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Vec<Entry>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "a list of at most {MAX_ENTRIES} chunks")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = list.next_element()? {
                    if entries.len() == MAX_ENTRIES {
                        return Err(serde::de::Error::invalid_length(MAX_ENTRIES + 1, &self));
                    }
                    entries.push(entry);
                }
                Ok(entries)
            }
        }
        deserializer.deserialize_seq(Entries).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let mut builder = Builder::new(ChunkSize::new(4096).unwrap());
        builder.stored(ContentDigest::of(b"1"), 4096);
        builder.zero();
        builder.zero();
        builder.stored(ContentDigest::of(b"2"), 10);
        builder.finish(3 * 4096 + 10, ContentDigest::of(b"file"))
    }

    /// A change of this text is a new schema version.
    #[test]
    fn the_text_is_pinned() {
        let text = String::from_utf8(manifest().to_json()).unwrap();
        assert_eq!(
            text,
            "{\"schema_version\":1,\"chunk_size\":4096,\"size\":12298,\
             \"digest\":\"sha256:3b9c358f36f0a31b6ad3e14f309c7cf198ac9246e8316f9ce543d5b19ac02b80\",\"chunks\":[\
             {\"digest\":\"sha256:6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b\",\"length\":4096},\
             {\"zeros\":2},\
             {\"digest\":\"sha256:d4735e3a265e16eee03f59718b9b5d03019c07d8b6c51f90da3a666eec13ab35\",\"length\":10}]}\n"
        );
        assert_eq!(Manifest::parse("m", text.as_bytes()).unwrap(), manifest());
    }

    #[test]
    fn what_lies_or_is_not_canonical_is_refused() {
        let good = String::from_utf8(manifest().to_json()).unwrap();
        let digest = ContentDigest::of(b"2").to_string();
        for (from, to, reason) in [
            ("\"size\":12298", "\"size\":12297", "has 10 bytes, expected 9"),
            ("\"size\":12298", "\"size\":99999999999999999", "expected at most"),
            ("\"size\":12298", "\"size\":-1", "invalid value"),
            ("\"size\":12298", "\"size\":8192", "expected 1 to 1"),
            ("\"chunk_size\":4096", "\"chunk_size\":0", "a power of two"),
            ("\"chunk_size\":4096", "\"chunk_size\":12288", "a power of two"),
            ("\"chunk_size\":4096", "\"chunk_size\":8589934592", "a power of two"),
            ("\"length\":4096", "\"length\":4095", "has 4095 bytes, expected 4096"),
            ("\"length\":10}", "\"length\":0}", "has 0 bytes"),
            ("{\"zeros\":2}", "{\"zeros\":0}", "counts 0 chunks"),
            ("{\"zeros\":2}", "{\"zeros\":1},{\"zeros\":1}", "none right behind others"),
            ("{\"zeros\":2}", "{\"zeros\":18446744073709551615}", "counts 18446744073709551615"),
            ("{\"zeros\":2},", "", "expected 4096"),
            ("{\"zeros\":2}", "{\"zeros\":2,\"length\":1}", "did not match"),
            (&digest, "sha256:00", "did not match"),
            ("\"chunks\"", "\"pieces\"", "unknown field"),
            ("]}", "]", "JSON"),
        ] {
            let bad = good.replacen(from, to, 1);
            assert_ne!(bad, good);
            let error = Manifest::parse("m", bad.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(reason) && error.starts_with("manifest m: "), "{from} -> {to}: {error}");
        }
        let newer = b"{\"schema_version\":2,\"frames\":[]}";
        let error = Manifest::parse("m", newer).unwrap_err();
        assert!(matches!(error, ChunkError::Version { expected: 1, got: 2, .. }), "{error}");
        for bad in [&b""[..], b"[]", b"{}", b"null", b"\xff"] {
            assert!(matches!(Manifest::parse("m", bad), Err(ChunkError::Manifest { .. })));
        }
    }

    #[test]
    fn an_empty_file_has_no_chunks() {
        let manifest = Builder::new(ChunkSize::default()).finish(0, ContentDigest::of(b""));
        assert_eq!(Manifest::parse("m", &manifest.to_json()).unwrap(), manifest);
    }

    proptest::proptest! {
        #[test]
        fn any_text_ends_in_an_answer(text in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let _ = Manifest::parse("m", &text);
        }
    }
}
