//! From a parsed Dockerfile to steps without variables.
//!
//! Pure functions: what a step does depends on the file, the build's arguments and the base image's config alone. The
//! stages come first ([`stages`]), because the config of a stage's base is known only when that was built or fetched;
//! then each stage's steps ([`steps`]).

use std::collections::{BTreeMap, BTreeSet};

use crate::config::ImageConfig;
use crate::dockerfile::expand::{Variables, expand, expand_heredoc};
use crate::dockerfile::{self, CommandForm, Dockerfile, Instruction, Reason, Source, Stage, Statement};
use oci::ImageReference;

/// `PATH` of a step whose image sets none, as Docker's.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Arguments that every stage has without `ARG`, and that are in no cache key and no image.
const PROXY_ARGS: [&str; 10] = [
    "HTTP_PROXY",
    "http_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "FTP_PROXY",
    "ftp_proxy",
    "NO_PROXY",
    "no_proxy",
    "ALL_PROXY",
    "all_proxy",
];
/// The widest `EXPOSE 8000-9000`.
const MAX_PORT_RANGE: u16 = 1000;

/// Values of `--build-arg`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BuildArgs(pub BTreeMap<String, String>);

/// What a stage begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Base {
    /// Nothing.
    Scratch,
    /// An earlier stage.
    Stage(usize),
    /// An image.
    Image(ImageReference),
}

/// A stage that the target needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedStage {
    /// Its place in the Dockerfile, from 0.
    pub index: usize,
    /// What it begins with.
    pub base: Base,
}

/// Everything that a stage does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StagePlan {
    /// The steps in order.
    pub steps: Vec<Step>,
    /// The config after the last step.
    pub config: ImageConfig,
}

/// One instruction, ready to be carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The line of its instruction.
    pub line: usize,
    /// The instruction as written.
    pub text: String,
    /// What it does to the file system.
    pub action: Action,
}

/// What a step does to the file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing; it changed the config.
    Config,
    /// Makes the directory where it is missing.
    Workdir(String),
    /// Runs a command.
    Run(RunAction),
    /// Copies files.
    Copy(CopyAction),
}

/// A command to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunAction {
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// Its environment: `ARG`s in scope, over them the image's.
    pub env: Vec<(String, String)>,
    /// Proxy settings, which are not part of the cache key.
    pub proxy_env: Vec<(String, String)>,
    /// `USER`; empty means root.
    pub user: String,
    /// `WORKDIR`, absolute.
    pub workdir: String,
}

/// Files to copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyAction {
    /// From where.
    pub from: CopyFrom,
    /// Paths and patterns in there, and files that stand in the Dockerfile.
    pub sources: Vec<CopySource>,
    /// Where to, absolute; a directory when it ends with a slash.
    pub destination: String,
    /// `--chown`.
    pub chown: Option<String>,
    /// `--chmod`.
    pub chmod: Option<u32>,
}

/// Where files are copied from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CopyFrom {
    /// The context folder.
    Context,
    /// An earlier stage.
    Stage(usize),
    /// An image.
    Image(ImageReference),
}

/// One source of a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CopySource {
    /// A path or pattern.
    Path(String),
    /// A file with these contents.
    Inline {
        /// The file's name.
        name: String,
        /// Its contents.
        contents: String,
    },
}

impl BuildArgs {
    /// The arguments that no `ARG` of the file declares: most likely misspelt.
    pub fn unused(&self, file: &Dockerfile) -> Vec<String> {
        let statements = file.stages.iter().flat_map(|stage| &stage.statements).chain(&file.global_args);
        let mut declared: BTreeSet<&str> = PROXY_ARGS.into();
        for statement in statements {
            if let Instruction::Arg(args) = &statement.instruction {
                declared.extend(args.iter().map(|(name, _)| name.as_str()));
            }
        }
        self.0.keys().filter(|name| !declared.contains(name.as_str())).cloned().collect()
    }
}

/// The stages that `target` (default: the last one) needs, in the order in which they can be built.
pub fn stages(
    file: &Dockerfile,
    args: &BuildArgs,
    target: Option<&str>,
) -> Result<Vec<PlannedStage>, dockerfile::Error> {
    let last = file.stages.len() - 1;
    let target = match target {
        None => last,
        Some(name) => find_stage(&file.stages, name, file.stages.len()).ok_or_else(|| {
            let from = &file.stages[last].from;
            file.error(
                from,
                stage_name(name, "no stage has this name or number (it was asked for with --target)"),
            )
        })?,
    };
    let globals = global_scope(file, args)?;
    let mut needed = BTreeSet::from([target]);
    let mut planned = Vec::new();
    for index in (0..=target).rev() {
        if !needed.contains(&index) {
            continue;
        }
        let stage = &file.stages[index];
        let base = base(file, index, &globals)?;
        if let Base::Stage(earlier) = base {
            needed.insert(earlier);
        }
        for statement in &stage.statements {
            if let Instruction::Copy(copy) = &statement.instruction
                && let Some(from) = &copy.from
                && let CopyFrom::Stage(earlier) = copy_from(file, index, statement, from)?
            {
                needed.insert(earlier);
            }
        }
        planned.push(PlannedStage { index, base });
    }
    planned.reverse();
    Ok(planned)
}

