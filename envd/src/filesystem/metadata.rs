//! A file's metadata: what the client says about it, kept in its extended attributes `user.e2b.<key>`.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::Path;

use http::HeaderMap;
use rustix::fs::{XattrFlags, fgetxattr, flistxattr, fsetxattr, getxattr, listxattr};
use rustix::io::Errno;

use crate::connect::{Code, Error};

/// What the request headers begin with; they are case-insensitive, so keys are lower case.
const HEADER: &str = "x-metadata-";

/// What the attributes' names begin with.
const PREFIX: &str = "user.e2b.";

/// Entries of one file: ext4 keeps all attributes of a file in about 4 KiB.
const MAX_ENTRIES: usize = 64;

/// The longest key: Linux's `XATTR_NAME_MAX` is 255.
const MAX_KEY: usize = 255 - PREFIX.len();

/// The longest value, so that it fits into the 4 KiB of ext4.
const MAX_VALUE: usize = 2048;

/// All attributes' names of a file (Linux's `XATTR_LIST_MAX`).
const MAX_LIST: usize = 64 << 10;

/// The metadata of an upload, checked.
#[derive(Clone, Debug, Default)]
pub(super) struct Metadata(HashMap<String, String>);

impl Metadata {
    pub(super) fn of_headers(headers: &HeaderMap) -> Result<Self, Error> {
        let invalid = |what: String| Error::new(Code::InvalidArgument, what);
        let mut entries = HashMap::new();
        for (name, value) in headers {
            let Some(key) = name.as_str().strip_prefix(HEADER) else { continue };
            if key.is_empty() || key.len() > MAX_KEY {
                return Err(invalid(format!(
                    "{name}: expected a key of 1 to {MAX_KEY} bytes after {HEADER}"
                )));
            }
            let text = value.to_str().ok().filter(|text| text.len() <= MAX_VALUE).ok_or_else(|| {
                invalid(format!("{name}: expected at most {MAX_VALUE} printable ASCII characters"))
            })?;
            if entries.insert(key.to_owned(), text.to_owned()).is_some() {
                return Err(invalid(format!("{name} is given twice")));
            }
        }
        if entries.len() > MAX_ENTRIES {
            return Err(invalid(format!("{} metadata headers, at most {MAX_ENTRIES}", entries.len())));
        }
        Ok(Self(entries))
    }

    pub(super) fn entries(&self) -> &HashMap<String, String> {
        &self.0
    }

    /// Writes it to a file that has none yet.
    pub(super) fn write(&self, file: &File) -> io::Result<()> {
        for (key, value) in &self.0 {
            let written = fsetxattr(file, format!("{PREFIX}{key}"), value.as_bytes(), XattrFlags::empty());
            written.map_err(|error| match error {
                Errno::OPNOTSUPP => io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "its file system has no extended attributes, so it cannot keep metadata",
                ),
                // The space for attributes is full: not the disk, but told in the same way.
                Errno::RANGE | Errno::TOOBIG => io::Error::from(io::ErrorKind::StorageFull),
                error => error.into(),
            })?;
        }
        Ok(())
    }
}

/// The metadata of the file at `path`; empty where it or its file system has none, and without what goes meanwhile.
pub(super) fn read(path: &Path) -> HashMap<String, String> {
    // Most files have none: the question costs one small call.
    let mut names = vec![0; 256];
    let length = match listxattr(path, names.as_mut_slice()) {
        Err(Errno::RANGE) => {
            names.resize(MAX_LIST, 0);
            listxattr(path, names.as_mut_slice()).unwrap_or(0)
        }
        length => length.unwrap_or(0),
    };
    let mut entries = HashMap::new();
    for name in names[..length].split(|byte| *byte == 0) {
        let Some(key) = name.strip_prefix(PREFIX.as_bytes()) else { continue };
        let mut value = vec![0; MAX_VALUE];
        if let Ok(length) = getxattr(path, name, value.as_mut_slice()) {
            let text = String::from_utf8_lossy(&value[..length]).into_owned();
            entries.insert(String::from_utf8_lossy(key).into_owned(), text);
        }
        if entries.len() == MAX_ENTRIES {
            break;
        }
    }
    entries
}

/// Copies all attributes that users set from one file to another; what the other file system cannot keep is an error.
pub(super) fn copy(from: &File, to: &File) -> io::Result<()> {
    let mut names = vec![0; MAX_LIST];
    let length = match flistxattr(from, names.as_mut_slice()) {
        Err(Errno::OPNOTSUPP) => 0,
        length => length?,
    };
    let mut value = vec![0; MAX_LIST];
    for name in names[..length].split(|byte| *byte == 0).filter(|name| name.starts_with(b"user.")) {
        let length = fgetxattr(from, name, value.as_mut_slice())?;
        fsetxattr(to, name, &value[..length], XattrFlags::empty())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_become_metadata_within_bounds() {
        let parse = |headers: &[(&str, &str)]| {
            let mut map = HeaderMap::new();
            for (name, value) in headers {
                map.append(name.parse::<http::HeaderName>().unwrap(), value.parse().unwrap());
            }
            Metadata::of_headers(&map).map(|metadata| metadata.0).map_err(|error| error.code())
        };
        let one = HashMap::from([("kind".to_owned(), "report".to_owned())]);
        assert_eq!(parse(&[("X-Metadata-Kind", "report"), ("x-other", "1")]), Ok(one));
        assert_eq!(parse(&[]), Ok(HashMap::new()));
        assert_eq!(parse(&[("x-metadata-", "v")]), Err(Code::InvalidArgument));
        assert_eq!(parse(&[("x-metadata-a", "1"), ("x-metadata-a", "2")]), Err(Code::InvalidArgument));
        assert_eq!(parse(&[(&format!("x-metadata-{}", "k".repeat(247)), "v")]), Err(Code::InvalidArgument));
        assert_eq!(parse(&[("x-metadata-a", &"v".repeat(2049))]), Err(Code::InvalidArgument));
        let many: Vec<_> = (0..65).map(|n| (format!("x-metadata-{n}"), "v")).collect();
        let many: Vec<_> = many.iter().map(|(name, value)| (name.as_str(), *value)).collect();
        assert_eq!(parse(&many), Err(Code::InvalidArgument));
        assert!(parse(&many[1..]).is_ok());
    }
}
