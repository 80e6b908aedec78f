//! What a client wants built, checked, and as `image-builder build --steps` reads it.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::name::is_foreign_image;
use crate::ApiError;

/// Steps of a build.
const MAX_STEPS: usize = 500;

/// Characters of a start or ready command; they are kept as labels of the image.
const MAX_COMMAND: usize = 64 << 10;

/// What is built: a base, and steps on it.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct BuildStart {
    /// An image that it begins with: of the gateway's local store, else of its registry.
    from_image: Option<String>,
    /// A template that it begins with, in place of an image.
    from_template: Option<String>,
    /// The user and password for the image's registry: `{"type": "registry", "username", "password"}` or `{"type": "gcp",
    /// "serviceAccountJson"}`.
    #[schema(value_type = Option<Object>)]
    from_image_registry: Option<Value>,
    /// Whether every step is run, also those whose results are known.
    force: Option<bool>,
    /// The steps.
    #[serde(default)]
    steps: Vec<Step>,
    /// A shell command that runs in each sandbox from the start.
    start_cmd: Option<String>,
    /// A shell command that succeeds when a sandbox is ready.
    ready_cmd: Option<String>,
}

/// A step.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = TemplateStep)]
pub(crate) struct Step {
    /// COPY, ADD, RUN, ENV, ARG, WORKDIR or USER.
    #[serde(rename = "type")]
    kind: String,
    /// What it takes.
    #[serde(default)]
    args: Vec<String>,
    /// The hash under which its files were sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    files_hash: Option<String>,
    /// Whether it, and all that follow it, are run although their results are known.
    #[serde(default, skip_serializing)]
    force: Option<bool>,
}

/// What a template begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Base {
    /// An image's name.
    Image(String),
    /// What a client calls another template.
    Template(String),
}

/// A build that can be begun.
#[derive(Debug)]
pub(super) struct Wish {
    pub(super) base: Base,
    /// The hashes of the files of its steps, with the step's number.
    pub(super) files: Vec<(usize, String)>,
    /// As `--authfile` has it.
    pub(super) credentials: Value,
    pub(super) no_cache: bool,
    steps: Vec<Step>,
    start: Option<String>,
    ready: Option<String>,
}

