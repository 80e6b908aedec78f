//! What inotify's records mean for a client: no I/O, so that every order of things can be tested.
//!
//! ```text
//! records ──► Core ──► Emit    an event for the client
//!               ▲  ──► Watch   a directory that wants a watch ─┐
//!               │  ──► Unwatch                                 │ the caller adds it, and then reads the names in it
//!               └──────────── added(watch, path, names) ◄──────┘
//! ```
//!
//! A new directory can be filled before its watch exists: the names that are read after the watch was added are reported
//! as created, and the records about them that may still be queued are not reported again.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use envd_proto::filesystem::EventType;
use rustix::fs::inotify::ReadFlags;

use super::super::partial::{CREATING, REPLACING};
use super::super::walk::Name;
use super::record::Record;

/// An event for the client: a path relative to the watched directory, `.` for itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) path: PathBuf,
    pub(super) kind: EventType,
}

/// Something to do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Emit(Change),
    Watch(Wish),
    Unwatch(i32),
}

/// A directory that wants a watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wish {
    /// Relative to the watched directory; empty for itself.
    pub(super) path: PathBuf,
    /// Whether what is in it is news.
    pub(super) report: bool,
    /// It had a watch that turned out to be another directory's: one check is enough.
    again: bool,
}

impl Wish {
    /// The directory that the client named.
    pub(super) fn top() -> Self {
        Self { path: PathBuf::new(), report: false, again: false }
    }
}

/// Records were lost: the kernel's queue was full, or what they mean cannot be told any more.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Lost;

/// Directories that were gone from where a record said, until the records that tell where they are.
const MAX_MISSED: usize = 16 << 10;

/// The watched directories and what is known about them.
#[derive(Debug)]
pub(super) struct Core {
    recursive: bool,
    directories: HashMap<i32, PathBuf>,
    /// Names that were reported when they were found, whose own records may still come.
    found: HashMap<i32, HashSet<OsString>>,
    /// Directories that went from where they were; where to is not known yet.
    moving: Vec<Moving>,
    /// Where a directory was to be watched and none was: it may come with a directory above it that moves.
    missed: Vec<PathBuf>,
    /// Where a directory that moved should be now, with its watch, until a look tells.
    assumed: HashMap<PathBuf, i32>,
    /// Uploads between the two halves of their rename: the cookie, and whether the target is new.
    uploads: Vec<(u32, bool)>,
}

#[derive(Debug)]
struct Moving {
    cookie: u32,
    from: PathBuf,
    /// Its own watch and those below it, with their paths from it.
    directories: Vec<(i32, PathBuf)>,
    /// What came from there meanwhile.
    held: Vec<Record>,
    /// Whether a whole read has passed since.
    old: bool,
}

impl Core {
    pub(super) fn new(recursive: bool) -> Self {
        Self {
            recursive,
            directories: HashMap::new(),
            found: HashMap::new(),
            moving: Vec::new(),
            missed: Vec::new(),
            assumed: HashMap::new(),
            uploads: Vec::new(),
        }
    }

    /// How many directories have a watch.
    pub(super) fn len(&self) -> usize {
        self.directories.len() + self.moving.iter().map(|moving| moving.directories.len()).sum::<usize>()
    }

    /// Whether sub-directories are watched, too.
    pub(super) fn is_recursive(&self) -> bool {
        self.recursive
    }

    /// A wish was fulfilled; `names` were read after that.
    pub(super) fn added(&mut self, watch: i32, wish: Wish, names: Vec<Name>) -> Vec<Action> {
        let mut actions = Vec::new();
        // It was found here after it seemed to go: then what went was another directory of that name.
        for moving in &mut self.moving {
            moving.directories.retain(|(moved, _)| *moved != watch);
            moving.held.retain(|record| record.watch != watch);
        }
        match self.directories.insert(watch, wish.path.clone()) {
            Some(path) if path == wish.path => return actions,
            // A directory has one watch: it is not at that path any more, but perhaps another one is.
            Some(path) if !wish.again => {
                actions.push(Action::Watch(Wish { path, report: true, again: true }))
            }
            _ => {}
        }
        if self.assumed.remove(&wish.path).is_some_and(|assumed| assumed != watch) {
            self.displace(watch, &wish.path, &mut actions);
        }
        for Name { name, directory } in names {
            let path = wish.path.join(&name);
            if wish.report && upload(&name).is_none() {
                actions.push(emit(&path, EventType::Create));
                self.found.entry(watch).or_default().insert(name);
            }
            if self.recursive && directory != Some(false) {
                actions.push(Action::Watch(Wish { path, report: wish.report, again: false }));
            }
        }
        actions
    }

