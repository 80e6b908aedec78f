//! Stamps: this very file had this digest when somebody hashed it.
//!
//! ```text
//! CACHE/verified/<device>-<inode>    length, mtime, time of birth, digest
//! ```
//!
//! A restore maps a RAM of hundreds of MiB in some milliseconds; hashing it each time would cost more than the restore.
//! The stamp is of the inode, so the hard links of one base share it. The ctime is not part of it: linking and
//! unlinking the other names of an inode changes that, which is what every snapshot of a clone does. What that leaves
//! undetected is a write that sets the mtime back; whoever can do that can write stamps too. Copies are other inodes,
//! and verified in full.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::Digest;

/// Stamps that are kept. Each is a hundred bytes; the oldest half goes when there are more.
const MAX_STAMPS: usize = 4096;

/// A file that was changed this recently may be changed again without another mtime: the clock behind mtimes ticks every
/// 1 to 10 ms.
const SETTLED: Duration = Duration::from_millis(100);

/// Whether a stamp says that `file` has that digest.
pub(super) fn is_stamped(cache: &Path, file: &File, digest: &Digest) -> bool {
    let Ok(metadata) = file.metadata() else { return false };
    fs::read_to_string(stamp_path(cache, &metadata)).is_ok_and(|text| text == stamp(&metadata, digest))
}

/// Remembers that `file` has that digest. `before` is what it was before it was hashed; a file that was
/// changed since, or just then, is not remembered.
pub(super) fn remember(cache: &Path, file: &File, before: &Metadata, digest: &Digest, ours: Writer) {
    let kept = (|| {
        let metadata = file.metadata()?;
        let path = stamp_path(cache, &metadata);
        let text = stamp(&metadata, digest);
        let settled = metadata.modified()? + SETTLED < SystemTime::now();
        if text != stamp(before, digest) || !(settled || ours == Writer::Us) {
            return Ok(());
        }
        let folder = cache.join(FOLDER);
        fs::create_dir_all(&folder)?;
        forget_oldest(&folder)?;
        // Whole or absent, for a reader at the same time.
        let fresh = folder.join(format!(".{}-{:?}", std::process::id(), std::thread::current().id()));
        fs::write(&fresh, text)?;
        fs::rename(&fresh, &path)
    })();
    if let Err(error) = kept {
        // It costs only the next verification.
        let error: io::Error = error;
        tracing::warn!(%error, cache = %cache.display(), "cannot keep that a snapshot's file was verified");
    }
}

/// Who wrote a file that is remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Writer {
    /// This process, and nobody else can be writing still.
    Us,
    /// Somebody.
    Anyone,
}

const FOLDER: &str = "verified";

fn stamp_path(cache: &Path, metadata: &Metadata) -> PathBuf {
    cache.join(FOLDER).join(format!("{:x}-{}", metadata.dev(), metadata.ino()))
}

fn stamp(metadata: &Metadata, digest: &Digest) -> String {
    // An inode number is used again; the birth tells its users apart, where the file system keeps it.
    let born = metadata.created().ok().and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
    format!(
        "{} {}.{:09} {} {}\n",
        metadata.len(),
        metadata.mtime(),
        metadata.mtime_nsec(),
        born.map_or(0, |born| born.as_nanos()),
        digest
    )
}

fn forget_oldest(folder: &Path) -> io::Result<()> {
    let names = fs::read_dir(folder)?.collect::<io::Result<Vec<_>>>()?;
    if names.len() < MAX_STAMPS {
        return Ok(());
    }
    // Another process may be doing the same: what is gone already is fine.
    let mut stamps: Vec<_> = names
        .into_iter()
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    stamps.sort();
    for (_, path) in &stamps[..stamps.len() / 2] {
        let _ = fs::remove_file(path);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::snapshot::hash::digest_of;

    #[test]
    fn a_stamp_is_of_this_inode_with_this_mtime_and_digest() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("cache");
        let path = dir.path().join("file");
        fs::write(&path, "contents").unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let before = file.metadata().unwrap();
        let right = digest_of(b"contents");
        assert!(!is_stamped(&cache, &file, &right), "no cache yet");
        remember(&cache, &file, &before, &right, Writer::Us);
        assert!(is_stamped(&cache, &file, &right));
        assert!(!is_stamped(&cache, &file, &digest_of(b"other")));

        // Another name is the same file; a copy with all its times is another one.
        fs::hard_link(&path, dir.path().join("link")).unwrap();
        assert!(is_stamped(&cache, &File::open(dir.path().join("link")).unwrap(), &right));
        let copy = File::create(dir.path().join("copy")).unwrap();
        (&copy).write_all(b"contents").unwrap();
        copy.set_modified(before.modified().unwrap()).unwrap();
        assert!(!is_stamped(&cache, &copy, &right));

        file.set_modified(before.modified().unwrap() + Duration::from_nanos(1_000_000)).unwrap();
        assert!(!is_stamped(&cache, &file, &right), "another mtime");
        file.set_modified(before.modified().unwrap()).unwrap();
        file.set_len(7).unwrap();
        file.set_modified(before.modified().unwrap()).unwrap();
        assert!(!is_stamped(&cache, &file, &right), "another length");
    }

    #[test]
    fn what_changes_while_it_is_hashed_is_not_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let file =
            File::options().create_new(true).read(true).write(true).open(dir.path().join("f")).unwrap();
        file.write_all_at(b"contents", 0).unwrap();
        let right = digest_of(b"contents");
        let fresh = file.metadata().unwrap();
        remember(dir.path(), &file, &fresh, &right, Writer::Anyone);
        // On a machine that took 100 ms from the write to here, it had settled.
        let slow = fresh.modified().unwrap() + SETTLED < SystemTime::now();
        assert!(slow || !is_stamped(dir.path(), &file, &right), "changed just now, by anyone");
        let old = SystemTime::now() - Duration::from_secs(60);
        file.set_modified(old).unwrap();
        remember(dir.path(), &file, &fresh, &right, Writer::Us);
        assert!(!is_stamped(dir.path(), &file, &right), "changed since");
        remember(dir.path(), &file, &file.metadata().unwrap(), &right, Writer::Anyone);
        assert!(is_stamped(dir.path(), &file, &right));
    }

    #[test]
    fn stamps_do_not_pile_up() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join(FOLDER);
        fs::create_dir(&folder).unwrap();
        for index in 0..MAX_STAMPS {
            fs::write(folder.join(index.to_string()), "").unwrap();
        }
        let file = File::create(dir.path().join("f")).unwrap();
        remember(dir.path(), &file, &file.metadata().unwrap(), &digest_of(b""), Writer::Us);
        assert!(is_stamped(dir.path(), &file, &digest_of(b"")));
        assert_eq!(fs::read_dir(&folder).unwrap().count(), MAX_STAMPS / 2 + 1);
    }
}
