//! `registries.conf`: mirrors, other locations, registries without TLS (containers-registries.conf(5), version 2).
//!
//! ```toml
//! [[registry]]
//! prefix = "docker.io"             # what names begin with; location by default
//! location = "registry.corp/hub"   # where it is
//! insecure = false                 # also without TLS, or with a certificate that nobody knows
//! blocked = false
//! [[registry.mirror]]              # tried first, in this order
//! location = "mirror.corp:5000"
//! ```

use std::path::{Path, PathBuf};

use oci::ImageName;
use serde::Deserialize;

use crate::error::{Error, at};

/// The longest file that is read.
const MAX_FILE: u64 = 1 << 20;
const SYSTEM: &str = "/etc/containers/registries.conf";
/// Docker's registry has a name that is not its host's.
const DOCKER: &str = "docker.io";
const DOCKER_HOST: &str = "registry-1.docker.io";
const USER: &str = "containers/registries.conf";

/// Where a name's images are fetched from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// Host, with a port where one is given.
    pub(crate) host: String,
    /// The repository there.
    pub(crate) repository: String,
    /// How it is spoken to.
    pub(crate) transport: Transport,
}

impl Endpoint {
    /// What people and credential files call the registry.
    pub(super) fn known_as(&self) -> &str {
        if self.host == DOCKER_HOST { DOCKER } else { &self.host }
    }
}

/// How a registry is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    /// TLS, with a certificate that is checked.
    Https,
    /// Without TLS.
    Http,
    /// TLS without a check of the certificate where the registry has it, else none.
    Insecure,
}

