//! Every edge of the control door over in-memory streams, with a machine that only notes what it was asked.

use std::sync::{Arc, Mutex};

use envd_channel::record;
use envd_proto::control::{
    Configure, Freeze, Rehearse, Rehearsed, Resumed, Shutdown, Stats, StatsRequest, Thaw,
};
use tokio::io::{AsyncWriteExt, DuplexStream};

use super::*;
use crate::events::OutOfMemory;
use crate::root::Root;
use crate::sandbox::Sandbox;
use crate::spawner::Spawner;

struct Noted {
    sandbox: Arc<Sandbox>,
    acts: Arc<Mutex<Vec<String>>>,
    fails: Arc<Mutex<Option<Refusal>>>,
}

impl Noted {
    fn act(&self, act: String) -> Result<(), Refusal> {
        self.acts.lock().unwrap().push(act);
        self.fails.lock().unwrap().take().map_or(Ok(()), Err)
    }
}

impl Acts for Noted {
    fn sandbox(&self) -> &Arc<Sandbox> {
        &self.sandbox
    }

    async fn configure(&self, configure: Configure) -> Result<(), Refusal> {
        self.act("configure".into())?;
        let taken = |_| Refusal::new(Code::FailedPrecondition, "taken");
        self.sandbox.configure(configure).map_err(taken)
    }

    async fn freeze(&self, freeze: Freeze) -> Result<(), Refusal> {
        assert!(self.sandbox.lifecycle().phase().is_frozen(), "no call may start while it freezes");
        self.act(format!("freeze {}", freeze.strip_ssh_host_keys))
    }

    async fn resume(&self, resume: Resume) -> Result<Resumed, Refusal> {
        self.act(format!("resume {}", resume.generation))?;
        if let Some(configure) = resume.configure {
            self.sandbox.replace_session(configure);
        }
        // A seed is the sign of a part that fails.
        let error = String::from_utf8(resume.seed).unwrap();
        Ok(Resumed { parts: vec![Part { error, ..Part::default() }], ..Resumed::default() })
    }

    async fn rehearse(&self) -> Result<Rehearsed, Refusal> {
        self.act("rehearse".into())?;
        Ok(Rehearsed { duration_us: 7, ..Rehearsed::default() })
    }

    async fn thaw(&self, first_of_clone: bool) -> Result<(), Refusal> {
        self.act(format!("thaw {first_of_clone}"))
    }

    async fn stats(&self) -> Result<Stats, Refusal> {
        Ok(Stats { cpu_count: 3, ..Stats::default() })
    }
}

/// The host's side of a control connection, by hand.
struct Host {
    reader: ControlReader<ReadHalf<DuplexStream>, FromAgent>,
    writer: WriteHalf<DuplexStream>,
    framing: Framing,
    sandbox: Arc<Sandbox>,
    acts: Arc<Mutex<Vec<String>>>,
    fails: Arc<Mutex<Option<Refusal>>>,
    serving: tokio::task::JoinHandle<io::Result<Outcome>>,
    last_id: u64,
    _spawner: std::os::fd::OwnedFd,
}

impl Host {
    async fn start() -> Self {
        Self::start_with(Framing::Lines).await
    }

    async fn start_with(framing: Framing) -> Self {
        let (socket, spawner) = Spawner::socketpair().unwrap();
        let sandbox = Sandbox::new(Root::own(), Spawner::connect(socket).unwrap(), None);
        let (acts, fails) = (Arc::default(), Arc::default());
        let noted =
            Noted { sandbox: Arc::clone(&sandbox), acts: Arc::clone(&acts), fails: Arc::clone(&fails) };
        let (near, far) = tokio::io::duplex(1 << 16);
        let serving =
            tokio::spawn(async move { Control::new(far, framing, 1).serve(Hello::default(), &noted).await });
        let (read, writer) = tokio::io::split(near);
        let reader = ControlReader::new(read, framing);
        Self { reader, writer, framing, sandbox, acts, fails, serving, last_id: 0, _spawner: spawner }
    }

    /// The next message but log lines, which other tests of this process cause.
    async fn receive(&mut self) -> (u64, from_agent::Message) {
        loop {
            match self.reader.receive().await.unwrap().unwrap() {
                (_, FromAgent { message: Some(from_agent::Message::Log(_)) }) => {}
                (generation, message) => return (generation, message.message.unwrap()),
            }
        }
    }

