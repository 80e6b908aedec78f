//! The control connection: what the host says to the agent, and what it believes of the agent's words.
//!
//! The first message must be the Hello of this generation, and there is one: whoever has root in the guest can speak
//! on this connection's other end, so everything that is not an answer, a log line or an event ends it. Lines and events go
//! to the shim's log, a bounded number of them in each second.

mod news;
mod pace;

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use envd_channel::control::{ControlReader, ControlWriter, Framing};
use envd_proto::control::from_agent::Message;
use envd_proto::control::from_host::Request;
use envd_proto::control::{
    Configure, Freeze, FromAgent, FromHost, Hello, Rehearse, Response, Resume, Resumed, Shutdown, Thaw,
    error::Code, response,
};
use envd_proto::{OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION};
use sandbox_folder::client::Stream;
use tokio::io::{AsyncReadExt, Chain, ReadHalf, WriteHalf};
use tokio::sync::{Mutex as AsyncMutex, oneshot, watch};
use tokio_util::task::AbortOnDropHandle;

use news::News;
use pace::Paced;

/// The longest text of the agent that is shown.
const MAX_TEXT: usize = 2 << 10;

/// How long an answer may take beyond what the request itself allows.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);

/// How long an answer is waited for that may not come soon.
const SOON: Duration = Duration::from_secs(1);

/// How long a Resume may take: the image's hooks run in it, each with a deadline of the agent's.
const RESUME_DEADLINE: Duration = Duration::from_secs(300);

/// What can go wrong on the control connection.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The agent's boot failed.
    #[error("the guest's boot failed at the step {step}: {message}")]
    BootFailed {
        /// The step, as the agent names it.
        step: String,
        /// The agent's words.
        message: String,
    },
    /// The agent speaks another version of the protocol.
    #[error(
        "the agent speaks the control protocol {oldest} to {newest}, this host-shim {OLDEST_PROTOCOL_VERSION} to {PROTOCOL_VERSION}: \
         use a guest image and a host-shim of the same release"
    )]
    Version {
        /// The oldest version that the agent speaks.
        oldest: u32,
        /// The newest.
        newest: u32,
    },
    /// The agent broke the protocol.
    #[error("the agent broke the control protocol: expected {expected}, got {got}")]
    Protocol {
        /// What was expected.
        expected: &'static str,
        /// What came.
        got: String,
    },
    /// The agent refused a request.
    #[error("the agent refused the {request}: {message} ({code:?})")]
    Refused {
        /// Which request.
        request: &'static str,
        /// The kind of the refusal.
        code: Code,
        /// The agent's words.
        message: String,
    },
    /// The agent did not answer.
    #[error("the agent did not answer the {request} within {} s", deadline.as_secs())]
    NoAnswer {
        /// Which request.
        request: &'static str,
        /// How long it had.
        deadline: Duration,
    },
    /// The connection ended.
    #[error("the control connection to the agent ended")]
    Ended,
    /// The operating system refused.
    #[error("the control connection to the agent failed: {0}")]
    Io(#[from] io::Error),
}

/// What a [record](envd_channel::record) begins with, and no line of JSON.
const FIRST_OF_RECORD: u8 = 0x89;

/// What the agent says, with what was read of it to see how it says it.
type Said = Chain<io::Cursor<Vec<u8>>, Paced<ReadHalf<Stream>>>;

/// Messages of another generation in a row: what a serial port has held since an earlier one.
const MAX_STALE: u32 = 1024;

/// A ready agent, or one that was restored and does not know it yet.
pub struct Agent {
    session: Arc<Session>,
    writer: AsyncMutex<Writer>,
    ended: watch::Receiver<Option<String>>,
    _reader: AbortOnDropHandle<()>,
}

/// What the reader and the requests of a connection share.
struct Session {
    /// The life that the machine is in. Messages of another are what an earlier one left on a serial port.
    generation: AtomicU64,
    pending: Mutex<HashMap<u64, oneshot::Sender<Response>>>,
    /// Who waits for the Hello after a Resume; without one a Hello is a forgery.
    hello: Mutex<Option<oneshot::Sender<Hello>>>,
}

struct Writer {
    writer: ControlWriter<WriteHalf<Stream>, FromHost>,
    last_id: u64,
}

