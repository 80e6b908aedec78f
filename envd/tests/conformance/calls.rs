//! One success and one error for each RPC.

use envd_proto::{filesystem, process};
use prost::{Message, Name};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::client::Agent;

/// How an RPC's messages travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Unary,
    ServerStream,
    ClientStream,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Codec {
    Json,
    Proto,
}

/// An RPC, with the types of its messages as functions between JSON and the wire.
pub(crate) struct Rpc {
    pub(crate) name: &'static str,
    pub(crate) shape: Shape,
    encode: fn(Codec, &Value) -> Vec<u8>,
    decode: fn(Codec, &[u8]) -> Value,
}

impl Rpc {
    const fn new<Q: Wire, S: Wire>(name: &'static str, shape: Shape) -> Self {
        Self { name, shape, encode: encode::<Q>, decode: decode::<S> }
    }

    pub(crate) fn path(&self) -> String {
        format!("/{}", self.name)
    }

    /// A request message in a codec; JSON is sent as it is written here.
    pub(crate) fn encode(&self, codec: Codec, request: &Value) -> Vec<u8> {
        (self.encode)(codec, request)
    }

    /// A response message in protobuf's JSON, whatever codec it came in.
    pub(crate) fn decode(&self, codec: Codec, message: &[u8]) -> Value {
        (self.decode)(codec, message)
    }
}

pub(crate) trait Wire: Message + Default + Serialize + DeserializeOwned + Name {}
impl<T: Message + Default + Serialize + DeserializeOwned + Name> Wire for T {}

fn encode<Q: Wire>(codec: Codec, request: &Value) -> Vec<u8> {
    match codec {
        Codec::Json => request.to_string().into_bytes(),
        Codec::Proto => serde_json::from_value::<Q>(request.clone()).unwrap().encode_to_vec(),
    }
}

fn decode<S: Wire>(codec: Codec, message: &[u8]) -> Value {
    match codec {
        Codec::Json => {
            let value = serde_json::from_slice(message).unwrap();
            // Nothing in it may be unknown to the contract.
            let known: S = serde_json::from_slice(message).unwrap();
            assert_eq!(serde_json::to_value(known).unwrap(), value);
            value
        }
        Codec::Proto => serde_json::to_value(S::decode(message).unwrap()).unwrap(),
    }
}

/// Every RPC, in the order in which [`calls`] can make them.
pub(crate) const RPCS: [Rpc; 17] = {
    use Shape::{ClientStream, ServerStream, Unary};
    use filesystem as f;
    use process as p;
    [
        Rpc::new::<p::StartRequest, p::StartResponse>("process.Process/Start", ServerStream),
        Rpc::new::<p::ConnectRequest, p::ConnectResponse>("process.Process/Connect", ServerStream),
        Rpc::new::<p::ListRequest, p::ListResponse>("process.Process/List", Unary),
        Rpc::new::<p::UpdateRequest, p::UpdateResponse>("process.Process/Update", Unary),
        Rpc::new::<p::StreamInputRequest, p::StreamInputResponse>(
            "process.Process/StreamInput",
            ClientStream,
        ),
        Rpc::new::<p::SendInputRequest, p::SendInputResponse>("process.Process/SendInput", Unary),
        Rpc::new::<p::CloseStdinRequest, p::CloseStdinResponse>("process.Process/CloseStdin", Unary),
        Rpc::new::<p::SendSignalRequest, p::SendSignalResponse>("process.Process/SendSignal", Unary),
        Rpc::new::<f::MakeDirRequest, f::MakeDirResponse>("filesystem.Filesystem/MakeDir", Unary),
        Rpc::new::<f::StatRequest, f::StatResponse>("filesystem.Filesystem/Stat", Unary),
        Rpc::new::<f::ListDirRequest, f::ListDirResponse>("filesystem.Filesystem/ListDir", Unary),
        Rpc::new::<f::MoveRequest, f::MoveResponse>("filesystem.Filesystem/Move", Unary),
        Rpc::new::<f::WatchDirRequest, f::WatchDirResponse>("filesystem.Filesystem/WatchDir", ServerStream),
        Rpc::new::<f::CreateWatcherRequest, f::CreateWatcherResponse>(
            "filesystem.Filesystem/CreateWatcher",
            Unary,
        ),
        Rpc::new::<f::GetWatcherEventsRequest, f::GetWatcherEventsResponse>(
            "filesystem.Filesystem/GetWatcherEvents",
            Unary,
        ),
        Rpc::new::<f::RemoveWatcherRequest, f::RemoveWatcherResponse>(
            "filesystem.Filesystem/RemoveWatcher",
            Unary,
        ),
        Rpc::new::<f::RemoveRequest, f::RemoveResponse>("filesystem.Filesystem/Remove", Unary),
    ]
};

/// What the calls of one round go on with.
#[derive(Debug, Default)]
pub(crate) struct Round {
    /// Names of this round are apart from those of others.
    pub(crate) name: String,
    /// The watcher that CreateWatcher made.
    pub(crate) watcher: String,
}

/// A call and what must come of it.
pub(crate) struct Call {
    pub(crate) request: Value,
    pub(crate) expected: Expected,
}

