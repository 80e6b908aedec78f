//! `build --check`: what the lint says of a Dockerfile, without building it.

use std::path::{Path, PathBuf};

use dockerfile::{Dockerfile, Ignore, lint};
use serde::Serialize;

use crate::console::Console;
use crate::context::{DockerfileText, dockerfile_path, read_ignore};
use crate::contexts::Contexts;
use crate::error::Error;
use crate::plan::{self, BuildArgs};

/// What is checked.
#[derive(Clone, Debug)]
pub struct CheckOptions {
    /// The context, whose ignore file counts.
    pub context: PathBuf,
    /// The Dockerfile, where it is not in the context under one of its usual names.
    pub dockerfile: Option<PathBuf>,
    /// `--build-arg`.
    pub args: BuildArgs,
    /// `--build-context`.
    pub contexts: Contexts,
    /// The stage that would be built.
    pub target: Option<String>,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct CheckReport {
    /// The Dockerfile.
    pub file: String,
    /// In the order of their places.
    pub warnings: Vec<CheckedWarning>,
    /// Whether the file's `# check=error=true` makes them errors.
    pub error: bool,
}

/// A warning.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CheckedWarning {
    /// The rule's name.
    pub rule: &'static str,
    /// The line, from 1.
    pub line: usize,
    /// The character in it, from 1.
    pub column: usize,
    /// What is wrong, and what to do.
    pub message: String,
    /// The line as written.
    pub text: String,
}

/// Checks the Dockerfile. What would keep it from being planned is an error.
pub fn check(options: &CheckOptions) -> Result<CheckReport, Error> {
    if !options.context.is_dir() {
        return Err(Error::Invalid {
            what: format!("context {}", options.context.display()),
            reason: "expected a folder".to_owned(),
        });
    }
    let path = dockerfile_path(&options.context, options.dockerfile.as_deref());
    let ignore = read_ignore(&options.context, &path)?;
    let text = DockerfileText::read(&path)?;
    let file = Dockerfile::parse(&text.shown, &text.contents)?;
    let warnings = warnings(&file, &ignore);
    plan::stages(&file, &options.args, &options.contexts, options.target.as_deref())?;
    let error = file.directives.check.error && !warnings.is_empty();
    Ok(CheckReport { file: file.file, warnings, error })
}

/// Tells the warnings of a file that is going to be built; an error where the file wants that.
pub(crate) fn report(file: &Dockerfile, ignore: &Ignore, console: &Console) -> Result<(), Error> {
    let warnings = warnings(file, ignore);
    for warning in &warnings {
        let CheckedWarning { rule, line, column, message, .. } = warning;
        let name = Path::new(&file.file).display();
        console.line(&format!("warning: {name}:{line}:{column}: {rule}: {message}"));
    }
    match file.directives.check.error && !warnings.is_empty() {
        true => Err(Error::Warnings { file: file.file.clone(), count: warnings.len() }),
        false => Ok(()),
    }
}

fn warnings(file: &Dockerfile, ignore: &Ignore) -> Vec<CheckedWarning> {
    let checked = |warning: lint::Warning| CheckedWarning {
        rule: warning.rule.name(),
        line: warning.at.line,
        column: warning.at.column,
        message: warning.message,
        text: file.line(warning.at.line).to_owned(),
    };
    lint::lint(file, Some(ignore)).into_iter().map(checked).collect()
}
