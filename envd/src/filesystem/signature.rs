//! Signed addresses of /files: who has one may read or write that one file without the token.
//!
//! `v1_` and, in base64 without padding, the SHA-256 of `path:operation:user:token[:expiration]`.

use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::prelude::BASE64_STANDARD_NO_PAD;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::query::FilesQuery;
use crate::connect::{Code, Error};

/// What a signature allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// GET.
    Read,
    /// POST.
    Write,
}

impl FilesQuery {
    /// Whether the query's signature allows `operation`, where `token` is the sandbox's. The time of the comparison says
    /// nothing about the right signature.
    pub fn check_signature(&self, operation: Operation, token: &str) -> Result<(), Error> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        self.check_signature_at(operation, token, now)
    }

    fn check_signature_at(&self, operation: Operation, token: &str, now: u64) -> Result<(), Error> {
        let denied = |message: &str| Err(Error::new(Code::Unauthenticated, message));
        let Some(given) = &self.signature else {
            return denied("unauthorized: X-Access-Token is missing, and so is the query 'signature'");
        };
        let expected = self.signature(operation, token);
        if !bool::from(expected.as_bytes().ct_eq(given.as_bytes())) {
            return denied("unauthorized: the signature is not valid for this path, operation and user");
        }
        match self.signature_expiration.as_deref().map(str::parse::<u64>) {
            Some(Ok(expiration)) if expiration < now => denied("signature is already expired"),
            Some(Err(_)) => denied("unauthorized: signature_expiration: expected seconds since 1970"),
            _ => Ok(()),
        }
    }

    fn signature(&self, operation: Operation, token: &str) -> String {
        let operation = match operation {
            Operation::Read => "read",
            Operation::Write => "write",
        };
        let mut text = format!("{}:{operation}:{}:{token}", self.path, self.username);
        if let Some(expiration) = &self.signature_expiration {
            text.push_str(&format!(":{expiration}"));
        }
        format!("v1_{}", BASE64_STANDARD_NO_PAD.encode(Sha256::digest(text)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(signature: &str, expiration: Option<&str>) -> FilesQuery {
        FilesQuery {
            path: "/home/user/a.txt".into(),
            username: "user".into(),
            signature: Some(signature.into()),
            signature_expiration: expiration.map(str::to_owned),
        }
    }

    #[test]
    fn signatures_allow_what_they_were_made_for() {
        // printf '/home/user/a.txt:read:user:secret' | sha256sum | xxd -r -p | base64
        let valid = "v1_oO3VOyxXH3pkX/nhqGaqe3v8d+8vNhbGG2sLjuGWsuo";
        // printf '/home/user/a.txt:read:user:secret:1000' | ...
        let until = "v1_q6YzSoZwZ5Xh8ckuo+us9NficJOBxJysxYz9FKSny10";
        let check = |query: FilesQuery, operation, token, now| {
            query.check_signature_at(operation, token, now).map_err(|error| error.message().to_owned())
        };
        assert_eq!(check(query(valid, None), Operation::Read, "secret", 5), Ok(()));
        assert_eq!(check(query(until, Some("1000")), Operation::Read, "secret", 1000), Ok(()));
        let expired = Err("signature is already expired".to_owned());
        assert_eq!(check(query(until, Some("1000")), Operation::Read, "secret", 1001), expired);
        assert!(check(query(valid, None), Operation::Write, "secret", 5).is_err());
        assert!(check(query(valid, None), Operation::Read, "other", 5).is_err());
        assert!(check(query(valid, Some("1000")), Operation::Read, "secret", 5).is_err());
        assert!(check(query(until, Some("2000")), Operation::Read, "secret", 5).is_err());
        assert!(check(query("", None), Operation::Read, "secret", 5).is_err());
        assert!(check(FilesQuery::default(), Operation::Read, "secret", 5).is_err());
        let other = FilesQuery { username: "root".into(), ..query(valid, None) };
        assert!(check(other, Operation::Read, "secret", 5).is_err());
    }
}