    /// Another directory than the one that `watch` is of was taken to be at `path`, with all that is below it. The record
    /// of where it is comes after the one that led here, and finds it again if it is still in the tree.
    fn displace(&mut self, watch: i32, path: &Path, actions: &mut Vec<Action>) {
        let found = &mut self.found;
        self.directories.retain(|other, at| {
            let keep = *other == watch || !at.starts_with(path);
            if !keep {
                found.remove(other);
                actions.push(Action::Unwatch(*other));
            }
            keep
        });
    }

    /// A wish could not be fulfilled: there is no such directory.
    pub(super) fn missed(&mut self, wish: Wish) -> Result<(), Lost> {
        self.assumed.remove(&wish.path);
        if self.missed.len() == MAX_MISSED {
            return Err(Lost);
        }
        self.missed.push(wish.path);
        Ok(())
    }

    /// Something happened.
    pub(super) fn record(&mut self, record: Record) -> Result<Vec<Action>, Lost> {
        let mut actions = Vec::new();
        self.apply(record, &mut actions)?;
        Ok(actions)
    }

    fn apply(&mut self, record: Record, actions: &mut Vec<Action>) -> Result<(), Lost> {
        let Record { watch, what, cookie, .. } = record;
        if what.contains(ReadFlags::QUEUE_OVERFLOW) {
            return Err(Lost);
        }
        if what.contains(ReadFlags::IGNORED) {
            self.directories.remove(&watch);
            self.found.remove(&watch);
            for moving in &mut self.moving {
                moving.directories.retain(|(moved, _)| *moved != watch);
            }
            return Ok(());
        }
        let Some(directory) = self.directories.get(&watch) else {
            let carries = |moving: &&mut Moving| moving.directories.iter().any(|(moved, _)| *moved == watch);
            if let Some(moving) = self.moving.iter_mut().find(carries) {
                moving.held.push(record);
            }
            return Ok(());
        };
        let Some(name) = record.name else {
            // Of the others, the directory above tells.
            if directory.as_os_str().is_empty() {
                actions.extend(kind_of_top(what).map(|kind| emit(Path::new("."), kind)));
            }
            return Ok(());
        };
        let path = directory.join(&name);
        let directory = what.contains(ReadFlags::ISDIR);
        if let Some(creating) = upload(&name).filter(|_| !directory) {
            if what.contains(ReadFlags::MOVED_FROM) {
                self.uploads.push((cookie, creating));
            }
            return Ok(());
        }
        // Reported already, when it was found.
        let found = self.found.get_mut(&watch).is_some_and(|found| found.remove(&name));
        if what.contains(ReadFlags::CREATE) {
            if !found {
                actions.push(emit(&path, EventType::Create));
            }
            self.want(directory, path, actions);
        } else if what.contains(ReadFlags::MOVED_TO) {
            let upload = self.uploads.iter().position(|(uploaded, _)| *uploaded == cookie);
            let creating = upload.map(|at| self.uploads.swap_remove(at).1);
            if !found && creating != Some(false) {
                actions.push(emit(&path, EventType::Create));
            }
            if creating.is_some() {
                actions.push(emit(&path, EventType::Write));
            }
            self.arrive(directory, cookie, path, actions)?;
        } else if what.contains(ReadFlags::MOVED_FROM) {
            actions.push(emit(&path, EventType::Rename));
            if directory && self.recursive {
                self.depart(cookie, path);
            } else {
                self.forget(&path);
            }
        } else if what.contains(ReadFlags::DELETE) {
            actions.push(emit(&path, EventType::Remove));
            self.forget(&path);
        } else {
            let kind = if what.contains(ReadFlags::MODIFY) { EventType::Write } else { EventType::Chmod };
            actions.push(emit(&path, kind));
            if found {
                self.found.entry(watch).or_default().insert(name);
            }
        }
        Ok(())
    }

