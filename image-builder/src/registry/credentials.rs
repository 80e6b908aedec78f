//! Docker's and containers' credential files (docker-login(1), containers-auth.json(5)).
//!
//! ```json
//! {"auths": {"registry.example": {"auth": "base64 of user:password", "identitytoken": ".."}},
//!  "credHelpers": {"ghcr.io": "secretservice"}, "credsStore": "pass"}
//! ```
//!
//! A key is a host, or a host and the beginning of a repository; the longest that fits is taken. Docker's own registry has
//! the key of its first version, `https://index.docker.io/v1/`.

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use super::helper::{Answer, Helper};
use crate::error::{Error, at};

/// The longest file that is read.
const MAX_FILE: u64 = 4 << 20;
/// The key of Docker's own registry.
const DOCKER_KEY: &str = "https://index.docker.io/v1/";

/// What a registry knows somebody by.
#[derive(Clone, PartialEq, Eq)]
pub enum Credential {
    /// A name and a password, or an access token in its place.
    Password {
        /// The name.
        username: String,
        /// The password.
        password: String,
    },
    /// A refresh token of the registry's token service.
    IdentityToken(String),
}

/// Secrets stay out of logs.
impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Password { username, .. } => write!(f, "Password of {username:?}"),
            Self::IdentityToken(_) => f.write_str("IdentityToken"),
        }
    }
}

/// The files that credentials are looked for in, first to last. They are read when somebody asks.
#[derive(Clone, Debug, Default)]
pub struct CredentialFiles {
    files: Vec<PathBuf>,
    // The file that login writes.
    own: Option<PathBuf>,
}

impl CredentialFiles {
    /// The one file that was named, or that `$REGISTRY_AUTH_FILE` names; else those of containers and of Docker.
    pub fn find(named: Option<&Path>) -> Self {
        let variable =
            |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        if let Some(file) = named.map(Path::to_owned).or_else(|| variable("REGISTRY_AUTH_FILE")) {
            return Self { files: vec![file.clone()], own: Some(file) };
        }
        let docker = variable("DOCKER_CONFIG").or_else(|| Some(variable("HOME")?.join(".docker")));
        let docker = docker.map(|folder| folder.join("config.json"));
        let runtime = variable("XDG_RUNTIME_DIR").map(|folder| folder.join("containers/auth.json"));
        let config = variable("XDG_CONFIG_HOME").or_else(|| Some(variable("HOME")?.join(".config")));
        let config = config.map(|folder| folder.join("containers/auth.json"));
        Self { files: [docker.clone(), runtime, config].into_iter().flatten().collect(), own: docker }
    }

    /// What to say to the registry for that repository; `None` where nobody has logged in.
    pub(super) fn look_up(&self, registry: &str, repository: &str) -> Result<Option<Credential>, Error> {
        for file in &self.files {
            let Some(contents) = read(file)? else { continue };
            if let Some(helper) = helper(file, &contents, registry)?
                && let Answer::Found(credential) = helper.fetch(&server(registry))?
            {
                return Ok(Some(credential));
            }
            if let Some(credential) = in_auths(file, &contents, registry, repository)? {
                return Ok(Some(credential));
            }
        }
        Ok(None)
    }

    /// Keeps the credential: in the helper that the file names for the registry, else in the file itself. Gives the place.
    pub fn store(&self, registry: &str, username: &str, password: &str) -> Result<String, Error> {
        let file = self.own()?;
        let contents = read(file)?.unwrap_or_default();
        if let Some(helper) = helper(file, &contents, registry)? {
            helper.store(&server(registry), username, password)?;
            return Ok(helper.program());
        }
        let auth = STANDARD.encode(format!("{username}:{password}"));
        change(file, |contents| {
            let auths = contents.entry("auths").or_insert_with(|| json!({}));
            let auths = auths.as_object_mut().ok_or("\"auths\" is no object")?;
            auths.retain(|key, _| !is_key_of(key, registry));
            auths.insert(server(registry), json!({"auth": auth}));
            Ok(())
        })?;
        Ok(file.display().to_string())
    }

    /// Forgets what is known for the registry, and says whether anything was.
    pub fn erase(&self, registry: &str) -> Result<bool, Error> {
        let mut found = false;
        for file in &self.files {
            let Some(contents) = read(file)? else { continue };
            if let Some(helper) = helper(file, &contents, registry)?
                && matches!(helper.fetch(&server(registry))?, Answer::Found(_))
            {
                helper.erase(&server(registry))?;
                found = true;
            }
            let ours = |auths: &Map<String, Value>| auths.keys().any(|key| is_key_of(key, registry));
            if contents.get("auths").and_then(Value::as_object).is_some_and(ours) {
                change(file, |contents| {
                    if let Some(auths) = contents.get_mut("auths").and_then(Value::as_object_mut) {
                        auths.retain(|key, _| !is_key_of(key, registry));
                    }
                    Ok(())
                })?;
                found = true;
            }
        }
        Ok(found)
    }

