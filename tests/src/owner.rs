//! The owner's calls on a sandbox's `api.sock`, as any HTTP client makes them.

use std::path::Path;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::DEADLINE;

/// An answer: its status, and its JSON (or text).
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The body; a string where it is no JSON.
    pub body: Value,
}

impl Answer {
    /// The body of an answer that must be a success.
    pub fn ok(self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.body
    }

    /// The words of a refusal that must have this status.
    pub fn refusal(self, status: u16) -> String {
        assert_eq!(self.status, status, "{}", self.body);
        self.body["message"].as_str().expect("a message").to_owned()
    }
}

/// Makes a call, `POST /pause` for instance.
pub async fn call(socket: &Path, request: &str, body: &Value) -> Answer {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let calling = async {
        let mut stream = UnixStream::connect(socket).await.expect("api.sock takes calls");
        let head = format!(
            "{request} HTTP/1.1\r\nhost: sandbox\r\nconnection: close\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.expect("the shim takes a request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("the shim answers");
        answer
    };
    let answer = tokio::time::timeout(DEADLINE, calling).await.expect("the shim answers");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a whole answer");
    let status = head.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok());
    let body = serde_json::from_str(body).unwrap_or_else(|_| Value::String(body.to_owned()));
    Answer { status: status.expect("a status"), body }
}
