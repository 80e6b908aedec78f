//! From logical lines to typed instructions and stages.

use super::error::KNOWN;
use super::instruction::{CommandForm, Copy, Heredoc, Instruction, Pair, Run, Source};
use super::lexer::Line;
use super::words::{heredoc_marker, split_words};
use super::{Dockerfile, Error, Reason, Stage, Statement};

/// The most stages of a file.
const MAX_STAGES: usize = 100;

pub(super) fn parse(file: &str, lines: Vec<Line>) -> Result<Dockerfile, Error> {
    let escape = lines.first().map_or('\\', |line| line.escape);
    let mut dockerfile =
        Dockerfile { file: file.to_owned(), escape, global_args: Vec::new(), stages: Vec::new() };
    let last = lines.last().map_or(1, |line| line.number);
    for line in lines {
        let text = line.text();
        let fail = |reason| Error::new(file, line.number, &text, reason);
        let instruction = instruction(&line).map_err(fail)?;
        let statement = Statement { line: line.number, text: text.clone(), instruction };
        if statement.instruction == Instruction::From {
            if dockerfile.stages.len() == MAX_STAGES {
                let reason = Reason::TooMuch { what: "stages", got: MAX_STAGES + 1, limit: MAX_STAGES };
                return Err(fail(reason));
            }
            let stage = stage(&line, statement, &dockerfile.stages).map_err(fail)?;
            dockerfile.stages.push(stage);
        } else if let Some(stage) = dockerfile.stages.last_mut() {
            stage.statements.push(statement);
        } else if matches!(statement.instruction, Instruction::Arg(_)) {
            dockerfile.global_args.push(statement);
        } else {
            return Err(fail(Reason::BeforeFrom { keyword: statement.instruction.keyword() }));
        }
    }
    if dockerfile.stages.is_empty() {
        return Err(Error::new(file, last, "", Reason::NoFrom));
    }
    Ok(dockerfile)
}

fn stage(line: &Line, from: Statement, earlier: &[Stage]) -> Result<Stage, Reason> {
    const EXPECTED: &str = "FROM [--platform=PLATFORM] IMAGE [AS NAME]";
    let (flags, rest) = flags("FROM", &line.rest, &["platform"], "--platform")?;
    let words = split_words(rest, line.escape);
    let wrong = |problem: String| Reason::Arguments { keyword: "FROM", problem, expected: EXPECTED };
    let (image, name) = match words.as_slice() {
        [image] => (image, None),
        [image, word, name] if word.eq_ignore_ascii_case("as") => (image, Some(name.to_lowercase())),
        [] => return Err(wrong("no image is named".to_owned())),
        _ => return Err(wrong(format!("{} words", words.len()))),
    };
    if let Some(name) = &name {
        let problem = |problem| Err(Reason::StageName { name: name.clone(), problem });
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
        if !name.starts_with(|first: char| first.is_ascii_alphabetic()) || !name.bytes().all(plain) {
            return problem("it must begin with a letter and hold letters, digits, '_', '-' and '.'");
        }
        if name == "scratch" || name == "context" {
            return problem("the name is reserved");
        }
        if earlier.iter().any(|stage| stage.name.as_ref() == Some(name)) {
            return problem("an earlier stage has it already");
        }
    }
    let platform = flags.into_iter().next().map(|(_, value)| value);
    Ok(Stage { from, image: image.clone(), platform, name, statements: Vec::new() })
}

fn instruction(line: &Line) -> Result<Instruction, Reason> {
    let rest = line.rest.as_str();
    let upper = line.keyword.to_ascii_uppercase();
    let Some(keyword) = KNOWN.into_iter().find(|known| *known == upper) else {
        return Err(Reason::UnknownInstruction { keyword: line.keyword.clone() });
    };
    let wrong =
        |problem: &str, expected| Reason::Arguments { keyword, problem: problem.to_owned(), expected };
    if rest.is_empty() {
        return Err(wrong("no arguments", usage(keyword)));
    }
    let not_supported =
        |advice: &str| Err(Reason::NotSupported { what: keyword.to_owned(), advice: advice.to_owned() });
    Ok(match keyword {
        "FROM" => Instruction::From,
        "RUN" => Instruction::Run(run(line)?),
        "COPY" => Instruction::Copy(copy(line)?),
        "ENV" => Instruction::Env(pairs(keyword, line)?),
        "LABEL" => Instruction::Label(pairs(keyword, line)?),
        "ARG" => Instruction::Arg(args(line)?),
        "WORKDIR" => Instruction::Workdir(rest.to_owned()),
        "USER" => Instruction::User(one_word(keyword, line)?),
        "CMD" => Instruction::Cmd(command(rest)),
        "ENTRYPOINT" => Instruction::Entrypoint(command(rest)),
        "EXPOSE" => Instruction::Expose(split_words(rest, line.escape)),
        "VOLUME" => Instruction::Volume(match command(rest) {
            CommandForm::Exec(paths) => paths,
            CommandForm::Shell(_) => split_words(rest, line.escape),
        }),
        "SHELL" => match command(rest) {
            CommandForm::Exec(shell) if !shell.is_empty() => Instruction::Shell(shell),
            _ => return Err(wrong("not a JSON list of strings", usage(keyword))),
        },
        "STOPSIGNAL" => Instruction::StopSignal(one_word(keyword, line)?),
        "MAINTAINER" => Instruction::Maintainer(rest.to_owned()),
        "ADD" => return not_supported("use COPY for files, and RUN with curl or tar for URLs and archives"),
        "HEALTHCHECK" => return not_supported("leave it out; nothing reads it here"),
        "ONBUILD" => return not_supported("write its instruction into the Dockerfile that uses the image"),
        _ => return Err(Reason::UnknownInstruction { keyword: line.keyword.clone() }),
    })
}

