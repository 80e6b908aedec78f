//! virtio-serial ports as tokio streams.
//!
//! A port has no connections: while no host is attached, reads give nothing and poll says HUP at once. tokio's readiness
//! would spin on that, so each direction has a thread that waits with edge-triggered epoll, which wakes on an attach.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures::SinkExt;
use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::io::{CopyToBytes, SinkWriter, StreamReader};
use tokio_util::sync::PollSender;

/// Where the kernel names its ports.
const PORTS: &str = "/sys/class/virtio-ports";

/// Pieces that wait between a thread and tokio, each way.
const QUEUE: usize = 16;

/// The most that one read or write moves; the kernel's own buffers are pages.
const CHUNK: usize = 32 << 10;

const STACK: usize = 64 << 10;

/// Whether the machine has a port of this name.
pub(crate) fn exists(name: &str) -> bool {
    device(name).is_ok()
}

/// Opens the port of this name. Must be called within a tokio runtime; a port can be opened once.
pub(crate) fn open(name: &str) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + use<>> {
    let path = device(name)?;
    let nonblock = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let port = Arc::new(OpenOptions::new().read(true).write(true).custom_flags(nonblock).open(path)?);

    let (received, incoming) = mpsc::channel(QUEUE);
    let readable = Edge::new(&port, epoll::EventFlags::IN)?;
    let reading = Arc::clone(&port);
    spawn(format!("{name}-read"), move || read_all(&reading, &readable, &received))?;

    let (outgoing, sending) = mpsc::channel::<Bytes>(QUEUE);
    let writable = Edge::new(&port, epoll::EventFlags::OUT)?;
    spawn(format!("{name}-write"), move || write_all(&port, &writable, sending))?;

    let reader = StreamReader::new(ReceiverStream::new(incoming));
    let sink = PollSender::new(outgoing).sink_map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe));
    let writer = SinkWriter::new(CopyToBytes::new(sink));
    Ok(tokio::io::join(reader, writer))
}

fn device(name: &str) -> io::Result<PathBuf> {
    for entry in fs::read_dir(PORTS)? {
        let entry = entry?;
        // A port that is about to go has no name to read.
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|found| found.trim_end() == name) {
            return Ok(PathBuf::from("/dev").join(entry.file_name()));
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("no virtio-serial port is named '{name}'")))
}

fn spawn(name: String, work: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<()> {
    let report = name.clone();
    std::thread::Builder::new().name(name).stack_size(STACK).spawn(move || {
        if let Err(error) = work() {
            crate::log::warn(format_args!("serial port {report}: {error}"));
        }
    })?;
    Ok(())
}

fn read_all(port: &File, readable: &Edge, received: &mpsc::Sender<io::Result<Bytes>>) -> io::Result<()> {
    let mut port = port;
    let mut buffer = vec![0; CHUNK];
    loop {
        match port.read(&mut buffer) {
            // No host is attached.
            Ok(0) => readable.wait()?,
            Ok(count) => {
                if received.blocking_send(Ok(Bytes::copy_from_slice(&buffer[..count]))).is_err() {
                    return Ok(());
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => readable.wait()?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn write_all(port: &File, writable: &Edge, mut sending: mpsc::Receiver<Bytes>) -> io::Result<()> {
    let mut port = port;
    while let Some(bytes) = sending.blocking_recv() {
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            match port.write(&rest[..rest.len().min(CHUNK)]) {
                Ok(count) => rest = &rest[count..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => writable.wait()?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

/// Waits for a change of one file's readiness. A change between a failed read and the wait is not lost.
struct Edge(std::os::fd::OwnedFd);

impl Edge {
    fn new(file: &File, flags: epoll::EventFlags) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, file, epoll::EventData::new_u64(0), flags | epoll::EventFlags::ET)?;
        Ok(Self(epoll))
    }

    fn wait(&self) -> io::Result<()> {
        let mut events = Vec::with_capacity(1);
        match epoll::wait(&self.0, spare_capacity(&mut events), None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
