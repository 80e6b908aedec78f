//! From a parsed Dockerfile to steps without variables.
//!
//! Pure functions: what a step does depends on the file, the build's arguments and the base image's config alone. The
//! stages come first ([`stages`]), because the config of a stage's base is known only when that was built or fetched;
//! then each stage's steps ([`steps`]).

use std::collections::{BTreeMap, BTreeSet};

use dockerfile::expand::{Variables, expand};
use dockerfile::lint::PLATFORM_ARGS;
use dockerfile::{
    Chmod, Dockerfile, Fault, Instruction, Mount, Network, Position, Reason, Word, did_you_mean, nearest,
};
use oci::{Digest, ImageReference, Platform};

use crate::config::ImageConfig;
use crate::contexts::{Contexts, NamedContext};

mod planner;
#[cfg(test)]
mod tests;

pub use planner::steps;

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
    /// A context of this name, as `--build-context` gives it.
    Named(String),
}

/// A stage that the target needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedStage {
    /// Its place in the Dockerfile, from 0.
    pub index: usize,
    /// What it begins with.
    pub base: Base,
    /// `--platform`, where it is another one than this machine's.
    pub platform: Option<Platform>,
}

/// Everything that a stage does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StagePlan {
    /// The steps in order.
    pub steps: Vec<Step>,
    /// The config after the last step.
    pub config: ImageConfig,
    /// The values of its arguments, which the stages on top of it inherit.
    pub args: StageArgs,
}

/// The values of a stage's arguments.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StageArgs(BTreeMap<String, String>);

/// One instruction, ready to be carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Where its instruction stands.
    pub at: Position,
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
    Workdir(WorkdirAction),
    /// Runs a command.
    Run(RunAction),
    /// Copies files.
    Copy(CopyAction),
    /// Adds the user of E2B's sandboxes.
    E2bUser,
}

/// A directory to make where it is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkdirAction {
    /// Absolute.
    pub path: String,
    /// `USER`, whose it will be; empty means root.
    pub user: String,
}

/// A command to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunAction {
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// Its environment: `ARG`s in scope, over them the image's.
    pub env: Vec<(String, String)>,
    /// An executable file that is there for this step alone.
    pub script: Option<Script>,
    /// Proxy settings, which are not part of the cache key.
    pub proxy_env: Vec<(String, String)>,
    /// `USER`; empty means root.
    pub user: String,
    /// `WORKDIR`, absolute.
    pub workdir: String,
    /// `--mount`, in order.
    pub mounts: Vec<RunMount>,
    /// `--network`.
    pub network: Network,
}

/// A mount of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunMount {
    /// Where its flag stands.
    pub at: Position,
    /// What it is.
    pub mount: Mount,
    /// What it shows, or begins with: files of the context, a stage or an image.
    pub source: Option<MountSource>,
}

/// The files that a mount shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountSource {
    /// From where.
    pub from: CopyFrom,
    /// The path in it; its root when empty.
    pub path: String,
}

/// An executable file of a step.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Script {
    /// Where the step sees it.
    pub path: String,
    /// What is in it.
    pub contents: String,
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
    pub chmod: Option<Chmod>,
    /// `--exclude`: patterns of what is left out, seen from each source.
    pub exclude: Vec<String>,
    /// `--parents`: the sources' folders are kept.
    pub parents: bool,
    /// `--link`: the layer does not depend on what is below it.
    pub link: bool,
    /// Which archives are unpacked.
    pub unpack: Unpack,
}

/// Which archives a copy unpacks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub enum Unpack {
    /// None: `COPY`, and `ADD --unpack=false`.
    #[default]
    Never,
    /// Those of the context: `ADD`.
    Local,
    /// Also those that are fetched: `ADD --unpack`.
    Always,
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
    /// A context of this name, as `--build-context` gives it.
    Named(String),
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
    /// A file that is fetched.
    Url {
        /// Where it is, by http or https.
        url: String,
        /// `--checksum`.
        checksum: Option<Digest>,
    },
}

impl CopyAction {
    /// The files at a path of the context, at the same path.
    pub(crate) fn whole(path: &str) -> Self {
        let path = path.trim_matches('/');
        Self {
            from: CopyFrom::Context,
            sources: vec![CopySource::Path(if path.is_empty() { ".".to_owned() } else { path.to_owned() })],
            destination: "/".to_owned(),
            chown: None,
            chmod: None,
            exclude: Vec::new(),
            parents: !path.is_empty(),
            link: false,
            unpack: Unpack::Never,
        }
    }
}

impl CopyAction {
    /// An archive of a context, unpacked.
    pub(crate) fn unpacked(name: &str) -> Self {
        let sources = vec![CopySource::Path(name.to_owned())];
        Self { sources, parents: false, unpack: Unpack::Local, ..Self::whole("") }
    }

