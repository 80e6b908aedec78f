//! The kernel's inotify records, read from bytes (inotify(7)).
//!
//! ```text
//! wd: i32 │ mask: u32 │ cookie: u32 │ len: u32 │ name: len bytes, padded with NULs
//! ```

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use rustix::fs::inotify::ReadFlags;

const HEADER: usize = 16;

/// Room for reads: the kernel gives only whole records, and one is at most 16 + 256 bytes.
pub(super) const BUFFER: usize = 16 << 10;

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    /// The watch that it comes from.
    pub(super) watch: i32,
    /// What happened.
    pub(super) what: ReadFlags,
    /// Pairs the two halves of a rename.
    pub(super) cookie: u32,
    /// The name in the watched directory; `None` when it happened to the directory itself.
    pub(super) name: Option<OsString>,
}

/// The records in what was read.
pub(super) fn records(mut bytes: &[u8]) -> Vec<Record> {
    let mut records = Vec::new();
    while let Some((header, rest)) = bytes.split_at_checked(HEADER) {
        let word = |at: usize| -> [u8; 4] { std::array::from_fn(|n| header[at + n]) };
        let length = u32::from_ne_bytes(word(12)) as usize;
        let Some((name, rest)) = rest.split_at_checked(length) else { break };
        let name: Vec<u8> = name.iter().copied().take_while(|byte| *byte != 0).collect();
        records.push(Record {
            watch: i32::from_ne_bytes(word(0)),
            what: ReadFlags::from_bits_retain(u32::from_ne_bytes(word(4))),
            cookie: u32::from_ne_bytes(word(8)),
            name: (!name.is_empty()).then(|| OsString::from_vec(name)),
        });
        bytes = rest;
    }
    records
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn records_are_read() {
        let mut bytes = Vec::new();
        let mut push = |watch: i32, mask: u32, cookie: u32, name: &[u8]| {
            bytes.extend(watch.to_ne_bytes());
            for word in [mask, cookie, name.len() as u32] {
                bytes.extend(word.to_ne_bytes());
            }
            bytes.extend(name);
        };
        push(1, 0x100, 0, b"a\xff\0\0");
        push(-1, 0x4000, 0, b"");
        push(2, 0x40, 7, b"old\0");
        let record = |watch, what, cookie, name: Option<&[u8]>| Record {
            watch,
            what,
            cookie,
            name: name.map(|name| OsString::from_vec(name.to_vec())),
        };
        let expected = [
            record(1, ReadFlags::CREATE, 0, Some(b"a\xff")),
            record(-1, ReadFlags::QUEUE_OVERFLOW, 0, None),
            record(2, ReadFlags::MOVED_FROM, 7, Some(b"old")),
        ];
        assert_eq!(records(&bytes), expected);
        assert_eq!(records(&bytes[..bytes.len() - 1]), expected[..2]);
    }

    proptest! {
        #[test]
        fn no_bytes_are_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            records(&bytes);
        }
    }
}
