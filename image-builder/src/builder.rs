//! Carries a plan out: stages side by side, each step by step, from the cache where it can be.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use dockerfile::{Dockerfile, Position};
use oci::layer::{Compression, LayerWriter, Timestamp};
use oci::{Descriptor, Digest, Image, ImageName, Layer, MediaType, Platform, Store};
use serde::Serialize;
use template::DataDir;

use crate::cache::{About, StepCache, StepKey, StepResult, layer_of};
use crate::check;
use crate::clock;
use crate::config::{HistoryEntry, ImageConfig};
use crate::console::{Console, StepStatus};
use crate::context::{Context, DockerfileText, dockerfile_path};
use crate::contexts::{Contexts, NamedContext};
use crate::copy::make_workdir;
use crate::e2b_steps::{self, StepsOptions};
use crate::e2b_user;
use crate::error::{Error, at};
use crate::exchange::{self, Imported};
use crate::fetch::Fetcher;
use crate::graph::{Board, Flights, Jobs};
use crate::history::{BuildLog, LoggedStep, StepOutcome};
use crate::interrupt::Interrupt;
use crate::isolation::Chosen;
use crate::layers::Chain;
use crate::outputs::{self, BuildOutput, WrittenOutput};
use crate::plan::{self, Action, Base, BuildArgs, CopyFrom, StageArgs, Step, WorkdirAction};
use crate::registry::RegistryOptions;
use crate::run::RunOptions;
use crate::users;
use crate::vm::{VmBuild, VmOptions, VmWorker};
use crate::worker::{ContainerWorker, RunStep, Worker};

mod image;
mod sources;
mod stages;

pub(crate) use image::write_image;

use sources::Sources;

/// In the key of a step whose layer does not depend on what is below it.
const LINKED: &str = "linked";

/// What a build may be told.
#[derive(Clone, Debug)]
pub struct BuildOptions {
    /// The folder that COPY copies from.
    pub context: PathBuf,
    /// The Dockerfile, where it is not `Dockerfile` in the context.
    pub dockerfile: Option<PathBuf>,
    /// The names that the image gets.
    pub names: Vec<ImageName>,
    /// `--build-arg`.
    pub args: BuildArgs,
    /// `--build-context`.
    pub contexts: Contexts,
    /// Steps of an E2B template in place of a Dockerfile.
    pub steps: Option<StepsOptions>,
    /// Add the user of E2B's sandboxes at the end.
    pub e2b_user: bool,
    /// The stage to stop at; the last one by default.
    pub target: Option<String>,
    /// Run every step, whatever the cache has.
    pub no_cache: bool,
    /// Run every step of these stages.
    pub no_cache_filter: Vec<String>,
    /// Ask the registries for base images, whatever the store has.
    pub pull: bool,
    /// How many steps may run at the same time; as many as there are CPUs, at least two, by default.
    pub jobs: Option<usize>,
    /// How registries are found.
    pub registries: RegistryOptions,
    /// Folders with results of other machines.
    pub cache_from: Vec<PathBuf>,
    /// The folder that gets the results of this build.
    pub cache_to: Option<PathBuf>,
    /// No file of the new layers is newer than `SOURCE_DATE_EPOCH`.
    pub rewrite_timestamp: bool,
    /// Labels that the image gets over those of the Dockerfile.
    pub labels: BTreeMap<String, String>,
    /// Annotations of the manifest.
    pub annotations: BTreeMap<String, String>,
    /// What is made of the image.
    pub outputs: Vec<BuildOutput>,
    /// The file that gets digests and names, as docker buildx writes them.
    pub metadata_file: Option<PathBuf>,
    /// The file that gets the image's id.
    pub iidfile: Option<PathBuf>,
    /// The host's certificates, for RUN.
    pub host_ca: Option<PathBuf>,
    /// How new layers are compressed.
    pub compression: Compression,
    /// This program, which is started again for each RUN.
    pub program: PathBuf,
    /// Where RUN steps run: what [`crate::enter`] gave.
    pub isolation: Chosen,
    /// What holds for all RUN steps.
    pub run: RunOptions,
    /// What machines for RUN steps are made of.
    pub vm: VmOptions,
}