/// The steps of a stage on top of a base image with that config.
pub fn steps(
    file: &Dockerfile,
    index: usize,
    args: &BuildArgs,
    base: &ImageConfig,
) -> Result<StagePlan, dockerfile::Error> {
    let globals = global_scope(file, args)?;
    let mut planner = Planner {
        file,
        index,
        args,
        globals,
        scope: BTreeMap::new(),
        config: base.clone(),
        cmd_is_ours: false,
    };
    let mut steps = Vec::new();
    for statement in &file.stages[index].statements {
        let action = planner.step(statement).map_err(|reason| file.error(statement, reason))?;
        steps.push(Step { line: statement.line, text: statement.text.clone(), action });
    }
    Ok(StagePlan { steps, config: planner.config })
}

fn base(file: &Dockerfile, index: usize, globals: &Scope) -> Result<Base, dockerfile::Error> {
    let stage = &file.stages[index];
    let fail = |reason: Reason| file.error(&stage.from, reason);
    let expand = |text: &str| expand(text, file.escape, globals).map_err(|error| fail(error.into()));
    if let Some(platform) = &stage.platform {
        let platform = expand(platform)?;
        let host = host_platform_text();
        // arm64 is also written with its variant.
        if platform != host && platform != format!("{host}/v8") && !platform.is_empty() {
            return Err(fail(Reason::NotSupported {
                what: format!("--platform={platform}"),
                advice: format!("images are built for this machine's {host}"),
            }));
        }
    }
    let image = expand(&stage.image)?;
    if image.is_empty() {
        return Err(fail(Reason::Arguments {
            keyword: "FROM",
            problem: format!("{:?} expands to nothing", stage.image),
            expected: "an image; give the ARG a default, or --build-arg",
        }));
    }
    if image == "scratch" {
        return Ok(Base::Scratch);
    }
    // A number is no name of a stage here: `FROM 0` would be an image.
    let earlier = file.stages[..index]
        .iter()
        .position(|stage| stage.name.as_deref().is_some_and(|name| name.eq_ignore_ascii_case(&image)));
    match earlier {
        Some(earlier) => Ok(Base::Stage(earlier)),
        None => image.parse().map(Base::Image).map_err(|error: oci::InvalidReference| fail(error.into())),
    }
}

fn copy_from(
    file: &Dockerfile,
    index: usize,
    statement: &Statement,
    from: &str,
) -> Result<CopyFrom, dockerfile::Error> {
    if let Some(earlier) = find_stage(&file.stages, from, index) {
        return Ok(CopyFrom::Stage(earlier));
    }
    let later = find_stage(&file.stages, from, file.stages.len()).is_some();
    if later || from.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(file.error(statement, stage_name(from, "--from names no earlier stage")));
    }
    from.parse()
        .map(CopyFrom::Image)
        .map_err(|error: oci::InvalidReference| file.error(statement, error.into()))
}

fn find_stage(stages: &[Stage], name: &str, before: usize) -> Option<usize> {
    let named = stages[..before]
        .iter()
        .position(|stage| stage.name.as_deref().is_some_and(|known| known.eq_ignore_ascii_case(name)));
    named.or_else(|| name.parse().ok().filter(|number| *number < before))
}

fn stage_name(name: &str, problem: &'static str) -> Reason {
    Reason::StageName { name: name.to_owned(), problem }
}

fn host_platform_text() -> String {
    let platform = oci::host_platform();
    format!("{}/{}", platform.os(), platform.architecture())
}

#[derive(Clone, Debug, Default)]
struct Scope(BTreeMap<String, String>);

impl Variables for Scope {
    fn value(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }
}

