//! What carries streams between the shim and the agent: four ways, one interface.
//!
//! ```text
//! prepare ──► Prepared { wiring, fds } ──launch──► control() ──► open() ──► Channel ──► dial(port)
//! ```
//!
//! Everything that must be there before the guest runs is made by `prepare`: sockets, listeners, a daemon.

pub mod hybrid;
mod serial;
mod vhost_user_vsock;
mod vhost_vsock;
mod vmm_vsock;

pub(crate) use vhost_vsock::is_usable as vhost_vsock_is_usable;
pub(crate) use vmm_vsock::Reset;

use std::io;
use std::path::Path;

use command_fds::FdMapping;
use envd_channel::control::Framing;
use envd_channel::mux::Broken;
use sandbox_folder::client::Stream;
use sandbox_folder::spec::ChannelChoice;
use tokio::process::Child;

use crate::Error;
use crate::vmm::{Kind, Wiring};

/// The host's side of a channel whose guest does not run yet, or has not spoken yet.
pub struct Prepared {
    /// The devices that the VMM has to make.
    pub wiring: Wiring,
    /// File descriptors for the VMM; taken by the launch.
    pub fds: Vec<FdMapping>,
    /// A process that the channel needs for as long as the VM runs.
    pub helper: Option<Child>,
    kind: PreparedKind,
}

enum PreparedKind {
    Serial(serial::Prepared),
    VhostVsock(vhost_vsock::Prepared),
    VhostUserVsock(vhost_user_vsock::Prepared),
    VmmVsock(vmm_vsock::Prepared),
}

impl Prepared {
    /// Makes the host's side. `folder` is for the sockets of this channel, and exists.
    pub async fn new(vmm: Kind, choice: ChannelChoice, folder: &Path) -> Result<Self, Error> {
        match choice {
            // It has no other (`Kind::lacks`).
            _ if vmm == Kind::Firecracker => vmm_vsock::Prepared::prepare(folder),
            ChannelChoice::Serial => serial::Prepared::prepare(),
            ChannelChoice::VhostVsock => vhost_vsock::Prepared::prepare(),
            ChannelChoice::VhostUserVsock => vhost_user_vsock::Prepared::prepare(folder).await,
            // The only one whose VM can be snapshotted and cloned: the kernel's vsock leaves the port of its source's shim in
            // the guest's RAM, and vhost-user-vsock cannot be migrated.
            ChannelChoice::Auto => serial::Prepared::prepare(),
        }
    }

    /// The channel's name in `state.json`.
    pub fn name(&self) -> &'static str {
        match self.kind {
            PreparedKind::Serial(_) => "serial",
            PreparedKind::VhostVsock(_) => "vhost-vsock",
            PreparedKind::VhostUserVsock(_) => "vhost-user-vsock",
            PreparedKind::VmmVsock(_) => "hybrid-vsock",
        }
    }

    /// The stream of the control door: on vsock the guest's first connection, and no other after it.
    ///
    /// The agent dials before anything of the tenant's runs, so the first connection is its own.
    pub async fn control(&mut self) -> io::Result<Stream> {
        match &mut self.kind {
            PreparedKind::Serial(prepared) => prepared.control(),
            PreparedKind::VhostVsock(prepared) => prepared.control().await,
            PreparedKind::VhostUserVsock(prepared) => prepared.control().await,
            PreparedKind::VmmVsock(prepared) => prepared.control().await,
        }
    }

    /// How messages are told apart on that stream.
    pub fn control_framing(&self) -> Framing {
        match self.kind {
            PreparedKind::Serial(_) => Framing::Records,
            PreparedKind::VhostVsock(_) | PreparedKind::VhostUserVsock(_) | PreparedKind::VmmVsock(_) => {
                Framing::Lines
            }
        }
    }

    /// What is to be done after a snapshot, where that cuts the guest's streams.
    pub(crate) fn reset(&self) -> Option<Reset> {
        match &self.kind {
            PreparedKind::VmmVsock(prepared) => Some(prepared.reset()),
            _ => None,
        }
    }

    /// The channel, once the agent serves its doors in this generation.
    pub async fn open(self, generation: u64) -> io::Result<Channel> {
        Ok(Channel(match self.kind {
            PreparedKind::Serial(prepared) => Opened::Serial(prepared.open(generation).await?),
            PreparedKind::VhostVsock(prepared) => Opened::VhostVsock(prepared.open()),
            PreparedKind::VhostUserVsock(prepared) => Opened::VhostUserVsock(prepared.open()),
            PreparedKind::VmmVsock(prepared) => Opened::VmmVsock(prepared.open()),
        }))
    }
}

/// A channel to a ready agent.
#[derive(Debug)]
pub struct Channel(Opened);

#[derive(Debug)]
enum Opened {
    Serial(serial::Serial),
    VhostVsock(vhost_vsock::VhostVsock),
    VhostUserVsock(vhost_user_vsock::VhostUserVsock),
    VmmVsock(vmm_vsock::VmmVsock),
}

impl Channel {
    /// Ends the session, with its streams. That comes before the request that begins the machine's next generation: the
    /// agent then says the preamble of the next session at once, which the one before would read as its own.
    pub async fn end(&mut self) {
        match &mut self.0 {
            Opened::Serial(channel) => channel.end().await,
            // Their streams are connections, which are not bound to a session.
            Opened::VhostVsock(_) | Opened::VhostUserVsock(_) | Opened::VmmVsock(_) => {}
        }
    }

    /// Begins the session of another generation of the machine, when the one before has [ended](Self::end).
    pub async fn reopen(&mut self, generation: u64) -> io::Result<()> {
        match &mut self.0 {
            Opened::Serial(channel) => channel.reopen(generation).await,
            Opened::VhostVsock(_) | Opened::VhostUserVsock(_) | Opened::VmmVsock(_) => Ok(()),
        }
    }

    /// Tells when all of its streams are over before it was [ended](Self::end), and why; `None` where each is a connection of
    /// its own.
    pub fn broken(&self) -> Option<Broken> {
        match &self.0 {
            Opened::Serial(channel) => Some(channel.broken()),
            Opened::VhostVsock(_) | Opened::VhostUserVsock(_) | Opened::VmmVsock(_) => None,
        }
    }

    /// Opens a stream to a port of the agent.
    pub async fn dial(&self, port: u32) -> io::Result<Stream> {
        match &self.0 {
            Opened::Serial(channel) => channel.dial(port).await,
            Opened::VhostVsock(channel) => channel.dial(port).await,
            Opened::VhostUserVsock(channel) => channel.dial(port).await,
            Opened::VmmVsock(channel) => channel.dial(port).await,
        }
    }
}
