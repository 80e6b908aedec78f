//! Files of this machine.
//!
//! What comes in may be a sandbox's invention: every path is looked up by the kernel below the folder that the user named,
//! through no link, so that a link which was copied a moment before leads nowhere. Setuid, setgid and sticky bits are left
//! out, as `cp` does it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT, fchmod, futimens, linkat, mkdirat,
    openat, openat2, renameat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;
use sandbox_folder::client::Attributes;
use tokio::io::{AsyncRead, AsyncReadExt};

use super::item::{Contents, Item, What, join, split};
use super::{Progress, Sink};
use crate::verbs::error::Error;

/// How much of a file is written at a time.
const CHUNK: usize = 256 << 10;

/// What the names of files begin with that are not whole yet.
const TEMPORARY: &str = ".host-shim-cp-";

/// Gives a file or a tree to `sink`; links are not followed.
pub(super) async fn pour(
    top: &Path,
    name: Vec<u8>,
    sink: &mut Sink,
    progress: &mut Progress,
) -> Result<(), Error> {
    let mut pending = vec![(top.to_owned(), name)];
    while let Some((from, path)) = pending.pop() {
        let failed = |error| Error::io("read", &from)(error);
        let metadata = fs::symlink_metadata(&from).map_err(failed)?;
        let mtime = Some((metadata.mtime(), u32::try_from(metadata.mtime_nsec()).unwrap_or(0)));
        let attributes = Attributes { mode: metadata.mode() & 0o7777, mtime };
        let what = if metadata.is_dir() {
            let mut names = Vec::new();
            for entry in fs::read_dir(&from).map_err(failed)? {
                names.push(entry.map_err(failed)?.file_name());
            }
            // The last is taken first.
            names.sort_unstable_by(|a, b| b.cmp(a));
            pending.extend(names.iter().map(|name| (from.join(name), join(&path, name.as_bytes()))));
            What::Directory
        } else if metadata.is_symlink() {
            What::Symlink(fs::read_link(&from).map_err(failed)?.into_os_string().into_vec())
        } else if metadata.is_file() {
            // Something else may stand there by now; a FIFO would be waited for.
            let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
            let file = File::options().read(true).custom_flags(flags).open(&from).map_err(failed)?;
            let length = file.metadata().map_err(failed)?.len();
            let file = tokio::fs::File::from_std(file);
            What::File { length, contents: Box::new(tokio::io::BufReader::with_capacity(CHUNK, file)) }
        } else {
            progress.leave_out(from.as_os_str().as_bytes(), "it is no file, directory or link");
            continue;
        };
        sink.put(Item { path, what, attributes }, progress).await?;
    }
    Ok(())
}

/// A folder that items are put into.
pub(super) struct LocalSink {
    folder: PathBuf,
    root: OwnedFd,
    /// The folder of the last item, which is that of the next one, most likely.
    above: Option<(Vec<u8>, OwnedFd)>,
    /// They get their attributes when everything is in them.
    directories: Vec<(Vec<u8>, Attributes)>,
    number: u64,
}

/// A file under a name that is not its own yet; dropped before, it is removed.
struct Temporary<'a> {
    above: &'a OwnedFd,
    name: String,
    kept: bool,
}