/// What `FROM` lines see: the platform, and the `ARG`s before the first `FROM`.
fn global_scope(file: &Dockerfile, args: &BuildArgs) -> Result<Scope, dockerfile::Error> {
    let platform = oci::host_platform();
    let (os, architecture) = (platform.os().to_string(), platform.architecture().to_string());
    let mut scope = Scope::default();
    for prefix in ["TARGET", "BUILD"] {
        scope.0.insert(format!("{prefix}PLATFORM"), format!("{os}/{architecture}"));
        scope.0.insert(format!("{prefix}OS"), os.clone());
        scope.0.insert(format!("{prefix}ARCH"), architecture.clone());
        scope.0.insert(format!("{prefix}VARIANT"), String::new());
    }
    for statement in &file.global_args {
        let Instruction::Arg(declared) = &statement.instruction else { continue };
        for (name, default) in declared {
            let value = match (args.0.get(name), default) {
                (Some(given), _) => Some(given.clone()),
                (None, Some(default)) => Some(
                    expand(default, file.escape, &scope)
                        .map_err(|error| file.error(statement, error.into()))?,
                ),
                (None, None) => None,
            };
            if let Some(value) = value {
                scope.0.insert(name.clone(), value);
            }
        }
    }
    Ok(scope)
}

struct Planner<'a> {
    file: &'a Dockerfile,
    index: usize,
    args: &'a BuildArgs,
    globals: Scope,
    scope: BTreeMap<String, String>,
    config: ImageConfig,
    cmd_is_ours: bool,
}

/// Variables of a stage: `ENV` wins over `ARG`.
impl Variables for Planner<'_> {
    fn value(&self, name: &str) -> Option<&str> {
        self.config.env_value(name).or_else(|| self.scope.get(name).map(String::as_str))
    }
}

