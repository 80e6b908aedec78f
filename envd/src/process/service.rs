//! `process.Process` on the client door.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use envd_proto::process::process_event::{DataEvent, EndEvent, Event, KeepAlive, StartEvent, data_event};
use envd_proto::process::{
    CloseStdinRequest, CloseStdinResponse, ConnectRequest, ListRequest, ListResponse, ProcessConfig,
    ProcessEvent, SendInputRequest, SendInputResponse, SendSignalRequest, SendSignalResponse,
    Signal as WireSignal, StartRequest, process_input,
};
use futures::Stream as FuturesStream;
use http::HeaderMap;
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::net::unix::pipe;
use tokio::time::Instant;

use super::log::{End, Item, Reader, Stream};
use super::table::{Pipes, Process, ProcessTable};
use crate::connect::{self, Code, Error};
use crate::sandbox::{Leaf, Sandbox, Session};
use crate::spawner::{Launch, LaunchError};
use crate::users::User;

/// Without a wish of the client, as often as E2B's agent.
const KEEPALIVE: Duration = Duration::from_secs(90);

/// What a program gets when neither the image nor the call says anything.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A tenant's process is killed before the agent when memory runs out; E2B's value.
const OOM_SCORE_ADJ: i32 = 100;

const EAGAIN: i32 = rustix::io::Errno::AGAIN.raw_os_error();

/// Answers the calls of `process.Process`.
#[derive(Clone, Debug)]
pub struct ProcessService {
    sandbox: Arc<Sandbox>,
    table: ProcessTable,
}

impl ProcessService {
    /// A service that starts processes in `sandbox`.
    pub fn new(sandbox: Arc<Sandbox>, table: ProcessTable) -> Self {
        Self { sandbox, table }
    }

