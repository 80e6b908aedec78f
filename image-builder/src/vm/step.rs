//! A `RUN` step as the machine is told it: its disks, its user, its environment, its mounts.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use dockerfile::{Mount as Asked, MountKind, Network, Owner, Sharing};
use envd_proto::build::{LOST_FOUND, Mount, Step, What};
use envd_proto::control::{Interface, Network as GuestNetwork, Route, interface};
use oci::{Hasher, Layer};
use rootfs_tools::NodeId;

use super::disks::write_folder;
use super::machine::Disk;
use super::tree::LayerTree;
use super::{FOLDER_OF_CACHES, VmWorker};
use crate::error::{Error, at};
use crate::plan::RunMount;
use crate::run::{CA_VARIABLES, SECRETS};
use crate::tree::{Escape, Last, resolve};
use crate::users;
use crate::worker::RunStep;

/// QEMU's user networking (its documentation, "Using the user mode network stack"): the guest, the host, and the resolver.
const GUEST: &str = "10.0.2.15/24";
const HOST: &str = "10.0.2.2/32";
const RESOLVER: &str = "10.0.2.3";

/// The names that every machine has.
const HOSTS: &str = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\tbuild\n";

/// What a step writes to beside the image, in one place.
const UPPER: &str = "upper";

/// Where secrets are that name no place.
const DEFAULT_SECRETS: &str = "/run/secrets";

/// A step, ready for its machine.
pub(super) struct Prepared {
    pub(super) step: Step,
    pub(super) disks: Vec<Disk>,
    /// The file of the disk that it writes to.
    pub(super) upper: PathBuf,
    caches: Vec<HeldCache>,
}

/// The disk of a cache mount, ours as long as the lock is held.
struct HeldCache {
    kept: PathBuf,
    /// Its name while it is in use: what a machine that died has left is not used again.
    used: PathBuf,
    _lock: File,
}

impl Prepared {
    /// The machine has ended in order: what it wrote to the caches stays.
    pub(super) fn keep(&self) -> Result<(), Error> {
        self.caches.iter().try_for_each(|cache| fs::rename(&cache.used, &cache.kept).map_err(at(&cache.kept)))
    }
}

/// Finds and makes all that the step needs.
pub(super) fn prepare(
    step: &RunStep<'_>,
    image: &LayerTree,
    scratch: &Path,
    worker: &VmWorker<'_>,
) -> Result<Prepared, Error> {
    let action = step.action;
    let user = users::user(image, &action.user)?;
    let mut plan = Plan { image, worker, disks: Vec::new(), mounts: Vec::new(), caches: Vec::new() };
    let mut env: BTreeMap<String, String> = BTreeMap::new();
    let mut order = Vec::new();
    for (name, value) in action.env.iter().chain(&action.proxy_env) {
        if env.insert(name.clone(), value.clone()).is_none() {
            order.push(name.clone());
        }
    }
    let mut set_default = |name: &str, value: String| {
        if !env.contains_key(name) {
            order.push(name.to_owned());
            env.insert(name.to_owned(), value);
        }
    };
    set_default("HOME", user.home.clone());
    let lowers = plan.image_disks("image", step.layers)?;
    let upper = scratch.join("upper.ext4");
    rootfs_tools::empty(
        &upper,
        worker.machines.options().disk,
        Some(UPPER),
        upper.as_os_str().as_encoded_bytes(),
    )?;
    plan.disks.push(Disk { serial: UPPER.to_owned(), file: upper.clone(), read_only: false });
    let network = match action.network {
        Network::Default if worker.machines.options().offline => None,
        Network::Default => Some(network()),
        Network::None => None,
        Network::Host => {
            return Err(Error::Invalid {
                what: "RUN --network=host".to_owned(),
                reason:
                    "a step in a machine of its own has not the host's network: leave it out, or build with \
                         --isolation container"
                        .to_owned(),
            });
        }
    };
    let resolv_conf = match network {
        Some(_) => format!("nameserver {RESOLVER}\n"),
        None => String::new(),
    };
    plan.file("/etc/resolv.conf", resolv_conf.as_bytes(), 0o644, false)?;
    plan.file("/etc/hosts", HOSTS.as_bytes(), 0o644, false)?;
    if let Some(ca) = &worker.build.host_ca {
        plan.file(&format!("{SECRETS}/ca.crt"), &fs::read(ca).map_err(at(ca))?, 0o444, true)?;
        let apt = format!("Acquire::https::CaInfo \"{SECRETS}/ca.crt\";\n");
        plan.file(&format!("{SECRETS}/apt.conf"), apt.as_bytes(), 0o444, true)?;
        for variable in CA_VARIABLES {
            set_default(variable, format!("{SECRETS}/ca.crt"));
        }
        set_default("APT_CONFIG", format!("{SECRETS}/apt.conf"));
    }
    if let Some(script) = &action.script {
        plan.file(&script.path, script.contents.as_bytes(), 0o755, true)?;
    }
    for (mount, layers) in action.mounts.iter().zip(step.mounts) {
        if let Some((name, value)) = plan.mount(mount, layers, &action.workdir)?
            && env.insert(name.clone(), value).is_none()
        {
            order.push(name);
        }
    }
    let Plan { disks, mounts, caches, .. } = plan;
    let env = order.into_iter().filter_map(|name| env.remove_entry(&name)).collect();
    let step = Step {
        argv: action.argv.clone(),
        env,
        workdir: action.workdir.clone(),
        hostname: "build".to_owned(),
        uid: user.uid,
        gid: user.gid,
        groups: user.groups,
        lowers,
        hide_lost_found: has_no_lost_found(image),
        upper: UPPER.to_owned(),
        mounts,
        network,
    };
    Ok(Prepared { step, disks, upper, caches })
}

