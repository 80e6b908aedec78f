//! File names are bytes, and the API's strings are UTF-8: the agent's escape between the two, read and written here.
//!
//! A byte `b` that is not part of valid UTF-8 is the private-use character U+EF00 + b; a name that holds one of
//! U+EF80 to U+EFFF itself has it escaped byte by byte. The agent's side of it is `envd/src/filesystem/name.rs`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// What is added to an escaped byte.
const BASE: u32 = 0xEF00;

/// The string of the API that stands for a file's name or path.
pub fn encode_name(name: impl AsRef<OsStr>) -> String {
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

/// The name or path that a string of the API stands for.
pub fn decode_name(text: &str) -> OsString {
    let mut bytes = Vec::with_capacity(text.len());
    for character in text.chars() {
        match escaped(character) {
            Some(byte) => bytes.push(byte),
            None => bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    OsString::from_vec(bytes)
}

/// The byte that a character stands for.
fn escaped(character: char) -> Option<u8> {
    let byte = u32::from(character).checked_sub(BASE).and_then(|byte| u8::try_from(byte).ok())?;
    (byte >= 0x80).then_some(byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped_as_the_agent_escapes_them() {
        for (bytes, text) in [
            (&b"plain"[..], "plain"),
            ("é".as_bytes(), "é"),
            (b"a\xffb", "a\u{efff}b"),
            ("\u{efbf}".as_bytes(), "\u{efee}\u{efbe}\u{efbf}"),
            (b"\xe2\x82", "\u{efe2}\u{ef82}"),
        ] {
            assert_eq!(encode_name(OsStr::from_bytes(bytes)), text);
            assert_eq!(decode_name(text).as_bytes(), bytes);
        }
    }
}
