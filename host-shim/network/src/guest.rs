//! A guest that is a network namespace: its `eth0` is a TAP of its own, tied to the sandbox's frame by frame.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns, unshare};
use sandbox_network::addresses::{
    GATEWAY4, GATEWAY6, GUEST_MAC, GUEST4, GUEST6, PREFIX_LENGTH4, PREFIX_LENGTH6,
};

use crate::frame::Packet;

/// The longest frame: a full packet of IP and its Ethernet header.
const MAX_FRAME: usize = (64 << 10) + 18;

/// How long an answer may take. What is dropped without a word takes as long.
const DEADLINE: Duration = Duration::from_secs(5);

/// How long a transfer may take.
const TRANSFER_DEADLINE: Duration = Duration::from_secs(120);

pub(crate) struct Guest {
    namespace: File,
    tap: File,
    connections: Vec<BufReader<TcpStream>>,
}

impl Guest {
    /// The guest behind `tap`. As an ordinary user it gets a user namespace too.
    pub(crate) fn new(tap: OwnedFd) -> io::Result<Self> {
        let user = rustix::process::geteuid();
        let mut flags = CloneFlags::CLONE_NEWNET;
        if !user.is_root() {
            flags |= CloneFlags::CLONE_NEWUSER;
        }
        unshare(flags)?;
        if !user.is_root() {
            std::fs::write("/proc/self/uid_map", format!("0 {} 1", user.as_raw()))?;
        }
        let namespace = File::open("/proc/self/ns/net")?;
        let eth0 = File::from(envd_sys::open_tap("eth0")?);
        ip(&format!(
            "link set lo up\nlink set eth0 address {GUEST_MAC}\naddr add {GUEST4}/{PREFIX_LENGTH4} dev eth0\n\
             addr add {GUEST6}/{PREFIX_LENGTH6} dev eth0 nodad\nlink set eth0 mtu 1500 up\n\
             route add default via {GATEWAY4}\nroute add ::/0 via {GATEWAY6}\n"
        ))?;
        let tap = File::from(tap);
        pump(eth0.try_clone()?, tap.try_clone()?);
        pump(tap.try_clone()?, eth0);
        Ok(Self { namespace, tap, connections: Vec::new() })
    }

    pub(crate) fn connect(&mut self, to: &str) -> io::Result<usize> {
        let stream = self.stream(to)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        self.connections.push(BufReader::new(stream));
        Ok(self.connections.len() - 1)
    }

    /// Sends a line, if there is one, and returns the next one that comes.
    pub(crate) fn ask(&mut self, connection: usize, line: Option<&str>) -> io::Result<String> {
        let stream = self.connections.get_mut(connection).ok_or(io::ErrorKind::NotFound)?;
        if let Some(line) = line {
            writeln!(stream.get_mut(), "{line}")?;
        }
        let mut answer = String::new();
        if stream.read_line(&mut answer)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(answer.trim_end().to_owned())
    }

    pub(crate) fn ask_udp(&self, to: &str, line: &str) -> io::Result<String> {
        self.inside()?;
        let to = address(to)?;
        let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
        socket.set_read_timeout(Some(DEADLINE))?;
        socket.connect(to)?;
        socket.send(line.as_bytes())?;
        let mut answer = [0; 1500];
        let length = socket.recv(&mut answer)?;
        Ok(String::from_utf8_lossy(answer.get(..length).unwrap_or_default()).into_owned())
    }

    pub(crate) fn upload(&self, to: &str, bytes: usize) -> io::Result<u64> {
        let mut stream = self.stream(to)?;
        stream.set_read_timeout(Some(TRANSFER_DEADLINE))?;
        let begin = Instant::now();
        io::copy(&mut io::repeat(b'\n').take(bytes as u64), &mut stream)?;
        stream.shutdown(Shutdown::Write)?;
        io::copy(&mut stream, &mut io::sink())?;
        Ok(u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    pub(crate) fn download(&self, to: &str, bytes: usize) -> io::Result<u64> {
        let mut stream = self.stream(to)?;
        stream.set_read_timeout(Some(TRANSFER_DEADLINE))?;
        let begin = Instant::now();
        writeln!(stream, "send {bytes}")?;
        let got = io::copy(&mut Read::by_ref(&mut stream).take(bytes as u64), &mut io::sink())?;
        if got < bytes as u64 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    /// Takes an address beside its own and sends from it from now on.
    pub(crate) fn take_address(&self, address: &str) -> io::Result<()> {
        self.inside()?;
        ip(&format!("addr add {address}/32 dev eth0\nroute replace default via {GATEWAY4} src {address}\n"))
    }

    /// Sends a packet that the guest's kernel does not know of.
    pub(crate) fn send(&self, packet: &Packet) -> io::Result<()> {
        let frame = packet.frame().ok_or(io::ErrorKind::InvalidInput)?;
        (&self.tap).write_all(&frame)
    }

    fn stream(&self, to: &str) -> io::Result<TcpStream> {
        self.inside()?;
        TcpStream::connect_timeout(&address(to)?, DEADLINE)
    }

    /// The calling thread is in the guest: its new sockets are there for ever.
    fn inside(&self) -> io::Result<()> {
        Ok(setns(&self.namespace, CloneFlags::CLONE_NEWNET)?)
    }
}

fn address(text: &str) -> io::Result<SocketAddr> {
    text.parse().map_err(io::Error::other)
}

fn ip(lines: &str) -> io::Result<()> {
    let mut command = Command::new("ip");
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").args(["-batch", "-"]).stdin(Stdio::piped());
    let mut child = command.spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(lines.as_bytes())?;
    }
    let status = child.wait()?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("ip: {status}"))) }
}

fn pump(mut from: File, mut to: File) {
    std::thread::spawn(move || {
        let mut frame = vec![0; MAX_FRAME];
        // A TAP ends with the namespace or with this process; one that is down takes no frame, and loses it as a wire would.
        while let Ok(length) = from.read(&mut frame) {
            let _ = to.write(frame.get(..length).unwrap_or_default());
        }
    });
}
