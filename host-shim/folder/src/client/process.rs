//! Processes in the sandbox.

use bytes::Bytes;
use envd_proto::process::process_event::{Event, data_event};
use envd_proto::process::process_input::Input;
use envd_proto::process::{
    CloseStdinRequest, CloseStdinResponse, ConnectRequest, ProcessInput, ProcessSelector, Pty, Scope,
    SendInputRequest, SendInputResponse, SendSignalRequest, SendSignalResponse, Signal, StartRequest,
    StartResponse, UpdateRequest, UpdateResponse, pty,
};
use hyper::client::conn::http1::SendRequest;
use prost::Message;

use super::stream::Messages;
use super::{Body, ClientError, Exit, SandboxClient, by_pid};

/// Something that a process printed, or its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Bytes of its standard output.
    Stdout(Bytes),
    /// Bytes of its standard error.
    Stderr(Bytes),
    /// Bytes of its terminal.
    Pty(Bytes),
    /// Its end; nothing comes after it.
    Ended(Exit),
}

/// A process that ended, with all that it printed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completed {
    /// How it ended.
    pub exit: Exit,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

/// A process in the sandbox. Dropped, it is left to run.
pub struct Process {
    client: SandboxClient,
    pid: u32,
    /// The answers of Connect have the same form.
    events: Messages<StartResponse>,
    dropped: u64,
    replay: Option<u64>,
    /// The byte of its output that comes next; unknown to one that began in the middle.
    position: Option<u64>,
}

impl Process {
    pub(super) async fn start(client: SandboxClient, request: StartRequest) -> Result<Self, ClientError> {
        let mut process = Self::begin(client, "process.Process/Start", &request).await?;
        process.position = Some(0);
        Ok(process)
    }

    async fn begin(client: SandboxClient, method: &str, request: &impl Message) -> Result<Self, ClientError> {
        let mut events = Messages::open(&client, method, request).await?;
        match next_event(&mut events).await? {
            Some(Event::Start(start)) => {
                let replay = start.offset.zip(start.end_offset);
                let replay = replay.map(|(begin, end)| end.saturating_sub(begin));
                let position = start.offset;
                Ok(Self { client, pid: start.pid, events, dropped: start.dropped_bytes, replay, position })
            }
            Some(_) => Err(ClientError::protocol("the start of a process", "another event")),
            None => Err(ClientError::protocol("the start of a process", "the end of the stream")),
        }
    }

    /// Its process id in the sandbox.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What it prints next, or its end. What is not asked for is not read: a slow reader slows the process.
    pub async fn next(&mut self) -> Result<Output, ClientError> {
        loop {
            match next_event(&mut self.events).await? {
                Some(Event::Data(data)) => {
                    self.dropped = self.dropped.saturating_add(data.dropped_bytes);
                    let length = match &data.output {
                        Some(
                            data_event::Output::Stdout(bytes)
                            | data_event::Output::Stderr(bytes)
                            | data_event::Output::Pty(bytes),
                        ) => bytes.len() as u64,
                        None => 0,
                    };
                    let passed = length.saturating_add(data.dropped_bytes);
                    self.position = self.position.map(|position| position.saturating_add(passed));
                    match data.output {
                        Some(data_event::Output::Stdout(bytes)) => return Ok(Output::Stdout(bytes)),
                        Some(data_event::Output::Stderr(bytes)) => return Ok(Output::Stderr(bytes)),
                        Some(data_event::Output::Pty(bytes)) => return Ok(Output::Pty(bytes)),
                        None => {}
                    }
                }
                Some(Event::End(end)) => {
                    let exit = Exit::of(&end);
                    let exit =
                        exit.ok_or_else(|| ClientError::protocol("a process's end", format!("{end:?}")))?;
                    return Ok(Output::Ended(exit));
                }
                Some(Event::Keepalive(_) | Event::Start(_)) => {}
                None => return Err(ClientError::protocol("the end of the process", "the end of the stream")),
            }
        }
    }

    /// Begins a new stream where one broke: what it printed meanwhile comes next, or is counted as
    /// [dropped](Self::take_dropped). Snapshots of some VMMs cut every stream.
    pub async fn reattach(&mut self) -> Result<(), ClientError> {
        let Some(position) = self.position else {
            return Err(ClientError::protocol("a stream that began at a known byte", "another"));
        };
        let again = self.client.attach(by_pid(self.pid).unwrap_or_default(), Some(position)).await?;
        self.events = again.events;
        self.dropped = self.dropped.saturating_add(again.dropped);
        self.position = again.position.or(Some(position));
        Ok(())
    }

