//! What holds for every text: an answer that points into the file, and the same as a plain and slow reference gives.

use dockerfile::e2b::TemplateBuild;
use dockerfile::expand::{MAX_RESULT, Variables, expand, expand_heredoc};
use dockerfile::lint::lint;
use dockerfile::{Chmod, Dockerfile, Ignore, Instruction, MountFlag};
use proptest::collection::vec;
use proptest::prelude::*;

/// Pieces that the language gives a meaning, so that random texts get far.
const PIECES: [&str; 52] = [
    "FROM a\n",
    "ARG ",
    "ENV ",
    "RUN ",
    "COPY ",
    "ADD ",
    "CMD ",
    "LABEL ",
    "ONBUILD ",
    "HEALTHCHECK ",
    "EXPOSE ",
    "VOLUME ",
    "SHELL ",
    "a=",
    "b ",
    "--mount=",
    "--from=",
    "type=cache",
    ",target=",
    "<<E",
    "<<-'E'",
    "\nE\n",
    "\n",
    "\\\n",
    "\r\n",
    "\t",
    " ",
    "#",
    "\"",
    "'",
    "\\",
    "`",
    "$",
    "{",
    "}",
    ":-",
    "/",
    "%",
    "[",
    "]",
    ",",
    "ä",
    "# escape=`\n",
    "# check=",
    "skip=all",
    ";error=true",
    "CMD x",
    "NONE",
    "80/tcp",
    "as ",
    "AS b\n",
    "scratch",
];

fn text() -> impl Strategy<Value = String> {
    vec(proptest::sample::select(PIECES.to_vec()), 0..40).prop_map(|pieces| pieces.concat())
}

struct One<'a>(&'a str);

impl Variables for One<'_> {
    fn value(&self, name: &str) -> Option<&str> {
        (name == "v").then_some(self.0)
    }
}

/// The mounts of every RUN, read with a variable.
fn resolve(mounts: &[MountFlag]) {
    for mount in mounts {
        let _ = mount.resolve(&mut |text| expand(text, '\\', &One("/x,y=z")));
    }
}

fn check(contents: &[u8]) {
    let lines = contents.split(|byte| *byte == b'\n').count();
    match Dockerfile::parse("Dockerfile", contents) {
        Err(error) => {
            assert!((1..=lines).contains(&error.at.line) && error.at.column >= 1, "{error}");
            assert!(error.to_string().len() < 4000, "{error}");
        }
        Ok(file) => {
            assert!(!file.stages.is_empty());
            for warning in lint(&file, Some(&Ignore::default())) {
                assert!((1..=lines).contains(&warning.at.line), "{warning:?}");
                assert!(!file.directives.check.skip.contains(warning.rule));
            }
            for statement in file.stages.iter().flat_map(|stage| &stage.statements) {
                assert!((1..=lines).contains(&statement.at.line));
                match &statement.instruction {
                    Instruction::Run(run) => resolve(&run.mounts),
                    // What goes into an image's config must be readable when an image is built on it. The escape
                    // character does not travel, nor do line ends.
                    Instruction::OnBuild(trigger)
                        if file.escape() == '\\' && !trigger.text.contains('\r') =>
                    {
                        let read = Dockerfile::parse_trigger(&trigger.text);
                        let ends_escaped = trigger.text.trim_end().ends_with('\\');
                        assert!(read.is_ok() || ends_escaped, "{:?}: {read:?}", trigger.text);
                    }
                    _ => {}
                }
            }
        }
    }
}

/// A pattern of the shell by trying everything.
fn shell_matches(pattern: &[char], text: &[char]) -> bool {
    match pattern {
        [] => text.is_empty(),
        ['*', rest @ ..] => (0..=text.len()).any(|at| shell_matches(rest, &text[at..])),
        ['?', rest @ ..] => !text.is_empty() && shell_matches(rest, &text[1..]),
        [literal, rest @ ..] => text.first() == Some(literal) && shell_matches(rest, &text[1..]),
    }
}

