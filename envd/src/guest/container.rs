//! The sandbox's container, made by libcontainer in a helper process.
//!
//! ```text
//! agent ── re-executes itself ──► helper `envd container-init`: libcontainer clones the container's PID 1,
//!   ▲                                  │ which becomes the spawner without an exec, or executes the image's init
//!   │◄── a line: the pid, or an error ─┘ and ends
//!   └───────────── spawner socket ─────────────► PID 1 of the container, or the process of [`super::enter`]
//! ```
//!
//! Where PID 1 is the spawner, its end is the container's end, and the sandbox's. Where it is the image's own init, the
//! spawner is a process beside it, which is made again when it dies; the end of the init is the sandbox's end then too.
//!
//! libcontainer clones without an exec, allocates in the child and changes process-wide state: it wants a process with
//! one thread that it may spoil.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use envd_proto::boot::{self as names, Init, Profile};
use envd_sys::SeccompFilter;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use oci_spec::runtime::Spec;

use super::boot::Arguments;
use super::init::{self, ContainerInit};
use super::mounts::BUNDLE;
use super::runtime_spec::{INIT_OOM_SCORE, runtime_spec};
use super::volumes::{self, Volume};
use super::{cgroups, mounts, profile};
use crate::spawner::{self, Spawner};

const CONTAINER_ID: &str = "main";

/// libcontainer's own state.
const STATE: &str = "/run/envd-box/state";

/// The subcommand of the helper; its arguments are the profile and the init.
pub const HELPER: &str = "container-init";

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What the command line chose for the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Choices {
    pub(super) profile: Profile,
    pub(super) init: Init,
    pub(super) volumes: Vec<String>,
    /// The score of its PID 1 when memory runs out.
    pub(super) oom_score_adj: i32,
}

impl Choices {
    /// Checks what the command line says.
    pub(super) fn parse(arguments: &Arguments) -> io::Result<Self> {
        let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidInput, what);
        let profile = arguments.profile.as_deref().map(str::parse::<Profile>).transpose();
        let decoded = |word: &String| {
            names::decode_path(word).ok_or_else(|| invalid(format!("'{word}' is not percent-encoded text")))
        };
        let init = arguments.init.as_ref().map(decoded).transpose()?;
        let init = init.as_deref().map(str::parse::<Init>).transpose();
        let mut volumes = vec![names::DOCKER_VOLUME.to_owned()];
        for word in &arguments.volumes {
            let path = names::normal_volume(&decoded(word)?);
            volumes.push(path.ok_or_else(|| invalid(format!("volume '{word}': expected an absolute path")))?);
        }
        if volumes.len() > names::MAX_VOLUMES {
            let count = volumes.len();
            return Err(invalid(format!("{count} volumes, at most {} are possible", names::MAX_VOLUMES)));
        }
        // What is on a disk itself already needs no other place.
        if !arguments.has_overlay {
            volumes.clear();
        }
        // The outer ones first: they are mounted in this order.
        volumes.sort();
        volumes.dedup();
        Ok(Self {
            profile: profile.map_err(|error| invalid(error.to_string()))?.unwrap_or_default(),
            init: init.map_err(|error| invalid(error.to_string()))?.unwrap_or_default(),
            volumes,
            oom_score_adj: INIT_OOM_SCORE,
        })
    }

    fn to_arguments(&self) -> [String; 2] {
        [self.profile.name().to_owned(), self.init.to_string()]
    }

    fn from_arguments(mut arguments: impl Iterator<Item = String>) -> Result<Self, BoxError> {
        let mut next = || arguments.next().ok_or("an argument is missing");
        Ok(Self {
            profile: next()?.parse()?,
            init: next()?.parse()?,
            volumes: Vec::new(),
            oom_score_adj: INIT_OOM_SCORE,
        })
    }
}

/// Creates and starts the container; gives its init and, where that is the spawner, the agent's end of its socket.
pub(super) fn create(choices: &Choices) -> io::Result<(ContainerInit, Option<OwnedFd>)> {
    let stop = init::check(&choices.init)?;
    cgroups::attach(&profile::device_rules(choices.profile, mounts::disks()?))?;
    if choices.profile == Profile::Restricted {
        mounts::forbid_devices()?;
    }
    let volumes =
        choices.volumes.iter().map(|path| volumes::prepare(path)).collect::<io::Result<Vec<Volume>>>()?;
    let spec = runtime_spec(choices, &volumes).map_err(io::Error::other)?;
    spec.save(Path::new(BUNDLE).join("config.json")).map_err(io::Error::other)?;
    // A create that failed before leaves its folder, and the next one of that id would fail.
    match fs::remove_dir_all(Path::new(STATE).join(CONTAINER_ID)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::create_dir_all(STATE)?;
    let (agent, init) = match choices.init {
        Init::Envd => {
            let (agent, init) = Spawner::socketpair()?;
            (Some(agent), Stdio::from(init))
        }
        Init::Image | Init::Path(_) => (None, Stdio::null()),
    };
    let mut helper = Command::new("/proc/self/exe")
        .arg(HELPER)
        .args(choices.to_arguments())
        .env_clear()
        .stdin(init)
        .stdout(Stdio::piped())
        .spawn()?;
    let answer = helper.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
    let mut line = String::new();
    BufReader::new(answer).read_line(&mut line)?;
    // The helper itself is reaped with the orphans.
    match line.trim_end().split_once(' ') {
        Some(("pid", pid)) => {
            let pid = pid.parse().map_err(|_| io::Error::other(format!("the helper answered '{line}'")))?;
            Ok((ContainerInit::new(pid, stop, &choices.init)?, agent))
        }
        Some(("error", message)) => Err(io::Error::other(message.to_owned())),
        _ => Err(io::Error::other("the helper that makes the container died without an answer")),
    }
}

/// The helper's main function: standard input is the spawner's socket, if any; standard output takes the answer.
pub fn init(arguments: impl Iterator<Item = String>) -> io::Result<()> {
    // What PID 1 inherits: nobody in the container looks into it.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    let answer = match build(arguments) {
        Ok(pid) => format!("pid {pid}\n"),
        Err(error) => format!("error {}\n", error_chain(&*error).replace('\n', " ")),
    };
    let mut stdout = io::stdout();
    stdout.write_all(answer.as_bytes())?;
    stdout.flush()
}