    async fn hello(&mut self) -> (u64, Hello) {
        match self.receive().await {
            (generation, from_agent::Message::Hello(hello)) => (generation, hello),
            other => panic!("expected a hello, got {other:?}"),
        }
    }

    async fn send(&mut self, generation: u64, request: from_host::Request) {
        self.last_id += 1;
        let message = FromHost { id: self.last_id, request: Some(request) };
        ControlWriter::new(&mut self.writer, self.framing).send(generation, &message).await.unwrap();
    }

    /// The generation of the answer, and the code of a refusal.
    async fn ask(&mut self, generation: u64, request: from_host::Request) -> (u64, Option<Code>) {
        self.send(generation, request).await;
        match self.receive().await {
            (generation, from_agent::Message::Response(response)) => {
                assert_eq!(response.id, self.last_id);
                (generation, response.error.map(|error| error.code()))
            }
            other => panic!("expected a response, got {other:?}"),
        }
    }

    fn acts(&self) -> Vec<String> {
        std::mem::take(&mut self.acts.lock().unwrap())
    }
}

#[tokio::test]
async fn what_is_no_request_ends_a_connection_and_not_a_port() {
    for framing in [Framing::Lines, Framing::Records] {
        let mut host = Host::start_with(framing).await;
        host.hello().await;
        let stray = match framing {
            Framing::Lines => b"no JSON\n".to_vec(),
            Framing::Records => record::Encoder::default().encode(1, b"\xff no protobuf").unwrap(),
        };
        host.writer.write_all(&stray).await.unwrap();
        match host.receive().await {
            (1, from_agent::Message::Response(Response { id: 0, error: Some(error), .. })) => {
                assert_eq!(error.code(), Code::Invalid, "{}", error.message);
            }
            other => panic!("expected a refusal, got {other:?}"),
        }
        match framing {
            Framing::Lines => assert!(host.serving.await.unwrap().is_err()),
            Framing::Records => assert_eq!(host.ask(1, freeze()).await, (1, None)),
        }
    }
}

