//! The control door, which only the host can open.
//!
//! ```text
//! hello ──► requests, one at a time: may it be done now (machine::Phase)? done (machine::Acts), answered
//!      └──► beside them, at any time: log lines, events, changes of the listening ports
//! ```

use std::collections::BTreeSet;
use std::io;
use std::time::{Duration, Instant};

use envd_channel::control::{ControlReader, ControlWriter, Framing};
use envd_proto::control::{
    Event as WireEvent, Failed, FromAgent, FromHost, Hello, LogLine, Response, Resume, error::Code, event,
    from_agent, from_host, response, resume::Kind, resumed::Part,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadHalf, WriteHalf};
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::time::MissedTickBehavior;

use crate::events::{Event, Port};
use crate::listening;
use crate::log::{LOG, Line};
use crate::machine::{Acts, Refusal};

/// How often the listening ports are looked at, while the host wants to know them.
const PORTS_INTERVAL: Duration = Duration::from_secs(1);

/// A connection to the host.
#[derive(Debug)]
pub struct Control<S> {
    reader: ControlReader<ReadHalf<S>, FromHost>,
    writer: ControlWriter<WriteHalf<S>, FromAgent>,
    framing: Framing,
    generation: u64,
}

/// Why the agent stopped listening to its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The connection is gone.
    Disconnected,
    /// The host wants the sandbox to end; its processes have this long to do so by themselves.
    Shutdown(Duration),
}

/// What the host was not told yet.
#[derive(Debug)]
struct News {
    next_line: u64,
    events: broadcast::Receiver<Event>,
    ports: BTreeSet<Port>,
}

/// What comes next on a connection.
enum Next {
    Request(io::Result<Option<Box<(u64, FromHost)>>>),
    Line(Line),
    Event(Result<Event, RecvError>),
    Ports,
}

impl<S: AsyncRead + AsyncWrite> Control<S> {
    /// The door over a stream to the host.
    pub fn new(stream: S, framing: Framing, generation: u64) -> Self {
        let (read, write) = tokio::io::split(stream);
        let (reader, writer) = (ControlReader::new(read, framing), ControlWriter::new(write, framing));
        Self { reader, writer, framing, generation }
    }

    /// Tells the host that the boot has failed.
    pub async fn fail(&mut self, failed: Failed) -> io::Result<()> {
        self.send(from_agent::Message::Failed(failed)).await
    }

