//! `process.Process` on the client door.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use envd_proto::process::process_event::StartEvent;
use envd_proto::process::stream_input_request::Event as InputEvent;
use envd_proto::process::{
    CloseStdinRequest, CloseStdinResponse, ConnectRequest, ListRequest, ListResponse, ProcessConfig,
    ProcessEvent, ProcessInput, ProcessSelector, Scope, SendInputRequest, SendInputResponse,
    SendSignalRequest, SendSignalResponse, StartRequest, StreamInputRequest, StreamInputResponse,
    UpdateRequest, UpdateResponse, process_input,
};
use envd_sys::SignalNumber;
use futures::Stream as FuturesStream;
use http::HeaderMap;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::termios::Winsize;
use tokio::time::Instant;

use super::carry::Pipe;
use super::cgroup::OwnCgroup;
use super::environment::{environment, programs, substitute};
use super::events::{View, events};
use super::input::{Data, Input};
use super::log::{AttachError, Reader};
use super::options::Options;
use super::process::{Order, Process};
use super::table::{Output, ProcessTable, Selector};
use super::terminal::{self, Terminal};
use crate::connect::{self, Code, Error, Messages};
use crate::filesystem::path_of;
use crate::sandbox::{Leaf, Sandbox, Session};
use crate::spawner::{Launch, LaunchError, Launched};
use crate::users::User;

const EAGAIN: i32 = rustix::io::Errno::AGAIN.raw_os_error();

/// Answers the calls of `process.Process`.
#[derive(Clone, Debug)]
pub struct ProcessService {
    sandbox: Arc<Sandbox>,
    table: ProcessTable,
    /// Whether it was said that commands run with another shell than they ask for.
    told_substitute: Arc<AtomicBool>,
    /// The class of all that it starts; `None` has clients' processes in theirs.
    class: Option<Leaf>,
}

impl ProcessService {
    /// A service that starts processes in `sandbox`.
    pub fn new(sandbox: Arc<Sandbox>, table: ProcessTable) -> Self {
        Self { sandbox, table, told_substitute: Arc::default(), class: None }
    }

    /// From here on it starts everything in this class.
    pub(crate) fn set_class(&mut self, class: Leaf) {
        self.class = Some(class);
    }

    /// The processes that it has started.
    pub fn table(&self) -> &ProcessTable {
        &self.table
    }

