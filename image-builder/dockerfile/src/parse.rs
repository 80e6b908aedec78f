//! From logical lines to typed instructions and stages.

use crate::directive::Directives;
use crate::error::{Fault, Reason};
use crate::flags::{Flags, Kind};
use crate::instruction::{
    Add, CommandForm, Copy, Declaration, Files, Healthcheck, Heredoc, Instruction, Network, Pair, Pairs, Run,
    RunCommand, Security, Source, Trigger,
};
use crate::lexer::{Body, Lexed, Line};
use crate::mount::MountFlag;
use crate::position::{Part, Position, Word};
use crate::suggest::nearest;
use crate::words::{heredoc_marker, json_list, quoted_words, split_flags};
use crate::{Stage, StageName, Statement};

/// The most stages of a file.
const MAX_STAGES: usize = 100;
/// The instructions that a Dockerfile may hold.
pub(crate) const KNOWN: [&str; 18] = [
    "ADD",
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "LABEL",
    "MAINTAINER",
    "ONBUILD",
    "RUN",
    "SHELL",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
];

type Parsed = (Directives, Vec<Statement>, Vec<Stage>);

pub(crate) fn parse(lexed: Lexed) -> Result<Parsed, Fault> {
    let escape = lexed.directives.escape;
    let mut global_args = Vec::new();
    let mut stages: Vec<Stage> = Vec::new();
    let mut last = Position { line: 1, column: 1 };
    for line in &lexed.lines {
        let statement = statement(line, escape)?;
        last = statement.at;
        let fail = |reason| Err(Fault::new(last, reason));
        if statement.instruction == Instruction::From {
            if stages.len() == MAX_STAGES {
                let (got, limit) = (MAX_STAGES + 1, MAX_STAGES);
                return fail(Reason::TooMuch { what: "the file's stages", got, limit });
            }
            stages.push(stage(line.split().1, statement)?);
        } else if let Some(stage) = stages.last_mut() {
            stage.statements.push(statement);
        } else if matches!(statement.instruction, Instruction::Arg(_)) {
            global_args.push(statement);
        } else {
            return fail(Reason::BeforeFrom { keyword: statement.instruction.keyword() });
        }
    }
    if stages.is_empty() {
        return Err(Fault::new(last, Reason::NoFrom));
    }
    Ok((lexed.directives, global_args, stages))
}

/// One instruction. What `FROM` names is read by [`stage`].
pub(crate) fn statement(line: &Line, escape: char) -> Result<Statement, Fault> {
    let (keyword, rest) = line.split();
    let text = match rest.is_empty() {
        true => keyword.text().to_owned(),
        false => format!("{} {}", keyword.text(), rest.text()),
    };
    let instruction = Arguments::new(keyword, rest, &line.heredocs, escape)?.instruction()?;
    Ok(Statement {
        at: keyword.at(),
        keyword: keyword.text().to_owned(),
        text,
        blank: line.blank,
        instruction,
    })
}

fn stage(rest: Part<'_>, from: Statement) -> Result<Stage, Fault> {
    let (flags, rest) = split_flags(rest);
    let flags = Flags::parse("FROM", &flags, &[("platform", Kind::Text)])?;
    let words = rest.blank_words();
    let (image, name) = match words.as_slice() {
        [image] => (image, None),
        [image, word, name] if word.text.eq_ignore_ascii_case("as") => (image, Some((word, name))),
        [] => return Err(arguments("FROM", from.at, "no image is named")),
        [_, word, ..] => {
            let problem = format!("{} words", words.len());
            return Err(arguments("FROM", word.at, &problem));
        }
    };
    let name = match name {
        None => None,
        Some((keyword, written)) => {
            let name = written.text.to_lowercase();
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
            if !name.starts_with(|first: char| first.is_ascii_alphabetic()) || !name.bytes().all(plain) {
                let problem = "it must begin with a letter and hold letters, digits, '_', '-' and '.'";
                let advice = String::new();
                return Err(Fault::new(written.at, Reason::StageName { name, problem, advice }));
            }
            Some(StageName { name, written: written.clone(), keyword: keyword.text.clone() })
        }
    };
    let platform = flags.filled("platform")?;
    Ok(Stage { from, image: image.clone(), platform, name, statements: Vec::new() })
}

