//! `ls` and `inspect`.

use std::time::SystemTime;

use serde_json::{Value, json};

use super::error::{Error, FAILED};
use super::sandboxes::{NAME_LABEL, Sandbox, plain};
use super::{complain, output, sandboxes};
use crate::cli::{Inspect, List};

/// What `--filter` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Filter {
    Label(String, Option<String>),
    Name(String),
    Template(String),
    Phase(String),
}

impl Filter {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let value = |value: &str| value.to_owned();
        match text.split_once('=') {
            Some(("label", label)) => Ok(match label.split_once('=') {
                Some((key, value)) => Self::Label(key.to_owned(), Some(value.to_owned())),
                None => Self::Label(label.to_owned(), None),
            }),
            Some(("name", name)) => Ok(Self::Name(value(name))),
            Some(("template", name)) => Ok(Self::Template(value(name))),
            Some(("phase" | "status", phase)) => Ok(Self::Phase(value(phase))),
            _ => Err("expected label=, name=, template= or phase= and a value".to_owned()),
        }
    }

    fn fits(&self, sandbox: &Sandbox) -> bool {
        match self {
            Self::Label(key, None) => sandbox.seen.labels.contains_key(key),
            Self::Label(key, value) => sandbox.seen.labels.get(key) == value.as_ref(),
            Self::Name(part) => sandbox.name().is_some_and(|name| name.contains(part)),
            Self::Template(name) => sandbox.template().as_deref() == Some(name),
            Self::Phase(phase) => sandbox.phase() == *phase,
        }
    }
}

pub(crate) fn list(args: &List) -> Result<u8, Error> {
    let all = args.all || args.filters.iter().any(|filter| matches!(filter, Filter::Phase(_)));
    let shown = |sandbox: &Sandbox| {
        (all || !matches!(sandbox.phase().as_str(), "ended" | "dead"))
            && args.filters.iter().all(|filter| filter.fits(sandbox))
    };
    let found: Vec<_> = sandboxes(&args.data)?.list()?.into_iter().filter(shown).collect();
    if args.json {
        output::json(&found.iter().map(brief).collect::<Vec<_>>())?;
    } else if args.quiet {
        output::print(&found.iter().map(|sandbox| format!("{}\n", sandbox.id)).collect::<String>())?;
    } else {
        let rows: Vec<_> = found.iter().map(row).collect();
        output::print(&output::table(["ID", "NAME", "TEMPLATE", "PHASE", "AGE", "LABELS"], &rows))?;
    }
    Ok(0)
}

pub(crate) fn inspect(args: &Inspect) -> Result<u8, Error> {
    let sandboxes = sandboxes(&args.given.data)?;
    let (mut found, mut code) = (Vec::new(), 0);
    for given in &args.given.ids {
        match sandboxes.find(given) {
            Ok(sandbox) => found.push(whole(&sandbox)),
            Err(error) => {
                complain(&error);
                code = FAILED;
            }
        }
    }
    output::json(&found)?;
    Ok(code)
}

/// All of it, without what opens it.
pub(crate) fn whole(sandbox: &Sandbox) -> Value {
    let mut spec = sandbox.spec.clone();
    if let Some(token) = spec.get_mut("access_token") {
        *token = "<hidden>".into();
    }
    let mut object = brief(sandbox);
    object["end"] = match sandbox.phase().as_str() {
        "ended" | "dead" => sandbox.end().into(),
        _ => Value::Null,
    };
    object["state"] = sandbox.state.clone();
    object["spec"] = spec;
    object
}

fn brief(sandbox: &Sandbox) -> Value {
    let created = sandbox.created().and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
    json!({
        "id": sandbox.id,
        "name": sandbox.name(),
        "template": sandbox.template(),
        "phase": sandbox.phase(),
        "created_unix_s": created.map(|time| time.as_secs()),
        "labels": sandbox.seen.labels.iter().filter(|(key, _)| *key != NAME_LABEL).collect::<std::collections::BTreeMap<_, _>>(),
        "dir": sandbox.dir,
    })
}

fn row(sandbox: &Sandbox) -> [String; 6] {
    let labels = sandbox.seen.labels.iter().filter(|(key, _)| *key != NAME_LABEL);
    let labels: Vec<_> = labels.map(|(key, value)| format!("{key}={value}")).collect();
    let age = sandbox.created().and_then(|time| time.elapsed().ok());
    [
        plain(&sandbox.id),
        plain(sandbox.name().unwrap_or("")),
        plain(sandbox.template().as_deref().unwrap_or("-")),
        plain(&sandbox.phase()),
        age.map_or_else(|| "-".to_owned(), |age| output::age(age.as_secs())),
        plain(&labels.join(",")).replace(['\n', '\t'], " "),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_read() {
        for (text, filter) in [
            ("label=a", Filter::Label("a".into(), None)),
            ("label=a=b=c", Filter::Label("a".into(), Some("b=c".into()))),
            ("status=ended", Filter::Phase("ended".into())),
            ("name=", Filter::Name(String::new())),
        ] {
            assert_eq!(Filter::parse(text), Ok(filter));
        }
        assert!(Filter::parse("novel=1").is_err() && Filter::parse("label").is_err());
    }
}