impl LocalSink {
    pub(super) fn open(folder: &Path) -> Result<Self, Error> {
        let open =
            rustix::fs::open(folder, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        let root = open.map_err(|error| Error::io("open", folder)(error.into()))?;
        Ok(Self { folder: folder.to_owned(), root, above: None, directories: Vec::new(), number: 0 })
    }

    pub(super) async fn put(&mut self, item: Item) -> Result<(), Error> {
        let path = item.path.clone();
        let put = self.try_put(item).await;
        put.map_err(|error| Error::io("write", self.folder.join(std::ffi::OsStr::from_bytes(&path)))(error))
    }

    async fn try_put(&mut self, Item { path, what, attributes }: Item) -> io::Result<()> {
        if path.is_empty() {
            // The place itself is there, and stays as it is.
            return Ok(());
        }
        let (above, name) = split(&path);
        if self.above.as_ref().is_none_or(|(known, _)| known != above) {
            self.above = Some((above.to_vec(), self.directory(above)?));
        }
        self.number += 1;
        let number = self.number;
        let Some((_, above)) = &self.above else { return Err(io::ErrorKind::NotFound.into()) };
        let temporary = || Temporary::new(above, number);
        match what {
            What::Directory => {
                match mkdirat(above, name, Mode::RWXU) {
                    // One that is there must be one: the next item looks it up as one.
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(error) => return Err(error.into()),
                }
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                openat(above, name, flags, Mode::empty())?;
                self.directories.push((path, attributes));
            }
            What::File { contents, .. } => {
                let temporary = temporary();
                write(&temporary, contents, attributes).await?;
                temporary.publish(name)?;
            }
            What::Symlink(text) => {
                let temporary = temporary();
                symlinkat(text, above, &temporary.name)?;
                if let Some(times) = times(attributes) {
                    utimensat(above, &temporary.name, &times, AtFlags::SYMLINK_NOFOLLOW)?;
                }
                temporary.publish(name)?;
            }
            What::Link(of) => {
                let (of_above, of_name) = split(&of);
                let of_above = self.directory(of_above)?;
                let temporary = temporary();
                linkat(&of_above, of_name, above, &temporary.name, AtFlags::empty())?;
                temporary.publish(name)?;
            }
        }
        Ok(())
    }

    /// Gives the directories their modes and times, the deepest first.
    pub(super) fn finish(self) -> Result<(), Error> {
        for (path, attributes) in self.directories.iter().rev() {
            let give = || {
                let directory = self.directory(path)?;
                // What was opened by its path alone takes no attributes.
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let directory = openat(&directory, ".", flags, Mode::empty())?;
                give(directory.as_fd(), *attributes)
            };
            give().map_err(|error| {
                Error::io("write", self.folder.join(std::ffi::OsStr::from_bytes(path)))(error)
            })?;
        }
        Ok(())
    }

    /// A directory below the root, through no link.
    fn directory(&self, path: &[u8]) -> io::Result<OwnedFd> {
        let path: &[u8] = if path.is_empty() { b"." } else { path };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match openat2(&self.root, path, flags, Mode::empty(), resolve) {
            Err(Errno::LOOP) => Err(io::Error::new(
                io::ErrorKind::NotADirectory,
                "a link stands where the copy has a directory",
            )),
            opened => Ok(opened?),
        }
    }
}

impl<'a> Temporary<'a> {
    fn new(above: &'a OwnedFd, number: u64) -> Self {
        Self { above, name: format!("{TEMPORARY}{}-{number}", std::process::id()), kept: false }
    }

    fn create(&self) -> io::Result<File> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(openat(self.above, &self.name, flags, Mode::RUSR | Mode::WUSR)?.into())
    }

    fn publish(mut self, name: &[u8]) -> io::Result<()> {
        renameat(self.above, &self.name, self.above, name)?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        if !self.kept {
            // Nothing more can be done about one that does not go.
            let _ = unlinkat(self.above, &self.name, AtFlags::empty());
        }
    }
}

async fn write(temporary: &Temporary<'_>, mut contents: Contents, attributes: Attributes) -> io::Result<()> {
    let mut file = temporary.create()?;
    copy(&mut contents, &mut file).await?;
    give(file.as_fd(), attributes)
}

async fn copy(contents: &mut (impl AsyncRead + Unpin), file: &mut File) -> io::Result<()> {
    let mut chunk = Vec::with_capacity(CHUNK);
    loop {
        chunk.clear();
        while chunk.len() < CHUNK {
            if contents.read_buf(&mut chunk).await? == 0 {
                break;
            }
        }
        if chunk.is_empty() {
            return Ok(());
        }
        file.write_all(&chunk)?;
    }
}

fn give(file: impl AsFd, attributes: Attributes) -> io::Result<()> {
    fchmod(&file, Mode::from_raw_mode(attributes.mode & 0o777))?;
    match times(attributes) {
        Some(times) => Ok(futimens(&file, &times)?),
        None => Ok(()),
    }
}

