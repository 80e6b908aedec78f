//! The processes of a build: `image-builder`, and what it starts.
//!
//! Each carries the build's id in its environment ([`MARK`]), from which they are found again whatever became of the gateway:
//! ids are random, so no other process carries one by chance, and a pidfd is opened before the environment is read, so what is
//! signalled is what was looked at.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, pidfd_send_signal};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader, Interest};
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;

use super::name::BuildId;

/// The variable with the build's id.
pub(super) const MARK: &str = "TIFFIN_BUILD_ID";

/// How much of a process's environment is searched; the mark was put there by us, behind what we have ourselves.
const MAX_ENVIRONMENT: u64 = 1 << 20;

/// The longest line that is read as one: the longest of a step's output, in JSON.
const MAX_LINE: u64 = 128 << 10;

/// How much of a result is read; it lists the layers of an image.
const MAX_RESULT: u64 = 4 << 20;

/// Until pipes are at their end after their process is. What it leaves behind is ended, and may hold them for a moment.
const DRAIN: Duration = Duration::from_secs(10);

/// How a process ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// By itself, with what it wrote to standard output.
    Itself(ExitStatus, Vec<u8>),
    /// Because it was told to.
    Told,
}

/// Runs a program of the build until it ends, or `stop` says so; then it has `grace` to clean up. Each line of its standard
/// error goes to `line`. Nothing of it is left when this returns.
pub(super) async fn run(
    command: &mut Command,
    build: &BuildId,
    stop: &CancellationToken,
    grace: Duration,
    line: impl FnMut(&str),
) -> io::Result<Ended> {
    command.env(MARK, &build.0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.process_group(0).spawn()?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let mut reading = std::pin::pin!(async {
        let lines = async {
            if let Some(stderr) = stderr {
                lines(stderr, line).await;
            }
        };
        let result = async {
            let mut result = Vec::new();
            if let Some(stdout) = stdout {
                let _ = stdout.take(MAX_RESULT).read_to_end(&mut result).await;
            }
            result
        };
        tokio::join!(lines, result).1
    });
    let mut read = None;
    let status = loop {
        tokio::select! {
            status = child.wait() => break Some(status?),
            result = &mut reading, if read.is_none() => read = Some(result),
            () = stop.cancelled() => break None,
        }
    };
    let Some(status) = status else {
        let mut rest = std::pin::pin!(async {
            if read.is_none() {
                reading.await;
            }
        });
        let ended = end(&mut child, grace, rest.as_mut()).await?;
        end_all(build, Duration::ZERO).await;
        if !ended {
            let _ = tokio::time::timeout(DRAIN, rest).await;
        }
        return Ok(Ended::Told);
    };
    if !status.success() {
        end_all(build, Duration::ZERO).await;
    }
    let result = match read {
        Some(result) => result,
        None => tokio::time::timeout(DRAIN, reading).await.unwrap_or_default(),
    };
    Ok(Ended::Itself(status, result))
}

/// Ends a process and its group. Its output is read meanwhile, so that it is not stopped by a full pipe; whether all of it was.
async fn end(
    child: &mut Child,
    grace: Duration,
    mut reading: impl Future<Output = ()> + Unpin,
) -> io::Result<bool> {
    let group = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
    let signal = |signal| group.map(|group| kill_process_group(group, signal));
    let _ = signal(Signal::TERM);
    let mut read = false;
    let deadline = tokio::time::sleep(grace);
    let mut deadline = std::pin::pin!(deadline);
    let mut killed = false;
    loop {
        tokio::select! {
            status = child.wait() => return status.map(|_| read),
            () = &mut reading, if !read => read = true,
            () = &mut deadline, if !killed => {
                killed = true;
                let _ = signal(Signal::KILL);
            }
        }
    }
}

/// Ends every process that carries the build's id: by SIGTERM where there is time for it, then by SIGKILL.
pub(super) async fn end_all(build: &BuildId, grace: Duration) {
    let mark = format!("{MARK}={build}");
    let find = || {
        let mark = mark.clone();
        async move { tokio::task::spawn_blocking(move || marked(Path::new("/proc"), &mark)).await }
    };
    if !grace.is_zero() {
        let found = find().await.unwrap_or_default();
        for process in &found {
            let _ = pidfd_send_signal(process, Signal::TERM);
        }
        let _ = tokio::time::timeout(grace, gone(found)).await;
    }
    // What they started meanwhile is found by the next look.
    loop {
        let found = find().await.unwrap_or_default();
        if found.is_empty() {
            return;
        }
        for process in &found {
            let _ = pidfd_send_signal(process, Signal::KILL);
        }
        // One that does not die by SIGKILL is stuck in the kernel, and holds nothing up.
        if tokio::time::timeout(DRAIN, gone(found)).await.is_err() {
            tracing::error!(%build, "a process of a build does not end");
            return;
        }
    }
}

/// Returns when all have ended: a pidfd is readable then.
async fn gone(processes: Vec<OwnedFd>) {
    for process in processes {
        #[expect(
            deprecated,
            reason = "its successor is unsafe, for descriptors that may be closed elsewhere; an OwnedFd is not"
        )]
        let process = AsyncFd::with_interest(process, Interest::READABLE);
        if let Ok(process) = process {
            let _ = process.readable().await;
        }
    }
}

