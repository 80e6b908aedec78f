//! The control door, which only the host can open: hello, configure, shutdown.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use envd_channel::control::{ControlReader, ControlWriter, Framing};
use envd_proto::control::{
    Configure, Error as WireError, Failed, FromAgent, FromHost, Hello, Response, error::Code, from_agent,
    from_host,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadHalf, WriteHalf};

use crate::sandbox::Sandbox;

/// A connection to the host.
#[derive(Debug)]
pub struct Control<S> {
    reader: ControlReader<ReadHalf<S>, FromHost>,
    writer: ControlWriter<WriteHalf<S>, FromAgent>,
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

impl<S: AsyncRead + AsyncWrite> Control<S> {
    /// The door over a stream to the host.
    pub fn new(stream: S, framing: Framing, generation: u64) -> Self {
        let (read, write) = tokio::io::split(stream);
        let (reader, writer) = (ControlReader::new(read, framing), ControlWriter::new(write, framing));
        Self { reader, writer, generation }
    }

    /// Tells the host that the boot has failed.
    pub async fn fail(&mut self, failed: Failed) -> io::Result<()> {
        self.send(from_agent::Message::Failed(failed)).await
    }

    /// Says hello and carries out what the host asks for, until it disconnects or wants a shutdown.
    pub async fn serve(&mut self, hello: Hello, sandbox: &Arc<Sandbox>) -> io::Result<Outcome> {
        self.send(from_agent::Message::Hello(hello)).await?;
        loop {
            let received = self.reader.receive().await;
            if let Err(broken) = &received
                && broken.kind() == io::ErrorKind::InvalidData
            {
                // Whoever writes a host of their own sees here what was wrong, under an id that no request has.
                let response = Response { id: 0, error: Some(error(Code::Invalid, broken.to_string())) };
                self.send(from_agent::Message::Response(response)).await?;
            }
            let Some((generation, message)) = received? else {
                return Ok(Outcome::Disconnected);
            };
            // A message of another generation was meant for another life of this machine.
            if generation != self.generation {
                continue;
            }
            let (result, outcome) = match message.request {
                Some(from_host::Request::Configure(configure)) => (apply(configure, sandbox).await, None),
                Some(from_host::Request::Shutdown(shutdown)) => {
                    let grace = Duration::from_millis(shutdown.grace_ms.into());
                    (Ok(()), Some(Outcome::Shutdown(grace)))
                }
                None => (Err(error(Code::Unsupported, "this agent does not know the request")), None),
            };
            let response = Response { id: message.id, error: result.err() };
            self.send(from_agent::Message::Response(response)).await?;
            if let Some(outcome) = outcome {
                return Ok(outcome);
            }
        }
    }

    async fn send(&mut self, message: from_agent::Message) -> io::Result<()> {
        self.writer.send(self.generation, &FromAgent { message: Some(message) }).await
    }
}

fn error(code: Code, message: impl Into<String>) -> WireError {
    WireError { code: code.into(), message: message.into() }
}

async fn apply(configure: Configure, sandbox: &Arc<Sandbox>) -> Result<(), WireError> {
    if let Some(name) = configure.env.keys().find(|name| name.is_empty() || name.contains(['=', '\0'])) {
        return Err(error(Code::Invalid, format!("environment: {name:?} cannot be a variable's name")));
    }
    if sandbox.session().is_some() {
        return Err(error(Code::FailedPrecondition, crate::sandbox::AlreadyConfigured.to_string()));
    }
    if configure.unix_time_ns != 0 {
        set_clock(configure.unix_time_ns)
            .map_err(|e| error(Code::Internal, format!("setting the clock: {e}")))?;
    }
    if !configure.hostname.is_empty() {
        let hostname = configure.hostname.clone();
        let set = sandbox.root().run(move || crate::hostname::set(&hostname)).await;
        set.map_err(|e| match e.kind() {
            io::ErrorKind::InvalidInput => error(Code::Invalid, e.to_string()),
            _ => error(Code::Internal, format!("setting the hostname: {e}")),
        })?;
    }
    sandbox.configure(configure).map_err(|e| error(Code::FailedPrecondition, e.to_string()))
}

fn set_clock(unix_time_ns: i64) -> io::Result<()> {
    const NANOSECONDS: i64 = 1_000_000_000;
    let time = rustix::time::Timespec {
        tv_sec: unix_time_ns.div_euclid(NANOSECONDS),
        tv_nsec: unix_time_ns.rem_euclid(NANOSECONDS),
    };
    rustix::time::clock_settime(rustix::time::ClockId::Realtime, time)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::root::Root;
    use crate::spawner::Spawner;

    /// The host's side of a control connection, by hand.
    struct Host {
        reader: ControlReader<ReadHalf<tokio::io::DuplexStream>, FromAgent>,
        writer: ControlWriter<WriteHalf<tokio::io::DuplexStream>, FromHost>,
    }

    impl Host {
        async fn receive(&mut self) -> from_agent::Message {
            self.reader.receive().await.unwrap().unwrap().1.message.unwrap()
        }

        async fn ask(&mut self, generation: u64, id: u64, request: from_host::Request) {
            self.writer.send(generation, &FromHost { id, request: Some(request) }).await.unwrap();
        }

        async fn answer(&mut self) -> (u64, Option<Code>) {
            match self.receive().await {
                from_agent::Message::Response(response) => {
                    (response.id, response.error.map(|error| error.code()))
                }
                other => panic!("expected a response, got {other:?}"),
            }
        }
    }

    #[tokio::test]
    async fn the_host_configures_once_and_shuts_down() {
        let (socket, _spawner) = Spawner::socketpair().unwrap();
        let sandbox = Sandbox::new(Root::own(), Spawner::connect(socket).unwrap(), None);
        let (near, far) = tokio::io::duplex(8192);
        let serving = tokio::spawn({
            let sandbox = Arc::clone(&sandbox);
            async move {
                Control::new(far, Framing::Lines, 5)
                    .serve(Hello { generation: 5, ..Hello::default() }, &sandbox)
                    .await
            }
        });
        let (read, write) = tokio::io::split(near);
        let mut host = Host {
            reader: ControlReader::new(read, Framing::Lines),
            writer: ControlWriter::new(write, Framing::Lines),
        };
        assert!(matches!(host.receive().await, from_agent::Message::Hello(hello) if hello.generation == 5));

        let shutdown = |grace_ms| from_host::Request::Shutdown(envd_proto::control::Shutdown { grace_ms });
        let configure = |name: &str| {
            let env = [(name.to_owned(), "1".to_owned())].into();
            from_host::Request::Configure(Configure { env, ..Configure::default() })
        };
        host.ask(4, 1, shutdown(1)).await; // of a generation that is over: not answered
        host.ask(5, 2, configure("A=B")).await;
        assert_eq!(host.answer().await, (2, Some(Code::Invalid)));
        assert!(sandbox.session().is_none());
        host.ask(5, 3, configure("A")).await;
        assert_eq!(host.answer().await, (3, None));
        host.ask(5, 4, configure("A")).await;
        assert_eq!(host.answer().await, (4, Some(Code::FailedPrecondition)));
        host.ask(5, 5, shutdown(250)).await;
        assert_eq!(host.answer().await, (5, None));
        assert_eq!(serving.await.unwrap().unwrap(), Outcome::Shutdown(Duration::from_millis(250)));
    }
}