/// How an instruction is written.
fn usage(keyword: &str) -> &'static str {
    match keyword {
        "FROM" => "FROM [--platform=PLATFORM] IMAGE [AS NAME]",
        "RUN" => "RUN COMMAND or RUN [\"PROGRAM\", \"ARGUMENT\"]",
        "COPY" => "COPY [--from=STAGE] [--chown=USER:GROUP] [--chmod=MODE] SOURCE... DESTINATION",
        "ADD" => "ADD [--checksum=DIGEST] [--chown=USER:GROUP] [--chmod=MODE] SOURCE... DESTINATION",
        "ENV" => "ENV NAME=VALUE ...",
        "LABEL" => "LABEL NAME=VALUE ...",
        "ARG" => "ARG NAME[=DEFAULT] ...",
        "WORKDIR" => "WORKDIR PATH",
        "USER" => "USER NAME[:GROUP]",
        "CMD" => "CMD COMMAND or CMD [\"PROGRAM\", \"ARGUMENT\"]",
        "ENTRYPOINT" => "ENTRYPOINT COMMAND or ENTRYPOINT [\"PROGRAM\", \"ARGUMENT\"]",
        "EXPOSE" => "EXPOSE PORT[/PROTOCOL] ...",
        "VOLUME" => "VOLUME PATH ... or VOLUME [\"PATH\", ...]",
        "SHELL" => "SHELL [\"PROGRAM\", \"ARGUMENT\"]",
        "STOPSIGNAL" => "STOPSIGNAL SIGNAL",
        "HEALTHCHECK" => "HEALTHCHECK [--interval=TIME] CMD COMMAND, or HEALTHCHECK NONE",
        "ONBUILD" => "ONBUILD INSTRUCTION, but not FROM, ONBUILD or MAINTAINER",
        "MAINTAINER" => "MAINTAINER NAME",
        _ => "arguments",
    }
}

fn arguments(keyword: &'static str, at: Position, problem: &str) -> Fault {
    Fault::new(at, Reason::Arguments { keyword, problem: problem.to_owned(), expected: usage(keyword) })
}

/// An instruction in pieces.
struct Arguments<'a> {
    keyword: &'static str,
    at: Position,
    flags: Vec<Word>,
    rest: Part<'a>,
    heredocs: &'a [Body],
    escape: char,
    /// Everything behind the keyword.
    whole: Part<'a>,
}

impl<'a> Arguments<'a> {
    fn new(keyword: Part<'a>, whole: Part<'a>, heredocs: &'a [Body], escape: char) -> Result<Self, Fault> {
        let upper = keyword.text().to_ascii_uppercase();
        let Some(known) = KNOWN.into_iter().find(|known| *known == upper) else {
            let advice = match nearest(&upper, KNOWN) {
                Some(near) => format!("; did you mean {near}?"),
                None => format!("; the known ones are {}", KNOWN.join(", ")),
            };
            let shown: String = keyword.text().chars().take(80).collect();
            return Err(Fault::new(keyword.at(), Reason::UnknownInstruction { keyword: shown, advice }));
        };
        if whole.is_empty() {
            return Err(arguments(known, keyword.at(), "no arguments"));
        }
        let (flags, rest) = match known {
            // A stage's flags are read with the stage; ONBUILD's are its instruction's.
            "FROM" | "ONBUILD" => (Vec::new(), whole),
            _ => split_flags(whole),
        };
        Ok(Self { keyword: known, at: keyword.at(), flags, rest, heredocs, escape, whole })
    }

