//! File names are bytes, and the API's strings are UTF-8: the escape between the two.
//!
//! ```text
//! bytes on disk      61 ff 62        c3 a9     ee be bf (U+EFBF, in UTF-8)
//! string of the API  a U+EFFF b      é         U+EFEE U+EFBE U+EFBF
//! ```
//!
//! A byte `b` that is not part of valid UTF-8 becomes the private-use character U+EF00 + b (the idea is MirBSD's OPTU
//! encoding). Such bytes are 0x80 to 0xFF, so U+EF80 to U+EFFF are taken; a name that holds one of these characters
//! itself has it escaped byte by byte. So no two names have one string, every other name is its own string, and what a
//! client was shown leads back to that very file in every call.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

/// What is added to an escaped byte.
const BASE: u32 = 0xEF00;

/// The string that stands for a file's name or path.
pub fn encode(name: impl AsRef<OsStr>) -> String {
    let mut text = String::with_capacity(name.as_ref().len());
    let escape = |text: &mut String, bytes: &[u8]| {
        text.extend(bytes.iter().filter_map(|byte| char::from_u32(BASE + u32::from(*byte))));
    };
    for chunk in name.as_ref().as_bytes().utf8_chunks() {
        for character in chunk.valid().chars() {
            match escaped(character) {
                Some(_) => escape(&mut text, character.encode_utf8(&mut [0; 4]).as_bytes()),
                None => text.push(character),
            }
        }
        escape(&mut text, chunk.invalid());
    }
    text
}

/// The path that a string of the API stands for.
pub fn decode(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    for character in text.chars() {
        match escaped(character) {
            Some(byte) => bytes.push(byte),
            None => bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    OsString::from_vec(bytes).into()
}

/// The byte that a character stands for.
fn escaped(character: char) -> Option<u8> {
    let byte = u32::from(character).checked_sub(BASE).and_then(|byte| u8::try_from(byte).ok())?;
    (byte >= 0x80).then_some(byte)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encoded(bytes: &[u8]) -> String {
        encode(OsStr::from_bytes(bytes))
    }

    #[test]
    fn ordinary_names_are_themselves() {
        for name in ["a", "é\n\"", "日本", "\u{ef7f}", "\u{f000}", "\u{ef00}"] {
            assert_eq!(encode(name), name);
            assert_eq!(decode(name), PathBuf::from(name));
        }
    }

    #[test]
    fn other_bytes_are_escaped() {
        assert_eq!(encoded(b"a\xffb"), "a\u{efff}b");
        assert_eq!(encoded("\u{efbf}".as_bytes()), "\u{efee}\u{efbe}\u{efbf}");
        // The beginning of a longer sequence, a surrogate, an overlong slash.
        assert_eq!(encoded(b"\xe2\x82"), "\u{efe2}\u{ef82}");
        assert_eq!(encoded(b"\xed\xa0\x80"), "\u{efed}\u{efa0}\u{ef80}");
        assert_eq!(encoded(b"\xc0\xaf"), "\u{efc0}\u{efaf}");
    }

    proptest! {
        #[test]
        fn every_name_comes_back(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let name = decode(&encoded(&bytes));
            prop_assert_eq!(name.as_os_str().as_bytes(), bytes.as_slice());
        }

        #[test]
        fn names_made_of_escapes_come_back(text in "[\u{ef70}-\u{f010}a/]{0,20}") {
            prop_assert_eq!(decode(&encode(&text)), PathBuf::from(text));
        }

        #[test]
        fn no_string_becomes_a_nul_or_a_slash_that_it_does_not_show(text in any::<String>()) {
            let path = decode(&text);
            for byte in [0, b'/', b'.'] {
                let count = |bytes: &[u8]| bytes.iter().filter(|b| **b == byte).count();
                prop_assert_eq!(count(path.as_os_str().as_bytes()), count(text.as_bytes()));
            }
        }
    }
}
