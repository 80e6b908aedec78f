//! What the API says about one file.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use envd_channel::name;
use envd_proto::filesystem::{EntryInfo, FileType};
use pbjson_types::Timestamp;

use super::metadata;
use crate::users::UserDatabase;

/// The entry at `path`, not following a link at its end; `shown` is the path to report.
pub(super) fn entry(path: &Path, shown: &Path, users: &UserDatabase) -> io::Result<EntryInfo> {
    let own = fs::symlink_metadata(path)?;
    let link = own.file_type().is_symlink().then(|| target(path, shown));
    // A link reports the type and the mode of what it leads to; one that leads nowhere reports itself and no type.
    let (kind, mode) = match &link {
        None => (file_type(&own), own.mode()),
        Some(Target { metadata: Some(metadata), .. }) => (file_type(metadata), metadata.mode()),
        Some(Target { metadata: None, .. }) => (FileType::Unspecified, own.mode()),
    };
    Ok(EntryInfo {
        name: name::encode(shown.file_name().unwrap_or(shown.as_os_str())),
        r#type: kind.into(),
        path: name::encode(shown),
        size: i64::try_from(own.size()).unwrap_or(i64::MAX),
        mode: mode & 0o777,
        permissions: permissions(&own),
        owner: users.user_name(own.uid()),
        group: users.group_name(own.gid()),
        // The kernel gives 0 to 999,999,999.
        modified_time: Some(Timestamp { seconds: own.mtime(), nanos: own.mtime_nsec() as i32 }),
        symlink_target: link.map(|target| target.path),
        metadata: match kind {
            FileType::File | FileType::Directory => metadata::read(path),
            FileType::Symlink | FileType::Unspecified => Default::default(),
        },
        link_text: None,
    })
}

/// The text of the link at `path`; `None` when it is none.
pub(super) fn link_text(path: &Path) -> Option<String> {
    fs::read_link(path).ok().map(name::encode)
}

struct Target {
    path: String,
    metadata: Option<Metadata>,
}

fn target(path: &Path, shown: &Path) -> Target {
    match fs::canonicalize(path).and_then(|resolved| Ok((fs::metadata(&resolved)?, resolved))) {
        Ok((metadata, resolved)) => Target { path: name::encode(&resolved), metadata: Some(metadata) },
        Err(_) => Target { path: name::encode(shown), metadata: None },
    }
}

fn file_type(metadata: &Metadata) -> FileType {
    if metadata.is_dir() {
        FileType::Directory
    } else if metadata.is_file() {
        FileType::File
    } else if metadata.is_symlink() {
        FileType::Symlink
    } else {
        FileType::Unspecified
    }
}

/// The mode as Go's `os.FileMode` prints it, which the clients show: a letter for each bit that is set, or `-`, and
/// then nine for the permissions.
fn permissions(metadata: &Metadata) -> String {
    let kind = metadata.file_type();
    let mode = metadata.mode();
    let letters = [
        (kind.is_dir(), "d"),
        (kind.is_symlink(), "L"),
        (kind.is_block_device() || kind.is_char_device(), "D"),
        (kind.is_fifo(), "p"),
        (kind.is_socket(), "S"),
        (mode & 0o4000 != 0, "u"),
        (mode & 0o2000 != 0, "g"),
        (kind.is_char_device(), "c"),
        (mode & 0o1000 != 0, "t"),
    ];
    let mut text: String = letters.iter().filter(|(set, _)| *set).map(|(_, letter)| *letter).collect();
    if text.is_empty() {
        text.push('-');
    }
    for (bit, letter) in (0..9).rev().zip("rwxrwxrwx".chars()) {
        text.push(if mode & (1 << bit) != 0 { letter } else { '-' });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn modes_are_printed_as_go_prints_them() {
        let dir = tempfile::tempdir().unwrap();
        let shown = |name: &str, mode: u32| {
            let path = dir.path().join(name);
            fs::write(&path, b"").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            permissions(&fs::symlink_metadata(&path).unwrap())
        };
        assert_eq!(shown("plain", 0o644), "-rw-r--r--");
        assert_eq!(shown("setuid", 0o4755), "urwxr-xr-x");
        assert_eq!(shown("none", 0), "----------");
        let of = |path: &str| permissions(&fs::symlink_metadata(path).unwrap());
        assert_eq!(of("/tmp"), "dtrwxrwxrwx");
        assert_eq!(of("/dev/null"), "Dcrw-rw-rw-");
        assert_eq!(of("/proc/self"), "Lrwxrwxrwx");
    }

    #[test]
    fn a_link_reports_what_it_leads_to() {
        let dir = tempfile::tempdir().unwrap();
        let users = UserDatabase::default();
        fs::create_dir(dir.path().join("real")).unwrap();
        symlink("real", dir.path().join("good")).unwrap();
        symlink("nowhere", dir.path().join("dangling")).unwrap();
        let at = |name: &str| {
            let path = dir.path().join(name);
            entry(&path, &path, &users).unwrap()
        };
        let good = at("good");
        assert_eq!(good.r#type(), FileType::Directory);
        let real = fs::canonicalize(dir.path().join("real")).unwrap();
        assert_eq!(good.symlink_target.as_deref(), real.to_str());
        assert!(good.permissions.starts_with('L'));
        let dangling = at("dangling");
        assert_eq!(dangling.r#type(), FileType::Unspecified);
        assert_eq!(dangling.symlink_target.as_deref(), dir.path().join("dangling").to_str());
    }
}