    /// Whether its layer does not depend on what is below: it is linked, and needs no names of owners from there.
    pub(crate) fn is_independent(&self) -> bool {
        let number = |text: &str| text.is_empty() || text.parse::<u32>().is_ok();
        self.link && self.chown.as_ref().is_none_or(|owner| owner.split(':').all(number))
    }
}

impl StageArgs {
    /// The names of the arguments that have a value.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

impl BuildArgs {
    /// The arguments that no `ARG` of the file declares: most likely misspelt.
    pub fn unused(&self, file: &Dockerfile) -> Vec<String> {
        let statements = file.stages.iter().flat_map(|stage| &stage.statements).chain(&file.global_args);
        let mut declared: BTreeSet<&str> = PROXY_ARGS.into();
        declared.insert(crate::clock::EPOCH);
        for statement in statements {
            if let Instruction::Arg(args) = &statement.instruction {
                declared.extend(args.iter().map(|declaration| declaration.name.text.as_str()));
            }
        }
        self.0.keys().filter(|name| !declared.contains(name.as_str())).cloned().collect()
    }
}

/// The stages that `target` (default: the last one) needs, in an order in which they can be built; `target` is the last.
pub fn stages(
    file: &Dockerfile,
    args: &BuildArgs,
    contexts: &Contexts,
    target: Option<&str>,
) -> Result<Vec<PlannedStage>, dockerfile::Error> {
    let last = file.stages.len() - 1;
    let target = match target {
        None => last,
        Some(name) => find_stage(file, name).ok_or_else(|| {
            let problem = "no stage has this name or number (it was asked for with --target)";
            file.error(&file.stages[last].from, stage_name(file, name, problem))
        })?,
    };
    let mut order = Order {
        file,
        contexts,
        globals: global_scope(file, args)?,
        visits: vec![Visit::Not; file.stages.len()],
        planned: Vec::new(),
    };
    order.visit(target)?;
    Ok(order.planned)
}

/// Stages, each behind those that it needs.
struct Order<'a> {
    file: &'a Dockerfile,
    contexts: &'a Contexts,
    globals: Scope,
    visits: Vec<Visit>,
    planned: Vec<PlannedStage>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Visit {
    Not,
    Begun,
    Done,
}

impl Order<'_> {
    /// As deep as there are stages, of which the parser takes a hundred.
    fn visit(&mut self, index: usize) -> Result<(), dockerfile::Error> {
        self.visits[index] = Visit::Begun;
        let file = self.file;
        let stage = &file.stages[index];
        let base = base(file, index, &self.globals, self.contexts)?;
        let platform = platform(file, index, &self.globals)?;
        if let Base::Stage(earlier) = base {
            self.need(earlier, &stage.image.text, stage.image.at)?;
        }
        for statement in &stage.statements {
            match &statement.instruction {
                Instruction::Copy(copy) => {
                    if let Some(from) = &copy.from
                        && let CopyFrom::Stage(needed) = copy_from(file, from, self.contexts)?
                    {
                        self.need(needed, &from.text, from.at)?;
                    }
                }
                Instruction::Run(run) => {
                    for mount in &run.mounts {
                        if let Some(from) = mount.from()
                            && let Some(needed) = stage_of(file, from, self.contexts)
                        {
                            self.need(needed, from, mount.at)?;
                        }
                    }
                }
                _ => {}
            }
        }
        self.visits[index] = Visit::Done;
        self.planned.push(PlannedStage { index, base, platform });
        Ok(())
    }

    fn need(&mut self, index: usize, name: &str, at: Position) -> Result<(), dockerfile::Error> {
        match self.visits[index] {
            Visit::Done => Ok(()),
            Visit::Not => self.visit(index),
            Visit::Begun => {
                let problem = "the stage needs itself: it is this one, or one that is built from it";
                Err(self.file.fault(Fault::new(at, stage_name(self.file, name, problem))))
            }
        }
    }
}

/// Another platform than this machine's, where one is asked for.
fn platform(file: &Dockerfile, index: usize, globals: &Scope) -> Result<Option<Platform>, dockerfile::Error> {
    let Some(word) = &file.stages[index].platform else { return Ok(None) };
    let fail = |reason: Reason| file.fault(Fault::new(word.at, reason));
    let text =
        expand(&word.text, file.escape(), globals).map_err(|error| file.fault(Fault::new(word.at, error)))?;
    if text.is_empty() {
        return Ok(None);
    }
    let wanted = oci::parse_platform(&text).map_err(|error| {
        let expected = "OS/ARCHITECTURE[/VARIANT], for example linux/arm64";
        fail(Reason::Flag { keyword: "FROM", flag: "platform", problem: error.text, expected })
    })?;
    if *wanted.os() != oci::host_platform().os().clone() {
        let what = format!("FROM --platform={text}");
        return Err(fail(Reason::NotSupported { what, advice: "images are built for Linux".to_owned() }));
    }
    Ok(Some(wanted).filter(|wanted| !oci::platform_fits(&oci::host_platform(), wanted)))
}

