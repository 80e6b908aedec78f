//! A watched tree: the inotify descriptor, and the thread of the root that adds its watches.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use envd_channel::name;
use envd_proto::filesystem::{EntryInfo, EventType, FilesystemEvent};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{Mode, OFlags, ResolveFlags, fstat, fstatfs, open, openat2};
use tokio::net::unix::pipe;

use super::super::entry::entry;
use super::super::operations::io_error;
use super::super::walk::Walk;
use super::core::{Action, Change, Core, Lost, Wish};
use super::record::{BUFFER, Record, records};
use crate::connect::{Code, Error};
use crate::root::Root;
use crate::users::UserDatabase;

/// Directories that all watchers together may watch; the kernel takes about 1 KiB for each.
const MAX_DIRECTORIES: usize = 32 << 10;

/// Names that are read of one new directory: as many records as the kernel queues.
const MAX_FOUND: usize = 16 << 10;

/// `f_type` of file systems that other machines change without the kernel's knowledge (statfs(2)); FUSE does not say
/// what is behind it.
const NETWORK: [(u32, &str); 8] = [
    (0x6969, "NFS"),
    (0x517b, "SMB"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB2"),
    (0x0102_1997, "9P"),
    (0x00c3_6400, "Ceph"),
    (0x5346_414f, "AFS"),
    (0x6573_5546, "FUSE"),
];

/// What a client wants to watch.
#[derive(Clone, Debug)]
pub(super) struct Order {
    pub(super) path: PathBuf,
    pub(super) recursive: bool,
    pub(super) include_entry: bool,
    pub(super) allow_network_mounts: bool,
}

/// A watched tree.
pub(super) struct Tree {
    shared: Arc<Shared>,
    root: Root,
    core: Core,
    buffer: Vec<u8>,
}

struct Shared {
    order: Order,
    /// Of inotify: tokio's type is used for its readiness and its read.
    inotify: pipe::Receiver,
    /// Device and inode of the directory: an open descriptor would keep the kernel from telling that it is removed.
    top: (u64, u64),
    directories: Share,
}

/// What one tree has of [`MAX_DIRECTORIES`].
struct Share {
    all: Arc<AtomicUsize>,
    own: AtomicUsize,
}

impl Tree {
    /// Begins to watch. `watched` counts the directories of all trees.
    pub(super) async fn open(root: &Root, order: Order, watched: &Arc<AtomicUsize>) -> Result<Self, Error> {
        let path = order.path.clone();
        let failed = |error: io::Error| io_error("cannot watch", &path, &error);
        let opened = order.clone();
        let top = root.run(move || Ok(check_top(&opened))).await.map_err(failed)??;
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC);
        let inotify = inotify.map_err(|error| match error {
            rustix::io::Errno::MFILE => exhausted("the system has no more watchers: remove some"),
            error => failed(error.into()),
        })?;
        let inotify = pipe::Receiver::from_owned_fd_unchecked(inotify).map_err(failed)?;
        let directories = Share { all: Arc::clone(watched), own: AtomicUsize::new(0) };
        let core = Core::new(order.recursive);
        let shared = Arc::new(Shared { order, inotify, top, directories });
        let mut tree = Self { shared, root: root.clone(), core, buffer: vec![0; BUFFER] };
        tree.on_root(|shared, core| {
            shared.perform(core, vec![Action::Watch(Wish::top())])?;
            if core.len() == 0 {
                return Err(Error::new(Code::NotFound, "the directory is gone"));
            }
            Ok(Vec::new())
        })
        .await?;
        Ok(tree)
    }

    /// The next events; waits until there are some. After an error the tree is of no more use.
    pub(super) async fn next(&mut self) -> Result<Vec<FilesystemEvent>, Error> {
        let failed = |error: io::Error| Error::new(Code::Internal, format!("reading the watches: {error}"));
        loop {
            self.shared.inotify.readable().await.map_err(failed)?;
            let length = match self.shared.inotify.try_read(&mut self.buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.core.drained();
                    continue;
                }
                Err(error) => return Err(failed(error)),
            };
            let batch = records(&self.buffer[..length]);
            let events = if self.core.is_recursive() || self.shared.order.include_entry {
                self.on_root(move |shared, core| shared.digest(core, batch)).await?
            } else {
                // Nothing of this touches the file system.
                self.shared.digest(&mut self.core, batch)?
            };
            if !events.is_empty() {
                return Ok(events);
            }
        }
    }

    async fn on_root(
        &mut self,
        job: impl FnOnce(&Shared, &mut Core) -> Result<Vec<FilesystemEvent>, Error> + Send + 'static,
    ) -> Result<Vec<FilesystemEvent>, Error> {
        let shared = Arc::clone(&self.shared);
        let mut core = std::mem::replace(&mut self.core, Core::new(false));
        let run = self.root.run(move || {
            let result = job(&shared, &mut core);
            Ok((core, result))
        });
        let (core, result) =
            run.await.map_err(|error| io_error("cannot watch", &self.shared.order.path, &error))?;
        self.core = core;
        result
    }
}

