//! `port-forward`: ports here that are ports in a sandbox.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use sandbox_folder::client::SandboxClient;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::error::{Error, FAILED};
use super::{complain, interrupts, output, sandboxes};
use crate::cli::PortForward;

/// Connections at once; the next ones wait for their turn. A sandbox carries about as many streams.
const MAX_CONNECTIONS: usize = 1024;

/// How long to stop accepting when the process is out of file descriptors; connections end meanwhile.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// `[[BIND:]LOCAL:]REMOTE`
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Forward {
    /// Port 0 is any free one.
    local: SocketAddr,
    remote: u16,
}

impl Forward {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let expected = || format!("expected [[BIND:]LOCAL:]REMOTE, got {text:?}");
        let (rest, remote) = text.rsplit_once(':').unwrap_or(("", text));
        let (bind, local) = match rest.strip_prefix('[') {
            Some(rest) => {
                let (bind, local) = rest.split_once("]:").ok_or_else(expected)?;
                (Some(bind), local)
            }
            None => match rest.rsplit_once(':') {
                Some((bind, local)) => (Some(bind), local),
                None => (None, rest),
            },
        };
        let bind = match bind {
            None | Some("") => IpAddr::V4(Ipv4Addr::LOCALHOST),
            Some("localhost") => IpAddr::V4(Ipv4Addr::LOCALHOST),
            Some(bind) => bind.parse().map_err(|_| format!("{bind:?} is no address; {}", expected()))?,
        };
        let local = if local.is_empty() { 0 } else { local.parse().map_err(|_| expected())? };
        let remote = remote.parse().ok().filter(|port| *port > 0).ok_or_else(expected)?;
        Ok(Self { local: SocketAddr::new(bind, local), remote })
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {}", self.local, self.remote)
    }
}

pub(crate) async fn port_forward(args: &PortForward) -> Result<u8, Error> {
    let sandbox = sandboxes(&args.data)?.find(&args.id)?;
    let client = sandbox.client()?;
    let Some(shim) = sandbox.shim() else {
        return Err(Error::Ended { how: sandbox.end() });
    };
    let interrupt = interrupts()?;
    let mut listeners = Vec::new();
    for forward in &args.ports {
        let listener = TcpListener::bind(forward.local).await;
        let listener = listener.map_err(Error::io("listen on", forward.local.to_string()))?;
        let local = listener.local_addr().map_err(Error::io("listen on", forward.local.to_string()))?;
        listeners.push((listener, Forward { local, ..*forward }));
    }
    if args.json {
        let ports: Vec<_> = listeners
            .iter()
            .map(|(_, forward)| json!({"address": forward.local.ip(), "port": forward.local.port(), "remote": forward.remote}))
            .collect();
        output::json_line(&ports)?;
    } else {
        output::print(&listeners.iter().map(|(_, forward)| format!("{forward}\n")).collect::<String>())?;
    }
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut serving = JoinSet::new();
    for (listener, forward) in listeners {
        serving.spawn(serve(listener, forward, client.clone(), Arc::clone(&slots)));
    }
    tokio::select! {
        () = interrupt.first.cancelled() => Ok(0),
        () = shim.gone() => {
            let how = sandbox.again().map_or_else(|| "its folder is gone".to_owned(), |now| now.end());
            complain(&Error::Ended { how });
            Ok(FAILED)
        }
    }
}

async fn serve(listener: TcpListener, forward: Forward, client: SandboxClient, slots: Arc<Semaphore>) {
    // A set, and not detached tasks: dropped, it ends the connections.
    let mut connections = JoinSet::new();
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                eprintln!("host-shim: note: {forward}: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (client, remote) = (client.clone(), forward.remote);
        connections.spawn(async move {
            match carry(stream, &client, remote).await {
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                    eprintln!("host-shim: note: nobody listens on port {remote} in the sandbox");
                }
                // One that breaks off is no event.
                _ => {}
            }
            drop(slot);
        });
    }
}

async fn carry(mut here: TcpStream, client: &SandboxClient, remote: u16) -> io::Result<()> {
    // Small answers must not wait for larger ones.
    here.set_nodelay(true)?;
    let there = client.connect_port(remote).await;
    let mut there = match there {
        Ok(there) => there,
        Err(error) => {
            // A connection that was taken cannot be refused any more: it is reset, so that nobody takes it for an empty
            // answer.
            let _ = here.set_zero_linger();
            return Err(match error {
                sandbox_folder::client::ClientError::Io(error) => error,
                other => io::Error::other(other),
            });
        }
    };
    // Each direction ends for itself.
    let copied = tokio::io::copy_bidirectional(&mut here, &mut there).await;
    if copied.is_err() {
        let _ = there.shutdown().await;
    }
    copied.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_as_people_write_them() {
        for (text, expected) in [
            ("8080:80", "127.0.0.1:8080 -> 80"),
            (":80", "127.0.0.1:0 -> 80"),
            ("0:80", "127.0.0.1:0 -> 80"),
            ("80", "127.0.0.1:0 -> 80"),
            ("0.0.0.0:8080:80", "0.0.0.0:8080 -> 80"),
            ("localhost::80", "127.0.0.1:0 -> 80"),
            ("[::1]:8080:80", "[::1]:8080 -> 80"),
            ("[::]::80", "[::]:0 -> 80"),
        ] {
            assert_eq!(
                Forward::parse(text).map(|forward| forward.to_string()).as_deref(),
                Ok(expected),
                "{text}"
            );
        }
        for bad in ["", ":", "80:", "0", "8080:0", "x:80", "1:2:3:4", "70000:80", "[::1]:80", "[::1]80:80"] {
            assert!(Forward::parse(bad).is_err(), "{bad:?} was accepted: {:?}", Forward::parse(bad));
        }
    }
}
