//! Ignore files: the last pattern that fits decides, so a pattern more can only take or give what itself fits.
//!
//! Input: a path and an ignore file, a NUL between them.
#![no_main]

use dockerfile::Ignore;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let mut parts = input.splitn(2, |byte| *byte == 0);
    let (Some(path), Some(text)) = (parts.next(), parts.next()) else { return };
    let Ok(ignore) = Ignore::parse("I", text) else { return };
    let excluded = ignore.excludes(path);
    if excluded {
        assert!(!ignore.is_empty());
        // What is below something that is left out by the last word is left out, too.
        if !ignore.has_exceptions() {
            assert!(ignore.excludes(&[path, b"/below"].concat()));
        }
    }
    let all = Ignore::parse("I", &[text, b"\n**\n"].concat()).unwrap();
    assert!(all.excludes(path));
    let none = Ignore::parse("I", &[text, b"\n!**\n"].concat()).unwrap();
    assert!(!none.excludes(path));
});
