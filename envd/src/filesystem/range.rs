//! Which part of a file a request wants (RFC 9110, 14).

use std::ops::Range;

use http::{HeaderMap, header};

/// A request's wish.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// The whole file.
    All,
    /// These bytes; never empty.
    Part(Range<u64>),
    /// A part that the file does not have.
    Unsatisfiable,
}

/// What `Range` asks of a file of this length. What is malformed, or more than one range, is ignored, as the RFC allows;
/// so is a range that depends on an entity tag or a date (`If-Range`), because the answers carry neither. Of an empty
/// file there are no parts, and whoever bounds a download by a range wants just that nothing.
pub(super) fn wanted(headers: &HeaderMap, length: u64) -> Wanted {
    if length == 0 || headers.contains_key(header::IF_RANGE) {
        return Wanted::All;
    }
    let text = headers.get(header::RANGE).and_then(|value| value.to_str().ok());
    match text.and_then(|text| parse(text, length)) {
        None => Wanted::All,
        Some(range) if range.is_empty() => Wanted::Unsatisfiable,
        Some(range) => Wanted::Part(range),
    }
}

fn parse(text: &str, length: u64) -> Option<Range<u64>> {
    let (unit, range) = text.split_once('=')?;
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return None;
    }
    let (first, last) = range.trim().split_once('-')?;
    match (first.trim(), last.trim()) {
        ("", suffix) => Some(length.saturating_sub(number(suffix)?)..length),
        (first, "") => Some(number(first)?..length),
        (first, last) => {
            let (first, last) = (number(first)?, number(last)?);
            (first <= last).then(|| first..last.saturating_add(1).min(length))
        }
    }
}

fn number(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    // More digits than a number has are beyond the end of every file.
    digits.then(|| text.parse().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn single_ranges_are_understood() {
        let of = |text: &str, length| {
            let mut headers = HeaderMap::new();
            headers.insert(header::RANGE, text.parse().unwrap());
            wanted(&headers, length)
        };
        let part = |first, end| Wanted::Part(first..end);
        assert_eq!(of("bytes=0-0", 10), part(0, 1));
        assert_eq!(of("bytes=2-5", 10), part(2, 6));
        assert_eq!(of("bytes=2-", 10), part(2, 10));
        assert_eq!(of("bytes=-3", 10), part(7, 10));
        assert_eq!(of("bytes=-30", 10), part(0, 10));
        assert_eq!(of("Bytes = 9-99999999999999999999999", 10), part(9, 10));
        for beyond in ["bytes=10-", "bytes=10-11", "bytes=-0", "bytes=99999999999999999999999-"] {
            assert_eq!(of(beyond, 10), Wanted::Unsatisfiable, "{beyond}");
        }
        for ignored in
            ["bytes=5-2", "bytes=a-b", "lines=0-1", "bytes=0-1,3-4", "bytes", "bytes=-", "bytes=+1-2"]
        {
            assert_eq!(of(ignored, 10), Wanted::All, "{ignored}");
        }
        assert_eq!(of("bytes=0-10", 0), Wanted::All);
        let mut headers = HeaderMap::new();
        headers.insert(header::RANGE, "bytes=0-1".parse().unwrap());
        headers.insert(header::IF_RANGE, "\"tag\"".parse().unwrap());
        assert_eq!(wanted(&headers, 10), Wanted::All);
    }
}
