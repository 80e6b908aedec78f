//! Typed instructions.

/// An instruction of a stage, or `FROM`. Variables are not expanded yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Instruction {
    /// `FROM`; its parts are in the [`super::Stage`].
    From,
    /// `RUN`.
    Run(Run),
    /// `COPY`.
    Copy(Copy),
    /// `ENV`.
    Env(Vec<Pair>),
    /// `ARG`: names with their defaults.
    Arg(Vec<(String, Option<String>)>),
    /// `LABEL`.
    Label(Vec<Pair>),
    /// `WORKDIR`.
    Workdir(String),
    /// `USER`.
    User(String),
    /// `CMD`.
    Cmd(CommandForm),
    /// `ENTRYPOINT`.
    Entrypoint(CommandForm),
    /// `EXPOSE`.
    Expose(Vec<String>),
    /// `VOLUME`.
    Volume(Vec<String>),
    /// `SHELL`.
    Shell(Vec<String>),
    /// `STOPSIGNAL`.
    StopSignal(String),
    /// `MAINTAINER`.
    Maintainer(String),
}

impl Instruction {
    /// The instruction's name.
    pub fn keyword(&self) -> &'static str {
        match self {
            Self::From => "FROM",
            Self::Run(_) => "RUN",
            Self::Copy(_) => "COPY",
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
            Self::Maintainer(_) => "MAINTAINER",
        }
    }
}

/// A name and its value, both with their quotes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The name; only `LABEL` expands it.
    pub name: String,
    /// The value.
    pub value: String,
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
    /// What is run. The body of a lone heredoc is the shell's text; other heredocs are part of the text.
    pub command: CommandForm,
}

/// A `COPY` instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copy {
    /// `--from`: a stage's name or number, or an image.
    pub from: Option<String>,
    /// `--chown`.
    pub chown: Option<String>,
    /// `--chmod`.
    pub chmod: Option<String>,
    /// What is copied; never empty.
    pub sources: Vec<Source>,
    /// Where to.
    pub destination: String,
}

/// A source of a `COPY`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A path or pattern in the context.
    Path(String),
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
}
