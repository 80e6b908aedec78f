//! Our JSON and binary forms against those of protobuf's own implementation, both ways, over random messages.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::io::Write;
use std::process::Stdio;

use envd_proto::{filesystem as f, process as p};
use prost::{Message, Name};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// Enough for each of the messages to come about ten times.
const MESSAGES: usize = 600;

/// Reads a message in both forms, which must be the same, and gives ours of both.
type Echo = fn(&str, &[u8]) -> (String, Vec<u8>);

fn echo<M>(json: &str, bytes: &[u8]) -> (String, Vec<u8>)
where
    M: Message + Name + Default + PartialEq + Debug + Serialize + DeserializeOwned,
{
    let by_json: M = serde_json::from_str(json).unwrap_or_else(|error| panic!("{error}: {json}"));
    let by_bytes = M::decode(bytes).unwrap_or_else(|error| panic!("{error}: {json}"));
    assert_eq!(by_json, by_bytes, "{json}");
    (serde_json::to_string(&by_json).unwrap(), by_bytes.encode_to_vec())
}

macro_rules! echoes {
    ($($message:ty),* $(,)?) => { [$((<$message>::full_name(), echo::<$message> as Echo)),*] };
}

fn echo_of(name: &str) -> Echo {
    let echoes = echoes![
        p::Pty,
        p::pty::Size,
        p::ProcessConfig,
        p::ProcessSelector,
        p::ProcessInfo,
        p::ListRequest,
        p::ListResponse,
        p::Rlimit,
        p::StartOptions,
        p::StartRequest,
        p::StartResponse,
        p::ConnectRequest,
        p::ConnectResponse,
        p::ProcessEvent,
        p::process_event::StartEvent,
        p::process_event::DataEvent,
        p::process_event::EndEvent,
        p::process_event::KeepAlive,
        p::UpdateRequest,
        p::UpdateResponse,
        p::ProcessInput,
        p::SendInputRequest,
        p::SendInputResponse,
        p::StreamInputRequest,
        p::stream_input_request::StartEvent,
        p::stream_input_request::DataEvent,
        p::stream_input_request::KeepAlive,
        p::StreamInputResponse,
        p::SendSignalRequest,
        p::SendSignalResponse,
        p::CloseStdinRequest,
        p::CloseStdinResponse,
        f::EntryInfo,
        f::StatRequest,
        f::StatResponse,
        f::MakeDirRequest,
        f::MakeDirResponse,
        f::MoveRequest,
        f::MoveResponse,
        f::ListDirRequest,
        f::ListDirResponse,
        f::RemoveRequest,
        f::RemoveResponse,
        f::FilesystemEvent,
        f::WatchDirRequest,
        f::WatchDirResponse,
        f::watch_dir_response::StartEvent,
        f::watch_dir_response::KeepAlive,
        f::CreateWatcherRequest,
        f::CreateWatcherResponse,
        f::GetWatcherEventsRequest,
        f::GetWatcherEventsResponse,
        f::RemoveWatcherRequest,
        f::RemoveWatcherResponse,
    ];
    let found = echoes.into_iter().find(|(known, _)| known == name);
    found.unwrap_or_else(|| panic!("{name} is in no line of this table")).1
}

#[test]
fn protobufs_own_json_and_ours_say_the_same() {
    let descriptors = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(descriptors.path(), envd_proto::DESCRIPTORS).unwrap();
    let script = || {
        let mut command = crate::python("protojson.py");
        command.arg(descriptors.path());
        command
    };

    let generated =
        script().args(["generate", &MESSAGES.to_string()]).stderr(Stdio::inherit()).output().unwrap();
    assert!(generated.status.success());
    let mut answers = String::new();
    let mut types = BTreeSet::new();
    for line in std::str::from_utf8(&generated.stdout).unwrap().lines() {
        let case: Value = serde_json::from_str(line).unwrap();
        let text = |name: &str| case[name].as_str().unwrap();
        let (json, bytes) = echo_of(text("type"))(text("json"), &from_hex(text("hex")));
        let answer =
            json!({ "type": text("type"), "json": json, "hex": to_hex(&bytes), "original": text("hex") });
        answers.push_str(&format!("{answer}\n"));
        types.insert(text("type").to_owned());
    }
    assert!(types.len() > 40, "{types:?}");

    let mut checking = script().arg("check").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    checking.stdin.take().unwrap().write_all(answers.as_bytes()).unwrap();
    let checked = checking.wait_with_output().unwrap();
    assert!(checked.status.success());
    assert_eq!(String::from_utf8_lossy(&checked.stdout).trim(), MESSAGES.to_string());
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}
