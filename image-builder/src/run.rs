//! `RUN`: a command in a container over the overlay, with the host's network.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use oci::layer::{LayerPath, Timestamp};
use rustix::fs::FileType;
use serde_json::{Value, json};

use crate::console::Console;
use crate::container::{OUTCOME_FILE, Outcome};
use crate::error::{Error, at};
use crate::interrupt::Interrupt;
use crate::plan::RunAction;
use crate::rooted::{Rooted, time_of};
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
/// Docker's default set.
const CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];
/// Hidden from the container, as Docker does.
const MASKED: [&str; 9] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/firmware",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// What a step needs from its build.
pub(crate) struct Environment<'a> {
    /// The tree, mounted.
    pub(crate) merged: PathBuf,
    /// A folder for the container's files, outside of the tree.
    pub(crate) bundle: PathBuf,
    /// The container's name, which no other container of this machine has.
    pub(crate) id: String,
    /// The host's certificates, where they are wanted.
    pub(crate) host_ca: Option<&'a Path>,
    /// This program.
    pub(crate) program: &'a Path,
    pub(crate) console: &'a Console,
    pub(crate) interrupt: &'a Interrupt,
    /// The mark before each line of the command's output.
    pub(crate) prefix: String,
}

/// The mount points that were made in the tree for a step, and the times that this changed.
#[derive(Debug)]
pub(crate) struct MountPoints {
    made: Vec<LayerPath>,
    parents: Vec<(LayerPath, Timestamp)>,
}

