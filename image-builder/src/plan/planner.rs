//! The steps of a stage: its instructions without variables.

use std::collections::BTreeMap;

use dockerfile::expand::{Variables, expand, expand_heredoc};
use dockerfile::{
    Add, AddSource, Chmod, CommandForm, Dockerfile, Fault, Files, Healthcheck, Instruction, MountKind, Pairs,
    Position, Reason, Run, RunCommand, Security, Source, Statement, Word,
};
use oci::Digest;
use serde_json::{Map, Value, json};

use super::{
    Action, BuildArgs, CopyAction, CopyFrom, CopySource, DEFAULT_PATH, MountSource, PROXY_ARGS, RunAction,
    RunMount, Scope, Script, StageArgs, StagePlan, Step, Unpack, WorkdirAction, copy_from, global_scope,
};
use crate::config::ImageConfig;
use crate::contexts::Contexts;

/// Where a `RUN <<EOF` with an interpreter line finds its script, as with BuildKit.
const SCRIPTS: &str = "/dev/pipes";
/// The most ports that one `EXPOSE` may name: all there are, for each protocol.
const MAX_PORTS: usize = 3 * 65_535;

/// The steps of a stage on top of a base image with that config. `inherited` are the arguments of the stage below.
pub fn steps(
    file: &Dockerfile,
    index: usize,
    args: &BuildArgs,
    contexts: &Contexts,
    base: &ImageConfig,
    inherited: &StageArgs,
) -> Result<StagePlan, dockerfile::Error> {
    let globals = global_scope(file, args)?;
    let mut planner = Planner {
        file,
        args,
        contexts,
        globals,
        scope: inherited.0.clone(),
        config: base.clone(),
        cmd_is_ours: false,
        escape: '\\',
    };
    let mut steps = Vec::new();
    // What the base image wants done first.
    for trigger in std::mem::take(&mut planner.config.on_build) {
        let at = file.stages[index].from.at;
        let step = planner.trigger(&trigger, at).map_err(|fault| {
            let line = trigger.lines().nth(fault.at.line - 1).unwrap_or_default().to_owned();
            fault.in_file("an ONBUILD instruction of the base image", line)
        })?;
        steps.push(step);
    }
    planner.escape = file.escape();
    for statement in &file.stages[index].statements {
        let action = planner.step(statement).map_err(|fault| file.fault(fault))?;
        steps.push(Step { at: statement.at, text: statement.text.clone(), action });
    }
    Ok(StagePlan { steps, config: planner.config, args: StageArgs(planner.scope) })
}

struct Planner<'a> {
    file: &'a Dockerfile,
    args: &'a BuildArgs,
    contexts: &'a Contexts,
    globals: Scope,
    scope: BTreeMap<String, String>,
    config: ImageConfig,
    cmd_is_ours: bool,
    escape: char,
}

/// Variables of a stage: `ENV` wins over `ARG`.
impl Variables for Planner<'_> {
    fn value(&self, name: &str) -> Option<&str> {
        self.config.env_value(name).or_else(|| self.scope.get(name).map(String::as_str))
    }
}

