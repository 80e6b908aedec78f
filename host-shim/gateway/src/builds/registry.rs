//! The registry that finished builds go to, and from which templates come that are missing on this machine.
//!
//! ```text
//! https://HOST[:PORT][/PREFIX]   ──►   HOST[:PORT]/[PREFIX/]<team>/<template>:<build>
//! ```

use std::fmt;
use std::str::FromStr;

use super::name::{BuildId, TemplateId};
use crate::identity::TeamId;

/// Where a registry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegistryUrl {
    host: String,
    prefix: String,
    plain: bool,
}

impl RegistryUrl {
    /// The repository of a template.
    fn repository(&self, team: &TeamId, template: &TemplateId) -> String {
        let Self { host, prefix, .. } = self;
        match prefix.is_empty() {
            true => format!("docker://{host}/{team}/{template}"),
            false => format!("docker://{host}/{prefix}/{team}/{template}"),
        }
    }

    /// Where a build is pushed.
    pub(super) fn destination(&self, team: &TeamId, template: &TemplateId, build: &BuildId) -> String {
        format!("{}:{build}", self.repository(team, template))
    }

    /// Where a build is fetched: what was pushed, and nothing that has its name since.
    pub(super) fn source(&self, team: &TeamId, template: &TemplateId, digest: &str) -> String {
        format!("{}@{digest}", self.repository(team, template))
    }

    /// A `registries.conf` that allows a registry without TLS; none is needed for others.
    pub(super) fn configuration(&self) -> Option<String> {
        self.plain.then(|| format!("[[registry]]\nlocation = \"{}\"\ninsecure = true\n", self.host))
    }
}

impl fmt::Display for RegistryUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, prefix, plain } = self;
        let slash = if prefix.is_empty() { "" } else { "/" };
        write!(f, "http{}://{host}{slash}{prefix}", if *plain { "" } else { "s" })
    }
}

impl FromStr for RegistryUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("expected https://HOST[:PORT][/PREFIX], or http:// for one without TLS, got {text:?}");
        let (scheme, rest) = text.split_once("://").ok_or_else(wrong)?;
        let plain = match scheme {
            "http" => true,
            "https" => false,
            _ => return Err(wrong()),
        };
        let (host, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let prefix = prefix.trim_end_matches('/');
        let is_host = |byte: u8| byte.is_ascii_alphanumeric() || b".:-[]".contains(&byte);
        // Components of a repository's name (OCI distribution-spec 1.1).
        let is_part = |part: &str| {
            let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
            part.bytes().next().is_some_and(plain)
                && part.bytes().all(|byte| plain(byte) || b"._-".contains(&byte))
        };
        let is_valid = !host.is_empty()
            && host.bytes().all(is_host)
            && (prefix.is_empty() || prefix.split('/').all(is_part));
        match is_valid {
            true => Ok(Self { host: host.to_owned(), prefix: prefix.to_owned(), plain }),
            false => Err(wrong()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_has_its_place() {
        let (team, template) = (TeamId("t".into()), TemplateId("a".into()));
        let build = BuildId("b".into());
        let url: RegistryUrl = "http://127.0.0.1:5000".parse().unwrap();
        assert_eq!(url.destination(&team, &template, &build), "docker://127.0.0.1:5000/t/a:b");
        assert!(url.configuration().unwrap().contains("location = \"127.0.0.1:5000\""));
        let url: RegistryUrl = "https://registry.example/boxes/all/".parse().unwrap();
        assert_eq!(
            url.source(&team, &template, "sha256:0"),
            "docker://registry.example/boxes/all/t/a@sha256:0"
        );
        assert_eq!(
            (url.configuration(), url.to_string().as_str()),
            (None, "https://registry.example/boxes/all")
        );
        for bad in [
            "",
            "registry.example",
            "ftp://a",
            "http://",
            "http:///x",
            "http://a/B",
            "http://a/x//y",
            "http://a b",
            "http://u@h",
        ] {
            assert!(bad.parse::<RegistryUrl>().is_err(), "{bad}");
        }
    }
}
