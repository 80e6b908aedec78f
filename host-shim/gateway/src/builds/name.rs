//! Names of templates and builds: what clients write, and what they become in folders, images and registries.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use template::TemplateName;

use crate::ApiError;
use crate::identity::{hex, random};
use crate::store::Team;

/// The tag of a build whose request names none, and of a template that is named without one.
pub const DEFAULT_TAG: &str = "default";

/// Tags of one build, and of one request.
const MAX_TAGS: usize = 20;

/// The longest tag (OCI distribution-spec 1.1, as with images).
const MAX_TAG: usize = 128;

/// Random bytes of a template's id: 20 hexadecimal digits, as long as E2B's.
const ID_BYTES: usize = 10;

/// Whose images the builds are in the local store. No registry has that name (RFC 2606), so none is ever asked for them.
const IMAGE_HOST: &str = "build.tiffin.invalid";

/// What an image's reference begins with where it is no name of an image: these read files of this machine.
const TRANSPORTS: [&str; 7] =
    ["docker", "oci", "oci-archive", "docker-archive", "docker-daemon", "dir", "containers-storage"];

/// The longest reference of an image that is taken.
const MAX_IMAGE: usize = 512;

/// A template's id.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TemplateId(pub(crate) String);

impl TemplateId {
    /// A fresh one.
    pub fn generate() -> std::io::Result<Self> {
        Ok(Self(hex(&random::<ID_BYTES>()?)))
    }
}

impl fmt::Display for TemplateId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for TemplateId {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        let valid = text.len() == ID_BYTES * 2 && text.bytes().all(is_hex);
        if valid { Ok(Self(text.to_owned())) } else { Err(()) }
    }
}

/// A build's id: a UUID, because clients parse it as one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BuildId(pub(crate) String);

impl BuildId {
    /// A fresh one (RFC 9562, version 4).
    pub fn generate() -> std::io::Result<Self> {
        let mut bytes = random::<16>()?;
        bytes[6] = (bytes[6] & 0x0f) | 0x40;
        bytes[8] = (bytes[8] & 0x3f) | 0x80;
        let digits = hex(&bytes);
        let parts = [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]];
        Ok(Self(parts.join("-")))
    }
}

impl fmt::Display for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for BuildId {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let valid = text.len() == 36
            && text.bytes().enumerate().all(|(index, byte)| match index {
                8 | 13 | 18 | 23 => byte == b'-',
                _ => byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte),
            });
        if valid { Ok(Self(text.to_owned())) } else { Err(()) }
    }
}

/// The folder of a build's template: no name that an operator gives, and not reached by it.
pub fn folder(template: &TemplateId, build: &BuildId) -> String {
    format!("{template}.{build}")
}

/// The build that a template folder is of; `None` for one that the operator made.
pub fn of_folder(name: &str) -> Option<(TemplateId, BuildId)> {
    let (template, build) = name.split_once('.')?;
    Some((template.parse().ok()?, build.parse().ok()?))
}

/// The name of a build's image in the local store.
pub(super) fn image(template: &TemplateId, build: &BuildId) -> String {
    format!("{IMAGE_HOST}/{template}:{build}")
}

/// The name of what a build begins with: its base, with the user of sandboxes.
pub(super) fn base_image(template: &TemplateId, build: &BuildId) -> String {
    format!("{}-base", image(template, build))
}

/// What a client calls a template: `[NAMESPACE/]NAME[:TAG]`, where NAME may be an id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The name or id.
    pub name: TemplateName,
    /// The tag, where one is named.
    pub tag: Option<String>,
}

impl Wanted {
    /// Reads it as a member of the team does. `None` for what can be no template of the team.
    pub fn parse(team: &Team, text: &str) -> Option<Self> {
        let (path, tag) = match text.split_once(':') {
            Some((path, tag)) => (path, Some(checked_tag(tag).ok()?)),
            None => (text, None),
        };
        let name = match path.split_once('/') {
            None => path,
            Some((space, name)) => {
                let is_own = space == team.id.0 || space.eq_ignore_ascii_case(&team.name);
                is_own.then_some(name)?
            }
        };
        // As E2B has it: names are in small letters, however they are written.
        Some(Self { name: name.to_ascii_lowercase().parse().ok()?, tag })
    }

    /// The tag, or the one that stands for none.
    pub fn tag(&self) -> &str {
        self.tag.as_deref().unwrap_or(DEFAULT_TAG)
    }
}

/// The name and tags that a build's request asks for.
pub(crate) fn requested(
    team: &Team,
    name: &str,
    tags: &[String],
) -> Result<(TemplateName, Vec<String>), ApiError> {
    let wanted = Wanted::parse(team, name).ok_or_else(|| {
        let shown: String = name.chars().take(64).collect();
        ApiError::bad_request(format!(
            "invalid template name {shown:?}: expected NAME or NAME:TAG, the name of 1 to 128 of a-z, 0-9, '.', '_' and '-' \
             (a letter or a digit first), the tag of 1 to {MAX_TAG} of a-z, A-Z, 0-9, '.', '_' and '-'"
        ))
    })?;
    let mut all: Vec<String> = wanted.tag.into_iter().collect();
    for tag in checked_tags(tags)? {
        if !all.contains(&tag) {
            all.push(tag);
        }
    }
    if all.is_empty() {
        all.push(DEFAULT_TAG.to_owned());
    }
    Ok((wanted.name, all))
}

