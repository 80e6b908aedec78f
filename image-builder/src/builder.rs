//! Carries a plan out: stage by stage, step by step, each from the cache where it can be.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dockerfile::{Dockerfile, Position};
use oci::layer::{Compression, LayerWriter, Timestamp, WrittenLayer};
use oci::{Descriptor, Digest, Image, ImageName, ImageReference, Layer, MediaType, Store, canonical_json};
use serde::Serialize;
use serde_json::{Value, json};
use template::DataDir;

use crate::base;
use crate::cache::{StepCache, StepKey, StepResult};
use crate::check;
use crate::clock;
use crate::config::{HistoryEntry, ImageConfig};
use crate::console::Console;
use crate::context::{Context, DockerfileText, dockerfile_path};
use crate::contexts::{Contexts, NamedContext};
use crate::copy::{Selection, SourceTree, make_workdir};
use crate::e2b_steps::{self, StepsOptions};
use crate::e2b_user;
use crate::error::{Error, at};
use crate::fetch::Fetcher;
use crate::interrupt::Interrupt;
use crate::layers::{Chain, LayerCache};
use crate::plan::{
    self, Action, Base, BuildArgs, CopyAction, CopyFrom, CopySource, StageArgs, Step, WorkdirAction,
};
use crate::users;
use crate::worker::{ContainerWorker, RunStep, Worker};

/// Layers of files that a mount shows are read on this machine alone, and soon.
const COMPRESSION_OF_MOUNTS: &str = "None";

/// A named context has no Dockerfile, so its ignore file has no other name than `.dockerignore`.
const NO_DOCKERFILE: &str = "";

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
    /// The host's certificates, for RUN.
    pub host_ca: Option<PathBuf>,
    /// How new layers are compressed.
    pub compression: Compression,
    /// This program, which is started again for each RUN.
    pub program: PathBuf,
}

/// What a build made.
#[derive(Clone, Debug, Serialize)]
pub struct BuildReport {
    /// The full names of the image.
    pub names: Vec<String>,
    /// Digest of its manifest.
    pub digest: Digest,
    /// Number of its layers.
    pub layers: usize,
    /// Steps that were carried out.
    pub executed: usize,
    /// Steps whose result was in the cache.
    pub cached: usize,
}

/// Builds the image and gives it its names. Call [`crate::isolate_mounts`] before.
pub fn build(
    data: &DataDir,
    options: &BuildOptions,
    console: &Console,
    interrupt: &Interrupt,
) -> Result<BuildReport, Error> {
    let folder = std::path::absolute(&options.context).map_err(at(&options.context))?;
    let path = dockerfile_path(&options.context, options.dockerfile.as_deref());
    let context = Arc::new(Context::open(&folder, &path)?);
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
    let store = Store::open_or_create(&data.images())?;
    let mut build = Build {
        options,
        console,
        interrupt,
        file: &file,
        context: Arc::clone(&context),
        fetcher: Arc::new(Fetcher::new(&data.cache().join("urls"), interrupt)?),
        named: BTreeMap::new(),
        worker: Box::new(ContainerWorker {
            layers: LayerCache::open(&data.cache().join("layers"))?,
            store: store.clone(),
            compression: options.compression,
            host_ca: options.host_ca.clone(),
            program: options.program.clone(),
            console,
            interrupt,
        }),
        cache: StepCache::open(&data.cache().join("steps"))?,
        store,
        stages: HashMap::new(),
        images: BTreeMap::new(),
        executed: 0,
        cached: 0,
    };
    let mut last = None;
    for stage in &stages {
        let built = build.stage(stage)?;
        build.stages.insert(stage.index, built);
        last = Some(stage.index);
    }
    let Some(built) = last.and_then(|index| build.stages.remove(&index)) else {
        return Err(Error::Invalid {
            what: file.file.clone(),
            reason: "it has no stage to build".to_owned(),
        });
    };
    let mut built = built;
    built.config.labels.extend(labels);
    if options.e2b_user {
        let (at, text) = (file.stages[0].from.at, "image-builder build --e2b-user".to_owned());
        let step = Step { at, text: text.clone(), action: Action::E2bUser };
        build.step(&step, &mut built, "[user]", &text)?;
    }
    let descriptor = build.write_image(&built)?;
    let mut names = Vec::new();
    for name in &options.names {
        build.store.tag(&name.canonical(), &descriptor)?;
        names.push(name.canonical());
    }
    Ok(BuildReport {
        names,
        digest: descriptor.digest().clone(),
        layers: built.layers.len(),
        executed: build.executed,
        cached: build.cached,
    })
}

