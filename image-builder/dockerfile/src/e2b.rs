//! E2B's template steps as a second way to write a build: JSON to the same syntax tree.
//!
//! ```text
//! {"fromImage": "debian", "steps": [{"type": "RUN", "args": ["apt-get update"]}, ...], "startCmd": ..., "readyCmd": ...}
//! ```
//!
//! Texts of steps are literal: nothing in them is expanded, so they are escaped here. What a step does beyond its
//! instruction of the same name is written out: a `USER` that is not there is made, a `RUN` of another user switches to it
//! and back. Errors name the step as the line. `user` and `workdir` say who the steps begin as, and where; by default root and
//! where the base says.

use serde::Deserialize;

use crate::directive::{Check, Directives};
use crate::error::{Error, Fault, Reason};
use crate::instruction::{
    CommandForm, Copy, Declaration, Files, Instruction, Network, Pair, Pairs, Run, RunCommand, Security,
    Source,
};
use crate::lexer::MAX_DOCKERFILE;
use crate::position::{Position, Word};
use crate::suggest::did_you_mean;
use crate::{Dockerfile, Stage, Statement};

/// The most steps.
const MAX_STEPS: usize = 2000;
/// The longest hash of files: SHA-512 in hexadecimal.
const MAX_HASH: usize = 128;
/// The user that steps begin with, as with a Dockerfile.
const FIRST_USER: &str = "root";

/// A template's build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TemplateBuild {
    /// What it begins with.
    pub base: TemplateBase,
    /// The steps, as one stage.
    pub dockerfile: Dockerfile,
    /// Of each COPY or ADD its place among the stage's statements, the number of its step from 1, and the hash under which
    /// its files were sent.
    pub files: Vec<StepFiles>,
    /// The command that runs in each sandbox from the start.
    pub start_command: Option<String>,
    /// The command that succeeds when a sandbox is ready.
    pub ready_command: Option<String>,
}

/// What a template begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TemplateBase {
    /// An image.
    Image(String),
    /// Another template.
    Template(String),
}

