//! Names of sandboxes.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Characters that say which node a sandbox is on.
const NODE_PREFIX: usize = 3;

/// Random characters behind the prefix: 32^17 ids cannot be guessed, and do not meet by chance.
const RANDOM: usize = 17;

/// The longest id that is accepted; as part of a host name's label it must stay below 63.
const MAX_LENGTH: usize = 40;

const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

/// A sandbox's id: `[a-z0-9]+`, the first three characters its node, so that any proxy can route by it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String", extend("pattern" = "^[a-z0-9]{4,40}$"))]
pub struct SandboxId(String);

/// The text is not a sandbox id.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid sandbox id {0:?}: expected 4 to {MAX_LENGTH} of a-z and 0-9")]
pub struct InvalidId(String);

impl SandboxId {
    /// A fresh id on the node of that name.
    pub fn generate(node: &str) -> std::io::Result<Self> {
        let mut random = [0; RANDOM];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        let plain = node.bytes().map(|byte| byte.to_ascii_lowercase()).filter(u8::is_ascii_alphanumeric);
        let prefix = plain.chain(std::iter::repeat(b'0')).take(NODE_PREFIX);
        // 256 is a multiple of 32: each character is as likely as any other.
        let random = random.iter().map(|byte| ALPHABET[usize::from(byte % 32)]);
        Ok(Self(prefix.chain(random).map(char::from).collect()))
    }

    /// A fresh id on this machine.
    pub fn generate_here() -> std::io::Result<Self> {
        Self::generate(&rustix::system::uname().nodename().to_string_lossy())
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SandboxId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let valid = (NODE_PREFIX + 1..=MAX_LENGTH).contains(&text.len())
            && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
        if valid { Ok(Self(text.to_owned())) } else { Err(InvalidId(text.to_owned())) }
    }
}

impl TryFrom<String> for SandboxId {
    type Error = InvalidId;

    fn try_from(text: String) -> Result<Self, InvalidId> {
        text.parse()
    }
}

impl From<SandboxId> for String {
    fn from(id: SandboxId) -> Self {
        id.0
    }
}

impl fmt::Display for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fresh_id_begins_with_its_node_and_parses() {
        for (node, prefix) in [("Node-7.example", "nod"), ("é", "000"), ("a", "a00")] {
            let id = SandboxId::generate(node).unwrap();
            assert_eq!(&id.as_str()[..NODE_PREFIX], prefix);
            assert_eq!(id.as_str().parse::<SandboxId>(), Ok(id));
        }
        assert_ne!(SandboxId::generate("n").unwrap(), SandboxId::generate("n").unwrap());
    }

    #[test]
    fn what_is_no_file_name_or_host_label_is_refused() {
        let long = "a".repeat(MAX_LENGTH + 1);
        for bad in ["", "abc", "ABCD", "ab-c", "../x", "a b c", long.as_str()] {
            assert!(bad.parse::<SandboxId>().is_err(), "{bad:?} was accepted");
        }
    }
}
