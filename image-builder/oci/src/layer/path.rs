//! Checked paths of layer entries.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::Error;

/// The longest path of an entry: Linux's `PATH_MAX`, without its NUL.
pub const MAX_PATH: usize = 4095;
/// The longest name in a path: `NAME_MAX` of ext4 and overlayfs.
pub const MAX_COMPONENT: usize = 255;

/// A path inside a layer: relative, without empty, `.` and `..` components. Empty for the root. The bytes need not be UTF-8.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerPath(Vec<u8>);

impl LayerPath {
    /// Takes a path as it stands in an archive: leading `/` and `./` go, `..` is refused.
    pub fn parse(raw: &[u8]) -> Result<Self, Error> {
        let refuse =
            |reason: String| Err(Error::corrupt(format!("path {:?}", String::from_utf8_lossy(raw)), reason));
        if raw.len() > MAX_PATH {
            return Err(Error::corrupt(
                format!("path {:?}..", String::from_utf8_lossy(&raw[..64])),
                format!("it has {} bytes, at most {MAX_PATH} expected", raw.len()),
            ));
        }
        let mut path = Vec::with_capacity(raw.len());
        for component in raw.split(|byte| *byte == b'/') {
            match component {
                b"" | b"." => continue,
                b".." => return refuse("it leads out of the image with '..'".to_owned()),
                _ if component.contains(&0) => return refuse("it holds a NUL byte".to_owned()),
                _ if component.len() > MAX_COMPONENT => {
                    return refuse(format!(
                        "a name in it has {} bytes, at most {MAX_COMPONENT} expected",
                        component.len()
                    ));
                }
                _ => {}
            }
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(component);
        }
        Ok(Self(path))
    }

    /// The bytes, components separated by one `/`.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// As a path relative to the image's root.
    pub fn as_path(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.0))
    }

    /// Whether this is the root directory.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The names on the way, outermost first.
    pub fn components(&self) -> impl DoubleEndedIterator<Item = &[u8]> {
        self.0.split(|byte| *byte == b'/').filter(|component| !component.is_empty())
    }

    /// The directory that holds it and its name there; `None` for the root.
    pub fn split(&self) -> Option<(LayerPath, &[u8])> {
        if self.0.is_empty() {
            return None;
        }
        match self.0.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => Some((Self(self.0[..slash].to_vec()), &self.0[slash + 1..])),
            None => Some((Self::default(), &self.0)),
        }
    }

    /// The path of `name` in this directory.
    pub fn join(&self, name: &[u8]) -> Result<Self, Error> {
        let mut raw = self.0.clone();
        raw.push(b'/');
        raw.extend_from_slice(name);
        Self::parse(&raw)
    }
}

impl fmt::Display for LayerPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}", String::from_utf8_lossy(&self.0))
    }
}

impl fmt::Debug for LayerPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_relative_and_plain() {
        for (raw, path) in [
            ("a/b", "a/b"),
            ("/a//b/", "a/b"),
            ("./a", "a"),
            ("/", ""),
            ("./", ""),
            ("", ""),
            ("..a/b..", "..a/b.."),
        ] {
            assert_eq!(LayerPath::parse(raw.as_bytes()).unwrap().as_bytes(), path.as_bytes(), "{raw}");
        }
        let long_name = "a".repeat(MAX_COMPONENT + 1);
        let long_path = "a/".repeat(MAX_PATH);
        for bad in ["..", "a/../b", "/..", "a/..", "a\0b", &long_name, &long_path] {
            assert!(matches!(LayerPath::parse(bad.as_bytes()), Err(Error::Corrupt { .. })), "{bad:?}");
        }
    }

    #[test]
    fn split_is_the_reverse_of_join() {
        let path = LayerPath::parse(b"a/b/c").unwrap();
        let (parent, name) = path.split().unwrap();
        assert_eq!((parent.as_bytes(), name), (&b"a/b"[..], &b"c"[..]));
        assert_eq!(parent.join(name).unwrap(), path);
        assert!(LayerPath::default().split().is_none());
        assert!(parent.join(b"..").is_err());
    }
}