    /// Starts a process; its events until its end. `Connect-Timeout-Ms` is the process's life.
    pub async fn start(
        &self,
        session: &Arc<Session>,
        request: StartRequest,
        headers: HeaderMap,
    ) -> Result<impl FuturesStream<Item = Result<ProcessEvent, Error>> + Send + 'static + use<>, Error> {
        let deadline = connect::timeout(&headers)?.map(|timeout| Instant::now() + timeout);
        let keepalive = connect::keepalive(&headers)?;
        let wish = Wish::parse(request)?;
        let user = session.user(&self.sandbox, &headers).await?;
        // In a task of its own: a client that goes away now must not leave a process that nobody knows.
        let (service, session) = (self.clone(), Arc::clone(session));
        let launched = tokio::spawn(async move { service.launch(&session, &user, wish, deadline).await });
        let lost = |error| Error::new(Code::Internal, format!("starting the process: {error}"));
        let (process, reader) = launched.await.map_err(lost)??;
        let start = StartEvent { pid: process.pid(), ..StartEvent::default() };
        Ok(events(View { process, reader, start, keepalive, deadline: None }))
    }

    /// Attaches to a process; its events from now on, or from an offset. `Connect-Timeout-Ms` ends this call only.
    pub fn connect(
        &self,
        request: &ConnectRequest,
        headers: &HeaderMap,
    ) -> Result<impl FuturesStream<Item = Result<ProcessEvent, Error>> + Send + 'static + use<>, Error> {
        let deadline = connect::timeout(headers)?.map(|timeout| Instant::now() + timeout);
        let keepalive = connect::keepalive(headers)?;
        let process = self.table.find(selector(&request.process))?;
        let attached = process.log().attach(request.from_offset).map_err(|error| {
            let code = match error {
                AttachError::TooMany => Code::ResourceExhausted,
                AttachError::Beyond { .. } => Code::InvalidArgument,
            };
            Error::new(code, error.to_string())
        })?;
        let start = StartEvent {
            pid: process.pid(),
            offset: request.from_offset.map(|_| attached.offset),
            dropped_bytes: attached.dropped,
            end_offset: request.from_offset.map(|_| attached.end),
        };
        Ok(events(View { process, reader: attached.reader, start, keepalive, deadline }))
    }

    /// The processes that are alive.
    pub fn list(&self, _: &ListRequest) -> ListResponse {
        ListResponse { processes: self.table.alive().iter().map(|process| process.info()).collect() }
    }

    /// Resizes a process's terminal.
    pub fn update(&self, request: &UpdateRequest) -> Result<UpdateResponse, Error> {
        let process = self.table.find_alive(selector(&request.process))?;
        if let Some(pty) = &request.pty {
            process.input().resize(terminal::size(pty)?)?;
        }
        Ok(UpdateResponse {})
    }

    /// Writes to a process's input.
    pub async fn send_input(&self, request: SendInputRequest) -> Result<SendInputResponse, Error> {
        let process = self.table.find_alive(selector(&request.process))?;
        process.input().write(&data(request.input)?).await?;
        Ok(SendInputResponse {})
    }

    /// Writes to one process's input as long as the client sends.
    pub async fn stream_input(
        &self,
        mut messages: Messages<StreamInputRequest>,
    ) -> Result<StreamInputResponse, Error> {
        let invalid = |what: &str| Error::new(Code::InvalidArgument, what.to_owned());
        let first = messages.next().await?.and_then(|message| message.event);
        let Some(InputEvent::Start(start)) = first else {
            return Err(invalid("the first message of StreamInput has to be a start event"));
        };
        let process = self.table.find_alive(selector(&start.process))?;
        while let Some(message) = messages.next().await? {
            match message.event {
                Some(InputEvent::Data(event)) => process.input().write(&data(event.input)?).await?,
                Some(InputEvent::Keepalive(_)) => {}
                Some(InputEvent::Start(_)) => {
                    return Err(invalid("StreamInput has one start event, its first"));
                }
                None => return Err(invalid("a message of StreamInput has no event")),
            }
        }
        Ok(StreamInputResponse {})
    }

    /// Closes a process's standard input.
    pub fn close_stdin(&self, request: &CloseStdinRequest) -> Result<CloseStdinResponse, Error> {
        self.table.find_alive(selector(&request.process))?.input().close_stdin()?;
        Ok(CloseStdinResponse {})
    }

    /// Sends a signal to a process, or to what it has started too.
    pub async fn send_signal(&self, request: &SendSignalRequest) -> Result<SendSignalResponse, Error> {
        let signal = SignalNumber::new(request.signal).ok_or_else(|| {
            let message = format!("signal {} does not exist: expected 1 to 64", request.signal);
            Error::new(Code::InvalidArgument, message)
        })?;
        let scope = Scope::try_from(request.scope).map_err(|_| {
            Error::new(Code::InvalidArgument, format!("scope {} does not exist", request.scope))
        })?;
        let selector = selector(&request.process);
        let process = self.table.find(selector)?;
        // A cgroup of its own still reaches what outlived the process.
        let process = match scope {
            Scope::Tree if process.has_cgroup() => process,
            _ => self.table.find_alive(selector)?,
        };
        let sent = match scope {
            Scope::Process | Scope::Group => process.signal_scope(signal, scope),
            Scope::Tree => tokio::task::spawn_blocking(move || process.signal_scope(signal, scope))
                .await
                .map_err(io::Error::other)
                .flatten(),
        };
        sent.map_err(|error| {
            let code = match error.kind() {
                io::ErrorKind::PermissionDenied => Code::PermissionDenied,
                _ => Code::Internal,
            };
            Error::new(code, format!("sending signal {} failed: {error}", signal.number()))
        })?;
        Ok(SendSignalResponse {})
    }

    async fn launch(
        &self,
        session: &Session,
        user: &User,
        Wish { config, tag, stdin, terminal, options }: Wish,
        deadline: Option<Instant>,
    ) -> Result<(Arc<Process>, Reader), Error> {
        let room = self.table.reserve(&config, tag.as_ref())?;
        let cwd = session.working_directory(user, config.cwd.as_deref().unwrap_or(""));
        let directory = path_of(&cwd);
        self.check_directory(&cwd, &directory).await?;
        let env = environment(session, user, &config, terminal.is_some());
        let leaf = self.class.unwrap_or(if terminal.is_some() { Leaf::Pty } else { Leaf::User });
        let cgroup = match (options.own_cgroup, self.sandbox.cgroup(leaf)) {
            (true, Some(leaf)) => Some(OwnCgroup::create(leaf).map_err(|error| {
                Error::new(Code::Internal, format!("making the process's cgroup: {error}"))
            })?),
            (true, None) => {
                let message = "own_cgroup: this agent runs without cgroups";
                return Err(Error::new(Code::FailedPrecondition, message));
            }
            (false, _) => None,
        };
        let io_error =
            |error: io::Error| Error::new(Code::Internal, format!("making the process's pipes: {error}"));
        let ends = match terminal {
            Some(size) => self.terminal(user, size).await.map(Ends::Terminal),
            None => Pipes::new(stdin).map(Ends::Pipes),
        }
        .map_err(io_error)?;
        let launched = self
            .run(&config, |programs, argv| Launch {
                programs: programs(&env),
                argv,
                env: env.iter().map(|(name, value)| format!("{name}={value}").into_bytes()).collect(),
                cwd: directory.as_os_str().as_bytes().to_vec(),
                credentials: self.sandbox.can_change_user().then(|| user.credentials.clone()),
                oom_score_adj: Some(options.oom_score_adj),
                terminal: terminal.is_some(),
                rlimits: options.rlimits.clone(),
                nice: options.nice,
                stdio: ends.child(),
                cgroup: cgroup.as_ref().map(OwnCgroup::directory).or(self.sandbox.cgroup(leaf)),
            })
            .await?;
        let (input, output) = ends.into_agents().map_err(io_error)?;
        let order = Order { config, tag, options, input, cgroup };
        self.table.insert(launched, order, output, deadline, room)
    }

    /// Runs a command, or what stands in for it when the image has no such program.
    async fn run<'a>(
        &self,
        config: &ProcessConfig,
        launch: impl Fn(&dyn Fn(&[(String, String)]) -> Vec<Vec<u8>>, Vec<Vec<u8>>) -> Launch<'a>,
    ) -> Result<Launched, Error> {
        let spawner = self.sandbox.spawner();
        let order = |command: &str| {
            let argv = std::iter::once(command).chain(config.args.iter().map(String::as_str));
            let argv = argv.map(|argument| argument.as_bytes().to_vec()).collect();
            launch(&|env| programs(command, env), argv)
        };
        let launched = match spawner.launch(order(&config.cmd)).await {
            // The class is full, as beside a fork bomb, and the process may be the one that clears it up.
            Err(LaunchError::Clone(EAGAIN)) => {
                let cgroup = self.sandbox.cgroup(Leaf::System);
                spawner.launch(Launch { cgroup, ..order(&config.cmd) }).await
            }
            launched => launched,
        };
        let substitute = match launched {
            Err(LaunchError::Exec(errno)) if errno == rustix::io::Errno::NOENT.raw_os_error() => {
                substitute(config)
            }
            _ => None,
        };
        let Some(substitute) = substitute else {
            return launched.map_err(|error| launch_error(&config.cmd, &error));
        };
        let launched =
            spawner.launch(order(substitute)).await.map_err(|error| launch_error(&config.cmd, &error))?;
        if !self.told_substitute.swap(true, Ordering::Relaxed) {
            crate::log::warn(format_args!(
                "the image has no {}: commands that ask for it run with {substitute}",
                config.cmd
            ));
        }
        Ok(launched)
    }

    async fn terminal(&self, user: &User, size: Winsize) -> io::Result<Terminal> {
        let owner = self.sandbox.can_change_user().then_some(user.credentials.uid);
        self.sandbox.root().run(move || terminal::open_pair(size, owner)).await
    }

    async fn check_directory(&self, cwd: &str, directory: &Path) -> Result<(), Error> {
        let path = directory.to_owned();
        let is_directory = self.sandbox.root().run(move || Ok(std::fs::metadata(&path)?.is_dir())).await;
        if is_directory.unwrap_or(false) {
            return Ok(());
        }
        Err(Error::new(Code::InvalidArgument, format!("cwd '{cwd}' does not exist")))
    }
}

