//! QEMU's monitor: a line of JSON for each command, answer and event.

use std::collections::VecDeque;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::timely;

pub(super) struct Qmp {
    lines: Lines<BufReader<OwnedReadHalf>>,
    writer: OwnedWriteHalf,
    events: VecDeque<Value>,
}

impl Qmp {
    pub(super) async fn connect(stream: UnixStream) -> Self {
        let (read, writer) = stream.into_split();
        let mut qmp = Self { lines: BufReader::new(read).lines(), writer, events: VecDeque::new() };
        let greeting = qmp.next().await;
        assert!(greeting.get("QMP").is_some(), "{greeting}");
        qmp.execute("qmp_capabilities", json!({})).await;
        qmp
    }

    pub(super) async fn execute(&mut self, command: &str, arguments: Value) {
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.writer.write_all(line.as_bytes()).await.expect("the VMM takes a command");
        loop {
            let message = self.next().await;
            if message.get("event").is_some() {
                self.events.push_back(message);
                continue;
            }
            assert!(message.get("return").is_some(), "{command}: {message}");
            return;
        }
    }

    /// Waits until a migration has come to its end.
    pub(super) async fn migrated(&mut self) {
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.next().await,
            };
            if event["event"] == "MIGRATION" {
                match event["data"]["status"].as_str() {
                    Some("completed") => return,
                    Some("failed" | "cancelled") => panic!("{event}"),
                    _ => {}
                }
            }
        }
    }

    async fn next(&mut self) -> Value {
        let line = timely("the monitor's next line", self.lines.next_line()).await;
        let line = line.expect("the monitor can be read").expect("the VMM runs");
        serde_json::from_str(&line).expect("JSON")
    }
}