impl Planner<'_> {
    fn trigger(&mut self, text: &str, at: Position) -> Result<Step, Fault> {
        let statement = Dockerfile::parse_trigger(text)?;
        if let Instruction::Copy(copy) = &statement.instruction
            && let Some(from) = &copy.from
            && matches!(copy_from(self.file, from, self.contexts), Ok(CopyFrom::Stage(_)))
        {
            let advice = "name an image, or copy in the Dockerfile itself";
            return Err(not_supported(from.at, "COPY --from=STAGE in ONBUILD".to_owned(), advice));
        }
        let action = self.step(&statement)?;
        Ok(Step { at, text: format!("ONBUILD {}", statement.text), action })
    }

    fn step(&mut self, statement: &Statement) -> Result<Action, Fault> {
        match &statement.instruction {
            // The parser puts FROM nowhere else than at the head of a stage.
            Instruction::From => {}
            Instruction::Run(run) => return self.run(run, statement.at).map(Action::Run),
            Instruction::Copy(copy) => {
                let from = match &copy.from {
                    None => CopyFrom::Context,
                    // The stages were planned before, so this cannot fail any more with another reason.
                    Some(from) => copy_from(self.file, from, self.contexts)
                        .map_err(|error| Fault { at: error.at, reason: *error.reason })?,
                };
                let action = self.copy("COPY", from, &copy.files, None)?;
                return Ok(Action::Copy(CopyAction { parents: copy.parents, ..action }));
            }
            Instruction::Add(add) => {
                let action = self.copy("ADD", CopyFrom::Context, &add.files, Some(add))?;
                return Ok(Action::Copy(action));
            }
            Instruction::Workdir(word) => {
                let path = self.expand(word)?;
                if path.is_empty() {
                    return Err(wrong("WORKDIR", word.at, "the path expands to nothing", "WORKDIR PATH"));
                }
                self.config.workdir = self.absolute(&path);
                let (path, user) = (self.config.workdir.clone(), self.config.user.clone());
                return Ok(Action::Workdir(WorkdirAction { path, user }));
            }
            Instruction::Env(pairs) => {
                for (name, value) in self.pairs("ENV", pairs)? {
                    self.config.set_env(&name, value);
                }
            }
            Instruction::Label(pairs) => {
                let pairs = self.pairs("LABEL", pairs)?;
                self.config.labels.extend(pairs);
            }
            Instruction::Arg(declared) => {
                for declaration in declared {
                    let name = &declaration.name.text;
                    let value = match (self.args.0.get(name), &declaration.default) {
                        (Some(given), _) => Some(given.clone()),
                        (None, Some(default)) => Some(self.expand(default)?),
                        (None, None) => self.globals.0.get(name).cloned(),
                    };
                    if let Some(value) = value {
                        self.scope.insert(name.clone(), value);
                    }
                }
            }
            Instruction::User(user) => self.config.user = self.expand(user)?,
            Instruction::Cmd(command) => {
                self.config.cmd = Some(self.argv(command));
                self.cmd_is_ours = true;
            }
            Instruction::Entrypoint(command) => {
                self.config.entrypoint = Some(self.argv(command));
                // The base image's CMD was meant for another program.
                if !self.cmd_is_ours {
                    self.config.cmd = None;
                }
            }
            Instruction::Expose(words) => {
                let mut count = 0;
                for word in words {
                    for port in self.expand(word)?.split_whitespace() {
                        let ports = expose(port).ok_or_else(|| {
                            let expected = "PORT, PORT/udp or FIRST-LAST with ports of 1 to 65535";
                            wrong("EXPOSE", word.at, &format!("{port:?} is no port"), expected)
                        })?;
                        count += ports.len();
                        if count > MAX_PORTS {
                            let what = "EXPOSE";
                            return Err(Fault::new(
                                word.at,
                                Reason::TooMuch { what, got: count, limit: MAX_PORTS },
                            ));
                        }
                        self.config.exposed_ports.extend(ports);
                    }
                }
            }
            Instruction::Volume(words) => {
                for word in words {
                    let path = self.expand(word)?;
                    if path.is_empty() {
                        return Err(wrong("VOLUME", word.at, "a path expands to nothing", "VOLUME PATH ..."));
                    }
                    self.config.volumes.insert(self.absolute(&path));
                }
            }
            Instruction::Shell(shell) => self.config.shell = shell.clone(),
            Instruction::StopSignal(signal) => self.config.stop_signal = Some(self.expand(signal)?),
            Instruction::Healthcheck(check) => self.config.healthcheck = Some(healthcheck(check)),
            Instruction::OnBuild(trigger) => self.config.on_build.push(trigger.text.clone()),
            Instruction::Maintainer(author) => self.config.author = Some(author.text.clone()),
        }
        Ok(Action::Config)
    }

    /// All values are those before the instruction.
    fn pairs(&self, keyword: &'static str, pairs: &Pairs) -> Result<Vec<(String, String)>, Fault> {
        let mut expanded = Vec::new();
        for pair in &pairs.pairs {
            let name = self.expand(&pair.name)?;
            if name.is_empty() {
                return Err(wrong(keyword, pair.name.at, "a name expands to nothing", "NAME=VALUE ..."));
            }
            expanded.push((name, self.expand(&pair.value)?));
        }
        Ok(expanded)
    }

    fn run(&self, run: &Run, at: Position) -> Result<RunAction, Fault> {
        let mounts = self.mounts(run)?;
        if run.security == Security::Insecure {
            let advice = "leave it out; steps have Docker's default capabilities";
            return Err(not_supported(at, "RUN --security=insecure".to_owned(), advice));
        }
        if let Some(device) = run.devices.first() {
            let advice = "leave it out; steps have no devices of the host";
            return Err(not_supported(device.at, "RUN --device".to_owned(), advice));
        }
        let mut env: Vec<_> = self.scope.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
        env.retain(|(name, _)| self.config.env_value(name).is_none());
        env.extend(self.config.env.iter().cloned());
        if !env.iter().any(|(name, _)| name == "PATH") {
            env.push(("PATH".to_owned(), DEFAULT_PATH.to_owned()));
        }
        let known = |name: &str| env.iter().any(|(known, _)| known == name);
        let proxy_env = PROXY_ARGS
            .into_iter()
            .filter(|name| !known(name))
            .filter_map(|name| Some((name.to_owned(), self.args.0.get(name)?.clone())))
            .collect();
        let workdir = if self.config.workdir.is_empty() { "/" } else { &self.config.workdir };
        let (argv, script) = match &run.command {
            RunCommand::Command(command) => (self.argv(command), None),
            RunCommand::Script { name, contents } => {
                // A name only: it must not lead out of the folder of scripts.
                let file = if name.contains('/') || name == "." || name == ".." { "script" } else { name };
                let path = format!("{SCRIPTS}/{file}");
                (vec![path.clone()], Some(Script { path, contents: contents.clone() }))
            }
        };
        Ok(RunAction {
            argv,
            script,
            env,
            proxy_env,
            user: self.config.user.clone(),
            workdir: workdir.to_owned(),
            mounts,
            network: run.network,
        })
    }

    fn mounts(&self, run: &Run) -> Result<Vec<RunMount>, Fault> {
        let mut mounts = Vec::new();
        for flag in &run.mounts {
            let mount = flag.resolve(&mut |text| expand(text, self.escape, self))?;
            let (from, path) = match &mount.kind {
                MountKind::Bind { from, source } => (Some(from.as_ref()), source),
                // Without `from` a cache begins empty.
                MountKind::Cache { from, source, .. } => (from.as_ref().map(Some), source),
                MountKind::Tmpfs { .. } | MountKind::Secret { .. } => (None, &None),
                MountKind::Ssh { .. } => {
                    let advice = "use type=secret with a key of its own";
                    return Err(not_supported(flag.at, "RUN --mount=type=ssh".to_owned(), advice));
                }
            };
            let source = match from {
                None => None,
                Some(from) => {
                    let from = match from {
                        None => CopyFrom::Context,
                        Some(name) => {
                            copy_from(self.file, &Word { text: name.clone(), at: flag.at }, self.contexts)
                                .map_err(|error| Fault { at: error.at, reason: *error.reason })?
                        }
                    };
                    Some(MountSource { from, path: path.clone().unwrap_or_default() })
                }
            };
            mounts.push(RunMount { at: flag.at, mount, source });
        }
        Ok(mounts)
    }

    fn copy(
        &self,
        keyword: &'static str,
        from: CopyFrom,
        files: &Files,
        add: Option<&Add>,
    ) -> Result<CopyAction, Fault> {
        let checksum = add.and_then(|add| add.checksum.as_ref());
        let mut sources = Vec::new();
        for source in &files.sources {
            sources.push(match source {
                Source::Path(word) => {
                    let path = self.expand(word)?;
                    match if add.is_some() { AddSource::of(&path) } else { AddSource::Path } {
                        AddSource::Path => {}
                        AddSource::Url => {
                            let checksum = checksum.map(|word| self.checksum(word)).transpose()?;
                            sources.push(CopySource::Url { url: path, checksum });
                            continue;
                        }
                        AddSource::Git => {
                            let what = "ADD of a git repository".to_owned();
                            return Err(not_supported(word.at, what, "use RUN with git clone"));
                        }
                    }
                    CopySource::Path(path)
                }
                Source::Inline(body) => CopySource::Inline {
                    name: body.name.clone(),
                    contents: match body.expand {
                        true => expand_heredoc(&body.contents, self)
                            .map_err(|error| Fault::new(body.at, error))?,
                        false => body.contents.clone(),
                    },
                },
            });
        }
        if let Some(word) = checksum
            && !matches!(sources.as_slice(), [CopySource::Url { .. }])
        {
            let problem = "it is for one http or https source alone".to_owned();
            let (flag, expected) = ("checksum", "ADD --checksum=sha256:HEX URL DESTINATION");
            return Err(Fault::new(word.at, Reason::Flag { keyword, flag, problem, expected }));
        }
        let word = &files.destination;
        let destination = self.expand(word)?;
        let directory = destination.ends_with('/') || destination == "." || destination.ends_with("/.");
        let usage = match keyword {
            "ADD" => "ADD [--chown=USER:GROUP] [--chmod=MODE] SOURCE... DESTINATION",
            _ => "COPY [--chown=USER:GROUP] [--chmod=MODE] SOURCE... DESTINATION",
        };
        if destination.is_empty() {
            return Err(wrong(keyword, word.at, "the destination expands to nothing", usage));
        }
        if sources.len() > 1 && !directory {
            let problem =
                format!("with several sources the destination {destination:?} must end with a slash");
            return Err(wrong(keyword, word.at, &problem, usage));
        }
        let mut absolute = self.absolute(&destination);
        if directory && !absolute.ends_with('/') {
            absolute.push('/');
        }
        let chmod = files.chmod.as_ref().map(|word| {
            let mode = self.expand(word)?;
            Chmod::parse(&mode).ok_or_else(|| {
                let (problem, expected) =
                    (format!("{mode:?}"), "an octal mode as 755, or a symbolic one as u=rwX,go=rX");
                Fault::new(word.at, Reason::Flag { keyword, flag: "chmod", problem, expected })
            })
        });
        let exclude: Vec<_> = files.exclude.iter().map(|word| self.expand(word)).collect::<Result<_, _>>()?;
        for (word, pattern) in files.exclude.iter().zip(&exclude) {
            dockerfile::Ignore::of_patterns([pattern.as_str()]).map_err(|problem| {
                Fault::new(
                    word.at,
                    Reason::Flag { keyword, flag: "exclude", problem, expected: "a path or pattern" },
                )
            })?;
        }
        let chown = files.chown.as_ref().map(|owner| self.expand(owner)).transpose()?;
        Ok(CopyAction {
            from,
            sources,
            destination: absolute,
            chown,
            chmod: chmod.transpose()?,
            exclude,
            parents: false,
            link: files.link,
            unpack: match add {
                None => Unpack::Never,
                Some(Add { unpack: None, .. }) => Unpack::Local,
                Some(Add { unpack: Some(true), .. }) => Unpack::Always,
                Some(Add { unpack: Some(false), .. }) => Unpack::Never,
            },
        })
    }

    fn checksum(&self, word: &Word) -> Result<Digest, Fault> {
        let text = self.expand(word)?;
        let parsed = text.parse().ok().filter(|_| text.starts_with("sha256:"));
        parsed.ok_or_else(|| {
            let (keyword, flag, problem) = ("ADD", "checksum", format!("{text:?}"));
            let expected = "sha256: and 64 hexadecimal digits";
            Fault::new(word.at, Reason::Flag { keyword, flag, problem, expected })
        })
    }

    fn argv(&self, command: &CommandForm) -> Vec<String> {
        match command {
            CommandForm::Exec(words) => words.clone(),
            CommandForm::Shell(text) => {
                let mut argv = self.config.shell.clone();
                if argv.is_empty() {
                    argv = vec!["/bin/sh".to_owned(), "-c".to_owned()];
                }
                argv.push(text.clone());
                argv
            }
        }
    }

    fn expand(&self, word: &Word) -> Result<String, Fault> {
        expand(&word.text, self.escape, self).map_err(|error| Fault::new(word.at, error))
    }

    /// The path from `WORKDIR`, without `.`, `..` and doubled slashes.
    fn absolute(&self, path: &str) -> String {
        let joined =
            if path.starts_with('/') { path.to_owned() } else { format!("{}/{path}", self.config.workdir) };
        let mut components: Vec<&str> = Vec::new();
        for component in joined.split('/') {
            match component {
                "" | "." => {}
                ".." => {
                    components.pop();
                }
                name => components.push(name),
            }
        }
        format!("/{}", components.join("/"))
    }
}

