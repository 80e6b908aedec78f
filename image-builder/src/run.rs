//! `RUN`: a command in a container over the overlay.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use dockerfile::Network as StepNetwork;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde::Serialize;

use crate::cgroups::Controllers;
use crate::console::Console;
use crate::container::{ORDER_FILE, OUTCOME_FILE, Order, Outcome};
use crate::error::{Error, at};
use crate::ids;
use crate::interrupt::Interrupt;
use crate::limits::StepLimits;
use crate::mount_points::MountPoints;
use crate::mounts::Mounts;
use crate::plan::RunAction;
use crate::rooted::Rooted;
use crate::secrets::Secrets;
use crate::spec::{self, bind};
use crate::tree::{Escape, Last};
use crate::users;

/// Where the host's certificates are in the container, on a mount that ends with the step.
pub(crate) const SECRETS: &str = "/run/tiffin-build";
/// What asks for another bundle than the system's. Each is set for the step alone.
pub(crate) const CA_VARIABLES: [&str; 13] = [
    "AWS_CA_BUNDLE",
    "CARGO_HTTP_CAINFO",
    "CLOUDSDK_CORE_CUSTOM_CA_CERTS_FILE",
    "CURL_CA_BUNDLE",
    "DENO_CERT",
    "GIT_SSL_CAINFO",
    "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
    "HTTPLIB2_CA_CERTS",
    "NIX_SSL_CERT_FILE",
    "NODE_EXTRA_CA_CERTS",
    "PIP_CERT",
    "REQUESTS_CA_BUNDLE",
    "SSL_CERT_FILE",
];
/// The bundle's file system: scripts, secrets and what the runtime writes. Nothing honest comes near it.
const BUNDLE_SIZE: &str = "size=64m,mode=0700";
/// apt gives its downloads to another user, who does not exist in a namespace of one id.
const APT_ONE_ID: &str = "APT::Sandbox::User \"root\";\n";

/// What the command line says about all `RUN` steps.
#[derive(Clone, Debug, Default)]
pub struct RunOptions {
    /// `--secret`.
    pub secrets: Secrets,
    /// `--network`.
    pub network: Network,
    /// What a step may use.
    pub limits: StepLimits,
}

/// The network of steps that name none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Network {
    /// This machine's.
    #[default]
    Host,
    /// None; also a step with `--network=host` gets none.
    None,
}

/// A folder in memory for a step's files: the spec and secrets are never on disk.
#[derive(Debug)]
pub(crate) struct Bundle(PathBuf);

impl Bundle {
    /// Makes the folder.
    pub(crate) fn make(path: PathBuf) -> Result<Self, Error> {
        fs::create_dir(&path).map_err(at(&path))?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        let options = std::ffi::CString::new(BUNDLE_SIZE).unwrap_or_default();
        mount("tmpfs", &path, "tmpfs", flags, options.as_c_str()).map_err(at(&path))?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// What a step needs from its build.
pub(crate) struct Environment<'a> {
    /// The tree, mounted.
    pub(crate) merged: PathBuf,
    /// A folder for the container's files, outside of the tree.
    pub(crate) bundle: &'a Bundle,
    /// The container's name, which no other container of this machine has.
    pub(crate) id: String,
    /// Nobody removes the step's folder as long as a process has this.
    pub(crate) lock: fs::File,
    /// The host's certificates, where they are wanted.
    pub(crate) host_ca: Option<&'a Path>,
    /// This program.
    pub(crate) program: &'a Path,
    pub(crate) options: &'a RunOptions,
    pub(crate) controllers: &'a Controllers,
    pub(crate) console: &'a Console,
    pub(crate) interrupt: &'a Interrupt,
    /// The mark before each line of the command's output.
    pub(crate) prefix: String,
}

/// Runs the command. The result is in the overlay's upper directory; what was made there for the container alone must
/// be taken away with [`MountPoints::remove`].
pub(crate) fn run(
    action: &RunAction,
    given: Mounts,
    environment: Environment<'_>,
) -> Result<MountPoints, Error> {
    let own_network = own_network(action.network, environment.options.network)?;
    let bundle = environment.bundle.path();
    let root = Rooted::open(&environment.merged)?;
    let user = users::user(&root, &action.user)?;
    let mut env = action.env.clone();
    env.extend(action.proxy_env.iter().cloned());
    // Over a variable of the image.
    env.retain(|(name, _)| !given.env.iter().any(|(secret, _)| secret == name));
    env.extend(given.env.iter().cloned());
    let mut set_default = |name: &str, value: &str| {
        if !env.iter().any(|(known, _)| known == name) {
            env.push((name.to_owned(), value.to_owned()));
        }
    };
    set_default("HOME", &user.home);
    let mut mounts = Vec::new();
    let mut points = vec![(b"/proc".to_vec(), true), (b"/dev".to_vec(), true), (b"/sys".to_vec(), true)];
    for name in ["resolv.conf", "hosts"] {
        // A copy: the command may write to it, and the host's must not change.
        let copy = bundle.join(name);
        match fs::copy(Path::new("/etc").join(name), &copy) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(at(&Path::new("/etc").join(name))(error)),
        }
        let inside = root.resolve(format!("/etc/{name}").as_bytes(), Last::Follow, Escape::Clamp)?;
        mounts.push(bind(&copy, &inside.to_string(), &["bind", "rw"]));
        points.push((inside.as_bytes().to_vec(), false));
    }
    if environment.host_ca.is_some() || ids::are_one() {
        let folder = bundle.join("for-the-step");
        fs::create_dir(&folder).map_err(at(&folder))?;
        let mut apt = String::new();
        if ids::are_one() {
            apt.push_str(APT_ONE_ID);
        }
        if let Some(ca) = environment.host_ca {
            fs::copy(ca, folder.join("ca.crt")).map_err(at(ca))?;
            apt.push_str(&format!("Acquire::https::CaInfo \"{SECRETS}/ca.crt\";\n"));
            for variable in CA_VARIABLES {
                set_default(variable, &format!("{SECRETS}/ca.crt"));
            }
        }
        fs::write(folder.join("apt.conf"), apt).map_err(at(&folder))?;
        set_default("APT_CONFIG", &format!("{SECRETS}/apt.conf"));
        let inside = root.resolve(SECRETS.as_bytes(), Last::Follow, Escape::Clamp)?;
        mounts.push(bind(&folder, &inside.to_string(), &["bind", "ro", "nosuid", "nodev", "noexec"]));
        points.push((inside.as_bytes().to_vec(), true));
    }
    if let Some(script) = &action.script {
        let file = bundle.join("script");
        fs::write(&file, &script.contents).map_err(at(&file))?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).map_err(at(&file))?;
        // In /dev, which is a file system of the container's own: nothing of it is left in the tree.
        mounts.push(bind(&file, &script.path, &["bind", "ro", "nosuid", "nodev"]));
    }
    mounts.extend(given.specs.iter().cloned());
    points.extend(given.points.iter().cloned());
    let limits = &environment.options.limits;
    let container =
        spec::Container { root: &environment.merged, id: &environment.id, user: &user, env: &env, mounts };
    write_json(&bundle.join("config.json"), &spec::spec(action, container, limits))?;
    let order = Order {
        own_network,
        locks: given.locks.clone(),
        limits: limits.clone(),
        controllers: environment.controllers.clone(),
    };
    write_json(&bundle.join(ORDER_FILE), &order)?;

    let points = MountPoints::make(&root, &points)?;
    drop(root);
    start(environment)?;
    Ok(points)
}