/// What a build made.
#[derive(Clone, Debug, Serialize)]
pub struct BuildReport {
    /// The full names of the image.
    pub names: Vec<String>,
    /// Digest of its manifest.
    pub digest: Digest,
    /// Digest of its config, which Docker calls the image's id.
    pub config_digest: Digest,
    /// Length of its manifest in bytes.
    pub size: u64,
    /// What it runs on, as `linux/amd64`.
    pub platform: String,
    /// Number of its layers.
    pub layers: usize,
    /// Steps that were carried out.
    pub executed: usize,
    /// Steps whose result was in the cache.
    pub cached: usize,
    /// Steps that another stage has too, and that were carried out there.
    pub shared: usize,
    /// What was made of the image.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub outputs: Vec<WrittenOutput>,
}

impl BuildReport {
    /// The descriptor of the manifest.
    pub fn descriptor(&self) -> Descriptor {
        let mut descriptor = Descriptor::new(MediaType::ImageManifest, self.size, self.digest.clone());
        descriptor.set_platform(oci::parse_platform(&self.platform).ok());
        descriptor
    }
}

/// Builds the image and gives it its names. Call [`crate::enter`] before.
pub fn build(
    data: &DataDir,
    options: &BuildOptions,
    console: &Console,
    interrupt: &Interrupt,
) -> Result<BuildReport, Error> {
    let folder = std::path::absolute(&options.context).map_err(at(&options.context))?;
    let path = dockerfile_path(&options.context, options.dockerfile.as_deref());
    let known = data.cache().join("contexts");
    let context = Arc::new(Context::open(&folder, &path, &known)?);
    let mut contexts = options.contexts.clone();
    let (file, labels) = match &options.steps {
        Some(steps) => e2b_steps::read(steps, &mut contexts)?,
        None => {
            let text = DockerfileText::read(&path)?;
            (Dockerfile::parse(&text.shown, &text.contents)?, BTreeMap::new())
        }
    };
    let options = &BuildOptions { contexts, ..options.clone() };
    for name in options.args.unused(&file) {
        console.line(&format!("warning: no ARG of {} declares the build argument {name}", file.file));
    }
    check::report(&file, &context.ignore, console)?;
    let stages = plan::stages(&file, &options.args, &options.contexts, options.target.as_deref())
        .map_err(|error| e2b_steps::of_plan(options.steps.is_some(), error))?;
    let Some(last) = stages.last().map(|stage| stage.index) else {
        return Err(Error::Invalid {
            what: file.file.clone(),
            reason: "it has no stage to build".to_owned(),
        });
    };
    let epoch = clock::epoch(&options.args)?;
    if options.rewrite_timestamp && epoch.is_none() {
        return Err(Error::Invalid {
            what: "--rewrite-timestamp".to_owned(),
            reason: format!("expected {} in the environment or as --build-arg", clock::EPOCH),
        });
    }
    let mut imported = Vec::new();
    for folder in &options.cache_from {
        imported.extend(Imported::open(folder, console)?);
    }
    let store = Store::open_or_create(&data.images())?;
    let build = Build {
        options,
        console,
        interrupt,
        file: &file,
        labels,
        context: Arc::clone(&context),
        known,
        fetcher: Arc::new(Fetcher::new(&data.cache().join("urls"), interrupt)?),
        named: Flights::new(),
        opened: Mutex::new(vec![context]),
        worker: worker(data, options, &store, console, interrupt)?,
        cache: StepCache::open(&data.cache().join("steps"))?,
        imported,
        epoch,
        store,
        several: stages.len() > 1,
        jobs: Jobs::new(options.jobs.unwrap_or_else(default_jobs)),
        stages: Board::new(),
        steps: Flights::new(),
        images: Flights::new(),
        log: Mutex::new(BuildLog::begin(&folder, &path, options.target.as_deref())),
        counts: Counts::default(),
    };
    let result = build.all(&stages, last);
    // What was found out about files holds also when a step failed. Neither is a reason to fail.
    let logged = build.finish_log(&result, &data.cache().join("builds"));
    let opened = build.opened.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let saved = opened.iter().map(|context| context.files.save());
    for error in saved.chain([logged]).filter_map(Result::err) {
        console.line(&format!("warning: the next build will know less: {error}"));
    }
    drop(opened);
    let mut report = result?;
    for output in &options.outputs {
        let written = outputs::write(data, &build.store, &report, output, console, interrupt)?;
        report.outputs.push(written);
    }
    options.metadata_file.as_deref().map(|file| outputs::write_metadata(file, &report)).transpose()?;
    options.iidfile.as_deref().map(|file| outputs::write_id(file, &report)).transpose()?;
    if let Some(folder) = &options.cache_to {
        let keys: Vec<_> = build.log().steps.iter().filter_map(|step| step.key.clone()).collect();
        exchange::export(folder, &keys, &build.store, &build.cache, console)?;
    }
    Ok(report)
}

