//! Maps of sparse files: the three forms of GNU tar's PAX records (versions 0.0, 0.1 and 1.0) and its older header
//! (GNU tar manual, "Storing Sparse Files").
//!
//! ```text
//! old    header with 4 runs ──► blocks of 21 runs ──► data of the runs, one behind the other
//! 0.0    PAX records offset, numbytes, offset, ..  ──► data
//! 0.1    one PAX record "offset,numbytes,.."       ──► data
//! 1.0    PAX records major, minor, realsize        ──► the map as decimal lines, to a full block ──► data
//! ```

use std::io::{self, Read};

use super::DataRun;
use crate::Error;

/// The unit of a tar stream.
const BLOCK: usize = 512;

/// Digits of the longest number of 64 bits.
const MAX_DIGITS: usize = 20;

/// What PAX records say of a sparse file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SparseRecords {
    pub(crate) major: Option<u64>,
    pub(crate) minor: Option<u64>,
    pub(crate) name: Option<Vec<u8>>,
    /// `GNU.sparse.realsize`, or `GNU.sparse.size` of the older versions.
    pub(crate) size: Option<u64>,
    /// The numbers of the map: offset, length, offset, ..
    pub(crate) map: Option<Vec<u64>>,
}

impl SparseRecords {
    /// Takes the record `GNU.sparse.KEY`; `None` when the value is not one.
    pub(crate) fn add(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        let map = self.map.as_mut().filter(|map| !map.is_empty());
        match key {
            b"major" => self.major = Some(number(value)?),
            b"minor" => self.minor = Some(number(value)?),
            b"name" => self.name = Some(value.to_vec()),
            b"size" | b"realsize" => self.size = Some(number(value)?),
            b"map" => self.map = Some(value.split(|byte| *byte == b',').map(number).collect::<Option<_>>()?),
            // Pairs, in this order.
            b"offset" if map.is_none_or(|map| map.len().is_multiple_of(2)) => {
                self.map.get_or_insert_default().push(number(value)?);
            }
            b"numbytes" => self.map.as_mut().filter(|map| !map.len().is_multiple_of(2))?.push(number(value)?),
            b"offset" => return None,
            // How many pairs follow, which is seen.
            b"numblocks" => drop(self.map.get_or_insert_default()),
            _ => {}
        }
        Some(())
    }

    /// Whether the map stands in front of the data.
    pub(crate) fn has_map_in_data(&self) -> bool {
        self.major == Some(1)
    }

    /// A version that is not known.
    pub(crate) fn unknown_version(&self) -> Option<(u64, u64)> {
        let version = (self.major.unwrap_or(0), self.minor.unwrap_or(0));
        (!matches!(version, (0, 0 | 1) | (1, 0))).then_some(version)
    }
}

/// Reads the map of version 1.0; `limit` is the most runs that are taken.
pub(crate) fn read_map(reader: &mut impl Read, limit: u64) -> io::Result<Vec<u64>> {
    let invalid = |reason: &str| io::Error::new(io::ErrorKind::InvalidData, reason.to_owned());
    let mut block = [0; BLOCK];
    let mut at = BLOCK;
    let mut next = || {
        let mut digits = Vec::with_capacity(MAX_DIGITS);
        loop {
            if at == BLOCK {
                reader.read_exact(&mut block)?;
                at = 0;
            }
            let byte = block[at];
            at += 1;
            match byte {
                b'\n' => return number(&digits).ok_or_else(|| invalid("a line of the map is no number")),
                _ if digits.len() == MAX_DIGITS => return Err(invalid("a line of the map is too long")),
                _ => digits.push(byte),
            }
        }
    };
    let count = next()?;
    if count > limit {
        return Err(invalid("the map has more runs than a layer may have entries"));
    }
    (0..2 * count).map(|_| next()).collect()
}

