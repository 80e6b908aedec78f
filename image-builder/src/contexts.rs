//! `--build-context NAME=SOURCE`: trees that `FROM`, `COPY --from` and mounts name beside stages and images.
//!
//! As with docker buildx, a context comes before a stage or image of its name, so that a build can be given another base
//! without a change of its Dockerfile. An image is found under each way to write its name: `alpine` is also
//! `docker.io/library/alpine:latest`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use oci::{ImageName, ImageReference};

use crate::error::Error;

/// The longest name; an image's name is at most as long.
const MAX_NAME: usize = 512;
const EXPECTED: &str =
    "expected NAME=FOLDER, NAME=docker-image://IMAGE, NAME=oci-layout://FOLDER[:TAG] or NAME=target:STAGE";

/// Where the files of a context are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NamedContext {
    /// In a folder, less what its `.dockerignore` names.
    Folder(PathBuf),
    /// In an image, which also has a config.
    Image(ImageReference),
    /// In another stage of the Dockerfile.
    Stage(String),
    /// In an archive, whose owners mean nothing, as those of a folder.
    Archive(PathBuf),
}

/// Contexts by their names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contexts(BTreeMap<String, NamedContext>);

impl Contexts {
    /// Takes `NAME=SOURCE`.
    pub fn parse(&mut self, written: &str) -> Result<(), Error> {
        let wrong = |reason: String| Error::Invalid {
            what: format!("--build-context {written:?}"),
            reason: format!("{reason}; {EXPECTED}"),
        };
        let (name, source) =
            written.split_once('=').ok_or_else(|| wrong("it has no equals sign".to_owned()))?;
        if name.is_empty() || source.is_empty() || name.len() > MAX_NAME {
            return Err(wrong("a name or source is empty or too long".to_owned()));
        }
        let (scheme, rest) = match source.split_once("://") {
            Some((scheme, rest)) => (scheme, rest),
            None => ("", source),
        };
        let context = match scheme {
            "docker-image" => NamedContext::Image(rest.parse().map_err(|error| wrong(format!("{error}")))?),
            "oci-layout" => {
                NamedContext::Image(format!("oci:{rest}").parse().map_err(|error| wrong(format!("{error}")))?)
            }
            "" => match rest.strip_prefix("target:") {
                Some(stage) if !stage.is_empty() => NamedContext::Stage(stage.to_owned()),
                _ => NamedContext::Folder(PathBuf::from(rest)),
            },
            other => return Err(wrong(format!("{other}:// is not supported yet"))),
        };
        self.insert(name, context);
        Ok(())
    }

    /// Adds a context, in place of one of its name.
    pub fn insert(&mut self, name: &str, context: NamedContext) {
        self.0.insert(name.to_owned(), context);
    }

    /// The context that is meant, with the name that it was given.
    pub fn find(&self, written: &str) -> Option<(&str, &NamedContext)> {
        if self.0.is_empty() {
            return None;
        }
        let canonical = |name: &str| name.parse::<ImageName>().ok().map(|name| name.canonical());
        let wanted = canonical(written);
        let found = self.0.get_key_value(written).or_else(|| {
            self.0.iter().find(|(name, _)| {
                name.eq_ignore_ascii_case(written) || wanted.is_some() && canonical(name) == wanted
            })
        });
        found.map(|(name, context)| (name.as_str(), context))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_are_found_by_every_way_to_write_their_name() {
        let mut contexts = Contexts::default();
        for written in [
            "alpine=docker-image://registry.example/mine:1",
            "src=../source",
            "lay=oci-layout:///srv/images:v1",
            "later=target:build",
            "ghcr.io/a/b:2=./c",
        ] {
            contexts.parse(written).unwrap();
        }
        for (written, name) in [
            ("alpine", Some("alpine")),
            ("alpine:latest", Some("alpine")),
            ("docker.io/library/alpine", Some("alpine")),
            ("alpine:3.20", None),
            ("SRC", Some("src")),
            ("ghcr.io/a/b:2", Some("ghcr.io/a/b:2")),
            ("ghcr.io/a/b", None),
        ] {
            assert_eq!(contexts.find(written).map(|(name, _)| name), name, "{written}");
        }
        assert_eq!(contexts.find("later").unwrap().1, &NamedContext::Stage("build".into()));
        assert_eq!(contexts.find("src").unwrap().1, &NamedContext::Folder("../source".into()));
        let layout = NamedContext::Image("oci:/srv/images:v1".parse().unwrap());
        assert_eq!(contexts.find("lay").unwrap().1, &layout);
        for bad in ["", "a", "=b", "a=", "a=https://example.com/x.git", "a=docker-image://UPPER"] {
            let error = contexts.parse(bad).unwrap_err().to_string();
            assert!(error.contains("expected NAME=FOLDER"), "{bad}: {error}");
        }
    }
}
