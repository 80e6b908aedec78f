//! `stop` and `rm`.

use std::time::Duration;

use rustix::process::Signal;
use sandbox_folder::api::ApiError;
use sandbox_folder::stop::StopRequest;

use super::error::{Error, FAILED};
use super::sandboxes::{Sandbox, Sandboxes};
use super::{complain, output, sandboxes};
use crate::cli::{Remove, Stop};

/// Beyond the grace of its processes: until the machine has powered off, and the shim has cleaned up.
const BEYOND_GRACE: Duration = Duration::from_secs(20);

/// Until a shim is gone that was killed. One that is not is stuck in the kernel.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

pub(crate) async fn stop(args: &Stop) -> Result<u8, Error> {
    let sandboxes = sandboxes(&args.given.data)?;
    let grace = Duration::from_secs(args.time.into());
    let ending = args.given.ids.iter().map(|given| {
        let sandboxes = &sandboxes;
        async move {
            let sandbox = sandboxes.find(given)?;
            end(&sandbox, grace).await?;
            output::line(given)
        }
    });
    // All at once: each has a grace of its own.
    report(futures::future::join_all(ending).await)
}

pub(crate) async fn remove(args: &Remove) -> Result<u8, Error> {
    let sandboxes = sandboxes(&args.given.data)?;
    let removing = args.given.ids.iter().map(|given| remove_one(&sandboxes, given, args.force));
    report(futures::future::join_all(removing).await)
}

async fn remove_one(sandboxes: &Sandboxes, given: &str, force: bool) -> Result<(), Error> {
    let sandbox = match sandboxes.find(given) {
        // As docker: it is told, and no failure.
        Err(error @ Error::NoSuchSandbox { .. }) if force => {
            complain(&error);
            return Ok(());
        }
        found => found?,
    };
    if force {
        end(&sandbox, Duration::ZERO).await?;
    } else if sandbox.shim().is_some() {
        let remedy = ": stop it before you remove it, or use -f";
        return Err(Error::WrongPhase { id: sandbox.id.clone(), phase: sandbox.phase(), remedy });
    }
    // One whose shim has not even written its state holds the lock: that is found here.
    sandboxes.remove(&sandbox.dir)?;
    output::line(given)
}

/// Ends a sandbox and waits until its shim is gone; one that has ended is no error.
async fn end(sandbox: &Sandbox, grace: Duration) -> Result<(), Error> {
    let Some(shim) = sandbox.shim() else { return Ok(()) };
    let grace_ms = Some(u32::try_from(grace.as_millis()).unwrap_or(u32::MAX));
    match sandbox.api().stop(StopRequest { grace_ms }).await {
        Ok(()) => {}
        // It does not serve yet: a boot is broken off by a signal.
        Err(ApiError::NotThere { .. }) => shim.signal(Signal::TERM),
        Err(error) => return Err(error.into()),
    }
    if tokio::time::timeout(grace + BEYOND_GRACE, shim.gone()).await.is_ok() {
        return Ok(());
    }
    eprintln!("host-shim: note: the shim of {} does not end: it is killed", sandbox.id);
    // Its VMM dies with it, and its reaper sweeps the folder.
    shim.signal(Signal::KILL);
    tokio::time::timeout(KILL_DEADLINE, shim.gone()).await.map_err(|_| {
        let source =
            std::io::Error::new(std::io::ErrorKind::TimedOut, "its host-shim is still there after SIGKILL");
        Error::Io { action: "stop", path: sandbox.dir.clone(), source }
    })
}

/// Tells the failures; the exit code of all together.
pub(crate) fn report(done: Vec<Result<(), Error>>) -> Result<u8, Error> {
    let mut code = 0;
    for result in done {
        match result {
            Err(error) if error.is_broken_pipe() => return Err(error),
            Err(error) => {
                complain(&error);
                code = FAILED;
            }
            Ok(()) => {}
        }
    }
    Ok(code)
}