fn times(attributes: Attributes) -> Option<Timestamps> {
    let (seconds, nanos) = attributes.mtime?;
    Some(Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        // A sandbox can say anything.
        last_modification: Timespec { tv_sec: seconds, tv_nsec: i64::from(nanos.min(999_999_999)) },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn file(path: &str, contents: &'static [u8]) -> Item {
        let what = What::File { length: contents.len() as u64, contents: Box::new(contents) };
        Item {
            path: path.into(),
            what,
            attributes: Attributes { mode: 0o4755, mtime: Some((1_000_000_000, 5)) },
        }
    }

    fn entry(path: &str, what: What) -> Item {
        Item {
            path: path.into(),
            what,
            attributes: Attributes { mode: 0o750, mtime: Some((1_000_000_000, 5)) },
        }
    }

    #[tokio::test]
    async fn a_tree_is_made_with_its_attributes() {
        let dir = tempfile::tempdir().unwrap();
        let mut sink = LocalSink::open(dir.path()).unwrap();
        sink.put(entry("d", What::Directory)).await.unwrap();
        sink.put(file("d/f", b"hello")).await.unwrap();
        sink.put(entry("d/l", What::Symlink(b"/nowhere".to_vec()))).await.unwrap();
        sink.put(entry("d/again", What::Link(b"d/f".to_vec()))).await.unwrap();
        sink.finish().unwrap();
        let of = |path: &str| fs::symlink_metadata(dir.path().join(path)).unwrap();
        assert_eq!(of("d/f").permissions().mode() & 0o7777, 0o755, "no setuid here");
        assert_eq!(
            (of("d").mtime(), of("d").mtime_nsec(), of("d/l").mtime()),
            (1_000_000_000, 5, 1_000_000_000)
        );
        assert_eq!((of("d").mode() & 0o7777, of("d/f").ino()), (0o750, of("d/again").ino()));
        assert_eq!(fs::read_link(dir.path().join("d/l")).unwrap(), Path::new("/nowhere"));
        assert_eq!(fs::read_dir(dir.path().join("d")).unwrap().count(), 3, "nothing temporary is left");
    }

    #[tokio::test]
    async fn no_link_leads_out_of_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("in"), dir.path().join("out"));
        fs::create_dir(&inside).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("file"), b"mine").unwrap();
        let mut sink = LocalSink::open(&inside).unwrap();
        let link = |path: &str, text: &Path| entry(path, What::Symlink(text.as_os_str().as_bytes().to_vec()));
        sink.put(link("a", &outside)).await.unwrap();
        sink.put(link("f", &outside.join("file"))).await.unwrap();
        // A directory where the copy has made a link, and a file behind it.
        assert!(sink.put(entry("a", What::Directory)).await.is_err());
        let error = sink.put(file("a/file", b"theirs")).await.unwrap_err().to_string();
        assert!(error.contains("a link stands where the copy has a directory"), "{error}");
        assert!(sink.put(entry("x", What::Link(b"a/file".to_vec()))).await.is_err());
        assert!(sink.put(file("../out/file", b"theirs")).await.is_err());
        // A file in the place of a link replaces the link.
        sink.put(file("f", b"theirs")).await.unwrap();
        assert_eq!(fs::read(outside.join("file")).unwrap(), b"mine");
        assert_eq!(fs::read(inside.join("f")).unwrap(), b"theirs");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn what_breaks_off_leaves_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("f"), b"old").unwrap();
        symlink("f", dir.path().join("l")).unwrap();
        let mut sink = LocalSink::open(dir.path()).unwrap();
        let (reader, mut writer) = tokio::io::duplex(64);
        tokio::io::AsyncWriteExt::write_all(&mut writer, b"half").await.unwrap();
        let what = What::File { length: 100, contents: Box::new(reader) };
        let item = Item { path: b"f".to_vec(), what, attributes: Attributes::default() };
        // Given up while it waits for more.
        tokio::select! {
            biased;
            _ = sink.put(item) => panic!("it had no end"),
            () = std::future::ready(()) => {}
        }
        assert_eq!(fs::read(dir.path().join("f")).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