impl Planner<'_> {
    fn step(&mut self, statement: &Statement) -> Result<Action, Reason> {
        match &statement.instruction {
            // The parser puts FROM nowhere else than at the head of a stage.
            Instruction::From => {}
            Instruction::Run(run) => return Ok(Action::Run(self.run(&run.command))),
            Instruction::Copy(copy) => return self.copy(statement, copy).map(Action::Copy),
            Instruction::Workdir(path) => {
                let path = self.expand(path)?;
                if path.is_empty() {
                    return Err(Reason::Arguments {
                        keyword: "WORKDIR",
                        problem: "the path expands to nothing".to_owned(),
                        expected: "WORKDIR PATH",
                    });
                }
                self.config.workdir = self.absolute(&path);
                return Ok(Action::Workdir(self.config.workdir.clone()));
            }
            Instruction::Env(pairs) => {
                // All values are those before the instruction.
                let pairs = pairs
                    .iter()
                    .map(|pair| Ok((pair.name.clone(), self.expand(&pair.value)?)))
                    .collect::<Result<Vec<_>, Reason>>()?;
                for (name, value) in pairs {
                    self.config.set_env(&name, value);
                }
            }
            Instruction::Label(pairs) => {
                for pair in pairs {
                    let (name, value) = (self.expand(&pair.name)?, self.expand(&pair.value)?);
                    self.config.labels.insert(name, value);
                }
            }
            Instruction::Arg(declared) => {
                for (name, default) in declared {
                    let default = default.as_ref().map(|default| self.expand(default)).transpose()?;
                    let given = self.args.0.get(name).cloned();
                    if let Some(value) = given.or(default).or_else(|| self.globals.0.get(name).cloned()) {
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
            Instruction::Expose(ports) => {
                for port in ports {
                    let port = self.expand(port)?;
                    self.config.exposed_ports.extend(expose(&port)?);
                }
            }
            Instruction::Volume(paths) => {
                for path in paths {
                    let path = self.expand(path)?;
                    self.config.volumes.insert(self.absolute(&path));
                }
            }
            Instruction::Shell(shell) => self.config.shell = shell.clone(),
            Instruction::StopSignal(signal) => self.config.stop_signal = Some(self.expand(signal)?),
            Instruction::Maintainer(author) => self.config.author = Some(author.clone()),
        }
        Ok(Action::Config)
    }

    fn run(&self, command: &CommandForm) -> RunAction {
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
        RunAction {
            argv: self.argv(command),
            env,
            proxy_env,
            user: self.config.user.clone(),
            workdir: workdir.to_owned(),
        }
    }

    fn copy(&self, statement: &Statement, copy: &dockerfile::Copy) -> Result<CopyAction, Reason> {
        let from = match &copy.from {
            None => CopyFrom::Context,
            // The stages were planned before, so this cannot fail any more with another reason.
            Some(from) => copy_from(self.file, self.index, statement, from).map_err(|error| *error.reason)?,
        };
        let mut sources = Vec::new();
        for source in &copy.sources {
            sources.push(match source {
                Source::Path(path) => CopySource::Path(self.expand(path)?),
                Source::Inline(body) => CopySource::Inline {
                    name: body.name.clone(),
                    contents: match body.expand {
                        true => expand_heredoc(&body.contents, self.file.escape, self)?,
                        false => body.contents.clone(),
                    },
                },
            });
        }
        let destination = self.expand(&copy.destination)?;
        let directory = destination.ends_with('/') || destination == "." || destination.ends_with("/.");
        let wrong = |problem: String| Reason::Arguments {
            keyword: "COPY",
            problem,
            expected: "COPY [--chown=USER:GROUP] [--chmod=OCTAL] SOURCE... DESTINATION",
        };
        if destination.is_empty() {
            return Err(wrong("the destination expands to nothing".to_owned()));
        }
        if sources.len() > 1 && !directory {
            return Err(wrong(format!(
                "with several sources the destination {destination:?} must end with a slash"
            )));
        }
        let mut absolute = self.absolute(&destination);
        if directory && !absolute.ends_with('/') {
            absolute.push('/');
        }
        let chmod = copy.chmod.as_ref().map(|mode| self.expand(mode)).transpose()?;
        let chmod = chmod
            .map(|mode| match u32::from_str_radix(&mode, 8) {
                Ok(bits) if bits <= 0o7777 => Ok(bits),
                _ => Err(wrong(format!("--chmod={mode} is no octal mode, as 755"))),
            })
            .transpose()?;
        let chown = copy.chown.as_ref().map(|owner| self.expand(owner)).transpose()?;
        Ok(CopyAction { from, sources, destination: absolute, chown, chmod })
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

    fn expand(&self, text: &str) -> Result<String, Reason> {
        Ok(expand(text, self.file.escape, self)?)
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

/// `PORT[-PORT][/PROTOCOL]`.
fn expose(text: &str) -> Result<Vec<String>, Reason> {
    let wrong = || Reason::Arguments {
        keyword: "EXPOSE",
        problem: format!("{text:?} is no port"),
        expected: "PORT, PORT/udp or FIRST-LAST with ports of 1 to 65535",
    };
    let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = protocol.to_ascii_lowercase();
    let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
    let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0).ok_or_else(wrong);
    let (first, last) = (port(first)?, port(last)?);
    if last < first || last - first > MAX_PORT_RANGE || !["tcp", "udp", "sctp"].contains(&protocol.as_str()) {
        return Err(wrong());
    }
    Ok((first..=last).map(|port| format!("{port}/{protocol}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Dockerfile {
        Dockerfile::parse("Dockerfile", text.as_bytes()).unwrap()
    }

    fn args(pairs: &[(&str, &str)]) -> BuildArgs {
        BuildArgs(pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
    }

    fn plan(text: &str, given: &[(&str, &str)]) -> StagePlan {
        let mut base = ImageConfig::default();
        base.set_env("PATH", "/bin".into());
        base.cmd = Some(vec!["base".into()]);
        steps(&parse(text), 0, &args(given), &base).unwrap()
    }

    fn failure(text: &str, given: &[(&str, &str)]) -> String {
        let file = parse(text);
        match stages(&file, &args(given), None) {
            Err(error) => error.to_string(),
            Ok(_) => steps(&file, 0, &args(given), &ImageConfig::default()).unwrap_err().to_string(),
        }
    }

    #[test]
    fn only_the_needed_stages_are_planned() {
        let file = parse(
            "ARG base=debian\nFROM $base AS one\nFROM scratch AS unused\nFROM one AS two\nFROM alpine\nCOPY --from=TWO a b\n",
        );
        let all = stages(&file, &BuildArgs::default(), None).unwrap();
        assert_eq!(all.iter().map(|stage| stage.index).collect::<Vec<_>>(), [0, 2, 3]);
        assert_eq!(all[0].base, Base::Image("debian".parse().unwrap()));
        assert_eq!(all[1].base, Base::Stage(0));
        let one = stages(&file, &args(&[("base", "x:1")]), Some("one")).unwrap();
        assert_eq!(one.len(), 1);
        assert_eq!(one[0].base, Base::Image("x:1".parse().unwrap()));
        assert_eq!(stages(&file, &BuildArgs::default(), Some("1")).unwrap()[0].base, Base::Scratch);
    }

    #[test]
    fn variables_come_from_args_and_env() {
        let planned = plan(
            "FROM a\nARG v=1\nARG w\nENV x=$v y=${x:-none} PATH=/usr/games:$PATH\nWORKDIR /a/../$v\nWORKDIR b\nRUN cmd $v\n",
            &[("w", "given")],
        );
        let config = &planned.config;
        assert_eq!(config.env_value("x"), Some("1"));
        assert_eq!(config.env_value("y"), Some("none"), "values are those before the instruction");
        assert_eq!(config.env_value("PATH"), Some("/usr/games:/bin"));
        assert_eq!(config.workdir, "/1/b");
        let Action::Run(run) = &planned.steps[5].action else { panic!("{:?}", planned.steps) };
        assert_eq!(run.argv, ["/bin/sh", "-c", "cmd $v"], "the shell expands, not the plan");
        assert_eq!(run.workdir, "/1/b");
        let env: Vec<_> = run.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
        assert_eq!(env, ["v=1", "w=given", "PATH=/usr/games:/bin", "x=1", "y=none"]);
    }

    #[test]
    fn env_wins_over_arg_and_globals_need_redeclaration() {
        let planned =
            plan("ARG g=global\nFROM a\nARG g\nARG x=arg\nENV x=env\nLABEL g=$g x=$x n=$TARGETOS\n", &[]);
        assert_eq!(planned.config.labels["g"], "global");
        assert_eq!(planned.config.labels["x"], "env");
        assert_eq!(planned.config.labels["n"], "");
        let planned = plan("ARG g=global\nFROM a\nARG TARGETOS\nLABEL g=$g n=$TARGETOS\n", &[]);
        assert_eq!(planned.config.labels["g"], "");
        assert_eq!(planned.config.labels["n"], "linux");
    }

    #[test]
    fn entrypoint_drops_the_cmd_of_the_base_only() {
        assert_eq!(plan("FROM a\nENTRYPOINT [\"e\"]\n", &[]).config.cmd, None);
        let ours = plan("FROM a\nCMD [\"c\"]\nENTRYPOINT e\n", &[]).config;
        assert_eq!(ours.cmd, Some(vec!["c".into()]));
        assert_eq!(ours.entrypoint, Some(vec!["/bin/sh".into(), "-c".into(), "e".into()]));
        let shell = plan("FROM a\nSHELL [\"/bin/bash\", \"-ec\"]\nCMD x\n", &[]).config;
        assert_eq!(shell.cmd, Some(vec!["/bin/bash".into(), "-ec".into(), "x".into()]));
    }

    #[test]
    fn copies_are_resolved() {
        let planned = plan(
            "FROM a\nWORKDIR /w\nARG f=x.txt\nCOPY --chmod=0640 --chown=u:g $f .\nCOPY a b d/\nCOPY <<x /y\n$f\nx\n",
            &[],
        );
        let copies: Vec<_> = planned
            .steps
            .iter()
            .filter_map(|step| if let Action::Copy(copy) = &step.action { Some(copy) } else { None })
            .collect();
        assert_eq!(copies[0].destination, "/w/");
        assert_eq!(copies[0].sources, [CopySource::Path("x.txt".into())]);
        assert_eq!((copies[0].chmod, copies[0].chown.as_deref()), (Some(0o640), Some("u:g")));
        assert_eq!(copies[1].destination, "/w/d/");
        assert_eq!(copies[2].sources, [CopySource::Inline { name: "x".into(), contents: "x.txt\n".into() }]);
    }

    #[test]
    fn proxies_stay_out_of_the_environment_that_is_kept() {
        let planned = plan("FROM a\nRUN x\n", &[("http_proxy", "http://p")]);
        let Action::Run(run) = &planned.steps[0].action else { panic!() };
        assert_eq!(run.proxy_env, [("http_proxy".to_owned(), "http://p".to_owned())]);
        assert!(run.env.iter().all(|(name, _)| name != "http_proxy"));
        let unused = args(&[("http_proxy", ""), ("TYPO", "1")]).unused(&parse("FROM a\nARG typo\n"));
        assert_eq!(unused, ["TYPO"]);
    }

    #[test]
    fn errors_name_the_line() {
        let cases = [
            "FROM $nothing",
            "FROM Debian",
            "FROM --platform=linux/s390x a",
            "FROM a\nCOPY --from=1 a b",
            "FROM a\nCOPY --from=later a b\nFROM b AS later\nCOPY --from=0 a b",
            "FROM a\nCOPY a b /c",
            "FROM a\nCOPY --chmod=u+x a b",
            "FROM a\nEXPOSE 0",
            "FROM a\nEXPOSE 80/icmp",
            "FROM a\nEXPOSE 1-65535",
            "FROM a\nENV a=${b",
            "FROM a\nLABEL a=${b:?required}",
            "FROM a\nWORKDIR $b",
        ];
        insta::assert_snapshot!(cases.map(|text| failure(text, &[])).join("\n"));
    }
}