/// Whether the step gets a network of its own, with nothing in it.
fn own_network(step: StepNetwork, build: Network) -> Result<bool, Error> {
    match (step, build) {
        (StepNetwork::None, _) | (StepNetwork::Default, Network::None) => Ok(true),
        (StepNetwork::Default | StepNetwork::Host, Network::Host) => Ok(false),
        // Whoever builds says what a Dockerfile may reach.
        (StepNetwork::Host, Network::None) => Err(Error::Invalid {
            what: "RUN --network=host".to_owned(),
            reason: "the build has no network (--network); leave one of the two out".to_owned(),
        }),
    }
}

fn write_json(file: &Path, value: &impl Serialize) -> Result<(), Error> {
    let text = serde_json::to_vec(value).map_err(|error| at(file)(std::io::Error::from(error)))?;
    fs::write(file, text).map_err(at(file))
}

fn start(environment: Environment<'_>) -> Result<(), Error> {
    let program = environment.program;
    let mut child = Command::new(program)
        .arg("run-container")
        .arg(environment.bundle.path())
        .arg(&environment.id)
        .arg(std::process::id().to_string())
        .stdin(environment.lock)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // The terminal's Ctrl-C is for us; we end the step.
        .process_group(0)
        .spawn()
        .map_err(at(program))?;
    environment.interrupt.watch(child.id());
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let status = std::thread::scope(|scope| {
        if let Some(stdout) = stdout {
            scope.spawn(|| drop(environment.console.stream(&environment.prefix, stdout)));
        }
        if let Some(stderr) = stderr {
            scope.spawn(|| drop(environment.console.stream(&environment.prefix, stderr)));
        }
        child.wait()
    });
    environment.interrupt.unwatch(child.id());
    let status = status.map_err(at(program))?;
    environment.interrupt.check()?;

    let file = environment.bundle.path().join(OUTCOME_FILE);
    let limits = &environment.options.limits;
    let outcome = fs::read(&file).ok().and_then(|text| serde_json::from_slice(&text).ok());
    match outcome {
        Some(Outcome::Exited(0)) => Ok(()),
        Some(Outcome::Exited(code)) => Err(Error::Command { outcome: format!("exited with code {code}") }),
        Some(Outcome::Killed(signal)) => Err(Error::Command { outcome: format!("was killed by {signal}") }),
        Some(Outcome::OutOfMemory) => {
            let limit = limits.memory.unwrap_or_default() >> 20;
            Err(Error::Command { outcome: format!("ran out of memory (--memory {limit} MiB)") })
        }
        Some(Outcome::TimedOut) => {
            let limit = limits.timeout.unwrap_or_default();
            Err(Error::Command {
                outcome: format!("took longer than --step-timeout {limit:?}, and was killed"),
            })
        }
        Some(Outcome::Failed(reason)) => Err(Error::Container { reason }),
        Some(Outcome::Interrupted) => Err(Error::Interrupted),
        None => Err(Error::Container {
            reason: format!("the container helper ended without a result ({status})"),
        }),
    }
}