impl Agent {
    /// Waits for the Hello of `generation`. The caller sets the deadline.
    ///
    /// `framing` is the channel's. The first agents of version 1 spoke records everywhere, and are spoken to likewise.
    pub async fn handshake(
        stream: Stream,
        framing: Framing,
        generation: u64,
    ) -> Result<(Self, Hello), AgentError> {
        let (mut read, write) = tokio::io::split(stream);
        let mut begin = Vec::new();
        if framing == Framing::Lines {
            begin.push(read.read_u8().await.map_err(ended)?);
        }
        let framing = if begin == [FIRST_OF_RECORD] { Framing::Records } else { framing };
        let mut reader =
            ControlReader::<Said, FromAgent>::new(io::Cursor::new(begin).chain(Paced::new(read)), framing);
        let received = reader.receive().await.map_err(tell)?;
        let (got, message) = received.ok_or(AgentError::Ended)?;
        let hello = match message.message {
            Some(Message::Hello(hello)) => hello,
            Some(Message::Failed(failed)) => {
                let (step, message) = (printable(&failed.step), printable(&failed.message));
                return Err(AgentError::BootFailed { step, message });
            }
            Some(Message::Response(_)) => return Err(protocol("a Hello", "a Response")),
            Some(Message::Log(_) | Message::Event(_)) => return Err(protocol("a Hello", "news")),
            None => return Err(protocol("a Hello", "a message of an unknown kind")),
        };
        for found in [got, hello.generation] {
            check_generation(found, generation)?;
        }
        check_version(&hello)?;
        Ok((Self::new(reader, write, framing, generation), hello))
    }

    /// An agent of a machine that was restored from `generation`, on a serial port: it says nothing before [`Agent::resume`].
    pub fn restored(stream: Stream, generation: u64) -> Self {
        let (read, write) = tokio::io::split(stream);
        let reader =
            ControlReader::new(io::Cursor::new(Vec::new()).chain(Paced::new(read)), Framing::Records);
        Self::new(reader, write, Framing::Records, generation)
    }

    fn new(
        reader: ControlReader<Said, FromAgent>,
        write: WriteHalf<Stream>,
        framing: Framing,
        generation: u64,
    ) -> Self {
        let session = Arc::new(Session {
            generation: AtomicU64::new(generation),
            pending: Mutex::default(),
            hello: Mutex::new(None),
        });
        let (end, ended) = watch::channel(None);
        let route = route(reader, Arc::clone(&session), end);
        Self {
            session,
            writer: AsyncMutex::new(Writer { writer: ControlWriter::new(write, framing), last_id: 0 }),
            ended,
            _reader: AbortOnDropHandle::new(tokio::spawn(route)),
        }
    }

    /// The life that the machine is in.
    pub fn generation(&self) -> u64 {
        self.session.generation.load(Ordering::Relaxed)
    }

    /// Makes the machine somebody's sandbox; client calls are accepted when this returns.
    pub async fn configure(&self, configure: Configure) -> Result<(), AgentError> {
        self.request("Configure", Request::Configure(configure), ANSWER_DEADLINE).await.map(drop)
    }

    /// Holds the tenant's processes still. Client calls are refused until [`Agent::thaw`].
    pub async fn freeze(&self, freeze: Freeze) -> Result<(), AgentError> {
        self.request("Freeze", Request::Freeze(freeze), ANSWER_DEADLINE).await.map(drop)
    }

    /// Lets the tenant's processes go on.
    pub async fn thaw(&self) -> Result<(), AgentError> {
        self.request("Thaw", Request::Thaw(Thaw {}), ANSWER_DEADLINE).await.map(drop)
    }

    /// Asks for a [`Agent::thaw`] of an agent that may not answer now. It is done after all that was asked before.
    pub async fn thaw_soon(&self) -> Result<(), AgentError> {
        self.request("Thaw", Request::Thaw(Thaw {}), SOON).await.map(drop)
    }

    /// Runs a process that does nothing in a frozen machine, so that the first one of a tenant is not the machine's first.
    pub async fn rehearse(&self) -> Result<(), AgentError> {
        let answer = self.request("Rehearse", Request::Rehearse(Rehearse {}), ANSWER_DEADLINE).await?;
        if let Some(response::Result::Rehearsed(rehearsed)) = answer
            && !rehearsed.not_executed.is_empty()
        {
            tracing::info!(reason = printable(&rehearsed.not_executed), "the rehearsal ended early");
        }
        Ok(())
    }

