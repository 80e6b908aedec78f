//! Every message that clients see, as exact JSON and exact bytes: what is stored or sent by one version is read by all.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

use envd_proto::{filesystem as f, process as p};
use prost::{Message, Name};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Fields from here on are our own additions: optional, and of no interest to the published clients.
const FIRST_OWN_FIELD: i32 = 1000;

/// Every message of the contract with its fields, by full name.
type Contract = BTreeMap<String, Vec<String>>;

#[derive(Default)]
struct Seen(BTreeMap<String, BTreeSet<String>>);

impl Seen {
    /// A populated message: its JSON and its bytes, each of which must give the other.
    fn golden<M>(&mut self, json: &str, hex: &str)
    where
        M: Message + Name + Default + PartialEq + Debug + Serialize + DeserializeOwned,
    {
        let name = M::full_name();
        let message: M = serde_json::from_str(json).unwrap_or_else(|error| panic!("{name}: {error}: {json}"));
        assert_eq!(serde_json::to_string(&message).unwrap(), json, "{name}");
        assert_eq!(to_hex(&message.encode_to_vec()), hex, "{name} {json}");
        assert_eq!(M::decode(&from_hex(hex)[..]).unwrap(), message, "{name}");

        // What a newer client sends as well is ignored, in both encodings.
        let object: serde_json::Value = serde_json::from_str(json).unwrap();
        let mut newer = object.clone();
        newer["novelField"] = serde_json::json!({ "deeply": [{ "nested": null }] });
        assert_eq!(serde_json::from_value::<M>(newer).unwrap(), message, "{name} with an unknown field");
        // Field 900, a string.
        let newer = [&from_hex(hex)[..], b"\xa2\x38\x03new"].concat();
        assert_eq!(M::decode(&newer[..]).unwrap(), message, "{name} with an unknown field");

        self.empty::<M>();
        let fields = self.0.entry(name).or_default();
        fields.extend(object.as_object().unwrap().keys().cloned());
    }

    /// The empty message: every default is left out when it is written and may be left out when it is read.
    fn empty<M>(&mut self)
    where
        M: Message + Name + Default + PartialEq + Debug + Serialize + DeserializeOwned,
    {
        let name = M::full_name();
        assert_eq!(serde_json::from_str::<M>("{}").unwrap(), M::default(), "{name}");
        assert_eq!(serde_json::to_string(&M::default()).unwrap(), "{}", "{name}");
        assert_eq!(M::default().encode_to_vec(), b"", "{name}");
        self.0.entry(name).or_default();
    }
}

#[test]
fn every_message_has_one_json_and_one_binary_form() {
    let mut seen = Seen::default();
    process_messages(&mut seen);
    filesystem_messages(&mut seen);
    for (name, fields) in contract() {
        let found = seen.0.get(&name).unwrap_or_else(|| panic!("no golden form of {name}"));
        let missing: Vec<_> = fields.iter().filter(|field| !found.contains(*field)).collect();
        assert!(missing.is_empty(), "no golden form of {name} has its fields {missing:?}");
    }
}

