//! JSON-RPC 2.0 as go-ethereum's server speaks it, which is what the first SDKs were written against.
//!
//! ```text
//! {"jsonrpc":"2.0","id":"aB3","method":"process_subscribe","params":["onExit","p1"]}
//! {"jsonrpc":"2.0","id":"aB3","result":"0x1f"}
//! {"jsonrpc":"2.0","method":"process_subscription","params":{"subscription":"0x1f","result":0}}
//! ```
//!
//! Ids are echoed as the text that came. An answer always has `result` (null is one) or `error`. What is no JSON is answered
//! under the id null; unlike go-ethereum's the connection goes on, since a WebSocket's frames keep their bounds.
//!
//! Sources: jsonrpc.org/specification; the codes' meanings and words are go-ethereum's.

use std::collections::HashMap;

use serde::Serialize;
use serde_json::value::RawValue;

/// Requests in one batch (go-ethereum's limit).
pub const MAX_BATCH: usize = 1000;

/// An error as it goes to the client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("{message} ({code})")]
pub struct RpcError {
    /// Its kind.
    pub code: i32,
    /// What, and what to do.
    pub message: String,
}

impl RpcError {
    /// -32700: no JSON.
    pub fn parse(error: impl std::fmt::Display) -> Self {
        Self { code: -32700, message: format!("parse error: {error}") }
    }

    /// -32600: JSON, but no request.
    pub fn invalid_request(message: &str) -> Self {
        Self { code: -32600, message: message.to_owned() }
    }

    /// -32601: nothing of that name.
    pub fn no_method(method: &str) -> Self {
        Self::unknown(format!("the method {} does not exist/is not available", excerpt(method)))
    }

    /// -32601: nothing of that name to subscribe to.
    pub fn no_subscription(topic: &str, namespace: &str) -> Self {
        Self::unknown(format!("no {:?} subscription in {} namespace", excerpt(topic), excerpt(namespace)))
    }

    fn unknown(message: String) -> Self {
        Self { code: -32601, message }
    }

    /// -32602: arguments that the method does not take.
    pub fn invalid_params(message: impl Into<String>) -> Self {
        Self { code: -32602, message: message.into() }
    }

    /// -32002: the sandbox did not answer in time.
    pub fn timeout() -> Self {
        Self { code: -32002, message: "request timed out".to_owned() }
    }

    /// -32000: the call failed.
    pub fn failed(message: impl Into<String>) -> Self {
        Self { code: -32000, message: message.into() }
    }
}

/// The part of a client's own text that goes back to it, and to logs.
fn excerpt(text: &str) -> &str {
    /// Longer than any name of the protocol.
    const MAX_EXCERPT: usize = 64;
    match text.char_indices().nth(MAX_EXCERPT) {
        Some((end, _)) => &text[..end],
        None => text,
    }
}

/// What one frame carries.
#[derive(Debug)]
pub enum Frame<'a> {
    /// One message.
    Single(Message<'a>),
    /// An array of messages, never an empty one.
    Batch(Vec<Message<'a>>),
}

/// One message of a client.
#[derive(Debug)]
pub enum Message<'a> {
    /// Wants an answer.
    Call {
        /// What the answer goes under, as it came.
        id: &'a RawValue,
        /// Its method.
        method: String,
        /// Its arguments.
        params: Option<&'a RawValue>,
    },
    /// Wants none.
    Notification {
        /// Its method.
        method: String,
        /// Its arguments.
        params: Option<&'a RawValue>,
    },
    /// The answer to a question that nobody asked.
    Response,
    /// No request; answered with an error, under its id if it has one.
    Invalid {
        /// Its id.
        id: Option<&'a RawValue>,
    },
}