    fn own(&self) -> Result<&Path, Error> {
        self.own.as_deref().ok_or_else(|| Error::Invalid {
            what: "login".to_owned(),
            reason:
                "no place for the credentials: none of $REGISTRY_AUTH_FILE, $DOCKER_CONFIG and $HOME is set"
                    .to_owned(),
        })
    }
}

/// The key of a registry in files and helpers.
fn server(registry: &str) -> String {
    if registry == "docker.io" { DOCKER_KEY.to_owned() } else { registry.to_owned() }
}

/// A key without what older programs wrote around the host.
fn plain_key(key: &str) -> &str {
    let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let key = key.trim_end_matches('/');
    let key = key.strip_suffix("/v1").or_else(|| key.strip_suffix("/v2")).unwrap_or(key);
    match key {
        "index.docker.io" | "registry-1.docker.io" => "docker.io",
        key => key,
    }
}

fn is_key_of(key: &str, registry: &str) -> bool {
    plain_key(key) == registry
}

fn in_auths(
    file: &Path,
    contents: &Map<String, Value>,
    registry: &str,
    repository: &str,
) -> Result<Option<Credential>, Error> {
    let full = format!("{registry}/{repository}");
    let fits =
        |key: &str| full.strip_prefix(key).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    let Some(auths) = contents.get("auths").and_then(Value::as_object) else { return Ok(None) };
    let found = auths
        .iter()
        .map(|(key, entry)| (plain_key(key), entry))
        .filter(|(key, _)| !key.is_empty() && fits(key))
        .max_by_key(|(key, _)| key.len());
    let Some((key, entry)) = found else { return Ok(None) };
    let text = |name: &str| entry.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
    if let Some(token) = text("identitytoken") {
        return Ok(Some(Credential::IdentityToken(token.to_owned())));
    }
    if let Some(auth) = text("auth") {
        // Padding of NULs is Docker's.
        let decoded = STANDARD.decode(auth).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let pair = decoded.as_deref().and_then(|text| text.trim_end_matches('\0').split_once(':'));
        let (username, password) = pair.ok_or_else(|| Error::Invalid {
            what: file.display().to_string(),
            reason: format!("auths.{key:?}.auth is not the base64 of user:password; log in again"),
        })?;
        return Ok(Some(Credential::Password {
            username: username.to_owned(),
            password: password.to_owned(),
        }));
    }
    let pair = text("username").zip(text("password"));
    Ok(pair.map(|(username, password)| Credential::Password {
        username: username.to_owned(),
        password: password.to_owned(),
    }))
}

/// The helper of the registry: its own, else the one for all.
fn helper(file: &Path, contents: &Map<String, Value>, registry: &str) -> Result<Option<Helper>, Error> {
    let own = contents.get("credHelpers").and_then(Value::as_object).and_then(|helpers| {
        let found = helpers.iter().find(|(key, _)| is_key_of(key, registry));
        found.and_then(|(_, name)| name.as_str())
    });
    let name = own.or_else(|| contents.get("credsStore").and_then(Value::as_str));
    name.filter(|name| !name.is_empty()).map(|name| Helper::named(file, name)).transpose()
}

/// The object in the file; `None` where there is no file.
fn read(file: &Path) -> Result<Option<Map<String, Value>>, Error> {
    let input = match std::fs::File::open(file) {
        Ok(input) => input,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(at(file)(error)),
    };
    let mut text = Vec::new();
    input.take(MAX_FILE + 1).read_to_end(&mut text).map_err(at(file))?;
    let invalid = |reason: String| Error::Invalid { what: file.display().to_string(), reason };
    if text.len() as u64 > MAX_FILE {
        return Err(invalid(format!("it has more than {MAX_FILE} bytes")));
    }
    if text.trim_ascii().is_empty() {
        return Ok(Some(Map::new()));
    }
    match serde_json::from_slice(&text) {
        Ok(Value::Object(contents)) => Ok(Some(contents)),
        Ok(_) => Err(invalid("expected a JSON object of credentials".to_owned())),
        Err(error) => Err(invalid(format!("expected a JSON object of credentials: {error}"))),
    }
}

