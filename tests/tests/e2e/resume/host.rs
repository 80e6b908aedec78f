//! The host's side of the control door, by hand, and clients of the doors behind the mux.

use std::sync::Arc;

use envd_channel::control::{ControlReader, ControlWriter, Framing};
use envd_channel::envelope;
use envd_channel::mux::Mux;
use envd_channel::record;
use envd_proto::CLIENT_PORT;
use envd_proto::control::{
    Configure, Error, FromAgent, FromHost, Hello, Resume, Resumed, Stats, StatsRequest, error::Code,
    from_agent::Message, from_host::Request, response, resume::Kind,
};
use envd_proto::process::process_event::{DataEvent, EndEvent, Event, StartEvent, data_event};
use envd_proto::process::{ConnectRequest, ConnectResponse, ProcessSelector, process_selector::Selector};
use prost::Message as _;
use sandbox_folder::client::SandboxClient;
use sandbox_folder::client::Stream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::timely;

/// The control connection of one machine.
pub(super) struct Host {
    reader: ControlReader<OwnedReadHalf, FromAgent>,
    write: OwnedWriteHalf,
    framing: Framing,
    pub(super) generation: u64,
    last_id: u64,
}

impl Host {
    pub(super) fn new(stream: UnixStream, framing: Framing, generation: u64) -> Self {
        let (read, write) = stream.into_split();
        Self { reader: ControlReader::new(read, framing), write, framing, generation, last_id: 0 }
    }

    /// What is no news.
    async fn receive(&mut self) -> (u64, Message) {
        loop {
            let received = timely("the agent's next message", self.reader.receive()).await;
            let (generation, message) = received.expect("a message").expect("the agent lives");
            match message.message.expect("a message of a known kind") {
                Message::Log(_) | Message::Event(_) => {}
                message => return (generation, message),
            }
        }
    }

    /// The hello of this generation, which comes next.
    pub(super) async fn hello(&mut self) -> Hello {
        match self.receive().await {
            (generation, Message::Hello(hello)) => {
                assert_eq!((generation, hello.generation), (self.generation, self.generation));
                hello
            }
            other => panic!("expected a hello, got {other:?}"),
        }
    }

    /// Asks, under an id that it gives.
    pub(super) async fn send(&mut self, generation: u64, request: Request) -> u64 {
        self.last_id += 1;
        let message = FromHost { id: self.last_id, request: Some(request) };
        let mut writer = ControlWriter::new(&mut self.write, self.framing);
        timely("a request", writer.send(generation, &message)).await.expect("the agent takes a request");
        self.last_id
    }

    /// The answer to a request in messages of this generation; nothing else may be answered before it.
    pub(super) async fn ask_in(
        &mut self,
        generation: u64,
        request: Request,
    ) -> Result<Option<response::Result>, Error> {
        let id = self.send(generation, request).await;
        self.answer(generation, id).await
    }

    /// The answer to what was asked under this id, which comes next.
    pub(super) async fn answer(
        &mut self,
        generation: u64,
        id: u64,
    ) -> Result<Option<response::Result>, Error> {
        match self.receive().await {
            (answered_in, Message::Response(response)) => {
                assert_eq!((answered_in, response.id), (generation, id), "{response:?}");
                response.error.map_or(Ok(response.result), Err)
            }
            other => panic!("expected an answer, got {other:?}"),
        }
    }

    pub(super) async fn ask(&mut self, request: Request) -> Result<Option<response::Result>, Error> {
        self.ask_in(self.generation, request).await
    }

    /// Sends a whole record that is no request, and half of one.
    pub(super) async fn send_undecodable(&mut self) {
        let hello = FromAgent { message: Some(Message::Hello(Hello::default())) };
        let mut writer = ControlWriter::<_, FromAgent>::new(&mut self.write, self.framing);
        writer.send(self.generation, &hello).await.expect("the agent takes bytes");
        let record = record::Encoder::default().encode(self.generation, b"cut").expect("a short message");
        self.write.write_all(&record[..record::RECORD_SIZE / 2]).await.expect("the agent takes bytes");
        match self.receive().await {
            (_, Message::Response(response)) => {
                let error = response.error.expect("a refusal");
                // An id that no request has.
                assert_eq!((response.id, error.code()), (0, Code::Invalid), "{}", error.message);
            }
            other => panic!("expected a refusal, got {other:?}"),
        }
    }

    /// Asks for what must be done.
    pub(super) async fn tell(&mut self, request: Request) {
        let name = format!("{request:?}");
        self.ask(request).await.unwrap_or_else(|error| panic!("{name}: {error:?}"));
    }

    /// Resumes into the next generation.
    pub(super) async fn resume(
        &mut self,
        kind: Kind,
        seed: u8,
        time: i64,
        configure: Option<Configure>,
    ) -> Resumed {
        let id = self.begin_resume(kind, seed, time, configure).await;
        self.resumed(id).await
    }

