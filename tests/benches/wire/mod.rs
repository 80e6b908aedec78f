//! The thinnest client: HTTP/1.1 and envelopes over a blocking socket, so that a measurement is of the agent.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use envd_proto::process::process_event::{Event, data_event};
use envd_proto::process::{ConnectResponse, ProcessConfig, StartRequest};
use prost::Message;

/// There only to catch a hang.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);

/// An agent as an ordinary process, in a folder of its own.
pub(crate) struct Agent {
    child: Child,
    folder: tempfile::TempDir,
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Agent {
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listen = format!("unix:{}", folder.path().join("envd.sock").display());
        let child = Command::new(e2e::made("TIFFIN_AGENT"))
            .args(["--listen", &listen, "--no-container"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let agent = Self { child, folder };
        let begin = Instant::now();
        while UnixStream::connect(agent.folder.path().join("envd.sock")).is_err() {
            assert!(begin.elapsed() < DEADLINE, "the agent does not listen");
            std::thread::sleep(Duration::from_millis(2));
        }
        agent
    }

    pub(crate) fn wire(&self) -> Wire {
        Wire::new(connect(&self.folder.path().join("envd.sock")).unwrap())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

/// A connection on which nothing waits for ever.
pub(crate) fn connect(socket: &Path) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.set_write_timeout(Some(DEADLINE))?;
    Ok(stream)
}

/// A connection to the client door.
pub(crate) struct Wire {
    stream: BufReader<UnixStream>,
    body: Body,
}

enum Body {
    None,
    Length(u64),
    /// What is left of the chunk; `None` before a chunk's header.
    Chunked(Option<u64>),
}

impl Wire {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self { stream: BufReader::with_capacity(256 << 10, stream), body: Body::None }
    }

    /// Sends a request with a whole body; gives the status. The answer's body must be read before the next one.
    pub(crate) fn request(&mut self, method: &str, path: &str, kind: &str, body: &[u8]) -> io::Result<u16> {
        self.begin(method, path, kind, body.len() as u64)?;
        self.stream.get_mut().write_all(body)?;
        self.answer()
    }

    /// Sends a request's head; the body of that length follows by [`Wire::raw`].
    pub(crate) fn begin(&mut self, method: &str, path: &str, kind: &str, length: u64) -> io::Result<()> {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: sandbox\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n"
        );
        self.stream.get_mut().write_all(head.as_bytes())
    }

    pub(crate) fn raw(&mut self) -> &mut UnixStream {
        self.stream.get_mut()
    }

    /// Reads an answer's head.
    pub(crate) fn answer(&mut self) -> io::Result<u16> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.ok_or_else(|| io::Error::other(format!("no status in {line:?}")))?;
        self.body = Body::None;
        loop {
            let mut line = String::new();
            self.stream.read_line(&mut line)?;
            let line = line.trim_end().to_ascii_lowercase();
            match line.split_once(": ") {
                Some(("content-length", length)) => {
                    self.body = Body::Length(length.parse().map_err(io::Error::other)?);
                }
                Some(("transfer-encoding", "chunked")) => self.body = Body::Chunked(None),
                _ if line.is_empty() => return Ok(status),
                _ => {}
            }
        }
    }

    /// Reads the rest of the answer's body.
    pub(crate) fn rest(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Reads the rest of the answer's body to nowhere.
    pub(crate) fn drain(&mut self) -> io::Result<u64> {
        let mut buffer = vec![0; 256 << 10];
        let mut total = 0;
        loop {
            match self.read(&mut buffer)? {
                0 => return Ok(total),
                count => total += count as u64,
            }
        }
    }

    /// Begins a process; its events follow by [`Wire::event`].
    pub(crate) fn start(&mut self, tag: Option<&str>, command: &str, arguments: &[&str]) -> io::Result<()> {
        let config = ProcessConfig {
            cmd: command.into(),
            args: arguments.iter().map(|&argument| argument.into()).collect(),
            ..Default::default()
        };
        let request = StartRequest {
            process: Some(config),
            tag: tag.map(str::to_owned),
            stdin: Some(false),
            ..Default::default()
        };
        self.stream_call("Start", &request.encode_to_vec())
    }

    /// Begins a call of `process.Process` that answers with events.
    pub(crate) fn stream_call(&mut self, method: &str, message: &[u8]) -> io::Result<()> {
        let path = format!("/process.Process/{method}");
        let status = self.request("POST", &path, "application/connect+proto", &envelope(message))?;
        if status == 200 { Ok(()) } else { Err(io::Error::other(format!("{method}: status {status}"))) }
    }

    /// The next event of a process; an error in the end frame is an error.
    pub(crate) fn event(&mut self) -> io::Result<Event> {
        let mut header = [0; 5];
        self.read_exact(&mut header)?;
        let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]);
        let mut message = vec![0; length as usize];
        self.read_exact(&mut message)?;
        if header[0] != 0 {
            return Err(io::Error::other(String::from_utf8_lossy(&message).into_owned()));
        }
        // Start and Connect answer with messages of one shape.
        let response = ConnectResponse::decode(&message[..])?;
        response
            .event
            .and_then(|event| event.event)
            .ok_or_else(|| io::Error::other("an event without a kind"))
    }

    /// Runs a process to the end of its stream; gives the number of bytes that it printed and its exit code.
    pub(crate) fn run(&mut self, command: &str, arguments: &[&str]) -> io::Result<(u64, i32)> {
        self.start(None, command, arguments)?;
        let mut printed = 0;
        loop {
            match self.event()? {
                Event::Data(data) => match data.output {
                    Some(data_event::Output::Stdout(bytes) | data_event::Output::Stderr(bytes)) => {
                        printed += bytes.len() as u64;
                    }
                    _ => return Err(io::Error::other("an output of another kind")),
                },
                Event::End(end) => {
                    self.rest()?;
                    return Ok((printed, end.exit_code));
                }
                Event::Start(_) | Event::Keepalive(_) => {}
            }
        }
    }
}

impl Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let left = match &mut self.body {
                Body::None | Body::Length(0) => return Ok(0),
                Body::Length(left) | Body::Chunked(Some(left)) if *left > 0 => left,
                Body::Chunked(state) => {
                    let mut line = String::new();
                    if state.is_some() {
                        self.stream.read_line(&mut line)?;
                        line.clear();
                    }
                    self.stream.read_line(&mut line)?;
                    let length = u64::from_str_radix(line.trim_end(), 16).map_err(io::Error::other)?;
                    *state = Some(length);
                    if length == 0 {
                        self.stream.read_line(&mut line)?;
                        self.body = Body::None;
                        return Ok(0);
                    }
                    continue;
                }
                Body::Length(_) => return Ok(0),
            };
            let most = buffer.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
            let count = self.stream.read(&mut buffer[..most])?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            *left -= count as u64;
            return Ok(count);
        }
    }
}

/// A message in the envelope of a stream.
pub(crate) fn envelope(message: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0];
    bytes.extend_from_slice(&(message.len() as u32).to_be_bytes());
    bytes.extend_from_slice(message);
    bytes
}

/// A line of /proc/PID/status in KiB, such as `VmRSS`.
pub(crate) fn kib(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("no {name}"));
    line.trim_start_matches(':').trim().trim_end_matches("kB").trim().parse().unwrap()
}

/// The memory of a process, resident, in KiB.
pub(crate) fn rss(pid: u32) -> u64 {
    kib(&std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap(), "VmRSS")
}
