//! The Dockerfile language, as BuildKit's Dockerfile frontend 1 reads it: from text to typed instructions.
//!
//! ```text
//! bytes --directive, lexer--> logical lines: words with places, heredoc bodies
//!       --parse-------------> Dockerfile: stages of Statement { at, text, Instruction }      (the syntax tree)
//!       --lint--------------> warnings, by BuildKit's rules
//! words --expand------------> text without variables, called by whoever knows their values
//! .dockerignore --ignore----> which files of a context are left out;  --chmod --chmod--> changes of modes
//! template steps --e2b------> the same syntax tree
//! ```
//!
//! Everything is a pure function of its text, bounded in time and memory, and every error says where.

mod chmod;
mod directive;
pub mod e2b;
mod error;
pub mod expand;
mod flags;
mod ignore;
mod instruction;
mod lexer;
pub mod lint;
mod mount;
mod parse;
mod pattern;
mod position;
mod shell_pattern;
mod suggest;
mod words;

pub use chmod::{Chmod, Clause};
pub use directive::{Check, Directives};
pub use error::{Error, Fault, Reason};
pub use ignore::Ignore;
pub use instruction::{
    Add, AddSource, CommandForm, Copy, Declaration, Files, Healthcheck, Heredoc, Instruction, Network, Pair,
    Pairs, Run, RunCommand, Security, Source, Trigger,
};
pub use lexer::MAX_DOCKERFILE;
pub use mount::{Mount, MountFlag, MountKind, Owner, Sharing};
pub use pattern::{BadPattern, Pattern, Stars, is_pattern, name_matches};
pub use position::{Position, Word};
pub use suggest::{did_you_mean, nearest};

/// A parsed Dockerfile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dockerfile {
    /// The file's name as errors show it.
    pub file: String,
    /// What stands at its top.
    pub directives: Directives,
    /// `ARG`s before the first `FROM`, which only `FROM` lines see.
    pub global_args: Vec<Statement>,
    /// The stages in order; never empty.
    pub stages: Vec<Stage>,
    /// The lines of the file, which errors show.
    lines: Vec<String>,
}

/// A `FROM` line and what follows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    /// The `FROM` line.
    pub from: Statement,
    /// The image or earlier stage that it names.
    pub image: Word,
    /// `--platform`.
    pub platform: Option<Word>,
    /// What stands after `AS`.
    pub name: Option<StageName>,
    /// The instructions after `FROM`.
    pub statements: Vec<Statement>,
}

/// The name of a stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StageName {
    /// The name in lowercase: names of stages do not depend on case.
    pub name: String,
    /// As written.
    pub written: Word,
    /// The word `AS` as written.
    pub keyword: String,
}

/// An instruction and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statement {
    /// Where its keyword stands.
    pub at: Position,
    /// The keyword as written.
    pub keyword: String,
    /// The instruction as written, continuations joined.
    pub text: String,
    /// An empty line between its continuation lines.
    pub blank: Option<Position>,
    /// What it means.
    pub instruction: Instruction,
}

impl Dockerfile {
    /// Parses the contents of a Dockerfile; `file` is its name in errors.
    pub fn parse(file: &str, contents: &[u8]) -> Result<Self, Error> {
        let lines = || lexer::raw_lines(contents).map(|line| String::from_utf8_lossy(line).into_owned());
        let parsed = lexer::lex(contents).and_then(parse::parse);
        match parsed {
            Ok((directives, global_args, stages)) => {
                Ok(Self { file: file.to_owned(), directives, global_args, stages, lines: lines().collect() })
            }
            Err(fault) => {
                let text = lines().nth(fault.at.line - 1).unwrap_or_default();
                Err(fault.in_file(file, text))
            }
        }
    }

    /// Parses the text of an `ONBUILD` instruction, as an image's config has it.
    pub fn parse_trigger(text: &str) -> Result<Statement, Fault> {
        let lexed = lexer::lex(text.as_bytes())?;
        let start = Position { line: 1, column: 1 };
        let wrong = |problem: &str| {
            let expected = "one instruction that ONBUILD may hold";
            Fault::new(start, Reason::Arguments { keyword: "ONBUILD", problem: problem.to_owned(), expected })
        };
        let mut lines = lexed.lines.iter();
        let (Some(line), None) = (lines.next(), lines.next()) else {
            return Err(wrong("the image's trigger is not one instruction"));
        };
        let statement = parse::statement(line, '\\')?;
        match statement.instruction {
            Instruction::From | Instruction::OnBuild(_) | Instruction::Maintainer(_) => {
                Err(wrong(&format!("{} cannot be a trigger", statement.instruction.keyword())))
            }
            _ => Ok(statement),
        }
    }

    /// The character that escapes, `\` or a backtick.
    pub fn escape(&self) -> char {
        self.directives.escape
    }

    /// The stage of that name, among those before `before`; the last one, where several have it.
    pub fn stage_named(&self, name: &str, before: usize) -> Option<usize> {
        let named =
            |stage: &Stage| stage.name.as_ref().is_some_and(|known| known.name.eq_ignore_ascii_case(name));
        self.stages[..before.min(self.stages.len())].iter().rposition(named)
    }

    /// The names of all stages.
    pub fn stage_names(&self) -> impl Iterator<Item = &str> {
        self.stages.iter().filter_map(|stage| Some(stage.name.as_ref()?.name.as_str()))
    }

    /// An error at that statement.
    pub fn error(&self, statement: &Statement, reason: impl Into<Reason>) -> Error {
        self.fault(Fault::new(statement.at, reason))
    }

    /// An error in this file.
    pub fn fault(&self, fault: Fault) -> Error {
        let text = self.line(fault.at.line).to_owned();
        fault.in_file(&self.file, text)
    }

    /// A line as it stands in the file, from 1.
    pub fn line(&self, number: usize) -> &str {
        number.checked_sub(1).and_then(|index| self.lines.get(index)).map_or("", |line| line.trim_end())
    }
}
