//! Who may do what: keys of teams, tokens of sandboxes.
//!
//! A team's API key is shown once and kept as its SHA-256 (it is 160 random bits: nothing to stretch). A sandbox's tokens are
//! kept as they are, because `connect` must give them again; `gateway.db` is its owner's alone (0600).

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// What the SDKs' keys begin with, by convention.
const KEY_PREFIX: &str = "e2b_";

/// Random bytes of a key: 40 hexadecimal digits.
const KEY_BYTES: usize = 20;

/// Random bytes of a token.
const TOKEN_BYTES: usize = 32;

/// A team's id.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TeamId(pub String);

impl fmt::Display for TeamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A team's API key. Not printed by `{:?}`.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(String);

impl ApiKey {
    /// A fresh key.
    pub fn generate() -> std::io::Result<Self> {
        Ok(Self(format!("{KEY_PREFIX}{}", hex(&random::<KEY_BYTES>()?))))
    }

    /// The key as the client sends it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(..)")
    }
}

/// What is kept of a key, in hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct KeyHash(String);

impl KeyHash {
    /// The hash of what a client sent.
    pub fn of(key: &str) -> Self {
        Self(hex(&Sha256::digest(key.as_bytes())))
    }

    /// As it is kept.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A fresh token of a sandbox.
pub fn generate_token() -> std::io::Result<String> {
    Ok(hex(&random::<TOKEN_BYTES>()?))
}

/// Whether two secrets are the same, in a time that does not tell where they differ.
pub fn same(a: &str, b: &str) -> bool {
    use subtle::ConstantTimeEq;
    a.as_bytes().ct_eq(b.as_bytes()).into()
}

/// Random bytes from the kernel.
pub fn random<const N: usize>() -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    // Up to 256 bytes come whole (getrandom(2)).
    if got == N { Ok(bytes) } else { Err(std::io::ErrorKind::UnexpectedEof.into()) }
}

/// Bytes in lowercase hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_look_as_the_sdks_expect_and_are_never_shown() {
        let key = ApiKey::generate().unwrap();
        assert_eq!(key.as_str().len(), 44);
        assert!(key.as_str().starts_with("e2b_"));
        assert_ne!(key, ApiKey::generate().unwrap());
        assert_eq!(format!("{key:?}"), "ApiKey(..)");
    }

    #[test]
    fn a_hash_is_the_known_one() {
        let known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(KeyHash::of("abc").as_str(), known);
    }
}