impl Shared {
    fn digest(&self, core: &mut Core, batch: Vec<Record>) -> Result<Vec<FilesystemEvent>, Error> {
        let mut changes = Vec::new();
        for record in batch {
            let actions = core.record(record).map_err(lost)?;
            changes.extend(self.perform(core, actions)?);
        }
        let ended = core.end_of_read();
        changes.extend(self.perform(core, ended)?);
        self.directories.set(core.len())?;
        let users = match self.order.include_entry {
            true => Some(UserDatabase::load().unwrap_or_default()),
            false => None,
        };
        Ok(changes.into_iter().map(|change| self.event(change, users.as_ref())).collect())
    }

    /// Does what the core wants, and what follows from that.
    fn perform(&self, core: &mut Core, actions: Vec<Action>) -> Result<Vec<Change>, Error> {
        let mut changes = Vec::new();
        let mut pending: Vec<Action> = actions.into_iter().rev().collect();
        while let Some(action) = pending.pop() {
            match action {
                Action::Emit(change) => changes.push(change),
                // It went with its directory.
                Action::Unwatch(watch) => drop(inotify::remove_watch(&self.inotify, watch)),
                Action::Watch(wish) => pending.extend(self.watch(core, wish)?.into_iter().rev()),
            }
        }
        Ok(changes)
    }

    fn watch(&self, core: &mut Core, wish: Wish) -> Result<Vec<Action>, Error> {
        let failed = |error: io::Error| io_error("cannot watch", &self.order.path.join(&wish.path), &error);
        let (walk, watch) = match self.add(&wish.path) {
            Ok(added) => added,
            // Gone again, or no directory: there is nothing to watch.
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
                    || error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) =>
            {
                core.missed(wish).map_err(lost)?;
                return Ok(Vec::new());
            }
            Err(error) if error.kind() == io::ErrorKind::StorageFull => {
                return Err(exhausted(
                    "the kernel has no more watches (fs.inotify.max_user_watches): watch a smaller tree",
                ));
            }
            Err(error) => return Err(failed(error)),
        };
        let wanted =
            |directory: Option<bool>| wish.report || (core.is_recursive() && directory != Some(false));
        let (names, more) = match walk.names_where(MAX_FOUND, wanted) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Default::default(),
            names => names.map_err(failed)?,
        };
        if more {
            let what = self.order.path.join(&wish.path);
            return Err(exhausted(format!(
                "'{}' holds more than {MAX_FOUND} names: they cannot be reported; watch it anew",
                what.display()
            )));
        }
        let actions = core.added(watch, wish, names);
        self.directories.set(core.len())?;
        Ok(actions)
    }

    fn add(&self, path: &Path) -> io::Result<(Walk, i32)> {
        let walk = Walk::begin_at(self.open(path)?)?;
        let what = WatchFlags::CREATE
            | WatchFlags::MODIFY
            | WatchFlags::ATTRIB
            | WatchFlags::DELETE
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::MOVE_SELF
            | WatchFlags::ONLYDIR
            | WatchFlags::EXCL_UNLINK;
        let watch = inotify::add_watch(&self.inotify, ".", what)?;
        Ok((walk, watch))
    }

    /// A directory of the tree, however the tree changes: no link leads to another one.
    fn open(&self, path: &Path) -> io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let top = open(&self.order.path, TOP, Mode::empty())?;
        if identity(&top)? != self.top {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(openat2(top, path, flags, Mode::empty(), resolve)?)
    }

    fn event(&self, change: Change, users: Option<&UserDatabase>) -> FilesystemEvent {
        let still_there = matches!(change.kind, EventType::Create | EventType::Write | EventType::Chmod);
        let users = users.filter(|_| still_there);
        FilesystemEvent {
            name: name::encode(&change.path),
            r#type: change.kind.into(),
            entry: users.and_then(|users| self.entry(&change.path, users)),
        }
    }

    /// `None` when it is gone by now.
    fn entry(&self, path: &Path, users: &UserDatabase) -> Option<EntryInfo> {
        let _walk = Walk::begin_at(self.open(path.parent().unwrap_or(Path::new(""))).ok()?).ok()?;
        let shown = if path == Path::new(".") { self.order.path.clone() } else { self.order.path.join(path) };
        entry(Path::new(path.file_name().unwrap_or(OsStr::new("."))), &shown, users).ok()
    }
}