    /// Starts a process; its events until its end.
    pub async fn start(
        &self,
        session: &Arc<Session>,
        request: StartRequest,
        headers: HeaderMap,
    ) -> Result<impl FuturesStream<Item = Result<ProcessEvent, Error>> + Send + 'static + use<>, Error> {
        if request.pty.is_some() {
            return Err(Error::new(Code::Unimplemented, "terminals (pty) are not served yet"));
        }
        let deadline = connect::timeout(&headers)?.map(|timeout| Instant::now() + timeout);
        let keepalive = keepalive(&headers)?;
        let config = request
            .process
            .ok_or_else(|| Error::new(Code::InvalidArgument, "the request has no process to start"))?;
        let user = session.user(&self.sandbox, &headers).await?;
        let order = Order { config, tag: request.tag, stdin: request.stdin.unwrap_or(true), deadline };
        // In a task of its own: a client that goes away now must not leave a process that nobody knows.
        let (service, session) = (self.clone(), Arc::clone(session));
        let launched = tokio::spawn(async move { service.launch(&session, &user, order).await });
        let lost = |error| Error::new(Code::Internal, format!("starting the process: {error}"));
        let (process, reader) = launched.await.map_err(lost)??;
        Ok(events(process, reader, keepalive))
    }

    /// Attaches to a process; its events from now on.
    pub fn connect(
        &self,
        request: &ConnectRequest,
        headers: &HeaderMap,
    ) -> Result<impl FuturesStream<Item = Result<ProcessEvent, Error>> + Send + 'static + use<>, Error> {
        let keepalive = keepalive(headers)?;
        let process = self.table.find(selector(&request.process))?;
        let reader = process.log().attach();
        Ok(events(process, reader, keepalive))
    }

    /// The processes that it started.
    pub fn table(&self) -> &ProcessTable {
        &self.table
    }

    /// The processes that are alive.
    pub fn list(&self, _: &ListRequest) -> ListResponse {
        ListResponse { processes: self.table.alive().iter().map(|process| process.info()).collect() }
    }

    /// Writes to a process's standard input.
    pub async fn send_input(&self, request: SendInputRequest) -> Result<SendInputResponse, Error> {
        let process = self.table.find_alive(selector(&request.process))?;
        match request.input.and_then(|input| input.input) {
            Some(process_input::Input::Stdin(bytes)) => process.write_stdin(&bytes).await?,
            Some(process_input::Input::Pty(_)) => {
                return Err(Error::new(Code::FailedPrecondition, "the process has no terminal"));
            }
            None => return Err(Error::new(Code::InvalidArgument, "the request has no input")),
        }
        Ok(SendInputResponse {})
    }

    /// Closes a process's standard input.
    pub async fn close_stdin(&self, request: CloseStdinRequest) -> Result<CloseStdinResponse, Error> {
        self.table.find_alive(selector(&request.process))?.close_stdin().await;
        Ok(CloseStdinResponse {})
    }

    /// Sends a signal to a process.
    pub fn send_signal(&self, request: &SendSignalRequest) -> Result<SendSignalResponse, Error> {
        let signal = match WireSignal::try_from(request.signal) {
            Ok(WireSignal::Sigkill) => rustix::process::Signal::KILL,
            Ok(WireSignal::Sigterm) => rustix::process::Signal::TERM,
            Ok(WireSignal::Unspecified) | Err(_) => {
                return Err(Error::new(
                    Code::Unimplemented,
                    format!("signal {} is not served: SIGTERM and SIGKILL are", request.signal),
                ));
            }
        };
        let process = self.table.find_alive(selector(&request.process))?;
        process
            .signal(signal)
            .map_err(|error| Error::new(Code::Internal, format!("sending the signal failed: {error}")))?;
        Ok(SendSignalResponse {})
    }

    async fn launch(
        &self,
        session: &Session,
        user: &User,
        Order { config, tag, stdin, deadline }: Order,
    ) -> Result<(Arc<Process>, Reader), Error> {
        if config.cmd.is_empty() {
            return Err(Error::new(Code::InvalidArgument, "the request has no command to run"));
        }
        let envs = config.envs.iter().flat_map(|(name, value)| [name, value]);
        if config
            .args
            .iter()
            .chain([&config.cmd])
            .chain(&config.cwd)
            .chain(envs)
            .any(|text| text.contains('\0'))
        {
            let message =
                "a command, an argument, the cwd or the environment has a NUL byte, which no program can get";
            return Err(Error::new(Code::InvalidArgument, message));
        }
        let room = self.table.reserve(&config)?;
        let cwd = session.working_directory(user, config.cwd.as_deref().unwrap_or(""));
        self.check_directory(&cwd).await?;
        let env = environment(session, user, &config);
        let argv = std::iter::once(&config.cmd).chain(&config.args);

        let io_error =
            |error: io::Error| Error::new(Code::Internal, format!("making the process's pipes: {error}"));
        let ends = Ends::new(stdin).map_err(io_error)?;
        let launch = Launch {
            programs: programs(&config.cmd, &env),
            argv: argv.map(|argument| argument.clone().into_bytes()).collect(),
            env: env.iter().map(|(name, value)| format!("{name}={value}").into_bytes()).collect(),
            cwd: cwd.into_bytes(),
            credentials: self.sandbox.can_change_user().then(|| user.credentials.clone()),
            oom_score_adj: Some(OOM_SCORE_ADJ),
            stdio: [ends.child[0].as_fd(), ends.child[1].as_fd(), ends.child[2].as_fd()],
            cgroup: self.sandbox.cgroup(Leaf::User),
        };
        let spawner = self.sandbox.spawner();
        let launched = match spawner.launch(launch.clone()).await {
            // The class is full, as beside a fork bomb, and the process may be the one that clears it up.
            Err(LaunchError::Clone(EAGAIN)) => {
                spawner.launch(Launch { cgroup: self.sandbox.cgroup(Leaf::System), ..launch }).await
            }
            launched => launched,
        };
        let launched = launched.map_err(|error| launch_error(&config.cmd, &error))?;
        let pipes = ends.into_pipes().map_err(io_error)?;
        Ok(self.table.insert(launched, config, tag, pipes, deadline, room))
    }

    async fn check_directory(&self, cwd: &str) -> Result<(), Error> {
        let path = cwd.to_owned();
        let is_directory =
            self.sandbox.root().run(move || Ok(std::fs::metadata(&path)?.is_dir())).await.unwrap_or(false);
        if is_directory {
            return Ok(());
        }
        Err(Error::new(Code::InvalidArgument, format!("cwd '{cwd}' does not exist")))
    }
}