fn process_messages(seen: &mut Seen) {
    seen.golden::<p::pty::Size>(r#"{"cols":80,"rows":24}"#, "08501018");
    seen.golden::<p::Pty>(r#"{"size":{"cols":80,"rows":24}}"#, "0a0408501018");
    seen.golden::<p::Rlimit>(r#"{"resource":"nofile","soft":"8","hard":"16"}"#, "0a066e6f66696c6510081810");
    seen.golden::<p::StartOptions>(
        r#"{"logBytes":4096,"outputPolicy":"OUTPUT_POLICY_BLOCK","keepEndedSeconds":60,"rlimits":[{"resource":"core"}],"nice":5,"oomScoreAdj":100,"ownCgroup":true}"#,
        "0880201002183c22060a04636f7265280530643801",
    );
    seen.golden::<p::ProcessConfig>(
        r#"{"cmd":"/bin/sh","args":["-c",""],"envs":{"A":"1"},"cwd":"/tmp"}"#,
        "0a072f62696e2f736812022d6312001a060a014112013122042f746d70",
    );
    seen.golden::<p::ProcessSelector>(r#"{"pid":7}"#, "0807");
    seen.golden::<p::ProcessSelector>(r#"{"tag":"t"}"#, "120174");
    seen.golden::<p::ProcessInfo>(
        r#"{"config":{"cmd":"ls"},"pid":4294967295,"tag":""}"#,
        "0a040a026c7310ffffffff0f1a00",
    );
    seen.empty::<p::ListRequest>();
    seen.golden::<p::ListResponse>(r#"{"processes":[{"pid":1},{}]}"#, "0a0210010a00");
    seen.golden::<p::StartRequest>(
        r#"{"process":{"cmd":"ls"},"pty":{},"tag":"t","stdin":false}"#,
        "0a040a026c7312001a01742000",
    );
    seen.golden::<p::StartResponse>(r#"{"event":{"start":{"pid":7}}}"#, "0a040a020807");
    seen.golden::<p::ConnectRequest>(r#"{"process":{"pid":7}}"#, "0a020807");
    seen.golden::<p::ConnectResponse>(r#"{"event":{"keepalive":{}}}"#, "0a022200");
    seen.golden::<p::process_event::StartEvent>(r#"{"pid":7}"#, "0807");
    seen.golden::<p::process_event::DataEvent>(r#"{"stdout":"/wA="}"#, "0a02ff00");
    seen.golden::<p::process_event::DataEvent>(r#"{"stderr":"+/8="}"#, "1202fbff");
    seen.golden::<p::process_event::DataEvent>(r#"{"pty":""}"#, "1a00");
    seen.golden::<p::process_event::EndEvent>(
        r#"{"exitCode":-1,"exited":true,"status":"signal: killed","error":"signal: killed"}"#,
        "080110011a0e7369676e616c3a206b696c6c6564220e7369676e616c3a206b696c6c6564",
    );
    seen.empty::<p::process_event::KeepAlive>();
    seen.golden::<p::ProcessEvent>(r#"{"start":{"pid":7}}"#, "0a020807");
    seen.golden::<p::ProcessEvent>(r#"{"data":{"stdout":"aGk="}}"#, "12040a026869");
    seen.golden::<p::ProcessEvent>(r#"{"end":{"exited":true}}"#, "1a021001");
    seen.golden::<p::ProcessEvent>(r#"{"keepalive":{}}"#, "2200");
    seen.golden::<p::UpdateRequest>(
        r#"{"process":{"pid":7},"pty":{"size":{"cols":1}}}"#,
        "0a02080712040a020801",
    );
    seen.empty::<p::UpdateResponse>();
    seen.golden::<p::ProcessInput>(r#"{"stdin":"aGk="}"#, "0a026869");
    seen.golden::<p::ProcessInput>(r#"{"pty":"Aw=="}"#, "120103");
    seen.golden::<p::SendInputRequest>(
        r#"{"process":{"tag":"t"},"input":{"stdin":""}}"#,
        "0a0312017412020a00",
    );
    seen.empty::<p::SendInputResponse>();
    seen.golden::<p::stream_input_request::StartEvent>(r#"{"process":{"pid":7}}"#, "0a020807");
    seen.golden::<p::stream_input_request::DataEvent>(r#"{"input":{"pty":"Aw=="}}"#, "1203120103");
    seen.empty::<p::stream_input_request::KeepAlive>();
    seen.golden::<p::StreamInputRequest>(r#"{"start":{"process":{"pid":7}}}"#, "0a040a020807");
    seen.golden::<p::StreamInputRequest>(r#"{"data":{"input":{"stdin":"aGk="}}}"#, "120612040a026869");
    seen.golden::<p::StreamInputRequest>(r#"{"keepalive":{}}"#, "1a00");
    seen.empty::<p::StreamInputResponse>();
    seen.golden::<p::SendSignalRequest>(r#"{"process":{"pid":7},"signal":"SIGNAL_SIGKILL"}"#, "0a0208071009");
    seen.empty::<p::SendSignalResponse>();
    seen.golden::<p::CloseStdinRequest>(r#"{"process":{"pid":7}}"#, "0a020807");
    seen.empty::<p::CloseStdinResponse>();
}

fn filesystem_messages(seen: &mut Seen) {
    seen.golden::<f::EntryInfo>(
        concat!(
            r#"{"name":"a","type":"FILE_TYPE_SYMLINK","path":"/a","size":"-9223372036854775808","mode":511,"#,
            r#""permissions":"Lrwxrwxrwx","owner":"o","group":"g","modifiedTime":"2026-01-02T03:04:05.000000006+00:00","#,
            r#""symlinkTarget":"/b","metadata":{"k":"v"}}"#
        ),
        concat!(
            "0a016110031a022f612080808080808080808001",
            "28ff03320a4c7277787277787277783a016f4201674a0808a5ebdcca061006",
            "52022f625a060a016b120176",
        ),
    );
    seen.golden::<f::StatRequest>(r#"{"path":"/a"}"#, "0a022f61");
    seen.golden::<f::StatResponse>(r#"{"entry":{"size":"3"}}"#, "0a022003");
    seen.golden::<f::MakeDirRequest>(r#"{"path":"/a"}"#, "0a022f61");
    seen.golden::<f::MakeDirResponse>(r#"{"entry":{"type":"FILE_TYPE_DIRECTORY"}}"#, "0a021002");
    seen.golden::<f::MoveRequest>(r#"{"source":"/a","destination":"/b"}"#, "0a022f6112022f62");
    seen.golden::<f::MoveResponse>(r#"{"entry":{}}"#, "0a00");
    seen.golden::<f::ListDirRequest>(r#"{"path":"/a","depth":2}"#, "0a022f611002");
    seen.golden::<f::ListDirResponse>(r#"{"entries":[{"name":"a"},{"name":"ü"}]}"#, "0a030a01610a040a02c3bc");
    seen.golden::<f::RemoveRequest>(r#"{"path":"/a"}"#, "0a022f61");
    seen.empty::<f::RemoveResponse>();
    seen.golden::<f::FilesystemEvent>(
        r#"{"name":"a/b","type":"EVENT_TYPE_CREATE","entry":{"name":"b"}}"#,
        "0a03612f6210011a030a0162",
    );
    seen.golden::<f::WatchDirRequest>(
        r#"{"path":"/a","recursive":true,"includeEntry":true,"allowNetworkMounts":true}"#,
        "0a022f61100118012001",
    );
    seen.empty::<f::watch_dir_response::StartEvent>();
    seen.empty::<f::watch_dir_response::KeepAlive>();
    seen.golden::<f::WatchDirResponse>(r#"{"start":{}}"#, "0a00");
    seen.golden::<f::WatchDirResponse>(r#"{"filesystem":{"type":"EVENT_TYPE_CHMOD"}}"#, "12021005");
    seen.golden::<f::WatchDirResponse>(r#"{"keepalive":{}}"#, "1a00");
    seen.golden::<f::CreateWatcherRequest>(
        r#"{"path":"/a","recursive":true,"includeEntry":true,"allowNetworkMounts":true}"#,
        "0a022f61100118012001",
    );
    seen.golden::<f::CreateWatcherResponse>(r#"{"watcherId":"w"}"#, "0a0177");
    seen.golden::<f::GetWatcherEventsRequest>(r#"{"watcherId":"w"}"#, "0a0177");
    seen.golden::<f::GetWatcherEventsResponse>(
        r#"{"events":[{"name":"a","type":"EVENT_TYPE_RENAME"},{"type":"EVENT_TYPE_REMOVE"}]}"#,
        "0a050a016110040a021003",
    );
    seen.golden::<f::RemoveWatcherRequest>(r#"{"watcherId":"w"}"#, "0a0177");
    seen.empty::<f::RemoveWatcherResponse>();
}

/// Reads what a client may also write, and gives what we write for it.
fn canonical<M: Serialize + DeserializeOwned>(json: &str) -> String {
    let message: M = serde_json::from_str(json).unwrap_or_else(|error| panic!("{error}: {json}"));
    serde_json::to_string(&message).unwrap()
}

#[test]
fn other_ways_to_write_a_value_are_read() {
    // Enums by name and by number.
    let signal = canonical::<p::SendSignalRequest>;
    assert_eq!(signal(r#"{"signal":15}"#), r#"{"signal":"SIGNAL_SIGTERM"}"#);
    assert_eq!(signal(r#"{"signal":"SIGNAL_SIGTERM"}"#), r#"{"signal":"SIGNAL_SIGTERM"}"#);
    assert_eq!(signal(r#"{"signal":0}"#), "{}");
    let entry = canonical::<f::EntryInfo>;
    assert_eq!(entry(r#"{"type":2}"#), r#"{"type":"FILE_TYPE_DIRECTORY"}"#);
    assert_eq!(canonical::<f::FilesystemEvent>(r#"{"type":5}"#), r#"{"type":"EVENT_TYPE_CHMOD"}"#);

    // Bytes in either alphabet of base64, with and without padding.
    let input = canonical::<p::ProcessInput>;
    for text in ["+/8=", "-_8=", "+/8", "-_8"] {
        assert_eq!(input(&format!(r#"{{"stdin":"{text}"}}"#)), r#"{"stdin":"+/8="}"#, "{text}");
    }

    // 64-bit integers as text and as numbers, 32-bit ones too.
    for size in ["3", "\"3\""] {
        assert_eq!(entry(&format!(r#"{{"size":{size}}}"#)), r#"{"size":"3"}"#, "{size}");
    }
    let selector = canonical::<p::ProcessSelector>;
    for pid in ["7", "\"7\""] {
        assert_eq!(selector(&format!(r#"{{"pid":{pid}}}"#)), r#"{"pid":7}"#, "{pid}");
    }

    // Names as in the .proto file, and null for what is absent.
    assert_eq!(canonical::<f::WatchDirRequest>(r#"{"include_entry":true}"#), r#"{"includeEntry":true}"#);
    assert_eq!(canonical::<p::StartRequest>(r#"{"process":null,"pty":null,"tag":null,"stdin":null}"#), "{}");
    assert_eq!(
        entry(r#"{"modified_time":"1970-01-01T01:00:00+01:00"}"#),
        r#"{"modifiedTime":"1970-01-01T00:00:00+00:00"}"#
    );
}

#[test]
fn what_is_no_value_is_an_error_and_not_a_guess() {
    let refused = |json: &str| serde_json::from_str::<p::StartRequest>(json).is_err();
    for json in [
        "[]",
        "null",
        "{",
        r#"{"stdin":"yes"}"#,
        r#"{"process":{"cmd":7}}"#,
        r#"{"process":{"args":"ls"}}"#,
        r#"{"process":{"envs":{"A":1}}}"#,
        r#"{"pty":{"size":{"cols":-1}}}"#,
        r#"{"pty":{"size":{"cols":4294967296}}}"#,
        r#"{"tag":"a","tag":"b"}"#,
    ] {
        assert!(refused(json), "{json}");
    }
    assert!(serde_json::from_str::<p::ProcessSelector>(r#"{"pid":1,"tag":"both"}"#).is_err());
    assert!(serde_json::from_str::<p::ProcessInput>(r#"{"stdin":"???"}"#).is_err());
    assert!(serde_json::from_str::<p::SendSignalRequest>(r#"{"signal":"SIGNAL_NO_SUCH"}"#).is_err());
}

fn contract() -> Contract {
    #[derive(Clone, PartialEq, Message)]
    struct Set {
        #[prost(message, repeated, tag = "1")]
        files: Vec<File>,
    }
    #[derive(Clone, PartialEq, Message)]
    struct File {
        #[prost(string, tag = "2")]
        package: String,
        #[prost(message, repeated, tag = "4")]
        messages: Vec<Type>,
    }
    #[derive(Clone, PartialEq, Message)]
    struct Type {
        #[prost(string, tag = "1")]
        name: String,
        #[prost(message, repeated, tag = "2")]
        fields: Vec<Field>,
        #[prost(message, repeated, tag = "3")]
        nested: Vec<Type>,
        #[prost(message, optional, tag = "7")]
        options: Option<Options>,
    }
    #[derive(Clone, PartialEq, Message)]
    struct Field {
        #[prost(int32, tag = "3")]
        number: i32,
        #[prost(string, tag = "10")]
        json_name: String,
    }
    #[derive(Clone, Copy, PartialEq, Message)]
    struct Options {
        #[prost(bool, tag = "7")]
        map_entry: bool,
    }
    fn add(prefix: &str, message: &Type, out: &mut Contract) {
        // The entries of a map are no messages of their own in JSON.
        if message.options.is_some_and(|options| options.map_entry) {
            return;
        }
        let name = format!("{prefix}.{}", message.name);
        let known = message.fields.iter().filter(|field| field.number < FIRST_OWN_FIELD);
        out.insert(name.clone(), known.map(|field| field.json_name.clone()).collect());
        for nested in &message.nested {
            add(&name, nested, out);
        }
    }
    let set = Set::decode(envd_proto::DESCRIPTORS).unwrap();
    let mut out = Contract::new();
    for file in set.files.iter().filter(|file| matches!(file.package.as_str(), "process" | "filesystem")) {
        for message in &file.messages {
            add(&file.package, message, &mut out);
        }
    }
    assert!(out.len() > 30, "{out:?}");
    out
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}