/// The way out. The host's loopback, which QEMU shows as an address of the network, is the guest's own instead, and the
/// gateway is another one of QEMU's addresses: a step, which may not change the network, has no way there.
fn network() -> GuestNetwork {
    let interface = |name: &str, addresses: &[&str], routes: Vec<Route>| Interface {
        interface: Some(interface::Interface::Name(name.to_owned())),
        addresses: addresses.iter().map(|address| (*address).to_owned()).collect(),
        routes,
        ..Interface::default()
    };
    let default = Route { gateway: RESOLVER.to_owned(), ..Route::default() };
    GuestNetwork {
        interfaces: vec![
            interface("lo", &["127.0.0.1/8", "::1/128", HOST], Vec::new()),
            interface("eth0", &[GUEST], vec![default]),
        ],
        dns_servers: vec![RESOLVER.to_owned()],
        ..GuestNetwork::default()
    }
}

fn has_no_lost_found(tree: &LayerTree) -> bool {
    tree.nodes().child(NodeId::ROOT, LOST_FOUND.as_bytes()).is_none()
}

/// What a step is made of, as it grows.
struct Plan<'a> {
    image: &'a LayerTree,
    worker: &'a VmWorker<'a>,
    disks: Vec<Disk>,
    mounts: Vec<Mount>,
    caches: Vec<HeldCache>,
}

