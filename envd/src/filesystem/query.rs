//! The query of /files.

use envd_channel::name;

use crate::connect::{Code, Error};

/// The query of /files, percent-decoded. Bytes that are not UTF-8 are escaped as file names are.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct FilesQuery {
    /// The path as the client wrote it.
    pub(super) path: String,
    pub(super) username: String,
    pub(super) signature: Option<String>,
    pub(super) signature_expiration: Option<String>,
}

impl FilesQuery {
    /// Reads it; other fields are the business of newer clients.
    pub fn parse(query: &str) -> Result<Self, Error> {
        let mut parsed = Self::default();
        for field in query.split('&') {
            let (key, value) = field.split_once('=').unwrap_or((field, ""));
            match key {
                "path" => parsed.path = decode(key, value)?,
                "username" => parsed.username = decode(key, value)?,
                "signature" => parsed.signature = Some(decode(key, value)?),
                "signature_expiration" => parsed.signature_expiration = Some(decode(key, value)?),
                _ => {}
            }
        }
        Ok(parsed)
    }
}

fn decode(key: &str, value: &str) -> Result<String, Error> {
    let mut bytes = Vec::with_capacity(value.len());
    let mut rest = value.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digits = [rest.next(), rest.next()].map(|digit| char::from(digit?).to_digit(16));
                let [Some(high), Some(low)] = digits else {
                    let message = format!("query '{key}': expected two hexadecimal digits after each %");
                    return Err(Error::new(Code::InvalidArgument, message));
                };
                (high << 4 | low) as u8
            }
            byte => byte,
        });
    }
    if bytes.contains(&0) {
        let message = format!("query '{key}' holds a NUL byte, which no name can");
        return Err(Error::new(Code::InvalidArgument, message));
    }
    Ok(String::from_utf8(bytes).unwrap_or_else(|error| {
        name::encode(<std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(error.into_bytes()))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_decoded_and_bytes_are_kept() {
        let query = FilesQuery::parse(
            "path=%2Fa+b%20c&username=user&signature=v1_a%2Fb%2B&new=1&signature_expiration=5",
        );
        let expected = FilesQuery {
            path: "/a b c".into(),
            username: "user".into(),
            signature: Some("v1_a/b+".into()),
            signature_expiration: Some("5".into()),
        };
        assert_eq!(query, Ok(expected));
        assert_eq!(FilesQuery::parse("path=%c3%a9%0a").unwrap().path, "é\n");
        assert_eq!(FilesQuery::parse("path=%ff").unwrap().path, "\u{efff}");
        assert_eq!(FilesQuery::parse("path=%ee%bf%bf").unwrap().path, "\u{efff}");
        assert_eq!(FilesQuery::parse(""), Ok(FilesQuery::default()));
        for bad in ["path=%", "path=%4", "path=%zz", "path=%00", "path=%+1"] {
            assert_eq!(FilesQuery::parse(bad).unwrap_err().code(), Code::InvalidArgument, "{bad}");
        }
    }
}
