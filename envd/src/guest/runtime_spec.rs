//! The container in the OCI runtime specification's words, for libcontainer.

use envd_proto::boot::{Init, Profile};
use oci_spec::OciSpecError;
use oci_spec::runtime::{
    Capabilities, LinuxBuilder, LinuxCapabilitiesBuilder, LinuxDevice, LinuxDeviceBuilder, LinuxDeviceType,
    LinuxNamespaceBuilder, LinuxNamespaceType, Mount, MountBuilder, PosixRlimitBuilder, PosixRlimitType,
    ProcessBuilder, RootBuilder, Spec, SpecBuilder,
};

use rustix::process::{Resource, getrlimit};

use super::cgroups::{BOX_PATH, INIT_PATH};
use super::container::Choices;
use super::mounts::BOX_ROOT;
use super::profile;
use super::volumes::Volume;

/// The container's init is protected almost as the agent is: without it the sandbox is over.
pub(super) const INIT_OOM_SCORE: i32 = -900;

/// Open files of a process that does not ask for more; select(2) cannot take larger numbers.
pub(super) const OPEN_FILES_SOFT: u64 = 1024;

/// Where an init of the image looks for programs.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The program that PID 1 is: a path of the image, or nothing for envd's own init, which is no program.
pub(super) fn init_program(init: &Init) -> Option<&str> {
    match init {
        Init::Envd => None,
        Init::Image => Some("/sbin/init"),
        Init::Path(path) => Some(path),
    }
}

/// The container: namespaces of its own, the machine's network.
pub(super) fn runtime_spec(choices: &Choices, volumes: &[Volume]) -> Result<Spec, OciSpecError> {
    let profile = choices.profile;
    let capabilities: Capabilities =
        profile::capabilities(profile).into_iter().filter(profile::is_held).collect();
    let capabilities = LinuxCapabilitiesBuilder::default()
        .bounding(capabilities.clone())
        .effective(capabilities.clone())
        .permitted(capabilities)
        .inheritable(Capabilities::new())
        .ambient(Capabilities::new())
        .build()?;
    let program = init_program(&choices.init);
    // How systemd knows that it is in a container, by https://systemd.io/CONTAINER_INTERFACE.
    let env = match program {
        Some(_) => vec!["container=tiffin".to_owned(), format!("PATH={PATH}")],
        None => Vec::new(),
    };
    // A service may have less than a machine's PID 1, and cannot give more than it has.
    let hard = getrlimit(Resource::Nofile).maximum;
    let process = ProcessBuilder::default()
        .cwd("/")
        .args([program.unwrap_or("spawner").to_owned()])
        .env(env)
        .capabilities(capabilities)
        .oom_score_adj(choices.oom_score_adj)
        // It comes with the filter, in what the init starts.
        .no_new_privileges(false)
        .rlimits([PosixRlimitBuilder::default()
            .typ(PosixRlimitType::RlimitNofile)
            .soft(OPEN_FILES_SOFT)
            .hard(hard.unwrap_or(super::OPEN_FILES_HARD).min(super::OPEN_FILES_HARD))
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
    let linux = LinuxBuilder::default()
        .namespaces(namespaces)
        .devices(devices(profile)?)
        // An init of the image manages the cgroups that it sees, so it sees only those that are its own.
        .cgroups_path(if program.is_some() { INIT_PATH } else { BOX_PATH })
        .masked_paths(profile::masked_paths(profile))
        .readonly_paths(profile::read_only_paths(profile))
        .build()?;
    let mut mounts = mounts(profile, program.is_some())?;
    for volume in volumes {
        let options = match profile {
            Profile::Sandbox => vec!["bind"],
            Profile::Restricted => vec!["bind", "nodev"],
        };
        mounts.push(mount(&volume.path, "bind", &volume.source, &options)?);
    }
    SpecBuilder::default()
        .version("1.0.2")
        .hostname("sandbox")
        .root(RootBuilder::default().path(BOX_ROOT).readonly(false).build()?)
        .mounts(mounts)
        .process(process)
        .linux(linux)
        .build()
}

/// Beside the usual ones. FUSE and VPNs are what users of sandboxes ask for most.
fn devices(profile: Profile) -> Result<Vec<LinuxDevice>, OciSpecError> {
    let devices: &[(&str, i64, i64)] = match profile {
        Profile::Sandbox => &[("/dev/fuse", 10, 229), ("/dev/net/tun", 10, 200)],
        Profile::Restricted => &[],
    };
    devices
        .iter()
        .map(|&(path, major, minor)| {
            LinuxDeviceBuilder::default()
                .path(path)
                .typ(LinuxDeviceType::C)
                .major(major)
                .minor(minor)
                .file_mode(0o666u32)
                .build()
        })
        .collect()
}

fn mount(at: &str, kind: &str, source: &str, options: &[&str]) -> Result<Mount, OciSpecError> {
    MountBuilder::default()
        .destination(at)
        .typ(kind)
        .source(source)
        .options(options.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>())
        .build()
}

fn mounts(profile: Profile, own_init: bool) -> Result<Vec<Mount>, OciSpecError> {
    let table: [(&str, &str, &[&str]); 7] = [
        ("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        ("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        ("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
        ("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777"]),
        ("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        ("/sys", "sysfs", &["nosuid", "noexec", "nodev"]),
        ("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime"]),
    ];
    let mut mounts = Vec::new();
    for (at, kind, options) in table {
        let mut options = options.to_vec();
        // As in Docker. The cgroups of an init that manages them are its own.
        if profile == Profile::Restricted && (at == "/sys" || at == "/sys/fs/cgroup" && !own_init) {
            options.push("ro");
        }
        mounts.push(mount(at, kind, kind, &options)?);
    }
    if own_init {
        mounts.push(mount("/run", "tmpfs", "tmpfs", &["nosuid", "nodev", "mode=755"])?);
    }
    Ok(mounts)
}
