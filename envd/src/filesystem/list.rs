//! ListDir.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use envd_channel::name;
use envd_proto::filesystem::{EntryInfo, ListDirRequest};

use super::entry::{entry, link_text};
use super::operations::io_error;
use super::walk::Walk;
use crate::connect::{Code, Error};
use crate::users::UserDatabase;

/// Entries that one ListDir gives; more would not fit into a message.
const MAX_ENTRIES: usize = 10_000;

/// What of a directory is wanted.
#[derive(Debug)]
pub(super) struct Wish {
    depth: u32,
    exact: bool,
    after: Option<OsString>,
}

impl Wish {
    pub(super) fn parse(request: &ListDirRequest) -> Result<Self, Error> {
        let ListDirRequest { path: _, depth, exact, after } = request;
        if after.is_some() && *depth > 1 {
            let message = format!("'after' is about one directory: expected depth 1, got {depth}");
            return Err(Error::new(Code::InvalidArgument, message));
        }
        let after = after.as_deref().map(|after| name::decode(after).into_os_string());
        Ok(Self { depth: *depth, exact: *exact, after })
    }
}

/// The entries below a directory, each directory before what is in it, by name; links are not followed.
pub(super) fn list(path: &Path, wish: &Wish, users: &UserDatabase) -> Result<Vec<EntryInfo>, Error> {
    let failed = |shown: &Path, error: &io::Error| io_error("cannot list", shown, error);
    let mut walk = Walk::begin(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotADirectory => {
            Error::new(Code::InvalidArgument, format!("path is not a directory: {}", path.display()))
        }
        _ => failed(path, &error),
    })?;
    let mut found = Vec::new();
    // How the client named the way to where the walk is, and what is still to be shown of each directory on it.
    let mut shown = path.to_owned();
    let mut pending = 0;
    let mut open = vec![match &wish.after {
        Some(after) => names_after(&walk, path, after, &mut pending)?,
        None => names(&walk, path, &mut pending)?,
    }];
    while let Some(names_here) = open.last_mut() {
        let Some(name) = names_here.pop() else {
            open.pop();
            if !open.is_empty() {
                walk.ascend().map_err(|error| failed(&shown, &error))?;
                shown.pop();
            }
            continue;
        };
        pending -= 1;
        let at = PathBuf::from(&name);
        let path_shown = shown.join(&name);
        let entry = match entry(&at, &path_shown, users) {
            Ok(entry) if wish.exact => EntryInfo { link_text: link_text(&at), ..entry },
            Ok(entry) => entry,
            Err(error) if gone(&error) => continue,
            Err(error) => return Err(failed(&path_shown, &error)),
        };
        let directory = entry.symlink_target.is_none() && entry.permissions.starts_with('d');
        found.push(entry);
        if directory && open.len() < wish.depth.max(1) as usize {
            match walk.descend(&name) {
                Ok(()) => {
                    shown = path_shown;
                    pending += found.len();
                    let inside = names(&walk, path, &mut pending)?;
                    pending -= found.len();
                    open.push(inside);
                }
                Err(error) if gone(&error) => {}
                Err(error) => return Err(failed(&path_shown, &error)),
            }
        }
    }
    Ok(found)
}

/// The names in the directory, the first one last. `pending` counts what was found and what is still to come.
fn names(walk: &Walk, path: &Path, pending: &mut usize) -> Result<Vec<OsString>, Error> {
    let room = MAX_ENTRIES.saturating_sub(*pending);
    let (names, more) = walk.names(room).map_err(|error| io_error("cannot list", path, &error))?;
    if more {
        let message = format!("'{}' has more than {MAX_ENTRIES} entries: list its parts", path.display());
        return Err(Error::new(Code::ResourceExhausted, message));
    }
    let mut names: Vec<_> = names.into_iter().map(|name| name.name).collect();
    names.sort_unstable_by(|a, b| b.cmp(a));
    *pending += names.len();
    Ok(names)
}