    fn want(&self, directory: bool, path: PathBuf, actions: &mut Vec<Action>) {
        if directory && self.recursive {
            actions.push(Action::Watch(Wish { path, report: true, again: false }));
        }
    }

    /// What was there is gone. A directory that was found there is a later one: its own record is still to come, and
    /// then it and what it holds are news.
    fn forget(&mut self, path: &Path) {
        if self.recursive {
            let found = &mut self.found;
            self.directories.retain(|watch, at| {
                let keep = !at.starts_with(path);
                if !keep {
                    found.remove(watch);
                }
                keep
            });
        }
    }

    fn depart(&mut self, cookie: u32, path: PathBuf) {
        let mut directories = Vec::new();
        self.directories.retain(|watch, at| match at.strip_prefix(&path) {
            Ok(below) => {
                directories.push((*watch, below.to_owned()));
                false
            }
            Err(_) => true,
        });
        self.moving.push(Moving { cookie, from: path, directories, held: Vec::new(), old: false });
    }

    fn arrive(
        &mut self,
        directory: bool,
        cookie: u32,
        path: PathBuf,
        actions: &mut Vec<Action>,
    ) -> Result<(), Lost> {
        let Some(at) = self.moving.iter().position(|moving| moving.cookie == cookie && directory) else {
            self.want(directory, path, actions);
            return Ok(());
        };
        let moving = self.moving.swap_remove(at);
        // If the watch is its own, nothing more comes of this; it can be that of a later directory of the old name.
        self.want(directory, path.clone(), actions);
        for (watch, below) in moving.directories {
            // Joining an empty path would add a slash, which compares equal but prints.
            let at = if below.as_os_str().is_empty() {
                self.assumed.insert(path.clone(), watch);
                path.clone()
            } else {
                path.join(below)
            };
            self.directories.insert(watch, at);
        }
        for missed in &self.missed {
            if let Ok(below) = missed.strip_prefix(&moving.from)
                && !below.as_os_str().is_empty()
            {
                self.want(true, path.join(below), actions);
            }
        }
        moving.held.into_iter().try_for_each(|record| self.apply(record, actions))
    }

    /// All records of one read are done. The second half of a rename follows at once, so what has not arrived by the end
    /// of the next read has left the tree.
    pub(super) fn end_of_read(&mut self) -> Vec<Action> {
        let (gone, waiting) = std::mem::take(&mut self.moving).into_iter().partition(|moving| moving.old);
        self.moving = waiting;
        self.moving.iter_mut().for_each(|moving| moving.old = true);
        let gone: Vec<Moving> = gone;
        for (watch, _) in gone.iter().flat_map(|moving| &moving.directories) {
            self.found.remove(watch);
        }
        gone.into_iter()
            .flat_map(|moving| moving.directories)
            .map(|(watch, _)| Action::Unwatch(watch))
            .collect()
    }

    /// Nothing is queued: no record from before this moment will come any more.
    pub(super) fn drained(&mut self) {
        self.found.clear();
        self.missed.clear();
        self.assumed.clear();
        self.uploads.clear();
    }
}

fn kind_of_top(what: ReadFlags) -> Option<EventType> {
    if what.intersects(ReadFlags::DELETE_SELF | ReadFlags::UNMOUNT) {
        Some(EventType::Remove)
    } else if what.contains(ReadFlags::MOVE_SELF) {
        Some(EventType::Rename)
    } else if what.contains(ReadFlags::ATTRIB) {
        Some(EventType::Chmod)
    } else {
        None
    }
}

/// Whether the name is a temporary one of an upload, and then whether its target is new.
fn upload(name: &std::ffi::OsStr) -> Option<bool> {
    let name = name.as_bytes();
    let creating = name.starts_with(CREATING.as_bytes());
    (creating || name.starts_with(REPLACING.as_bytes())).then_some(creating)
}

fn emit(path: &Path, kind: EventType) -> Action {
    Action::Emit(Change { path: path.to_owned(), kind })
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
