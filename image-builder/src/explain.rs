//! `image-builder explain`: which steps of a build were cached, and what made the keys of the others new.
//!
//! Keys are lists of parts. A step that was carried out is compared with the earlier result whose key is nearest: of the
//! same instruction, or of the same place on the same layers, the one with the fewest parts that differ.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use oci::layer::Timestamp;
use oci::{Digest, ImageName};
use serde::Serialize;
use template::DataDir;

use crate::cache::{self, Record};
use crate::clock;
use crate::error::Error;
use crate::history::{self, BuildLog, LoggedStep, StepOutcome};

/// More names than this say no more than their number.
const MAX_CHANGES: usize = 20;

/// Which build is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BuildOf {
    /// The last one of that context, with that Dockerfile and target where they are given.
    Context {
        /// The folder.
        context: PathBuf,
        /// The file.
        dockerfile: Option<PathBuf>,
        /// The stage.
        target: Option<String>,
    },
    /// The one that made the image: a name, or a digest.
    Image(String),
}

/// A build, step by step.
#[derive(Clone, Debug, Serialize)]
pub struct Explanation {
    /// The folder.
    pub context: PathBuf,
    /// The file.
    pub dockerfile: PathBuf,
    /// When it began, as RFC 3339.
    pub began: String,
    /// The names that the image got.
    pub names: Vec<String>,
    /// The image; none when the build failed.
    pub digest: Option<Digest>,
    /// Why it failed.
    pub error: Option<String>,
    /// The steps, by stage and number.
    pub steps: Vec<ExplainedStep>,
}

/// A step of a build.
#[derive(Clone, Debug, Serialize)]
pub struct ExplainedStep {
    /// Stage and number, as the build shows them.
    pub step: String,
    /// The instruction.
    pub text: String,
    /// What became of it.
    pub outcome: StepOutcome,
    /// Why it was carried out; empty for any other outcome.
    pub reasons: Vec<Reason>,
    /// When the earlier result was made that it was compared with, as RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compared_with: Option<String>,
}

/// One thing that made a key new.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Reason {
    /// `file`, `arg`, `env`, `base`, `below`, `from`, `instruction`, `no-cache`, `new`, or another part of the step.
    pub what: &'static str,
    /// Of which file, variable or step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What happened to it, for people.
    pub change: String,
}

impl Reason {
    fn new(what: &'static str, name: Option<&str>, change: impl Into<String>) -> Self {
        Self { what, name: name.map(str::to_owned), change: change.into() }
    }

    /// As one line.
    pub fn line(&self) -> String {
        match &self.name {
            Some(name) => format!("{} {name}: {}", self.what, self.change),
            None => self.change.clone(),
        }
    }
}

/// Explains a build that this data folder remembers.
pub fn explain(data: &DataDir, which: &BuildOf) -> Result<Explanation, Error> {
    let builds = history::builds(&data.cache().join("builds"))?;
    let log = find(builds, which)?;
    let folder = data.cache().join("steps");
    let records = cache::records(&folder)?.0;
    let earlier: Vec<(Digest, Record)> =
        records.into_iter().filter_map(|stored| Some((stored.digest, stored.record?))).collect();
    let steps = log.steps.iter().map(|step| explain_step(step, &log, &earlier, &folder)).collect();
    let BuildLog { context, dockerfile, names, digest, error, began, .. } = log.clone();
    Ok(Explanation { context, dockerfile, began: millis(began), names, digest, error, steps })
}

fn find(builds: Vec<BuildLog>, which: &BuildOf) -> Result<BuildLog, Error> {
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let (found, shown) = match which {
        BuildOf::Context { context, dockerfile, target } => {
            let (folder, file) = (absolute(context), dockerfile.as_deref().map(absolute));
            let fits = |log: &BuildLog| {
                log.context == folder
                    && file.as_ref().is_none_or(|file| log.dockerfile == *file)
                    && (target.is_none() || log.target == *target)
            };
            (builds.into_iter().find(fits), context.display().to_string())
        }
        BuildOf::Image(text) => {
            let name = text.parse::<ImageName>().ok().map(|name| name.canonical());
            let fits = |log: &BuildLog| {
                log.digest.as_ref().is_some_and(|digest| digest.as_ref() == text)
                    || name.as_ref().is_some_and(|name| log.names.contains(name))
            };
            (builds.into_iter().find(fits), text.clone())
        }
    };
    found.ok_or_else(|| Error::Invalid {
        what: shown,
        reason: "no build of it is remembered; name the folder that was built, or an image with its name or digest"
            .to_owned(),
    })
}

