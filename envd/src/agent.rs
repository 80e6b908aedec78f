//! The agent as an ordinary process: a service under somebody's init, or a program in a shell.
//!
//! ```text
//! --no-container    the machine is the root of client calls
//! --container DIR   a container with this root                      (guest/service.rs)
//! --control WHERE   a host that configures and ends it; without it: configured with the defaults, by nobody
//! --listen WHERE    who may call
//! ```
//!
//! The machine is not the agent's: it reaps, mounts and powers off nothing, and what a host's Configure names (hostname,
//! clock, network) is all that it changes of it.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use envd_proto::boot::Profile;
use envd_proto::control::Configure;
use envd_proto::{CLIENT_PORT, PORTS_PORT};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::doors::{ClientDoor, Doors};
use crate::guest::{self, ServiceContainer};
use crate::host::HostAddress;
use crate::machine::Machine;
use crate::root::Root;
use crate::sandbox::{Leaves, Sandbox};
use crate::spawner::{self, Respawn, Spawner};

/// What processes have for their end when the service is stopped by a signal. Below systemd's patience of 90 s, and above
/// what a program needs that obeys.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// What the service was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// The host, if there is one.
    pub host: Option<HostAddress>,
    /// Where clients come in.
    pub listen: Listen,
    /// A Unix socket for the ports door.
    pub ports: Option<PathBuf>,
    /// What client calls act in.
    pub place: Place,
}

/// Where clients come in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// The client door and the ports door on their vsock ports, for the host alone.
    Vsock,
    /// The client door on a Unix socket.
    Unix(PathBuf),
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => Ok(Self::Unix(path.into())),
            None if text == "vsock" => Ok(Self::Vsock),
            _ => Err(format!("'{text}': expected vsock or unix:PATH")),
        }
    }
}

/// What client calls act in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// The machine.
    Machine,
    /// A container.
    Container {
        /// Its root.
        directory: PathBuf,
        /// What it may do.
        profile: Profile,
    },
}

/// What is there before the first thread is.
struct Begun {
    container: Option<ServiceContainer>,
    spawner: OwnedFd,
    respawn: Option<Respawn>,
    leaves: Option<Leaves>,
}

impl Service {
    /// Serves until the host wants a shutdown, or until SIGTERM or SIGINT. Call it in a process with one thread.
    pub fn run(self) -> io::Result<()> {
        let begun = self.place.begin()?;
        // What has begun keeps the old limit.
        crate::open_files::raise();
        let mut sockets = Sockets::default();
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let served = runtime.block_on(self.serve(
            &begun.container,
            begun.spawner,
            begun.respawn,
            begun.leaves,
            &mut sockets,
        ));
        // Threads of the root may hang in a mount; they end with the process.
        runtime.shutdown_background();
        if let Some(container) = begun.container {
            container.end(*served.as_ref().unwrap_or(&Duration::ZERO));
        }
        served.map(drop)
    }

    /// Gives the time that the container's processes have for their end.
    async fn serve(
        self,
        container: &Option<ServiceContainer>,
        socket: OwnedFd,
        respawn: Option<Respawn>,
        leaves: Option<Leaves>,
        sockets: &mut Sockets,
    ) -> io::Result<Duration> {
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let root = match container {
            Some(container) => {
                tokio::spawn(guest::reap_orphans(signal(SignalKind::child())?));
                container.root()?
            }
            None => Root::own(),
        };
        let spawner = match respawn {
            Some(respawn) => Spawner::keep(socket, respawn)?,
            None => Spawner::connect(socket)?,
        };
        let sandbox = Sandbox::new(root, spawner, leaves);
        let door = ClientDoor::new(Arc::clone(&sandbox));
        let doors = Doors::new(door.clone());
        if self.host.is_none() {
            sandbox.configure(Configure::default()).map_err(io::Error::other)?;
        }
        let mut serving = tokio::task::JoinSet::new();
        match &self.listen {
            Listen::Unix(path) => {
                let (doors, listener) = (doors.clone(), sockets.bind(path)?);
                serving.spawn(async move { doors.serve_unix(CLIENT_PORT, listener).await });
            }
            Listen::Vsock => {
                for port in [CLIENT_PORT, PORTS_PORT] {
                    let doors = doors.clone();
                    serving.spawn(async move {
                        let named = |error: io::Error| {
                            io::Error::new(error.kind(), format!("listening at vsock port {port}: {error}"))
                        };
                        doors.serve_vsock(port).await.map_err(named)
                    });
                }
            }
        }
        if let Some(path) = &self.ports {
            let listener = sockets.bind(path)?;
            serving.spawn(async move { doors.serve_unix(PORTS_PORT, listener).await });
        }
        let machine = Machine::new(sandbox);
        let hello = guest::hello(container.is_some());
        let host = async {
            match &self.host {
                Some(address) => address.serve(&hello, &machine).await,
                None => std::future::pending().await,
            }
        };
        let grace = tokio::select! {
            Some(ended) = serving.join_next() => {
                ended.map_err(io::Error::other)??;
                return Err(io::Error::other("a listener has ended"));
            }
            grace = host => grace,
            error = ended(container) => return Err(error),
            _ = terminate.recv() => STOP_GRACE,
            _ = interrupt.recv() => STOP_GRACE,
        };
        if container.is_none() {
            // What is left then, the spawner kills when its socket closes.
            door.processes().end_all(grace).await;
        }
        Ok(grace)
    }
}

async fn ended(container: &Option<ServiceContainer>) -> io::Error {
    match container {
        Some(container) => container.ended().await,
        None => std::future::pending().await,
    }
}

impl Place {
    fn begin(&self) -> io::Result<Begun> {
        match self {
            Self::Container { directory, profile } => {
                let (container, spawner, leaves) = ServiceContainer::create(directory, *profile)?;
                Ok(Begun { container: Some(container), spawner, respawn: None, leaves: Some(leaves) })
            }
            Self::Machine => {
                let (spawner, child) = spawner::start_child()?;
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
                Ok(Begun { container: None, spawner, respawn: Some(respawn), leaves: None })
            }
        }
    }
}

/// The Unix sockets of the service, which go with it.
#[derive(Default)]
struct Sockets(Vec<PathBuf>);

impl Sockets {
    fn bind(&mut self, path: &Path) -> io::Result<UnixListener> {
        let named = |error: io::Error| {
            io::Error::new(error.kind(), format!("listening at {}: {error}", path.display()))
        };
        let listener = match UnixListener::bind(path) {
            // One that was killed has left its socket.
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_abandoned(path) => {
                fs::remove_file(path).and_then(|()| UnixListener::bind(path))
            }
            bound => bound,
        };
        let listener = listener.map_err(named)?;
        self.0.push(path.to_owned());
        Ok(listener)
    }
}

fn is_abandoned(path: &Path) -> bool {
    UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

impl Drop for Sockets {
    fn drop(&mut self) {
        for path in &self.0 {
            if let Err(error) = fs::remove_file(path) {
                crate::log::warn(format_args!("removing {}: {error}", path.display()));
            }
        }
    }
}