/// How an instruction is written.
fn usage(keyword: &str) -> &'static str {
    match keyword {
        "FROM" => "FROM [--platform=PLATFORM] IMAGE [AS NAME]",
        "RUN" => "RUN COMMAND or RUN [\"PROGRAM\", \"ARGUMENT\"]",
        "COPY" => "COPY [--from=STAGE] [--chown=USER:GROUP] [--chmod=MODE] SOURCE... DESTINATION",
        "ENV" => "ENV NAME=VALUE ...",
        "LABEL" => "LABEL NAME=VALUE ...",
        "ARG" => "ARG NAME[=DEFAULT] ...",
        "WORKDIR" => "WORKDIR PATH",
        "USER" => "USER NAME[:GROUP]",
        "CMD" => "CMD COMMAND or CMD [\"PROGRAM\", \"ARGUMENT\"]",
        "ENTRYPOINT" => "ENTRYPOINT COMMAND or ENTRYPOINT [\"PROGRAM\", \"ARGUMENT\"]",
        "EXPOSE" => "EXPOSE PORT[/PROTOCOL] ...",
        "VOLUME" => "VOLUME PATH ...",
        "SHELL" => "SHELL [\"PROGRAM\", \"ARGUMENT\"]",
        "STOPSIGNAL" => "STOPSIGNAL SIGNAL",
        "MAINTAINER" => "MAINTAINER NAME",
        _ => "arguments",
    }
}

/// A JSON list of strings is the exec form; anything else, also broken JSON, is text for the shell, as Docker has it.
fn command(rest: &str) -> CommandForm {
    if rest.starts_with('[')
        && let Ok(words) = serde_json::from_str::<Vec<String>>(rest)
    {
        return CommandForm::Exec(words);
    }
    CommandForm::Shell(rest.to_owned())
}

fn run(line: &Line) -> Result<Run, Reason> {
    let (_, rest) = match flags("RUN", &line.rest, &[], "none") {
        Err(Reason::UnknownFlag { flag, .. })
            if ["--mount", "--network", "--security"].iter().any(|known| flag.starts_with(known)) =>
        {
            let advice = "leave it out; the step has the host's network and no mounts".to_owned();
            return Err(Reason::NotSupported { what: format!("RUN {flag}"), advice });
        }
        other => other?,
    };
    if line.heredocs.is_empty() {
        return match command(rest) {
            CommandForm::Exec(words) if words.is_empty() => Err(Reason::Arguments {
                keyword: "RUN",
                problem: "the list is empty".to_owned(),
                expected: usage("RUN"),
            }),
            command => Ok(Run { command }),
        };
    }
    if let [body] = line.heredocs.as_slice()
        && heredoc_marker(rest).is_some()
    {
        return Ok(Run { command: CommandForm::Shell(body.contents.clone()) });
    }
    // The shell itself knows heredocs: it gets the line with their bodies.
    let mut text = format!("{rest}\n");
    for body in &line.heredocs {
        text.push_str(&body.contents);
        text.push_str(&body.name);
        text.push('\n');
    }
    Ok(Run { command: CommandForm::Shell(text) })
}

