//! Warnings about Dockerfiles that build, by the names that BuildKit's build checks have.
//!
//! What can be known without the base images is checked: a variable that nothing declares is reported when it looks like a
//! misspelt one, or when the stage begins with `scratch`; else the image might set it.

use std::collections::{BTreeMap, BTreeSet};

use crate::expand::{Variables, expand, expand_noting};
use crate::instruction::{CommandForm, Files, Healthcheck, Instruction, RunCommand, Source};
use crate::pattern::is_pattern;
use crate::position::{Position, Word};
use crate::suggest::did_you_mean;
use crate::{Dockerfile, Ignore, Stage, Statement};

/// What every stage may declare with a bare `ARG`, and every `FROM` line sees.
pub const PLATFORM_ARGS: [&str; 8] = [
    "TARGETPLATFORM",
    "TARGETOS",
    "TARGETARCH",
    "TARGETVARIANT",
    "BUILDPLATFORM",
    "BUILDOS",
    "BUILDARCH",
    "BUILDVARIANT",
];

macro_rules! rules {
    ($($(#[$doc:meta])* $rule:ident,)*) => {
        /// A rule.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
        pub enum Rule { $($(#[$doc])* $rule,)* }

        impl Rule {
            /// All rules.
            pub const ALL: [Self; [$(stringify!($rule)),*].len()] = [$(Self::$rule),*];

            /// Its name, as `# check=skip=` has it.
            pub fn name(self) -> &'static str {
                match self { $(Self::$rule => stringify!($rule),)* }
            }
        }
    };
}

rules! {
    /// Names of stages are lowercase.
    StageNameCasing,
    /// `AS` has the case of `FROM`.
    FromAsCasing,
    /// No empty line between continuation lines.
    NoEmptyContinuation,
    /// All instructions are in capitals, or all in small letters.
    ConsistentInstructionCasing,
    /// Each name of a stage once.
    DuplicateStageName,
    /// No stage is called `scratch` or `context`.
    ReservedStageName,
    /// `CMD` and `ENTRYPOINT` as JSON, so that signals arrive.
    JSONArgsRecommended,
    /// `LABEL` in place of `MAINTAINER`.
    MaintainerDeprecated,
    /// `FROM` uses only `ARG`s from before it.
    UndefinedArgInFrom,
    /// The `ARG`s' defaults alone give `FROM` an image.
    InvalidDefaultArgInFrom,
    /// The first `WORKDIR` is absolute.
    WorkdirRelativePath,
    /// Variables are declared before they are used.
    UndefinedVar,
    /// `CMD`, `ENTRYPOINT` and `HEALTHCHECK` once in a stage: the last one counts.
    MultipleInstructionsDisallowed,
    /// `NAME=VALUE` in place of `NAME VALUE`.
    LegacyKeyValueFormat,
    /// `--platform=$TARGETPLATFORM` is the default.
    RedundantTargetPlatform,
    /// `--platform` is no constant.
    FromPlatformFlagConstDisallowed,
    /// Secrets do not belong in `ARG` and `ENV`, where the image keeps them.
    SecretsUsedInArgOrEnv,
    /// Protocols are lowercase.
    ExposeProtoCasing,
    /// `EXPOSE` names ports of the container only.
    ExposeInvalidFormat,
    /// What is copied is not left out by the ignore file.
    CopyIgnoredFile,
    /// What looks like a JSON list is one. This one is not BuildKit's.
    MalformedJsonArgs,
    /// An image that is called almost as a stage. This one is not BuildKit's.
    StageNameNearMiss,
}

impl Rule {
    /// The rule of that name; case does not count.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|rule| rule.name().eq_ignore_ascii_case(name))
    }
}

/// Some rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuleSet(BTreeSet<Rule>);

impl RuleSet {
    /// Whether the rule is one of them.
    pub fn contains(&self, rule: Rule) -> bool {
        self.0.contains(&rule)
    }

    pub(crate) fn extend(&mut self, rules: impl IntoIterator<Item = Rule>) {
        self.0.extend(rules);
    }
}

/// A warning, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// The rule.
    pub rule: Rule,
    /// Where.
    pub at: Position,
    /// What is wrong, and what to do.
    pub message: String,
}

/// All warnings about the file, in the order of their places. With the context's ignore file, also what it leaves out.
pub fn lint(file: &Dockerfile, ignore: Option<&Ignore>) -> Vec<Warning> {
    let skip = &file.directives.check.skip;
    let mut lint = Lint { file, ignore, warnings: Vec::new(), scopes: Vec::new(), workdirs: Vec::new() };
    lint.casing();
    lint.stage_lines();
    for stage in &file.stages {
        lint.stage(stage);
    }
    let mut warnings = lint.warnings;
    warnings.retain(|warning| !skip.contains(warning.rule));
    warnings.sort_by_key(|warning| (warning.at, warning.rule));
    warnings.dedup();
    warnings
}

struct Lint<'a> {
    file: &'a Dockerfile,
    ignore: Option<&'a Ignore>,
    warnings: Vec<Warning>,
    /// Of each stage so far, the variables at its end.
    scopes: Vec<Scope>,
    /// Of each stage so far, whether it has set a `WORKDIR`.
    workdirs: Vec<bool>,
}

/// The names that are known in a stage.
#[derive(Clone, Debug, Default)]
struct Scope {
    names: BTreeSet<String>,
    /// Whether nothing but the file can set a variable.
    complete: bool,
}

impl Variables for Scope {
    fn value(&self, name: &str) -> Option<&str> {
        self.names.contains(name).then_some("set")
    }
}

struct Defaults(BTreeMap<String, String>);

impl Variables for Defaults {
    fn value(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }
}

impl Lint<'_> {
    fn warn(&mut self, rule: Rule, at: Position, message: String) {
        self.warnings.push(Warning { rule, at, message });
    }

    fn casing(&mut self) {
        let file = self.file;
        let stages = file.stages.iter().flat_map(|stage| [&stage.from].into_iter().chain(&stage.statements));
        let statements: Vec<&Statement> = file.global_args.iter().chain(stages).collect();
        let is_lower = |statement: &&&Statement| !statement.keyword.chars().any(char::is_uppercase);
        let is_upper = |statement: &&&Statement| !statement.keyword.chars().any(char::is_lowercase);
        let lower = statements.iter().filter(is_lower).count();
        let upper = statements.iter().filter(is_upper).count();
        for statement in &statements {
            let (fits, expected) = match lower > upper {
                true => (is_lower(&statement), "lowercase"),
                false => (is_upper(&statement), "uppercase"),
            };
            if !fits {
                let message = format!("{} should be {expected}, as most instructions are", statement.keyword);
                self.warn(Rule::ConsistentInstructionCasing, statement.at, message);
            }
            if let Some(blank) = statement.blank {
                let message = format!("an empty line inside of {}", statement.instruction.keyword());
                self.warn(Rule::NoEmptyContinuation, blank, message);
            }
        }
    }

    fn stage_lines(&mut self) {
        let file = self.file;
        let mut scope = Scope { complete: true, ..Scope::default() };
        let mut defaults = Defaults(BTreeMap::new());
        for name in PLATFORM_ARGS {
            scope.names.insert(name.to_owned());
            defaults.0.insert(name.to_owned(), "linux/amd64".to_owned());
        }
        for statement in &file.global_args {
            let Instruction::Arg(declared) = &statement.instruction else { continue };
            self.secrets("ARG", declared.iter().map(|one| &one.name));
            for one in declared {
                if let Some(default) = &one.default {
                    self.undefined(&scope, [default], Rule::UndefinedVar);
                    if let Ok(value) = expand(&default.text, file.escape(), &defaults) {
                        defaults.0.insert(one.name.text.clone(), value);
                    }
                }
                scope.names.insert(one.name.text.clone());
            }
        }
        for (index, stage) in file.stages.iter().enumerate() {
            self.undefined(&scope, [&stage.image], Rule::UndefinedArgInFrom);
            if let Some(platform) = &stage.platform {
                self.undefined(&scope, [platform], Rule::UndefinedArgInFrom);
                self.platform(stage, platform);
            }
            let declared = expand_noting(&stage.image.text, file.escape(), &scope, &mut |_| {});
            let default = expand(&stage.image.text, file.escape(), &defaults).unwrap_or_default();
            let unusable = default.is_empty()
                || default.starts_with([':', '/', '@'])
                || default.ends_with([':', '@', '/']);
            if declared.is_ok() && unusable && stage.image.text.contains('$') {
                let message = format!(
                    "without --build-arg the image's name is {default:?}: give the ARG a default that works"
                );
                self.warn(Rule::InvalidDefaultArgInFrom, stage.image.at, message);
            }
            if let Some(name) = &stage.name {
                self.stage_name(index, stage, name);
            }
        }
    }

    fn platform(&mut self, stage: &Stage, platform: &Word) {
        let plain = platform.text.trim_matches('"');
        if plain == "$TARGETPLATFORM" || plain == "${TARGETPLATFORM}" {
            let message = "--platform=$TARGETPLATFORM is what FROM does anyway: leave it out".to_owned();
            self.warn(Rule::RedundantTargetPlatform, platform.at, message);
        }
        let named_after = |name: &crate::StageName| {
            plain.split('/').any(|part| name.name.contains(&part.to_ascii_lowercase()))
        };
        if !plain.contains('$') && !stage.name.as_ref().is_some_and(named_after) {
            let message =
                format!("--platform={plain} is a constant: the stage cannot be built for another one");
            self.warn(Rule::FromPlatformFlagConstDisallowed, platform.at, message);
        }
    }

    fn stage_name(&mut self, index: usize, stage: &Stage, name: &crate::StageName) {
        let at = name.written.at;
        if name.written.text != name.name {
            let message = format!("stage name {:?} should be lowercase", name.written.text);
            self.warn(Rule::StageNameCasing, at, message);
        }
        if name.name == "scratch" || name.name == "context" {
            self.warn(Rule::ReservedStageName, at, format!("stage name {:?} is reserved", name.name));
        }
        if self.file.stage_named(&name.name, index).is_some() {
            let message = format!("stage name {:?} is used before: the last one counts", name.name);
            self.warn(Rule::DuplicateStageName, at, message);
        }
        let from = &stage.from.keyword;
        let case = |text: &str| (text == text.to_lowercase(), text == text.to_uppercase());
        let (from_case, as_case) = (case(from), case(&name.keyword));
        if from_case != (false, false) && from_case != as_case {
            let message = format!("{:?} and {from:?} have different cases", name.keyword);
            self.warn(Rule::FromAsCasing, stage.from.at, message);
        }
    }

    fn stage(&mut self, stage: &Stage) {
        let index = self.scopes.len();
        let base = self.file.stage_named(&stage.image.text, index);
        let (mut scope, mut workdir) = match base {
            Some(base) => (self.scopes[base].clone(), self.workdirs[base]),
            None => {
                let names = BTreeSet::from(["PATH".to_owned()]);
                (Scope { names, complete: stage.image.text == "scratch" }, false)
            }
        };
        let mut shell = false;
        let mut once: BTreeMap<&'static str, Position> = BTreeMap::new();
        for statement in &stage.statements {
            let (at, instruction) = (statement.at, &statement.instruction);
            if !matches!(instruction, Instruction::Arg(_)) {
                self.undefined(&scope, expanded(instruction), Rule::UndefinedVar);
            }
            self.malformed_json(statement);
            match instruction {
                Instruction::Shell(_) => shell = true,
                Instruction::Maintainer(_) => {
                    let message =
                        "MAINTAINER is deprecated: use LABEL org.opencontainers.image.authors".to_owned();
                    self.warn(Rule::MaintainerDeprecated, at, message);
                }
                Instruction::Cmd(CommandForm::Shell(_)) | Instruction::Entrypoint(CommandForm::Shell(_))
                    if !shell =>
                {
                    let keyword = instruction.keyword();
                    let message = format!(
                        "{keyword} without JSON runs in a shell, which keeps signals from the program: \
                         write {keyword} [\"PROGRAM\", \"ARGUMENT\"]"
                    );
                    self.warn(Rule::JSONArgsRecommended, at, message);
                }
                Instruction::Workdir(path) => {
                    if !workdir && !path.text.starts_with(['/', '$', '"', '\'']) {
                        let message =
                            format!("WORKDIR {:?} depends on the base image: make it absolute", path.text);
                        self.warn(Rule::WorkdirRelativePath, at, message);
                    }
                    workdir = true;
                }
                Instruction::Expose(ports) => self.ports(ports),
                Instruction::Env(pairs) | Instruction::Label(pairs) if pairs.legacy => {
                    let keyword = instruction.keyword();
                    let name = &pairs.pairs[0].name.text;
                    let message =
                        format!("write {keyword} {name}=VALUE: the form with a blank is the old one");
                    self.warn(Rule::LegacyKeyValueFormat, at, message);
                }
                Instruction::Copy(copy) => match &copy.from {
                    None => self.ignored(&copy.files),
                    Some(from) => self.near_stage(from),
                },
                Instruction::Add(add) => self.ignored(&add.files),
                _ => {}
            }
            match instruction {
                Instruction::Cmd(_) | Instruction::Entrypoint(_) | Instruction::Healthcheck(_) => {
                    let keyword = instruction.keyword();
                    if let Some(earlier) = once.insert(keyword, at) {
                        let message =
                            format!("{keyword} stands again on line {}: only the last one counts", at.line);
                        self.warn(Rule::MultipleInstructionsDisallowed, earlier, message);
                    }
                }
                Instruction::Env(pairs) => {
                    self.secrets("ENV", pairs.pairs.iter().map(|pair| &pair.name));
                    scope.names.extend(pairs.pairs.iter().map(|pair| pair.name.text.clone()));
                }
                Instruction::Arg(declared) => {
                    self.secrets("ARG", declared.iter().map(|one| &one.name));
                    for one in declared {
                        self.undefined(&scope, one.default.as_ref(), Rule::UndefinedVar);
                        scope.names.insert(one.name.text.clone());
                    }
                }
                _ => {}
            }
        }
        self.scopes.push(scope);
        self.workdirs.push(workdir);
    }

    fn undefined<'w>(&mut self, scope: &Scope, words: impl IntoIterator<Item = &'w Word>, rule: Rule) {
        for word in words {
            let mut unset = Vec::new();
            // What cannot be expanded is the plan's error.
            let note = &mut |name: &str| unset.push(name.to_owned());
            let _ = expand_noting(&word.text, self.file.escape(), scope, note);
            for name in unset {
                let advice = did_you_mean(&name, scope.names.iter().map(String::as_str));
                if scope.complete || !advice.is_empty() {
                    self.warn(rule, word.at, format!("nothing declares the variable {name:?}{advice}"));
                }
            }
        }
    }

    fn secrets<'w>(&mut self, keyword: &str, names: impl Iterator<Item = &'w Word>) {
        const SECRET: [&str; 11] = [
            "apikey",
            "auth",
            "credential",
            "credentials",
            "key",
            "password",
            "pword",
            "passwd",
            "pwd",
            "secret",
            "token",
        ];
        for name in names {
            let lower = name.text.to_ascii_lowercase();
            let parts: Vec<&str> = lower.split('_').collect();
            if parts.iter().any(|part| SECRET.contains(part)) && !parts.contains(&"public") {
                let message =
                    format!("{keyword} {}: the image keeps it; use RUN --mount=type=secret", name.text);
                self.warn(Rule::SecretsUsedInArgOrEnv, name.at, message);
            }
        }
    }

    fn ports(&mut self, ports: &[Word]) {
        for port in ports {
            if let Some((_, protocol)) = port.text.split_once('/')
                && !protocol.contains('$')
                && protocol != protocol.to_lowercase()
            {
                let message = format!("the protocol of EXPOSE {} should be lowercase", port.text);
                self.warn(Rule::ExposeProtoCasing, port.at, message);
            }
            if port.text.contains(':') && !port.text.contains('$') {
                let message =
                    format!("EXPOSE {}: addresses and ports of the host mean nothing here", port.text);
                self.warn(Rule::ExposeInvalidFormat, port.at, message);
            }
        }
    }

    fn ignored(&mut self, files: &Files) {
        let Some(ignore) = self.ignore else { return };
        for source in &files.sources {
            let Source::Path(path) = source else { continue };
            if path.text.contains(['$', ':']) || is_pattern(path.text.as_bytes()) {
                continue;
            }
            let parts: Vec<&str> =
                path.text.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
            if !parts.is_empty() && ignore.excludes(parts.join("/").as_bytes()) {
                let message = format!("{:?} is left out of the context by the ignore file", path.text);
                self.warn(Rule::CopyIgnoredFile, path.at, message);
            }
        }
    }

    fn near_stage(&mut self, from: &Word) {
        let is_stage =
            self.file.stage_named(&from.text, usize::MAX).is_some() || from.text.parse::<usize>().is_ok();
        let advice = did_you_mean(&from.text, self.file.stage_names());
        if !is_stage && !advice.is_empty() {
            let message = format!("no stage is called {:?}, so it is taken as an image{advice}", from.text);
            self.warn(Rule::StageNameNearMiss, from.at, message);
        }
    }

    fn malformed_json(&mut self, statement: &Statement) {
        let text = match &statement.instruction {
            Instruction::Cmd(CommandForm::Shell(text))
            | Instruction::Entrypoint(CommandForm::Shell(text)) => text,
            Instruction::Run(run) => match &run.command {
                RunCommand::Command(CommandForm::Shell(text)) => text,
                _ => return,
            },
            Instruction::Healthcheck(Healthcheck::Command { command: CommandForm::Shell(text), .. }) => text,
            _ => return,
        };
        // `[ "$a" = b ]` is a test of the shell: it has a blank behind the bracket, and no list of strings.
        if text.starts_with("[\"") || text.starts_with("['") {
            let message = "it looks like a JSON list, but is none, so the shell runs it: JSON wants double quotes \
                           around each string, commas between them, and doubled backslashes";
            self.warn(Rule::MalformedJsonArgs, statement.at, message.to_owned());
        }
    }
}

/// The words of an instruction in which variables are expanded.
fn expanded(instruction: &Instruction) -> Vec<&Word> {
    fn files(files: &Files) -> Vec<&Word> {
        let paths = files.sources.iter().filter_map(|source| match source {
            Source::Path(path) => Some(path),
            Source::Inline(_) => None,
        });
        let rest = [Some(&files.destination), files.chown.as_ref(), files.chmod.as_ref()];
        paths.chain(rest.into_iter().flatten()).chain(&files.exclude).collect()
    }
    match instruction {
        Instruction::Copy(copy) => files(&copy.files),
        Instruction::Add(add) => files(&add.files).into_iter().chain(&add.checksum).collect(),
        Instruction::Env(pairs) | Instruction::Label(pairs) => {
            pairs.pairs.iter().flat_map(|pair| [&pair.name, &pair.value]).collect()
        }
        Instruction::Expose(words) | Instruction::Volume(words) => words.iter().collect(),
        Instruction::Workdir(word) | Instruction::User(word) | Instruction::StopSignal(word) => vec![word],
        _ => Vec::new(),
    }
}
