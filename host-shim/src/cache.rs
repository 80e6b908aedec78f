//! What was found out about files of this host and holds as long as they do not change.
//!
//! An answer is a small file whose name is a hash of what it depends on. One that cannot be kept costs only the next look.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use oci_spec::image::Digest;
use sha2::{Digest as _, Sha256};

use crate::Error;
use crate::snapshot::hash::{self, Scheme};

/// A place for one answer.
#[derive(Debug)]
pub(crate) struct Answer(PathBuf);

impl Answer {
    /// The answer of `kind` that depends on `text` and on what `files` are: device, inode, size and times.
    pub(crate) fn about(cache: &Path, kind: &str, text: &[u8], files: &[&Path]) -> Result<Self, Error> {
        let mut hash = Sha256::new();
        hash.update(text);
        for file in files {
            let it = file.metadata().map_err(Error::io("read", file))?;
            let times = (it.mtime(), it.mtime_nsec(), it.ctime(), it.ctime_nsec());
            hash.update(format!(";{}:{}:{}:{times:?}", it.dev(), it.ino(), it.len()));
        }
        let key: String = hash.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self(cache.join(format!("{kind}-{key}"))))
    }

    /// The answer, if it is known.
    pub(crate) fn read(&self) -> Option<String> {
        std::fs::read_to_string(&self.0).ok()
    }

    /// Keeps the answer: whole or absent, for a reader at the same time.
    pub(crate) fn keep(&self, text: &str) {
        let name = self.0.file_name().unwrap_or_default().to_string_lossy();
        let fresh = self.0.with_file_name(format!(".{name}-{}", std::process::id()));
        let kept = self.0.parent().map_or(Ok(()), std::fs::create_dir_all);
        let kept =
            kept.and_then(|()| std::fs::write(&fresh, text)).and_then(|()| std::fs::rename(&fresh, &self.0));
        if let Err(error) = kept {
            tracing::warn!(%error, path = %self.0.display(), "cannot keep what was found out");
        }
    }
}

/// The SHA-256 of a file that is replaced and never written, as the guest kernel is.
pub(crate) fn digest(file: &Path, cache: &Path) -> Result<Digest, Error> {
    let known = Answer::about(cache, "sha256", b"", &[file])?;
    if let Some(digest) = known.read().and_then(|text| text.parse().ok()) {
        return Ok(digest);
    }
    let input = std::fs::File::open(file).map_err(Error::io("open", file))?;
    let digest = hash::digest(&input, Scheme::Plain).map_err(Error::io("read", file))?;
    known.keep(digest.as_ref());
    Ok(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_holds_until_its_file_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (file, cache) = (dir.path().join("kernel"), dir.path().join("cache"));
        std::fs::write(&file, "one").unwrap();
        let one = digest(&file, &cache).unwrap();
        assert_eq!(digest(&file, &cache).unwrap(), one);
        assert_eq!(std::fs::read_dir(&cache).unwrap().count(), 1);
        let fresh = dir.path().join("fresh");
        std::fs::write(&fresh, "two").unwrap();
        std::fs::rename(&fresh, &file).unwrap();
        assert_ne!(digest(&file, &cache).unwrap(), one);
        let error = digest(&dir.path().join("none"), &cache).unwrap_err();
        assert!(error.to_string().contains("none"), "{error}");
    }
}
