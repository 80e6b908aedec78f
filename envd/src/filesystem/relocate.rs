//! Move.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, fchown, lchown, symlink};
use std::path::Path;

use envd_proto::filesystem::EntryInfo;

use super::operations::{Owner, io_error, make_directories, stat};
use super::partial::{Modes, Partial};
use crate::connect::{Code, Error};
use crate::root::Unanswered;
use crate::users::UserDatabase;

/// Gives a file another path, making the directories above it. As `mv`, a file or a link goes to another file system by
/// a copy, which appears whole; a directory does not, because that would be neither whole nor quick.
pub(super) fn relocate(
    from: &Path,
    to: &Path,
    owner: Owner,
    users: &UserDatabase,
) -> Result<EntryInfo, Error> {
    let metadata = fs::symlink_metadata(from).map_err(|error| io_error("cannot move", from, &error))?;
    let failed = |error: io::Error| {
        let code = Unanswered::of(&error).map_or(Code::Internal, Unanswered::code);
        Error::new(code, format!("cannot move '{}' to '{}': {error}", from.display(), to.display()))
    };
    if let Some(parent) = to.parent() {
        make_directories(parent, owner).map_err(failed)?;
    }
    match fs::rename(from, to) {
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
            copy_over(from, to, &metadata).map_err(failed)?;
        }
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
            return Err(failed(io::Error::new(error.kind(), "something is mounted there; unmount it first")));
        }
        renamed => renamed.map_err(failed)?,
    }
    stat(to, users)
}

fn copy_over(from: &Path, to: &Path, metadata: &fs::Metadata) -> io::Result<()> {
    if metadata.is_symlink() {
        let target = fs::read_link(from)?;
        match fs::remove_file(to) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        symlink(target, to)?;
        // As an ordinary user the link already belongs to whom it can.
        let _ = lchown(to, Some(metadata.uid()), Some(metadata.gid()));
    } else if metadata.is_file() {
        let flags = (rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits() as i32;
        let mut source = OpenOptions::new().read(true).custom_flags(flags).open(from)?;
        if (source.metadata()?.dev(), source.metadata()?.ino()) != (metadata.dev(), metadata.ino()) {
            return Err(io::Error::other("it was replaced meanwhile: try again"));
        }
        let mut copy = Partial::replacing(to.to_owned(), Modes::Exactly(metadata.mode() & 0o777))?;
        io::copy(&mut source, copy.file())?;
        keep_attributes(&source, copy.file(), metadata)?;
        copy.publish()?;
    } else {
        return Err(io::Error::new(
            io::ErrorKind::CrossesDevices,
            "they are on different file systems, and only files and links are moved between those: run \
             'cp -a' and then remove the source",
        ));
    }
    fs::remove_file(from)
}

fn keep_attributes(source: &File, copy: &File, metadata: &fs::Metadata) -> io::Result<()> {
    // As an ordinary user it already belongs to whom it can.
    let _ = fchown(copy, Some(metadata.uid()), Some(metadata.gid()));
    super::metadata::copy(source, copy)?;
    let times = fs::FileTimes::new().set_modified(metadata.modified()?).set_accessed(metadata.accessed()?);
    copy.set_times(times)
}
