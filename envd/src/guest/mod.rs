//! The agent as PID 1 of a microVM: from the guest image (initramfs), or as `init=` of a disk that is somebody's root.
//!
//! ```text
//! guest image  early mounts -> switch root -> cgroups -> rootfs -> scratch -> overlay -> network -> container -> hello
//! a disk       what is missing          -> cgroups -> the disk, again -> scratch, if any -> network -> container -> hello
//! ```
//!
//! Everything up to the hello is one thread that goes step by step; each step is timed and named in its error. An error
//! ends on the console, at the host (as far as it can be reached), and in a power-off.

mod boot;
mod build_step;
mod cgroups;
mod container;
mod enter;
mod init;
mod mounts;
mod power;
mod profile;
mod runtime_spec;
mod seccomp;
mod service;
mod volumes;

use std::io;
use std::time::Duration;

use envd_channel::control::Framing;
use envd_proto::control::{Failed, Hello};
use envd_proto::{
    CLIENT_PORT, FIRST_GENERATION, OLDEST_PROTOCOL_VERSION, PORTS_PORT, PROTOCOL_VERSION, boot as names,
};
use rustix::process::{Resource, Rlimit, WaitOptions, setrlimit};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::signal::unix::{SignalKind, signal};

use crate::doors::{ClientDoor, Control, Doors, Outcome};
use crate::host::HostAddress;
use crate::machine::Machine;
use crate::root::Root;
use crate::sandbox::Sandbox;
use crate::serial;
use crate::spawner::Spawner;
use boot::Booted;
use init::ContainerInit;
use mounts::Origin;

pub use boot::{Arguments, BootError};
pub use build_step::run as build_step;
pub use container::{HELPER as CONTAINER_HELPER, init as container_init};
pub use enter::{HELPER as SPAWNER_HELPER, enter as enter_container};
pub(crate) use mounts::SCRATCH;
pub(crate) use service::ServiceContainer;

/// How long a host has to take the news of a failed boot before the machine goes off.
const FAILURE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a host that was told may keep its connection.
const HANG_UP_TIMEOUT: Duration = Duration::from_secs(1);

/// How often a serial port that is missing is looked for.
const PORT_RETRY: Duration = Duration::from_secs(10);

/// Open files that a process may ask for; what Docker and systemd allow.
const OPEN_FILES_HARD: u64 = 1_048_576;

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
    let limit = Rlimit { current: Some(crate::open_files::AGENT_OPEN_FILES), maximum: Some(OPEN_FILES_HARD) };
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
                    Control::new(port, Framing::Records, FIRST_GENERATION).fail(failed).await
                }
                Channel::Vsock(port) => {
                    let mut stream = HostAddress::Vsock(port).dial().await;
                    Control::new(&mut stream, Framing::Lines, FIRST_GENERATION).fail(failed).await?;
                    // Until the host hangs up: what is still on its way is lost with the machine.
                    let mut rest = tokio::io::sink();
                    let heard = tokio::io::copy(&mut stream, &mut rest);
                    let _ = tokio::time::timeout(HANG_UP_TIMEOUT, heard).await;
                    Ok(())
                }
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
        let root = match &booted.container {
            Some(init) => Root::of_container(init.pid())?,
            None => Root::own(),
        };
        let spawner = match booted.respawn {
            Some(respawn) => Spawner::keep(booted.spawner, respawn)?,
            None => Spawner::connect(booted.spawner)?,
        };
        let sandbox = Sandbox::new(root, spawner, Some(booted.leaves));
        let client = ClientDoor::new(std::sync::Arc::clone(&sandbox));
        if let Err(error) = crate::process::watch_out_of_memory(client.processes(), sandbox.events()) {
            crate::log::warn(format_args!("no notices of processes that run out of memory: {error}"));
        }
        let doors = Doors::new(client);
        let machine = Machine::new(std::sync::Arc::clone(&sandbox));
        let hello = Hello { phases: booted.phases, ..hello(booted.container.is_some()) };
        let control = async {
            match channel {
                Channel::Serial => {
                    let patient = booted.origin == Origin::Disk;
                    let mux = serial_port(names::MUX_SERIAL_PORT, patient).await?;
                    let port = serial_port(names::CONTROL_SERIAL_PORT, patient).await?;
                    let mut control = Control::new(port, Framing::Records, FIRST_GENERATION);
                    tokio::select! {
                        // Without the mux nobody can reach the sandbox any more: its host shall see an end.
                        ended = doors.serve_mux_sessions(mux) => {
                            ended?;
                            Err(io::Error::other("the mux session has ended"))
                        }
                        outcome = control.serve(hello, &machine) => match outcome? {
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
                    Ok(HostAddress::Vsock(port).serve(&hello, &machine).await)
                }
            }
        };
        tokio::select! {
            grace = control => grace,
            error = ended(booted.container.as_ref()) => Err(error),
        }
    });
    // Threads of the root may hang in a tenant's mounts; they end with the machine.
    runtime.shutdown_background();
    let grace = grace?;
    cgroups::end_box(grace, booted.container.as_ref());
    mounts::unmount_box();
    if booted.origin == Origin::Disk {
        mounts::settle_root();
    }
    Ok(())
}

/// What this agent says of itself; the door adds what it alone knows.
pub(crate) fn hello(container: bool) -> Hello {
    Hello {
        protocol_version: PROTOCOL_VERSION,
        oldest_protocol_version: OLDEST_PROTOCOL_VERSION,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel_release: rustix::system::uname().release().to_string_lossy().into_owned(),
        container,
        ..Hello::default()
    }
}

/// Waits for the end of the container, if there is one.
async fn ended(container: Option<&ContainerInit>) -> io::Error {
    match container {
        Some(init) => init.ended().await,
        None => std::future::pending().await,
    }
}

/// Opens a serial port. In somebody's image one that is missing may still be plugged in, and is no reason to end.
async fn serial_port(
    name: &str,
    patient: bool,
) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + use<>> {
    loop {
        match serial::open(name) {
            Err(error) if patient => {
                crate::log::warn(format_args!("{error}; looking again every {} s", PORT_RETRY.as_secs()));
                tokio::time::sleep(PORT_RETRY).await;
            }
            opened => return opened,
        }
    }
}

/// PID 1 inherits every orphan of the machine. Nobody in the agent waits for children of its own, so all can be reaped.
pub(crate) async fn reap_orphans(mut children: tokio::signal::unix::Signal) {
    loop {
        while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
        if children.recv().await.is_none() {
            return;
        }
    }
}