fn copy(line: &Line) -> Result<Copy, Reason> {
    const FLAGS: &str = "--from, --chown and --chmod";
    let wrong = |problem: String| Reason::Arguments { keyword: "COPY", problem, expected: usage("COPY") };
    let known = ["from", "chown", "chmod"];
    let (flags, rest) = match flags("COPY", &line.rest, &known, FLAGS) {
        Err(Reason::UnknownFlag { flag, .. })
            if ["--link", "--parents", "--exclude"].iter().any(|known| flag.starts_with(known)) =>
        {
            let advice = "leave it out; each COPY is a layer of its own".to_owned();
            return Err(Reason::NotSupported { what: format!("COPY {flag}"), advice });
        }
        other => other?,
    };
    let flag = |name: &str| flags.iter().find(|(flag, _)| flag == name).map(|(_, value)| value.clone());
    let words = match command(rest) {
        CommandForm::Exec(words) => words,
        CommandForm::Shell(_) => split_words(rest, line.escape),
    };
    let Some((destination, sources)) = words.split_last().filter(|(_, sources)| !sources.is_empty()) else {
        return Err(wrong("a source and a destination are needed".to_owned()));
    };
    let mut bodies = line.heredocs.iter();
    let source = |word: &String| match heredoc_marker(word).and_then(|_| bodies.next()) {
        Some(body) => Source::Inline(Heredoc {
            name: body.name.clone(),
            expand: body.expand,
            contents: body.contents.clone(),
        }),
        None => Source::Path(word.clone()),
    };
    let sources = sources.iter().map(source).collect();
    Ok(Copy {
        from: flag("from"),
        chown: flag("chown"),
        chmod: flag("chmod"),
        sources,
        destination: destination.clone(),
    })
}

fn pairs(keyword: &'static str, line: &Line) -> Result<Vec<Pair>, Reason> {
    let wrong = |problem: String| Reason::Arguments { keyword, problem, expected: usage(keyword) };
    let words = split_words(&line.rest, line.escape);
    let first = words.first().map(String::as_str).unwrap_or_default();
    if !first.contains('=') {
        // The old form: everything after the first blank is the value.
        let (name, value) = super::words::split_keyword(&line.rest);
        if value.is_empty() {
            return Err(wrong(format!("{name:?} has no value")));
        }
        return Ok(vec![Pair { name: name.to_owned(), value: value.to_owned() }]);
    }
    let pair = |word: &String| match word.split_once('=') {
        Some((name, value)) if !name.is_empty() => {
            Ok(Pair { name: name.to_owned(), value: value.to_owned() })
        }
        _ => Err(wrong(format!("{word:?} is not NAME=VALUE"))),
    };
    words.iter().map(pair).collect()
}

fn args(line: &Line) -> Result<Vec<(String, Option<String>)>, Reason> {
    let arg = |word: &String| {
        let (name, value) = match word.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (word.as_str(), None),
        };
        let first = name.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_');
        if !first || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
            return Err(Reason::Arguments {
                keyword: "ARG",
                problem: format!("{name:?} is no name of a variable"),
                expected: usage("ARG"),
            });
        }
        Ok((name.to_owned(), value))
    };
    split_words(&line.rest, line.escape).iter().map(arg).collect()
}

fn one_word(keyword: &'static str, line: &Line) -> Result<String, Reason> {
    match split_words(&line.rest, line.escape).as_slice() {
        [word] => Ok(word.clone()),
        words => Err(Reason::Arguments {
            keyword,
            problem: format!("{} words", words.len()),
            expected: usage(keyword),
        }),
    }
}

/// Flags with their values.
type Flags = Vec<(String, String)>;