/// A process that a client wants, checked.
struct Wish {
    config: ProcessConfig,
    tag: Option<String>,
    stdin: bool,
    terminal: Option<Winsize>,
    options: Options,
}

impl Wish {
    fn parse(request: StartRequest) -> Result<Self, Error> {
        let invalid = |what: &str| Error::new(Code::InvalidArgument, what.to_owned());
        let config = request.process.ok_or_else(|| invalid("the request has no process to start"))?;
        if config.cmd.is_empty() {
            return Err(invalid("the request has no command to run"));
        }
        let envs = config.envs.iter().flat_map(|(name, value)| [name, value]);
        let texts = config.args.iter().chain([&config.cmd]).chain(&config.cwd).chain(envs);
        if { texts }.any(|text| text.contains('\0')) {
            return Err(invalid(
                "a command, an argument, the cwd or the environment has a NUL byte, which no program can get",
            ));
        }
        Ok(Self {
            config,
            tag: request.tag,
            stdin: request.stdin.unwrap_or(true),
            terminal: request.pty.as_ref().map(terminal::size).transpose()?,
            options: Options::parse(request.options)?,
        })
    }
}

/// Both ends of what connects the agent with a process.
enum Ends {
    Pipes(Pipes),
    Terminal(Terminal),
}

impl Ends {
    fn child(&self) -> [BorrowedFd<'_>; 3] {
        match self {
            Self::Pipes(pipes) => [pipes.child[0].as_fd(), pipes.child[1].as_fd(), pipes.child[2].as_fd()],
            Self::Terminal(terminal) => [terminal.slave.as_fd(); 3],
        }
    }