/// Tags of a request.
pub(crate) fn checked_tags(tags: &[String]) -> Result<Vec<String>, ApiError> {
    if tags.len() > MAX_TAGS {
        let message = format!("{} tags, at most {MAX_TAGS} allowed", tags.len());
        return Err(ApiError::bad_request(message));
    }
    tags.iter().map(|tag| checked_tag(tag)).collect()
}

fn checked_tag(tag: &str) -> Result<String, ApiError> {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let valid = tag.len() <= MAX_TAG
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|byte| word(byte) || b".-".contains(&byte));
    if valid {
        return Ok(tag.to_owned());
    }
    let shown: String = tag.chars().take(64).collect();
    Err(ApiError::bad_request(format!(
        "invalid tag {shown:?}: expected 1 to {MAX_TAG} of a-z, A-Z, 0-9, '.', '_' and '-', the first no '.' and no '-'"
    )))
}

/// Whether that is a name of an image, `[REGISTRY[:PORT]/]PATH[:TAG][@DIGEST]`, and none of a build or of this machine's files.
pub(super) fn is_foreign_image(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let (name, digest) = text.split_once('@').map_or((text, None), |(name, digest)| (name, Some(digest)));
    let parts: Vec<&str> = name.split('/').collect();
    let last = parts.len() - 1;
    let is_part = |(index, part): (usize, &&str)| {
        let (word, rest) = part.split_once(':').map_or((*part, None), |(word, rest)| (word, Some(rest)));
        let rest_is_valid = match rest {
            None => true,
            // A tag.
            Some(tag) if index == last => !tag.is_empty() && tag.bytes().all(plain),
            // A port.
            Some(port) if index == 0 => !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()),
            Some(_) => false,
        };
        !word.is_empty() && word.bytes().all(plain) && rest_is_valid
    };
    let first = parts[0].split(':').next().unwrap_or_default();
    text.len() <= MAX_IMAGE
        && parts.iter().enumerate().all(is_part)
        && digest.is_none_or(|digest| digest.bytes().all(|byte| plain(byte) || byte == b':'))
        && !(parts[0].contains(':') && TRANSPORTS.contains(&first))
        && !first.eq_ignore_ascii_case(IMAGE_HOST)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Capacity;
    use crate::identity::TeamId;

    fn team() -> Team {
        Team {
            id: TeamId("0011".into()),
            name: "Ours".into(),
            quota: Capacity::UNLIMITED,
            rate: None,
            disk_mib: 0,
        }
    }

    #[test]
    fn ids_are_read_back_and_folders_are_known() {
        let (template, build) = (TemplateId::generate().unwrap(), BuildId::generate().unwrap());
        assert_eq!(of_folder(&folder(&template, &build)), Some((template.clone(), build.clone())));
        assert!(folder(&template, &build).parse::<TemplateName>().is_ok());
        assert_eq!((build.0.len(), &build.0[14..15]), (36, "4"));
        for other in ["base", "a.b", "py3.11", &format!("{template}.x"), &format!("x.{build}"), "."] {
            assert_eq!(of_folder(other), None, "{other}");
        }
    }

    #[test]
    fn names_are_the_teams_own() {
        let wanted = |text: &str| Wanted::parse(&team(), text).map(|w| (w.name.to_string(), w.tag));
        let is = |name: &str, tag: Option<&str>| Some((name.to_owned(), tag.map(str::to_owned)));
        assert_eq!(wanted("a"), is("a", None));
        assert_eq!(wanted("My-Box:v1.0"), is("my-box", Some("v1.0")));
        assert_eq!(wanted("ours/a:b"), is("a", Some("b")));
        assert_eq!(wanted("0011/a"), is("a", None));
        for bad in ["", ":a", "a:", "theirs/a", "ours/a/b", "a:b:c", "../a", "a b", "a:.x"] {
            assert_eq!(wanted(bad), None, "{bad}");
        }
        let tags = |name: &str, tags: &[&str]| {
            let tags: Vec<String> = tags.iter().map(|tag| (*tag).to_owned()).collect();
            requested(&team(), name, &tags)
                .map(|(_, tags)| tags.join(" "))
                .map_err(|error| error.status.as_u16())
        };
        assert_eq!(tags("a", &[]), Ok("default".into()));
        assert_eq!(tags("a:v1", &["v2", "v1"]), Ok("v1 v2".into()));
        assert_eq!(tags("a", &["x/y"]), Err(400));
        assert_eq!(tags("a", &["x"; 21]), Err(400));
    }

    #[test]
    fn images_of_builds_and_files_of_this_machine_are_no_base() {
        for good in [
            "debian",
            "debian:bookworm",
            "python:3.13-slim",
            "ghcr.io/a/b:c",
            "localhost:5000/a",
            "dir/a",
            "a@sha256:00",
        ] {
            assert!(is_foreign_image(good), "{good}");
        }
        for bad in [
            "",
            "oci:/etc",
            "oci:x",
            "oci-archive:a.tar",
            "docker-archive:/x",
            "dir:12/x",
            "containers-storage:x",
            "docker://x",
            "docker-daemon:a:b",
            "/etc",
            "a//b",
            "a b",
            "build.tiffin.invalid/a:b",
            "BUILD.tiffin.invalid:80/a",
            "a\n",
            "a:b/c:d",
        ] {
            assert!(!is_foreign_image(bad), "{bad}");
        }
    }
}
