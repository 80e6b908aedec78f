//! `RUN --mount`: its options as written, and what they mean once their variables are expanded.

use crate::error::{Fault, Reason};
use crate::expand::ExpandError;
use crate::position::{Position, Word};
use crate::suggest::did_you_mean;

const KEYS: [&str; 19] = [
    "type",
    "from",
    "source",
    "src",
    "target",
    "dst",
    "destination",
    "readonly",
    "ro",
    "readwrite",
    "rw",
    "id",
    "sharing",
    "required",
    "size",
    "mode",
    "uid",
    "gid",
    "env",
];

/// A `--mount` flag as written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountFlag {
    /// Where its value stands.
    pub at: Position,
    /// Its options in order; names in lowercase, values with their variables.
    pub options: Vec<(String, Option<String>)>,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// What it is.
    pub kind: MountKind,
    /// Where it is mounted; never `None` but for secrets and SSH agents, which have a default.
    pub target: Option<String>,
    /// Whether the command may not write to it.
    pub read_only: bool,
}

/// The kinds of mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MountKind {
    /// Files of the context, a stage or an image.
    Bind {
        /// A stage or image; the context by default.
        from: Option<String>,
        /// The path in it; its root by default.
        source: Option<String>,
    },
    /// A folder that builds keep.
    Cache {
        /// Its name; the target by default.
        id: Option<String>,
        /// What it begins with: a stage or image.
        from: Option<String>,
        /// The path in that.
        source: Option<String>,
        /// Who may use it at the same time.
        sharing: Sharing,
        /// Mode and owner of a new folder.
        owner: Owner,
    },
    /// A file system in memory.
    Tmpfs {
        /// Its size in bytes.
        size: Option<u64>,
    },
    /// A secret, as a file or variable.
    Secret {
        /// Its name; the target's last component by default.
        id: Option<String>,
        /// The variable that holds it.
        env: Option<String>,
        /// Whether its absence is an error.
        required: bool,
        /// Mode and owner of the file.
        owner: Owner,
    },
    /// The socket of an SSH agent.
    Ssh {
        /// The agent's name.
        id: Option<String>,
        /// Whether its absence is an error.
        required: bool,
        /// Mode and owner of the socket.
        owner: Owner,
    },
}

/// Who may use a cache mount.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sharing {
    /// Everybody at once.
    #[default]
    Shared,
    /// Each its own while it is in use.
    Private,
    /// One after the other.
    Locked,
}

/// Mode and owner, where they are given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// Permission bits.
    pub mode: Option<u32>,
    /// User.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
}

impl MountFlag {
    /// Reads the value of the flag. Options without variables are checked at once.
    pub(crate) fn parse(value: &Word) -> Result<Self, Fault> {
        let mut options = Vec::new();
        for field in fields(&value.text).ok_or_else(|| wrong(value.at, "a quote is not closed".to_owned()))? {
            let (key, option) = match field.split_once('=') {
                Some((key, option)) => (key, Some(option.to_owned())),
                None => (field.as_str(), None),
            };
            options.push((key.trim().to_ascii_lowercase(), option));
        }
        let flag = Self { at: value.at, options };
        if flag.from().is_some_and(|from| from.contains('$')) {
            let problem = "from= holds a variable, which is not expanded there: name a stage with \
                           FROM $VARIABLE AS NAME, and that name here";
            return Err(wrong(value.at, problem.to_owned()));
        }
        if !value.text.contains('$') {
            flag.resolve(&mut |text| Ok(text.to_owned()))?;
        }
        Ok(flag)
    }

    /// The stage or image that files are taken from.
    pub fn from(&self) -> Option<&str> {
        let from = self.options.iter().rev().find(|(key, _)| key == "from")?;
        from.1.as_deref().filter(|from| !from.is_empty())
    }

    /// What the flag means.
    pub fn resolve(
        &self,
        expand: &mut dyn FnMut(&str) -> Result<String, ExpandError>,
    ) -> Result<Mount, Fault> {
        let mut options = Vec::new();
        for (key, value) in &self.options {
            let value = match (key.as_str(), value) {
                // Not expanded, so that the stages are known before any variable is.
                ("from", value) => value.clone(),
                (_, Some(value)) => Some(expand(value).map_err(|error| Fault::new(self.at, error))?),
                (_, None) => None,
            };
            options.push((key.as_str(), value));
        }
        Options { at: self.at, options: &options }.mount()
    }
}

struct Options<'a> {
    at: Position,
    options: &'a [(&'a str, Option<String>)],
}