/// The files of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepFiles {
    /// The statement that copies them.
    pub statement: usize,
    /// Its step, from 1.
    pub step: usize,
    /// Their hash, where the step has one.
    pub hash: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Request {
    from_image: Option<String>,
    from_template: Option<String>,
    /// Not of the clients: who the steps begin as, and where. Whoever serves the clients knows what the base has.
    user: Option<String>,
    workdir: Option<String>,
    #[serde(default)]
    steps: Vec<Step>,
    start_cmd: Option<String>,
    ready_cmd: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Step {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    args: Vec<String>,
    files_hash: Option<String>,
}

impl TemplateBuild {
    /// Reads the request; `file` is its name in errors.
    pub fn parse(file: &str, json: &[u8]) -> Result<Self, Error> {
        let start = Position { line: 1, column: 1 };
        let whole = |at: Position, reason: Reason| Fault::new(at, reason).in_file(file, String::new());
        if json.len() > MAX_DOCKERFILE {
            let (got, limit) = (json.len(), MAX_DOCKERFILE);
            return Err(whole(start, Reason::TooMuch { what: "the request", got, limit }));
        }
        let request: Request = serde_json::from_slice(json).map_err(|error| {
            let at = Position { line: error.line().max(1), column: error.column().max(1) };
            whole(at, wrong("template", error.to_string(), "JSON with fromImage or fromTemplate, and steps"))
        })?;
        if request.steps.len() > MAX_STEPS {
            let (got, limit) = (request.steps.len(), MAX_STEPS);
            return Err(whole(start, Reason::TooMuch { what: "the list of steps", got, limit }));
        }
        let filled = |text: Option<String>| text.filter(|text| !text.is_empty());
        let base = match (filled(request.from_image), filled(request.from_template)) {
            (Some(image), None) => TemplateBase::Image(image),
            (None, Some(template)) => TemplateBase::Template(template),
            (image, _) => {
                let problem = if image.is_some() { "both are given" } else { "neither is given" };
                return Err(whole(
                    start,
                    wrong("template", problem.to_owned(), "one of fromImage and fromTemplate"),
                ));
            }
        };
        let mut builder = Builder { statements: Vec::new(), files: Vec::new(), user: FIRST_USER.to_owned() };
        if let Some(user) = filled(request.user) {
            builder.set_user(start, &user);
            builder.user = user;
        }
        if let Some(path) = filled(request.workdir) {
            builder.push(start, format!("WORKDIR {path}"), Instruction::Workdir(literal(&path, start)));
        }
        let mut lines = Vec::new();
        for (step, number) in request.steps.iter().zip(1..) {
            lines.push(format!("{} {}", step.kind, step.args.join(" ")).replace(['\n', '\r'], " "));
            builder.step(step, number).map_err(|fault| fault.in_file(file, lines[number - 1].clone()))?;
        }
        let name = match &base {
            TemplateBase::Image(name) | TemplateBase::Template(name) => literal(name, start),
        };
        let from = statement(start, format!("FROM {}", name.text), Instruction::From);
        let stage = Stage { from, image: name, platform: None, name: None, statements: builder.statements };
        let directives = Directives { syntax: None, escape: '\\', check: Check::default() };
        let dockerfile = Dockerfile {
            file: file.to_owned(),
            directives,
            global_args: Vec::new(),
            stages: vec![stage],
            lines,
        };
        Ok(Self {
            base,
            dockerfile,
            files: builder.files,
            start_command: filled(request.start_cmd),
            ready_command: filled(request.ready_cmd),
        })
    }
}

struct Builder {
    statements: Vec<Statement>,
    files: Vec<StepFiles>,
    user: String,
}

impl Builder {
    fn step(&mut self, step: &Step, number: usize) -> Result<(), Fault> {
        const KINDS: [&str; 7] = ["COPY", "ADD", "RUN", "ENV", "ARG", "WORKDIR", "USER"];
        let at = Position { line: number, column: 1 };
        let upper = step.kind.to_ascii_uppercase();
        let args: Vec<&str> = step.args.iter().map(String::as_str).collect();
        let expected = match upper.as_str() {
            "COPY" | "ADD" => "[SOURCE, DESTINATION, USER[:GROUP] or \"\", MODE or \"\"]",
            "RUN" => "[COMMAND, USER]",
            "ENV" | "ARG" => "[NAME, VALUE, ...]",
            "WORKDIR" => "[PATH]",
            "USER" => "[NAME]",
            _ => {
                let advice = match did_you_mean(&upper, KINDS) {
                    advice if advice.is_empty() => format!("; the known ones are {}", KINDS.join(", ")),
                    advice => advice,
                };
                return Err(Fault::new(
                    at,
                    Reason::UnknownInstruction { keyword: step.kind.clone(), advice },
                ));
            }
        };
        let keyword = KINDS.into_iter().find(|kind| *kind == upper).unwrap_or("step");
        let fail = |problem: &str| Err(Fault::new(at, wrong(keyword, problem.to_owned(), expected)));
        match (upper.as_str(), args.as_slice()) {
            ("COPY" | "ADD", [source, destination, rest @ ..]) if rest.len() <= 2 => {
                let option = |index: usize| {
                    rest.get(index).filter(|text| !text.is_empty()).map(|text| literal(text, at))
                };
                if source.is_empty() || destination.is_empty() {
                    return fail("a path is empty");
                }
                let files = Files {
                    sources: vec![Source::Path(literal(source, at))],
                    destination: literal(destination, at),
                    chown: option(0),
                    chmod: option(1),
                    link: false,
                    exclude: Vec::new(),
                };
                let hash = step.files_hash.clone().filter(|hash| !hash.is_empty());
                let plain =
                    |hash: &String| hash.len() <= MAX_HASH && hash.bytes().all(|b| b.is_ascii_alphanumeric());
                if let Some(bad) = hash.as_ref().filter(|hash| !plain(hash)) {
                    return fail(&format!("filesHash {bad:?} is no hash"));
                }
                self.files.push(StepFiles {
                    statement: self.statements.len(),
                    step: number,
                    hash: hash.clone(),
                });
                let text = format!("COPY {source} {destination}");
                // Files that were sent are a context of their own, whose name is their hash.
                let from = hash.map(|text| Word { text, at });
                self.push(at, text, Instruction::Copy(Copy { files, from, parents: false }));
            }
            ("RUN", [command, rest @ ..]) if rest.len() <= 1 => {
                let user = rest.first().filter(|user| !user.is_empty() && **user != self.user);
                if let Some(user) = user {
                    self.set_user(at, user);
                }
                self.push(at, format!("RUN {command}"), bash(command));
                if user.is_some() {
                    let user = self.user.clone();
                    self.set_user(at, &user);
                }
            }
            ("ENV" | "ARG", pairs) if !pairs.is_empty() && pairs.len() % 2 == 0 => {
                if pairs.chunks_exact(2).any(|pair| pair[0].is_empty() || pair[0].contains(['=', '\0'])) {
                    return fail("a name is empty or holds =");
                }
                let text = format!("{keyword} {}", pairs.join(" "));
                let pairs = pairs.chunks_exact(2).map(|pair| (literal(pair[0], at), literal(pair[1], at)));
                let instruction = match keyword {
                    "ENV" => {
                        let pairs = pairs.map(|(name, value)| Pair { name, value }).collect();
                        Instruction::Env(Pairs { pairs, legacy: false })
                    }
                    _ => Instruction::Arg(
                        pairs.map(|(name, value)| Declaration { name, default: Some(value) }).collect(),
                    ),
                };
                self.push(at, text, instruction);
            }
            ("WORKDIR", [path]) if !path.is_empty() => {
                self.push(at, format!("WORKDIR {path}"), Instruction::Workdir(literal(path, at)));
            }
            ("USER", [name]) => {
                let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
                if name.is_empty() || name.starts_with('-') || !name.bytes().all(plain) {
                    return fail(&format!("{name:?} is no name of a user"));
                }
                if *name != FIRST_USER && !name.bytes().all(|byte| byte.is_ascii_digit()) {
                    self.set_user(at, FIRST_USER);
                    let make = format!("id -u {name} >/dev/null 2>&1 || useradd -m -s /bin/bash {name}");
                    self.push(at, format!("RUN {make}"), bash(&make));
                }
                self.user = (*name).to_owned();
                self.set_user(at, name);
            }
            _ => return fail(&format!("{} arguments", args.len())),
        }
        Ok(())
    }

    fn set_user(&mut self, at: Position, user: &str) {
        self.push(at, format!("USER {user}"), Instruction::User(literal(user, at)));
    }

    fn push(&mut self, at: Position, text: String, instruction: Instruction) {
        self.statements.push(statement(at, text, instruction));
    }
}

fn statement(at: Position, text: String, instruction: Instruction) -> Statement {
    let keyword = instruction.keyword().to_owned();
    Statement { at, keyword, text, blank: None, instruction }
}

/// As a sandbox runs its commands.
fn bash(command: &str) -> Instruction {
    let argv = ["/bin/bash", "-l", "-c", command].map(str::to_owned).to_vec();
    Instruction::Run(Run {
        mounts: Vec::new(),
        network: Network::Default,
        security: Security::Sandbox,
        devices: Vec::new(),
        command: RunCommand::Command(CommandForm::Exec(argv)),
    })
}

/// A word that expands to the text itself.
fn literal(text: &str, at: Position) -> Word {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        if "\\$'\"".contains(character) {
            escaped.push('\\');
        }
        escaped.push(character);
    }
    Word { text: escaped, at }
}

