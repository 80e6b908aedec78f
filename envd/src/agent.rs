//! The agent as an ordinary process, for tests, benches and machines that are somebody else's.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use envd_proto::control::Configure;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::doors::{ClientDoor, Doors};
use crate::root::Root;
use crate::sandbox::Sandbox;
use crate::spawner::{self, Respawn, Spawner};

/// Serves the client door on a Unix socket, in the agent's own root, until SIGTERM or SIGINT.
///
/// There is no host here, so there is nobody to wait for: the sandbox is configured with the defaults.
pub fn serve_unix(path: &Path) -> io::Result<()> {
    let (socket, child) = spawner::start_child()?;
    let last = Mutex::new(child);
    let respawn: Respawn = Box::new(move || {
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        // Its socket is closed, so it is as good as dead; nobody else reaps it.
        last.kill()?;
        last.wait()?;
        let (socket, child) = spawner::start_child()?;
        *last = child;
        Ok(socket)
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let served = runtime.block_on(async {
        let spawner = Spawner::keep(socket, respawn)?;
        let sandbox = Sandbox::new(Root::own(), spawner, None);
        sandbox.configure(Configure::default()).map_err(io::Error::other)?;
        let listener = UnixListener::bind(path).map_err(|error| {
            io::Error::new(error.kind(), format!("listening at {}: {error}", path.display()))
        })?;
        let doors = Doors::new(ClientDoor::new(Arc::clone(&sandbox)));
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        tokio::select! {
            served = doors.serve_unix(listener) => served,
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
        }
    });
    runtime.shutdown_background();
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound && served.is_ok() => Err(error),
        _ => served,
    }
}
