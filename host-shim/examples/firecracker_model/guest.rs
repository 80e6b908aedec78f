//! An agent by a script: it dials the control door, answers the host, and runs a few commands for clients.
//!
//! All that it knows is in the RAM, as a real one's: a restored machine goes on with what its source knew.
//!
//! | command | |
//! |---|---|
//! | `count` | prints how often it was called in this RAM |
//! | `poke PAGE TEXT`, `peek PAGE` | a page of the RAM |
//! | `write TEXT`, `read` | a sector of the scratch disk |
//! | `size` | bytes of the scratch disk |
//! | `line` | the kernel's command line |
//! | `wait` | prints `waiting` and does not end; whoever attaches to it gets its end |

use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener as StdListener;
use std::rc::Rc;
use std::time::Duration;

use envd_channel::control::{ControlReader, ControlWriter, Framing};
use envd_channel::envelope;
use envd_proto::control::from_agent::Message;
use envd_proto::control::from_host::Request;
use envd_proto::control::{
    Error as WireError, FromAgent, FromHost, Hello, Rehearsed, Response, Resumed, error::Code, response,
};
use envd_proto::process::process_event::{DataEvent, EndEvent, Event, StartEvent, data_event};
use envd_proto::process::{ConnectRequest, ProcessEvent, StartRequest, StartResponse};
use envd_proto::{CLIENT_PORT, CONTROL_PORT, FIRST_GENERATION, PORTS_PORT, PROTOCOL_VERSION};
use prost::Message as _;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use crate::http;
use crate::machine::Vm;
use crate::ram::PAGE;

/// Where on the scratch disk the script writes: behind the file system's own beginning.
const SECTOR: u64 = 8 << 20;

/// The pause before the host is dialled again.
const REDIAL: Duration = Duration::from_millis(5);

/// What the agent knows; the first page of the RAM.
#[derive(Clone, Default, Deserialize, Serialize)]
struct Memory {
    generation: u64,
    frozen: bool,
    configured: bool,
    token: Option<String>,
    count: u64,
    /// Answered requests and the reset of its connection come in this order after a restore.
    resumed: u64,
}

impl Vm {
    fn memory(&self) -> Memory {
        let page = self.ram.borrow().read(0);
        let end = page.iter().position(|&byte| byte == 0).unwrap_or(PAGE);
        serde_json::from_slice(&page[..end])
            .unwrap_or_else(|_| Memory { generation: FIRST_GENERATION, ..Memory::default() })
    }

    fn remember<T>(&self, change: impl FnOnce(&mut Memory) -> T) -> T {
        let mut memory = self.memory();
        let done = change(&mut memory);
        self.ram.borrow_mut().write(0, &serde_json::to_vec(&memory).unwrap());
        done
    }

    async fn until_running(&self) {
        let _ = self.running.subscribe().wait_for(|running| *running).await;
    }
}

/// Begins the guest's life.
pub(crate) fn begin(vm: Rc<Vm>, listener: StdListener) {
    tokio::task::spawn_local(control(Rc::clone(&vm)));
    tokio::task::spawn_local(doors(vm, listener));
}

/// Keeps a connection to the host.
async fn control(vm: Rc<Vm>) {
    loop {
        vm.until_running().await;
        let mut cut = vm.cut.subscribe();
        let path = format!("{}_{CONTROL_PORT}", vm.uds.display());
        if let Ok(stream) = UnixStream::connect(&path).await {
            tokio::select! {
                _ = speak(&vm, stream) => {}
                // It sees the reset when it runs again.
                _ = cut.changed() => {}
            }
        }
        tokio::time::sleep(REDIAL).await;
    }
}

