//! Names of images: Docker's short names and skopeo's transports.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use oci_spec::image::Digest;

use crate::SkopeoReference;

/// The registry of a name that does not begin with one.
const DEFAULT_REGISTRY: &str = "docker.io";
/// The longest name: the distribution specification's limit of 255 for a repository, with room for host, tag and digest.
const MAX_NAME: usize = 512;
/// The longest tag (OCI distribution-spec 1.1).
const MAX_TAG: usize = 128;

/// The text names no image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid image reference {text:?}: {reason}")]
pub struct InvalidReference {
    /// What the user wrote.
    pub text: String,
    /// What is wrong with it.
    pub reason: String,
}

/// `[REGISTRY/]REPOSITORY[:TAG][@DIGEST]`, resolved as Docker does: `debian` is `docker.io/library/debian:latest`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ImageName {
    written: String,
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl ImageName {
    /// What the user wrote.
    pub fn written(&self) -> &str {
        &self.written
    }

    /// The registry's host, with a port where one was given.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The repository, as `library/debian`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag: the one written, `latest` when neither tag nor digest was.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, where one was written.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// The full name under which the local store keeps the image. A digest wins over a tag, as with Docker.
    pub fn canonical(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => format!("{}/{}@{digest}", self.registry, self.repository),
            (None, tag) => {
                format!("{}/{}:{}", self.registry, self.repository, tag.as_deref().unwrap_or("latest"))
            }
        }
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.written)
    }
}

impl FromStr for ImageName {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, InvalidReference> {
        let invalid = |reason: String| InvalidReference { text: text.to_owned(), reason };
        if text.is_empty() || text.len() > MAX_NAME {
            return Err(invalid(format!("expected 1 to {MAX_NAME} bytes, got {}", text.len())));
        }
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) => {
                let digest = Digest::from_str(digest)
                    .map_err(|error| invalid(format!("the part after @ is no digest: {error}")))?;
                (name, Some(digest))
            }
            None => (text, None),
        };
        // A colon before the last slash belongs to the registry's port.
        let (path, tag) = match name.rsplit_once(':') {
            Some((path, tag)) if !tag.contains('/') => (path, Some(tag)),
            _ => (name, None),
        };
        if let Some(tag) = tag {
            let first = tag.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
            let rest = tag.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
            if !first || !rest || tag.len() > MAX_TAG {
                return Err(invalid(format!(
                    "tag {tag:?} must be 1 to {MAX_TAG} letters, digits, '_', '.' or '-', and not begin with '.' or '-'"
                )));
            }
        }
        let (registry, repository) = match path.split_once('/') {
            Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => (host, rest),
            _ => (DEFAULT_REGISTRY, path),
        };
        let registry = if registry == "index.docker.io" { DEFAULT_REGISTRY } else { registry };
        let host_byte = |byte: u8| byte.is_ascii_alphanumeric() || b".-:[]".contains(&byte);
        if !registry.bytes().all(host_byte) || registry.starts_with(':') {
            return Err(invalid(format!("{registry:?} is no registry host")));
        }
        for component in repository.split('/') {
            let edge = |byte: Option<u8>| {
                byte.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
            };
            let inner =
                |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte);
            if !edge(component.bytes().next())
                || !edge(component.bytes().last())
                || !component.bytes().all(inner)
            {
                let hint = if text.starts_with("docker:") { "; did you mean docker://?" } else { "" };
                return Err(invalid(format!(
                    "repository component {component:?} must be lowercase letters and digits, with '.', '_' or '-' \
                     between them{hint}"
                )));
            }
        }
        let official = registry == DEFAULT_REGISTRY && !repository.contains('/');
        let repository = if official { format!("library/{repository}") } else { repository.to_owned() };
        let tag = match (tag, &digest) {
            (Some(tag), _) => Some(tag.to_owned()),
            (None, Some(_)) => None,
            (None, None) => Some("latest".to_owned()),
        };
        Ok(Self { written: text.to_owned(), registry: registry.to_owned(), repository, tag, digest })
    }
}

/// Where an image is: a name (local store, registry), or one of skopeo's transports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageReference {
    /// A name, for the local store first and then for its registry.
    Name(ImageName),
    /// `docker://NAME`: in its registry, whatever the local store has.
    Registry(ImageName),
    /// `oci:DIR[:TAG]`: an OCI image layout.
    Layout {
        /// The layout's folder.
        directory: PathBuf,
        /// The value of `org.opencontainers.image.ref.name`; without it the layout must hold one image.
        tag: Option<String>,
    },
    /// `oci-archive:FILE[:TAG]`: a tar file of an OCI image layout.
    Archive {
        /// The tar file.
        file: PathBuf,
        /// As for a layout.
        tag: Option<String>,
    },
    /// `docker-archive:FILE[:NAME]`: what `docker save` writes.
    DockerArchive {
        /// The tar file.
        file: PathBuf,
        /// The image's name in it; without it the archive must hold one image.
        name: Option<String>,
    },
    /// One of the transports that skopeo reads for us.
    Skopeo(SkopeoReference),
}