/// A process that a client wants.
struct Order {
    config: ProcessConfig,
    tag: Option<String>,
    stdin: bool,
    deadline: Option<Instant>,
}

/// Both ends of a process's pipes.
struct Ends {
    child: [OwnedFd; 3],
    stdin: Option<OwnedFd>,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

impl Ends {
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

    fn into_pipes(self) -> io::Result<Pipes> {
        Ok(Pipes {
            stdin: self.stdin.map(pipe::Sender::from_owned_fd).transpose()?,
            stdout: pipe::Receiver::from_owned_fd(self.stdout)?,
            stderr: pipe::Receiver::from_owned_fd(self.stderr)?,
        })
    }
}

fn selector(selector: &Option<envd_proto::process::ProcessSelector>) -> Option<&super::table::Selector> {
    selector.as_ref()?.selector.as_ref()
}

/// How often a client wants to hear from a quiet process.
fn keepalive(headers: &HeaderMap) -> Result<Duration, Error> {
    let Some(value) = headers.get("keepalive-ping-interval") else { return Ok(KEEPALIVE) };
    let seconds =
        value.to_str().ok().and_then(|text| text.parse::<u32>().ok()).filter(|seconds| *seconds > 0);
    let seconds = seconds.ok_or_else(|| {
        Error::new(
            Code::InvalidArgument,
            format!("Keepalive-Ping-Interval {value:?}: expected seconds, at least 1"),
        )
    })?;
    Ok(Duration::from_secs(seconds.into()))
}

/// The environment, later ones winning: the user's own, the sandbox's, the call's.
fn environment(session: &Session, user: &User, config: &ProcessConfig) -> Vec<(String, String)> {
    let mut env = std::collections::BTreeMap::from([
        ("PATH", DEFAULT_PATH),
        ("HOME", &user.home),
        ("USER", &user.name),
        ("LOGNAME", &user.name),
    ]);
    env.extend(session.env().iter().map(|(name, value)| (name.as_str(), value.as_str())));
    env.extend(config.envs.iter().map(|(name, value)| (name.as_str(), value.as_str())));
    env.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// The paths that a command can mean: itself if it has a slash, else each folder of `PATH`.
fn programs(command: &str, env: &[(String, String)]) -> Vec<Vec<u8>> {
    if command.contains('/') {
        return vec![command.as_bytes().to_vec()];
    }
    let path = env.iter().find(|(name, _)| name == "PATH").map_or(DEFAULT_PATH, |(_, path)| path);
    // An empty element means the working directory (POSIX 8.3).
    let candidate =
        |folder: &str| if folder.is_empty() { command.to_owned() } else { format!("{folder}/{command}") };
    path.split(':').map(|folder| candidate(folder).into_bytes()).collect()
}

fn launch_error(command: &str, error: &LaunchError) -> Error {
    let code = match error {
        LaunchError::Exec(_) | LaunchError::Cwd(_) | LaunchError::TooLong { .. } => Code::InvalidArgument,
        LaunchError::Clone(_) => Code::ResourceExhausted,
        LaunchError::Prepare { .. } | LaunchError::Io(_) => Code::Internal,
        LaunchError::Gone | LaunchError::Restarting | LaunchError::Lost => Code::Unavailable,
    };
    Error::new(code, format!("error starting process '{command}': {error}"))
}

enum Phase {
    Start,
    Running,
    Over,
}

/// The events of a process: its start, its output, its end.
fn events(
    process: Arc<Process>,
    reader: Reader,
    keepalive: Duration,
) -> impl FuturesStream<Item = Result<ProcessEvent, Error>> + Send + 'static {
    let event = |event| Some(ProcessEvent { event: Some(event) });
    futures::stream::unfold((process, reader, Phase::Start), move |(process, mut reader, phase)| async move {
        let item = match phase {
            Phase::Start => {
                let start = event(Event::Start(StartEvent { pid: process.pid() })).map(Ok);
                return start.map(|start| (start, (process, reader, Phase::Running)));
            }
            Phase::Over => return None,
            Phase::Running => tokio::time::timeout(keepalive, reader.next()).await,
        };
        let (result, phase) = match item {
            Ok(Item::Data(stream, bytes)) => (Ok(data(stream, bytes)), Phase::Running),
            Ok(Item::End(_)) if process.is_overdue() => (Err(Error::deadline()), Phase::Over),
            Ok(Item::End(end)) => (Ok(Event::End(end_event(end))), Phase::Over),
            Ok(Item::CutOff) => {
                let message = "this reader took no output for too long and was cut off; the process goes on";
                (Err(Error::new(Code::ResourceExhausted, message)), Phase::Over)
            }
            Err(_) => (Ok(Event::Keepalive(KeepAlive {})), Phase::Running),
        };
        Some((result.map(|kind| ProcessEvent { event: Some(kind) }), (process, reader, phase)))
    })
}

fn data(stream: Stream, bytes: Bytes) -> Event {
    let output = match stream {
        Stream::Stdout => data_event::Output::Stdout(bytes),
        Stream::Stderr => data_event::Output::Stderr(bytes),
    };
    Event::Data(DataEvent { output: Some(output) })
}

/// The end of a process in the words of Go's `os.ProcessState`, which the clients know.
fn end_event(end: End) -> EndEvent {
    let (exit_code, exited, status) = match end {
        End::Exited(code) => (code, true, format!("exit status {code}")),
        End::Signalled(signal) => (-1, false, format!("signal: {}", signal_name(signal))),
        End::Unknown => (-1, false, "unknown: the sandbox's spawner died before it told".to_owned()),
    };
    let error = (end != End::Exited(0)).then(|| status.clone());
    EndEvent { exit_code, exited, status, error }
}

/// Go's names of the signals that commonly end a process; others by number, as Go does.
fn signal_name(signal: i32) -> String {
    let name = match signal {
        1 => "hangup",
        2 => "interrupt",
        3 => "quit",
        4 => "illegal instruction",
        5 => "trace/breakpoint trap",
        6 => "aborted",
        7 => "bus error",
        8 => "floating point exception",
        9 => "killed",
        10 => "user defined signal 1",
        11 => "segmentation fault",
        12 => "user defined signal 2",
        13 => "broken pipe",
        14 => "alarm clock",
        15 => "terminated",
        other => return format!("signal {other}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_told_in_gos_words() {
        let told = |end| {
            let event = end_event(end);
            (event.exit_code, event.exited, event.status, event.error)
        };
        assert_eq!(told(End::Exited(0)), (0, true, "exit status 0".into(), None));
        assert_eq!(told(End::Exited(3)), (3, true, "exit status 3".into(), Some("exit status 3".into())));
        assert_eq!(
            told(End::Signalled(9)),
            (-1, false, "signal: killed".into(), Some("signal: killed".into()))
        );
        assert_eq!(signal_name(40), "signal 40");
    }

    #[test]
    fn commands_are_searched_in_the_path_of_the_process() {
        let env = [("PATH".to_owned(), "/a::/b".to_owned())];
        assert_eq!(programs("ls", &env), [b"/a/ls".to_vec(), b"ls".to_vec(), b"/b/ls".to_vec()]);
        assert_eq!(programs("./ls", &env), [b"./ls".to_vec()]);
    }
}