    fn instruction(&self) -> Result<Instruction, Fault> {
        let flagged = ["FROM", "RUN", "COPY", "ADD", "HEALTHCHECK", "ONBUILD"].contains(&self.keyword);
        if !flagged {
            self.flags(&[])?;
        }
        if self.rest.is_empty() {
            return Err(self.wrong("no arguments behind its flags"));
        }
        Ok(match self.keyword {
            "FROM" => Instruction::From,
            "RUN" => Instruction::Run(self.run()?),
            "COPY" => Instruction::Copy(self.copy()?),
            "ADD" => Instruction::Add(self.add()?),
            "ENV" => Instruction::Env(self.pairs()?),
            "LABEL" => Instruction::Label(self.pairs()?),
            "ARG" => Instruction::Arg(self.declarations()?),
            "WORKDIR" => Instruction::Workdir(self.rest.word()),
            "USER" => Instruction::User(self.rest.word()),
            "CMD" => Instruction::Cmd(self.command(self.rest)?),
            "ENTRYPOINT" => Instruction::Entrypoint(self.command(self.rest)?),
            "EXPOSE" => Instruction::Expose(self.rest.blank_words()),
            "VOLUME" => {
                let words = self.list()?;
                if words.is_empty() || words.iter().any(|word| word.text.trim().is_empty()) {
                    return Err(self.wrong("a path is empty"));
                }
                Instruction::Volume(words)
            }
            "SHELL" => match self.command(self.rest)? {
                CommandForm::Exec(shell) if !shell.is_empty() => Instruction::Shell(shell),
                _ => return Err(self.wrong("not a JSON list of strings")),
            },
            "STOPSIGNAL" => Instruction::StopSignal(self.rest.word()),
            "HEALTHCHECK" => Instruction::Healthcheck(self.healthcheck()?),
            "ONBUILD" => Instruction::OnBuild(self.trigger()?),
            _ => Instruction::Maintainer(self.rest.word()),
        })
    }

    fn wrong(&self, problem: &str) -> Fault {
        let at = if self.rest.is_empty() { self.at } else { self.rest.at() };
        arguments(self.keyword, at, problem)
    }

