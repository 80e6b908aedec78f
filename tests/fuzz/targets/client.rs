//! A sandbox in a tenant's hands: any answer to a call of the host's client. It is read as the same however it is cut, a
//! process's output is read as the same when it is sent anew, and no error has anything in it that a terminal obeys.
//!
//! Input: one byte that chooses the call, the status and the size of the pieces, then the answer's body.
#![no_main]

use std::cell::RefCell;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use envd_channel::envelope::{self, END_OF_STREAM};
use envd_proto::process::process_event::{DataEvent, EndEvent, Event, StartEvent, data_event};
use envd_proto::process::{ProcessEvent, StartRequest, StartResponse};
use futures::{StreamExt, stream};
use libfuzzer_sys::fuzz_target;
use prost::Message;
use sandbox_folder::client::{ClientError, Exit, Output, SandboxClient, Stream};
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::runtime::{Builder, Runtime};
use tokio_util::io::StreamReader;

/// What the client's requests have room in; they are far shorter.
const MAX_REQUEST: usize = 16 << 10;

thread_local! {
    static RUNTIME: RefCell<Runtime> = RefCell::new(Builder::new_current_thread().enable_all().build().unwrap());
}

fuzz_target!(|input: &[u8]| {
    let Some((&choice, body)) = input.split_first() else { return };
    let (call, is_ok, step) = (choice & 3, choice & 4 == 0, usize::from(choice >> 3) + 1);
    RUNTIME.with_borrow(|runtime| {
        runtime.block_on(async {
            let whole = sandbox(is_ok, body, body.len().max(1));
            let pieces = sandbox(is_ok, body, step);
            match call {
                0 => same(&whole.processes().await, &pieces.processes().await),
                1 => same(&whole.ports().await, &pieces.ports().await),
                _ => {
                    let read = run(&whole).await;
                    assert_eq!(read, run(&pieces).await);
                    let printed: usize = read.printed.iter().map(size).sum();
                    assert!(printed <= body.len(), "{printed} bytes of {}", body.len());
                    if let Some(body) = read.encode() {
                        assert_eq!(run(&sandbox(true, &body, step)).await, read);
                    }
                }
            }
        });
    });
});

/// A client of a sandbox that takes a request and then answers with that body, `step` bytes at a time.
fn sandbox(is_ok: bool, body: &[u8], step: usize) -> SandboxClient {
    let status = if is_ok { "200 OK" } else { "400 Bad Request" };
    // Without a length it ends with the connection, so no cut of it is HTTP's matter.
    let head = Bytes::from(format!("HTTP/1.1 {status}\r\nconnection: close\r\n\r\n"));
    let body = Bytes::copy_from_slice(body);
    SandboxClient::new(Arc::new(move |_| {
        let pieces = (0..body.len()).step_by(step).map(|at| body.slice(at..body.len().min(at + step)));
        let pieces: Vec<Bytes> = [head.clone()].into_iter().chain(pieces).collect();
        let (near, mut far) = tokio::io::duplex(MAX_REQUEST);
        let asked = async move { far.read(&mut [0; 1]).await.map(|_| far) };
        let answer = stream::once(asked).flat_map(move |far| {
            // Held to the end: the request may come in parts.
            let (far, pieces) = (Arc::new(far), pieces.clone());
            stream::iter(pieces).map(move |piece| {
                let _held = &far;
                Ok::<_, io::Error>(piece)
            })
        });
        let stream = tokio::io::join(StreamReader::new(Box::pin(answer)), near);
        Box::pin(async move { Ok(Box::new(stream) as Stream) })
    }))
}

fn same<T: PartialEq + std::fmt::Debug>(whole: &Result<T, ClientError>, pieces: &Result<T, ClientError>) {
    match (whole, pieces) {
        (Ok(whole), Ok(pieces)) => assert_eq!(whole, pieces),
        (Err(whole), Err(pieces)) => assert_eq!(Failure::of(whole), Failure::of(pieces)),
        (whole, pieces) => panic!("{whole:?}, and in pieces {pieces:?}"),
    }
}

/// What was read of a process.
#[derive(Debug, PartialEq)]
struct Read {
    pid: Option<u32>,
    printed: Vec<Output>,
    end: Result<Exit, Failure>,
}

#[derive(Debug, PartialEq)]
enum Failure {
    /// The sandbox said so: the code's name, and its words.
    Refused(&'static str, String),
    /// It makes no sense.
    Broken(String),
}

impl Failure {
    fn of(error: &ClientError) -> Self {
        let text = error.to_string();
        assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{text:?}");
        match error {
            ClientError::Call { code, message } => Self::Refused(code.name(), message.clone()),
            ClientError::Protocol { .. } => Self::Broken(text),
            // Bytes that come can make no connection fail.
            ClientError::Http(_) | ClientError::Io(_) => panic!("{error:?}"),
        }
    }
}

async fn run(sandbox: &SandboxClient) -> Read {
    let mut process = match sandbox.start(StartRequest::default()).await {
        Ok(process) => process,
        Err(error) => return Read { pid: None, printed: vec![], end: Err(Failure::of(&error)) },
    };
    let mut printed = Vec::new();
    let end = loop {
        match process.next().await {
            Ok(Output::Ended(exit)) => break Ok(exit),
            Ok(output) => printed.push(output),
            Err(error) => break Err(Failure::of(&error)),
        }
    };
    Read { pid: Some(process.pid()), printed, end }
}

fn size(output: &Output) -> usize {
    match output {
        Output::Stdout(bytes) | Output::Stderr(bytes) | Output::Pty(bytes) => bytes.len(),
        Output::Ended(_) => 0,
    }
}

impl Read {
    /// The body of a sandbox that means this; there is none of one that makes no sense.
    fn encode(&self) -> Option<Vec<u8>> {
        let start = self.pid.map(|pid| Event::Start(StartEvent { pid, ..Default::default() }));
        let printed = self.printed.iter().map(|output| {
            let output = match output.clone() {
                Output::Stdout(bytes) => Some(data_event::Output::Stdout(bytes)),
                Output::Stderr(bytes) => Some(data_event::Output::Stderr(bytes)),
                Output::Pty(bytes) => Some(data_event::Output::Pty(bytes)),
                Output::Ended(_) => None,
            };
            Event::Data(DataEvent { output, ..Default::default() })
        });
        let end = match &self.end {
            Ok(Exit::Code(code)) => {
                event(Event::End(EndEvent { exited: true, exit_code: (*code).into(), ..Default::default() }))
            }
            Ok(Exit::Signal(signal)) => {
                let status = format!("signal: signal {signal}");
                event(Event::End(EndEvent { status, ..Default::default() }))
            }
            Err(Failure::Refused(code, message)) => {
                let end = json!({"error": {"code": code, "message": message}}).to_string();
                envelope::encode(END_OF_STREAM, end.as_bytes())
            }
            Err(Failure::Broken(_)) => return None,
        };
        Some(start.into_iter().chain(printed).map(event).chain([end]).collect::<Vec<_>>().concat())
    }
}

fn event(event: Event) -> Bytes {
    let response = StartResponse { event: Some(ProcessEvent { event: Some(event) }) };
    envelope::encode(0, &response.encode_to_vec())
}
