//! PAX extended headers (POSIX.1-2001 `pax`), read with bounds and written in one canonical form.

use std::collections::BTreeMap;

use super::Timestamp;
use super::sparse::SparseRecords;
use crate::Error;

/// The longest PAX header of one entry: a path, a link and every extended attribute fit several times.
pub const MAX_PAX_HEADER: u64 = 1 << 20;
/// The longest value of an extended attribute (Linux's `XATTR_SIZE_MAX`).
pub const MAX_XATTR_VALUE: usize = 64 << 10;
/// The most extended attributes of one entry. The kernel's own list of names ends at 64 KiB.
pub const MAX_XATTRS: usize = 256;
/// Linux's `XATTR_NAME_MAX`.
const MAX_XATTR_NAME: usize = 255;

const SCHILY: &[u8] = b"SCHILY.xattr.";
const SPARSE: &[u8] = b"GNU.sparse.";
const LIBARCHIVE: &[u8] = b"LIBARCHIVE.xattr.";

/// The records of an extended header that matter for a layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Records {
    pub(crate) path: Option<Vec<u8>>,
    pub(crate) linkpath: Option<Vec<u8>>,
    pub(crate) size: Option<u64>,
    pub(crate) uid: Option<u64>,
    pub(crate) gid: Option<u64>,
    pub(crate) mtime: Option<Timestamp>,
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(crate) sparse: SparseRecords,
}

impl Records {
    /// Parses `LENGTH SPACE KEY=VALUE NEWLINE` records; a value may hold any byte.
    #[cfg(test)]
    pub(crate) fn parse(raw: &[u8]) -> Result<Self, Error> {
        Self::default().overlay(raw)
    }

    /// Bytes of attributes, which every entry that they are for has a copy of.
    pub(crate) fn xattr_bytes(&self) -> u64 {
        self.xattrs.iter().map(|(name, value)| (name.len() + value.len()) as u64).sum()
    }

    /// These records, where `raw` does not say otherwise. An empty value takes a record back (POSIX.1-2001, pax).
    pub(crate) fn overlay(&self, mut raw: &[u8]) -> Result<Self, Error> {
        let corrupt = |reason: &str| Error::corrupt("PAX header", reason);
        let mut records = self.clone();
        while !raw.is_empty() {
            let space = raw
                .iter()
                .take(20)
                .position(|byte| *byte == b' ')
                .ok_or_else(|| corrupt("a record has no length"))?;
            let length = number(&raw[..space]).ok_or_else(|| corrupt("a record's length is no number"))?;
            let length =
                usize::try_from(length).ok().filter(|length| *length <= raw.len() && *length > space + 1);
            let length = length.ok_or_else(|| corrupt("a record is longer than its header"))?;
            let (record, rest) = raw.split_at(length);
            let record =
                record[space + 1..].strip_suffix(b"\n").ok_or_else(|| corrupt("a record has no newline"))?;
            let equals =
                record.iter().position(|byte| *byte == b'=').ok_or_else(|| corrupt("a record has no '='"))?;
            records.add(&record[..equals], &record[equals + 1..])?;
            raw = rest;
        }
        Ok(records)
    }