    fn flags(&self, known: &[(&'static str, Kind)]) -> Result<Flags, Fault> {
        Flags::parse(self.keyword, &self.flags, known)
    }

    /// A JSON list of strings is the exec form; anything else, also broken JSON, is text for the shell, as Docker has it.
    /// A list that holds other things than strings was surely meant as a list.
    fn command(&self, rest: Part<'_>) -> Result<CommandForm, Fault> {
        match json_list(rest.text()) {
            Some(Ok(words)) => Ok(CommandForm::Exec(words)),
            Some(Err(())) => Err(self.wrong("the JSON list may hold strings only")),
            None => Ok(CommandForm::Shell(rest.text().to_owned())),
        }
    }

    /// A JSON list of strings, else words between blanks.
    fn list(&self) -> Result<Vec<Word>, Fault> {
        match self.command(self.rest)? {
            CommandForm::Shell(_) => Ok(self.rest.blank_words()),
            CommandForm::Exec(words) => {
                let at = self.rest.at();
                Ok(words.into_iter().map(|text| Word { text, at }).collect())
            }
        }
    }

    fn run(&self) -> Result<Run, Fault> {
        let known = [
            ("mount", Kind::List),
            ("network", Kind::Text),
            ("security", Kind::Text),
            ("device", Kind::List),
        ];
        let flags = self.flags(&known)?;
        let networks =
            [("default", Network::Default), ("none", Network::None), ("host", Network::Host)].as_slice();
        let securities = [("sandbox", Security::Sandbox), ("insecure", Security::Insecure)].as_slice();
        Ok(Run {
            mounts: flags.list("mount").iter().map(MountFlag::parse).collect::<Result<_, _>>()?,
            network: flags.choice("network", networks, "default, none or host")?,
            security: flags.choice("security", securities, "sandbox or insecure")?,
            devices: flags.list("device"),
            command: self.run_command()?,
        })
    }

    fn run_command(&self) -> Result<RunCommand, Fault> {
        let Some(first) = self.heredocs.first() else {
            let command = self.command(self.rest)?;
            if command == CommandForm::Exec(Vec::new()) {
                return Err(self.wrong("the list is empty"));
            }
            return Ok(RunCommand::Command(command));
        };
        if self.rest.blank_words().len() == 1 && heredoc_marker(self.rest.text()).is_some() {
            let contents = first.text();
            return Ok(match contents.starts_with("#!") {
                true => RunCommand::Script { name: first.marker.name.clone(), contents },
                false => RunCommand::Command(CommandForm::Shell(contents)),
            });
        }
        // The shell itself knows heredocs: it gets the line with their bodies as they are.
        let mut text = self.rest.text().to_owned();
        for body in self.heredocs {
            text.push('\n');
            text.push_str(&body.contents);
            text.push_str(&body.marker.name);
        }
        Ok(RunCommand::Command(CommandForm::Shell(text)))
    }

    fn copy(&self) -> Result<Copy, Fault> {
        let flags = self.flags(&[
            ("from", Kind::Text),
            ("chown", Kind::Text),
            ("chmod", Kind::Text),
            ("link", Kind::Switch),
            ("parents", Kind::Switch),
            ("exclude", Kind::List),
        ])?;
        let from = flags.filled("from")?;
        if let Some(from) = &from
            && from.text.contains('$')
        {
            let problem = "variables are not expanded there".to_owned();
            let expected = "a stage or image; FROM $VARIABLE AS NAME gives a variable's image a name";
            let reason = Reason::Flag { keyword: "COPY", flag: "from", problem, expected };
            return Err(Fault::new(from.at, reason));
        }
        Ok(Copy { files: self.files(&flags)?, from, parents: flags.switch("parents").unwrap_or(false) })
    }

    fn add(&self) -> Result<Add, Fault> {
        let flags = self.flags(&[
            ("chown", Kind::Text),
            ("chmod", Kind::Text),
            ("link", Kind::Switch),
            ("exclude", Kind::List),
            ("checksum", Kind::Text),
            ("keep-git-dir", Kind::Switch),
            ("unpack", Kind::Switch),
        ])?;
        Ok(Add {
            files: self.files(&flags)?,
            checksum: flags.filled("checksum")?,
            keep_git_dir: flags.switch("keep-git-dir").unwrap_or(false),
            unpack: flags.switch("unpack"),
        })
    }

    fn files(&self, flags: &Flags) -> Result<Files, Fault> {
        let words = self.list()?;
        let Some((destination, sources)) = words.split_last().filter(|(_, sources)| !sources.is_empty())
        else {
            return Err(self.wrong("a source and a destination are needed"));
        };
        let marker = |word: &Word| if self.heredocs.is_empty() { None } else { heredoc_marker(&word.text) };
        if marker(destination).is_some() {
            return Err(arguments(self.keyword, destination.at, "a heredoc cannot be the destination"));
        }
        for word in sources {
            if let Some(marker) = marker(word)
                && (marker.name.contains(['/', '\0']) || marker.name == "." || marker.name == "..")
            {
                let problem =
                    format!("{:?} is no name of a file; the destination says where it goes", marker.name);
                return Err(arguments(self.keyword, word.at, &problem));
            }
        }
        let mut bodies = self.heredocs.iter();
        let source = |word: &Word| match marker(word).and_then(|_| bodies.next()) {
            Some(body) => Source::Inline(Heredoc {
                name: body.marker.name.clone(),
                expand: body.marker.expand,
                contents: body.text(),
                at: word.at,
            }),
            None => Source::Path(word.clone()),
        };
        Ok(Files {
            sources: sources.iter().map(source).collect(),
            destination: destination.clone(),
            chown: flags.filled("chown")?,
            chmod: flags.filled("chmod")?,
            link: flags.switch("link").unwrap_or(false),
            exclude: flags.list("exclude"),
        })
    }

    fn pairs(&self) -> Result<Pairs, Fault> {
        let (words, _) = quoted_words(self.rest, self.escape);
        if words.first().is_some_and(|first| first.text.contains('=')) {
            let pairs = words.iter().map(|word| self.pair(word)).collect::<Result<_, _>>()?;
            return Ok(Pairs { pairs, legacy: false });
        }
        // The old form: everything behind the first blank is the value.
        let (name, value) = self.rest.split_first();
        if value.is_empty() {
            return Err(self.wrong(&format!("{:?} has no value", name.text())));
        }
        Ok(Pairs { pairs: vec![Pair { name: name.word(), value: value.word() }], legacy: true })
    }

    fn pair(&self, word: &Word) -> Result<Pair, Fault> {
        match word.text.split_once('=') {
            Some((name, value)) if !name.is_empty() => {
                let column = word.at.column + name.chars().count() + 1;
                Ok(Pair {
                    name: Word { text: name.to_owned(), at: word.at },
                    value: Word { text: value.to_owned(), at: Position { column, ..word.at } },
                })
            }
            Some(_) => Err(arguments(self.keyword, word.at, "a name is empty")),
            None => Err(arguments(self.keyword, word.at, &format!("{:?} is not NAME=VALUE", word.text))),
        }
    }

    fn declarations(&self) -> Result<Vec<Declaration>, Fault> {
        let (words, _) = quoted_words(self.rest, self.escape);
        let declaration = |word: &Word| match word.text.contains('=') {
            true => self.pair(word).map(|pair| Declaration { name: pair.name, default: Some(pair.value) }),
            false => Ok(Declaration { name: word.clone(), default: None }),
        };
        words.iter().map(declaration).collect()
    }

    fn healthcheck(&self) -> Result<Healthcheck, Fault> {
        let (kind, rest) = self.rest.split_first();
        if kind.text().eq_ignore_ascii_case("NONE") {
            return match rest.is_empty() {
                true => Ok(Healthcheck::None),
                false => Err(arguments(self.keyword, rest.at(), "NONE takes no arguments")),
            };
        }
        let flags = self.flags(&[
            ("interval", Kind::Text),
            ("timeout", Kind::Text),
            ("start-period", Kind::Text),
            ("start-interval", Kind::Text),
            ("retries", Kind::Text),
        ])?;
        if !kind.text().eq_ignore_ascii_case("CMD") {
            return Err(self.wrong(&format!("{:?} is neither CMD nor NONE", kind.text())));
        }
        let command = self.command(rest)?;
        if rest.is_empty() || command == CommandForm::Exec(Vec::new()) {
            return Err(self.wrong("no command behind CMD"));
        }
        Ok(Healthcheck::Command {
            command,
            interval: flags.duration("interval")?,
            timeout: flags.duration("timeout")?,
            start_period: flags.duration("start-period")?,
            start_interval: flags.duration("start-interval")?,
            retries: flags.number("retries")?,
        })
    }

    fn trigger(&self) -> Result<Trigger, Fault> {
        let (keyword, rest) = self.whole.split_first();
        for refused in ["ONBUILD", "FROM", "MAINTAINER"] {
            if keyword.text().eq_ignore_ascii_case(refused) {
                return Err(self.wrong(&format!("{refused} cannot be a trigger")));
            }
        }
        let instruction = Arguments::new(keyword, rest, self.heredocs, self.escape)?.instruction()?;
        let mut text = self.whole.text().to_owned();
        for body in self.heredocs {
            text.push('\n');
            text.push_str(&body.contents);
            text.push_str(&body.marker.name);
        }
        Ok(Trigger { text, instruction: Box::new(instruction), at: keyword.at() })
    }
}
