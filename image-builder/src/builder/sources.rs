//! What steps read besides the layers below them: contexts, stages, images, URLs.

use std::collections::BTreeMap;
use std::sync::Arc;

use oci::layer::{Compression, LayerWriter, Timestamp, WrittenLayer};
use oci::{Image, ImageReference, Layer, Platform};

use super::Build;
use crate::base::{self, PullOptions, PullPolicy};
use crate::cache::{About, StepKey, StepResult, layer_of};
use crate::clock;
use crate::context::Context;
use crate::contexts::NamedContext;
use crate::copy::{Selection, SourceTree};
use crate::error::Error;
use crate::layers::Chain;
use crate::plan::{Action, CopyAction, CopyFrom, CopySource, Step};
use crate::users;

/// Layers of files that a mount shows are read on this machine alone, and soon.
const COMPRESSION_OF_MOUNTS: &str = "None";
/// A named context has no Dockerfile, so its ignore file has no other name than `.dockerignore`.
const NO_DOCKERFILE: &str = "";

/// What a step reads besides the layers below it.
#[derive(Default)]
pub(super) struct Sources {
    /// For the step's key.
    pub(super) digest: String,
    /// What a copy takes from a context.
    selection: Option<Selection>,
    /// What there is at each of its paths.
    pub(super) files: Option<BTreeMap<String, String>>,
    /// The context that a copy takes from.
    context: Option<Arc<Context>>,
    /// The tree that a copy takes from, where that is no context.
    layers: Vec<Layer>,
    /// The trees of a command's mounts.
    pub(super) mounts: Vec<Vec<Layer>>,
}

impl Sources {
    /// Whether a copy takes from a tree of layers.
    pub(super) fn is_of_layers(&self) -> bool {
        self.selection.is_none()
    }
}

impl Build<'_> {
    /// What a step reads besides the layers below it, and its digest for the key.
    pub(super) fn sources(&self, step: &Step) -> Result<Sources, Error> {
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
                let _place = self.jobs.place();
                let tree = context.as_ref().map(|context| context.tree());
                let selection = Selection::find(copy, tree.as_ref(), &self.fetcher)?;
                for warning in &selection.warnings {
                    self.console.line(&format!("warning: {}: {warning}", step.at));
                }
                if let Some(context) = &context {
                    context.files.read_ahead(&selection.files());
                }
                let (digest, files) = selection.digest_of_each(tree.as_ref())?;
                drop(tree);
                let digest = digest.to_string();
                let files = Some(files);
                Ok(Sources { digest, selection: Some(selection), files, context, ..Sources::default() })
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

    /// The digest of what a copy takes from a stage or image, and what that is.
    pub(super) fn contents(
        &self,
        copy: &CopyAction,
        sources: &Sources,
    ) -> Result<(String, BTreeMap<String, String>), Error> {
        let from = self.worker.tree(&sources.layers)?;
        let is_context = self.is_archive(&copy.from);
        let tree = SourceTree { root: &*from, ignore: None, is_context, shown: shown(&copy.from) };
        let (digest, files) =
            Selection::find(copy, Some(&tree), &self.fetcher)?.digest_of_each(Some(&tree))?;
        Ok((digest.to_string(), files))
    }

    /// What a copy from a context makes of an empty tree, from the cache where it can be.
    fn context_layer(&self, context: &Context, copy: &CopyAction) -> Result<Layer, Error> {
        let place = self.jobs.place();
        let tree = context.tree();
        let selection = Selection::find(copy, Some(&tree), &self.fetcher)?;
        context.files.read_ahead(&selection.files());
        let digest = selection.digest(Some(&tree))?.to_string();
        let key = StepKey::new("scratch", &Action::Copy(copy.clone()), COMPRESSION_OF_MOUNTS, &digest)?;
        // Who waits for another one's work holds no place.
        drop(place);
        let ((result, _), _) = self.steps.once(key.digest(), || {
            if let Some(result) = self.cache.find(&key, &self.store) {
                return Ok((result, true));
            }
            let _place = self.jobs.place();
            let mut writer = LayerWriter::new(&self.store, Compression::None)?;
            let now = clock::system();
            let nothing = self.worker.tree(&[])?;
            selection.write(copy, Some(&tree), &*nothing, None, now, &mut writer)?;
            let result = StepResult { layer: Some(writer.finish()?), created: clock::rfc3339(now) };
            self.cache.put(&key, &result, &About::default())?;
            Ok::<_, Error>((result, false))
        })?;
        let nothing =
            || Error::Source { what: tree.shown.clone(), reason: "it holds nothing to mount".to_owned() };
        layer_of(&result, &self.store)?.ok_or_else(nothing)
    }

    /// The layers of a stage, an image, or a context that is one.
    pub(super) fn layers_of(&self, from: &CopyFrom) -> Result<Vec<Layer>, Error> {
        match from {
            CopyFrom::Context => Ok(Vec::new()),
            CopyFrom::Stage(index) => Ok(self.stages.wait(*index)?.layers),
            CopyFrom::Image(reference) => Ok(self.fetch(reference, None)?.layers),
            CopyFrom::Named(name) => match self.options.contexts.find(name) {
                Some((_, NamedContext::Image(reference))) => Ok(self.fetch(reference, None)?.layers),
                Some((_, NamedContext::Archive(file))) => {
                    let context = Context::of_archive(file, &self.known)?;
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
    fn context_of(&self, from: &CopyFrom) -> Result<Option<Arc<Context>>, Error> {
        let name = match from {
            CopyFrom::Context => return Ok(Some(Arc::clone(&self.context))),
            CopyFrom::Named(name) => name,
            CopyFrom::Stage(_) | CopyFrom::Image(_) => return Ok(None),
        };
        let Some((_, NamedContext::Folder(folder))) = self.options.contexts.find(name) else {
            return Ok(None);
        };
        let open = || {
            let context = Arc::new(Context::open(folder, &folder.join(NO_DOCKERFILE), &self.known)?);
            self.opened.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(Arc::clone(&context));
            Ok::<_, Error>(context)
        };
        let (context, _) = self.named.once(name, open)?;
        Ok(Some(context))
    }

    /// The image, in the store. Several stages that name it fetch it once.
    pub(super) fn fetch(
        &self,
        reference: &ImageReference,
        platform: Option<&Platform>,
    ) -> Result<Image, Error> {
        let policy = if self.options.pull { PullPolicy::Always } else { PullPolicy::Missing };
        let registries = self.options.registries.clone();
        let options = PullOptions { policy, registries, platform: platform.cloned() };
        let key = format!("{reference} {}", platform.map(oci::platform_text).unwrap_or_default());
        let fetch = || base::resolve(&self.store, reference, &options, self.console);
        let (image, _) = self.images.once(&key, fetch)?;
        Ok(image)
    }

    /// Writes the layer of a copy.
    pub(super) fn copy(
        &self,
        copy: &CopyAction,
        sources: &Sources,
        below: &[Layer],
        now: Timestamp,
    ) -> Result<Option<WrittenLayer>, Error> {
        let linked = copy.is_independent();
        let lower = self.worker.tree(if linked { &[] } else { below })?;
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
}

fn unknown_context(name: &str) -> Error {
    Error::Invalid { what: format!("context {name}"), reason: "no --build-context has this name".to_owned() }
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