/// The same of an ignore file, where `*` stops at slashes and `**` does not.
fn path_matches(pattern: &[char], path: &[char]) -> bool {
    match pattern {
        [] => path.is_empty(),
        ['*', '*', rest @ ..] => {
            let rest = rest.strip_prefix(&['/']).unwrap_or(rest);
            let after_slash = |at: usize| at == 0 || path[at - 1] == '/';
            rest.is_empty() || (0..=path.len()).any(|at| after_slash(at) && path_matches(rest, &path[at..]))
        }
        ['*', rest @ ..] => {
            let end = path.iter().position(|c| *c == '/').unwrap_or(path.len());
            (0..=end).any(|at| path_matches(rest, &path[at..]))
        }
        ['?', rest @ ..] => path.first().is_some_and(|c| *c != '/') && path_matches(rest, &path[1..]),
        [literal, rest @ ..] => path.first() == Some(literal) && path_matches(rest, &path[1..]),
    }
}

/// moby's order of events: each pattern in turn, skipped where it could change nothing, on the path and all above it.
fn excluded(patterns: &[String], path: &str) -> bool {
    let mut matched = false;
    for pattern in patterns {
        let (exception, pattern) = match pattern.strip_prefix('!') {
            Some(rest) => (true, rest),
            None => (false, pattern.as_str()),
        };
        if exception != matched {
            continue;
        }
        let pattern = pattern.strip_prefix('/').unwrap_or(pattern);
        let plain = |text: &str| !text.contains(['*', '?']);
        let fits = |path: &str| {
            // Two shapes that are compared as texts.
            if let Some(suffix) = pattern.strip_prefix("**").filter(|rest| plain(rest)) {
                return path.ends_with(suffix) || suffix == format!("/{path}");
            }
            if let Some(prefix) = pattern.strip_suffix("**").filter(|rest| plain(rest)) {
                return path.starts_with(prefix);
            }
            path_matches(&pattern.chars().collect::<Vec<_>>(), &path.chars().collect::<Vec<_>>())
        };
        let parts: Vec<&str> = path.split('/').collect();
        if (1..=parts.len()).any(|count| fits(&parts[..count].join("/"))) {
            matched = !exception;
        }
    }
    matched
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_end_in_an_answer(bytes in vec(any::<u8>(), 0..300)) {
        check(&bytes);
    }

    #[test]
    fn any_pieces_of_the_language_end_in_an_answer(text in text()) {
        check(text.as_bytes());
    }

    #[test]
    fn line_ends_change_nothing(text in text()) {
        let text = text.replace('\r', "").replace("<<", "");
        let unix = Dockerfile::parse("D", text.as_bytes());
        let dos = Dockerfile::parse("D", text.replace('\n', "\r\n").as_bytes());
        match (unix, dos) {
            (Ok(unix), Ok(dos)) => {
                prop_assert_eq!(unix.stages, dos.stages);
                prop_assert_eq!(unix.directives, dos.directives);
            }
            (Err(unix), Err(dos)) => prop_assert_eq!(unix.to_string(), dos.to_string()),
            (unix, dos) => prop_assert!(false, "{:?} {:?}", unix, dos),
        }
    }

    #[test]
    fn any_word_ends_in_an_answer(text in "[$v{}:+?#%/*'\"\\\\ax -]{0,40}", value in ".{0,20}") {
        for escape in ['\\', '`'] {
            if let Ok(expanded) = expand(&text, escape, &One(&value)) {
                prop_assert!(expanded.len() <= MAX_RESULT * 2);
            }
        }
        let _ = expand_heredoc(&text, &One(&value));
    }

    #[test]
    fn escaped_text_expands_to_itself(text in ".{0,40}") {
        let escaped: String = text.chars().flat_map(|c| ['\\', c]).collect();
        prop_assert_eq!(expand(&escaped, '\\', &One("x")), Ok(text.clone()));
        let quoted = format!("'{}'", text.replace('\'', "'\\''"));
        prop_assert_eq!(expand(&quoted, '\\', &One("x")), Ok(text));
    }

    #[test]
    fn values_go_through_instructions_unchanged(value in "[^\r\n]{0,40}") {
        let escaped: String = value.chars().flat_map(|c| {
            let special = ['"', '$', '\\'].contains(&c);
            special.then_some('\\').into_iter().chain([c])
        }).collect();
        let text = format!("FROM a\nENV v=\"{escaped}\"\nLABEL k=\"{escaped}\" l=x\n");
        let file = Dockerfile::parse("D", text.as_bytes()).unwrap();
        for statement in &file.stages[0].statements {
            let (Instruction::Env(pairs) | Instruction::Label(pairs)) = &statement.instruction else { panic!() };
            prop_assert_eq!(expand(&pairs.pairs[0].value.text, '\\', &One("x")), Ok(value.clone()));
        }
    }

    #[test]
    fn shell_patterns_take_what_trying_everything_takes(value in "[ab]{0,8}", pattern in "[ab*?]{0,5}") {
        let fits = |text: &str| {
            shell_matches(&pattern.chars().collect::<Vec<_>>(), &text.chars().collect::<Vec<_>>())
        };
        let expanded = |form: &str| {
            // The pattern's own first letter must not be taken for the second mark.
            expand(&format!("${{v{form}{pattern}}}"), '\\', &One(&value)).unwrap()
        };
        let cuts = 0..=value.len();
        let shortest = cuts.clone().find(|at| fits(&value[..*at])).unwrap_or(0);
        let longest = cuts.clone().rev().find(|at| fits(&value[..*at])).unwrap_or(0);
        prop_assert_eq!(expanded("#"), &value[shortest..]);
        prop_assert_eq!(expanded("##"), &value[longest..]);
        let shortest = cuts.clone().rev().find(|at| fits(&value[*at..])).unwrap_or(value.len());
        let longest = cuts.clone().find(|at| fits(&value[*at..])).unwrap_or(value.len());
        prop_assert_eq!(expanded("%"), &value[..shortest]);
        prop_assert_eq!(expanded("%%"), &value[..longest]);
        // Between two slashes there must be something.
        let pattern = if pattern.is_empty() { "b".to_owned() } else { pattern };
        let fits = |text: &str| {
            shell_matches(&pattern.chars().collect::<Vec<_>>(), &text.chars().collect::<Vec<_>>())
        };
        // The first place, and there as much as fits.
        let found = cuts.clone().find_map(|from| {
            Some((from, (from..=value.len()).rev().find(|to| fits(&value[from..*to]))?))
        });
        let replaced = match found {
            Some((from, to)) => format!("{}-{}", &value[..from], &value[to..]),
            None => value.clone(),
        };
        prop_assert_eq!(expand(&format!("${{v/{pattern}/-}}"), '\\', &One(&value)).unwrap(), replaced);
    }

    #[test]
    fn ignore_files_are_mobys(
        patterns in vec("!?/?(a|b|ab|\\*|\\*\\*|\\?|a\\*|\\*\\*b|a\\*\\*|\\?b)(/(a|b|ab|\\*|\\*\\*|\\?|b\\*)){0,3}", 0..5),
        path in "(a|b|ab|ba)(/(a|b|ab|ba)){0,3}",
    ) {
        let ignore = Ignore::parse("i", patterns.join("\n").as_bytes()).unwrap();
        prop_assert_eq!(ignore.excludes(path.as_bytes()), excluded(&patterns, &path), "{:?}", patterns);
        prop_assert_eq!(ignore.has_exceptions(), patterns.iter().any(|pattern| pattern.starts_with('!')));
    }

    #[test]
    fn any_ignore_file_ends_in_an_answer(text in vec(any::<u8>(), 0..200), path in vec(any::<u8>(), 0..50)) {
        if let Ok(ignore) = Ignore::parse("i", &text) {
            ignore.excludes(&path);
        }
    }

    #[test]
    fn any_mode_stays_a_mode(text in "[ugoa+=rwxXst,0-7-]{0,12}", mode in 0u32..0o10000, folder in any::<bool>()) {
        if let Some(chmod) = Chmod::parse(&text) {
            let after = chmod.apply(mode, folder);
            prop_assert!(after <= 0o7777, "{:o}", after);
        }
    }

    #[test]
    fn any_template_steps_end_in_an_answer(
        steps in vec(("(COPY|RUN|ENV|ARG|USER|WORKDIR|x)", vec("[a-z$'\"\\\\ /:]{0,8}", 0..5)), 0..6)
    ) {
        let steps: Vec<_> = steps
            .into_iter()
            .map(|(kind, args)| serde_json::json!({"type": kind, "args": args}))
            .collect();
        let json = serde_json::json!({"fromImage": "debian", "steps": steps}).to_string();
        if let Ok(build) = TemplateBuild::parse("t", json.as_bytes()) {
            let statements = &build.dockerfile.stages[0].statements;
            prop_assert!(statements.len() >= steps.len());
            for files in &build.files {
                prop_assert!(matches!(statements[files.statement].instruction, Instruction::Copy(_)));
            }
        }
    }
}