fn build(arguments: impl Iterator<Item = String>) -> Result<i32, BoxError> {
    let choices = Choices::from_arguments(arguments)?;
    let filter = profile::filter(choices.profile)?;
    let mut builder =
        ContainerBuilder::new(CONTAINER_ID.to_owned(), SyscallType::default()).with_root_path(STATE)?;
    builder = match choices.init {
        Init::Envd => {
            let socket = Arc::new(io::stdin().as_fd().try_clone_to_owned()?);
            builder.with_executor(BecomeSpawner { socket, filter })
        }
        Init::Image | Init::Path(_) => builder.with_executor(ExecuteInit { filter }),
    };
    let mut container = builder.as_init(BUNDLE).with_systemd(false).with_detach(true).build()?;
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

/// The helper's standard streams are the agent's business: its answer ends when the last writer is gone.
fn leave_standard_streams() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    Ok(())
}

fn failed(error: io::Error) -> ExecutorError {
    ExecutorError::Other(error.to_string())
}

/// Runs the spawner in place of a program.
#[derive(Clone)]
struct BecomeSpawner {
    socket: Arc<OwnedFd>,
    filter: Option<SeccompFilter>,
}

impl Executor for BecomeSpawner {
    fn exec(&self, _: &Spec) -> Result<(), ExecutorError> {
        leave_standard_streams().map_err(failed)?;
        let served = spawner::serve(&self.socket, self.filter.as_ref());
        // PID 1 must not return into the runtime's code; its end is the container's end.
        std::process::exit(i32::from(served.is_err()))
    }

    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        Ok(())
    }
}

/// Executes the image's own init, under the profile's filter.
#[derive(Clone)]
struct ExecuteInit {
    filter: Option<SeccompFilter>,
}

impl Executor for ExecuteInit {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let process = spec.process().as_ref();
        let program = process.and_then(|process| process.args().as_ref()?.first());
        let program = program.ok_or(ExecutorError::InvalidArg)?;
        leave_standard_streams().map_err(failed)?;
        if let Some(filter) = &self.filter {
            filter.apply().map_err(failed)?;
        }
        Err(failed(Command::new(program).exec()))
    }

    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Choices, String> {
        let words: Vec<_> = line.split(' ').map(str::to_owned).collect();
        Choices::parse(&Arguments::parse(&words, true)).map_err(|error| error.to_string())
    }

    #[test]
    fn the_command_line_chooses() {
        let plain = parse("quiet").unwrap();
        assert_eq!((plain.profile, plain.init), (Profile::Sandbox, Init::Envd));
        assert_eq!(plain.volumes, ["/var/lib/docker"]);
        let chosen = "envd.profile=restricted envd.init=/my%20init envd.volume=/data/deep envd.volume=/data/";
        let chosen = parse(chosen).unwrap();
        assert_eq!((chosen.profile, chosen.init), (Profile::Restricted, Init::Path("/my init".into())));
        assert_eq!(chosen.volumes, ["/data", "/data/deep", "/var/lib/docker"]);
    }

    #[test]
    fn what_there_is_not_is_told_with_what_there_is() {
        for (line, expected) in [
            ("envd.profile=none", "profile: expected sandbox or restricted, got \"none\""),
            ("envd.init=systemd", "init: expected envd, image or the absolute path of a program"),
            ("envd.init=%2", "'%2' is not percent-encoded"),
            ("envd.volume=data", "volume 'data': expected an absolute path"),
            ("envd.volume=/a/../b", "expected an absolute path"),
        ] {
            assert!(parse(line).unwrap_err().contains(expected), "{line}");
        }
        let many: Vec<_> = (0..names::MAX_VOLUMES).map(|n| format!("envd.volume=/v{n}")).collect();
        assert!(parse(&many.join(" ")).unwrap_err().contains("at most 64"));
    }
}
