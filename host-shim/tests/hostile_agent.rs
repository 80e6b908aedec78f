//! The control connection of a shim whose agent is in a tenant's hands.

use std::time::Duration;

use envd_channel::control::{ControlReader, ControlWriter, Framing};
use envd_channel::{line, record};
use envd_proto::PROTOCOL_VERSION;
use envd_proto::control::from_agent::Message;
use envd_proto::control::{
    Configure, Event, Failed, Freeze, FromAgent, FromHost, Hello, LogLine, Response, Resume, Resumed, Stats,
    event, response,
};
use host_shim::agent::{Agent, AgentError};
use proptest::prelude::*;
use prost::Message as _;
use tokio::io::{AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};

/// Only a failing test waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

fn hello(generation: u64) -> Message {
    Message::Hello(Hello {
        protocol_version: PROTOCOL_VERSION,
        oldest_protocol_version: PROTOCOL_VERSION,
        generation,
        ..Hello::default()
    })
}

fn answer(id: u64, result: Option<response::Result>) -> Message {
    Message::Response(Response { id, error: None, result })
}

/// The guest's end of a connection in records.
struct Guest {
    writer: ControlWriter<WriteHalf<DuplexStream>, FromAgent>,
    reader: ControlReader<ReadHalf<DuplexStream>, FromHost>,
}

impl Guest {
    /// A guest that has said Hello.
    async fn greeted() -> (Self, Agent) {
        let (host, guest) = tokio::io::duplex(64 << 10);
        let (read, write) = tokio::io::split(guest);
        let reader = ControlReader::new(read, Framing::Records);
        let mut guest = Self { writer: ControlWriter::new(write, Framing::Records), reader };
        guest.say(1, hello(1)).await;
        let (agent, _) = Agent::handshake(Box::new(host), Framing::Records, 1).await.unwrap();
        (guest, agent)
    }

    async fn say(&mut self, generation: u64, message: Message) {
        self.writer.send(generation, &FromAgent { message: Some(message) }).await.unwrap();
    }

    /// The next request's id.
    async fn asked(&mut self) -> u64 {
        self.reader.receive().await.unwrap().unwrap().1.id
    }
}

async fn reason(agent: &Agent) -> String {
    tokio::time::timeout(PATIENCE, agent.ended()).await.expect("the connection ends")
}

/// One Hello is for each generation: after it another is a forgery, whatever generation it names.
#[tokio::test]
async fn a_second_hello_of_a_generation_is_refused_before_and_after_the_thaw() {
    for thawed in [false, true] {
        let (mut guest, agent) = Guest::greeted().await;
        let resuming = agent.resume(Resume::default());
        let resumed = async {
            let id = guest.asked().await;
            guest.say(2, answer(id, Some(response::Result::Resumed(Resumed::default())))).await;
            guest.say(2, hello(2)).await;
        };
        let (resumed, ()) = tokio::join!(resuming, resumed);
        assert_eq!(resumed.unwrap().0.generation, 2);
        if thawed {
            let thaw = async {
                let id = guest.asked().await;
                guest.say(2, answer(id, None)).await;
            };
            let (done, ()) = tokio::join!(agent.thaw(), thaw);
            done.unwrap();
        }
        guest.say(2, hello(2)).await;
        assert_eq!(reason(&agent).await, "a second Hello");
        assert!(matches!(agent.thaw().await, Err(AgentError::Ended)));
    }
}