/// Reads a frame.
pub fn parse(text: &str) -> Result<Frame<'_>, RpcError> {
    let raw: &RawValue = serde_json::from_str(text).map_err(RpcError::parse)?;
    if !raw.get().starts_with('[') {
        return Ok(Frame::Single(message(raw)));
    }
    let items: Vec<&RawValue> = serde_json::from_str(raw.get()).map_err(RpcError::parse)?;
    match items.len() {
        0 => Err(RpcError::invalid_request("empty batch")),
        1..=MAX_BATCH => Ok(Frame::Batch(items.into_iter().map(message).collect())),
        _ => Err(RpcError::invalid_request("batch too large")),
    }
}

fn message(raw: &RawValue) -> Message<'_> {
    let Ok(fields) = serde_json::from_str::<HashMap<String, &RawValue>>(raw.get()) else {
        return Message::Invalid { id: None };
    };
    let text = |name: &str| fields.get(name).and_then(|raw| serde_json::from_str::<String>(raw.get()).ok());
    let id = fields.get("id").copied();
    let is_valid = |id: &RawValue| !id.get().starts_with(['{', '[']);
    if text("jsonrpc").as_deref() != Some("2.0") {
        return Message::Invalid { id: id.filter(|id| is_valid(id)) };
    }
    let params = fields.get("params").copied();
    match (id, text("method").filter(|method| !method.is_empty())) {
        (None, Some(method)) => Message::Notification { method, params },
        (Some(id), Some(method)) if is_valid(id) => Message::Call { id, method, params },
        (Some(id), None)
            if is_valid(id)
                && params.is_none()
                && (fields.contains_key("result") || fields.contains_key("error")) =>
        {
            Message::Response
        }
        (id, _) => Message::Invalid { id: id.filter(|id| is_valid(id)) },
    }
}

/// A call's positional arguments.
#[derive(Debug)]
pub struct Arguments<'a>(Vec<&'a RawValue>);

impl<'a> Arguments<'a> {
    /// The arguments of `params`; at most `most`.
    pub fn parse(params: Option<&'a RawValue>, most: usize) -> Result<Self, RpcError> {
        let text = params.map_or("null", RawValue::get);
        let arguments: Vec<&RawValue> = match text.as_bytes().first() {
            Some(b'[') => {
                serde_json::from_str(text).map_err(|error| RpcError::invalid_params(error.to_string()))?
            }
            _ if text == "null" => Vec::new(),
            _ => return Err(RpcError::invalid_params("non-array args")),
        };
        if arguments.len() > most {
            return Err(RpcError::invalid_params(format!("too many arguments, want at most {most}")));
        }
        Ok(Self(arguments))
    }

    /// The argument at `index`, which must be there.
    pub fn required<T: serde::de::DeserializeOwned>(&self, index: usize) -> Result<T, RpcError> {
        let missing = || RpcError::invalid_params(format!("missing value for required argument {index}"));
        self.optional(index)?.ok_or_else(missing)
    }

    /// The argument at `index`; absent and null are the same.
    pub fn optional<T: serde::de::DeserializeOwned>(&self, index: usize) -> Result<Option<T>, RpcError> {
        let Some(raw) = self.0.get(index) else { return Ok(None) };
        serde_json::from_str(raw.get())
            .map_err(|error| RpcError::invalid_params(format!("invalid argument {index}: {error}")))
    }
}

/// The answer to a call, or to what was none (`id` is absent then).
pub fn answer(id: Option<&RawValue>, outcome: &Result<serde_json::Value, RpcError>) -> String {
    #[derive(Serialize)]
    #[serde(rename_all = "lowercase")]
    enum Outcome<'a> {
        Result(&'a serde_json::Value),
        Error(&'a RpcError),
    }
    #[derive(Serialize)]
    struct Answer<'a> {
        jsonrpc: &'static str,
        id: Option<&'a RawValue>,
        #[serde(flatten)]
        outcome: Outcome<'a>,
    }
    let outcome = match outcome {
        Ok(result) => Outcome::Result(result),
        Err(error) => Outcome::Error(error),
    };
    encode(&Answer { jsonrpc: "2.0", id, outcome })
}

