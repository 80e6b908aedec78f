//! The agent as PID 1 of a microVM, booted from the guest image (initramfs).
//!
//! ```text
//! early mounts -> switch root -> cgroups -> rootfs -> scratch -> overlay -> network -> container -> hello
//! ```
//!
//! Everything up to the hello is one thread that goes step by step; each step is timed and named in its error. An error
//! ends on the console, at the host (as far as it can be reached), and in a power-off.

mod boot;
mod cgroups;
mod container;
mod mounts;
mod power;

use std::io;
use std::time::Duration;

use envd_proto::control::{Failed, Hello};
use envd_proto::{
    CLIENT_PORT, FIRST_GENERATION, HOST_CID, OLDEST_PROTOCOL_VERSION, PORTS_PORT, PROTOCOL_VERSION,
    boot as names,
};
use rustix::process::{Resource, Rlimit, WaitOptions, setrlimit};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::signal::unix::{SignalKind, signal};
use tokio_vsock::{VsockAddr, VsockStream};

use crate::doors::{ClientDoor, Control, Doors, Outcome};
use crate::root::Root;
use crate::sandbox::Sandbox;
use crate::serial;
use crate::spawner::Spawner;
use boot::Booted;

pub use boot::{Arguments, BootError};
pub use container::{HELPER as CONTAINER_HELPER, init as container_init};

/// How long a host has to take the news of a failed boot before the machine goes off.
const FAILURE_TIMEOUT: Duration = Duration::from_secs(5);

/// The first pause before the host is dialled again; it doubles up to [`MAX_REDIAL`].
const FIRST_REDIAL: Duration = Duration::from_millis(50);

const MAX_REDIAL: Duration = Duration::from_secs(2);

/// Open files that a process may ask for; what Docker and systemd allow.
const OPEN_FILES_HARD: u64 = 1_048_576;

/// Open files of the agent: each process of the table takes four, each connection one.
const AGENT_OPEN_FILES: u64 = 65_536;

/// How the agent reaches its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    /// Two virtio-serial ports.
    Serial,
    /// vsock; the host listens for the agent on this port.
    Vsock(u32),
}

/// Boots, serves, and powers the machine off.
pub fn run() -> ! {
    let limit = Rlimit { current: Some(AGENT_OPEN_FILES), maximum: Some(OPEN_FILES_HARD) };
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        crate::log::warn(format_args!("raising the limit of open files: {error}"));
    }
    let outcome = boot::boot();
    match outcome {
        Ok(booted) => match serve(booted) {
            Ok(()) => {}
            Err(error) => crate::log::error(format_args!("{error}")),
        },
        Err(error) => {
            crate::log::error(format_args!("{error}"));
            report(&error);
        }
    }
    power::off()
}

/// With one CPU a second thread for tasks has nothing to run on, and costs its start at each boot.
fn runtime() -> io::Result<tokio::runtime::Runtime> {
    let one_cpu = std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() == 1);
    let mut builder = match one_cpu {
        true => tokio::runtime::Builder::new_current_thread(),
        false => tokio::runtime::Builder::new_multi_thread(),
    };
    builder.enable_all().build()
}

/// Tells the host why the boot failed, if there is a host that listens.
fn report(error: &BootError) {
    let Ok(runtime) = runtime() else { return };
    let failed = Failed { step: error.step.name().to_owned(), message: error.message.clone() };
    let told = runtime.block_on(async {
        tokio::time::timeout(FAILURE_TIMEOUT, async {
            match Arguments::read().channel {
                Channel::Serial => {
                    let port = serial::open(names::CONTROL_SERIAL_PORT)?;
                    Control::new(port, FIRST_GENERATION).fail(failed).await
                }
                Channel::Vsock(port) => Control::new(dial(port).await?, FIRST_GENERATION).fail(failed).await,
            }
        })
        .await
    });
    if !matches!(told, Ok(Ok(()))) {
        crate::log::warn(format_args!("the host could not be told"));
    }
}