    /// Tells a frozen machine that it goes on from a snapshot, in the next generation. The host's new mux session begins when
    /// this returns.
    pub async fn resume(&self, mut resume: Resume) -> Result<(Hello, Resumed), AgentError> {
        let before = self.generation();
        resume.generation = before + 1;
        let (greeted, hello) = oneshot::channel();
        *self.session.hello.lock().unwrap_or_else(PoisonError::into_inner) = Some(greeted);
        self.session.generation.store(resume.generation, Ordering::Relaxed);
        let answer = self.request("Resume", Request::Resume(resume), RESUME_DEADLINE).await;
        let resumed = match answer {
            Ok(Some(response::Result::Resumed(resumed))) => resumed,
            Ok(_) => return Err(protocol("what the Resume did", "another answer")),
            Err(error) => {
                // A Resume that was refused changed nothing.
                self.session.generation.store(before, Ordering::Relaxed);
                return Err(error);
            }
        };
        let hello = tokio::time::timeout(ANSWER_DEADLINE, hello).await;
        let deadline = ANSWER_DEADLINE;
        let no_answer = |_| AgentError::NoAnswer { request: "Resume with a Hello", deadline };
        let hello = hello.map_err(no_answer)?.map_err(|_| AgentError::Ended)?;
        check_generation(hello.generation, before + 1)?;
        check_version(&hello)?;
        Ok((hello, resumed))
    }

    /// Asks for the end: processes get SIGTERM, after `grace` SIGKILL, then the machine powers off.
    pub async fn shutdown(&self, grace: Duration) -> Result<(), AgentError> {
        let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        let shutdown = Request::Shutdown(Shutdown { grace_ms });
        self.request("Shutdown", shutdown, grace + ANSWER_DEADLINE).await.map(drop)
    }

    /// Waits for the end of the connection, and says why.
    pub async fn ended(&self) -> String {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            Err(_) => "its reader ended".to_owned(),
        }
    }

    async fn request(
        &self,
        name: &'static str,
        request: Request,
        deadline: Duration,
    ) -> Result<Option<response::Result>, AgentError> {
        let exchange = async {
            let (reply, answer) = oneshot::channel();
            {
                let mut writer = self.writer.lock().await;
                writer.last_id += 1;
                let id = writer.last_id;
                self.session.pending.lock().unwrap_or_else(PoisonError::into_inner).insert(id, reply);
                let message = FromHost { id, request: Some(request) };
                writer.writer.send(self.generation(), &message).await?;
            }
            if self.ended.borrow().is_some() {
                return Err(AgentError::Ended);
            }
            answer.await.map_err(|_| AgentError::Ended)
        };
        let response = tokio::time::timeout(deadline, exchange)
            .await
            .map_err(|_| AgentError::NoAnswer { request: name, deadline })??;
        match response.error {
            None => Ok(response.result),
            Some(error) => {
                let message = printable(&error.message);
                Err(AgentError::Refused { request: name, code: error.code(), message })
            }
        }
    }
}

fn check_generation(found: u64, expected: u64) -> Result<(), AgentError> {
    if found == expected {
        return Ok(());
    }
    let got = format!("one of generation {found}");
    Err(AgentError::Protocol { expected: "a Hello of this sandbox's generation", got })
}

fn check_version(hello: &Hello) -> Result<(), AgentError> {
    let (oldest, newest) = (hello.oldest_protocol_version, hello.protocol_version);
    if newest < OLDEST_PROTOCOL_VERSION || oldest > PROTOCOL_VERSION || oldest > newest {
        return Err(AgentError::Version { oldest, newest });
    }
    Ok(())
}

/// Gives answers to whoever waits for them, until the connection ends or the agent says what it must not.
async fn route(
    mut reader: ControlReader<Said, FromAgent>,
    session: Arc<Session>,
    end: watch::Sender<Option<String>>,
) {
    let mut news = News::default();
    let mut stale = 0;
    let reason = loop {
        let message = match reader.receive().await {
            Ok(Some((got, message))) if got == session.generation.load(Ordering::Relaxed) => message.message,
            Ok(Some(_)) if stale < MAX_STALE => {
                stale += 1;
                continue;
            }
            Ok(Some((got, _))) => break format!("more than {MAX_STALE} messages of generation {got}"),
            Ok(None) => break "the agent closed it".to_owned(),
            Err(error) => break printable(&error.to_string()),
        };
        stale = 0;
        match message {
            Some(Message::Response(response)) => {
                let waiting =
                    session.pending.lock().unwrap_or_else(PoisonError::into_inner).remove(&response.id);
                match waiting {
                    // A requester that gave up is no fault of the agent's.
                    Some(reply) => drop(reply.send(response)),
                    None => break format!("an answer to {}, which is no open request", response.id),
                }
            }
            Some(Message::Log(line)) => news.log(&line),
            Some(Message::Event(event)) => news.event(event),
            Some(Message::Hello(hello)) => {
                match session.hello.lock().unwrap_or_else(PoisonError::into_inner).take() {
                    Some(greeted) => drop(greeted.send(hello)),
                    None => break "a second Hello".to_owned(),
                }
            }
            Some(Message::Failed(failed)) => {
                break format!(
                    "the agent failed: {}: {}",
                    printable(&failed.step),
                    printable(&failed.message)
                );
            }
            // A newer agent's message.
            None => {}
        }
    };
    tracing::info!(reason, "the control connection ended");
    let _ = end.send(Some(reason));
    session.pending.lock().unwrap_or_else(PoisonError::into_inner).clear();
    session.hello.lock().unwrap_or_else(PoisonError::into_inner).take();
}