#[tokio::test]
async fn a_hello_of_another_generation_does_not_answer_a_resume() {
    let (mut guest, agent) = Guest::greeted().await;
    let lied = async {
        let id = guest.asked().await;
        guest.say(2, answer(id, Some(response::Result::Resumed(Resumed::default())))).await;
        guest.say(2, hello(1)).await;
    };
    let (resumed, ()) = tokio::join!(agent.resume(Resume::default()), lied);
    let error = resumed.unwrap_err().to_string();
    assert!(error.contains("got one of generation 1"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_stalls_is_given_up_at_the_deadline() {
    let (host, guest) = tokio::io::duplex(4096);
    let (_read, write) = tokio::io::split(guest);
    let mut writer = ControlWriter::<_, FromAgent>::new(write, Framing::Records);
    writer.send(1, &FromAgent { message: Some(hello(1)) }).await.unwrap();
    let (agent, _) = Agent::handshake(Box::new(host), Framing::Records, 1).await.unwrap();
    // More than the guest's port takes: the write itself stands still.
    let env = [("A".to_owned(), "x".repeat(100_000))].into();
    let configure = Configure { env, ..Configure::default() };
    let error = agent.configure(configure).await.unwrap_err();
    assert!(matches!(error, AgentError::NoAnswer { request: "Configure", .. }), "{error}");
    let error = agent.freeze(Freeze::default()).await.unwrap_err();
    assert!(matches!(error, AgentError::NoAnswer { request: "Freeze", .. }), "{error}");
}

/// What an earlier life has left is skipped, and it has an end.
#[tokio::test]
async fn only_so_much_of_another_generation_is_skipped() {
    let (mut guest, agent) = Guest::greeted().await;
    for _ in 0..1000 {
        guest.say(7, Message::Event(Event::default())).await;
    }
    let answered = async {
        let id = guest.asked().await;
        guest.say(1, answer(id, None)).await;
    };
    let (done, ()) = tokio::join!(agent.thaw(), answered);
    done.unwrap();
    let flood = async { while guest.writer.send(7, &FromAgent::default()).await.is_ok() {} };
    let reason = tokio::select! {
        reason = reason(&agent) => reason,
        () = flood => panic!("it is not read any more, and open"),
    };
    assert!(reason.contains("messages of generation 7"), "{reason}");
}

/// An error that quotes the guest does so in printable text, and not without end.
#[tokio::test]
async fn what_is_told_of_a_guests_words_acts_on_no_terminal() {
    let evil = "\u{1b}[2J".repeat(30_000);
    for said in [
        format!("{{\"generation\":\"{evil}\"}}\n"),
        format!("{{\"generation\":1,\"response\":{{\"error\":{{\"code\":\"{evil}\"}}}}}}\n"),
    ] {
        for greeted in [false, true] {
            let (host, mut guest) = tokio::io::duplex(1 << 20);
            if greeted {
                let hello = FromAgent { message: Some(hello(1)) };
                guest.write_all(&line::encode(1, &hello).unwrap()).await.unwrap();
            }
            // As JSON has it.
            guest.write_all(said.replace('\u{1b}', "\\u001b").as_bytes()).await.unwrap();
            let told = match Agent::handshake(Box::new(host), Framing::Lines, 1).await {
                Ok((agent, _)) => reason(&agent).await,
                Err(error) => error.to_string(),
            };
            assert!(told.contains("[2J") && !told.contains('\u{1b}') && told.len() < 10_000, "{told:.100}");
        }
    }
}

/// Anything that can be in a message.
fn message() -> impl Strategy<Value = Message> {
    let text = "[\\PC\u{1b}\n]{0,40}";
    prop_oneof![
        (0u64..4).prop_map(hello),
        (0u64..6).prop_map(|id| answer(id, None)),
        (0u64..6).prop_map(|id| answer(id, Some(response::Result::Resumed(Resumed::default())))),
        (0u64..6).prop_map(|id| answer(id, Some(response::Result::Stats(Stats::default())))),
        (text, text).prop_map(|(step, message)| Message::Failed(Failed { step, message })),
        (text, text).prop_map(|(level, message)| {
            let fields = [(level.clone(), message.clone())].into();
            Message::Log(LogLine { level, message, fields, ..LogLine::default() })
        }),
        (text, any::<u32>()).prop_map(|(address, port)| {
            let port = event::Port { address, port };
            Message::Event(Event { event: Some(event::Event::PortOpened(port)) })
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever is said, in whatever order, with garbage between: every request comes to an end, and so does the connection;
    /// what is told of it is printable.
    #[test]
    fn any_messages_come_to_an_end(
        before in prop::collection::vec((0u64..3, message()), 0..4),
        after in prop::collection::vec((0u64..3, message()), 0..8),
        garbage in prop::collection::vec(any::<u8>(), 0..40),
        framing in prop_oneof![Just(Framing::Records), Just(Framing::Lines)],
        restored in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (host, guest) = tokio::io::duplex(1 << 20);
            let (mut heard, mut write) = tokio::io::split(guest);
            let listening = tokio::spawn(async move {
                tokio::io::copy(&mut heard, &mut tokio::io::sink()).await
            });
            let mut encoder = record::Encoder::default();
            let mut encoded = |messages: Vec<(u64, Message)>| {
                let encode = |(generation, message)| {
                    let message = FromAgent { message: Some(message) };
                    match framing {
                        Framing::Records => encoder.encode(generation, &message.encode_to_vec()).unwrap(),
                        Framing::Lines => line::encode(generation, &message).unwrap(),
                    }
                };
                messages.into_iter().flat_map(encode).collect::<Vec<u8>>()
            };
            let restored = restored && framing == Framing::Records;
            let first = if restored { Vec::new() } else { encoded(vec![(1, hello(1))]) };
            write.write_all(&[first, encoded(before)].concat()).await.unwrap();
            let then = [encoded(after), garbage].concat();
            let agent = if restored {
                Agent::restored(Box::new(host), 1)
            } else {
                Agent::handshake(Box::new(host), framing, 1).await.unwrap().0
            };
            let asked = async {
                let mut told = Vec::new();
                told.extend(agent.configure(Configure::default()).await.err());
                told.extend(agent.resume(Resume::default()).await.err());
                told.extend(agent.thaw().await.err());
                told.iter().map(AgentError::to_string).collect::<Vec<_>>()
            };
            let says = async {
                tokio::task::yield_now().await;
                // An agent that broke the protocol is not read any more.
                let _ = write.write_all(&then).await;
                let _ = write.shutdown().await;
            };
            let both = async { tokio::join!(asked, says).0 };
            let mut told = tokio::time::timeout(PATIENCE, both).await.expect("every request ends");
            told.push(reason(&agent).await);
            for told in told {
                assert!(!told.chars().any(|c| c.is_control() && c != '\n'), "{told:?}");
            }
            drop(agent);
            listening.await.unwrap().unwrap();
        });
    }
}