/// Changes the file and leaves what it does not know. It is for its owner alone, and is the old one or the new one.
fn change(
    file: &Path,
    edit: impl FnOnce(&mut Map<String, Value>) -> Result<(), &'static str>,
) -> Result<(), Error> {
    // A link to the file is somebody's way to keep it elsewhere.
    let file = &std::fs::canonicalize(file).unwrap_or_else(|_| file.to_owned());
    let folder = match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    std::fs::create_dir_all(folder).map_err(at(folder))?;
    // One login at a time; the lock goes with the handle.
    let lock = std::fs::File::open(folder).map_err(at(folder))?;
    lock.lock().map_err(at(folder))?;
    let mut contents = read(file)?.unwrap_or_default();
    let refused =
        |reason: &str| Error::Invalid { what: file.display().to_string(), reason: reason.to_owned() };
    edit(&mut contents).map_err(refused)?;
    let mut text =
        serde_json::to_vec_pretty(&contents).map_err(|error| at(file)(std::io::Error::from(error)))?;
    text.push(b'\n');
    // A temporary file has mode 0600.
    let mut new = tempfile::Builder::new().prefix(".new-").tempfile_in(folder).map_err(at(folder))?;
    use std::io::Write;
    new.write_all(&text).and_then(|()| new.as_file().sync_all()).map_err(at(file))?;
    new.persist(file).map_err(|error| at(file)(error.error))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn files(text: &str) -> (tempfile::TempDir, CredentialFiles) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("folder/config.json");
        if !text.is_empty() {
            std::fs::create_dir(dir.path().join("folder")).unwrap();
            std::fs::write(&file, text).unwrap();
        }
        let files = CredentialFiles::find(Some(&file));
        (dir, files)
    }

    fn password(user: &str, password: &str) -> Option<Credential> {
        Some(Credential::Password { username: user.to_owned(), password: password.to_owned() })
    }

    #[test]
    fn the_longest_key_is_taken_and_dockers_has_many_spellings() {
        let auth = |text: &str| STANDARD.encode(text);
        let (_dir, files) = files(
            &json!({"auths": {
                "https://index.docker.io/v1/": {"auth": auth("hub:a:b\0\0")},
                "reg.example": {"auth": auth("all:1")},
                "reg.example/team": {"username": "team", "password": "2"},
                "http://old.example:5000/v2/": {"auth": auth("old:3")},
                "token.example": {"auth": auth("<token>:"), "identitytoken": "refresh"},
                "empty.example": {},
            }, "HttpHeaders": {"x": "y"}})
            .to_string(),
        );
        let look_up = |registry: &str, repository: &str| files.look_up(registry, repository).unwrap();
        assert_eq!(look_up("docker.io", "library/debian"), password("hub", "a:b"));
        assert_eq!(look_up("reg.example", "x"), password("all", "1"));
        assert_eq!(look_up("reg.example", "team/x"), password("team", "2"));
        assert_eq!(look_up("reg.example", "teams/x"), password("all", "1"));
        assert_eq!(look_up("reg.example:5000", "x"), None);
        assert_eq!(look_up("old.example:5000", "x"), password("old", "3"));
        assert_eq!(look_up("token.example", "x"), Some(Credential::IdentityToken("refresh".into())));
        assert_eq!(look_up("empty.example", "x"), None);
    }

    #[test]
    fn a_login_is_for_its_owner_alone_and_leaves_the_rest() {
        let (dir, files) = files("");
        assert!(!files.erase("reg.example").unwrap());
        files.store("reg.example", "me", "s3:cret").unwrap();
        let file = dir.path().join("folder/config.json");
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(files.look_up("reg.example", "x").unwrap(), password("me", "s3:cret"));

        let mut contents: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        contents["detachKeys"] = json!("ctrl-e");
        contents["auths"]["https://reg.example/v2/"] = json!({"auth": "old spelling"});
        std::fs::write(&file, contents.to_string()).unwrap();
        files.store("reg.example", "me", "other").unwrap();
        files.store("docker.io", "hub", "pw").unwrap();
        assert_eq!(files.look_up("reg.example", "x").unwrap(), password("me", "other"));
        let contents: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        assert_eq!(contents["detachKeys"], "ctrl-e");
        let mut keys: Vec<_> = contents["auths"].as_object().unwrap().keys().collect();
        keys.sort();
        assert_eq!(keys, [DOCKER_KEY, "reg.example"]);
        assert!(files.erase("reg.example").unwrap());
        assert_eq!(files.look_up("reg.example", "x").unwrap(), None);
        assert_eq!(files.look_up("docker.io", "x").unwrap(), password("hub", "pw"));
        assert_eq!(std::fs::read_dir(dir.path().join("folder")).unwrap().count(), 1);
    }

    #[test]
    fn a_damaged_file_is_named_and_not_overwritten() {
        for text in ["{", "[]", "\"x\"", "{\"auths\": []}"] {
            let (dir, files) = files(text);
            let error = files.store("reg.example", "me", "x").unwrap_err().to_string();
            assert!(error.contains("config.json"), "{error}");
            let left = std::fs::read_to_string(dir.path().join("folder/config.json")).unwrap();
            assert_eq!(left, text);
        }
        let (_dir, files) = files("{\"auths\": {\"reg.example\": {\"auth\": \"no colon\"}}}");
        let error = files.look_up("reg.example", "x").unwrap_err().to_string();
        assert!(error.contains("log in again") && !error.contains("no colon"), "{error}");
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        let (_dir, deep) = self::files(&format!("{{\"auths\": {deep}}}"));
        assert!(deep.look_up("reg.example", "x").is_err());
    }
}