    fn add(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        let bad = || {
            let text = String::from_utf8_lossy(&value[..value.len().min(64)]).into_owned();
            Error::corrupt("PAX header", format!("{} has the value {text:?}", String::from_utf8_lossy(key)))
        };
        match key {
            b"path" if value.is_empty() => self.path = None,
            b"linkpath" if value.is_empty() => self.linkpath = None,
            b"size" if value.is_empty() => self.size = None,
            b"uid" if value.is_empty() => self.uid = None,
            b"gid" if value.is_empty() => self.gid = None,
            b"mtime" if value.is_empty() => self.mtime = None,
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.linkpath = Some(value.to_vec()),
            b"size" => self.size = Some(number(value).ok_or_else(bad)?),
            b"uid" => self.uid = Some(number(value).ok_or_else(bad)?),
            b"gid" => self.gid = Some(number(value).ok_or_else(bad)?),
            b"mtime" => self.mtime = Some(timestamp(value).ok_or_else(bad)?),
            _ if key.starts_with(SPARSE) => self.sparse.add(&key[SPARSE.len()..], value).ok_or_else(bad)?,
            _ => {
                if let Some(name) = key.strip_prefix(SCHILY) {
                    self.xattr(name.to_vec(), value.to_vec())?;
                } else if let Some(name) = key.strip_prefix(LIBARCHIVE) {
                    let name = percent_decode(name).ok_or_else(bad)?;
                    let value = base64_decode(value).ok_or_else(bad)?;
                    // libarchive writes both forms; the plain one needs no decoding and wins.
                    if !self.xattrs.contains_key(&name) {
                        self.xattr(name, value)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn xattr(&mut self, name: Vec<u8>, value: Vec<u8>) -> Result<(), Error> {
        let shown =
            || format!("extended attribute {:?}", String::from_utf8_lossy(&name[..name.len().min(64)]));
        if name.is_empty() || name.len() > MAX_XATTR_NAME || name.contains(&0) {
            return Err(Error::corrupt(
                shown(),
                format!("expected a name of 1 to {MAX_XATTR_NAME} bytes without NUL"),
            ));
        }
        if value.len() > MAX_XATTR_VALUE {
            return Err(Error::corrupt(
                shown(),
                format!("it has {} bytes, at most {MAX_XATTR_VALUE} expected", value.len()),
            ));
        }
        if self.xattrs.len() >= MAX_XATTRS {
            return Err(Error::corrupt(shown(), format!("the entry has more than {MAX_XATTRS}")));
        }
        self.xattrs.insert(name, value);
        Ok(())
    }

    /// The bytes of the header, records in one fixed order; empty when there is nothing to say.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut plain = |key: &str, value: Option<Vec<u8>>| {
            if let Some(value) = value {
                record(&mut out, key.as_bytes(), &value);
            }
        };
        plain("gid", self.gid.map(|value| value.to_string().into_bytes()));
        plain("linkpath", self.linkpath.clone());
        plain("mtime", self.mtime.map(format_timestamp));
        plain("path", self.path.clone());
        plain("size", self.size.map(|value| value.to_string().into_bytes()));
        plain("uid", self.uid.map(|value| value.to_string().into_bytes()));
        for (name, value) in &self.xattrs {
            record(&mut out, &[SCHILY, name].concat(), value);
        }
        out
    }
}

/// The length of a record counts its own digits.
fn record(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while rest + length.to_string().len() != length {
        length = rest + length.to_string().len();
    }
    out.extend_from_slice(length.to_string().as_bytes());
    out.push(b' ');
    out.extend_from_slice(key);
    out.push(b'=');
    out.extend_from_slice(value);
    out.push(b'\n');
}

fn number(text: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(text).ok()?;
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

/// `[-]SECONDS[.FRACTION]`; digits after the ninth are cut.
fn timestamp(text: &[u8]) -> Option<Timestamp> {
    let text = std::str::from_utf8(text).ok()?;
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds = i64::try_from(number(whole.as_bytes())?).ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let digits = &fraction[..fraction.len().min(9)];
    let nanoseconds = format!("{digits:0<9}").parse::<u32>().ok()?;
    Some(match (negative, nanoseconds) {
        (false, _) => Timestamp { seconds, nanoseconds },
        (true, 0) => Timestamp { seconds: -seconds, nanoseconds: 0 },
        (true, _) => Timestamp { seconds: -seconds - 1, nanoseconds: 1_000_000_000 - nanoseconds },
    })
}

fn format_timestamp(time: Timestamp) -> Vec<u8> {
    let (sign, seconds, nanoseconds) = match (time.seconds < 0, time.nanoseconds) {
        (true, 0) => ("-", time.seconds.unsigned_abs(), 0),
        (true, nanoseconds) => ("-", (time.seconds + 1).unsigned_abs(), 1_000_000_000 - nanoseconds),
        (false, nanoseconds) => ("", time.seconds.unsigned_abs(), nanoseconds),
    };
    if nanoseconds == 0 {
        return format!("{sign}{seconds}").into_bytes();
    }
    let fraction = format!("{nanoseconds:09}");
    format!("{sign}{seconds}.{}", fraction.trim_end_matches('0')).into_bytes()
}

fn percent_decode(text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.iter();
    while let Some(byte) = rest.next() {
        if *byte == b'%' {
            let digits = [*rest.next()?, *rest.next()?];
            out.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
        } else {
            out.push(*byte);
        }
    }
    Some(out)
}

/// libarchive writes base64 without padding.
fn base64_decode(text: &[u8]) -> Option<Vec<u8>> {
    let digit = |byte: u8| {
        Some(match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        })
    };
    let end = text.iter().rposition(|byte| *byte != b'=').map_or(0, |last| last + 1);
    let mut out = Vec::with_capacity(end * 3 / 4);
    for group in text[..end].chunks(4) {
        if group.len() == 1 {
            return None;
        }
        let mut bits = 0u32;
        for index in 0..4 {
            bits = bits << 6 | u32::from(group.get(index).map_or(Some(0), |byte| digit(*byte))?);
        }
        out.extend_from_slice(&bits.to_be_bytes()[1..group.len()]);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let mut records = Records {
            path: Some(b"a/\xff=\n/b".to_vec()),
            linkpath: Some(vec![b'x'; 200]),
            size: Some(9_000_000_000),
            uid: Some(3_000_000),
            gid: Some(7),
            mtime: Some(Timestamp { seconds: -2, nanoseconds: 250_000_000 }),
            ..Records::default()
        };
        records.xattrs.insert(b"security.capability".to_vec(), vec![0, b'\n', b'=', 255]);
        assert_eq!(Records::parse(&records.encode()).unwrap(), records);
    }

    #[test]
    fn record_lengths_count_themselves() {
        for length in [1usize, 80, 85, 86, 87, 88, 89, 90, 980, 985, 990, 995] {
            let records = Records { path: Some(vec![b'p'; length]), ..Records::default() };
            assert_eq!(Records::parse(&records.encode()).unwrap(), records, "{length}");
        }
    }

    #[test]
    fn times_keep_their_nanoseconds() {
        for (text, seconds, nanoseconds) in [
            ("0", 0, 0),
            ("12.5", 12, 500_000_000),
            ("12.000000001", 12, 1),
            ("12.0000000019", 12, 1),
            ("-1", -1, 0),
            ("-1.25", -2, 750_000_000),
            ("-0.25", -1, 750_000_000),
        ] {
            assert_eq!(timestamp(text.as_bytes()), Some(Timestamp { seconds, nanoseconds }), "{text}");
        }
        for bad in ["", ".", "x", "1.x", "--1", "99999999999999999999", "1.-2"] {
            assert_eq!(timestamp(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn damaged_headers_are_corrupt() {
        for bad in [
            "5",
            "x path=a\n",
            "99 path=a\n",
            "11 path=a\n",
            "9 path=ab\n",
            "7 patha\n",
            "13 size=1e9xx\n",
            "0 a=b\n",
        ] {
            assert!(matches!(Records::parse(bad.as_bytes()), Err(Error::Corrupt { .. })), "{bad:?}");
        }
        assert!(Records::parse(b"22 GNU.sparse.major=x\n").is_err());
    }

    #[test]
    fn records_of_an_entry_override_the_global_ones() {
        let global = Records::parse(b"9 uid=70\n9 gid=70\n20 mtime=1700000000\n").unwrap();
        let entry = global.overlay(b"8 uid=7\n7 gid=\n").unwrap();
        assert_eq!((entry.uid, entry.gid), (Some(7), None));
        assert_eq!(entry.mtime, global.mtime);
    }

    #[test]
    fn libarchive_attributes_are_decoded() {
        assert_eq!(base64_decode(b"AQID").unwrap(), [1, 2, 3]);
        assert_eq!(base64_decode(b"AQ").unwrap(), [1]);
        assert_eq!(base64_decode(b"AQI=").unwrap(), [1, 2]);
        assert_eq!(base64_decode(b"A"), None);
        assert_eq!(percent_decode(b"user.a%3Db").unwrap(), b"user.a=b");
        assert_eq!(percent_decode(b"%4"), None);
    }

    #[test]
    fn attributes_are_bounded() {
        let mut records = Records::default();
        assert!(records.xattr(b"user.a".to_vec(), vec![0; MAX_XATTR_VALUE + 1]).is_err());
        for index in 0..MAX_XATTRS {
            records.xattr(format!("user.{index}").into_bytes(), Vec::new()).unwrap();
        }
        assert!(records.xattr(b"user.more".to_vec(), Vec::new()).is_err());
    }
}