    /// Says hello and carries out what the host asks for, until it disconnects or wants a shutdown.
    ///
    /// Of `hello`, generation and phase are filled in here.
    pub async fn serve(&mut self, hello: Hello, machine: &impl Acts) -> io::Result<Outcome> {
        let sandbox = machine.sandbox();
        self.say_hello(&hello, machine).await?;
        // A host that comes later gets what is still in the ring.
        let mut news = News { next_line: 1, events: sandbox.events().subscribe(), ports: BTreeSet::new() };
        let mut look = tokio::time::interval(PORTS_INTERVAL);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let wants_ports = sandbox.session().is_some_and(|session| session.reports_ports())
                && !sandbox.lifecycle().phase().is_frozen();
            let next = tokio::select! {
                // The host's word goes before news, however many there are.
                biased;
                received = self.reader.receive() => Next::Request(received.map(|it| it.map(Box::new))),
                event = news.events.recv() => Next::Event(event),
                line = LOG.wait_from(news.next_line) => Next::Line(line),
                _ = look.tick(), if wants_ports => Next::Ports,
            };
            match next {
                Next::Request(Ok(None)) => return Ok(Outcome::Disconnected),
                Next::Request(Err(broken)) => {
                    if broken.kind() == io::ErrorKind::InvalidData {
                        // Whoever writes a host of their own sees what was wrong, under an id that no request has.
                        self.respond(0, Err(Refusal::new(Code::Invalid, broken.to_string()))).await?;
                        // A serial port cannot be dialled again, and the next record is found whatever this one was.
                        if self.framing == Framing::Records {
                            continue;
                        }
                    }
                    return Err(broken);
                }
                Next::Request(Ok(Some(received))) => {
                    let (generation, message) = *received;
                    if let Some(outcome) = self.request(generation, message, &hello, machine).await? {
                        return Ok(outcome);
                    }
                }
                Next::Line(line) => {
                    news.next_line = line.number + 1;
                    self.send(from_agent::Message::Log(log_line(line))).await?;
                }
                Next::Event(Ok(event)) => self.tell(wire_event(event)).await?,
                Next::Event(Err(RecvError::Lagged(lost))) => self.tell(event::Event::Lost(lost)).await?,
                // The sandbox holds the sender.
                Next::Event(Err(RecvError::Closed)) => return Ok(Outcome::Disconnected),
                Next::Ports => self.look_at_ports(&mut news.ports).await?,
            }
        }
    }

    async fn request(
        &mut self,
        generation: u64,
        FromHost { id, request }: FromHost,
        hello: &Hello,
        machine: &impl Acts,
    ) -> io::Result<Option<Outcome>> {
        let lifecycle = machine.sandbox().lifecycle();
        if let Some(from_host::Request::Resume(resume)) = request {
            // Only a Resume may speak for a life that has not begun; one of a life that is over is not answered.
            if generation < self.generation {
                return Ok(None);
            }
            let done = self.resume(generation, resume, machine).await;
            let accepted = done.is_ok();
            // A host of a newer generation hears nothing of an older one: its refusal must be of its own.
            let answered_in = std::mem::replace(&mut self.generation, generation);
            let result = done.map(|resumed| Some(response::Result::Resumed(resumed)));
            self.respond(id, result).await?;
            match accepted {
                true => self.say_hello(hello, machine).await?,
                false => self.generation = answered_in,
            }
            return Ok(None);
        }
        // A message of another generation was meant for another life of this machine.
        if generation != self.generation {
            return Ok(None);
        }
        let mut outcome = None;
        let result = match request {
            Some(from_host::Request::Configure(configure)) => {
                machine.configure(configure).await.map(|()| None)
            }
            Some(from_host::Request::Shutdown(shutdown)) => {
                outcome = Some(Outcome::Shutdown(Duration::from_millis(shutdown.grace_ms.into())));
                Ok(None)
            }
            Some(from_host::Request::Freeze(freeze)) => {
                let before = lifecycle.phase();
                match before.freeze() {
                    Ok(frozen) => {
                        // From here on no client starts what would not be frozen with the rest.
                        lifecycle.enter(frozen);
                        let done = machine.freeze(freeze).await;
                        if done.is_err() {
                            lifecycle.enter(before);
                        }
                        done.map(|()| None)
                    }
                    Err(misplaced) => Err(misplaced.into()),
                }
            }
            Some(from_host::Request::Thaw(_)) => match lifecycle.phase().thaw() {
                Ok((running, first_of_clone)) => {
                    let done = machine.thaw(first_of_clone).await;
                    if done.is_ok() {
                        lifecycle.enter(running);
                    }
                    done.map(|()| None)
                }
                Err(misplaced) => Err(misplaced.into()),
            },
            Some(from_host::Request::Rehearse(_)) => match lifecycle.phase().rehearse() {
                Ok(()) => machine.rehearse().await.map(|done| Some(response::Result::Rehearsed(done))),
                Err(misplaced) => Err(misplaced.into()),
            },
            Some(from_host::Request::Stats(_)) => {
                machine.stats().await.map(|stats| Some(response::Result::Stats(stats)))
            }
            Some(from_host::Request::Resume(_)) | None => {
                Err(Refusal::new(Code::Unsupported, "this agent does not know the request"))
            }
        };
        self.respond(id, result).await?;
        Ok(outcome)
    }

    async fn resume(
        &mut self,
        generation: u64,
        resume: Resume,
        machine: &impl Acts,
    ) -> Result<envd_proto::control::Resumed, Refusal> {
        let lifecycle = machine.sandbox().lifecycle();
        let clone = match resume.kind() {
            Kind::Clone => true,
            Kind::Same => false,
            Kind::Unspecified => {
                return Err(Refusal::new(
                    Code::Invalid,
                    "a Resume is of the same sandbox or of a clone: neither is said",
                ));
            }
        };
        let next = lifecycle.phase().resume(resume.generation, clone)?;
        if generation != resume.generation {
            let message =
                format!("a Resume into generation {} came in records of {generation}", resume.generation);
            return Err(Refusal::new(Code::Invalid, message));
        }
        let thaw = resume.thaw;
        let mut resumed = machine.resume(resume).await?;
        // Client streams of the old life end here; the answer waits until the channel can begin anew.
        let began = Instant::now();
        lifecycle.enter(next);
        lifecycle.wait_channel(generation).await;
        let duration_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        resumed.parts.push(Part { name: "channel".to_owned(), duration_us, ..Part::default() });
        // Whether it can run without the part that failed is the host's to judge.
        if thaw && resumed.parts.iter().all(|part| part.error.is_empty()) {
            let began = Instant::now();
            let (running, first_of_clone) = next.thaw()?;
            let done = machine.thaw(first_of_clone).await;
            resumed.thawed = done.is_ok();
            if resumed.thawed {
                lifecycle.enter(running);
            }
            let duration_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
            let error = done.err().map(|refusal| refusal.message).unwrap_or_default();
            resumed.parts.push(Part { name: "thaw".to_owned(), duration_us, error });
        }
        Ok(resumed)
    }

    async fn say_hello(&mut self, hello: &Hello, machine: &impl Acts) -> io::Result<()> {
        let phase = machine.sandbox().lifecycle().phase();
        self.generation = phase.generation();
        let hello = Hello { generation: phase.generation(), frozen: phase.is_frozen(), ..hello.clone() };
        self.send(from_agent::Message::Hello(hello)).await
    }

    async fn look_at_ports(&mut self, known: &mut BTreeSet<Port>) -> io::Result<()> {
        let found = tokio::task::spawn_blocking(listening::ports).await.map_err(io::Error::other)?;
        let now = match found {
            Ok(now) => now,
            Err(error) => {
                crate::log::warn(format_args!("reading the listening ports: {error}"));
                return Ok(());
            }
        };
        let (opened, closed) = listening::changes(known, &now);
        for port in closed {
            self.tell(wire_event(Event::PortClosed(port))).await?;
        }
        for port in opened {
            self.tell(wire_event(Event::PortOpened(port))).await?;
        }
        *known = now;
        Ok(())
    }

    async fn respond(
        &mut self,
        id: u64,
        result: Result<Option<response::Result>, Refusal>,
    ) -> io::Result<()> {
        let (result, error) = match result {
            Ok(result) => (result, None),
            Err(refusal) => (None, Some(refusal.into_wire())),
        };
        self.send(from_agent::Message::Response(Response { id, error, result })).await
    }

    async fn tell(&mut self, event: event::Event) -> io::Result<()> {
        self.send(from_agent::Message::Event(WireEvent { event: Some(event) })).await
    }

    async fn send(&mut self, message: from_agent::Message) -> io::Result<()> {
        self.writer.send(self.generation, &FromAgent { message: Some(message) }).await
    }
}

fn log_line(line: Line) -> LogLine {
    let since_epoch = line.time.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    LogLine {
        unix_time_ns: i64::try_from(since_epoch.as_nanos()).unwrap_or(i64::MAX),
        level: line.level.name().to_owned(),
        message: line.message,
        fields: line.fields.into_iter().collect(),
        suppressed: line.suppressed,
    }
}

fn wire_event(event: Event) -> event::Event {
    let port = |port: Port| event::Port { address: port.address.to_string(), port: port.port.into() };
    match event {
        Event::OutOfMemory(oom) => {
            event::Event::OutOfMemory(event::OutOfMemory { name: oom.name, pid: oom.pid, tag: oom.tag })
        }
        Event::PortOpened(opened) => event::Event::PortOpened(port(opened)),
        Event::PortClosed(closed) => event::Event::PortClosed(port(closed)),
        Event::SpawnerRestarted => event::Event::SpawnerRestarted(event::SpawnerRestarted {}),
    }
}

#[cfg(test)]
mod tests;