struct Killed(std::process::Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const PRECONDITION: Option<Code> = Some(Code::FailedPrecondition);

fn freeze() -> from_host::Request {
    from_host::Request::Freeze(Freeze { strip_ssh_host_keys: true, ..Freeze::default() })
}

fn thaw() -> from_host::Request {
    from_host::Request::Thaw(Thaw {})
}

fn resume(kind: Kind, generation: u64) -> from_host::Request {
    from_host::Request::Resume(Resume { kind: kind.into(), generation, ..Resume::default() })
}

fn shutdown(grace_ms: u32) -> from_host::Request {
    from_host::Request::Shutdown(Shutdown { grace_ms })
}

#[tokio::test]
async fn the_host_configures_once_and_shuts_down() {
    let mut host = Host::start().await;
    let (generation, hello) = host.hello().await;
    assert_eq!((generation, hello.generation, hello.frozen), (1, 1, false));
    let configure = || from_host::Request::Configure(Configure::default());
    host.send(2, shutdown(1)).await; // of a generation that has not begun: not answered
    assert_eq!(host.ask(1, configure()).await, (1, None));
    assert_eq!(host.ask(1, configure()).await, (1, PRECONDITION));
    host.send(1, from_host::Request::Stats(StatsRequest {})).await;
    match host.receive().await.1 {
        from_agent::Message::Response(Response { result: Some(response::Result::Stats(stats)), .. }) => {
            assert_eq!(stats.cpu_count, 3);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(host.ask(1, shutdown(250)).await, (1, None));
    assert_eq!(host.serving.await.unwrap().unwrap(), Outcome::Shutdown(Duration::from_millis(250)));
}

#[tokio::test]
async fn a_freeze_ends_by_the_hosts_thaw_alone() {
    let mut host = Host::start().await;
    host.hello().await;
    assert_eq!(host.ask(1, thaw()).await, (1, PRECONDITION));
    assert_eq!(host.ask(2, resume(Kind::Same, 2)).await, (2, PRECONDITION));
    assert_eq!(host.acts(), [""; 0]);
    assert_eq!(host.ask(1, freeze()).await, (1, None));
    assert_eq!(host.ask(1, freeze()).await, (1, PRECONDITION));
    assert!(host.sandbox.lifecycle().phase().is_frozen());
    assert_eq!(host.ask(1, thaw()).await, (1, None));
    assert_eq!(host.ask(1, thaw()).await, (1, PRECONDITION));
    assert!(!host.sandbox.lifecycle().phase().is_frozen());
    assert_eq!(host.acts(), ["freeze true", "thaw false"]);
}

#[tokio::test]
async fn a_freeze_or_thaw_that_fails_leaves_the_phase() {
    let mut host = Host::start().await;
    host.hello().await;
    let fail = |host: &Host| *host.fails.lock().unwrap() = Some(Refusal::new(Code::Internal, "no"));
    fail(&host);
    assert_eq!(host.ask(1, freeze()).await, (1, Some(Code::Internal)));
    assert!(!host.sandbox.lifecycle().phase().is_frozen());
    assert_eq!(host.ask(1, freeze()).await, (1, None));
    fail(&host);
    assert_eq!(host.ask(1, thaw()).await, (1, Some(Code::Internal)));
    assert!(host.sandbox.lifecycle().phase().is_frozen());
    fail(&host);
    assert_eq!(host.ask(2, resume(Kind::Clone, 2)).await, (2, Some(Code::Internal)));
    // Still the old life: its records are heard, and it says no second hello.
    assert_eq!(host.ask(1, thaw()).await, (1, None));
}

#[tokio::test]
async fn a_resume_begins_a_life_and_the_old_one_is_not_heard_any_more() {
    let mut host = Host::start().await;
    host.hello().await;
    host.ask(1, freeze()).await;
    for (records, wrong, expected) in [
        (1, resume(Kind::Same, 1), Code::FailedPrecondition),
        (3, resume(Kind::Same, 2), Code::Invalid),
        (2, resume(Kind::Unspecified, 2), Code::Invalid),
    ] {
        assert_eq!(host.ask(records, wrong).await, (records, Some(expected)));
    }
    host.send(0, resume(Kind::Same, 9)).await; // in records of a life that is over: not answered
    let old = host.sandbox.lifecycle().clone();
    let ended = tokio::spawn(async move { old.ended(1).await });
    assert_eq!(host.ask(2, resume(Kind::Clone, 2)).await, (2, None));
    let (generation, hello) = host.hello().await;
    assert_eq!((generation, hello.generation, hello.frozen), (2, 2, true));
    ended.await.unwrap();
    host.send(1, thaw()).await;
    host.send(1, shutdown(0)).await;
    assert_eq!(host.ask(2, thaw()).await, (2, None));
    assert_eq!(host.acts(), ["freeze true", "resume 2", "thaw true"]);
    // The same again: the next thaw is no clone's first.
    host.ask(2, freeze()).await;
    assert_eq!(host.ask(7, resume(Kind::Same, 7)).await, (7, None));
    host.hello().await;
    assert_eq!(host.ask(7, thaw()).await, (7, None));
    assert_eq!(host.acts(), ["freeze true", "resume 7", "thaw false"]);
}

#[tokio::test]
async fn a_resume_that_is_whole_thaws_where_that_is_asked_for() {
    let mut host = Host::start().await;
    host.hello().await;
    let resume = |generation, seed: &str| {
        let seed = seed.as_bytes().to_vec();
        let kind = Kind::Clone.into();
        from_host::Request::Resume(Resume { kind, generation, seed, thaw: true, ..Resume::default() })
    };
    for (generation, seed, thawed) in [(2, "a part failed", false), (3, "", true)] {
        if generation == 2 {
            host.ask(1, freeze()).await;
        }
        host.send(generation, resume(generation, seed)).await;
        match host.receive().await.1 {
            from_agent::Message::Response(Response {
                result: Some(response::Result::Resumed(resumed)),
                ..
            }) => {
                assert_eq!(resumed.thawed, thawed, "{resumed:?}");
                assert_eq!(resumed.parts.last().unwrap().name == "thaw", thawed, "{resumed:?}");
            }
            other => panic!("{other:?}"),
        }
        let (_, hello) = host.hello().await;
        assert_eq!(hello.frozen, !thawed);
        assert_eq!(host.sandbox.lifecycle().phase().is_frozen(), !thawed);
    }
    assert_eq!(host.ask(3, thaw()).await, (3, PRECONDITION));
    assert_eq!(host.acts(), ["freeze true", "resume 2", "resume 3", "thaw true"]);
}

#[tokio::test]
async fn a_machine_is_rehearsed_and_resumed_again_while_it_is_held() {
    let rehearse = || from_host::Request::Rehearse(Rehearse {});
    let mut host = Host::start().await;
    host.hello().await;
    assert_eq!(host.ask(1, rehearse()).await, (1, PRECONDITION));
    host.ask(1, freeze()).await;
    assert_eq!(host.ask(1, rehearse()).await, (1, None));
    for generation in 2..=4 {
        assert_eq!(host.ask(generation, resume(Kind::Clone, generation)).await, (generation, None));
        let (generation, hello) = host.hello().await;
        assert_eq!((generation, hello.generation, hello.frozen), (generation, generation, true));
        host.send(generation - 1, rehearse()).await; // of a life that is over: not answered
        host.send(generation, rehearse()).await;
        match host.receive().await.1 {
            from_agent::Message::Response(Response {
                result: Some(response::Result::Rehearsed(rehearsed)),
                ..
            }) => assert_eq!(rehearsed.duration_us, 7),
            other => panic!("{other:?}"),
        }
    }
    *host.fails.lock().unwrap() = Some(Refusal::new(Code::Internal, "no"));
    assert_eq!(host.ask(4, rehearse()).await, (4, Some(Code::Internal)));
    assert_eq!(host.ask(4, thaw()).await, (4, None));
    assert_eq!(host.ask(4, rehearse()).await, (4, PRECONDITION));
    let lives = ["resume 2", "rehearse", "resume 3", "rehearse", "resume 4", "rehearse"];
    assert_eq!(host.acts(), [&["freeze true", "rehearse"], &lives[..], &["rehearse", "thaw true"]].concat());
}

#[tokio::test]
async fn only_the_new_token_opens_a_clone() {
    let mut host = Host::start().await;
    host.hello().await;
    let with = |token: &str| Configure { access_token: Some(token.into()), ..Configure::default() };
    host.ask(1, from_host::Request::Configure(with("old"))).await;
    let old_session = host.sandbox.session().unwrap();
    host.ask(1, freeze()).await;
    let clone =
        Resume { kind: Kind::Clone.into(), generation: 2, configure: Some(with("new")), ..Resume::default() };
    assert_eq!(host.ask(2, from_host::Request::Resume(clone)).await, (2, None));
    let session = host.sandbox.session().unwrap();
    assert!(!Arc::ptr_eq(&session, &old_session));
    let headers = |token: &str| {
        let mut headers = http::HeaderMap::new();
        headers.insert("x-access-token", token.parse().unwrap());
        headers
    };
    assert!(session.allows(&headers("new")));
    assert!(!session.allows(&headers("old")));
}

#[tokio::test]
async fn events_log_lines_and_ports_reach_the_host() {
    let mut host = Host::start().await;
    host.hello().await;
    let oom = OutOfMemory { name: "hog".into(), pid: Some(7), tag: None };
    host.sandbox.events().emit(Event::OutOfMemory(oom));
    match host.receive().await.1 {
        from_agent::Message::Event(WireEvent { event: Some(event::Event::OutOfMemory(oom)) }) => {
            assert_eq!((oom.name.as_str(), oom.pid), ("hog", Some(7)));
        }
        other => panic!("{other:?}"),
    }
    crate::log::warn(format_args!("a line for the host"));
    loop {
        let message = host.reader.receive().await.unwrap().unwrap().1.message.unwrap();
        if let from_agent::Message::Log(line) = message
            && line.message == "a line for the host"
        {
            assert_eq!(line.level, "warn");
            break;
        }
    }
    // A program that listens: the socket is a child's alone.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let wanted = u32::from(listener.local_addr().unwrap().port());
    let stdin = std::process::Stdio::from(std::os::fd::OwnedFd::from(listener));
    let mut child = Killed(std::process::Command::new("sleep").arg("600").stdin(stdin).spawn().unwrap());
    let configure = Configure { report_ports: true, ..Configure::default() };
    host.send(1, from_host::Request::Configure(configure)).await;
    let (mut opened, mut closed) = (false, false);
    while !closed {
        match host.receive().await.1 {
            from_agent::Message::Event(WireEvent { event: Some(event::Event::PortOpened(port)) })
                if port.port == wanted =>
            {
                assert_eq!(port.address, "127.0.0.1");
                opened = true;
                child.0.kill().unwrap();
                child.0.wait().unwrap();
            }
            from_agent::Message::Event(WireEvent { event: Some(event::Event::PortClosed(port)) }) => {
                closed = port.port == wanted;
            }
            _ => {}
        }
    }
    assert!(opened);
}
