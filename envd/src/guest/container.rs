//! The sandbox's container, made by libcontainer in a helper process.
//!
//! ```text
//! agent ── re-executes itself ──► helper `envd container-init`: libcontainer clones the container's PID 1,
//!   ▲                                  │ which does not exec: it becomes the spawner
//!   │◄── a line: the pid, or an error ─┘ and ends
//!   └───────────── spawner socket ─────────────► PID 1 of the container
//! ```
//!
//! libcontainer clones without an exec, allocates in the child and changes process-wide state: it wants a process with
//! one thread that it may spoil.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use oci_spec::runtime::{
    Capability, LinuxBuilder, LinuxCapabilitiesBuilder, LinuxDeviceBuilder, LinuxDeviceType,
    LinuxNamespaceBuilder, LinuxNamespaceType, Mount, MountBuilder, PosixRlimitBuilder, PosixRlimitType,
    ProcessBuilder, RootBuilder, Spec, SpecBuilder,
};

use super::cgroups::BOX_PATH;
use super::mounts::{BOX_ROOT, BUNDLE};
use crate::spawner::{self, Spawner};

const CONTAINER_ID: &str = "main";

/// libcontainer's own state.
const STATE: &str = "/run/containers";

/// The subcommand of the helper.
pub const HELPER: &str = "container-init";

/// The container's init is protected almost as the agent is: without it the sandbox is over.
const INIT_OOM_SCORE: i32 = -900;

/// Open files of a process that does not ask for more; select(2) cannot take larger numbers.
const OPEN_FILES_SOFT: u64 = 1024;

/// Creates and starts the container; gives the pid of its init and the agent's end of the spawner's socket.
pub(super) fn create() -> io::Result<(u32, OwnedFd)> {
    let spec = spec().map_err(io::Error::other)?;
    spec.save(Path::new(BUNDLE).join("config.json")).map_err(io::Error::other)?;
    // A create that failed before leaves its folder, and the next one of that id would fail.
    match fs::remove_dir_all(Path::new(STATE).join(CONTAINER_ID)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::create_dir_all(STATE)?;
    let (agent, init) = Spawner::socketpair()?;
    let mut helper = Command::new("/proc/self/exe")
        .arg(HELPER)
        .env_clear()
        .stdin(Stdio::from(init))
        .stdout(Stdio::piped())
        .spawn()?;
    let answer = helper.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
    let mut line = String::new();
    BufReader::new(answer).read_line(&mut line)?;
    // The helper itself is reaped with the orphans.
    match line.trim_end().split_once(' ') {
        Some(("pid", pid)) => {
            let pid = pid.parse().map_err(|_| io::Error::other(format!("the helper answered '{line}'")))?;
            Ok((pid, agent))
        }
        Some(("error", message)) => Err(io::Error::other(message.to_owned())),
        _ => Err(io::Error::other("the helper that makes the container died without an answer")),
    }
}

/// The helper's main function: standard input is the spawner's socket, standard output takes the answer.
pub fn init() -> io::Result<()> {
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    let answer = match build(socket) {
        Ok(pid) => format!("pid {pid}\n"),
        Err(error) => format!("error {}\n", error_chain(&*error).replace('\n', " ")),
    };
    let mut stdout = io::stdout();
    stdout.write_all(answer.as_bytes())?;
    stdout.flush()
}

fn build(socket: OwnedFd) -> Result<i32, Box<dyn std::error::Error + Send + Sync>> {
    let mut container = ContainerBuilder::new(CONTAINER_ID.to_owned(), SyscallType::default())
        .with_root_path(STATE)?
        .with_executor(BecomeSpawner { socket: Arc::new(socket) })
        .as_init(BUNDLE)
        .with_systemd(false)
        .with_detach(true)
        .build()?;
    container.start()?;
    let pid = container.pid().ok_or("libcontainer started a container without a pid")?;
    Ok(pid.as_raw())
}

fn error_chain(error: &(dyn std::error::Error + Send + Sync)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}

/// Runs the spawner in place of a program.
#[derive(Clone)]
struct BecomeSpawner {
    socket: Arc<OwnedFd>,
}

impl Executor for BecomeSpawner {
    fn exec(&self, _: &Spec) -> Result<(), ExecutorError> {
        let failed = |error: io::Error| ExecutorError::Other(error.to_string());
        // The helper's standard streams are the agent's business: its answer ends when the last writer is gone.
        let null = File::options().read(true).write(true).open("/dev/null").map_err(failed)?;
        rustix::stdio::dup2_stdin(&null).map_err(|error| failed(error.into()))?;
        rustix::stdio::dup2_stdout(&null).map_err(|error| failed(error.into()))?;
        rustix::stdio::dup2_stderr(&null).map_err(|error| failed(error.into()))?;
        let served = spawner::serve(&self.socket);
        // PID 1 must not return into the runtime's code; its end is the container's end.
        std::process::exit(i32::from(served.is_err()))
    }

    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        Ok(())
    }
}

