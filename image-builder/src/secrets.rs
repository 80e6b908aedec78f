//! `--secret`: what a step may read and an image may not hold.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::error::{Error, at};

/// The longest secret, as BuildKit's.
const MAX_SECRET: u64 = 500 << 10;

/// `id=ID[,src=FILE][,env=NAME]`, as docker's command line has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretSource {
    /// The name by which a Dockerfile asks for it.
    pub id: String,
    /// Where its value is.
    pub from: SecretFrom,
}

/// Where the value of a secret is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretFrom {
    /// In a file.
    File(PathBuf),
    /// In a variable of the environment.
    Variable(String),
}

/// The secrets of a build: read before it starts, so that a missing one is told at once.
#[derive(Clone, Default)]
pub struct Secrets(BTreeMap<String, Vec<u8>>);

// Never the values.
impl fmt::Debug for Secrets {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_set().entries(self.0.keys()).finish()
    }
}

impl FromStr for SecretSource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |problem: &str| format!("{problem}; expected id=ID[,src=FILE][,env=NAME]");
        let (mut id, mut file, mut variable, mut kind) = (None, None, None, None);
        for field in text.split(',') {
            let (key, value) = field.split_once('=').ok_or_else(|| wrong(&format!("{field:?} has no =")))?;
            let place = match key.trim().to_ascii_lowercase().as_str() {
                "id" => &mut id,
                "src" | "source" => &mut file,
                "env" => &mut variable,
                "type" if value == "file" || value == "env" => &mut kind,
                "type" => return Err(wrong(&format!("type={value} is neither file nor env"))),
                _ => return Err(wrong(&format!("unknown field {key:?}"))),
            };
            *place = Some(value.to_owned()).filter(|value| !value.is_empty());
        }
        let id = id.ok_or_else(|| wrong("there is no id"))?;
        let from = match (kind.as_deref(), file, variable) {
            (_, Some(_), Some(_)) => return Err(wrong("both src and env are given")),
            (Some("env"), Some(name), None) | (_, None, Some(name)) => SecretFrom::Variable(name),
            (_, Some(file), None) => SecretFrom::File(file.into()),
            (Some("env"), None, None) => SecretFrom::Variable(id.clone()),
            (Some(_), None, None) => SecretFrom::File(id.clone().into()),
            // As docker: a variable of that name, else a file.
            (None, None, None) if std::env::var_os(&id).is_some() => SecretFrom::Variable(id.clone()),
            (None, None, None) => SecretFrom::File(id.clone().into()),
        };
        Ok(Self { id, from })
    }
}

impl Secrets {
    /// Reads them all.
    pub fn read(sources: &[SecretSource]) -> Result<Self, Error> {
        let mut secrets = BTreeMap::new();
        for SecretSource { id, from } in sources {
            let invalid = |reason: String| Error::Invalid { what: format!("--secret id={id}"), reason };
            let value = match from {
                SecretFrom::File(path) => read_file(path, &invalid)?,
                SecretFrom::Variable(name) => {
                    let value = std::env::var_os(name);
                    let value =
                        value.ok_or_else(|| invalid(format!("the environment has no variable {name}")))?;
                    std::os::unix::ffi::OsStringExt::into_vec(value)
                }
            };
            if value.len() as u64 > MAX_SECRET {
                return Err(invalid(format!("it is longer than {MAX_SECRET} bytes")));
            }
            secrets.insert(id.clone(), value);
        }
        Ok(Self(secrets))
    }

    pub(crate) fn value(&self, id: &str) -> Option<&[u8]> {
        self.0.get(id).map(Vec::as_slice)
    }
}

fn read_file(path: &Path, invalid: &dyn Fn(String) -> Error) -> Result<Vec<u8>, Error> {
    let file = File::open(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => invalid(format!("there is no file {}", path.display())),
        _ => at(path)(error),
    })?;
    let mut value = Vec::new();
    // A pipe is fine, an endless one is not.
    file.take(MAX_SECRET + 1).read_to_end(&mut value).map_err(at(path))?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_those_of_docker() {
        let file =
            |id: &str, path: &str| Ok(SecretSource { id: id.into(), from: SecretFrom::File(path.into()) });
        let variable = |id: &str, name: &str| {
            Ok(SecretSource { id: id.into(), from: SecretFrom::Variable(name.into()) })
        };
        for (text, expected) in [
            ("id=a,src=/f", file("a", "/f")),
            ("id=a,source=f", file("a", "f")),
            ("id=a,env=B", variable("a", "B")),
            ("type=env,id=a", variable("a", "a")),
            ("type=env,id=a,src=B", variable("a", "B")),
            ("type=file,id=a", file("a", "a")),
            ("id=PATH", variable("PATH", "PATH")),
            ("id=no-such-variable", file("no-such-variable", "no-such-variable")),
        ] {
            assert_eq!(text.parse(), expected, "{text}");
        }
        for text in ["", "a", "src=x", "id=", "id=a,what=b", "id=a,src=x,env=y", "id=a,type=ssh"] {
            assert!(text.parse::<SecretSource>().is_err(), "{text}");
        }
    }

    #[test]
    fn values_are_read_at_once_and_never_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        std::fs::write(&path, "hidden").unwrap();
        let source = |path: &Path| SecretSource { id: "a".into(), from: SecretFrom::File(path.to_owned()) };
        let secrets = Secrets::read(&[source(&path)]).unwrap();
        assert_eq!(secrets.value("a"), Some(&b"hidden"[..]));
        assert_eq!(format!("{secrets:?}"), "{\"a\"}");
        assert!(Secrets::read(&[source(&dir.path().join("none"))]).unwrap_err().is_bad_input());
        std::fs::write(&path, vec![b'x'; MAX_SECRET as usize + 1]).unwrap();
        assert!(Secrets::read(&[source(&path)]).unwrap_err().is_bad_input());
    }
}
