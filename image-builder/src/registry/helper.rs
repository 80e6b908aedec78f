//! Programs that keep credentials: `docker-credential-NAME get|store|erase` (docker/docker-credential-helpers).

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::Deserialize;
use serde_json::json;

use super::credentials::Credential;
use super::text::printable;
use crate::error::Error;

/// A helper may have to ask somebody for a passphrase.
const DEADLINE: Duration = Duration::from_secs(60);
/// The longest answer: a name and a token.
const MAX_ANSWER: u64 = 1 << 20;
/// What helpers print, with an exit code of 1, when they know nothing.
const NOT_FOUND: &str = "credentials not found";
/// The name that says that the secret is a refresh token.
const TOKEN_USER: &str = "<token>";

/// A helper program.
#[derive(Debug)]
pub(super) struct Helper {
    program: PathBuf,
    deadline: Duration,
}

/// What a helper knows.
#[derive(Debug)]
pub(super) enum Answer {
    Found(Credential),
    Nothing,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Got {
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

impl Helper {
    /// The helper that a file names. `file` is for the error.
    pub(super) fn named(file: &Path, name: &str) -> Result<Self, Error> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if !name.bytes().all(plain) {
            return Err(Error::Invalid {
                what: file.display().to_string(),
                reason: format!(
                    "{name:?} is no name of a credential helper: expected letters, digits, '.', '_' or '-'"
                ),
            });
        }
        Ok(Self { program: format!("docker-credential-{name}").into(), deadline: DEADLINE })
    }

    pub(super) fn program(&self) -> String {
        self.program.display().to_string()
    }

    pub(super) fn fetch(&self, server: &str) -> Result<Answer, Error> {
        let (success, output) = self.run("get", server)?;
        let text = String::from_utf8_lossy(&output);
        if !success {
            return match text.contains(NOT_FOUND) {
                true => Ok(Answer::Nothing),
                false => Err(self.failed(format!("get: {}", printable(text.trim())))),
            };
        }
        // The answer holds a secret: it is not repeated.
        let got: Got = serde_json::from_slice(&output).map_err(|_| {
            self.failed("get: its answer is no JSON object of Username and Secret".to_owned())
        })?;
        Ok(match (got.username.as_str(), got.secret) {
            (_, secret) if secret.is_empty() => Answer::Nothing,
            (TOKEN_USER, secret) => Answer::Found(Credential::IdentityToken(secret)),
            (_, secret) => Answer::Found(Credential::Password { username: got.username, password: secret }),
        })
    }

    pub(super) fn store(&self, server: &str, username: &str, secret: &str) -> Result<(), Error> {
        let input = json!({"ServerURL": server, "Username": username, "Secret": secret}).to_string();
        self.done("store", &input)
    }

    pub(super) fn erase(&self, server: &str) -> Result<(), Error> {
        self.done("erase", server)
    }

    fn done(&self, verb: &str, input: &str) -> Result<(), Error> {
        match self.run(verb, input)? {
            (true, _) => Ok(()),
            (false, output) => {
                Err(self.failed(format!("{verb}: {}", printable(String::from_utf8_lossy(&output).trim()))))
            }
        }
    }

    /// Runs the helper and gives whether it succeeded, and what it printed.
    fn run(&self, verb: &str, input: &str) -> Result<(bool, Vec<u8>), Error> {
        let mut command = Command::new(&self.program);
        // What it prints on stderr is for the user: it may ask for a passphrase.
        command.arg(verb).stdin(Stdio::piped()).stdout(Stdio::piped());
        let child = command.spawn().map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => self.failed(
                "it is not in PATH, and the credentials file names it; install it, or take it out of the file".to_owned(),
            ),
            _ => self.failed(error.to_string()),
        })?;
        let mut child = Killed(child);
        let (stdin, stdout) = (child.0.stdin.take(), child.0.stdout.take());
        let input = input.as_bytes().to_owned();
        // A helper that does not read holds up a thread of its own, until it is killed.
        std::thread::spawn(move || stdin.map(|mut stdin| stdin.write_all(&input)));
        let (answer, answered) = mpsc::channel();
        std::thread::spawn(move || {
            let mut output = Vec::new();
            let read = stdout.map(|stdout| stdout.take(MAX_ANSWER + 1).read_to_end(&mut output));
            let _ = answer.send(read.transpose().map(|_| output));
        });
        let until = Instant::now() + self.deadline;
        let output = answered
            .recv_timeout(self.deadline)
            .map_err(|_| self.failed(format!("{verb}: no answer within {} s", self.deadline.as_secs())))?
            .map_err(|error| self.failed(error.to_string()))?;
        if output.len() as u64 > MAX_ANSWER {
            return Err(self.failed(format!("{verb}: it printed more than {MAX_ANSWER} bytes")));
        }
        // It has closed its output, and ends now; one that does not is killed at the deadline.
        let io = |errno: rustix::io::Errno| self.failed(errno.to_string());
        let process = pidfd_open(Pid::from_child(&child.0), PidfdFlags::empty()).map_err(io)?;
        loop {
            if let Some(status) = child.0.try_wait().map_err(|error| self.failed(error.to_string()))? {
                return Ok((status.success(), output));
            }
            let left = until.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).map_err(|error| self.failed(error.to_string()))?;
            match poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&timeout)) {
                Ok(0) => return Err(self.failed(format!("{verb}: it does not end"))),
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(io(errno)),
            }
        }
    }

    fn failed(&self, reason: String) -> Error {
        Error::Program { program: self.program(), reason }
    }
}

