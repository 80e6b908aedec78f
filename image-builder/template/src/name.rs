//! Names of templates.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The longest template name; with a suffix it must still be a file name.
const MAX_LENGTH: usize = 128;

/// A template's name: `[a-z0-9]` first, then also `.`, `_` and `-`; so it is always one plain file name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TemplateName(String);

/// The text is not a template name.
#[derive(Debug, thiserror::Error)]
#[error(
    "invalid template name {0:?}: expected 1 to {MAX_LENGTH} of a-z, 0-9, '.', '_' and '-', the first a letter or a digit"
)]
pub struct InvalidName(String);

impl TemplateName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TemplateName {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let valid = text.len() <= MAX_LENGTH
            && text.bytes().next().is_some_and(plain)
            && text.bytes().all(|byte| plain(byte) || b"._-".contains(&byte));
        if valid { Ok(Self(text.to_owned())) } else { Err(InvalidName(text.to_owned())) }
    }
}

impl TryFrom<String> for TemplateName {
    type Error = InvalidName;

    fn try_from(text: String) -> Result<Self, InvalidName> {
        text.parse()
    }
}

impl From<TemplateName> for String {
    fn from(name: TemplateName) -> Self {
        name.0
    }
}

impl fmt::Display for TemplateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain_file_names() {
        for good in ["a", "cowsay", "py3.11", "0", "a_b-c"] {
            assert_eq!(good.parse::<TemplateName>().unwrap().as_str(), good);
        }
        let long = "a".repeat(MAX_LENGTH + 1);
        for bad in ["", ".", "..", ".a", "-a", "A", "a/b", "a b", "ä", long.as_str()] {
            assert!(bad.parse::<TemplateName>().is_err(), "{bad:?} was accepted");
        }
    }
}
