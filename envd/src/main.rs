//! `envd`: the agent's binary.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use envd::{agent, guest, spawner};

const HELP: &str = "\
envd: the agent inside a Tiffin sandbox

As PID 1 of a microVM it takes no arguments: it boots the machine, makes the container and serves its host.
As an ordinary process it serves the same client API on a Unix socket:

  envd --listen unix:/tmp/envd.sock --no-container
  curl --unix-socket /tmp/envd.sock http://sandbox/health

Options:
  --listen unix:PATH   serve the client API on this socket
  --no-container       processes and files are those of the machine that envd runs on (needed with --listen)
  --version            print the version
  --help               print this

Kernel arguments, as PID 1:
  envd.channel=serial|vsock   how the host is reached (default: serial where the machine has the ports, else vsock)
  envd.control_port=N         the vsock port that the host listens on (default 1024)
  envd.container=none         no container: client calls act in envd's own root
  envd.profile=PROFILE        what the container may do: sandbox (default: all capabilities, the machine is the boundary)
                              or restricted (Docker's capabilities, seccomp and device rules, no new privileges)
  envd.init=INIT              PID 1 of the container: envd (default), image (its /sbin/init, as systemd), or the absolute
                              path of a program in the image
  envd.volume=PATH            a directory of the container that sits on the writable disk itself, not on the overlay;
                              any number of times, as /var/lib/docker always does
                              (in PATH and INIT, what is no letter, digit or one of /._-+ is percent-encoded)
  envd.rootfs=DEVICE          the root file system (default: the virtio disk with serial 'rootfs')
  envd.scratch=DEVICE         the writable disk (default: the virtio disk with serial 'scratch')

Exit codes: 0 ended by SIGTERM or SIGINT, 1 failure, 2 bad usage.
";

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let first = arguments.first().and_then(|argument| argument.to_str());
    if first == Some(guest::CONTAINER_HELPER) {
        return finish(guest::container_init(words(&arguments)));
    }
    if first == Some(guest::SPAWNER_HELPER) {
        return finish(guest::enter_container(words(&arguments)));
    }
    if first == Some(spawner::CHILD) {
        return finish(spawner::child());
    }
    if std::process::id() == 1 {
        guest::run();
    }
    match parse(arguments) {
        Ok(Command::Print(text)) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Ok(Command::Listen(path)) => finish(agent::serve_unix(&path)),
        Err(error) => {
            eprintln!("envd: {error}\nTry 'envd --help'.");
            ExitCode::from(2)
        }
    }
}

/// The arguments of a helper, which the agent itself wrote.
fn words(arguments: &[OsString]) -> impl Iterator<Item = String> {
    arguments.iter().skip(1).map(|argument| argument.to_string_lossy().into_owned())
}

enum Command {
    Print(String),
    Listen(PathBuf),
}

fn parse(arguments: Vec<OsString>) -> Result<Command, lexopt::Error> {
    let mut parser = lexopt::Parser::from_args(arguments);
    let mut listen = None;
    let mut container = true;
    while let Some(argument) = parser.next()? {
        match argument {
            lexopt::Arg::Long("listen") => {
                let value = parser.value()?;
                let path = value.to_str().and_then(|text| text.strip_prefix("unix:")).map(PathBuf::from);
                listen = Some(path.ok_or_else(|| format!("--listen {value:?}: expected unix:PATH"))?);
            }
            lexopt::Arg::Long("no-container") => container = false,
            lexopt::Arg::Long("help") | lexopt::Arg::Short('h') => {
                return Ok(Command::Print(HELP.to_owned()));
            }
            lexopt::Arg::Long("version") | lexopt::Arg::Short('V') => {
                return Ok(Command::Print(concat!("envd ", env!("CARGO_PKG_VERSION"), "\n").to_owned()));
            }
            other => return Err(other.unexpected()),
        }
    }
    let listen = listen.ok_or("not PID 1 of a microVM: --listen unix:PATH is needed")?;
    if container {
        return Err("a container is made only as PID 1 of a microVM: add --no-container".into());
    }
    Ok(Command::Listen(listen))
}

fn finish(result: std::io::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("envd: {error}");
            ExitCode::FAILURE
        }
    }
}