/// A process that ends with this.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn helper(script: &str, deadline: Duration) -> (tempfile::TempDir, Helper) {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("docker-credential-test");
        std::fs::write(&program, format!("#!/bin/sh\ncd {}\n{script}", dir.path().display())).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        (dir, Helper { program, deadline })
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn the_protocol_is_dockers() {
        let (_dir, helper) = helper(
            "case $1 in\n store) cat > kept;;\n erase) cat > erased;;\n \
             get) [ -e kept ] && cat kept || { echo 'credentials not found in native keychain'; exit 1; };;\nesac",
            LONG,
        );
        assert!(matches!(helper.fetch("reg.example").unwrap(), Answer::Nothing));
        helper.store("reg.example", "me", "pass \"word\"").unwrap();
        let Answer::Found(found) = helper.fetch("reg.example").unwrap() else { panic!("nothing was found") };
        assert_eq!(found, Credential::Password { username: "me".into(), password: "pass \"word\"".into() });
        helper.store("reg.example", "<token>", "refresh").unwrap();
        let Answer::Found(found) = helper.fetch("reg.example").unwrap() else { panic!("nothing was found") };
        assert_eq!(found, Credential::IdentityToken("refresh".into()));
        helper.erase("reg.example").unwrap();
        assert_eq!(std::fs::read_to_string(_dir.path().join("erased")).unwrap(), "reg.example");
    }

    #[test]
    fn a_helper_that_misbehaves_is_named_and_ended() {
        let reason = |script: &str, deadline| {
            let (_dir, helper) = helper(script, deadline);
            let error = helper.fetch("reg.example").unwrap_err().to_string();
            assert!(error.contains("docker-credential-test"), "{error}");
            error
        };
        assert!(reason("echo locked; exit 3", LONG).contains("locked"));
        let secret = reason("echo '{\"Secret\": \"s3cret\"'", LONG);
        assert!(secret.contains("no JSON") && !secret.contains("s3cret"), "{secret}");
        assert!(reason("exec cat /dev/zero", LONG).contains("more than"));
        assert!(reason("exec sleep 600", Duration::from_millis(50)).contains("no answer within"));
        assert!(reason("exec sleep 600 >&-", Duration::from_millis(50)).contains("does not end"));
        let missing = Helper { program: "/nonexistent/docker-credential-x".into(), deadline: LONG };
        assert!(missing.fetch("x").unwrap_err().to_string().contains("not in PATH"));
        for bad in ["../x", "a b", "a/b", "$(x)"] {
            assert!(Helper::named(Path::new("config.json"), bad).is_err(), "{bad}");
        }
    }
}
