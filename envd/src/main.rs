//! `envd`: the agent's binary.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use envd::agent::{Listen, Place, Service};
use envd::host::HostAddress;
use envd::{doors, guest, spawner};
use envd_proto::boot::Profile;
use lexopt::ValueExt;

const HELP: &str = "\
envd: the agent inside a sandbox

As PID 1 of a machine it takes no options: it boots the machine, makes the container and serves its host. It is the /init of
an initramfs (rootfs-tools guest-image), or init=/sbin/envd of a disk (rootfs-tools bake).

Under another init, or in a shell, it is a service:

  envd --listen unix:/tmp/envd.sock --no-container
  curl --unix-socket /tmp/envd.sock http://sandbox/health
  envd --control vsock --listen vsock --container /srv/image

envd/README.md has the calls, the unit for systemd and a client.

Options:
  --listen vsock|unix:PATH    where clients call: vsock ports 49983 (calls) and 49984 (TCP ports), or a Unix socket (calls)
  --listen-ports unix:PATH    a Unix socket for TCP ports
  --control vsock[:PORT]|unix:PATH
                              dial the host there (vsock port 1024 when none is given) and speak JSON lines; it is retried
                              for ever, and client calls are refused until it configures. Without this there is no host
  --no-container              processes and files are those of the machine that envd runs on
  --container DIR             a container with this root directory; needs root and cgroups of version 2
  --profile PROFILE           what the container may do: sandbox (default) or restricted
  --version                   print the version
  --help                      print this

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
  envd.rootfs=DEVICE          the root file system of the container (default: from an initramfs the virtio disk with serial
                              'rootfs', else the disk that the machine runs from)
  envd.scratch=DEVICE         the writable disk over it (default: the virtio disk with serial 'scratch'; needed only from an
                              initramfs)

Exit codes: 0 ended by its host, SIGTERM or SIGINT, 1 failure, 2 bad usage.
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
    if first == Some(envd_proto::build::COMMAND) {
        return finish(guest::build_step());
    }
    if first == Some(spawner::CHILD) {
        return finish(spawner::child());
    }
    if first == Some(doors::REHEARSAL) {
        println!("nothing");
        return ExitCode::SUCCESS;
    }
    // A kernel hands on words that it does not know, but no options: as PID 1 of a container, envd can be a service.
    let has_option = arguments.iter().any(|argument| argument.as_encoded_bytes().starts_with(b"--"));
    if std::process::id() == 1 && !has_option {
        guest::run();
    }
    match parse(arguments) {
        Ok(Command::Print(text)) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Ok(Command::Serve(service)) => finish(service.run()),
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

#[derive(Debug)]
enum Command {
    Print(String),
    Serve(Service),
}

fn parse(arguments: Vec<OsString>) -> Result<Command, lexopt::Error> {
    let mut parser = lexopt::Parser::from_args(arguments);
    let (mut listen, mut ports, mut host) = (None, None, None);
    let (mut container, mut profile, mut no_container) = (None, None, false);
    while let Some(argument) = parser.next()? {
        match argument {
            lexopt::Arg::Long("listen") => listen = Some(parser.value()?.parse::<Listen>()?),
            lexopt::Arg::Long("listen-ports") => match parser.value()?.parse::<Listen>()? {
                Listen::Unix(path) => ports = Some(path),
                Listen::Vsock => {
                    return Err("--listen-ports: expected unix:PATH; --listen vsock has both".into());
                }
            },
            lexopt::Arg::Long("control") => host = Some(parser.value()?.parse::<HostAddress>()?),
            lexopt::Arg::Long("container") => container = Some(PathBuf::from(parser.value()?)),
            lexopt::Arg::Long("profile") => profile = Some(parser.value()?.parse::<Profile>()?),
            lexopt::Arg::Long("no-container") => no_container = true,
            lexopt::Arg::Long("help") | lexopt::Arg::Short('h') => {
                return Ok(Command::Print(HELP.to_owned()));
            }
            lexopt::Arg::Long("version") | lexopt::Arg::Short('V') => {
                return Ok(Command::Print(concat!("envd ", env!("CARGO_PKG_VERSION"), "\n").to_owned()));
            }
            other => return Err(other.unexpected()),
        }
    }
    let place = match (container, profile, no_container) {
        (Some(directory), profile, false) => {
            Place::Container { directory, profile: profile.unwrap_or_default() }
        }
        (None, None, true) => Place::Machine,
        (None, Some(_), _) => return Err("--profile is a container's: --container DIR is needed".into()),
        _ => return Err("one of --no-container and --container DIR is needed".into()),
    };
    let listen = listen.ok_or("--listen vsock or --listen unix:PATH is needed: nobody could call")?;
    Ok(Command::Serve(Service { host, listen, ports, place }))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Service, String> {
        match parse(line.split(' ').map(OsString::from).collect()) {
            Ok(Command::Serve(service)) => Ok(service),
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn a_service_is_told_who_calls_and_where() {
        let service =
            parsed("--control vsock --listen unix:/a --listen-ports unix:/b --no-container").unwrap();
        assert_eq!(service.host, Some(HostAddress::Vsock(1024)));
        assert_eq!((service.listen, service.ports), (Listen::Unix("/a".into()), Some("/b".into())));
        assert_eq!(service.place, Place::Machine);
        let service = parsed("--listen vsock --container /srv --profile restricted").unwrap();
        assert_eq!(service.host, None);
        let profile = Profile::Restricted;
        assert_eq!(service.place, Place::Container { directory: "/srv".into(), profile });
        for (bad, expected) in [
            ("--listen unix:/a", "one of --no-container and --container"),
            ("--listen unix:/a --no-container --container /srv", "one of"),
            ("--listen unix:/a --no-container --profile sandbox", "--profile is a container's"),
            ("--no-container", "--listen vsock or --listen unix:PATH is needed"),
            ("--no-container --listen tcp:1", "expected vsock or unix:PATH"),
            ("--no-container --listen vsock --listen-ports vsock", "expected unix:PATH"),
            ("--no-container --listen vsock --control unix", "expected vsock, vsock:PORT or unix:PATH"),
            ("--listen vsock --container /srv --profile none", "expected sandbox or restricted"),
            ("--unknown", "invalid option"),
        ] {
            let error = parsed(bad).unwrap_err();
            assert!(error.contains(expected), "{bad}: {error}");
        }
    }
}