    /// Asks for it.
    pub(super) async fn begin_resume(
        &mut self,
        kind: Kind,
        seed: u8,
        time: i64,
        configure: Option<Configure>,
    ) -> u64 {
        self.generation += 1;
        self.send(self.generation, resume(kind, self.generation, seed, time, configure)).await
    }

    /// What it did.
    pub(super) async fn resumed(&mut self, id: u64) -> Resumed {
        let resumed = match self.answer(self.generation, id).await.expect("the agent resumes") {
            Some(response::Result::Resumed(resumed)) => resumed,
            other => panic!("{other:?}"),
        };
        assert!(self.hello().await.frozen, "the host's Thaw comes first");
        resumed
    }

    /// Time on CPUs, in microseconds, of a class of processes.
    pub(super) async fn cpu_of(&mut self, class: &str) -> u64 {
        let stats: Stats = match self.ask(Request::Stats(StatsRequest {})).await.expect("stats") {
            Some(response::Result::Stats(stats)) => stats,
            other => panic!("{other:?}"),
        };
        let found = stats.classes.iter().find(|found| found.name == class).expect("the class");
        found.cpu_usage_us.expect("its time is known")
    }
}

/// A Resume with a seed of one byte over and over.
pub(super) fn resume(
    kind: Kind,
    generation: u64,
    seed: u8,
    time: i64,
    configure: Option<Configure>,
) -> Request {
    let (seed, unix_time_ns) = (vec![seed; 64], time * 1_000_000_000);
    Request::Resume(Resume { kind: kind.into(), generation, seed, unix_time_ns, configure, thaw: false })
}

/// Begins the mux session of a generation.
pub(super) async fn connect_mux(stream: UnixStream, generation: u64) -> Arc<Mux> {
    let connected = timely("the agent's preamble", Mux::connect(stream, generation)).await;
    Arc::new(connected.expect("a session"))
}

pub(super) fn client(mux: &Arc<Mux>) -> SandboxClient {
    let mux = Arc::clone(mux);
    SandboxClient::new(Arc::new(move |port| {
        let mux = Arc::clone(&mux);
        Box::pin(async move { Ok(Box::new(mux.open(port).await?) as Stream) })
    }))
}

/// What a client sees that comes back to a process.
#[derive(Debug)]
pub(super) struct Replay {
    pub(super) start: StartEvent,
    pub(super) stdout: Vec<u8>,
    pub(super) dropped: u64,
    pub(super) end: EndEvent,
}

/// Reattaches to a process at an offset of its output. What follows is read to its end by [`Reattached::replay`].
pub(super) struct Reattached(Stream);

impl Reattached {
    pub(super) async fn to(mut stream: Stream, pid: u32, offset: u64) -> Self {
        let process = Some(ProcessSelector { selector: Some(Selector::Pid(pid)) });
        let request = ConnectRequest { process, from_offset: Some(offset) }.encode_to_vec();
        let body = envelope::encode(0, &request);
        // HTTP/1.0: the answer ends with the connection, and nothing stands between its bytes.
        let head = format!(
            "POST /process.Process/Connect HTTP/1.0\r\nhost: sandbox\r\ncontent-type: application/connect+proto\r\n\
             content-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(&[head.as_bytes(), &body].concat()).await.expect("the agent takes a request");
        stream.flush().await.expect("the agent takes a request");
        Self(stream)
    }

    pub(super) async fn over(mux: &Mux, pid: u32, offset: u64) -> Self {
        let stream = mux.open(CLIENT_PORT).await.expect("a stream");
        Self::to(Box::new(stream), pid, offset).await
    }

    pub(super) async fn replay(mut self) -> Replay {
        let mut answer = Vec::new();
        timely("the process's end", self.0.read_to_end(&mut answer)).await.expect("the whole answer");
        let head = answer.windows(4).position(|four| four == b"\r\n\r\n").expect("a head") + 4;
        assert!(answer.starts_with(b"HTTP/1.0 200 "), "{}", String::from_utf8_lossy(&answer));
        let mut decoder = envelope::Decoder::default();
        decoder.push(&answer[head..]);
        let (mut start, mut stdout, mut dropped, mut end) = (None, Vec::new(), 0, None);
        while let Some(envelope) = decoder.envelope().expect("an envelope") {
            if envelope.end {
                assert_eq!(&envelope.message[..], b"{}");
                break;
            }
            let response = ConnectResponse::decode(envelope.message).expect("an event");
            match response.event.and_then(|event| event.event).expect("an event of a known kind") {
                Event::Start(event) => start = Some(event),
                Event::Data(DataEvent { output, dropped_bytes }) => {
                    dropped += dropped_bytes;
                    match output {
                        Some(data_event::Output::Stdout(bytes)) => stdout.extend_from_slice(&bytes),
                        other => panic!("{other:?}"),
                    }
                }
                Event::End(event) => end = Some(event),
                Event::Keepalive(_) => {}
            }
        }
        let (start, end) = (start.expect("a start"), end.expect("an end"));
        Replay { dropped: dropped + start.dropped_bytes, start, stdout, end }
    }
}