fn explain_step(
    step: &LoggedStep,
    log: &BuildLog,
    earlier: &[(Digest, Record)],
    folder: &Path,
) -> ExplainedStep {
    let mut explained = ExplainedStep {
        step: step.mark.clone(),
        text: step.text.clone(),
        outcome: step.outcome,
        reasons: Vec::new(),
        compared_with: None,
    };
    if step.outcome != StepOutcome::Executed {
        return explained;
    }
    if step.forced {
        explained.reasons.push(Reason::new(
            "no-cache",
            None,
            "the build was told not to use the cache for it",
        ));
        return explained;
    }
    let mine = step.key.as_ref().and_then(|key| earlier.iter().find(|(digest, _)| digest == key));
    let Some((key, mine)) = mine else {
        explained.reasons.push(Reason::new("new", None, "its result is no longer in the cache"));
        return explained;
    };
    let nearest = earlier.iter().filter(|(digest, other)| digest != key && is_like(mine, other));
    let nearest = nearest.min_by_key(|(_, other)| {
        (differing(mine, other).len(), mine.text != other.text, std::cmp::Reverse(other.made))
    });
    match nearest {
        None => explained.reasons.push(Reason::new("new", None, "no earlier step is like it")),
        Some((other_key, other)) => {
            explained.compared_with = Some(millis(other.made));
            let files = (cache::files_of(folder, key), cache::files_of(folder, other_key));
            explained.reasons = reasons(step, log, mine, other, files);
        }
    }
    explained
}

/// Whether the other result tells something about this one.
fn is_like(mine: &Record, other: &Record) -> bool {
    let same = |part: &str| mine.key.get(part) == other.key.get(part);
    let before = other.made <= mine.made;
    before && same("kind") && (mine.text == other.text || mine.mark == other.mark && same("below"))
}

fn differing<'a>(mine: &'a Record, other: &'a Record) -> Vec<&'a str> {
    let names = mine.key.keys().chain(other.key.keys().filter(|name| !mine.key.contains_key(*name)));
    names.filter(|name| mine.key.get(*name) != other.key.get(*name)).map(String::as_str).collect()
}

type Files = Option<BTreeMap<String, String>>;

fn reasons(
    step: &LoggedStep,
    log: &BuildLog,
    mine: &Record,
    other: &Record,
    files: (Files, Files),
) -> Vec<Reason> {
    let mut reasons = Vec::new();
    let mut rewritten = false;
    for part in differing(mine, other) {
        let change = match (other.key.contains_key(part), mine.key.contains_key(part)) {
            (false, _) => "added",
            (_, false) => "removed",
            _ => "changed",
        };
        match part {
            "below" => reasons.push(below(step, log)),
            "sources" => match &files {
                (Some(new), Some(old)) => reasons.extend(changed_files(old, new)),
                _ if mine.key.contains_key("paths")
                    && mine.key.get("from").is_some_and(|from| from == "Context") =>
                {
                    reasons.push(Reason::new(
                        "file",
                        None,
                        "files of the context changed; which is not remembered",
                    ));
                }
                _ => reasons.push(Reason::new(
                    "from",
                    None,
                    "the files that it reads of a stage, image or mount changed",
                )),
            },
            "order of variables" => {}
            "compression" => {
                reasons.push(Reason::new("compression", None, "the layers are compressed in another way"))
            }
            "user" | "workdir" | "network" => {
                let quoted = |record: &Record| record.key.get(part).cloned().unwrap_or_default();
                let change = format!("{part} was {:?}, is {:?}", quoted(other), quoted(mine));
                reasons.push(Reason::new("instruction", None, change));
            }
            _ => match part.strip_prefix("env ") {
                Some(name) if step.args.iter().any(|arg| arg == name) => {
                    reasons.push(Reason::new("arg", Some(name), change));
                }
                Some(name) => reasons.push(Reason::new("env", Some(name), change)),
                None => rewritten = true,
            },
        }
    }
    if rewritten {
        let was = other.text.lines().next().unwrap_or_default();
        let change = match mine.text == other.text {
            true => "a variable in the instruction has another value".to_owned(),
            false => format!("the instruction was: {was}"),
        };
        reasons.push(Reason::new("instruction", None, change));
    }
    if reasons.is_empty() {
        reasons.push(Reason::new("env", None, "the order of the variables changed"));
    }
    reasons
}

