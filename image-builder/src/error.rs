//! What can go wrong while images are built.

use std::io;
use std::path::{Path, PathBuf};

/// The error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The Dockerfile is wrong.
    #[error(transparent)]
    Dockerfile(#[from] dockerfile::Error),
    /// A step failed.
    #[error("{file}:{at}: {source}\n    {text}")]
    Step {
        /// The Dockerfile.
        file: String,
        /// Where the step stands.
        at: dockerfile::Position,
        /// The instruction as written.
        text: String,
        /// Why.
        source: Box<Error>,
    },
    /// A step of an E2B template failed, or is wrong.
    #[error("{file}: step {step}: {source}{}", if text.is_empty() { String::new() } else { format!("\n    {text}") })]
    TemplateStep {
        /// The file with the steps.
        file: String,
        /// Its number, from 1.
        step: usize,
        /// The step in one line.
        text: String,
        /// Why.
        source: Box<Error>,
    },
    /// A name or size that the user gave makes no sense.
    #[error("{what}: {reason}")]
    Invalid {
        /// The value in question.
        what: String,
        /// What was expected.
        reason: String,
    },
    /// The Dockerfile says that warnings are errors.
    #[error("{file}: {count} warnings, and the file's `# check=error=true` makes them errors")]
    Warnings {
        /// The Dockerfile.
        file: String,
        /// How many there are.
        count: usize,
    },
    /// A file that was asked for is not there, or may not be taken.
    #[error("{what}: {reason}")]
    Source {
        /// The source as written.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The base image is nowhere.
    #[error("base image {name} was not found; looked in:{}{advice}", tried.iter().map(|place| format!("\n  - {place}")).collect::<String>())]
    BaseNotFound {
        /// The name as written.
        name: String,
        /// Each place with what it answered.
        tried: Vec<String>,
        /// What to do.
        advice: String,
    },
    /// A command ended with an error.
    #[error("the command {outcome}")]
    Command {
        /// As "exited with code 1".
        outcome: String,
    },
    /// The container for a command could not be made.
    #[error("cannot start the command: {reason}")]
    Container {
        /// What the container runtime says.
        reason: String,
    },
    /// A program that is needed is missing or failed.
    #[error("{program}: {reason}")]
    Program {
        /// The program.
        program: String,
        /// What it said, or which package has it.
        reason: String,
    },
    /// A registry's answer.
    #[error("registry {registry}: {reason}")]
    Registry {
        /// The registry's host.
        registry: String,
        /// What happened.
        reason: String,
    },
    /// The user pressed Ctrl-C.
    #[error("interrupted")]
    Interrupted,
    /// An image or the store is not what it should be.
    #[error(transparent)]
    Oci(#[from] oci::Error),
    /// The name of an image is wrong.
    #[error(transparent)]
    Reference(#[from] oci::InvalidReference),
    /// A template's name is wrong.
    #[error(transparent)]
    TemplateName(#[from] template::InvalidName),
    /// A template's folder.
    #[error(transparent)]
    Template(#[from] template::Error),
    /// A new template has no snapshot.
    #[error(
        "the template {template} was made and stays, but its snapshot could not be made: {reason}\n\
         `host-shim template warm` tries again; --snapshot never does without"
    )]
    Snapshot {
        /// The template's folder.
        template: PathBuf,
        /// What host-shim said.
        reason: String,
    },
    /// The root file system of a template.
    #[error(transparent)]
    Rootfs(#[from] rootfs_tools::Error),
    /// The operating system refused.
    #[error("{path}: {error}")]
    Io {
        /// The file in question.
        path: PathBuf,
        /// The system's error.
        error: io::Error,
    },
}

impl Error {
    /// Whether the user's input is at fault rather than the machine.
    pub fn is_bad_input(&self) -> bool {
        match self {
            Self::Dockerfile(_) | Self::Warnings { .. } | Self::Invalid { .. } | Self::Source { .. } => true,
            Self::Reference(_) | Self::TemplateName(_) => true,
            Self::Step { source, .. } | Self::TemplateStep { source, .. } => source.is_bad_input(),
            Self::Oci(oci::Error::Invalid { .. }) => true,
            Self::Rootfs(rootfs_tools::Error::Invalid { .. } | rootfs_tools::Error::TooLarge { .. }) => true,
            _ => false,
        }
    }
}

/// Adds the path to an error of the system.
pub(crate) fn at<E: Into<io::Error>>(path: &Path) -> impl FnOnce(E) -> Error {
    let path = path.to_owned();
    move |error| Error::Io { path, error: error.into() }
}
