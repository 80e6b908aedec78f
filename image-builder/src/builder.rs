//! Carries a plan out: stage by stage, step by step, each from the cache where it can be.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

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
use crate::copy::{Selection, SourceTree, make_workdir};
use crate::error::{Error, at};
use crate::interrupt::Interrupt;
use crate::layers::{Chain, LayerCache};
use crate::plan::{self, Action, Base, BuildArgs, CopyAction, CopyFrom, CopySource, StageArgs, Step};
use crate::secrets::{SecretSource, Secrets};
use crate::users;
use crate::vm::{VmBuild, VmOptions, VmWorker};
use crate::worker::{ContainerWorker, RunStep, Worker};

/// Layers of files that a mount shows are read on this machine alone, and soon.
const COMPRESSION_OF_MOUNTS: &str = "None";

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
    /// What RUN steps may read and the image may not hold.
    pub secrets: Vec<SecretSource>,
    /// Run the commands in machines of their own; in containers when absent.
    pub vm: Option<VmOptions>,
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
    let context = Context::open(&folder, &path)?;
    let text = DockerfileText::read(&path)?;
    let file = Dockerfile::parse(&text.shown, &text.contents)?;
    for name in options.args.unused(&file) {
        console.line(&format!("warning: no ARG of {} declares the build argument {name}", file.file));
    }
    check::report(&file, &context.ignore, console)?;
    let stages = plan::stages(&file, &options.args, options.target.as_deref())?;
    let store = Store::open_or_create(&data.images())?;
    let worker: Box<dyn Worker + '_> = match &options.vm {
        Some(vm) => Box::new(VmWorker::new(
            data,
            vm.clone(),
            VmBuild {
                store: store.clone(),
                compression: options.compression,
                host_ca: options.host_ca.clone(),
                secrets: Secrets::read(&options.secrets)?,
                console,
                interrupt,
            },
        )?),
        None => Box::new(ContainerWorker {
            layers: LayerCache::open(&data.cache().join("layers"))?,
            store: store.clone(),
            compression: options.compression,
            host_ca: options.host_ca.clone(),
            program: options.program.clone(),
            console,
            interrupt,
        }),
    };
    let mut build = Build {
        options,
        console,
        interrupt,
        file: &file,
        context: &context,
        worker,
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
    context: &'a Context,
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
            Error::Dockerfile(_) | Error::Interrupted => source,
            _ => Error::Step { file: file.clone(), at, text: text.to_owned(), source: Box::new(source) },
        };
        let total = parsed.statements.len() + 1;
        let label = parsed.name.as_ref().map(|name| format!("{} ", name.name)).unwrap_or_default();
        self.console.line(&format!("[{label}1/{total}] {}", parsed.from.text));
        let mut built =
            self.base(&stage.base).map_err(|error| explain(parsed.from.at, &parsed.from.text, error))?;
        let planned = plan::steps(self.file, stage.index, &self.options.args, &built.config, &built.args)?;
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
            Base::Scratch => Ok(Built {
                layers: Vec::new(),
                chain: Chain::default(),
                config: ImageConfig::default(),
                args: StageArgs::default(),
                history: Vec::new(),
                created: clock::rfc3339(Default::default()),
            }),
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
        let key = StepKey::new(built.chain.id(), &step.action, &compression, &sources.digest)?;
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
            Action::Copy(copy) if copy.from == CopyFrom::Context => {
                let tree = self.context_tree();
                let selection = Selection::find(copy, Some(&tree))?;
                let digest = selection.digest(Some(&tree))?.to_string();
                Ok(Sources { digest, selection: Some(selection), ..Sources::default() })
            }
            Action::Copy(copy) => {
                let layers = self.layers_of(&copy.from)?;
                // The same layers hold the same files.
                Ok(Sources { digest: chain_id(&layers), layers, ..Sources::default() })
            }
            Action::Run(run) => {
                let mut sources = Sources::default();
                for mount in &run.mounts {
                    let layers = match &mount.source {
                        None => Vec::new(),
                        Some(source) if source.from == CopyFrom::Context => {
                            vec![self.context_layer(&source.path)?]
                        }
                        Some(source) => self.layers_of(&source.from)?,
                    };
                    sources.digest.push_str(&format!("{} ", chain_id(&layers)));
                    sources.mounts.push(layers);
                }
                Ok(sources)
            }
            Action::Config | Action::Workdir(_) => Ok(Sources::default()),
        }
    }

    /// The files of the context at that path as a layer with the same paths, from the cache where it can be.
    fn context_layer(&mut self, path: &str) -> Result<Layer, Error> {
        let copy = CopyAction::whole(path);
        let tree = self.context_tree();
        let selection = Selection::find(&copy, Some(&tree))?;
        let digest = selection.digest(Some(&tree))?.to_string();
        let key = StepKey::new("scratch", &Action::Copy(copy.clone()), COMPRESSION_OF_MOUNTS, &digest)?;
        if let Some(StepResult { layer: Some(layer), .. }) = self.cache.find(&key, &self.store) {
            return Ok(Layer::new(&self.store, layer.descriptor, layer.diff_id)?);
        }
        let mut writer = LayerWriter::new(&self.store, Compression::None)?;
        let now = clock::now()?;
        let nothing = self.worker.tree(&[])?;
        selection.write(&copy, Some(&tree), &*nothing, None, now, &mut writer)?;
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
        }
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

    fn context_tree(&self) -> SourceTree<'_> {
        SourceTree {
            root: &self.context.root,
            ignore: Some(&self.context.ignore),
            is_context: true,
            shown: format!("the context {}", self.options.context.display()),
        }
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
            Action::Workdir(path) => {
                let lower = self.worker.tree(&built.layers)?;
                let mut writer = LayerWriter::new(&self.store, self.options.compression)?;
                let made = make_workdir(&*lower, path, now, &mut writer)?;
                made.then(|| writer.finish()).transpose()?
            }
            Action::Copy(copy) => self.copy(copy, sources, built, now)?,
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
        let lower = self.worker.tree(&built.layers)?;
        let owner = copy.chown.as_ref().map(|owner| users::owner(&*lower, owner)).transpose()?;
        let mut writer = LayerWriter::new(&self.store, self.options.compression)?;
        if let Some(selection) = &sources.selection {
            let wrote =
                selection.write(copy, Some(&self.context_tree()), &*lower, owner, now, &mut writer)?;
            return Ok(wrote.then(|| writer.finish()).transpose()?);
        }
        let from = self.worker.tree(&sources.layers)?;
        let tree = SourceTree { root: &*from, ignore: None, is_context: false, shown: shown(&copy.from) };
        let has_paths = copy.sources.iter().any(|source| matches!(source, CopySource::Path(_)));
        let tree = has_paths.then_some(&tree);
        let wrote = Selection::find(copy, tree)?.write(copy, tree, &*lower, owner, now, &mut writer)?;
        Ok(wrote.then(|| writer.finish()).transpose()?)
    }

    fn write_image(&self, built: &Built) -> Result<Descriptor, Error> {
        write_image(&self.store, &built.layers, &built.json())
    }
}

/// What a step reads besides the layers below it.
#[derive(Default)]
struct Sources {
    digest: String,
    /// What a copy takes from the context.
    selection: Option<Selection>,
    /// The tree that a copy takes from, where that is not the context.
    layers: Vec<Layer>,
    /// The trees of a command's mounts.
    mounts: Vec<Vec<Layer>>,
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