/// What must come of a call.
pub(crate) enum Expected {
    /// Messages of which each one of these is satisfied by one, in this order; the last one may end the client's interest.
    Messages(Vec<fn(&Value) -> bool>),
    /// An error with this code.
    Code(&'static str),
}

/// The successful call and the failing one of an RPC.
pub(crate) fn calls(rpc: &str, agent: &Agent, round: &Round) -> [Call; 2] {
    let good = |request: Value, checks: Vec<fn(&Value) -> bool>| Call {
        request,
        expected: Expected::Messages(checks),
    };
    let bad = |request: Value, code| Call { request, expected: Expected::Code(code) };
    let name = &round.name;
    let folder = agent.path(&format!("{name}/folder"));
    let moved = agent.path(&format!("{name}/moved"));
    let missing = agent.path("missing");
    let tag = |kind: &str| json!({ "tag": format!("{kind}-{name}") });
    let nobody = json!({ "tag": "nobody" });
    let empty: fn(&Value) -> bool = |answer| *answer == json!({});
    let entry: fn(&Value) -> bool = |answer| answer["entry"]["type"] == "FILE_TYPE_DIRECTORY";
    let started: fn(&Value) -> bool = |answer| answer["event"]["start"]["pid"].is_u64();
    let ended: fn(&Value) -> bool = |answer| answer["event"]["end"]["exited"] == true;
    match rpc.rsplit('/').next().unwrap() {
        "Start" => [
            good(
                json!({ "process": { "cmd": "/bin/echo", "args": ["-n", "hi"] }, "tag": format!("done-{name}") }),
                vec![started, |answer| answer["event"]["data"]["stdout"] == "aGk=", ended],
            ),
            bad(json!({ "process": { "cmd": "/no/such" } }), "invalid_argument"),
        ],
        "Connect" => [
            good(json!({ "process": tag("done") }), vec![started, ended]),
            bad(json!({ "process": nobody }), "not_found"),
        ],
        "List" => [
            good(json!({}), vec![|answer| answer["processes"][0]["config"]["cmd"] == "/bin/cat"]),
            bad(json!("no object"), "invalid_argument"),
        ],
        "Update" => [
            good(
                json!({ "process": tag("terminal"), "pty": { "size": { "cols": 100, "rows": 30 } } }),
                vec![empty],
            ),
            bad(json!({ "process": nobody, "pty": { "size": { "cols": 100, "rows": 30 } } }), "not_found"),
        ],
        "StreamInput" => [
            good(
                json!([
                    { "start": { "process": tag("cat") } },
                    { "data": { "input": { "stdin": "YQ==" } } },
                    { "keepalive": {} },
                    { "data": { "input": { "stdin": "Yg==" } } },
                ]),
                vec![empty],
            ),
            bad(json!([{ "start": { "process": nobody } }]), "not_found"),
        ],
        "SendInput" => [
            good(json!({ "process": tag("cat"), "input": { "stdin": "YQ==" } }), vec![empty]),
            bad(json!({ "process": nobody, "input": { "stdin": "YQ==" } }), "not_found"),
        ],
        "CloseStdin" => [
            good(json!({ "process": tag("cat") }), vec![empty]),
            bad(json!({ "process": nobody }), "not_found"),
        ],
        "SendSignal" => [
            good(json!({ "process": tag("terminated"), "signal": "SIGNAL_SIGTERM" }), vec![empty]),
            bad(json!({ "process": nobody, "signal": "SIGNAL_SIGKILL" }), "not_found"),
        ],
        "MakeDir" => {
            [good(json!({ "path": folder }), vec![entry]), bad(json!({ "path": folder }), "already_exists")]
        }
        "Stat" => {
            [good(json!({ "path": folder }), vec![entry]), bad(json!({ "path": missing }), "not_found")]
        }
        "ListDir" => [
            good(
                json!({ "path": agent.path(name), "depth": 1 }),
                vec![|answer| answer["entries"][0]["name"] == "folder"],
            ),
            bad(json!({ "path": missing }), "not_found"),
        ],
        "Move" => [
            good(json!({ "source": folder, "destination": moved }), vec![entry]),
            bad(json!({ "source": missing, "destination": moved }), "not_found"),
        ],
        "WatchDir" => [
            good(json!({ "path": moved }), vec![|answer| answer["start"] == json!({})]),
            bad(json!({ "path": missing }), "not_found"),
        ],
        "CreateWatcher" => [
            good(json!({ "path": moved }), vec![|answer| answer["watcherId"].is_string()]),
            bad(json!({ "path": missing }), "not_found"),
        ],
        "GetWatcherEvents" => [
            good(json!({ "watcherId": round.watcher }), vec![empty]),
            bad(json!({ "watcherId": "nobody" }), "not_found"),
        ],
        "RemoveWatcher" => [
            good(json!({ "watcherId": round.watcher }), vec![empty]),
            bad(json!({ "watcherId": "nobody" }), "not_found"),
        ],
        "Remove" => [
            good(json!({ "path": agent.path(name) }), vec![empty]),
            bad(json!({ "path": "~nobody" }), "invalid_argument"),
        ],
        other => panic!("no call of {other} is written down"),
    }
}
