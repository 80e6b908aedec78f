//! The syntax tree: typed instructions. Variables are not expanded yet.

use std::time::Duration;

use crate::mount::MountFlag;
use crate::position::{Position, Word};

/// An instruction of a stage, or `FROM`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Instruction {
    /// `FROM`; its parts are in the [`super::Stage`].
    From,
    /// `RUN`.
    Run(Run),
    /// `COPY`.
    Copy(Copy),
    /// `ADD`.
    Add(Add),
    /// `ENV`.
    Env(Pairs),
    /// `ARG`.
    Arg(Vec<Declaration>),
    /// `LABEL`.
    Label(Pairs),
    /// `WORKDIR`.
    Workdir(Word),
    /// `USER`.
    User(Word),
    /// `CMD`.
    Cmd(CommandForm),
    /// `ENTRYPOINT`.
    Entrypoint(CommandForm),
    /// `EXPOSE`.
    Expose(Vec<Word>),
    /// `VOLUME`.
    Volume(Vec<Word>),
    /// `SHELL`.
    Shell(Vec<String>),
    /// `STOPSIGNAL`.
    StopSignal(Word),
    /// `HEALTHCHECK`.
    Healthcheck(Healthcheck),
    /// `ONBUILD`.
    OnBuild(Trigger),
    /// `MAINTAINER`.
    Maintainer(Word),
}

impl Instruction {
    /// The instruction's name.
    pub fn keyword(&self) -> &'static str {
        match self {
            Self::From => "FROM",
            Self::Run(_) => "RUN",
            Self::Copy(_) => "COPY",
            Self::Add(_) => "ADD",
            Self::Env(_) => "ENV",
            Self::Arg(_) => "ARG",
            Self::Label(_) => "LABEL",
            Self::Workdir(_) => "WORKDIR",
            Self::User(_) => "USER",
            Self::Cmd(_) => "CMD",
            Self::Entrypoint(_) => "ENTRYPOINT",
            Self::Expose(_) => "EXPOSE",
            Self::Volume(_) => "VOLUME",
            Self::Shell(_) => "SHELL",
            Self::StopSignal(_) => "STOPSIGNAL",
            Self::Healthcheck(_) => "HEALTHCHECK",
            Self::OnBuild(_) => "ONBUILD",
            Self::Maintainer(_) => "MAINTAINER",
        }
    }
}

/// Names with their values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pairs {
    /// The pairs; never empty.
    pub pairs: Vec<Pair>,
    /// Whether it is the old form `ENV NAME VALUE`.
    pub legacy: bool,
}

/// A name and its value, both with their quotes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The name.
    pub name: Word,
    /// The value.
    pub value: Word,
}

/// One name of an `ARG`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Declaration {
    /// The name.
    pub name: Word,
    /// What stands after `=`.
    pub default: Option<Word>,
}

/// A command as a text for the shell or as its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommandForm {
    /// `CMD echo a b`: the shell of the stage runs it.
    Shell(String),
    /// `CMD ["echo", "a b"]`: run as it is.
    Exec(Vec<String>),
}

/// A `RUN` instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// `--mount`, in order.
    pub mounts: Vec<MountFlag>,
    /// `--network`.
    pub network: Network,
    /// `--security`.
    pub security: Security,
    /// `--device`.
    pub devices: Vec<Word>,
    /// What is run.
    pub command: RunCommand,
}

/// What a `RUN` runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunCommand {
    /// A command. The body of a lone heredoc is the shell's text; other heredocs are part of the text.
    Command(CommandForm),
    /// A lone heredoc whose first line begins with `#!`: an executable file of that name.
    Script {
        /// The word after `<<`.
        name: String,
        /// The file.
        contents: String,
    },
}

/// The network of a `RUN`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Network {
    /// What the build gives.
    #[default]
    Default,
    /// None at all.
    None,
    /// The host's.
    Host,
}

/// The privileges of a `RUN`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Security {
    /// Those of a container.
    #[default]
    Sandbox,
    /// All.
    Insecure,
}

/// What `COPY` and `ADD` have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// What is copied; never empty.
    pub sources: Vec<Source>,
    /// Where to.
    pub destination: Word,
    /// `--chown`.
    pub chown: Option<Word>,
    /// `--chmod`.
    pub chmod: Option<Word>,
    /// `--link`.
    pub link: bool,
    /// `--exclude`, in order.
    pub exclude: Vec<Word>,
}

/// A `COPY` instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copy {
    /// What goes where.
    pub files: Files,
    /// `--from`: a stage's name or number, or an image.
    pub from: Option<Word>,
    /// `--parents`: the sources' folders are kept.
    pub parents: bool,
}

/// An `ADD` instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Add {
    /// What goes where.
    pub files: Files,
    /// `--checksum` of what is fetched.
    pub checksum: Option<Word>,
    /// `--keep-git-dir`.
    pub keep_git_dir: bool,
    /// `--unpack`; by default local archives are unpacked and fetched ones are not.
    pub unpack: Option<bool>,
}

/// A source of a `COPY` or `ADD`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A path or pattern; for `ADD` perhaps a URL.
    Path(Word),
    /// A file whose contents stand in the Dockerfile.
    Inline(Heredoc),
}

/// A file in the Dockerfile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heredoc {
    /// The word after `<<`, which is the file's name.
    pub name: String,
    /// Whether variables in it are expanded.
    pub expand: bool,
    /// The lines.
    pub contents: String,
    /// Where its marker stands.
    pub at: Position,
}

/// A `HEALTHCHECK` instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Healthcheck {
    /// None, whatever the base image has.
    None,
    /// A command.
    Command {
        /// The command.
        command: CommandForm,
        /// `--interval`.
        interval: Option<Duration>,
        /// `--timeout`.
        timeout: Option<Duration>,
        /// `--start-period`.
        start_period: Option<Duration>,
        /// `--start-interval`.
        start_interval: Option<Duration>,
        /// `--retries`.
        retries: Option<u32>,
    },
}

/// The instruction of an `ONBUILD`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trigger {
    /// As written, with its heredocs: this goes into the image's config.
    pub text: String,
    /// What it means.
    pub instruction: Box<Instruction>,
    /// Where it stands.
    pub at: Position,
}

/// What an `ADD` source is, once its variables are expanded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddSource {
    /// A path in the context.
    Path,
    /// `http://` or `https://`.
    Url,
    /// A git repository.
    Git,
}

impl AddSource {
    /// What the text names.
    pub fn of(text: &str) -> Self {
        let lower = text.to_ascii_lowercase();
        let http = lower.starts_with("http://") || lower.starts_with("https://");
        let path = lower.split(['#', '?']).next().unwrap_or_default();
        if lower.starts_with("git@") || lower.starts_with("git://") || lower.starts_with("ssh://") {
            return Self::Git;
        }
        match http {
            true if path.ends_with(".git") => Self::Git,
            true => Self::Url,
            // As `git clone` forges are named without a scheme.
            false if lower.starts_with("github.com/") => Self::Git,
            false => Self::Path,
        }
    }
}