/// Takes `--name=value` words off the front.
fn flags<'a>(
    keyword: &'static str,
    mut rest: &'a str,
    names: &[&str],
    known: &'static str,
) -> Result<(Flags, &'a str), Reason> {
    let mut flags = Flags::new();
    while rest.starts_with("--") {
        let (word, after) = super::words::split_keyword(rest);
        rest = after;
        if word == "--" {
            break;
        }
        let (name, value) = word[2..].split_once('=').unwrap_or((&word[2..], ""));
        if !names.contains(&name) {
            return Err(Reason::UnknownFlag { keyword, flag: word.to_owned(), known });
        }
        if value.is_empty() || flags.iter().any(|(flag, _)| flag == name) {
            let problem = if value.is_empty() { "has no value" } else { "stands twice" };
            return Err(Reason::Arguments {
                keyword,
                problem: format!("--{name} {problem}"),
                expected: usage(keyword),
            });
        }
        flags.push((name.to_owned(), value.to_owned()));
    }
    Ok((flags, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Dockerfile {
        Dockerfile::parse("Dockerfile", text.as_bytes()).unwrap()
    }

    fn single(text: &str) -> Instruction {
        let mut file = parsed(&format!("FROM a\n{text}"));
        assert_eq!(file.stages[0].statements.len(), 1, "{text}");
        file.stages[0].statements.remove(0).instruction
    }

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn commands_have_two_forms() {
        let exec = |words: &[&str]| CommandForm::Exec(strings(words));
        let shell = |text: &str| CommandForm::Shell(text.to_owned());
        for (text, command) in [
            (r#"["a", "b c"]"#, exec(&["a", "b c"])),
            ("a \"b\" c", shell("a \"b\" c")),
            ("['a']", shell("['a']")),
            ("[\"a\"", shell("[\"a\"")),
            ("[ -e x ] && y", shell("[ -e x ] && y")),
        ] {
            assert_eq!(single(&format!("CMD {text}")), Instruction::Cmd(command.clone()));
            assert_eq!(single(&format!("entrypoint {text}")), Instruction::Entrypoint(command.clone()));
            assert_eq!(single(&format!("Run {text}")), Instruction::Run(Run { command }));
        }
        assert_eq!(single("RUN <<EOF\na\nb\nEOF"), Instruction::Run(Run { command: shell("a\nb\n") }));
        assert_eq!(
            single("RUN cat <<EOF > /f\na\nEOF"),
            Instruction::Run(Run { command: shell("cat <<EOF > /f\na\nEOF\n") })
        );
    }

    #[test]
    fn pairs_have_two_forms() {
        let pair = |name: &str, value: &str| Pair { name: name.into(), value: value.into() };
        assert_eq!(single("ENV a=1 b=\"2 3\""), Instruction::Env(vec![pair("a", "1"), pair("b", "\"2 3\"")]));
        assert_eq!(single("ENV a 1 b=2"), Instruction::Env(vec![pair("a", "1 b=2")]));
        assert_eq!(
            single("LABEL \"a b\"=c d="),
            Instruction::Label(vec![pair("\"a b\"", "c"), pair("d", "")])
        );
        assert_eq!(
            single("ARG a b=c"),
            Instruction::Arg(vec![("a".into(), None), ("b".into(), Some("c".into()))])
        );
    }

    #[test]
    fn copies_have_flags_and_heredocs() {
        let Instruction::Copy(copy) = single("COPY --from=b --chown=u:g --chmod=644 x \"y z\" /d/") else {
            panic!()
        };
        assert_eq!(copy.from.as_deref(), Some("b"));
        assert_eq!(copy.chown.as_deref(), Some("u:g"));
        assert_eq!(copy.chmod.as_deref(), Some("644"));
        assert_eq!(copy.sources, [Source::Path("x".into()), Source::Path("\"y z\"".into())]);
        assert_eq!(copy.destination, "/d/");
        let Instruction::Copy(copy) = single("COPY [\"a b\", \"c\"]") else { panic!() };
        assert_eq!((copy.sources, copy.destination), (vec![Source::Path("a b".into())], "c".to_owned()));
        let Instruction::Copy(copy) = single("COPY <<one <<'two' /d/\n1\none\n2\ntwo") else { panic!() };
        let inline = |name: &str, expand, contents: &str| {
            Source::Inline(Heredoc { name: name.into(), expand, contents: contents.into() })
        };
        assert_eq!(copy.sources, [inline("one", true, "1\n"), inline("two", false, "2\n")]);
    }

    #[test]
    fn stages_have_names() {
        let file = parsed("ARG v=1\nfrom --platform=linux/amd64 debian:$v as Build\nFROM scratch\nUSER a\n");
        assert_eq!(file.global_args.len(), 1);
        assert_eq!(file.stages[0].name.as_deref(), Some("build"));
        assert_eq!(file.stages[0].image, "debian:$v");
        assert_eq!(file.stages[0].platform.as_deref(), Some("linux/amd64"));
        assert_eq!(file.stages[1].statements.len(), 1);
    }

    #[test]
    fn errors_name_file_line_and_text() {
        let cases = [
            "",
            "RUN a",
            "FROM",
            "FROM a b",
            "FROM a AS 1",
            "FROM a AS scratch",
            "FROM a AS b\nFROM c AS B",
            "FROM --os=x a",
            "FROM a\n\nRUNN apt-get update",
            "FROM a\nCOPY x",
            "FROM a\nCOPY --link x y",
            "FROM a\nCOPY --owner=x x y",
            "FROM a\nRUN --mount=type=cache,target=/x y",
            "FROM a\nRUN []",
            "FROM a\nENV a",
            "FROM a\nENV a=1 b",
            "FROM a\nARG 1a",
            "FROM a\nUSER a b",
            "FROM a\nSHELL /bin/sh",
            "FROM a\nADD x y",
            "FROM a\nHEALTHCHECK NONE",
            "FROM a\nONBUILD RUN x",
            "FROM a\nWORKDIR",
        ];
        let errors =
            cases.map(|text| Dockerfile::parse("app/Dockerfile", text.as_bytes()).unwrap_err().to_string());
        insta::assert_snapshot!(errors.join("\n"));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_end_in_an_answer(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
            let _ = Dockerfile::parse("Dockerfile", &bytes);
        }

        #[test]
        fn any_instructions_end_in_an_answer(
            lines in proptest::collection::vec("(FROM|RUN|COPY|ENV|ARG|LABEL|CMD) [a-z\"'\\\\$<{}=\\[ -]{0,20}", 0..8)
        ) {
            let _ = Dockerfile::parse("Dockerfile", lines.join("\n").as_bytes());
        }
    }
}
