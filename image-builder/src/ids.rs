//! Which users and groups exist for this process.
//!
//! As root of the machine, all. In a user namespace those of its map: as root of a range of ids that belong to an ordinary
//! user, or of one id alone. A file that a layer gives to another one cannot belong to it here; that owner is kept in an
//! attribute of the file ([`oci::layer::OWNER_ATTRIBUTE`]), which overlayfs copies with the file, so that a new layer
//! names it again.

use std::path::Path;
use std::sync::LazyLock;

/// How many ids the initial namespace has: all of 32 bits but "no change".
const ALL: u64 = u32::MAX as u64;

/// The map cannot change while there is a process in the namespace.
static UIDS: LazyLock<IdMap> = LazyLock::new(|| IdMap::read(Path::new("/proc/self/uid_map")));

/// A map of ids: inside, outside, count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct IdMap(Vec<(u64, u64, u64)>);

impl IdMap {
    fn read(path: &Path) -> Self {
        Self::parse(&std::fs::read_to_string(path).unwrap_or_default())
    }

    fn parse(text: &str) -> Self {
        let line = |line: &str| {
            let mut numbers = line.split_whitespace().map_while(|number| number.parse().ok());
            Some((numbers.next()?, numbers.next()?, numbers.next()?))
        };
        Self(text.lines().filter_map(line).collect())
    }

    fn count(&self) -> u64 {
        self.0.iter().map(|(_, _, count)| count).sum()
    }

    /// What the owners of unpacked files depend on: as part of a folder's name.
    fn suffix(&self) -> String {
        if self.count() >= ALL {
            return String::new();
        }
        self.0.iter().map(|(inside, outside, count)| format!("-{inside}.{outside}.{count}")).collect()
    }
}

/// Whether this process is in a user namespace in which not every id exists.
pub(crate) fn are_limited() -> bool {
    UIDS.count() < ALL
}

/// Whether nothing but root exists.
pub(crate) fn are_one() -> bool {
    UIDS.count() <= 1
}

/// The name of a folder whose files have owners: another one for each map, because a file unpacked as root belongs to
/// someone else there than one unpacked in a namespace.
pub(crate) fn folder(name: &str) -> String {
    format!("{name}{}", UIDS.suffix())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_name_their_folders() {
        let root = IdMap::parse("         0          0 4294967295\n");
        assert_eq!((root.count(), root.suffix().as_str()), (ALL, ""));
        let range = IdMap::parse("0 1000 1\n1 100000 65536\n");
        assert_eq!((range.count(), range.suffix().as_str()), (65537, "-0.1000.1-1.100000.65536"));
        assert_eq!(IdMap::parse("0 1000 1").count(), 1);
        assert_eq!(IdMap::parse("what\n0 1\n").count(), 0);
    }
}