fn base(
    file: &Dockerfile,
    index: usize,
    globals: &Scope,
    contexts: &Contexts,
) -> Result<Base, dockerfile::Error> {
    let stage = &file.stages[index];
    let expand = |word: &Word| {
        expand(&word.text, file.escape(), globals).map_err(|error| file.fault(Fault::new(word.at, error)))
    };
    let fail = |reason: Reason| file.fault(Fault::new(stage.image.at, reason));
    let image = expand(&stage.image)?;
    if image.is_empty() {
        return Err(fail(Reason::Arguments {
            keyword: "FROM",
            problem: format!("{:?} expands to nothing", stage.image.text),
            expected: "an image; give the ARG a default, or --build-arg",
        }));
    }
    if image == "scratch" {
        return Ok(Base::Scratch);
    }
    match contexts.find(&image) {
        Some((_, NamedContext::Stage(name))) => {
            let missing = || fail(stage_name(file, name, NO_TARGET));
            return find_stage(file, name).map(Base::Stage).ok_or_else(missing);
        }
        Some((name, _)) => return Ok(Base::Named(name.to_owned())),
        None => {}
    }
    // A number is no name of a stage here: `FROM 0` would be an image.
    match file.stage_named(&image, index) {
        Some(earlier) => Ok(Base::Stage(earlier)),
        None => image.parse().map(Base::Image).map_err(|error| fail(bad_image(file, &image, error))),
    }
}

/// What is wrong with `--build-context NAME=target:STAGE`.
const NO_TARGET: &str = "--build-context names it as a target, but no stage has this name or number";

/// A named context, a stage of any place, as long as none needs itself, else an image.
fn copy_from(file: &Dockerfile, from: &Word, contexts: &Contexts) -> Result<CopyFrom, dockerfile::Error> {
    let fail = |reason: Reason| file.fault(Fault::new(from.at, reason));
    if let Some(stage) = stage_of(file, &from.text, contexts) {
        return Ok(CopyFrom::Stage(stage));
    }
    match contexts.find(&from.text) {
        Some((_, NamedContext::Stage(name))) => return Err(fail(stage_name(file, name, NO_TARGET))),
        Some((name, _)) => return Ok(CopyFrom::Named(name.to_owned())),
        None => {}
    }
    if from.text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(fail(stage_name(file, &from.text, "--from names no stage")));
    }
    from.text.parse().map(CopyFrom::Image).map_err(|error| fail(bad_image(file, &from.text, error)))
}

fn bad_image(file: &Dockerfile, name: &str, error: oci::InvalidReference) -> Reason {
    let advice = match nearest(name, file.stage_names()) {
        Some(near) => format!("; did you mean the stage {near}?"),
        None => String::new(),
    };
    Reason::Image { problem: error.to_string(), advice }
}

/// The stage that the name means: a context of that name comes before it, but may be a stage itself.
fn stage_of(file: &Dockerfile, name: &str, contexts: &Contexts) -> Option<usize> {
    match contexts.find(name) {
        Some((_, NamedContext::Stage(name))) => find_stage(file, name),
        Some(_) => None,
        None => find_stage(file, name),
    }
}

/// The stage of that name or number.
fn find_stage(file: &Dockerfile, name: &str) -> Option<usize> {
    let number = || name.parse().ok().filter(|number| *number < file.stages.len());
    file.stage_named(name, file.stages.len()).or_else(number)
}

fn stage_name(file: &Dockerfile, name: &str, problem: &'static str) -> Reason {
    let others = file.stage_names().filter(|known| !known.eq_ignore_ascii_case(name));
    Reason::StageName { name: name.to_owned(), problem, advice: did_you_mean(name, others) }
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
    for name in PLATFORM_ARGS {
        let value = match name.trim_start_matches("TARGET").trim_start_matches("BUILD") {
            "PLATFORM" => format!("{os}/{architecture}"),
            "OS" => os.clone(),
            "ARCH" => architecture.clone(),
            _ => String::new(),
        };
        scope.0.insert(name.to_owned(), value);
    }
    for statement in &file.global_args {
        let Instruction::Arg(declared) = &statement.instruction else { continue };
        for declaration in declared {
            let name = &declaration.name.text;
            let value = match (args.0.get(name), &declaration.default) {
                (Some(given), _) => Some(given.clone()),
                (None, Some(default)) => Some(
                    expand(&default.text, file.escape(), &scope)
                        .map_err(|error| file.fault(Fault::new(default.at, error)))?,
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