fn serve(booted: Booted) -> io::Result<()> {
    let runtime = runtime()?;
    let channel = booted.arguments.channel;
    let grace = runtime.block_on(async {
        tokio::spawn(reap_orphans(signal(SignalKind::child())?));
        let root = match booted.container {
            Some(init) => Root::of_container(init)?,
            None => Root::own(),
        };
        let spawner = Spawner::connect(booted.spawner)?;
        let sandbox = Sandbox::new(root, spawner.clone(), Some(booted.leaves));
        let client = ClientDoor::new(std::sync::Arc::clone(&sandbox));
        if let Err(error) = crate::process::watch_out_of_memory(client.processes(), sandbox.events()) {
            crate::log::warn(format_args!("no notices of processes that run out of memory: {error}"));
        }
        let doors = Doors::new(client);
        let hello = Hello {
            protocol_version: PROTOCOL_VERSION,
            oldest_protocol_version: OLDEST_PROTOCOL_VERSION,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            generation: FIRST_GENERATION,
            kernel_release: rustix::system::uname().release().to_string_lossy().into_owned(),
            container: booted.container.is_some(),
            phases: booted.phases,
        };
        let control = async {
            match channel {
                Channel::Serial => {
                    let mux = serial::open(names::MUX_SERIAL_PORT)?;
                    let port = serial::open(names::CONTROL_SERIAL_PORT)?;
                    let mut control = Control::new(port, FIRST_GENERATION);
                    tokio::select! {
                        // Without the mux nobody can reach the sandbox any more: its host shall see an end.
                        ended = doors.serve_mux(mux, FIRST_GENERATION) => {
                            ended?;
                            Err(io::Error::other("the mux session has ended"))
                        }
                        outcome = control.serve(hello, &sandbox) => match outcome? {
                            Outcome::Shutdown(grace) => Ok(grace),
                            Outcome::Disconnected => Err(io::Error::other("the control port is gone")),
                        },
                    }
                }
                Channel::Vsock(port) => {
                    for door in [CLIENT_PORT, PORTS_PORT] {
                        let doors = doors.clone();
                        tokio::spawn(async move {
                            if let Err(error) = doors.serve_vsock(door).await {
                                crate::log::warn(format_args!("vsock port {door}: {error}"));
                            }
                        });
                    }
                    Ok(serve_host(port, &hello, &sandbox).await)
                }
            }
        };
        tokio::select! {
            grace = control => grace,
            () = spawner.wait_gone() => Err(io::Error::other("the container's init is gone")),
        }
    });
    // Threads of the root may hang in a tenant's mounts; they end with the machine.
    runtime.shutdown_background();
    let grace = grace?;
    cgroups::end_box(grace);
    mounts::unmount_box();
    Ok(())
}

/// Keeps a connection to the host until it wants a shutdown. A reset is how a restore shows, so it is dialled again.
async fn serve_host(port: u32, hello: &Hello, sandbox: &std::sync::Arc<Sandbox>) -> Duration {
    loop {
        let Ok(stream) = dial(port).await else { continue };
        match Control::new(stream, FIRST_GENERATION).serve(hello.clone(), sandbox).await {
            Ok(Outcome::Shutdown(grace)) => return grace,
            Ok(Outcome::Disconnected) => {}
            Err(error) => crate::log::warn(format_args!("the control connection broke: {error}")),
        }
        // A host that accepts and hangs up at once must not make us spin.
        tokio::time::sleep(FIRST_REDIAL).await;
    }
}

/// Dials the host until it listens; a host that never does is somebody else's fault and costs nothing.
async fn dial(port: u32) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + use<>> {
    let mut pause = FIRST_REDIAL;
    loop {
        match VsockStream::connect(VsockAddr::new(HOST_CID, port)).await {
            Ok(stream) => return Ok(stream),
            Err(error) if pause == FIRST_REDIAL => {
                crate::log::warn(format_args!("no host at vsock port {port} yet: {error}"))
            }
            Err(_) => {}
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(MAX_REDIAL);
    }
}

/// PID 1 inherits every orphan of the machine. Nobody in the agent waits for children of its own, so all can be reaped.
async fn reap_orphans(mut children: tokio::signal::unix::Signal) {
    loop {
        while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
        if children.recv().await.is_none() {
            return;
        }
    }
}
