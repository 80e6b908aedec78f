//! What a client may say about what it uploads, beyond its contents: the headers of POST of /files that are Tiffin's own.
//!
//! ```text
//! X-Tiffin-Type: file | directory | symlink   what stands at the path itself afterwards; a link's text is the body
//! X-Tiffin-Mode: 4755                         octal, with setuid, setgid and sticky
//! X-Tiffin-Mtime: 1700000000.000000001        seconds since the epoch
//! ```
//!
//! With them a tree can be copied into the sandbox as it is, whatever programs its image has. A directory can be sent
//! again, to give it its time once everything is in it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use http::HeaderMap;
use rustix::fs::{AtFlags, CWD, OFlags, Timespec, Timestamps, UTIME_OMIT};

use super::operations::{self, Owner};
use super::partial::{CREATING, random};
use crate::connect::{Code, Error};

/// The longest text of a link: the kernel's `PATH_MAX` with the NUL.
pub(super) const MAX_LINK: usize = 4095;

/// What an upload makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Directory,
    Symlink,
}

/// The attributes of an upload, checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) kind: Option<Kind>,
    pub(super) mode: Option<u32>,
    mtime: Option<Timespec>,
}

impl Kind {
    /// Its name in the header, and in the answer.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Directory => "directory",
            Self::Symlink => "symlink",
        }
    }
}

impl Attributes {
    pub(super) fn of_headers(headers: &HeaderMap) -> Result<Self, Error> {
        let mut attributes = Self::default();
        for (name, expected) in [
            ("x-tiffin-type", "file, directory or symlink"),
            ("x-tiffin-mode", "an octal number up to 7777"),
            ("x-tiffin-mtime", "seconds since the epoch, with up to nine digits after a point"),
        ] {
            let Some(value) = headers.get(name) else { continue };
            let parsed = value.to_str().ok().and_then(|text| match name {
                "x-tiffin-type" => {
                    let kinds = [Kind::File, Kind::Directory, Kind::Symlink];
                    attributes.kind = kinds.into_iter().find(|kind| kind.name() == text);
                    attributes.kind.map(drop)
                }
                "x-tiffin-mode" => {
                    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
                    let mode = u32::from_str_radix(text, 8).ok();
                    attributes.mode = mode.filter(|mode| digits && *mode <= 0o7777);
                    attributes.mode.map(drop)
                }
                _ => {
                    attributes.mtime = time(text);
                    attributes.mtime.map(drop)
                }
            });
            if parsed.is_none() {
                let message = format!("{name}: expected {expected}, got {value:?}");
                return Err(Error::new(Code::InvalidArgument, message));
            }
        }
        Ok(attributes)
    }

    /// Gives them to a file or directory that is open.
    pub(super) fn apply(&self, file: &File) -> io::Result<()> {
        if let Some(mode) = self.mode {
            file.set_permissions(fs::Permissions::from_mode(mode))?;
        }
        match self.mtime {
            Some(mtime) => Ok(rustix::fs::futimens(file, &times(mtime))?),
            None => Ok(()),
        }
    }

    /// Makes a directory, with those above it, unless it is there.
    pub(super) fn directory(&self, path: &Path, owner: Owner) -> io::Result<()> {
        operations::make_directories(path, owner)?;
        let flags = OFlags::DIRECTORY.bits() as i32;
        self.apply(&OpenOptions::new().read(true).custom_flags(flags).open(path)?)
    }

    /// Makes a symbolic link, in the place of a file or another link.
    pub(super) fn symlink(&self, path: &Path, text: &[u8], owner: Owner) -> io::Result<()> {
        let parent = path.parent().ok_or(io::ErrorKind::IsADirectory)?;
        operations::make_directories(parent, owner)?;
        let temporary = loop {
            let temporary = parent.join(format!("{CREATING}{:016x}", random()?));
            match rustix::fs::symlinkat(text, CWD, &temporary) {
                Ok(()) => break temporary,
                Err(rustix::io::Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        };
        let finish = || {
            operations::give(&temporary, owner)?;
            if let Some(mtime) = self.mtime {
                rustix::fs::utimensat(CWD, &temporary, &times(mtime), AtFlags::SYMLINK_NOFOLLOW)?;
            }
            fs::rename(&temporary, path)
        };
        finish().inspect_err(|_| {
            // Nothing more can be done about a temporary link that does not go.
            let _ = fs::remove_file(&temporary);
        })
    }
}

fn times(mtime: Timespec) -> Timestamps {
    Timestamps { last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }, last_modification: mtime }
}

fn time(text: &str) -> Option<Timespec> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, "0"));
    if !(1..=9).contains(&fraction.len()) || !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nanos = format!("{fraction:0<9}").parse().ok()?;
    Some(Timespec { tv_sec: seconds.parse().ok()?, tv_nsec: nanos })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(name: &'static str, value: &str) -> Result<Attributes, Error> {
        Attributes::of_headers(&HeaderMap::from_iter([(
            http::HeaderName::from_static(name),
            value.parse().unwrap(),
        )]))
    }

    #[test]
    fn headers_are_checked() {
        assert_eq!(Attributes::of_headers(&HeaderMap::new()).unwrap(), Attributes::default());
        assert_eq!(parse("x-tiffin-type", "symlink").unwrap().kind, Some(Kind::Symlink));
        assert_eq!(parse("x-tiffin-mode", "4755").unwrap().mode, Some(0o4755));
        for (text, seconds, nanos) in
            [("0", 0, 0), ("1700000000.5", 1_700_000_000, 500_000_000), ("-1.000000001", -1, 1)]
        {
            let mtime = parse("x-tiffin-mtime", text).unwrap().mtime.unwrap();
            assert_eq!((mtime.tv_sec, mtime.tv_nsec), (seconds, nanos), "{text}");
        }
        for (name, bad) in [
            ("x-tiffin-type", "Directory"),
            ("x-tiffin-mode", ""),
            ("x-tiffin-mode", "+755"),
            ("x-tiffin-mode", "8"),
            ("x-tiffin-mode", "10000"),
            ("x-tiffin-mtime", ""),
            ("x-tiffin-mtime", "1."),
            ("x-tiffin-mtime", "1.0000000001"),
            ("x-tiffin-mtime", "1.-5"),
            ("x-tiffin-mtime", "99999999999999999999"),
        ] {
            let error = parse(name, bad).unwrap_err();
            assert!(error.message().contains("expected"), "{name}: {bad}: {}", error.message());
        }
    }
}