struct Build<'a> {
    options: &'a BuildOptions,
    console: &'a Console,
    interrupt: &'a Interrupt,
    file: &'a Dockerfile,
    context: Arc<Context>,
    /// Gets what ADD names by URL.
    fetcher: Arc<Fetcher>,
    /// Folders of `--build-context`.
    named: BTreeMap<String, Arc<Context>>,
    store: Store,
    worker: Box<dyn Worker + 'a>,
    cache: StepCache,
    stages: HashMap<usize, Built>,
    /// Images that `COPY --from` named.
    images: BTreeMap<String, Vec<Layer>>,
    executed: usize,
    cached: usize,
}

/// A stage so far.
#[derive(Clone)]
struct Built {
    layers: Vec<Layer>,
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
            layers,
            chain,
            config: ImageConfig::default(),
            args: StageArgs::default(),
            history: Vec::new(),
            created: clock::rfc3339(Default::default()),
        }
    }

    fn json(&self) -> Value {
        let diff_ids: Vec<_> = self.layers.iter().map(|layer| layer.diff_id.clone()).collect();
        self.config.to_json(&self.created, &diff_ids, &self.history)
    }
}

impl Build<'_> {
    fn stage(&mut self, stage: &plan::PlannedStage) -> Result<Built, Error> {
        let parsed = &self.file.stages[stage.index];
        let file = self.file.file.clone();
        let explain = |at: Position, text: &str, source: Error| match source {
            Error::Interrupted => source,
            source if self.options.steps.is_some() => e2b_steps::at_step(&file, at, text, source),
            Error::Dockerfile(_) => source,
            _ => Error::Step { file: file.clone(), at, text: text.to_owned(), source: Box::new(source) },
        };
        let total = parsed.statements.len() + 1;
        let label = parsed.name.as_ref().map(|name| format!("{} ", name.name)).unwrap_or_default();
        self.console.line(&format!("[{label}1/{total}] {}", parsed.from.text));
        let mut built =
            self.base(&stage.base).map_err(|error| explain(parsed.from.at, &parsed.from.text, error))?;
        let planned = plan::steps(
            self.file,
            stage.index,
            &self.options.args,
            &self.options.contexts,
            &built.config,
            &built.args,
        )
        .map_err(|error| e2b_steps::of_plan(self.options.steps.is_some(), error))?;
        // With the instructions of the base image.
        let total = planned.steps.len() + 1;
        for (step, number) in planned.steps.iter().zip(2..) {
            self.interrupt.check()?;
            let first_line = step.text.lines().next().unwrap_or_default();
            let prefix = format!("[{label}{number}/{total}]");
            self.step(step, &mut built, &prefix, first_line)
                .map_err(|error| explain(step.at, &step.text, error))?;
        }
        built.config = planned.config;
        built.args = planned.args;
        Ok(built)
    }

    fn base(&mut self, base: &Base) -> Result<Built, Error> {
        match base {
            Base::Scratch => Ok(Built::of_layers(Vec::new())),
            Base::Named(name) => match self.options.contexts.find(name) {
                Some((_, NamedContext::Image(reference))) => self.base(&Base::Image(reference.clone())),
                _ => Ok(Built::of_layers(self.layers_of(&CopyFrom::Named(name.clone()))?)),
            },
            Base::Stage(index) => match self.stages.get(index) {
                Some(built) => Ok(built.clone()),
                None => Err(Error::Invalid {
                    what: format!("stage {index}"),
                    reason: "it was not built before the stage that needs it".to_owned(),
                }),
            },
            Base::Image(reference) => {
                let image = base::resolve(&self.store, reference, self.console)?;
                let config = ImageConfig::from_json(&image.config_json);
                let created = config.base_created().map(str::to_owned);
                let mut chain = Chain::default();
                image.layers.iter().for_each(|layer| chain.push(&layer.diff_id));
                Ok(Built {
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

    fn step(&mut self, step: &Step, built: &mut Built, prefix: &str, shown: &str) -> Result<(), Error> {
        let mut entry =
            HistoryEntry { created: built.created.clone(), created_by: step.text.clone(), empty_layer: true };
        if step.action == Action::Config {
            self.console.line(&format!("{prefix} {shown}"));
            built.history.push(entry);
            return Ok(());
        }
        let sources = self.sources(step)?;
        let compression = format!("{:?}", self.options.compression);
        let below = if is_independent(&step.action) { LINKED } else { built.chain.id() };
        let key = StepKey::new(below, &step.action, &compression, &sources.digest)?;
        let found = if self.options.no_cache { None } else { self.cache.find(&key, &self.store) };
        let result = match found {
            Some(result) => {
                self.console.line(&format!("{prefix} {shown} (cached)"));
                self.cached += 1;
                result
            }
            None => {
                self.console.line(&format!("{prefix} {shown}"));
                self.executed += 1;
                let result = self.execute(&step.action, &sources, built, prefix)?;
                self.cache.put(&key, &result)?;
                result
            }
        };
        if let Some(layer) = result.layer {
            built.chain.push(&layer.diff_id);
            built.layers.push(Layer::new(&self.store, layer.descriptor, layer.diff_id)?);
            entry.empty_layer = false;
        }
        built.created.clone_from(&result.created);
        entry.created = result.created;
        built.history.push(entry);
        Ok(())
    }

    /// What a step reads besides the layers below it, and its digest for the key.
    fn sources(&mut self, step: &Step) -> Result<Sources, Error> {
        match &step.action {
            Action::Copy(copy) => {
                let context = self.context_of(&copy.from)?;
                if context.is_none()
                    && copy.sources.iter().any(|source| matches!(source, CopySource::Path(_)))
                {
                    let layers = self.layers_of(&copy.from)?;
                    // The same layers hold the same files.
                    return Ok(Sources { digest: chain_id(&layers), layers, ..Sources::default() });
                }
                let tree = context.as_ref().map(|context| context.tree());
                let selection = Selection::find(copy, tree.as_ref(), &self.fetcher)?;
                for warning in &selection.warnings {
                    self.console.line(&format!("warning: {}: {warning}", step.at));
                }
                let digest = selection.digest(tree.as_ref())?.to_string();
                drop(tree);
                Ok(Sources { digest, selection: Some(selection), context, ..Sources::default() })
            }
            Action::Run(run) => {
                let mut sources = Sources::default();
                for mount in &run.mounts {
                    let layers = match &mount.source {
                        None => Vec::new(),
                        Some(source) => match self.context_of(&source.from)? {
                            Some(context) => {
                                vec![self.context_layer(&context, &CopyAction::whole(&source.path))?]
                            }
                            None => self.layers_of(&source.from)?,
                        },
                    };
                    sources.digest.push_str(&format!("{} ", chain_id(&layers)));
                    sources.mounts.push(layers);
                }
                Ok(sources)
            }
            Action::Config | Action::Workdir(_) | Action::E2bUser => Ok(Sources::default()),
        }
    }

    /// What a copy from a context makes of an empty tree, from the cache where it can be.
    fn context_layer(&mut self, context: &Context, copy: &CopyAction) -> Result<Layer, Error> {
        let tree = context.tree();
        let selection = Selection::find(copy, Some(&tree), &self.fetcher)?;
        let digest = selection.digest(Some(&tree))?.to_string();
        let key = StepKey::new("scratch", &Action::Copy(copy.clone()), COMPRESSION_OF_MOUNTS, &digest)?;
        if let Some(StepResult { layer: Some(layer), .. }) = self.cache.find(&key, &self.store) {
            return Ok(Layer::new(&self.store, layer.descriptor, layer.diff_id)?);
        }
        let mut writer = LayerWriter::new(&self.store, Compression::None)?;
        let now = clock::now()?;
        let nothing = self.worker.tree(&[])?;
        selection.write(copy, Some(&tree), &*nothing, None, now, &mut writer)?;
        let layer = writer.finish()?;
        self.cache.put(&key, &StepResult { layer: Some(layer.clone()), created: clock::rfc3339(now) })?;
        Ok(Layer::new(&self.store, layer.descriptor, layer.diff_id)?)
    }

    fn layers_of(&mut self, from: &CopyFrom) -> Result<Vec<Layer>, Error> {
        match from {
            CopyFrom::Context => Ok(Vec::new()),
            CopyFrom::Stage(index) => {
                Ok(self.stages.get(index).map(|built| built.layers.clone()).unwrap_or_default())
            }
            CopyFrom::Image(reference) => self.image_layers(reference),
            CopyFrom::Named(name) => match self.options.contexts.find(name) {
                Some((_, NamedContext::Image(reference))) => self.image_layers(reference),
                Some((_, NamedContext::Archive(file))) => {
                    let context = Context::of_archive(file)?;
                    let name = file.file_name().unwrap_or_default().to_string_lossy();
                    Ok(vec![self.context_layer(&context, &CopyAction::unpacked(&name))?])
                }
                _ => match self.context_of(from)? {
                    Some(context) => Ok(vec![self.context_layer(&context, &CopyAction::whole(""))?]),
                    None => Err(unknown_context(name)),
                },
            },
        }
    }

    /// The folder that is meant; `None` where it is a tree of layers.
    fn context_of(&mut self, from: &CopyFrom) -> Result<Option<Arc<Context>>, Error> {
        let name = match from {
            CopyFrom::Context => return Ok(Some(Arc::clone(&self.context))),
            CopyFrom::Named(name) => name,
            CopyFrom::Stage(_) | CopyFrom::Image(_) => return Ok(None),
        };
        if let Some(context) = self.named.get(name) {
            return Ok(Some(Arc::clone(context)));
        }
        let Some((_, NamedContext::Folder(folder))) = self.options.contexts.find(name) else {
            return Ok(None);
        };
        let context = Arc::new(Context::open(folder, &folder.join(NO_DOCKERFILE))?);
        self.named.insert(name.clone(), Arc::clone(&context));
        Ok(Some(context))
    }

    fn image_layers(&mut self, reference: &ImageReference) -> Result<Vec<Layer>, Error> {
        let name = reference.to_string();
        if let Some(layers) = self.images.get(&name) {
            return Ok(layers.clone());
        }
        let layers = base::resolve(&self.store, reference, self.console)?.layers;
        self.images.insert(name, layers.clone());
        Ok(layers)
    }

    fn execute(
        &self,
        action: &Action,
        sources: &Sources,
        built: &Built,
        prefix: &str,
    ) -> Result<StepResult, Error> {
        let now = clock::now()?;
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
            Action::Copy(copy) => self.copy(copy, sources, built, now)?,
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

    fn copy(
        &self,
        copy: &CopyAction,
        sources: &Sources,
        built: &Built,
        now: Timestamp,
    ) -> Result<Option<WrittenLayer>, Error> {
        let linked = copy.is_independent();
        let lower = self.worker.tree(if linked { &[] } else { &built.layers })?;
        let owner = copy.chown.as_ref().map(|owner| users::owner(&*lower, owner)).transpose()?;
        // Names of owners are the image's, but links of the image lead a linked layer nowhere.
        let lower = if copy.link && !linked { self.worker.tree(&[])? } else { lower };
        let mut writer = LayerWriter::new(&self.store, self.options.compression)?;
        if let Some(selection) = &sources.selection {
            let tree = sources.context.as_ref().map(|context| context.tree());
            let wrote = selection.write(copy, tree.as_ref(), &*lower, owner, now, &mut writer)?;
            return Ok(wrote.then(|| writer.finish()).transpose()?);
        }
        let from = self.worker.tree(&sources.layers)?;
        let is_context = self.is_archive(&copy.from);
        let tree = SourceTree { root: &*from, ignore: None, is_context, shown: shown(&copy.from) };
        let selection = Selection::find(copy, Some(&tree), &self.fetcher)?;
        let wrote = selection.write(copy, Some(&tree), &*lower, owner, now, &mut writer)?;
        Ok(wrote.then(|| writer.finish()).transpose()?)
    }

    /// Owners in an archive that was sent mean nothing, as those in a folder.
    fn is_archive(&self, from: &CopyFrom) -> bool {
        let CopyFrom::Named(name) = from else { return false };
        matches!(self.options.contexts.find(name), Some((_, NamedContext::Archive(_))))
    }

    fn write_image(&self, built: &Built) -> Result<Descriptor, Error> {
        write_image(&self.store, &built.layers, &built.json())
    }
}

/// What a step reads besides the layers below it.
#[derive(Default)]
struct Sources {
    digest: String,
    /// What a copy takes from a context.
    selection: Option<Selection>,
    context: Option<Arc<Context>>,
    /// The tree that a copy takes from, where that is not the context.
    layers: Vec<Layer>,
    /// The trees of a command's mounts.
    mounts: Vec<Vec<Layer>>,
}

fn unknown_context(name: &str) -> Error {
    Error::Invalid { what: format!("context {name}"), reason: "no --build-context has this name".to_owned() }
}

fn is_independent(action: &Action) -> bool {
    matches!(action, Action::Copy(copy) if copy.is_independent())
}

fn chain_id(layers: &[Layer]) -> String {
    let mut chain = Chain::default();
    layers.iter().for_each(|layer| chain.push(&layer.diff_id));
    chain.id().to_owned()
}

fn shown(from: &CopyFrom) -> String {
    match from {
        CopyFrom::Stage(index) => format!("stage {index}"),
        CopyFrom::Image(reference) => format!("image {reference}"),
        CopyFrom::Context => "the context".to_owned(),
        CopyFrom::Named(name) => format!("the context {name}"),
    }
}

/// Writes config and manifest of an image whose layers are in the store.
pub(crate) fn write_image(store: &Store, layers: &[Layer], config: &Value) -> Result<Descriptor, Error> {
    let put = |media_type: MediaType, value: &Value| {
        let path = Path::new("image config");
        let text = canonical_json(value).map_err(|error| at(path)(std::io::Error::from(error)))?;
        Ok::<_, Error>(store.put_blob(media_type, &text[..])?)
    };
    let config = put(MediaType::ImageConfig, config)?;
    let layers: Vec<_> = layers
        .iter()
        .map(|layer| {
            json!({
                "mediaType": oci::oci_media_type(layer.descriptor.media_type()),
                "digest": layer.descriptor.digest(), "size": layer.descriptor.size(),
            })
        })
        .collect();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MediaType::ImageManifest,
        "config": config,
        "layers": layers,
    });
    let mut descriptor = put(MediaType::ImageManifest, &manifest)?;
    descriptor.set_platform(Some(oci::host_platform()));
    // The specification's own rules, before the image gets a name.
    Image::open(store, &descriptor)?;
    Ok(descriptor)
}