async fn speak(vm: &Vm, stream: UnixStream) -> io::Result<()> {
    let (read, write) = tokio::io::split(stream);
    let mut reader = ControlReader::<_, FromHost>::new(read, Framing::Lines);
    let mut writer = ControlWriter::<_, FromAgent>::new(write, Framing::Lines);
    let hello = |memory: &Memory| {
        let hello = Hello {
            protocol_version: PROTOCOL_VERSION,
            oldest_protocol_version: PROTOCOL_VERSION,
            agent_version: "model".to_owned(),
            generation: memory.generation,
            frozen: memory.frozen,
            ..Hello::default()
        };
        FromAgent { message: Some(Message::Hello(hello)) }
    };
    let memory = vm.memory();
    writer.send(memory.generation, &hello(&memory)).await?;
    while let Some((generation, FromHost { id, request })) = reader.receive().await? {
        vm.until_running().await;
        let memory = vm.memory();
        let refused = |message: &str| {
            Err(WireError { code: Code::FailedPrecondition.into(), message: message.to_owned() })
        };
        let mut ends = false;
        let mut greets = false;
        let result = match request {
            Some(Request::Resume(resume)) => {
                if !memory.frozen || resume.generation <= memory.generation {
                    refused("a Resume of what is not frozen, or old")
                } else {
                    greets = true;
                    vm.remember(|memory| {
                        memory.generation = resume.generation;
                        memory.resumed += 1;
                        memory.frozen = !resume.thaw;
                        if let Some(configure) = resume.configure {
                            memory.configured = true;
                            memory.token = configure.access_token;
                        }
                    });
                    let resumed = Resumed { thawed: resume.thaw, ..Resumed::default() };
                    Ok(Some(response::Result::Resumed(resumed)))
                }
            }
            _ if generation != memory.generation => continue,
            Some(Request::Configure(configure)) => {
                vm.remember(|memory| {
                    memory.configured = true;
                    memory.token = configure.access_token;
                });
                Ok(None)
            }
            Some(Request::Freeze(_)) if !memory.frozen => {
                vm.remember(|memory| memory.frozen = true);
                Ok(None)
            }
            Some(Request::Thaw(_)) if memory.frozen => {
                vm.remember(|memory| memory.frozen = false);
                Ok(None)
            }
            Some(Request::Rehearse(_)) if memory.frozen => {
                Ok(Some(response::Result::Rehearsed(Rehearsed::default())))
            }
            Some(Request::Shutdown(_)) => {
                ends = true;
                Ok(None)
            }
            _ => refused("not now"),
        };
        let (result, error) = match result {
            Ok(result) => (result, None),
            Err(error) => (None, Some(error)),
        };
        // As the agent does: in the generation of the request.
        let answer = FromAgent { message: Some(Message::Response(Response { id, error, result })) };
        writer.send(generation, &answer).await?;
        if greets {
            let memory = vm.memory();
            writer.send(memory.generation, &hello(&memory)).await?;
        }
        if ends {
            println!("reboot: Restarting system");
            std::process::exit(0);
        }
    }
    Ok(())
}

/// The guest's ports, as the VMM shows them.
async fn doors(vm: Rc<Vm>, listener: StdListener) -> io::Result<()> {
    let listener = UnixListener::from_std(listener)?;
    let mut number = 1_073_741_824_u32;
    loop {
        let (stream, _) = listener.accept().await?;
        number += 1;
        let vm = Rc::clone(&vm);
        tokio::task::spawn_local(async move {
            let mut cut = vm.cut.subscribe();
            let mut stream = stream;
            let done = tokio::select! {
                done = connection(&vm, &mut stream, number) => Some(done),
                _ = cut.changed() => None,
            };
            if done.is_none() {
                // The guest has forgotten it, and the VMM has not: it is held until the host lets go of it.
                let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
            }
        });
    }
}