/// The answers to a batch.
pub fn batch(answers: &[String]) -> String {
    format!("[{}]", answers.join(","))
}

/// Something that a subscription tells.
pub fn notification(namespace: &str, subscription: &str, result: &impl Serialize) -> String {
    #[derive(Serialize)]
    struct Params<'a, R> {
        subscription: &'a str,
        result: &'a R,
    }
    #[derive(Serialize)]
    struct Notification<'a, R> {
        jsonrpc: &'static str,
        method: String,
        params: Params<'a, R>,
    }
    let method = format!("{namespace}_subscription");
    encode(&Notification { jsonrpc: "2.0", method, params: Params { subscription, result } })
}

/// Strings, numbers and maps with string keys cannot fail.
fn encode(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_else(|_| String::from("null"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    /// What a frame is answered with, where every method gives its own name.
    fn echo(text: &str) -> Option<String> {
        let one = |message: Message<'_>| match message {
            Message::Call { id, method, .. } => Some(answer(Some(id), &Ok(json!(method)))),
            Message::Notification { .. } | Message::Response => None,
            Message::Invalid { id } => Some(answer(id, &Err(RpcError::invalid_request("invalid request")))),
        };
        match parse(text) {
            Ok(Frame::Single(message)) => one(message),
            Ok(Frame::Batch(messages)) => {
                let answers: Vec<String> = messages.into_iter().filter_map(one).collect();
                (!answers.is_empty()).then(|| batch(&answers))
            }
            Err(error) => Some(answer(None, &Err(error))),
        }
    }

    #[test]
    fn frames_are_answered_as_the_old_server_did() {
        let ok = |id: &str| Some(format!(r#"{{"jsonrpc":"2.0","id":{id},"result":"m"}}"#));
        let bad = |id: &str, code: i32, message: &str| {
            let error = format!(r#"{{"code":{code},"message":"{message}"}}"#);
            Some(format!(r#"{{"jsonrpc":"2.0","id":{id},"error":{error}}}"#))
        };
        let invalid = |id: &str| bad(id, -32600, "invalid request");
        for (text, expected) in [
            (r#"{"jsonrpc":"2.0","id":"aB3","method":"m"}"#, ok(r#""aB3""#)),
            // Echoed as the text that came.
            (r#"{"jsonrpc":"2.0","id":1e2,"method":"m","params":[]}"#, ok("1e2")),
            (
                r#"{"jsonrpc":"2.0","id":123456789012345678901234567890,"method":"m"}"#,
                ok("123456789012345678901234567890"),
            ),
            (r#" {"id":null,"method":"m","jsonrpc":"2.0","new":{}} "#, ok("null")),
            (r#"{"jsonrpc":"2.0","method":"m"}"#, None),
            (r#"{"jsonrpc":"2.0","id":1,"result":null}"#, None),
            (r#"{"jsonrpc":"2.0","id":1,"error":{}}"#, None),
            (r#"{"jsonrpc":"1.0","id":1,"method":"m"}"#, invalid("1")),
            (r#"{"id":1,"method":"m"}"#, invalid("1")),
            (r#"{"jsonrpc":"2.0","id":1,"method":5}"#, invalid("1")),
            (r#"{"jsonrpc":"2.0","id":1,"method":""}"#, invalid("1")),
            (r#"{"jsonrpc":"2.0","id":{},"method":"m"}"#, invalid("null")),
            (r#"{"jsonrpc":"2.0","id":[1],"method":"m"}"#, invalid("null")),
            (r#"{}"#, invalid("null")),
            ("1", invalid("null")),
            (r#""text""#, invalid("null")),
            ("[]", bad("null", -32600, "empty batch")),
            (r#"[{"jsonrpc":"2.0","method":"m"}]"#, None),
        ] {
            assert_eq!(echo(text), expected, "{text}");
        }
        let both =
            echo(r#"[1,{"jsonrpc":"2.0","id":7,"method":"m"},{"jsonrpc":"2.0","method":"m"}]"#).unwrap();
        let both: Vec<Value> = serde_json::from_str(&both).unwrap();
        assert_eq!((both.len(), &both[0]["error"]["code"], &both[1]["id"]), (2, &json!(-32600), &json!(7)));
        for text in ["", "{", "nul", "{}{}", "[1,", "\u{0}", r#"{"a":1,}"#] {
            let error = parse(text).unwrap_err();
            assert_eq!(error.code, -32700, "{text:?}: {error}");
        }
        let many = format!("[{}1]", "1,".repeat(MAX_BATCH));
        assert_eq!(parse(&many).unwrap_err().message, "batch too large");
    }

    #[test]
    fn depth_does_not_matter() {
        for text in ["[".repeat(100_000), format!("{}{}", "[".repeat(100_000), "]".repeat(100_000))] {
            let _ = echo(&text);
            let _ = echo(&format!(r#"{{"jsonrpc":"2.0","id":1,"method":"m","params":{text}}}"#));
        }
    }

    #[test]
    fn arguments_are_positions() {
        let raw = |text: &str| {
            serde_json::value::to_raw_value(&serde_json::from_str::<Value>(text).unwrap()).unwrap()
        };
        let params = raw(r#"["a",7,null]"#);
        let arguments = Arguments::parse(Some(&params), 3).unwrap();
        assert_eq!(arguments.required::<String>(0).unwrap(), "a");
        assert_eq!(arguments.required::<u32>(1).unwrap(), 7);
        assert_eq!(arguments.optional::<String>(2).unwrap(), None);
        assert_eq!(arguments.optional::<String>(3).unwrap(), None);
        let missing = "missing value for required argument 2";
        assert_eq!(arguments.required::<String>(2).unwrap_err(), RpcError::invalid_params(missing));
        assert!(arguments.required::<String>(1).unwrap_err().message.starts_with("invalid argument 1: "));
        let error = Arguments::parse(Some(&params), 2).unwrap_err();
        assert_eq!(error.message, "too many arguments, want at most 2");
        assert_eq!(Arguments::parse(Some(&raw("{}")), 2).unwrap_err().message, "non-array args");
        assert!(Arguments::parse(None, 0).is_ok() && Arguments::parse(Some(&raw("null")), 0).is_ok());
    }

    #[test]
    fn answers_have_a_result_or_an_error() {
        assert_eq!(answer(None, &Ok(Value::Null)), r#"{"jsonrpc":"2.0","id":null,"result":null}"#);
        let told = notification("process", "0x1", &json!({"line": "a"}));
        assert_eq!(
            told,
            r#"{"jsonrpc":"2.0","method":"process_subscription","params":{"subscription":"0x1","result":{"line":"a"}}}"#
        );
        let unknown = RpcError::no_method(&"é".repeat(1000)).message;
        assert_eq!(unknown, format!("the method {} does not exist/is not available", "é".repeat(64)));
    }

    proptest! {
        #[test]
        fn no_text_is_trouble(text in r#"[\[\]{}",:0-9a-z \\.-]{0,64}"#) {
            if let Some(answer) = echo(&text) {
                prop_assert!(serde_json::from_str::<Value>(&answer).is_ok(), "{}", answer);
            }
        }

        #[test]
        fn every_id_comes_back(id in "[a-zA-Z0-9\u{e9}\"\\\\]{0,12}", method in "[a-z]{1,8}_[a-zA-Z]{1,8}") {
            let call = json!({"jsonrpc": "2.0", "id": id, "method": method, "params": [1]}).to_string();
            let answer: Value = serde_json::from_str(&echo(&call).unwrap()).unwrap();
            prop_assert_eq!(answer, json!({"jsonrpc": "2.0", "id": id, "result": method}));
        }
    }
}
