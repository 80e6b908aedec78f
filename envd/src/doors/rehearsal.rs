//! A rehearsal: processes that do nothing, by the way that a client's come, while the tenant's are held.
//!
//! ```text
//! here ── mux, HTTP, Connect, over memory ──► client door ──► spawner ──► clone into `system`, exec, output, exit
//!   ▲                                                                                                       │
//!   └──────────────── events, the end ◄── Connect codec ◄── log ◄───────────────────────────────────────────┘
//! ```
//!
//! What it is good for: a machine that was restored has every page and, where it is emulated, every piece of code to find
//! again. What is executed is there in every image: the agent, by the name that a process has for its own executable (the
//! spawner is one too, also where it shares no file with the agent). Then, for what only a program of the image goes
//! through (its file system, its dynamic linker), the image's `true`; what comes of that is of no account.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use envd_channel::envelope;
use envd_channel::mux::Mux;
use envd_proto::CLIENT_PORT;
use envd_proto::control::{Configure, Rehearsed, error::Code as RefusalCode};
use envd_proto::process::{ProcessConfig, StartOptions, StartRequest};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::Doors;
use super::client::ClientDoor;
use crate::connect::{Code, Codec};
use crate::machine::Refusal;
use crate::sandbox::{Sandbox, Session};

/// The subcommand of the agent that is rehearsed: it prints a line and ends.
pub const REHEARSAL: &str = "rehearsal";

/// The agent's executable, as its spawner sees it.
const AGENT: &str = "/proc/self/exe";

/// The image's program that does nothing.
const TRUE: &str = "true";

/// What a process may take until it is killed; emulated machines on busy hosts are slow.
const DEADLINE: Duration = Duration::from_secs(10);

/// What all may take together, kills included.
const PATIENCE: Duration = Duration::from_secs(30);

/// The answer has two short events, a line of output and an end.
const MAX_ANSWER: usize = 16 << 10;

/// Rehearses. The sandbox's own session, users and processes have no part in it.
pub(crate) async fn rehearse(sandbox: &Arc<Sandbox>) -> Result<Rehearsed, Refusal> {
    let began = Instant::now();
    let failed = |what: String| Refusal::new(RefusalCode::Internal, format!("the rehearsal: {what}"));
    let answer = tokio::time::timeout(PATIENCE, starts(sandbox)).await;
    let answer = answer
        .map_err(|_| failed(format!("no end within {} s", PATIENCE.as_secs())))?
        .map_err(|error| failed(error.to_string()))?;
    let not_executed = outcome(&answer).map_err(failed)?;
    let duration_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
    Ok(Rehearsed { duration_us, not_executed })
}

/// All starts; gives the answer to that of the agent.
async fn starts(sandbox: &Arc<Sandbox>) -> io::Result<Vec<u8>> {
    // By number: there is no image that does not know root's.
    let session = Session::new(Configure { default_user: "0".to_owned(), ..Configure::default() });
    let doors = Doors::new(ClientDoor::for_rehearsal(Arc::clone(sandbox), Arc::new(session)));
    let (near, far) = tokio::io::duplex(MAX_ANSWER);
    let generation = sandbox.lifecycle().phase().generation();
    let talk = async {
        let mux = Mux::connect(near, generation).await?;
        // In the codec of the SDKs, then in that of our own clients. Of HTTP/1.0 nothing stands between the answer's bytes.
        let answer = start(&mux, "HTTP/1.0", Codec::Json, AGENT, &[REHEARSAL]).await?;
        start(&mux, "HTTP/1.1", Codec::Proto, TRUE, &[]).await?;
        Ok(answer)
    };
    tokio::select! {
        answer = talk => answer,
        ended = doors.serve_mux(far, generation) => {
            Err(ended.err().unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into()))
        }
    }
}

/// The whole answer to a Start, after which the connection ends.
async fn start(
    mux: &Mux,
    version: &str,
    codec: Codec,
    program: &str,
    arguments: &[&str],
) -> io::Result<Vec<u8>> {
    let request = StartRequest {
        process: Some(ProcessConfig {
            cmd: program.to_owned(),
            args: arguments.iter().map(|argument| (*argument).to_owned()).collect(),
            cwd: Some("/".to_owned()),
            ..ProcessConfig::default()
        }),
        // Nobody comes back for it.
        options: Some(StartOptions { keep_ended_seconds: Some(0), ..StartOptions::default() }),
        ..StartRequest::default()
    };
    let body = envelope::encode(0, &codec.encode(&request).map_err(io::Error::other)?);
    let head = format!(
        "POST /process.Process/Start {version}\r\nhost: sandbox\r\nconnection: close\r\ncontent-type: {}\r\n\
         connect-timeout-ms: {}\r\ncontent-length: {}\r\n\r\n",
        codec.stream_type(),
        DEADLINE.as_millis(),
        body.len()
    );
    let mut stream = mux.open(CLIENT_PORT).await?;
    stream.write_all(&[head.as_bytes(), &body].concat()).await?;
    stream.flush().await?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER as u64).read_to_end(&mut answer).await?;
    Ok(answer)
}

/// Why the program was not executed, empty when it was and has ended well; an error for everything else.
fn outcome(answer: &[u8]) -> Result<String, String> {
    let unexpected = || format!("unexpected answer {:?}", String::from_utf8_lossy(answer));
    let head = answer.windows(4).position(|four| four == b"\r\n\r\n").ok_or_else(unexpected)? + 4;
    let mut decoder = envelope::Decoder::default();
    decoder.push(&answer[head..]);
    let mut ended_well = false;
    while let Ok(Some(envelope)) = decoder.envelope() {
        let message: Value = serde_json::from_slice(&envelope.message).map_err(|_| unexpected())?;
        let end = &message["event"]["end"];
        if !end.is_null() {
            // protobuf's JSON mapping leaves a status of 0 out.
            ended_well = end["exited"] == true && end["exitCode"].is_null();
        }
        if !envelope.end {
            continue;
        }
        return match (&message["error"], ended_well) {
            (Value::Null, true) => Ok(String::new()),
            (Value::Null, false) => Err(unexpected()),
            (error, _) => {
                let text = error["message"].as_str().unwrap_or_default().to_owned();
                // What an execution fails with: all before it has been done.
                let executed_nothing = error["code"] == Code::InvalidArgument.name();
                if executed_nothing { Ok(text) } else { Err(text) }
            }
        };
    }
    Err(unexpected())
}
