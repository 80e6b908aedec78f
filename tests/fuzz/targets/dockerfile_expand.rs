//! The expansion: it ends, its result is bounded, and text without anything special is its own expansion.
//!
//! Input: a value and a text, a NUL between them.
#![no_main]

use dockerfile::expand::{MAX_RESULT, Variables, expand, expand_heredoc};
use libfuzzer_sys::fuzz_target;

struct Value<'a>(&'a str);

impl Variables for Value<'_> {
    fn value(&self, name: &str) -> Option<&str> {
        (name == "v").then_some(self.0)
    }
}

fuzz_target!(|input: &[u8]| {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let (value, text) = text.split_once('\0').unwrap_or(("value", text));
    let variables = Value(value);
    for escape in ['\\', '`'] {
        match expand(text, escape, &variables) {
            Ok(expanded) => {
                assert!(expanded.len() <= 2 * MAX_RESULT);
                if !text.contains(['$', '\'', '"', escape]) {
                    assert_eq!(expanded, text);
                }
            }
            Err(error) => assert!(error.to_string().len() < 100_000),
        }
    }
    let _ = expand_heredoc(text, &variables);
    let escaped: String = text.chars().flat_map(|character| ['\\', character]).collect();
    assert_eq!(expand(&escaped, '\\', &variables).as_deref(), Ok(text));
});
