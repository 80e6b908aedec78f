//! Parser directives: `# syntax=`, `# escape=` and `# check=` at the very top of the file.

use crate::error::{Fault, Reason};
use crate::lint::{Rule, RuleSet};
use crate::position::{Position, Word};

/// What the directives say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directives {
    /// `# syntax=`: the frontend that the author asks for. There is one here, so it changes nothing.
    pub syntax: Option<Word>,
    /// The character that escapes, `\` or a backtick.
    pub escape: char,
    /// `# check=`.
    pub check: Check,
}

/// What `# check=` asks of the lint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Check {
    /// `skip=`: rules that are not applied.
    pub skip: RuleSet,
    /// `error=true`: a warning fails the build.
    pub error: bool,
    /// `experimental=`: accepted; no rule here is experimental.
    pub experimental: Option<String>,
}

/// Reads the directives. The first line that is none ends them; an unknown one is a comment, and ends them too.
pub(crate) fn parse(texts: &[&[u8]]) -> Result<Directives, Fault> {
    let mut directives = Directives { syntax: None, escape: '\\', check: Check::default() };
    let mut seen: Vec<String> = Vec::new();
    for (index, text) in texts.iter().enumerate() {
        let Ok(text) = std::str::from_utf8(text) else { break };
        let Some(comment) = text.trim_start().strip_prefix('#') else { break };
        let Some((name, value)) = comment.split_once('=') else { break };
        let (name, trimmed) = (name.trim().to_ascii_lowercase(), value.trim());
        if trimmed.is_empty() {
            break;
        }
        let offset = text.len() - value.trim_start().len();
        let at = Position { line: index + 1, column: text[..offset].chars().count() + 1 };
        let known = match name.as_str() {
            "syntax" => "syntax",
            "escape" => "escape",
            "check" => "check",
            _ => break,
        };
        if seen.contains(&name) {
            let problem = "it stands twice".to_owned();
            return Err(Fault::new(
                at,
                Reason::Directive { name: known, problem, expected: "each directive once" },
            ));
        }
        match known {
            "syntax" => directives.syntax = Some(Word { text: trimmed.to_owned(), at }),
            "escape" => directives.escape = escape(trimmed, at)?,
            _ => directives.check = check(trimmed, at)?,
        }
        seen.push(name);
    }
    Ok(directives)
}

fn escape(value: &str, at: Position) -> Result<char, Fault> {
    match value {
        "\\" => Ok('\\'),
        "`" => Ok('`'),
        other => {
            let problem = format!("{other:?} is no escape character");
            Err(Fault::new(at, Reason::Directive { name: "escape", problem, expected: "\\ or `" }))
        }
    }
}

/// `skip=RULE,RULE;error=true;experimental=RULE`, each part once.
fn check(value: &str, at: Position) -> Result<Check, Fault> {
    const EXPECTED: &str = "skip=RULE,...;error=true";
    let wrong =
        |problem: String| Fault::new(at, Reason::Directive { name: "check", problem, expected: EXPECTED });
    let mut check = Check::default();
    let mut seen = Vec::new();
    for part in value.split(';').map(str::trim).filter(|part| !part.is_empty()) {
        let Some((name, value)) = part.split_once('=') else {
            return Err(wrong(format!("{part:?} has no value")));
        };
        let (name, value) = (name.trim().to_ascii_lowercase(), value.trim());
        if seen.contains(&name) {
            return Err(wrong(format!("{name} stands twice")));
        }
        match name.as_str() {
            // Rules that are not known here are another version's.
            "skip" => check.skip = value.split(',').map(str::trim).collect(),
            "error" => {
                check.error = match value.to_ascii_lowercase().as_str() {
                    "true" | "t" | "1" => true,
                    "false" | "f" | "0" => false,
                    _ => return Err(wrong(format!("error={value} is neither true nor false"))),
                };
            }
            "experimental" => check.experimental = Some(value.to_owned()),
            _ => return Err(wrong(format!("{name:?} is unknown"))),
        }
        seen.push(name);
    }
    Ok(check)
}

impl<'a> FromIterator<&'a str> for RuleSet {
    fn from_iter<I: IntoIterator<Item = &'a str>>(names: I) -> Self {
        let mut rules = Self::default();
        for name in names {
            match name.eq_ignore_ascii_case("all") {
                true => rules.extend(Rule::ALL),
                false => rules.extend(Rule::named(name)),
            }
        }
        rules
    }
}