/// Steps wait for disks and networks too, so one is too few anywhere.
fn default_jobs() -> usize {
    std::thread::available_parallelism().map_or(2, |cpus| cpus.get().max(2))
}

/// What runs commands, by the isolation that was chosen.
fn worker<'a>(
    data: &DataDir,
    options: &'a BuildOptions,
    store: &Store,
    console: &'a Console,
    interrupt: &'a Interrupt,
) -> Result<Box<dyn Worker + 'a>, Error> {
    match &options.isolation {
        Chosen::Root | Chosen::Namespace(_) => {
            Ok(Box::new(ContainerWorker::open(data, options, store.clone(), console, interrupt)?))
        }
        Chosen::Vm { .. } => {
            let build = VmBuild {
                store: store.clone(),
                compression: options.compression,
                host_ca: options.host_ca.clone(),
                secrets: options.run.secrets.clone(),
                console,
                interrupt,
            };
            Ok(Box::new(VmWorker::new(data, options.vm.clone().with(&options.run)?, build)?))
        }
    }
}

struct Build<'a> {
    options: &'a BuildOptions,
    console: &'a Console,
    interrupt: &'a Interrupt,
    file: &'a Dockerfile,
    /// What the steps of a template say about the image.
    labels: BTreeMap<String, String>,
    context: Arc<Context>,
    /// Where digests of contexts' files are kept.
    known: PathBuf,
    /// Gets what ADD names by URL.
    fetcher: Arc<Fetcher>,
    /// Folders of `--build-context`.
    named: Flights<String, Arc<Context>>,
    /// All folders of this build.
    opened: Mutex<Vec<Arc<Context>>>,
    store: Store,
    worker: Box<dyn Worker + 'a>,
    cache: StepCache,
    imported: Vec<Imported>,
    epoch: Option<Timestamp>,
    /// Whether lines say of which stage they are, also of one without a name.
    several: bool,
    jobs: Jobs,
    stages: Board<Built>,
    /// Steps by their keys, each with whether it was in the cache.
    steps: Flights<Digest, (StepResult, bool)>,
    /// Images that `FROM` and `COPY --from` named.
    images: Flights<String, Image>,
    log: Mutex<BuildLog>,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    executed: AtomicUsize,
    cached: AtomicUsize,
    shared: AtomicUsize,
}

/// A stage so far.
#[derive(Clone)]
struct Built {
    layers: Vec<Layer>,
    /// How many of them came with the base image.
    base_layers: usize,
    chain: Chain,
    config: ImageConfig,
    args: StageArgs,
    history: Vec<HistoryEntry>,
    created: String,
}

impl Built {
    /// An image without a config.
    fn of_layers(layers: Vec<Layer>) -> Self {
        let mut chain = Chain::default();
        layers.iter().for_each(|layer| chain.push(&layer.diff_id));
        Self {
            base_layers: layers.len(),
            layers,
            chain,
            config: ImageConfig::default(),
            args: StageArgs::default(),
            history: Vec::new(),
            created: clock::rfc3339(Default::default()),
        }
    }
}