impl Options<'_> {
    fn mount(&self) -> Result<Mount, Fault> {
        for (key, value) in self.options {
            if !KEYS.contains(key) {
                return Err(self.wrong(format!("unknown option {key:?}{}", did_you_mean(key, KEYS))));
            }
            let alone = ["readonly", "ro", "readwrite", "rw", "required"].contains(key);
            if value.is_none() && !alone {
                return Err(self.wrong(format!("option {key} has no value")));
            }
        }
        let kind = self.value(&["type"]).map_or("bind".to_owned(), |kind| kind.to_ascii_lowercase());
        let allowed: &[&str] = match kind.as_str() {
            "bind" => &["from", "source", "src"],
            "cache" => &["from", "source", "src", "id", "sharing", "mode", "uid", "gid"],
            "tmpfs" => &["size"],
            "secret" => &["id", "source", "src", "required", "mode", "uid", "gid", "env"],
            "ssh" => &["id", "source", "src", "required", "mode", "uid", "gid"],
            _ => {
                let known = ["bind", "cache", "tmpfs", "secret", "ssh"];
                let advice = did_you_mean(&kind, known);
                return Err(self.wrong(format!("unknown type {kind:?}{advice}")));
            }
        };
        let common = ["type", "target", "dst", "destination", "readonly", "ro", "readwrite", "rw"].as_slice();
        if let Some((key, _)) =
            self.options.iter().find(|(key, _)| !allowed.contains(key) && !common.contains(key))
        {
            return Err(self.wrong(format!("option {key} does not fit type={kind}")));
        }
        let source = self.value(&["source", "src"]);
        let from = self.value(&["from"]);
        let id = self.value(&["id"]);
        let owner = Owner {
            mode: self.number("mode", 8)?,
            uid: self.number("uid", 10)?,
            gid: self.number("gid", 10)?,
        };
        let target = self.value(&["target", "dst", "destination"]);
        let writable = kind == "cache" || kind == "tmpfs";
        if target.is_none() && (writable || kind == "bind") {
            return Err(self.wrong(format!("type={kind} needs a target")));
        }
        let required = self.switch(&["required"])?.unwrap_or(false);
        let read_only = match (self.switch(&["readonly", "ro"])?, self.switch(&["readwrite", "rw"])?) {
            (Some(read_only), _) => read_only,
            (None, Some(writable)) => !writable,
            (None, None) => !writable,
        };
        if id.is_some() && source.is_some() && kind != "cache" {
            return Err(self.wrong("both id and source are given".to_owned()));
        }
        let kind = match kind.as_str() {
            "bind" => MountKind::Bind { from, source },
            "cache" => MountKind::Cache { id, from, source, sharing: self.sharing()?, owner },
            "tmpfs" => MountKind::Tmpfs { size: self.size()? },
            "secret" => {
                let (id, env) = (id.or(source), self.value(&["env"]));
                if id.is_none() && target.is_none() {
                    return Err(self.wrong("type=secret needs an id or a target".to_owned()));
                }
                MountKind::Secret { id, env, required, owner }
            }
            _ => MountKind::Ssh { id: id.or(source), required, owner },
        };
        Ok(Mount { kind, target, read_only })
    }

    /// The last of these options; an empty value is none.
    fn value(&self, keys: &[&str]) -> Option<String> {
        let found = self.options.iter().rev().find(|(key, _)| keys.contains(key))?;
        found.1.clone().filter(|value| !value.is_empty())
    }

    fn switch(&self, keys: &[&str]) -> Result<Option<bool>, Fault> {
        let Some((key, value)) = self.options.iter().rev().find(|(key, _)| keys.contains(key)) else {
            return Ok(None);
        };
        match value.as_deref() {
            None => Ok(Some(true)),
            // As Go's strconv.ParseBool.
            Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(Some(true)),
            Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(Some(false)),
            Some(other) => Err(self.wrong(format!("{key}={other} is neither true nor false"))),
        }
    }

    fn number(&self, key: &str, radix: u32) -> Result<Option<u32>, Fault> {
        let Some(text) = self.value(&[key]) else { return Ok(None) };
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        match u32::from_str_radix(&text, radix) {
            Ok(number) if digits && (radix == 10 || number <= 0o7777) => Ok(Some(number)),
            _ => {
                let kind = if radix == 8 { "octal mode" } else { "number" };
                Err(self.wrong(format!("{key}={text} is no {kind}")))
            }
        }
    }

    fn sharing(&self) -> Result<Sharing, Fault> {
        let Some(text) = self.value(&["sharing"]) else { return Ok(Sharing::default()) };
        match text.to_ascii_lowercase().as_str() {
            "shared" => Ok(Sharing::Shared),
            "private" => Ok(Sharing::Private),
            "locked" => Ok(Sharing::Locked),
            other => {
                let advice = did_you_mean(other, ["shared", "private", "locked"]);
                Err(self.wrong(format!("sharing={text} is not shared, private or locked{advice}")))
            }
        }
    }

    /// Bytes, or with a unit of 1024: `64m`, `1.5g`, `10MiB`.
    fn size(&self) -> Result<Option<u64>, Fault> {
        let Some(text) = self.value(&["size"]) else { return Ok(None) };
        let lower = text.to_ascii_lowercase();
        let end = lower.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(lower.len());
        let (number, unit) = lower.split_at(end);
        let shift = match unit.trim().trim_end_matches("ib").trim_end_matches('b') {
            "" => 0,
            "k" => 10,
            "m" => 20,
            "g" => 30,
            "t" => 40,
            "p" => 50,
            _ => 64,
        };
        match number.parse::<f64>().ok().map(|number| number * 2f64.powi(shift)) {
            Some(size) if shift < 64 && size >= 1.0 && size < i64::MAX as f64 => Ok(Some(size as u64)),
            _ => Err(self.wrong(format!("size={text} is no size, as 64m"))),
        }
    }

    fn wrong(&self, problem: String) -> Fault {
        wrong(self.at, problem)
    }
}

fn wrong(at: Position, problem: String) -> Fault {
    let expected = "type=bind|cache|tmpfs|secret|ssh,target=PATH,...";
    Fault::new(at, Reason::Flag { keyword: "RUN", flag: "mount", problem, expected })
}

/// A line of comma-separated values, perhaps in double quotes; `None` when one does not end.
fn fields(text: &str) -> Option<Vec<String>> {
    let mut fields = vec![String::new()];
    let mut quoted = false;
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        let last = fields.last_mut()?;
        match character {
            '"' if quoted && characters.peek() == Some(&'"') => {
                characters.next();
                last.push('"');
            }
            '"' if quoted || last.is_empty() => quoted = !quoted,
            ',' if !quoted => fields.push(String::new()),
            _ => last.push(character),
        }
    }
    (!quoted).then_some(fields)
}