    /// How many of the bytes that come were printed before this attached; `None` where that was not asked for.
    pub fn replay_bytes(&self) -> Option<u64> {
        self.replay
    }

    /// Bytes that it printed and that were lost since this was asked last: the sandbox keeps only the newest.
    pub fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }

    /// Waits for its end and collects what it prints.
    pub async fn output(mut self) -> Result<Completed, ClientError> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            match self.next().await? {
                Output::Stdout(bytes) | Output::Pty(bytes) => stdout.extend_from_slice(&bytes),
                Output::Stderr(bytes) => stderr.extend_from_slice(&bytes),
                Output::Ended(exit) => return Ok(Completed { exit, stdout, stderr }),
            }
        }
    }

    /// Its standard input.
    pub fn stdin(&self) -> Stdin {
        Stdin { client: self.client.clone(), pid: self.pid, wrap: Input::Stdin, connection: None }
    }

    /// The input of its terminal, where it was started with one.
    pub fn terminal(&self) -> Stdin {
        Stdin { client: self.client.clone(), pid: self.pid, wrap: Input::Pty, connection: None }
    }

    /// Sends it a signal.
    pub async fn signal(&self, signal: Signal) -> Result<(), ClientError> {
        self.client.send_signal(self.pid, signal).await
    }
}

impl SandboxClient {
    /// Attaches to a process that was started before, from this byte of its output on, or from now on.
    pub async fn attach(
        &self,
        process: ProcessSelector,
        from_offset: Option<u64>,
    ) -> Result<Process, ClientError> {
        let request = ConnectRequest { process: Some(process), from_offset };
        Process::begin(self.clone(), "process.Process/Connect", &request).await
    }

    /// Sends a signal to a process, or to more.
    pub async fn send_signal_to(&self, pid: u32, signal: Signal, scope: Scope) -> Result<(), ClientError> {
        let request = SendSignalRequest { process: by_pid(pid), signal: signal.into(), scope: scope.into() };
        self.unary("process.Process/SendSignal", &request).await.map(|SendSignalResponse {}| ())
    }

    /// Resizes a process's terminal.
    pub async fn resize(&self, pid: u32, size: pty::Size) -> Result<(), ClientError> {
        let request = UpdateRequest { process: by_pid(pid), pty: Some(Pty { size: Some(size) }) };
        self.unary("process.Process/Update", &request).await.map(|UpdateResponse {}| ())
    }
}

/// The next event; `None` at the stream's end.
async fn next_event(events: &mut Messages<StartResponse>) -> Result<Option<Event>, ClientError> {
    while let Some(message) = events.next().await? {
        // One without an event that we know is a newer agent's.
        if let Some(event) = message.event.and_then(|event| event.event) {
            return Ok(Some(event));
        }
    }
    Ok(None)
}

/// The standard input of a process, or the input of its terminal. Dropped, the input stays open; [`Stdin::close`] closes it.
pub struct Stdin {
    client: SandboxClient,
    pid: u32,
    wrap: fn(Bytes) -> Input,
    connection: Option<SendRequest<Body>>,
}

impl Stdin {
    /// Writes bytes; returns when the process's pipe has taken them.
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), ClientError> {
        let input = Some(ProcessInput { input: Some((self.wrap)(bytes)) });
        let request = SendInputRequest { process: by_pid(self.pid), input };
        self.call("process.Process/SendInput", &request).await.map(|SendInputResponse {}| ())
    }

    /// Closes it: the process reads an end of file.
    pub async fn close(mut self) -> Result<(), ClientError> {
        let request = CloseStdinRequest { process: by_pid(self.pid) };
        self.call("process.Process/CloseStdin", &request).await.map(|CloseStdinResponse {}| ())
    }

    /// Writes follow each other closely: they share a connection for as long as the sandbox keeps it.
    async fn call<M: Message, R: Message + Default>(
        &mut self,
        method: &str,
        message: &M,
    ) -> Result<R, ClientError> {
        let kept = match self.connection.take() {
            Some(mut connection) => connection.ready().await.is_ok().then_some(connection),
            None => None,
        };
        let mut connection = match kept {
            Some(connection) => connection,
            None => self.client.connect().await?,
        };
        let response = self.client.unary_on(&mut connection, method, message).await?;
        self.connection = Some(connection);
        Ok(response)
    }
}