/// Why a step stands on other layers.
fn below(step: &LoggedStep, log: &BuildLog) -> Reason {
    let before = log.steps.iter().filter(|other| other.stage == step.stage && other.number < step.number);
    let is_new = |other: &&LoggedStep| matches!(other.outcome, StepOutcome::Executed | StepOutcome::Shared);
    let made = before.filter(is_new).max_by_key(|other| other.number);
    match made {
        Some(other) => Reason::new(
            "below",
            Some(&other.mark),
            "a step before it was carried out, and made another layer",
        ),
        None => {
            Reason::new("base", None, "the base image, or the stage that it begins with, has other layers")
        }
    }
}

fn changed_files(old: &BTreeMap<String, String>, new: &BTreeMap<String, String>) -> Vec<Reason> {
    let mut changes = Vec::new();
    for (path, state) in new {
        match old.get(path) {
            None => changes.push((path, "added")),
            Some(before) if before == state => {}
            Some(before) => {
                // Mode and owner, then what is in it.
                let contents = |state: &str| state.splitn(4, ' ').nth(3).map(str::to_owned);
                changes.push((
                    path,
                    match contents(before) == contents(state) {
                        true => "mode or owner changed",
                        false => "content changed",
                    },
                ));
            }
        }
    }
    changes.extend(old.keys().filter(|path| !new.contains_key(*path)).map(|path| (path, "removed")));
    changes.sort();
    let more = changes.len().saturating_sub(MAX_CHANGES);
    let name = |path: &str| if path.is_empty() { ".".to_owned() } else { path.to_owned() };
    let mut reasons: Vec<_> = changes
        .into_iter()
        .take(MAX_CHANGES)
        .map(|(path, change)| Reason::new("file", Some(&name(path)), change))
        .collect();
    if more > 0 {
        reasons.push(Reason::new("file", None, format!("and {more} more files")));
    }
    reasons
}

fn millis(time: u64) -> String {
    let seconds = i64::try_from(time / 1000).unwrap_or_default();
    clock::rfc3339_millis(Timestamp { seconds, nanoseconds: (time % 1000) as u32 * 1_000_000 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_files_are_named_and_bounded() {
        let files = |list: &[(&str, &str)]| {
            list.iter()
                .map(|(path, state)| ((*path).to_owned(), (*state).to_owned()))
                .collect::<BTreeMap<_, _>>()
        };
        let old = files(&[("a", "644 0 0 x"), ("b", "644 0 0 x"), ("c", "644 0 0 x"), ("d", "644 0 0 x")]);
        let new = files(&[("a", "644 0 0 x"), ("b", "644 0 0 y"), ("c", "755 0 0 x"), ("e", "644 0 0 x")]);
        let lines: Vec<_> = changed_files(&old, &new).iter().map(Reason::line).collect();
        assert_eq!(
            lines,
            ["file b: content changed", "file c: mode or owner changed", "file d: removed", "file e: added"]
        );
        let many: BTreeMap<_, _> = (0..100).map(|number| (format!("{number}"), String::new())).collect();
        let reasons = changed_files(&BTreeMap::new(), &many);
        assert_eq!(
            (reasons.len(), reasons[MAX_CHANGES].change.as_str()),
            (MAX_CHANGES + 1, "and 80 more files")
        );
    }
}
