//! The host, which the agent dials: where it listens, and the connection that is kept to it.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use envd_channel::control::Framing;
use envd_proto::control::Hello;
use envd_proto::{CONTROL_PORT, FIRST_GENERATION, HOST_CID};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio_vsock::{VsockAddr, VsockStream};

use crate::doors::{Control, Outcome};
use crate::machine::Acts;

/// The first pause before the host is dialled again; it doubles up to [`MAX_REDIAL`].
const FIRST_REDIAL: Duration = Duration::from_millis(50);

const MAX_REDIAL: Duration = Duration::from_secs(2);

/// Where the host listens for the control connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostAddress {
    /// A port of CID 2.
    Vsock(u32),
    /// A Unix socket.
    Unix(PathBuf),
}

impl FromStr for HostAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || format!("'{text}': expected vsock, vsock:PORT or unix:PATH");
        match text.split_once(':') {
            None if text == "vsock" => Ok(Self::Vsock(CONTROL_PORT)),
            Some(("vsock", port)) => port.parse().map(Self::Vsock).map_err(|_| expected()),
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => Err(expected()),
        }
    }
}

impl fmt::Display for HostAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vsock(port) => write!(f, "vsock port {port}"),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

/// A stream to the host.
pub trait HostStream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> HostStream for T {}

impl HostAddress {
    /// Keeps a connection to the host until it wants a shutdown; gives the time that processes have for their end. A reset
    /// is how a restore shows, so it is dialled again.
    pub async fn serve(&self, hello: &Hello, machine: &impl Acts) -> Duration {
        loop {
            let stream = self.dial().await;
            match Control::new(stream, Framing::Lines, FIRST_GENERATION).serve(hello.clone(), machine).await {
                Ok(Outcome::Shutdown(grace)) => return grace,
                Ok(Outcome::Disconnected) => {}
                Err(error) => crate::log::warn(format_args!("the control connection broke: {error}")),
            }
            // A host that accepts and hangs up at once must not make us spin.
            tokio::time::sleep(FIRST_REDIAL).await;
        }
    }

    /// Dials the host until it listens; a host that never does is somebody else's fault and costs nothing.
    pub async fn dial(&self) -> Box<dyn HostStream> {
        let mut pause = FIRST_REDIAL;
        loop {
            match self.dial_once().await {
                Ok(stream) => return stream,
                Err(error) if pause == FIRST_REDIAL => {
                    crate::log::warn(format_args!("no host at {self} yet: {error}"))
                }
                Err(_) => {}
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(MAX_REDIAL);
        }
    }

    async fn dial_once(&self) -> io::Result<Box<dyn HostStream>> {
        Ok(match self {
            Self::Vsock(port) => Box::new(VsockStream::connect(VsockAddr::new(HOST_CID, *port)).await?),
            Self::Unix(path) => Box::new(UnixStream::connect(path).await?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert_eq!("vsock".parse(), Ok(HostAddress::Vsock(1024)));
        assert_eq!("vsock:77".parse(), Ok(HostAddress::Vsock(77)));
        assert_eq!("unix:/run/a:b.sock".parse(), Ok(HostAddress::Unix("/run/a:b.sock".into())));
        for bad in ["", "vsock:", "vsock:x", "vsock:-1", "unix", "unix:", "tcp:1", "/run/a.sock"] {
            assert!(bad.parse::<HostAddress>().unwrap_err().contains("expected vsock"), "{bad:?}");
        }
    }
}