/// The profile `sandbox`: every capability, namespaces of its own, the machine's network. The machine is the boundary.
fn spec() -> Result<Spec, oci_spec::OciSpecError> {
    let capabilities: oci_spec::runtime::Capabilities = ALL_CAPABILITIES.into_iter().collect();
    let capabilities = LinuxCapabilitiesBuilder::default()
        .bounding(capabilities.clone())
        .effective(capabilities.clone())
        .permitted(capabilities.clone())
        .inheritable(oci_spec::runtime::Capabilities::new())
        .ambient(oci_spec::runtime::Capabilities::new())
        .build()?;
    let process = ProcessBuilder::default()
        .cwd("/")
        .args(["spawner".to_owned()])
        .env(Vec::<String>::new())
        .capabilities(capabilities)
        .oom_score_adj(INIT_OOM_SCORE)
        .no_new_privileges(false)
        .rlimits([PosixRlimitBuilder::default()
            .typ(PosixRlimitType::RlimitNofile)
            .soft(OPEN_FILES_SOFT)
            .hard(super::OPEN_FILES_HARD)
            .build()?])
        .build()?;
    let namespaces = [
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Mount,
        LinuxNamespaceType::Uts,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Cgroup,
    ];
    let namespaces = namespaces
        .into_iter()
        .map(|kind| LinuxNamespaceBuilder::default().typ(kind).build())
        .collect::<Result<Vec<_>, _>>()?;
    // FUSE and VPNs are what users of sandboxes ask for most.
    let devices = [("/dev/fuse", 10, 229), ("/dev/net/tun", 10, 200)]
        .into_iter()
        .map(|(path, major, minor)| {
            LinuxDeviceBuilder::default()
                .path(path)
                .typ(LinuxDeviceType::C)
                .major(major)
                .minor(minor)
                .file_mode(0o666u32)
                .build()
        })
        .collect::<Result<Vec<_>, _>>()?;
    let linux = LinuxBuilder::default()
        .namespaces(namespaces)
        .devices(devices)
        .cgroups_path(BOX_PATH)
        .masked_paths(Vec::<String>::new())
        .readonly_paths(Vec::<String>::new())
        .build()?;
    SpecBuilder::default()
        .version("1.0.2")
        .hostname("sandbox")
        .root(RootBuilder::default().path(BOX_ROOT).readonly(false).build()?)
        .mounts(mounts()?)
        .process(process)
        .linux(linux)
        .build()
}

fn mounts() -> Result<Vec<Mount>, oci_spec::OciSpecError> {
    let table: [(&str, &str, &[&str]); 7] = [
        ("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        ("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        ("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
        ("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777"]),
        ("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        ("/sys", "sysfs", &["nosuid", "noexec", "nodev"]),
        ("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime"]),
    ];
    table
        .into_iter()
        .map(|(at, kind, options)| {
            MountBuilder::default()
                .destination(at)
                .typ(kind)
                .source(kind)
                .options(options.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>())
                .build()
        })
        .collect()
}

/// Every capability of Linux 6.1 (`linux/capability.h`).
const ALL_CAPABILITIES: [Capability; 41] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::LinuxImmutable,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetAdmin,
    Capability::NetRaw,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysChroot,
    Capability::SysPtrace,
    Capability::SysPacct,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysNice,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Mknod,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Setfcap,
    Capability::MacOverride,
    Capability::MacAdmin,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];
