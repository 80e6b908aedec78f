//! The vsock of the host's kernel.
//!
//! The agent dials a port that the kernel chose for this sandbox, since CIDs are told apart but ports are the host's.

use std::io;

use sandbox_folder::client::Stream;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

use super::PreparedKind;
use crate::Error;
use crate::vmm::Wiring;

const DEVICE: &str = "/dev/vhost-vsock";

/// The kernel chooses the port (`VMADDR_PORT_ANY`).
const ANY_PORT: u32 = u32::MAX;

/// CIDs below are the hypervisor's, the loopback's and the host's.
const FIRST_GUEST_CID: u32 = 3;

/// Whether a VMM of this user could open the device.
pub(crate) fn is_usable() -> bool {
    std::fs::File::options().read(true).write(true).open(DEVICE).is_ok()
}

pub(super) struct Prepared {
    cid: u32,
    listener: VsockListener,
}

impl Prepared {
    pub(super) fn prepare() -> Result<super::Prepared, Error> {
        if !is_usable() {
            return Err(Error::Missing {
                what: DEVICE.to_owned(),
                remedy: "`modprobe vhost_vsock` makes it, the group kvm may open it; or use --channel serial"
                    .to_owned(),
            });
        }
        let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, ANY_PORT))
            .map_err(Error::io("listen on", "vsock"))?;
        let control_port = listener.local_addr().map_err(Error::io("read the port of", "vsock"))?.port();
        let mut random = [0; 4];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| Error::io("read random bytes from", "getrandom(2)")(error.into()))?;
        // One of 2^31: two sandboxes of a host do not meet in practice, and if they do QEMU says so and ends.
        let cid = FIRST_GUEST_CID + (u32::from_ne_bytes(random) >> 1);
        Ok(super::Prepared {
            wiring: Wiring::VhostVsock { cid, control_port },
            fds: Vec::new(),
            helper: None,
            kind: PreparedKind::VhostVsock(Self { cid, listener }),
        })
    }

    pub(super) async fn control(&mut self) -> io::Result<Stream> {
        loop {
            let (stream, peer) = self.listener.accept().await?;
            // Another guest of this host can dial the port too.
            if peer.cid() == self.cid {
                return Ok(Box::new(stream));
            }
        }
    }

    pub(super) fn open(self) -> VhostVsock {
        VhostVsock { cid: self.cid }
    }
}

#[derive(Debug)]
pub(super) struct VhostVsock {
    cid: u32,
}

impl VhostVsock {
    pub(super) async fn dial(&self, port: u32) -> io::Result<Stream> {
        Ok(Box::new(VsockStream::connect(VsockAddr::new(self.cid, port)).await?))
    }
}
