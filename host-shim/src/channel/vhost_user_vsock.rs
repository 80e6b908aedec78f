//! vsock by the external daemon `vhost-device-vsock`, which speaks the hybrid dialect on Unix sockets.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use envd_proto::CONTROL_PORT;
use sandbox_folder::client::Stream;
use tokio::net::UnixListener;

use super::{PreparedKind, hybrid};
use crate::vmm::{Console, Wiring, process, qemu};
use crate::{Error, tools};

/// How long the daemon may take to listen; it opens two sockets and nothing else.
const START_DEADLINE: Duration = Duration::from_secs(10);

pub(super) struct Prepared {
    socket: PathBuf,
    control: UnixListener,
    control_path: PathBuf,
}

impl Prepared {
    pub(super) async fn prepare(folder: &Path) -> Result<super::Prepared, Error> {
        let program = tools::vhost_device_vsock()?;
        let (vhost, socket) = (folder.join("vhost"), folder.join("vsock"));
        let control_path = folder.join(format!("vsock_{CONTROL_PORT}"));
        let control = UnixListener::bind(&control_path).map_err(Error::io("listen on", &control_path))?;
        let cid = qemu::VHOST_USER_CID.to_string();
        let args = [
            "--guest-cid".as_ref(),
            cid.as_ref(),
            "--socket".as_ref(),
            vhost.as_os_str(),
            "--uds-path".as_ref(),
            socket.as_os_str(),
        ];
        let mut daemon = process::bound(&program, args, Vec::new())?
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| Error::Spawn { program: program.display().to_string(), source })?;
        let mut errors = match daemon.stderr.take() {
            Some(stderr) => Console::spawn(stderr, None),
            None => Console::spawn(tokio::io::empty(), None),
        };
        let listening = tokio::time::timeout(START_DEADLINE, wait_for_listener(&vhost));
        let ended = tokio::select! {
            ready = listening => match ready {
                Ok(()) => None,
                Err(_) => Some(format!("did not listen within {} s", START_DEADLINE.as_secs())),
            },
            status = daemon.wait() => {
                errors.drained().await;
                Some(status.map_or_else(|error| error.to_string(), |status| format!("{status}: {}", errors.tail().trim())))
            }
        };
        if let Some(reason) = ended {
            let program = program.display().to_string();
            return Err(Error::Spawn { program, source: io::Error::other(reason) });
        }
        Ok(super::Prepared {
            wiring: Wiring::VhostUserVsock { socket: vhost },
            fds: Vec::new(),
            helper: Some(daemon),
            kind: PreparedKind::VhostUserVsock(Self { socket, control, control_path }),
        })
    }

    pub(super) async fn control(&mut self) -> io::Result<Stream> {
        let (stream, _) = self.control.accept().await?;
        // Later connections of the guest find nobody: the daemon dials this path for each.
        std::fs::remove_file(&self.control_path)?;
        Ok(Box::new(stream))
    }

    pub(super) fn open(self) -> VhostUserVsock {
        VhostUserVsock { socket: self.socket }
    }
}

#[derive(Debug)]
pub(super) struct VhostUserVsock {
    socket: PathBuf,
}

impl VhostUserVsock {
    pub(super) async fn dial(&self, port: u32) -> io::Result<Stream> {
        Ok(Box::new(hybrid::dial(&self.socket, port).await?))
    }
}

/// Waits until a process listens on the socket `path`.
///
/// The file exists before listen(2) was called, and a connection made to find out would be taken for the VMM's: the
/// kernel's table of sockets tells without touching it. There is no event to wait for.
async fn wait_for_listener(path: &Path) {
    let mut wait = Duration::from_millis(1);
    while !std::fs::read_to_string("/proc/net/unix").is_ok_and(|table| is_listening(&table, path)) {
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(Duration::from_millis(50));
    }
}

/// Num RefCount Protocol Flags Type St Inode Path (proc(5)); __SO_ACCEPTCON is set once listen(2) was called.
fn is_listening(table: &str, path: &Path) -> bool {
    const SO_ACCEPTCON: u32 = 1 << 16;
    table.lines().any(|line| {
        let mut fields = line.split_ascii_whitespace();
        let flags = fields.nth(3).and_then(|flags| u32::from_str_radix(flags, 16).ok()).unwrap_or(0);
        // The path is the rest of the line, blanks and all.
        flags & SO_ACCEPTCON != 0
            && line.split_once('/').is_some_and(|(_, rest)| Path::new("/").join(rest) == path)
    })
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::hybrid::dial_once;
    use super::*;

    #[test]
    fn a_socket_listens_only_after_listen() {
        let table = "Num       RefCount Protocol Flags    Type St Inode Path\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 20744 /run/a socket\n\
            0000000000000000: 00000002 00000000 00000000 0001 01 20745 /run/bound\n";
        assert!(is_listening(table, Path::new("/run/a socket")));
        assert!(!is_listening(table, Path::new("/run/bound")));
        assert!(!is_listening(table, Path::new("/run/none")));
    }

    #[tokio::test]
    async fn a_hostile_daemon_cannot_hold_a_dial_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let (answers, serve) = (["OK 7\n", "", "NO\nxxxxxxxxxxxxxxxxxxxxx"], async {
            for answer in ["OK 7\n", "", "NO\nxxxxxxxxxxxxxxxxxxxxx"] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut line = [0; 11];
                stream.read_exact(&mut line).await.unwrap();
                assert_eq!(&line, b"CONNECT 42\n");
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        let dial = async {
            let mut kinds = Vec::new();
            for _ in answers {
                kinds.push(dial_once(&path, 42).await.err().map(|error| error.kind()));
            }
            kinds
        };
        let (kinds, ()) = tokio::join!(dial, serve);
        assert_eq!(kinds, [None, Some(io::ErrorKind::ConnectionRefused), Some(io::ErrorKind::InvalidData)]);
    }
}
