//! `RUN --mount`: what a step sees besides the layers below it, and leaves no trace of.
//!
//! ```text
//! bind    files of the context, a stage or an image   their layers' folder, or an overlay; writes go to a scratch
//! cache   a folder that builds keep                    cache_mounts.rs
//! tmpfs   nothing                                      a new tmpfs
//! secret  --secret                                     a file on the bundle's tmpfs, or a variable
//! ```

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

use dockerfile::{MountKind, Owner};
use oci::Layer;
use oci::layer::LayerPath;
use serde_json::{Value, json};

use crate::cache_mounts::{Begin, CacheMount, CacheMounts};
use crate::console::Console;
use crate::container::Lock;
use crate::error::{Error, at};
use crate::ids;
use crate::layers::{LayerCache, Scratch, Stack};
use crate::overlay::Overlay;
use crate::plan::{MountSource, RunAction, RunMount};
use crate::rooted::Rooted;
use crate::secrets::Secrets;
use crate::spec::bind;
use crate::tree::{Escape, Last, Tree};

/// The mode of a secret's file where none is given, as BuildKit's.
const SECRET_MODE: u32 = 0o400;
const SECRETS: &str = "/run/secrets";

/// Where mounts come from.
pub(crate) struct MountSources<'a> {
    pub(crate) layers: &'a LayerCache,
    pub(crate) caches: &'a CacheMounts,
    pub(crate) secrets: &'a Secrets,
    pub(crate) console: &'a Console,
    /// A folder in memory.
    pub(crate) memory: &'a Path,
}

/// The mounts of a step. What they show is there as long as this is.
#[derive(Default)]
pub(crate) struct Mounts {
    /// For the spec, in order.
    pub(crate) specs: Vec<Value>,
    /// The mount points: the path in the container, and whether it is a directory.
    pub(crate) points: Vec<(Vec<u8>, bool)>,
    pub(crate) env: Vec<(String, String)>,
    /// What the step locks, each once and in one order for all steps, so that none waits for another that waits for it.
    pub(crate) locks: Vec<Lock>,
    _held: Vec<Held>,
}

// Only dropped, in the order of their fields.
#[expect(dead_code, reason = "they are held for what happens when they are dropped")]
enum Held {
    Stack(Stack),
    Discarded(Overlay, Scratch),
    Lock(File),
}

impl Mounts {
    /// Prepares the mounts of a command. `root` is its tree; `layers[i]` are what the mount `i` shows.
    pub(crate) fn prepare(
        action: &RunAction,
        layers: &[Vec<Layer>],
        root: &Rooted,
        sources: &MountSources<'_>,
    ) -> Result<Self, Error> {
        let mut mounts = Self::default();
        for (number, mount) in action.mounts.iter().enumerate() {
            let layers = layers.get(number).map(Vec::as_slice).unwrap_or_default();
            mounts.add(number, mount, layers, action, root, sources)?;
        }
        mounts.locks.sort_by(|a, b| a.file.cmp(&b.file).then(b.exclusive.cmp(&a.exclusive)));
        mounts.locks.dedup_by(|next, kept| next.file == kept.file);
        Ok(mounts)
    }

    fn add(
        &mut self,
        number: usize,
        mount: &RunMount,
        layers: &[Layer],
        action: &RunAction,
        root: &Rooted,
        sources: &MountSources<'_>,
    ) -> Result<(), Error> {
        let read_only = mount.mount.read_only;
        let target = |target: &str| -> Result<LayerPath, Error> {
            let joined = Path::new(&action.workdir).join(target);
            let target = root.resolve(joined.as_os_str().as_encoded_bytes(), Last::Follow, Escape::Clamp)?;
            match target.is_root() {
                false => Ok(target),
                true => Err(Error::Invalid {
                    what: "--mount".to_owned(),
                    reason: "the target is the root of the image itself".to_owned(),
                }),
            }
        };
        let wanted = mount.mount.target.as_deref();
        match &mount.mount.kind {
            MountKind::Bind { .. } => {
                let target = target(wanted.unwrap_or_default())?;
                self.bind(mount, layers, &target, read_only, sources)
            }
            MountKind::Cache { id, sharing, owner, .. } => {
                let wanted = wanted.unwrap_or_default();
                let id = id.as_deref().unwrap_or(wanted);
                let begin =
                    mount.source.as_ref().map(|source| open_source(source, layers, sources)).transpose()?;
                let begin: Begin<'_> = begin.as_ref().map(|(stack, path)| (stack as &dyn Tree, path.clone()));
                if let Some((tree, path)) = &begin
                    && !tree.entry(path)?.is_some_and(|entry| entry.is_directory())
                {
                    return Err(Error::Source {
                        what: path.to_string(),
                        reason: "a cache mount begins with a directory, and this is none".to_owned(),
                    });
                }
                let CacheMount { folder, lock, held } = sources.caches.open(id, *sharing, *owner, &begin)?;
                self.locks.extend(lock);
                self._held.extend(held.map(Held::Lock));
                let target = target(wanted)?;
                self.mount(bind(&folder, &target.to_string(), &bind_options(read_only)), &target, true);
                Ok(())
            }
            MountKind::Tmpfs { size } => {
                let target = target(wanted.unwrap_or_default())?;
                let mut options = vec!["nosuid".to_owned(), "nodev".to_owned(), "mode=1777".to_owned()];
                options.extend(size.map(|size| format!("size={size}")));
                if read_only {
                    options.push("ro".to_owned());
                }
                let spec = json!({
                    "destination": target.to_string(), "type": "tmpfs", "source": "tmpfs", "options": options,
                });
                self.mount(spec, &target, true);
                Ok(())
            }
            MountKind::Secret { id, env, required, owner } => {
                let last = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
                let id = id.clone().unwrap_or_else(|| wanted.map(last).unwrap_or_default());
                let Some(value) = sources.secrets.value(&id) else {
                    return match required {
                        false => Ok(()),
                        true => Err(Error::Invalid {
                            what: format!("secret {id}"),
                            reason: format!(
                                "the step requires it; give it with --secret id={id},src=FILE or --secret id={id},env=NAME"
                            ),
                        }),
                    };
                };
                if let Some(name) = env {
                    self.env.push((name.clone(), text(&id, value)?));
                }
                let path = match (wanted, env) {
                    (Some(path), _) => path.to_owned(),
                    // A variable alone.
                    (None, Some(_)) => return Ok(()),
                    (None, None) => format!("{SECRETS}/{id}"),
                };
                let target = target(&path)?;
                let file = sources.memory.join(format!("secret-{number}"));
                write_secret(&file, value, *owner)?;
                let options = ["bind", "ro", "nosuid", "nodev", "noexec"];
                self.mount(bind(&file, &target.to_string(), &options), &target, false);
                Ok(())
            }
            MountKind::Ssh { .. } => Err(Error::Invalid {
                what: "--mount=type=ssh".to_owned(),
                reason: "SSH agents are not supported yet".to_owned(),
            }),
        }
    }