/// As [`names`], the first of those that come after a name. Reads the whole directory, and keeps no more than is asked for.
fn names_after(
    walk: &Walk,
    path: &Path,
    after: &OsString,
    pending: &mut usize,
) -> Result<Vec<OsString>, Error> {
    let mut first = BTreeSet::new();
    let visit = |name: &std::ffi::OsStr| {
        if name > after.as_os_str()
            && (first.len() < MAX_ENTRIES || first.last().is_some_and(|last: &OsString| name < last))
        {
            first.insert(name.to_owned());
            if first.len() > MAX_ENTRIES {
                first.pop_last();
            }
        }
    };
    walk.each_name(visit).map_err(|error| io_error("cannot list", path, &error))?;
    *pending += first.len();
    Ok(first.into_iter().rev().collect())
}

/// Somebody removed it, or put something else there, while we walked.
fn gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

#[cfg(test)]
mod tests {
    use super::super::operations::make_directories;
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_listing_is_in_order_and_does_not_follow_links() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base");
        make_directories(&base.join("b/deep/deeper"), None).unwrap();
        fs::write(base.join("a"), b"").unwrap();
        fs::write(base.join("b/c"), b"").unwrap();
        symlink("..", base.join("up")).unwrap();
        symlink("base", dir.path().join("link")).unwrap();
        let users = UserDatabase::default();
        let all = |depth| Wish { depth, exact: false, after: None };
        let names = |path: &Path, depth| -> Vec<String> {
            let listed = list(path, &all(depth), &users).unwrap();
            listed
                .iter()
                .map(|entry| Path::new(&entry.path).strip_prefix(path).unwrap().display().to_string())
                .collect()
        };
        assert_eq!(names(&base, 0), ["a", "b", "up"]);
        assert_eq!(names(&base, 2), ["a", "b", "b/c", "b/deep", "up"]);
        assert_eq!(names(&dir.path().join("link"), 9), ["a", "b", "b/c", "b/deep", "b/deep/deeper", "up"]);

        let code = |path: &Path| list(path, &all(1), &users).unwrap_err().code();
        assert_eq!(code(&base.join("a")), Code::InvalidArgument);
        assert_eq!(code(&base.join("missing")), Code::NotFound);
        symlink("loop", base.join("loop")).unwrap();
        assert_eq!(code(&base.join("loop")), Code::FailedPrecondition);
    }

    #[test]
    fn the_bound_holds_however_the_entries_are_spread() {
        let dir = tempfile::tempdir().unwrap();
        for n in 0..100 {
            let folder = dir.path().join(format!("{n}"));
            fs::create_dir(&folder).unwrap();
            for n in 0..99 {
                fs::write(folder.join(format!("{n}")), b"").unwrap();
            }
        }
        let users = UserDatabase::default();
        let wish = Wish { depth: 2, exact: false, after: None };
        assert_eq!(list(dir.path(), &wish, &users).unwrap().len(), MAX_ENTRIES);
        fs::write(dir.path().join("more"), b"").unwrap();
        assert_eq!(list(dir.path(), &wish, &users).unwrap_err().code(), Code::ResourceExhausted);
    }

    #[test]
    fn a_directory_of_any_size_is_listed_in_pages() {
        let dir = tempfile::tempdir().unwrap();
        for n in 0..MAX_ENTRIES + 5 {
            fs::write(dir.path().join(format!("{n:05}")), b"").unwrap();
        }
        symlink("some where", dir.path().join("zz")).unwrap();
        let users = UserDatabase::default();
        let (mut after, mut pages, mut found) = (String::new(), Vec::new(), Vec::new());
        loop {
            let request =
                ListDirRequest { depth: 1, exact: true, after: Some(after), ..ListDirRequest::default() };
            let page = list(dir.path(), &Wish::parse(&request).unwrap(), &users).unwrap();
            pages.push(page.len());
            let Some(last) = page.last() else { break };
            after = last.name.clone();
            found.extend(page);
        }
        assert_eq!(pages, [MAX_ENTRIES, 6, 0]);
        assert!(found.is_sorted_by(|a, b| a.name < b.name));
        assert_eq!(found.last().unwrap().link_text.as_deref(), Some("some where"));
        let deep = ListDirRequest { depth: 2, after: Some(String::new()), ..ListDirRequest::default() };
        assert_eq!(Wish::parse(&deep).unwrap_err().code(), Code::InvalidArgument);
    }
}