/// The living processes with that variable in their environment.
fn marked(proc: &Path, mark: &str) -> Vec<OwnedFd> {
    let entries = fs::read_dir(proc).into_iter().flatten().flatten();
    let of_ours = |entry: fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse().ok().and_then(Pid::from_raw)?;
        let process = pidfd_open(pid, PidfdFlags::NONBLOCK).ok()?;
        let mut environment = Vec::new();
        // One that has ended has none, and others' is not for us.
        File::open(entry.path().join("environ"))
            .ok()?
            .take(MAX_ENVIRONMENT)
            .read_to_end(&mut environment)
            .ok()?;
        environment.split(|&byte| byte == 0).any(|variable| variable == mark.as_bytes()).then_some(process)
    };
    entries.filter_map(of_ours).collect()
}

/// Gives each line, a longer one in pieces.
async fn lines(output: impl AsyncRead + Unpin, mut each: impl FnMut(&str)) {
    let mut output = BufReader::new(output);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut output).take(MAX_LINE).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => each(String::from_utf8_lossy(&line).trim_end_matches('\n')),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn sh(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    fn is_left(build: &BuildId) -> bool {
        !marked(Path::new("/proc"), &format!("{MARK}={build}")).is_empty()
    }

    #[tokio::test]
    async fn a_program_ends_by_itself_and_leaves_nothing() {
        let (build, stop) = (BuildId::generate().unwrap(), CancellationToken::new());
        let mut said = Vec::new();
        let mut command = sh("echo one >&2; printf two >&2; echo result; sleep 1000000 & exit 3");
        let running = run(&mut command, &build, &stop, PATIENCE, |line| said.push(line.to_owned()));
        let ended = tokio::time::timeout(PATIENCE, running).await.expect("it ends").unwrap();
        let Ended::Itself(status, result) = ended else { panic!("{ended:?}") };
        assert_eq!((status.code(), &result[..]), (Some(3), &b"result\n"[..]));
        assert_eq!(said, ["one", "two"]);
        assert!(!is_left(&build));
    }

    #[tokio::test]
    async fn one_that_is_told_to_end_may_clean_up_and_one_that_does_not_listen_is_killed() {
        for (script, grace, words) in [
            (
                "trap 'echo cleaned >&2; exit 0' TERM; echo on >&2; sleep 1000000 & wait",
                PATIENCE,
                &["on", "cleaned"][..],
            ),
            (
                "trap '' TERM; echo on >&2; setsid sleep 1000000 & wait; wait",
                Duration::from_millis(100),
                &["on"],
            ),
        ] {
            let (build, stop) = (BuildId::generate().unwrap(), CancellationToken::new());
            let mut said = Vec::new();
            let mut command = sh(script);
            let running = run(&mut command, &build, &stop, grace, |line| {
                said.push(line.to_owned());
                stop.cancel();
            });
            let ended = tokio::time::timeout(PATIENCE, running).await.expect("it ends").unwrap();
            assert!(matches!(ended, Ended::Told), "{ended:?}");
            assert_eq!(said, words);
            assert!(!is_left(&build));
        }
    }

    #[tokio::test]
    async fn what_an_earlier_gateway_left_is_found() {
        let build = BuildId::generate().unwrap();
        let mut child = sh("trap 'exit 7' TERM; echo on; sleep 1000000 & wait")
            .env(MARK, &build.0)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut on = [0; 3];
        child.stdout.as_mut().unwrap().read_exact(&mut on).await.unwrap();
        let waiting = tokio::spawn(async move { child.wait().await });
        tokio::time::timeout(PATIENCE, end_all(&build, PATIENCE)).await.expect("all end");
        assert_eq!(waiting.await.unwrap().unwrap().code(), Some(7));
        assert!(!is_left(&build));
    }
}