/// Runs the command. The result is in the overlay's upper directory; what was made there for the container alone must
/// be taken away with [`MountPoints::remove`].
pub(crate) fn run(action: &RunAction, environment: &Environment<'_>) -> Result<MountPoints, Error> {
    let bundle = &environment.bundle;
    fs::create_dir_all(bundle).map_err(at(bundle))?;
    let root = Rooted::open(&environment.merged)?;
    let user = users::user(&root, &action.user)?;
    let mut env = action.env.clone();
    env.extend(action.proxy_env.iter().cloned());
    let mut set_default = |name: &str, value: &str| {
        if !env.iter().any(|(known, _)| known == name) {
            env.push((name.to_owned(), value.to_owned()));
        }
    };
    set_default("HOME", &user.home);
    let mut mounts = system_mounts();
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
    if let Some(ca) = environment.host_ca {
        let folder = bundle.join("secrets");
        fs::create_dir_all(&folder).map_err(at(&folder))?;
        let copy = folder.join("ca.crt");
        fs::copy(ca, &copy).map_err(at(ca))?;
        let apt = format!("Acquire::https::CaInfo \"{SECRETS}/ca.crt\";\n");
        fs::write(folder.join("apt.conf"), apt).map_err(at(&folder))?;
        for variable in CA_VARIABLES {
            set_default(variable, &format!("{SECRETS}/ca.crt"));
        }
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
    let spec = json!({
        "ociVersion": "1.0.2",
        "root": {"path": environment.merged, "readonly": false},
        "hostname": "build",
        "process": {
            "terminal": false,
            "user": {"uid": user.uid, "gid": user.gid, "additionalGids": user.groups, "umask": 0o022},
            "args": action.argv,
            "env": env.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>(),
            "cwd": action.workdir,
            // Only root keeps them past exec, as with Docker.
            "capabilities": {
                "bounding": CAPABILITIES,
                "effective": if user.uid == 0 { &CAPABILITIES[..] } else { &[] },
                "permitted": if user.uid == 0 { &CAPABILITIES[..] } else { &[] },
            },
            "noNewPrivileges": false,
        },
        "mounts": mounts,
        "linux": {
            "cgroupsPath": format!("/{}", environment.id),
            // No network namespace: steps have the host's network.
            "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}],
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
        },
    });
    let config = bundle.join("config.json");
    let text = serde_json::to_vec(&spec).map_err(|error| at(&config)(std::io::Error::from(error)))?;
    fs::write(&config, text).map_err(at(&config))?;

    let points = MountPoints::make(&root, &points)?;
    start(environment)?;
    Ok(points)
}

fn start(environment: &Environment<'_>) -> Result<(), Error> {
    let program = environment.program;
    let mut child = Command::new(program)
        .arg("run-container")
        .arg(&environment.bundle)
        .arg(&environment.id)
        .arg(std::process::id().to_string())
        .stdin(Stdio::null())
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

    let file = environment.bundle.join(OUTCOME_FILE);
    let outcome = fs::read(&file).ok().and_then(|text| serde_json::from_slice(&text).ok());
    match outcome {
        Some(Outcome::Exited(0)) => Ok(()),
        Some(Outcome::Exited(code)) => Err(Error::Command { outcome: format!("exited with code {code}") }),
        Some(Outcome::Killed(signal)) => Err(Error::Command { outcome: format!("was killed by {signal}") }),
        Some(Outcome::Failed(reason)) => Err(Error::Container { reason }),
        Some(Outcome::Interrupted) => Err(Error::Interrupted),
        None => Err(Error::Container {
            reason: format!("the container helper ended without a result ({status})"),
        }),
    }
}

impl MountPoints {
    /// Makes what is missing. The times of the folders above are put back at once, so that the command sees the tree
    /// as it was.
    fn make(root: &Rooted, points: &[(Vec<u8>, bool)]) -> Result<Self, Error> {
        let mut made = Self { made: Vec::new(), parents: Vec::new() };
        for (path, is_directory) in points {
            let path = root.resolve(path, Last::Follow, Escape::Clamp)?;
            if root.stat(&path)?.is_some() {
                continue;
            }
            let mut existing = path.split().map(|(parent, _)| parent).unwrap_or_default();
            while root.stat(&existing)?.is_none() {
                existing = existing.split().map(|(parent, _)| parent).unwrap_or_default();
            }
            let time = root.stat(&existing)?.map(|stat| time_of(&stat)).unwrap_or_default();
            if *is_directory {
                made.made.extend(root.make_directories(&path)?);
            } else {
                let parent = path.split().map(|(parent, _)| parent).unwrap_or_default();
                made.made.extend(root.make_directories(&parent)?);
                root.create(&path)?;
                made.made.push(path);
            }
            root.set_time(&existing, time)?;
            made.parents.push((existing, time));
        }
        Ok(made)
    }

    /// Takes away what was made and is still empty; a folder whose only change was this keeps its time.
    pub(crate) fn remove(&self, root: &Rooted) -> Result<(), Error> {
        let mut before = Vec::new();
        for (parent, _) in &self.parents {
            if let Some(stat) = root.stat(parent)? {
                before.push((parent, time_of(&stat)));
            }
        }
        for path in self.made.iter().rev() {
            let Some(stat) = root.stat(path)? else { continue };
            let empty = match FileType::from_raw_mode(stat.st_mode) {
                FileType::RegularFile => stat.st_size == 0,
                FileType::Directory => root.names(path)?.is_empty(),
                _ => false,
            };
            if empty {
                root.remove(path)?;
            }
        }
        for (parent, time) in before {
            if root.stat(parent)?.is_some() {
                root.set_time(parent, time)?;
            }
        }
        Ok(())
    }

    /// Folders of the upper directory that were copied up for a mount point and hold nothing: without them the layer
    /// is what the command did. The upper directory must not be mounted.
    pub(crate) fn prune(&self, upper: &Rooted) -> Result<(), Error> {
        for (parent, time) in &self.parents {
            let mut folder = parent.clone();
            while let Some((above, _)) = folder.split() {
                let Some(stat) = upper.stat(&folder)? else { break };
                let untouched = folder != *parent || time_of(&stat) == *time;
                if !untouched || !upper.names(&folder)?.is_empty() || is_opaque(upper, &folder)? {
                    break;
                }
                let above_time = upper.stat(&above)?.map(|stat| time_of(&stat));
                upper.remove(&folder)?;
                if let Some(time) = above_time {
                    upper.set_time(&above, time)?;
                }
                folder = above;
            }
        }
        Ok(())
    }
}

fn is_opaque(upper: &Rooted, folder: &LayerPath) -> Result<bool, Error> {
    let mut value = [0u8; 8];
    let folder = upper.directory(folder)?;
    Ok(rustix::fs::fgetxattr(&folder, "trusted.overlay.opaque", &mut value[..]).is_ok())
}

fn bind(source: &Path, destination: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": "bind", "source": source, "options": options})
}

fn system_mounts() -> Vec<Value> {
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": kind, "options": options});
    vec![
        mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
        mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
    ]
}