fn wrong(keyword: &'static str, problem: String, expected: &'static str) -> Reason {
    Reason::Arguments { keyword, problem, expected }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::expand::expand;

    fn error(json: &str) -> String {
        TemplateBuild::parse("template", json.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn steps_become_statements() {
        let json = r#"{"fromImage": "debian:bookworm", "force": true, "startCmd": "serve", "readyCmd": "", "steps": [
            {"type": "COPY", "args": ["src", "/app/", "user:user", "755"], "filesHash": "abc", "force": false},
            {"type": "run", "args": ["echo \"$HOME\"", "user"]},
            {"type": "ENV", "args": ["A", "$B 'c'", "D", ""]},
            {"type": "WORKDIR", "args": ["/app"]},
            {"type": "USER", "args": ["ada"]},
            {"type": "RUN", "args": ["make"]}]}"#;
        let build = TemplateBuild::parse("template", json.as_bytes()).unwrap();
        assert_eq!(build.base, TemplateBase::Image("debian:bookworm".into()));
        assert_eq!((build.start_command.as_deref(), build.ready_command), (Some("serve"), None));
        assert_eq!(build.files, [StepFiles { statement: 0, step: 1, hash: Some("abc".into()) }]);
        let texts: Vec<_> = build.dockerfile.stages[0].statements.iter().map(|s| s.text.as_str()).collect();
        insta::assert_snapshot!(texts.join("\n"));
        let Instruction::Env(env) = &build.dockerfile.stages[0].statements[4].instruction else { panic!() };
        let none = |_: &str| -> Option<&'static str> { None };
        assert_eq!(expand(&env.pairs[0].value.text, '\\', &none).as_deref(), Ok("$B 'c'"));
    }

    #[test]
    fn steps_begin_as_somebody_and_somewhere() {
        let json = r#"{"fromTemplate": "a", "user": "ada", "workdir": "/home/ada", "steps": [
            {"type": "COPY", "args": ["a", "b"], "filesHash": "abc"}, {"type": "RUN", "args": ["x", "root"]},
            {"type": "RUN", "args": ["y", "ada"]}]}"#;
        let build = TemplateBuild::parse("template", json.as_bytes()).unwrap();
        let texts: Vec<_> = build.dockerfile.stages[0].statements.iter().map(|s| s.text.as_str()).collect();
        let expected =
            ["USER ada", "WORKDIR /home/ada", "COPY a b", "USER root", "RUN x", "USER ada", "RUN y"];
        assert_eq!(texts, expected);
        assert_eq!(build.files, [StepFiles { statement: 2, step: 1, hash: Some("abc".into()) }]);
    }

    #[test]
    fn errors_name_the_step() {
        let steps = |steps: &str| error(&format!(r#"{{"fromImage": "a", "steps": [{steps}]}}"#));
        let said = [
            error("{"),
            error("{}"),
            error(r#"{"fromImage": "a", "fromTemplate": "b"}"#),
            steps(r#"{"type": "RUN", "args": ["a"]}, {"type": "CPOY", "args": []}"#),
            steps(r#"{"type": "COPY", "args": ["a"]}"#),
            steps(r#"{"type": "ENV", "args": ["a"]}"#),
            steps(r#"{"type": "USER", "args": ["a; reboot"]}"#),
            steps(r#"{"type": "RUN", "args": []}"#),
        ];
        insta::assert_snapshot!(said.join("\n"));
    }
}
