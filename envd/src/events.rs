//! What happens in the sandbox and its host may want to know.

use tokio::sync::broadcast;

/// Events that wait for a reader who is behind; older ones are lost to it.
const QUEUE: usize = 256;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The kernel killed a process because memory ran out.
    OutOfMemory(OutOfMemory),
    /// A program listens on a TCP port.
    PortOpened(Port),
    /// It does no more.
    PortClosed(Port),
    /// The spawner died and was made again.
    SpawnerRestarted,
}

/// A process that the kernel killed because memory ran out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutOfMemory {
    /// The program's name as the kernel knows it, at most 15 bytes.
    pub name: String,
    /// The pid in the container of the process that a client started, when it was that one.
    pub pid: Option<u32>,
    /// Its tag, when it has one.
    pub tag: Option<String>,
}

/// A TCP port where somebody listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Port {
    /// The address: a loopback address, or an unspecified one for all.
    pub address: std::net::IpAddr,
    /// The port.
    pub port: u16,
}

/// Carries events to whoever listens. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Events(broadcast::Sender<Event>);

impl Default for Events {
    fn default() -> Self {
        Self(broadcast::Sender::new(QUEUE))
    }
}

impl Events {
    /// Tells everybody who listens; nobody listening is no error.
    pub fn emit(&self, event: Event) {
        let _ = self.0.send(event);
    }

    /// A reader of the events from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.0.subscribe()
    }
}