/// The runs that the map's numbers say, with places from byte `offset` of the stream on.
pub(crate) fn runs(map: &[u64], size: u64, stored: u64, offset: u64) -> Result<Box<[DataRun]>, String> {
    let mut runs: Vec<DataRun> = Vec::new();
    let (mut end, mut taken) = (0, 0u64);
    for pair in map.chunks(2) {
        let &[start, length] = pair else { return Err("its map ends inside a pair".to_owned()) };
        let behind = start.checked_add(length).filter(|behind| *behind <= size);
        let Some(behind) = behind.filter(|_| start >= end) else {
            return Err(format!(
                "its map has {length} bytes at {start}, expected ascending runs inside its {size} bytes"
            ));
        };
        match runs.last_mut() {
            _ if length == 0 => {}
            Some(last) if last.start + last.length == start => last.length += length,
            _ => runs.push(DataRun { start, length, offset: offset + taken }),
        }
        // Below the size, which is a number of 64 bits.
        (end, taken) = (behind, taken + length);
    }
    if taken != stored {
        return Err(format!("its map has {taken} bytes of data, the entry has {stored}"));
    }
    Ok(runs.into())
}

/// The old header's map: four pairs in the header, and the blocks behind it, each with 21 more. `limit` is the most runs
/// that are taken.
pub(crate) fn read_old_map(
    header: &tar::GnuHeader,
    limit: u64,
    mut next_block: impl FnMut() -> Result<[u8; BLOCK], Error>,
    corrupt: impl Fn(String) -> Error,
) -> Result<Vec<u64>, Error> {
    let mut map = Vec::new();
    let mut add = |pairs: &[tar::GnuSparseHeader]| {
        for pair in pairs.iter().filter(|pair| !pair.is_empty()) {
            let offset = pair.offset().map_err(|error| corrupt(format!("its map: {error}")))?;
            let length = pair.length().map_err(|error| corrupt(format!("its map: {error}")))?;
            map.extend([offset, length]);
        }
        match map.len() as u64 / 2 > limit {
            true => Err(corrupt("its map has more runs than a layer may have entries".to_owned())),
            false => Ok(()),
        }
    };
    add(&header.sparse)?;
    let mut more = header.is_extended();
    while more {
        let mut block = tar::GnuExtSparseHeader::new();
        block.as_mut_bytes().copy_from_slice(&next_block()?);
        add(&block.sparse)?;
        more = block.is_extended();
    }
    Ok(map)
}

fn number(text: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(text).ok()?;
    (!text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())).then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_checked_and_joined() {
        let run = |start, length, offset| DataRun { start, length, offset };
        let joined = runs(&[0, 5, 5, 5, 20, 1, 30, 0], 30, 11, 100).unwrap();
        assert_eq!(joined[..], [run(0, 10, 100), run(20, 1, 110)]);
        assert_eq!(runs(&[30, 0], 30, 0, 100).unwrap()[..], []);
        for (map, size, stored) in [
            (&[0][..], 10, 0),
            (&[0, 11], 10, 11),
            (&[5, 2, 6, 1], 10, 3),
            (&[0, 5], 10, 4),
            (&[u64::MAX, 1], u64::MAX, 1),
        ] {
            assert!(runs(map, size, stored, 0).is_err(), "{map:?}");
        }
    }

    #[test]
    fn maps_in_the_data_are_bounded() {
        let read = |text: &str| {
            let mut block = text.as_bytes().to_vec();
            block.resize(BLOCK, 0);
            read_map(&mut &block[..], 3)
        };
        assert_eq!(read("2\n0\n5\n10\n5\n").unwrap(), [0, 5, 10, 5]);
        for bad in ["", "4\n", "x\n", "1\n0\n", "\n", "111111111111111111111\n"] {
            assert!(read(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn pairs_come_in_their_order() {
        let mut records = SparseRecords::default();
        assert!(records.add(b"numbytes", b"1").is_none());
        for (key, value) in [("numblocks", "2"), ("offset", "0"), ("numbytes", "1"), ("offset", "7")] {
            records.add(key.as_bytes(), value.as_bytes()).unwrap();
        }
        assert!(records.add(b"offset", b"9").is_none());
        records.add(b"numbytes", b"2").unwrap();
        assert_eq!(records.map.as_deref(), Some(&[0, 1, 7, 2][..]));
        assert!(records.add(b"map", b"1,x").is_none());
    }
}