async fn connection(vm: &Vm, stream: &mut UnixStream, number: u32) -> io::Result<()> {
    let mut line = Vec::new();
    while !line.ends_with(b"\n") {
        line.push(stream.read_u8().await?);
        if line.len() > 32 {
            return Ok(());
        }
    }
    vm.until_running().await;
    let port =
        String::from_utf8_lossy(&line).trim_end().strip_prefix("CONNECT ").and_then(|port| port.parse().ok());
    match port {
        Some(CLIENT_PORT) => {}
        Some(PORTS_PORT) => {
            stream.write_all(format!("OK {number}\n").as_bytes()).await?;
            let (mut read, mut write) = stream.split();
            return tokio::io::copy(&mut read, &mut write).await.map(drop);
        }
        // Nobody listens: the connection ends.
        _ => return Ok(()),
    }
    stream.write_all(format!("OK {number}\n").as_bytes()).await?;
    let Some(request) = http::read(stream).await? else { return Ok(()) };
    vm.until_running().await;
    let memory = vm.memory();
    match request.path.as_str() {
        "/health" => http::answer(stream, "200 OK", "text/plain", b"").await,
        _ if !memory.configured || memory.frozen => {
            let body = br#"{"code":"unavailable","message":"the sandbox is nobody's, or frozen"}"#;
            http::answer(stream, "503 Service Unavailable", "application/json", body).await
        }
        "/process.Process/Start" => {
            let request = StartRequest::decode(message(&request.body)?).map_err(io::Error::other)?;
            let process = request.process.unwrap_or_default();
            follow(vm, stream, StartEvent::default(), &process.cmd, &process.args).await
        }
        "/process.Process/Connect" => {
            let request = ConnectRequest::decode(message(&request.body)?).map_err(io::Error::other)?;
            let start = StartEvent {
                offset: request.from_offset,
                end_offset: request.from_offset,
                ..StartEvent::default()
            };
            let from = request.from_offset.map_or_else(String::new, |from| from.to_string());
            follow(vm, stream, start, "again", &[from]).await
        }
        _ => http::answer(stream, "200 OK", "application/proto", b"").await,
    }
}

/// The message of a call with one.
fn message(body: &[u8]) -> io::Result<bytes::Bytes> {
    let mut decoder = envelope::Decoder::default();
    decoder.push(body);
    let envelope = decoder.envelope().map_err(io::Error::other)?;
    Ok(envelope.ok_or_else(|| io::Error::other("no request"))?.message)
}

async fn follow(
    vm: &Vm,
    stream: &mut UnixStream,
    start: StartEvent,
    command: &str,
    args: &[String],
) -> io::Result<()> {
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/connect+proto\r\nConnection: close\r\n\r\n";
    stream.write_all(head.as_bytes()).await?;
    send(stream, Event::Start(StartEvent { pid: 7, ..start })).await?;
    let (output, code) = match run(vm, command, args) {
        Some(output) => (output, 0),
        None => (format!("{command}: no such command\n"), 1),
    };
    let output = data_event::Output::Stdout(output.into_bytes().into());
    send(stream, Event::Data(DataEvent { output: Some(output), ..DataEvent::default() })).await?;
    if command == "wait" {
        std::future::pending::<()>().await;
    }
    let end = EndEvent {
        exit_code: code,
        exited: true,
        status: format!("exit status {code}"),
        ..EndEvent::default()
    };
    send(stream, Event::End(end)).await?;
    // The end of a Connect stream.
    stream.write_all(&envelope::encode(2, b"{}")).await?;
    stream.shutdown().await
}

async fn send(stream: &mut UnixStream, event: Event) -> io::Result<()> {
    let response = StartResponse { event: Some(ProcessEvent { event: Some(event) }) };
    stream.write_all(&envelope::encode(0, &response.encode_to_vec())).await
}

fn run(vm: &Vm, command: &str, args: &[String]) -> Option<String> {
    let text = |bytes: &[u8]| {
        let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
        String::from_utf8_lossy(&bytes[..end]).into_owned()
    };
    let page = || args.first().and_then(|page| page.parse().ok());
    Some(match command {
        "true" => String::new(),
        "wait" => "waiting\n".to_owned(),
        "again" => format!("again from {}\n", args.first()?),
        "count" => format!(
            "{}\n",
            vm.remember(|memory| {
                memory.count += 1;
                memory.count
            })
        ),
        "poke" => {
            vm.ram.borrow_mut().write(page()?, args.get(1)?.as_bytes());
            String::new()
        }
        "peek" => format!("{}\n", text(&vm.ram.borrow().read(page()?))),
        "write" => {
            let mut sector = args.first()?.clone().into_bytes();
            sector.resize(512, 0);
            vm.drives.borrow().get("scratch")?.write_all_at(&sector, SECTOR).ok()?;
            String::new()
        }
        "read" => {
            let mut sector = [0; 512];
            vm.drives.borrow().get("scratch")?.read_exact_at(&mut sector, SECTOR).ok()?;
            format!("{}\n", text(&sector))
        }
        "size" => format!("{}\n", vm.drives.borrow().get("scratch")?.metadata().ok()?.len()),
        "line" => format!("{}\n", vm.boot_args),
        _ => return None,
    })
}
