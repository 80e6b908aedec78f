//! A rehearsal: one process that does nothing, by the way that a client's comes, while the tenant's are held.
//!
//! ```text
//! here ── HTTP over memory ──► client door ──► spawner ──► clone into `system`, exec of the agent itself, output, exit
//!   ▲                                                                                                       │
//!   └──────────────── events, the end ◄── Connect codec ◄── log ◄───────────────────────────────────────────┘
//! ```
//!
//! What it is good for: a machine that was restored has every page and, where it is emulated, every piece of code to find
//! again. The program is the one that is there in every image, and does what the agent's author knows: the agent, by the
//! name that a process has for its own executable (the spawner is one too, also where it shares no file with the agent).

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use envd_channel::envelope;
use envd_proto::control::{Configure, Rehearsed, error::Code as RefusalCode};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::client::ClientDoor;
use super::seats::Seats;
use crate::connect::Code;
use crate::machine::Refusal;
use crate::sandbox::{Sandbox, Session};

/// The subcommand of the agent that is rehearsed: it prints a line and ends.
pub const REHEARSAL: &str = "rehearsal";

/// The agent's executable, as its spawner sees it.
const PROGRAM: &str = "/proc/self/exe";

/// What the process may take until it is killed; emulated machines on busy hosts are slow.
const DEADLINE: Duration = Duration::from_secs(20);

/// What the answer may take on top, so that it can tell of the kill.
const PATIENCE: Duration = Duration::from_secs(5);

/// The answer has two short events, a line of output and an end.
const MAX_ANSWER: u64 = 16 << 10;

/// Runs one. The sandbox's own session, users and processes have no part in it.
pub(crate) async fn rehearse(sandbox: &Arc<Sandbox>) -> Result<Rehearsed, Refusal> {
    let began = Instant::now();
    let failed = |what: String| Refusal::new(RefusalCode::Internal, format!("the rehearsal: {what}"));
    let answer = tokio::time::timeout(DEADLINE + PATIENCE, ask(sandbox)).await;
    let answer = answer
        .map_err(|_| failed(format!("no end within {} s", (DEADLINE + PATIENCE).as_secs())))?
        .map_err(|error| failed(error.to_string()))?;
    let not_executed = outcome(&answer).map_err(failed)?;
    let duration_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
    Ok(Rehearsed { duration_us, not_executed })
}

/// The whole answer to a Start.
async fn ask(sandbox: &Arc<Sandbox>) -> io::Result<Vec<u8>> {
    // By number: there is no image that does not know root's.
    let session = Session::new(Configure { default_user: "0".to_owned(), ..Configure::default() });
    let door = ClientDoor::for_rehearsal(Arc::clone(sandbox), Arc::new(session));
    let seat = Seats::new(1).take().map(Arc::new).ok_or(io::ErrorKind::ResourceBusy)?;
    let start = json!({
        "process": {"cmd": PROGRAM, "args": [REHEARSAL], "cwd": "/"},
        // Nobody comes back for it.
        "options": {"keepEndedSeconds": 0},
    });
    let body = envelope::encode(0, start.to_string().as_bytes());
    // HTTP/1.0: the answer ends with the connection, and nothing stands between its bytes.
    let head = format!(
        "POST /process.Process/Start HTTP/1.0\r\nhost: sandbox\r\ncontent-type: application/connect+json\r\n\
         connect-timeout-ms: {}\r\ncontent-length: {}\r\n\r\n",
        DEADLINE.as_millis(),
        body.len()
    );
    let (mut near, far) = tokio::io::duplex(MAX_ANSWER as usize);
    let talk = async {
        near.write_all(head.as_bytes()).await?;
        near.write_all(&body).await?;
        let mut answer = Vec::new();
        near.take(MAX_ANSWER).read_to_end(&mut answer).await?;
        Ok(answer)
    };
    tokio::join!(door.serve(far, seat), talk).1
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