/// What the files say.
#[derive(Clone, Debug, Default)]
pub(crate) struct Configuration {
    registries: Vec<Registry>,
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    registry: Vec<Registry>,
    // Version 1, which other tools refuse by now too.
    registries: Option<toml::Value>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Registry {
    #[serde(default)]
    prefix: String,
    #[serde(default)]
    location: String,
    #[serde(default)]
    insecure: bool,
    #[serde(default)]
    blocked: bool,
    #[serde(default)]
    mirror_by_digest_only: bool,
    #[serde(default, rename = "mirror")]
    mirrors: Vec<Mirror>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Mirror {
    location: String,
    #[serde(default)]
    insecure: bool,
    #[serde(default)]
    pull_from_mirror: PullFromMirror,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum PullFromMirror {
    #[default]
    #[serde(alias = "")]
    All,
    DigestOnly,
    TagOnly,
}

impl Configuration {
    /// What the named file says; else the one of `$CONTAINERS_REGISTRIES_CONF`; else the user's or the system's, with what
    /// is in the folder `registries.conf.d` beside it. Nothing where no file is.
    pub(crate) fn load(named: Option<&Path>) -> Result<Self, Error> {
        let variable =
            |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        if let Some(named) = named.map(Path::to_owned).or_else(|| variable("CONTAINERS_REGISTRIES_CONF")) {
            return Ok(Self {
                registries: read(&named)?.ok_or_else(|| Error::Invalid {
                    what: named.display().to_string(),
                    reason: "there is no such registries.conf".to_owned(),
                })?,
            });
        }
        let home = variable("XDG_CONFIG_HOME").or_else(|| Some(variable("HOME")?.join(".config")));
        for file in home.map(|home| home.join(USER)).into_iter().chain([PathBuf::from(SYSTEM)]) {
            let main = read(&file)?;
            let folder = file.with_extension("conf.d");
            let mut more: Vec<_> = match std::fs::read_dir(&folder) {
                Ok(entries) => entries.filter_map(|entry| Some(entry.ok()?.path())).collect(),
                Err(_) => Vec::new(),
            };
            more.retain(|path| path.extension().is_some_and(|extension| extension == "conf"));
            more.sort();
            if main.is_none() && more.is_empty() {
                continue;
            }
            let mut registries = main.unwrap_or_default();
            for file in more {
                for registry in read(&file)?.unwrap_or_default() {
                    // The later one wins.
                    registries.retain(|earlier| earlier.prefix != registry.prefix);
                    registries.push(registry);
                }
            }
            return Ok(Self { registries });
        }
        Ok(Self::default())
    }

    /// What the text of one file says; `path` names it in errors.
    #[cfg(test)]
    pub(crate) fn parse(path: &Path, text: &str) -> Result<Self, Error> {
        parse(path, text).map(|registries| Self { registries })
    }

    /// Where the image may be pulled from, in the order of trying.
    pub(crate) fn pull_from(&self, name: &ImageName) -> Result<Vec<Endpoint>, Error> {
        let by_digest = name.digest().is_some();
        let mut endpoints = Vec::new();
        if let Some((registry, rest)) = self.registry(name)? {
            for mirror in &registry.mirrors {
                let fits = match mirror.pull_from_mirror {
                    PullFromMirror::All => by_digest || !registry.mirror_by_digest_only,
                    PullFromMirror::DigestOnly => by_digest,
                    PullFromMirror::TagOnly => !by_digest,
                };
                if fits {
                    endpoints.push(endpoint(&mirror.location, &rest, Some(mirror.insecure)));
                }
            }
        }
        endpoints.push(self.push_to(name)?);
        Ok(endpoints)
    }

    /// Where the image is pushed to: mirrors take none.
    pub(crate) fn push_to(&self, name: &ImageName) -> Result<Endpoint, Error> {
        Ok(match self.registry(name)? {
            Some((registry, rest)) => endpoint(&registry.location, &rest, Some(registry.insecure)),
            None => endpoint(name.registry(), &format!("/{}", name.repository()), None),
        })
    }

    /// The entry with the longest prefix of the name, and what of the name is behind the prefix.
    fn registry(&self, name: &ImageName) -> Result<Option<(&Registry, String)>, Error> {
        let full = format!("{}/{}", name.registry(), name.repository());
        let found = self
            .registries
            .iter()
            .filter_map(|registry| Some((registry, behind(&full, &registry.prefix)?)))
            .max_by_key(|(registry, _)| registry.prefix.len());
        let Some((registry, rest)) = found else { return Ok(None) };
        if registry.blocked {
            return Err(Error::Registry {
                registry: name.registry().to_owned(),
                reason: format!("registries.conf blocks {}", registry.prefix),
            });
        }
        // `*.example.com` names no place: then the registry is where the name says.
        match registry.location.is_empty() {
            true => Ok(Some((registry, full))),
            false => Ok(Some((registry, rest))),
        }
    }
}

/// What of `full` is behind the prefix: whole components, or a host under `*.domain`.
fn behind(full: &str, prefix: &str) -> Option<String> {
    if let Some(domain) = prefix.strip_prefix('*') {
        let host = full.split('/').next()?;
        return host.split(':').next()?.ends_with(domain).then(|| full[host.len()..].to_owned());
    }
    let rest = full.strip_prefix(prefix)?;
    (rest.is_empty() || rest.starts_with('/')).then(|| rest.to_owned())
}

/// The place `location` + `rest`. Where nothing says how, a registry on this machine is spoken to without TLS, as Docker does.
fn endpoint(location: &str, rest: &str, insecure: Option<bool>) -> Endpoint {
    let whole = format!("{location}{rest}");
    let (host, repository) = whole.split_once('/').unwrap_or((&whole, ""));
    let transport = match insecure {
        Some(true) => Transport::Insecure,
        Some(false) => Transport::Https,
        None if is_loopback(host) => Transport::Http,
        None => Transport::Https,
    };
    let host = if host == DOCKER { DOCKER_HOST } else { host };
    Endpoint { host: host.to_owned(), repository: repository.to_owned(), transport }
}

pub(super) fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// The entries of a file; `None` where there is none.
fn read(path: &Path) -> Result<Option<Vec<Registry>>, Error> {
    use std::io::Read;
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(at(path)(error)),
    };
    let mut text = String::new();
    file.take(MAX_FILE).read_to_string(&mut text).map_err(at(path))?;
    parse(path, &text).map(Some)
}

fn parse(path: &Path, text: &str) -> Result<Vec<Registry>, Error> {
    let invalid = |reason: String| Error::Invalid { what: path.display().to_string(), reason };
    let file: File = toml::from_str(text).map_err(|error| invalid(error.to_string()))?;
    if file.registries.is_some() {
        return Err(invalid(
            "[registries.*] is version 1 of registries.conf; write [[registry]] entries (version 2)"
                .to_owned(),
        ));
    }
    let mut registries = file.registry;
    for registry in &mut registries {
        if registry.prefix.is_empty() {
            registry.prefix = registry.location.clone();
        }
        let wildcard = registry.prefix.starts_with("*.");
        if registry.location.is_empty() && !wildcard {
            registry.location = registry.prefix.clone();
        }
        let places = registry.mirrors.iter().map(|mirror| &mirror.location);
        for place in places.chain([&registry.prefix]).chain((!wildcard).then_some(&registry.location)) {
            let host = place.split('/').next().unwrap_or_default();
            let known = |byte: u8| byte.is_ascii_alphanumeric() || b".-:[]*_".contains(&byte);
            if host.is_empty() || place.contains("://") || !host.bytes().all(known) || place.ends_with('/') {
                return Err(invalid(format!(
                    "{place:?} is no place of a registry: expected HOST[:PORT][/PATH], without a scheme or a slash at the end"
                )));
            }
        }
    }
    Ok(registries)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn configuration(text: &str) -> Result<Configuration, Error> {
        Configuration::parse(Path::new("registries.conf"), text)
    }

    fn places(configuration: &Configuration, name: &str) -> Vec<String> {
        let endpoints = configuration.pull_from(&name.parse().unwrap()).unwrap();
        let text = |endpoint: &Endpoint| {
            format!("{}/{} {:?}", endpoint.host, endpoint.repository, endpoint.transport)
        };
        endpoints.iter().map(text).collect()
    }

    #[test]
    fn only_this_machine_is_without_tls_unasked() {
        for (host, loopback) in [
            ("localhost", true),
            ("localhost:5000", true),
            ("127.0.0.1:5000", true),
            ("[::1]:5000", true),
            ("docker.io", false),
            ("localhost.example.com", false),
            ("10.0.0.1:5000", false),
        ] {
            assert_eq!(is_loopback(host), loopback, "{host}");
        }
        let none = Configuration::default();
        assert_eq!(places(&none, "debian"), ["registry-1.docker.io/library/debian Https"]);
        assert_eq!(places(&none, "localhost:5000/x"), ["localhost:5000/x Http"]);
        let tls = configuration("[[registry]]\nlocation = \"localhost:5000\"\n").unwrap();
        assert_eq!(places(&tls, "localhost:5000/x"), ["localhost:5000/x Https"]);
    }

    #[test]
    fn mirrors_come_first_and_the_longest_prefix_counts() {
        let configuration = configuration(
            r#"
            unqualified-search-registries = ["docker.io"]
            [[registry]]
            prefix = "docker.io"
            location = "registry.corp/hub"
            [[registry.mirror]]
            location = "mirror.corp:5000"
            insecure = true
            [[registry.mirror]]
            location = "digests.corp"
            pull-from-mirror = "digest-only"
            [[registry]]
            prefix = "docker.io/team"
            location = "team.corp"
            [[registry]]
            prefix = "*.internal"
            insecure = true
            [[registry]]
            location = "bad.example"
            blocked = true
            [aliases]
            "x" = "docker.io/y"
            "#,
        )
        .unwrap();
        assert_eq!(
            places(&configuration, "debian"),
            ["mirror.corp:5000/library/debian Insecure", "registry.corp/hub/library/debian Https"]
        );
        let by_digest = format!("debian@sha256:{}", "a".repeat(64));
        assert_eq!(places(&configuration, &by_digest).len(), 3);
        assert_eq!(places(&configuration, "team/app"), ["team.corp/app Https"]);
        assert_eq!(places(&configuration, "teams/app").len(), 2, "a component is taken whole");
        assert_eq!(places(&configuration, "a.internal:5000/x"), ["a.internal:5000/x Insecure"]);
        assert_eq!(places(&configuration, "a.internal.example/x"), ["a.internal.example/x Https"]);
        let push = configuration.push_to(&"debian".parse().unwrap()).unwrap();
        assert_eq!(push.host, "registry.corp", "nothing is pushed to a mirror");
        let error = configuration.pull_from(&"bad.example/x".parse().unwrap()).unwrap_err().to_string();
        assert!(error.contains("blocks"), "{error}");
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_the_file() {
        for (text, reason) in [
            ("[[registry]]\nlocation = 1", "line 2"),
            ("[[registry]]\nlocation = \"https://x\"", "without a scheme"),
            ("[[registry]]\nlocation = \"\"", "no place"),
            ("[[registry]]\nlocation = \"x/\"", "slash at the end"),
            ("[[registry]]\nlocation = \"a b\"", "no place"),
            ("[registries.search]\nregistries = []", "version 1"),
            ("[[registry]]\nlocation = \"x\"\n[[registry.mirror]]\n", "location"),
        ] {
            let error = configuration(text).unwrap_err().to_string();
            assert!(error.starts_with("registries.conf: ") && error.contains(reason), "{text}: {error}");
        }
    }
}
