//! Two virtio-serial ports: control records on one, a multiplexer on the other.

use std::io;
use std::os::fd::OwnedFd;

use command_fds::FdMapping;
use envd_channel::mux::{Broken, Mux};
use sandbox_folder::client::Stream;
use tokio::net::UnixStream;

use super::PreparedKind;
use crate::Error;
use crate::vmm::{Wiring, qemu};

pub(super) struct Prepared {
    control: Option<UnixStream>,
    mux: UnixStream,
}

impl Prepared {
    pub(super) fn prepare() -> Result<super::Prepared, Error> {
        let (control, far_control) = pair()?;
        let (mux, far_mux) = pair()?;
        Ok(super::Prepared {
            wiring: Wiring::Serial,
            fds: vec![
                FdMapping { parent_fd: far_control, child_fd: qemu::CONTROL_FD },
                FdMapping { parent_fd: far_mux, child_fd: qemu::MUX_FD },
            ],
            helper: None,
            kind: PreparedKind::Serial(Self { control: Some(control), mux }),
        })
    }

    pub(super) fn control(&mut self) -> io::Result<Stream> {
        let control = self.control.take();
        Ok(Box::new(control.ok_or_else(|| io::Error::other("the control port is in use"))?))
    }

    pub(super) async fn open(self, generation: u64) -> io::Result<Serial> {
        let port = self.mux.into_std()?;
        Ok(Serial { mux: connect(&port, generation).await?, port })
    }
}

/// The session of one generation, and the port for those to come.
#[derive(Debug)]
pub(super) struct Serial {
    mux: Mux,
    port: std::os::unix::net::UnixStream,
}

impl Serial {
    pub(super) async fn end(&mut self) {
        self.mux.end().await;
    }

    pub(super) async fn reopen(&mut self, generation: u64) -> io::Result<()> {
        self.mux = connect(&self.port, generation).await?;
        Ok(())
    }

    pub(super) fn broken(&self) -> Broken {
        self.mux.broken()
    }

    pub(super) async fn dial(&self, port: u32) -> io::Result<Stream> {
        Ok(Box::new(self.mux.open(port).await?))
    }
}

async fn connect(port: &std::os::unix::net::UnixStream, generation: u64) -> io::Result<Mux> {
    Mux::connect(UnixStream::from_std(port.try_clone()?)?, generation).await
}

fn pair() -> Result<(UnixStream, OwnedFd), Error> {
    let make = || {
        let (near, far) = std::os::unix::net::UnixStream::pair()?;
        near.set_nonblocking(true)?;
        Ok((UnixStream::from_std(near)?, far.into()))
    };
    make().map_err(Error::io("make a pair of sockets for", "the serial ports"))
}