    fn into_agents(self) -> io::Result<(Input, Output)> {
        match self {
            Self::Pipes(pipes) => {
                let input = match pipes.stdin {
                    Some(stdin) => Input::pipe(Pipe::new(stdin)?),
                    None => Input::nothing(),
                };
                let (stdout, stderr) = (Pipe::new(pipes.stdout)?, Pipe::new(pipes.stderr)?);
                Ok((input, Output::Pipes { stdout, stderr }))
            }
            Self::Terminal(terminal) => {
                let terminal = Arc::new(Pipe::new(terminal.master)?);
                Ok((Input::terminal(Arc::clone(&terminal)), Output::Terminal(terminal)))
            }
        }
    }
}

struct Pipes {
    child: [OwnedFd; 3],
    stdin: Option<OwnedFd>,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

impl Pipes {
    fn new(stdin: bool) -> io::Result<Self> {
        let (child_in, stdin) = if stdin {
            let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
            (read, Some(write))
        } else {
            (File::open("/dev/null")?.into(), None)
        };
        let (stdout, child_out) = pipe_with(PipeFlags::CLOEXEC)?;
        let (stderr, child_err) = pipe_with(PipeFlags::CLOEXEC)?;
        Ok(Self { child: [child_in, child_out, child_err], stdin, stdout, stderr })
    }
}

fn selector(selector: &Option<ProcessSelector>) -> Option<&Selector> {
    selector.as_ref()?.selector.as_ref()
}

fn data(input: Option<ProcessInput>) -> Result<Data, Error> {
    match input.and_then(|input| input.input) {
        Some(process_input::Input::Stdin(bytes)) => Ok(Data::Stdin(bytes)),
        Some(process_input::Input::Pty(bytes)) => Ok(Data::Terminal(bytes)),
        None => Err(Error::new(Code::InvalidArgument, "the request has no input")),
    }
}

fn launch_error(command: &str, error: &LaunchError) -> Error {
    let code = match error {
        LaunchError::Exec(_) | LaunchError::Cwd(_) | LaunchError::TooLong { .. } => Code::InvalidArgument,
        LaunchError::Clone(_) => Code::ResourceExhausted,
        LaunchError::Limits(errno) => match io::Error::from_raw_os_error(*errno).kind() {
            io::ErrorKind::PermissionDenied => Code::PermissionDenied,
            io::ErrorKind::InvalidInput => Code::InvalidArgument,
            _ => Code::Internal,
        },
        LaunchError::Prepare { .. } | LaunchError::Io(_) => Code::Internal,
        LaunchError::Gone | LaunchError::Restarting | LaunchError::Lost => Code::Unavailable,
    };
    Error::new(code, format!("error starting process '{command}': {error}"))
}