impl FromStr for ImageReference {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, InvalidReference> {
        // Like skopeo: the path ends at the first colon, the rest is the tag, which may itself hold colons.
        let split = |rest: &str| {
            let (path, tag) = match rest.split_once(':') {
                Some((path, tag)) => (path, Some(tag)),
                None => (rest, None),
            };
            if path.is_empty() || tag.is_some_and(str::is_empty) {
                return Err(InvalidReference {
                    text: text.to_owned(),
                    reason: "expected oci:DIR[:TAG], oci-archive:FILE[:TAG] or docker-archive:FILE[:NAME]"
                        .to_owned(),
                });
            }
            Ok((PathBuf::from(path), tag.map(str::to_owned)))
        };
        if let Some(rest) = text.strip_prefix("docker://") {
            let name = rest.parse();
            name.map(Self::Registry)
                .map_err(|InvalidReference { reason, .. }| InvalidReference { text: text.to_owned(), reason })
        } else if let Some(rest) = text.strip_prefix("oci:") {
            let (directory, tag) = split(rest)?;
            Ok(Self::Layout { directory, tag })
        } else if let Some(rest) = text.strip_prefix("oci-archive:") {
            let (file, tag) = split(rest)?;
            Ok(Self::Archive { file, tag })
        } else if let Some(rest) = text.strip_prefix("docker-archive:") {
            let (file, name) = split(rest)?;
            Ok(Self::DockerArchive { file, name })
        } else if let Some(reference) = SkopeoReference::parse(text) {
            reference.map(Self::Skopeo)
        } else {
            text.parse().map(Self::Name)
        }
    }
}

impl fmt::Display for ImageReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (transport, path, tag) = match self {
            Self::Name(name) => return name.fmt(f),
            Self::Registry(name) => return write!(f, "docker://{name}"),
            Self::Skopeo(reference) => return reference.fmt(f),
            Self::Layout { directory, tag } => ("oci", directory, tag),
            Self::Archive { file, tag } => ("oci-archive", file, tag),
            Self::DockerArchive { file, name } => ("docker-archive", file, name),
        };
        write!(f, "{transport}:{}", path.display())?;
        tag.iter().try_for_each(|tag| write!(f, ":{tag}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_are_dockers() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (written, full) in [
            ("debian", "docker.io/library/debian:latest".to_owned()),
            ("debian:bookworm", "docker.io/library/debian:bookworm".to_owned()),
            ("user/app", "docker.io/user/app:latest".to_owned()),
            ("docker.io/debian", "docker.io/library/debian:latest".to_owned()),
            ("index.docker.io/library/debian", "docker.io/library/debian:latest".to_owned()),
            ("ghcr.io/a/b/c:1", "ghcr.io/a/b/c:1".to_owned()),
            ("localhost/x", "localhost/x:latest".to_owned()),
            ("localhost:5000/x", "localhost:5000/x:latest".to_owned()),
            ("10.0.0.1:5000/x:y", "10.0.0.1:5000/x:y".to_owned()),
            (&format!("debian@{digest}"), format!("docker.io/library/debian@{digest}")),
            (&format!("debian:bookworm@{digest}"), format!("docker.io/library/debian@{digest}")),
        ] {
            let name: ImageName = written.parse().unwrap();
            assert_eq!(name.canonical(), full, "{written}");
            assert_eq!(name.to_string(), written);
            let again: ImageName = full.parse().unwrap();
            assert_eq!(again.canonical(), full);
        }
    }

    #[test]
    fn bad_names_are_refused() {
        for bad in [
            "",
            "Debian",
            "debian:",
            "debian:-x",
            "a//b",
            "/a",
            "a/",
            "a@b",
            "a b",
            "-a",
            "a:b:c",
            "docker:x/Y",
        ] {
            assert!(bad.parse::<ImageReference>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn transports_are_skopeos() {
        let parse = |text: &str| text.parse::<ImageReference>();
        assert_eq!(
            parse("oci:/a/b:docker.io/library/debian:bookworm").unwrap(),
            ImageReference::Layout {
                directory: "/a/b".into(),
                tag: Some("docker.io/library/debian:bookworm".into())
            }
        );
        assert_eq!(
            parse("oci-archive:x.tar").unwrap(),
            ImageReference::Archive { file: "x.tar".into(), tag: None }
        );
        for text in
            ["oci:d", "oci:d:t", "oci-archive:f:t", "debian", "docker://debian:12", "docker-archive:f:x:1"]
        {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
        for bad in ["oci:", "oci::t", "oci:d:", "oci-archive:", "docker://", "docker://A", "docker-archive:"]
        {
            assert!(parse(bad).is_err(), "{bad:?} was accepted");
        }
    }
}