    fn bind(
        &mut self,
        mount: &RunMount,
        layers: &[Layer],
        target: &LayerPath,
        read_only: bool,
        sources: &MountSources<'_>,
    ) -> Result<(), Error> {
        let whole = MountSource { from: crate::plan::CopyFrom::Context, path: String::new() };
        let source = mount.source.as_ref().unwrap_or(&whole);
        let (stack, path) = open_source(source, layers, sources)?;
        let is_directory = match stack.entry(&path)? {
            Some(entry) => entry.is_directory(),
            None => {
                return Err(Error::Source {
                    what: format!("--mount source {}", source.path),
                    reason: "there is no such file".to_owned(),
                });
            }
        };
        let (shown, held) = if read_only {
            (stack.shown(&path), Held::Stack(stack))
        } else {
            drop(stack);
            let chain = sources.layers.unpack(layers, sources.console)?;
            let scratch = sources.layers.scratch(&chain)?;
            let overlay = sources.layers.mount(&chain, &scratch)?;
            (scratch.merged().join(path.as_path()), Held::Discarded(overlay, scratch))
        };
        if shown.to_str().is_none() {
            return Err(Error::Source {
                what: format!("--mount source {}", source.path),
                reason: "its path is no UTF-8 text, which mounts need".to_owned(),
            });
        }
        self._held.push(held);
        self.mount(bind(&shown, &target.to_string(), &bind_options(read_only)), target, is_directory);
        Ok(())
    }

    fn mount(&mut self, spec: Value, target: &LayerPath, is_directory: bool) {
        self.specs.push(spec);
        self.points.push((target.as_bytes().to_vec(), is_directory));
    }
}

fn bind_options(read_only: bool) -> [&'static str; 2] {
    ["bind", if read_only { "ro" } else { "rw" }]
}

/// The tree of the layers, and the path in it without links.
fn open_source(
    source: &MountSource,
    layers: &[Layer],
    sources: &MountSources<'_>,
) -> Result<(Stack, LayerPath), Error> {
    let chain = sources.layers.unpack(layers, sources.console)?;
    let stack = Stack::mount(sources.layers, &chain)?;
    let path = stack.root.resolve(source.path.as_bytes(), Last::Follow, Escape::Clamp)?;
    Ok((stack, path))
}

fn write_secret(file: &Path, value: &[u8], owner: Owner) -> Result<(), Error> {
    fs::write(file, value).map_err(at(file))?;
    let mode = fs::Permissions::from_mode(owner.mode.unwrap_or(SECRET_MODE));
    fs::set_permissions(file, mode).map_err(at(file))?;
    match chown(file, Some(owner.uid.unwrap_or(0)), Some(owner.gid.unwrap_or(0))) {
        // With one id the command is root, whoever it should be.
        Err(_) if ids::are_one() => Ok(()),
        other => other.map_err(at(file)),
    }
}

fn text(id: &str, value: &[u8]) -> Result<String, Error> {
    match String::from_utf8(value.to_vec()) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => Err(Error::Invalid {
            what: format!("secret {id}"),
            reason: "a variable must be UTF-8 text, and this is not; mount it as a file".to_owned(),
        }),
    }
}