const TOP: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

fn identity(directory: &OwnedFd) -> io::Result<(u64, u64)> {
    let status = fstat(directory)?;
    Ok((status.st_dev, status.st_ino))
}

/// The name of a network file system, by the type that statfs gives it.
fn network(kind: i64) -> Option<&'static str> {
    // The kernel's type is as wide as a word, and may be signed; the magic numbers have 32 bits.
    NETWORK.iter().find(|(magic, _)| *magic == kind as u32).map(|(_, system)| *system)
}

fn check_top(order: &Order) -> Result<(u64, u64), Error> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::NotADirectory => {
            Error::new(Code::InvalidArgument, format!("path is not a directory: {}", order.path.display()))
        }
        _ => io_error("cannot watch", &order.path, &error),
    };
    let top = open(&order.path, TOP, Mode::empty()).map_err(|error| failed(error.into()))?;
    if !order.allow_network_mounts {
        let kind = fstatfs(&top).map_err(|error| failed(error.into()))?.f_type;
        if let Some(system) = network(kind as i64) {
            let message = format!(
                "'{}' is on a network mount ({system}), where changes that others make are not seen: set \
                 allow_network_mounts to watch it all the same",
                order.path.display()
            );
            return Err(Error::new(Code::InvalidArgument, message));
        }
    }
    identity(&top).map_err(failed)
}

impl Share {
    fn set(&self, own: usize) -> Result<(), Error> {
        let before = self.own.swap(own, Ordering::Relaxed);
        let all = if own >= before {
            self.all.fetch_add(own - before, Ordering::Relaxed) + (own - before)
        } else {
            self.all.fetch_sub(before - own, Ordering::Relaxed) - (before - own)
        };
        if own > before && all > MAX_DIRECTORIES {
            return Err(exhausted(format!(
                "more than {MAX_DIRECTORIES} directories would be watched: watch a smaller tree"
            )));
        }
        Ok(())
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.all.fetch_sub(*self.own.get_mut(), Ordering::Relaxed);
    }
}

fn lost(Lost: Lost) -> Error {
    exhausted("events were lost: more happened than was read; look at the directory, and watch it anew")
}

fn exhausted(message: impl Into<String>) -> Error {
    Error::new(Code::ResourceExhausted, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_mounts_are_told_by_their_type() {
        // As statfs(2) and linux/magic.h have them.
        for (kind, system) in [
            (0x6969, Some("NFS")),
            (0x517b, Some("SMB")),
            (0xff53_4d42, Some("CIFS")),
            // Where the kernel's word has 32 bits.
            (i64::from(0xff53_4d42_u32 as i32), Some("CIFS")),
            (0xfe53_4d42, Some("SMB2")),
            (0x0102_1997, Some("9P")),
            (0x00c3_6400, Some("Ceph")),
            (0x5346_414f, Some("AFS")),
            (0x6573_5546, Some("FUSE")),
            // ext4, tmpfs, overlay, xfs, btrfs.
            (0xef53, None),
            (0x0102_1994, None),
            (0x794c_7630, None),
            (0x5846_5342, None),
            (0x9123_683e, None),
        ] {
            assert_eq!(network(kind), system, "{kind:#x}");
        }
    }

    #[test]
    fn a_local_directory_is_watched_without_the_flag() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_owned();
        let order = Order { path, recursive: false, include_entry: false, allow_network_mounts: false };
        check_top(&order).unwrap();
    }
}