/// `PORT[-PORT][/PROTOCOL]`; of `ADDRESS:PORT:PORT` only the last port means something.
fn expose(text: &str) -> Option<Vec<String>> {
    let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let ports = ports.rsplit(':').next().unwrap_or(ports);
    let protocol = protocol.to_ascii_lowercase();
    let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
    let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0);
    let (first, last) = (port(first)?, port(last)?);
    let known = ["tcp", "udp", "sctp"].contains(&protocol.as_str());
    (known && first <= last).then(|| (first..=last).map(|port| format!("{port}/{protocol}")).collect())
}

/// As Docker's config has it: times in nanoseconds, and nothing where the default is meant.
fn healthcheck(check: &Healthcheck) -> Value {
    let Healthcheck::Command { command, interval, timeout, start_period, start_interval, retries } = check
    else {
        return json!({"Test": ["NONE"]});
    };
    let test = match command {
        CommandForm::Exec(words) => [&["CMD".to_owned()], words.as_slice()].concat(),
        CommandForm::Shell(text) => vec!["CMD-SHELL".to_owned(), text.clone()],
    };
    let mut config = Map::from_iter([("Test".to_owned(), json!(test))]);
    for (name, time) in [
        ("Interval", interval),
        ("Timeout", timeout),
        ("StartPeriod", start_period),
        ("StartInterval", start_interval),
    ] {
        if let Some(time) = time {
            config.insert(name.to_owned(), json!(time.as_nanos() as u64));
        }
    }
    if let Some(retries) = retries.filter(|retries| *retries > 0) {
        config.insert("Retries".to_owned(), json!(retries));
    }
    Value::Object(config)
}

fn wrong(keyword: &'static str, at: Position, problem: &str, expected: &'static str) -> Fault {
    Fault::new(at, Reason::Arguments { keyword, problem: problem.to_owned(), expected })
}

fn not_supported(at: Position, what: String, advice: &str) -> Fault {
    Fault::new(at, Reason::NotSupported { what, advice: advice.to_owned() })
}