fn ended(error: io::Error) -> AgentError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => AgentError::Ended,
        _ => AgentError::Io(error),
    }
}

/// An error may quote the guest.
fn tell(error: io::Error) -> AgentError {
    AgentError::Io(io::Error::new(error.kind(), printable(&error.to_string())))
}

fn protocol(expected: &'static str, got: &str) -> AgentError {
    AgentError::Protocol { expected, got: got.to_owned() }
}

/// The guest's text without what would act on a terminal, and not without end.
pub(crate) fn printable(text: &str) -> String {
    text.chars().filter(|&c| c == '\n' || !c.is_control()).take(MAX_TEXT).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use envd_proto::control::{Error as WireError, Failed};
    use tokio::io::{AsyncWriteExt, DuplexStream};

    const GENERATION: u64 = 1;
    const FRAMING: Framing = Framing::Lines;

    fn hello() -> Hello {
        Hello {
            protocol_version: PROTOCOL_VERSION,
            oldest_protocol_version: PROTOCOL_VERSION,
            generation: GENERATION,
            ..Hello::default()
        }
    }

    fn message(message: Message) -> FromAgent {
        FromAgent { message: Some(message) }
    }

    /// The guest's end of a connection.
    struct Fake {
        writer: ControlWriter<WriteHalf<DuplexStream>, FromAgent>,
        reader: ControlReader<ReadHalf<DuplexStream>, FromHost>,
    }

    impl Fake {
        fn new() -> (Self, Stream) {
            Self::speaking(FRAMING)
        }

        fn speaking(framing: Framing) -> (Self, Stream) {
            let (host, guest) = tokio::io::duplex(1 << 16);
            let (read, write) = tokio::io::split(guest);
            let writer = ControlWriter::new(write, framing);
            (Self { writer, reader: ControlReader::new(read, framing) }, Box::new(host))
        }

        async fn say(&mut self, said: Message) {
            self.writer.send(GENERATION, &message(said)).await.unwrap();
        }

        async fn answer(&mut self, error: Option<WireError>) -> FromHost {
            let (generation, request) = self.reader.receive().await.unwrap().unwrap();
            assert_eq!(generation, GENERATION);
            self.say(Message::Response(Response { id: request.id, error, result: None })).await;
            request
        }
    }

    async fn ready() -> (Fake, Agent) {
        let (mut fake, stream) = Fake::new();
        fake.say(Message::Hello(hello())).await;
        let (agent, _) = Agent::handshake(stream, FRAMING, GENERATION).await.unwrap();
        (fake, agent)
    }

    async fn refused(first: Message, generation: u64) -> String {
        let (mut fake, stream) = Fake::new();
        fake.writer.send(generation, &message(first)).await.unwrap();
        Agent::handshake(stream, FRAMING, GENERATION).await.map(|_| ()).unwrap_err().to_string()
    }

    #[tokio::test]
    async fn requests_get_their_own_answers() {
        let (mut fake, agent) = ready().await;
        let configure = Configure { sandbox_id: "abc1".into(), ..Configure::default() };
        let (done, request) = tokio::join!(agent.configure(configure.clone()), fake.answer(None));
        done.unwrap();
        assert_eq!(request.request, Some(Request::Configure(configure)));
        let error = WireError { code: Code::FailedPrecondition.into(), message: "twice\x1b[2J".into() };
        let (done, _) = tokio::join!(agent.configure(Configure::default()), fake.answer(Some(error)));
        assert_eq!(
            done.unwrap_err().to_string(),
            "the agent refused the Configure: twice[2J (FailedPrecondition)"
        );
    }

    #[tokio::test]
    async fn only_the_hello_of_this_generation_begins() {
        let wrong = Hello { generation: 2, ..hello() };
        let newer = Hello { protocol_version: 9, oldest_protocol_version: 9, ..hello() };
        let response = Message::Response(Response::default());
        let failed = Failed { step: "rootfs".into(), message: "bad superblock".into() };
        for (first, generation, expected) in [
            (Message::Hello(wrong), GENERATION, "got one of generation 2"),
            (Message::Hello(hello()), 2, "got one of generation 2"),
            (Message::Hello(newer), GENERATION, "speaks the control protocol 9 to 9"),
            (response, GENERATION, "expected a Hello, got a Response"),
            (Message::Failed(failed), GENERATION, "failed at the step rootfs: bad superblock"),
        ] {
            let error = refused(first, generation).await;
            assert!(error.contains(expected), "{error}");
        }
    }

    /// On serial an agent speaks records, on vsock lines, and records if it is one of the first.
    #[tokio::test]
    async fn agents_of_other_versions_are_accepted_or_named_on_every_channel() {
        const OURS: u32 = PROTOCOL_VERSION;
        for (channel, spoken) in [
            (Framing::Records, Framing::Records),
            (Framing::Lines, Framing::Lines),
            (Framing::Lines, Framing::Records),
        ] {
            for (oldest, newest, accepted) in [
                (OURS - 1, OURS - 1, true),
                (OURS - 1, OURS, true),
                (OURS, OURS, true),
                (OURS, OURS + 1, true),
                (0, OURS + 7, true),
                (0, OLDEST_PROTOCOL_VERSION - 1, false),
                (OURS + 1, OURS + 1, false),
                (OURS, OURS - 1, false),
            ] {
                let (mut fake, stream) = Fake::speaking(spoken);
                let versions = Hello { protocol_version: newest, oldest_protocol_version: oldest, ..hello() };
                fake.say(Message::Hello(versions)).await;
                let what = format!("{oldest} to {newest} in {spoken:?} on {channel:?}");
                match Agent::handshake(stream, channel, GENERATION).await {
                    Ok((agent, _)) => {
                        assert!(accepted, "{what}");
                        let (done, _) =
                            tokio::join!(agent.configure(Configure::default()), fake.answer(None));
                        done.unwrap();
                    }
                    Err(error) => {
                        assert!(!accepted, "{what}: {error}");
                        let named = format!(
                            "the control protocol {oldest} to {newest}, this host-shim \
                             {OLDEST_PROTOCOL_VERSION} to {OURS}:"
                        );
                        assert!(error.to_string().contains(&named), "{what}: {error}");
                    }
                }
            }
        }
    }

    #[tokio::test]
    async fn garbage_and_silence_end_with_the_connection() {
        for framing in [Framing::Records, Framing::Lines] {
            let (host, mut guest) = tokio::io::duplex(1 << 16);
            guest.write_all(&[0x89; 5000]).await.unwrap();
            drop(guest);
            let ended = Agent::handshake(Box::new(host), framing, GENERATION).await.map(drop);
            assert!(matches!(ended, Err(AgentError::Ended)));
        }
    }

    #[tokio::test]
    async fn what_must_not_be_said_ends_the_connection() {
        for (said, expected) in [
            (Message::Hello(hello()), "a second Hello"),
            (Message::Response(Response { id: 99, ..Response::default() }), "an answer to 99"),
            (
                Message::Failed(Failed { step: "late".into(), message: "x".into() }),
                "the agent failed: late: x",
            ),
        ] {
            let (mut fake, agent) = ready().await;
            fake.say(said).await;
            let reason = agent.ended().await;
            assert!(reason.contains(expected), "{reason}");
            assert!(matches!(agent.configure(Configure::default()).await, Err(AgentError::Ended)));
        }
    }

    #[tokio::test]
    async fn news_are_no_breach_and_answers_come_between_them() {
        use envd_proto::control::{Event, LogLine, event};
        let (mut fake, agent) = ready().await;
        fake.say(Message::Log(LogLine { message: "x\x1b[2J".repeat(1000), ..LogLine::default() })).await;
        let port = event::Port { address: "127.0.0.1".into(), port: 8080 };
        for event in [Some(event::Event::PortOpened(port)), Some(event::Event::Lost(3)), None] {
            fake.say(Message::Event(Event { event })).await;
        }
        let (done, _) = tokio::join!(agent.configure(Configure::default()), fake.answer(None));
        done.unwrap();
    }

    #[tokio::test]
    async fn an_end_in_the_middle_of_a_request_is_told() {
        let (mut fake, agent) = ready().await;
        let gone = async {
            fake.reader.receive().await.unwrap().unwrap();
            drop(fake);
        };
        let (done, ()) = tokio::join!(agent.configure(Configure::default()), gone);
        assert!(matches!(done, Err(AgentError::Ended)));
    }
}
