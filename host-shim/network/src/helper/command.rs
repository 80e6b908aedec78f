//! Programs that the helper runs, and where.

use std::fs::File;
use std::io::Write;
use std::process::{Command, Output, Stdio};

use nix::sched::{CloneFlags, setns, unshare};

use crate::network::Namespace;
use crate::{Error, Missing, host};

/// What of a program's words goes into an error.
const MAX_WORDS: usize = 2000;

/// A fresh network namespace, held by a descriptor only.
pub(super) fn namespace() -> Result<Namespace, Error> {
    let make = || {
        unshare(CloneFlags::CLONE_NEWNET).map_err(Error::io("make a network namespace"))?;
        File::open("/proc/thread-self/ns/net").map_err(Error::io("open the network namespace"))
    };
    on_a_thread(make)
}

/// Does `work` in that namespace. What it starts is in there too.
pub(super) fn inside<T: Send>(
    namespace: &Namespace,
    work: impl FnOnce() -> Result<T, Error> + Send,
) -> Result<T, Error> {
    on_a_thread(|| {
        setns(namespace, CloneFlags::CLONE_NEWNET).map_err(Error::io("enter the network namespace"))?;
        work()
    })
}

/// A thread's namespace is its own, and ends with it.
fn on_a_thread<T: Send>(work: impl FnOnce() -> Result<T, Error> + Send) -> Result<T, Error> {
    std::thread::scope(|scope| {
        scope.spawn(work).join().unwrap_or_else(|_| Err(Error::Step("a thread panicked".to_owned())))
    })
}

/// A command for a program of the host.
pub(super) fn command(name: &str) -> Result<Command, Error> {
    let program = host::program(name)
        .ok_or_else(|| Missing { what: name.to_owned(), remedy: "it was there a moment ago".to_owned() })?;
    let mut command = Command::new(program);
    // The words of errors are compared with, and nothing is written to anybody's home.
    command.env("LC_ALL", "C").env("HOME", "/nonexistent").current_dir("/");
    Ok(command)
}

/// Runs a program to its end with `input`, and returns what it printed.
pub(super) fn run(mut command: Command, what: &str, input: Option<&str>) -> Result<String, Error> {
    if input.is_some() {
        command.stdin(Stdio::piped());
    }
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let failed = |error: std::io::Error| Error::Step(format!("{what}: {error}"));
    let mut child = command.spawn().map_err(failed)?;
    let stdin = child.stdin.take();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || {
            if let (Some(mut stdin), Some(input)) = (stdin, input) {
                // A program that has seen enough says why.
                let _ = stdin.write_all(input.as_bytes());
            }
        });
        child.wait_with_output()
    });
    let Output { status, stdout, stderr } = output.map_err(failed)?;
    if status.success() {
        return Ok(String::from_utf8_lossy(&stdout).into_owned());
    }
    let words = String::from_utf8_lossy(&stderr);
    let words: String = words.trim().chars().take(MAX_WORDS).collect();
    Err(Error::Step(format!("{what}: {words} ({status})")))
}

/// Carries out lines of `ip`, in the calling thread's namespace.
pub(super) fn ip(what: &str, lines: &str) -> Result<(), Error> {
    let mut command = command("ip")?;
    command.args(["-batch", "-"]);
    run(command, what, Some(lines)).map(drop)
}

/// Sets a value of the calling thread's namespace.
pub(super) fn sysctl(name: &str, value: &str) -> Result<(), Error> {
    let file = format!("/proc/sys/{name}");
    std::fs::write(&file, value).map_err(|error| Error::Step(format!("{file}: {error}")))
}