/// Whether that is a hash as clients send it: SHA-256 in hexadecimal. It becomes a file's name.
pub(crate) fn is_hash(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

impl BuildStart {
    pub(super) fn checked(self) -> Result<Wish, ApiError> {
        let bad = |message: String| Err(ApiError::bad_request(message));
        let filled = |text: Option<String>| text.filter(|text| !text.trim().is_empty());
        let base = match (filled(self.from_image), filled(self.from_template)) {
            (Some(image), None) => {
                let image = image.trim().to_owned();
                if !is_foreign_image(&image) {
                    let shown: String = image.chars().take(64).collect();
                    return bad(format!(
                        "invalid fromImage {shown:?}: expected the name of an image, as debian:bookworm or \
                         registry.example/team/image:tag"
                    ));
                }
                Base::Image(image)
            }
            (None, Some(template)) => Base::Template(template),
            (Some(_), Some(_)) => return bad("expected fromImage or fromTemplate, got both".to_owned()),
            (None, None) => return bad("expected fromImage or fromTemplate, got neither".to_owned()),
        };
        if self.steps.len() > MAX_STEPS {
            return bad(format!("{} steps, at most {MAX_STEPS} allowed", self.steps.len()));
        }
        let (start, ready) = (filled(self.start_cmd), filled(self.ready_cmd));
        for (name, command) in [("startCmd", &start), ("readyCmd", &ready)] {
            let length = command.as_deref().map_or(0, str::len);
            if length > MAX_COMMAND {
                return bad(format!("{name} has {length} bytes, at most {MAX_COMMAND} allowed"));
            }
        }
        let mut files = Vec::new();
        for (step, number) in self.steps.iter().zip(1..) {
            match &step.files_hash {
                None => {}
                Some(hash) if hash.is_empty() => {}
                Some(hash) if is_hash(hash) => files.push((number, hash.clone())),
                Some(_) => {
                    return bad(format!("step {number}: expected a filesHash of 64 hexadecimal digits"));
                }
            }
        }
        let credentials = match (&base, self.from_image_registry.filter(|registry| !registry.is_null())) {
            (_, None) => json!({}),
            (Base::Template(_), Some(_)) => return bad("fromImageRegistry without fromImage".to_owned()),
            (Base::Image(image), Some(registry)) => credentials(image, &registry)?,
        };
        let no_cache = self.force == Some(true) || self.steps.iter().any(|step| step.force == Some(true));
        Ok(Wish { base, files, credentials, no_cache, steps: self.steps, start, ready })
    }
}

impl Wish {
    /// The request of `image-builder build --steps`, on a base that has the user, called `base`.
    pub(super) fn steps(&self, base: &str, user: &str, workdir: Option<&str>) -> Value {
        json!({
            "fromTemplate": base,
            "user": user,
            "workdir": workdir,
            "steps": self.steps,
            "startCmd": self.start,
            "readyCmd": self.ready,
        })
    }
}

/// What `--authfile` reads: the user and password for the registry of an image.
fn credentials(image: &str, registry: &Value) -> Result<Value, ApiError> {
    let bad = |message: &str| Err(ApiError::bad_request(format!("fromImageRegistry: {message}")));
    let field = |name: &str| registry.get(name).and_then(Value::as_str).unwrap_or_default();
    let (user, password) = match field("type") {
        "registry" => (field("username"), field("password")),
        // As Google documents it for docker login.
        "gcp" => ("_json_key", field("serviceAccountJson")),
        "aws" => {
            return bad(
                "`aws` is not supported: send the user AWS and a token of `aws ecr get-login-password` as `registry`",
            );
        }
        _ => return bad("expected the type `registry` or `gcp`"),
    };
    if user.is_empty() || user.contains(':') || password.is_empty() {
        return bad("expected a user without a colon, and a password");
    }
    let auth = json!({ "auth": STANDARD.encode(format!("{user}:{password}")) });
    let first = image.split_once('/').map(|(first, _)| first);
    Ok(match first.filter(|host| host.contains(['.', ':']) || *host == "localhost") {
        Some(host) => json!({ "auths": { host: auth } }),
        None => json!({ "auths": { "docker.io": auth, "https://index.docker.io/v1/": auth } }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(body: Value) -> Result<Wish, String> {
        serde_json::from_value::<BuildStart>(body).unwrap().checked().map_err(|error| error.message)
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (body, words) in [
            (json!({}), "got neither"),
            (json!({ "fromImage": "a", "fromTemplate": "b" }), "got both"),
            (json!({ "fromImage": " ", "fromTemplate": "" }), "got neither"),
            (json!({ "fromImage": "oci:/etc" }), "invalid fromImage \"oci:/etc\""),
            (
                json!({ "fromImage": "a", "steps": vec![json!({ "type": "RUN" }); 501] }),
                "501 steps, at most 500",
            ),
            (
                json!({ "fromImage": "a", "steps": [{ "type": "COPY", "filesHash": "../x" }] }),
                "step 1: expected a filesHash",
            ),
            (json!({ "fromImage": "a", "startCmd": "x".repeat(70_000) }), "startCmd has 70000 bytes"),
            (json!({ "fromTemplate": "a", "fromImageRegistry": {} }), "without fromImage"),
            (json!({ "fromImage": "a", "fromImageRegistry": { "type": "aws" } }), "`aws` is not supported"),
            (
                json!({ "fromImage": "a", "fromImageRegistry": { "type": "registry", "username": "u" } }),
                "a password",
            ),
        ] {
            let error = checked(body.clone()).err().unwrap_or_default();
            assert!(error.contains(words), "{body}: {error:?}");
        }
    }

    #[test]
    fn the_builder_gets_what_it_knows_and_no_password() {
        let hash = "ab".repeat(32);
        let wish = checked(json!({
            "fromImage": "ghcr.io/a/b", "fromImageRegistry": { "type": "registry", "username": "u", "password": "p" },
            "startCmd": "serve", "readyCmd": "", "novel": 1,
            "steps": [{ "type": "RUN", "args": ["x"], "force": false }, { "type": "COPY", "args": ["a", "b"], "filesHash": hash, "force": true }],
        }));
        let wish = wish.unwrap();
        assert_eq!(wish.base, Base::Image("ghcr.io/a/b".into()));
        assert_eq!(wish.credentials, json!({ "auths": { "ghcr.io": { "auth": "dTpw" } } }));
        assert_eq!((wish.no_cache, &wish.files[..]), (true, &[(2, hash.clone())][..]));
        let expected = json!({
            "fromTemplate": "base", "user": "user", "workdir": "/home/user", "startCmd": "serve", "readyCmd": null,
            "steps": [{ "type": "RUN", "args": ["x"] }, { "type": "COPY", "args": ["a", "b"], "filesHash": hash }],
        });
        assert_eq!(wish.steps("base", "user", Some("/home/user")), expected);
    }
}