impl Build<'_> {
    /// The step that no Dockerfile has.
    fn add_user(&self, built: &mut Built, stage: usize) -> Result<(), Error> {
        let text = "image-builder build --e2b-user";
        let at = self.file.stages[stage].from.at;
        let step = Step { at, text: text.to_owned(), action: Action::E2bUser };
        let mut logged = LoggedStep {
            stage,
            number: usize::MAX,
            mark: "[user]".to_owned(),
            text: text.to_owned(),
            outcome: StepOutcome::Failed,
            key: None,
            args: Vec::new(),
            forced: self.options.no_cache,
        };
        let result = self.step(&step, built, &mut logged);
        self.log().steps.push(logged);
        result
    }

    fn stage(&self, stage: &plan::PlannedStage) -> Result<Built, Error> {
        let parsed = &self.file.stages[stage.index];
        let file = self.file.file.clone();
        let explain = |at: Position, text: &str, source: Error| match source {
            Error::Interrupted => source,
            source if self.options.steps.is_some() => e2b_steps::at_step(&file, at, text, source),
            Error::Dockerfile(_) => source,
            _ => Error::Step { file: file.clone(), at, text: text.to_owned(), source: Box::new(source) },
        };
        let total = parsed.statements.len() + 1;
        let label = match &parsed.name {
            Some(name) => format!("{} ", name.name),
            None if self.several => format!("stage-{} ", stage.index),
            None => String::new(),
        };
        self.interrupt.check()?;
        self.console.step(&format!("[{label}1/{total}]"), &parsed.from.text, StepStatus::Started);
        let mut built = self
            .base(&stage.base, stage.platform.as_ref())
            .map_err(|error| explain(parsed.from.at, &parsed.from.text, error))?;
        let planned = plan::steps(
            self.file,
            stage.index,
            &self.options.args,
            &self.options.contexts,
            &built.config,
            &built.args,
        )
        .map_err(|error| e2b_steps::of_plan(self.options.steps.is_some(), error))?;
        let args: Vec<_> =
            planned.args.names().filter(|name| planned.config.env_value(name).is_none()).collect();
        let name = parsed.name.as_ref().map(|name| name.name.as_str()).unwrap_or_default();
        let filter = &self.options.no_cache_filter;
        let forced = self.options.no_cache || filter.iter().any(|stage| stage.eq_ignore_ascii_case(name));
        // With the instructions of the base image.
        let total = planned.steps.len() + 1;
        for (step, number) in planned.steps.iter().zip(2..) {
            self.interrupt.check()?;
            let mut logged = LoggedStep {
                stage: stage.index,
                number,
                mark: format!("[{label}{number}/{total}]"),
                text: step.text.clone(),
                outcome: StepOutcome::Failed,
                key: None,
                args: args.iter().map(|name| (*name).to_owned()).collect(),
                forced,
            };
            let result = self.step(step, &mut built, &mut logged);
            if result.is_err() {
                self.console.step(
                    &logged.mark,
                    step.text.lines().next().unwrap_or_default(),
                    StepStatus::Failed,
                );
            }
            self.log().steps.push(logged);
            result.map_err(|error| explain(step.at, &step.text, error))?;
        }
        built.config = planned.config;
        built.args = planned.args;
        Ok(built)
    }

    fn base(&self, base: &Base, platform: Option<&Platform>) -> Result<Built, Error> {
        match base {
            Base::Scratch => {
                let mut built = Built::of_layers(Vec::new());
                built.config = platform.map(ImageConfig::for_platform).unwrap_or_default();
                Ok(built)
            }
            Base::Named(name) => match self.options.contexts.find(name) {
                Some((_, NamedContext::Image(reference))) => {
                    self.base(&Base::Image(reference.clone()), platform)
                }
                _ => Ok(Built::of_layers(self.layers_of(&CopyFrom::Named(name.clone()))?)),
            },
            Base::Stage(index) => self.stages.wait(*index),
            Base::Image(reference) => {
                let image = self.fetch(reference, platform)?;
                let config = ImageConfig::from_json(&image.config_json);
                let created = config.base_created().map(str::to_owned);
                let mut chain = Chain::default();
                image.layers.iter().for_each(|layer| chain.push(&layer.diff_id));
                Ok(Built {
                    base_layers: image.layers.len(),
                    layers: image.layers,
                    chain,
                    config,
                    args: StageArgs::default(),
                    history: Vec::new(),
                    created: created.unwrap_or_else(|| clock::rfc3339(Default::default())),
                })
            }
        }
    }

    fn step(&self, step: &Step, built: &mut Built, logged: &mut LoggedStep) -> Result<(), Error> {
        let shown = step.text.lines().next().unwrap_or_default();
        let mark = &logged.mark;
        let mut entry =
            HistoryEntry { created: built.created.clone(), created_by: step.text.clone(), empty_layer: true };
        if step.action == Action::Config {
            self.console.step(mark, shown, StepStatus::Started);
            logged.outcome = StepOutcome::Config;
            built.history.push(entry);
            return Ok(());
        }
        let mut sources = self.sources(step)?;
        let compression = format!("{:?}", self.options.compression);
        let below = if is_independent(&step.action) { LINKED } else { built.chain.id() };
        let key = StepKey::new(below, &step.action, &compression, &sources.digest)?;
        logged.key = Some(key.digest().clone());
        let mut about = About { text: &step.text, mark, files: sources.files.take() };
        let ((result, cached), first) = self.steps.once(key.digest(), || {
            if let Some(result) = self.find(&key).filter(|_| !logged.forced) {
                return Ok((result, true));
            }
            let _place = self.jobs.place();
            self.interrupt.check()?;
            // Other layers than before may still have the same files.
            let by_content = match &step.action {
                Action::Copy(copy) if sources.is_of_layers() => {
                    let (digest, files) = self.contents(copy, &sources)?;
                    about.files = Some(files);
                    Some(StepKey::new(below, &step.action, &compression, &digest)?)
                }
                _ => None,
            };
            if let Some(by_content) = by_content.as_ref().filter(|_| !logged.forced)
                && let Some(result) = self.find(by_content)
            {
                self.cache.put(&key, &result, &about)?;
                return Ok((result, true));
            }
            self.console.step(mark, shown, StepStatus::Started);
            let result = self.execute(&step.action, &sources, built, mark)?;
            if let Some(by_content) = by_content {
                self.cache.put(&by_content, &result, &about)?;
            }
            self.cache.put(&key, &result, &about)?;
            Ok::<_, Error>((result, false))
        })?;
        let (outcome, status, count) = match (cached, first) {
            (true, _) => (StepOutcome::Cached, StepStatus::Cached, &self.counts.cached),
            (false, true) => (StepOutcome::Executed, StepStatus::Done, &self.counts.executed),
            (false, false) => (StepOutcome::Shared, StepStatus::Shared, &self.counts.shared),
        };
        count.fetch_add(1, Ordering::Relaxed);
        self.console.step(mark, shown, status);
        logged.outcome = outcome;
        if let Some(layer) = layer_of(&result, &self.store)? {
            built.chain.push(&layer.diff_id);
            built.layers.push(layer);
            entry.empty_layer = false;
        }
        built.created.clone_from(&result.created);
        entry.created = result.created;
        built.history.push(entry);
        Ok(())
    }

    /// The result of an earlier build, here or elsewhere.
    fn find(&self, key: &StepKey) -> Option<StepResult> {
        let elsewhere =
            || self.imported.iter().find_map(|cache| cache.take(key, &self.store, &self.cache, self.console));
        self.cache.find(key, &self.store).or_else(elsewhere)
    }

    fn log(&self) -> MutexGuard<'_, BuildLog> {
        self.log.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn finish_log(&self, result: &Result<BuildReport, Error>, folder: &Path) -> Result<(), Error> {
        let mut log = self.log();
        log.steps.sort_by_key(|step| (step.stage, step.number));
        match result {
            Ok(report) => {
                log.names.clone_from(&report.names);
                log.digest = Some(report.digest.clone());
            }
            Err(error) => log.error = Some(error.to_string()),
        }
        log.write(folder)
    }

    fn execute(
        &self,
        action: &Action,
        sources: &Sources,
        built: &Built,
        prefix: &str,
    ) -> Result<StepResult, Error> {
        // With --rewrite-timestamp times are set in the end, and what is in the cache depends on no epoch.
        let now = self.epoch.filter(|_| !self.options.rewrite_timestamp).unwrap_or_else(clock::system);
        let layer = match action {
            Action::Config => None,
            Action::Workdir(WorkdirAction { path, user }) => {
                let lower = self.worker.tree(&built.layers)?;
                // As BuildKit has it, also that a user who is not there yet leaves it to root.
                let owner = match user.as_str() {
                    "" => (0, 0),
                    user => users::owner(&*lower, user).unwrap_or_default(),
                };
                let mut writer = LayerWriter::new(&self.store, self.options.compression)?;
                let made = make_workdir(&*lower, path, owner, now, &mut writer)?;
                made.then(|| writer.finish()).transpose()?
            }
            Action::Copy(copy) => self.copy(copy, sources, &built.layers, now)?,
            Action::E2bUser => {
                let lower = self.worker.tree(&built.layers)?;
                let mut writer = LayerWriter::new(&self.store, self.options.compression)?;
                let changed = e2b_user::add(&*lower, now, &mut writer)?;
                changed.then(|| writer.finish()).transpose()?
            }
            Action::Run(action) => self.worker.run(&RunStep {
                layers: &built.layers,
                action,
                mounts: &sources.mounts,
                prefix: format!("{prefix} | "),
            })?,
        };
        Ok(StepResult { layer, created: clock::rfc3339(now) })
    }
}

fn is_independent(action: &Action) -> bool {
    matches!(action, Action::Copy(copy) if copy.is_independent())
}