impl Plan<'_> {
    /// Attaches the disks of an image; gives their serials.
    fn image_disks(&mut self, name: &str, layers: &[Layer]) -> Result<Vec<String>, Error> {
        let files = self.worker.disks.of(layers, self.worker.build.console)?;
        let mut serials = Vec::new();
        for (number, file) in files.into_iter().enumerate() {
            let serial = format!("{name}-{number}");
            serials.push(serial.clone());
            self.disks.push(Disk { serial, file, read_only: true });
        }
        Ok(serials)
    }

    fn push(&mut self, target: &str, read_only: bool, what: What) -> Result<(), Error> {
        let target = resolve(self.image, target.as_bytes(), Last::Follow, Escape::Clamp)?;
        let target = String::from_utf8(target.as_bytes().to_vec()).map_err(|_| Error::Invalid {
            what: format!("mount at {target}"),
            reason: "links of the image lead to a path that is no text".to_owned(),
        })?;
        self.mounts.push(Mount { target: format!("/{target}"), read_only, what });
        Ok(())
    }

    fn file(&mut self, target: &str, contents: &[u8], mode: u32, read_only: bool) -> Result<(), Error> {
        let contents = BASE64.encode(contents);
        self.push(target, read_only, What::File { contents, mode, uid: 0, gid: 0 })
    }

    /// One `--mount`; gives the variable that it sets, where it sets one.
    fn mount(
        &mut self,
        mount: &RunMount,
        layers: &[Layer],
        workdir: &str,
    ) -> Result<Option<(String, String)>, Error> {
        let Asked { kind, target, read_only } = &mount.mount;
        // Relative ones are meant from the working directory.
        let target = target.as_ref().map(|target| match target.starts_with('/') {
            true => target.clone(),
            false => format!("{workdir}/{target}"),
        });
        let named = || target.clone().unwrap_or_default();
        match kind {
            MountKind::Bind { .. } => {
                let path = mount.source.as_ref().map(|source| source.path.clone()).unwrap_or_default();
                let what = self.tree(layers, path)?;
                self.push(&named(), *read_only, what)?;
            }
            MountKind::Tmpfs { size } => self.push(&named(), *read_only, What::Tmpfs { size: *size })?,
            MountKind::Cache { id, sharing, owner, .. } => {
                let id = id.clone().unwrap_or_else(named);
                let path = mount.source.as_ref().map(|source| source.path.as_str()).unwrap_or_default();
                let what = self.cache(&id, *sharing, owner, layers, path)?;
                self.push(&named(), *read_only, what)?;
            }
            MountKind::Secret { id, env, required, owner } => {
                return self.secret(id.as_deref(), env.as_deref(), *required, owner, target);
            }
            MountKind::Ssh { .. } => {
                return Err(Error::Invalid {
                    what: "RUN --mount=type=ssh".to_owned(),
                    reason: "it is not supported yet".to_owned(),
                });
            }
        }
        Ok(None)
    }

    /// The tree of the layers as one disk: a step has room for few, and a mount is seldom on a chain of many steps.
    fn tree(&mut self, layers: &[Layer], path: String) -> Result<What, Error> {
        let worker = self.worker;
        let tree = worker.disks.tree(layers)?;
        let file = worker.disks.make_whole(layers, worker.build.console)?;
        let serial = format!("mount-{}", self.disks.len());
        self.disks.push(Disk { serial: serial.clone(), file, read_only: true });
        Ok(What::Tree { lowers: vec![serial], hide_lost_found: has_no_lost_found(&tree), path })
    }

    fn secret(
        &mut self,
        id: Option<&str>,
        env: Option<&str>,
        required: bool,
        owner: &Owner,
        target: Option<String>,
    ) -> Result<Option<(String, String)>, Error> {
        let of_target = || target.as_deref().and_then(|target| target.rsplit('/').next()).unwrap_or_default();
        let id = id.unwrap_or_else(of_target).to_owned();
        let missing = |reason: String| Error::Invalid { what: format!("secret {id}"), reason };
        let Some(value) = self.worker.build.secrets.value(&id) else {
            return match required {
                true => Err(missing(format!("the step needs it: give it with --secret id={id},src=FILE"))),
                false => Ok(None),
            };
        };
        let file = match (&target, env) {
            (Some(target), _) => Some(target.clone()),
            (None, Some(_)) => None,
            (None, None) => Some(format!("{DEFAULT_SECRETS}/{id}")),
        };
        let text = env.map(|_| String::from_utf8(value.to_vec())).transpose();
        let text = text.map_err(|_| missing("a variable cannot hold it: it is no text".to_owned()))?;
        if let Some(file) = file {
            let what = What::File {
                contents: BASE64.encode(value),
                mode: owner.mode.unwrap_or(0o400),
                uid: owner.uid.unwrap_or(0),
                gid: owner.gid.unwrap_or(0),
            };
            self.push(&file, true, what)?;
        }
        Ok(env.map(str::to_owned).zip(text))
    }

    /// The disk of a cache. A disk has one writer: who shares a cache waits for it.
    fn cache(
        &mut self,
        id: &str,
        sharing: Sharing,
        owner: &Owner,
        layers: &[Layer],
        path: &str,
    ) -> Result<What, Error> {
        let folder = self.worker.machines.cache().join(FOLDER_OF_CACHES);
        fs::create_dir_all(&folder).map_err(at(&folder))?;
        let name = Hasher::digest_of(id.as_bytes()).digest().to_owned();
        let (name, lock) = lock(&folder, &name, sharing, self)?;
        let (kept, used) = (folder.join(format!("{name}.ext4")), folder.join(format!("{name}.used")));
        let bytes = self.worker.machines.options().disk;
        let mode = owner.mode.unwrap_or(0o755);
        let _ = fs::remove_file(&used);
        match fs::rename(&kept, &used) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let from = match layers {
                    [] => None,
                    layers => {
                        let tree = self.worker.disks.tree(layers)?;
                        let mut nodes = tree.nodes().clone();
                        let found = nodes.resolve(path.as_bytes(), None).ok().flatten();
                        let found = found.ok_or_else(|| Error::Source {
                            what: format!("the source {path:?} of the cache {id}"),
                            reason: "there is no such directory".to_owned(),
                        })?;
                        Some((tree, found))
                    }
                };
                match from {
                    None => rootfs_tools::empty(&used, bytes, Some("cache"), name.as_bytes())?,
                    Some((tree, found)) => {
                        write_folder(&tree, found, envd_proto::build::UPPER, bytes, &used)?;
                    }
                }
            }
            Err(error) => return Err(at(&kept)(error)),
        }
        let serial = format!("cache-{}", self.disks.len());
        self.disks.push(Disk { serial: serial.clone(), file: used.clone(), read_only: false });
        self.caches.push(HeldCache { kept, used, _lock: lock });
        Ok(What::Kept { serial, mode, uid: owner.uid.unwrap_or(0), gid: owner.gid.unwrap_or(0) })
    }
}

/// Takes the lock of a cache; a private one that is in use has others beside it.
fn lock(folder: &Path, name: &str, sharing: Sharing, plan: &Plan<'_>) -> Result<(String, File), Error> {
    let open = |name: &str| {
        let path = folder.join(format!("{name}.lock"));
        let options = File::options().read(true).write(true).create(true).truncate(false).open(&path);
        options.map_err(at(&path)).map(|file| (path, file))
    };
    if sharing == Sharing::Private {
        for number in 0.. {
            let name = format!("{name}-{number}");
            let (_, file) = open(&name)?;
            if file.try_lock().is_ok() {
                return Ok((name, file));
            }
        }
    }
    let (path, file) = open(name)?;
    if file.try_lock().is_err() {
        let _work = plan.worker.build.console.work("waiting for another step's use of a cache", None);
        file.lock().map_err(at(&path))?;
    }
    Ok((name.to_owned(), file))
}
