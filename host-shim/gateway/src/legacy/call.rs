//! The protocol's methods, as types.

use std::collections::HashMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::value::RawValue;

use super::rpc::{Arguments, RpcError};

/// The longest id of a process or terminal; the SDKs make ones of 12.
const MAX_ID: usize = 128;

/// What runs under an id of the client's: its namespace in method names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    /// A command, line by line.
    Process,
    /// A command on a terminal.
    Terminal,
}

impl Kind {
    /// What methods and notifications begin with.
    pub(super) fn namespace(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Terminal => "terminal",
        }
    }
}

/// Names a process or terminal before it is started.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// Which of the two.
    pub kind: Kind,
    /// The client's name for it.
    pub id: String,
}

/// What a subscriber wants to hear of a process or terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Topic {
    /// Lines of a process's standard output.
    Stdout,
    /// Lines of a process's standard error.
    Stderr,
    /// What a terminal shows.
    Data,
    /// The end.
    Exit,
}

/// What to start.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Start {
    /// Its name.
    pub key: Key,
    /// For the shell; a terminal without one is interactive.
    pub command: Option<String>,
    /// Added to the environment.
    pub env: HashMap<String, String>,
    /// Where; empty is the home.
    pub cwd: String,
    /// Columns and rows of a terminal.
    pub size: (u32, u32),
}

/// A call.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Call {
    /// To a process or terminal, started or not.
    Subscribe(Key, Topic),
    /// To the changes in a directory.
    WatchDir(String),
    /// To the ports that processes listen on.
    ScanPorts,
    /// Ends a subscription, by its id.
    Unsubscribe(String),
    /// Starts a process or terminal.
    Start(Start),
    /// Bytes for its input.
    Input(Key, String),
    /// Columns and rows.
    Resize(Key, u32, u32),
    /// Kills it.
    Kill(Key),
    /// The entries of a directory.
    List(String),
    /// A file's contents as text, or in base64.
    Read(String, Form),
    /// New contents of a file.
    Write(String, Vec<u8>),
    /// Removes a file or directory.
    Remove(String),
    /// Makes a directory and its parents.
    MakeDir(String),
}

/// How a file's contents go into a JSON string.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// As UTF-8; what is none is replaced.
    Text,
    /// In base64.
    Base64,
}

impl Call {
    /// Reads a call.
    pub(super) fn parse(method: &str, params: Option<&RawValue>) -> Result<Self, RpcError> {
        let arguments = |most| Arguments::parse(params, most);
        match method.split_once('_') {
            Some((namespace, "subscribe")) => subscribe(namespace, params),
            Some((_, "unsubscribe")) => Ok(Self::Unsubscribe(arguments(1)?.required(0)?)),
            Some(("process", verb)) => {
                process(verb, params).unwrap_or_else(|| Err(RpcError::no_method(method)))
            }
            Some(("terminal", verb)) => {
                terminal(verb, params).unwrap_or_else(|| Err(RpcError::no_method(method)))
            }
            Some(("filesystem", verb)) => {
                filesystem(verb, params).unwrap_or_else(|| Err(RpcError::no_method(method)))
            }
            _ => Err(RpcError::no_method(method)),
        }
    }
}

fn subscribe(namespace: &str, params: Option<&RawValue>) -> Result<Call, RpcError> {
    let arguments = Arguments::parse(params, 2)?;
    let topic: String = arguments
        .required(0)
        .map_err(|_| RpcError::invalid_params("expected subscription name as first argument"))?;
    let to = |kind, topic| Ok(Call::Subscribe(key(kind, &arguments, 1)?, topic));
    match (namespace, topic.as_str()) {
        ("process", "onStdout") => to(Kind::Process, Topic::Stdout),
        ("process", "onStderr") => to(Kind::Process, Topic::Stderr),
        ("process", "onExit") => to(Kind::Process, Topic::Exit),
        ("terminal", "onData") => to(Kind::Terminal, Topic::Data),
        ("terminal", "onExit") => to(Kind::Terminal, Topic::Exit),
        ("filesystem", "watchDir") => Ok(Call::WatchDir(arguments.required(1)?)),
        ("codeSnippet", "scanOpenedPorts") => Ok(Call::ScanPorts),
        _ => Err(RpcError::no_subscription(&topic, namespace)),
    }
}

fn process(verb: &str, params: Option<&RawValue>) -> Option<Result<Call, RpcError>> {
    let call = || -> Result<Option<Call>, RpcError> {
        let arguments = Arguments::parse(params, 4)?;
        let key = || key(Kind::Process, &arguments, 0);
        Ok(Some(match verb {
            "start" => Call::Start(Start {
                key: key()?,
                command: Some(arguments.required(1)?),
                env: arguments.optional(2)?.unwrap_or_default(),
                cwd: arguments.optional(3)?.unwrap_or_default(),
                size: (0, 0),
            }),
            "stdin" => Call::Input(key()?, arguments.required(1)?),
            "kill" => Call::Kill(key()?),
            _ => return Ok(None),
        }))
    };
    call().transpose()
}

fn terminal(verb: &str, params: Option<&RawValue>) -> Option<Result<Call, RpcError>> {
    let call = || -> Result<Option<Call>, RpcError> {
        let arguments = Arguments::parse(params, 6)?;
        let key = || key(Kind::Terminal, &arguments, 0);
        Ok(Some(match verb {
            "start" => Call::Start(Start {
                key: key()?,
                command: arguments.optional(4)?.filter(|command: &String| !command.is_empty()),
                env: arguments.optional(3)?.unwrap_or_default(),
                cwd: arguments.optional(5)?.unwrap_or_default(),
                size: (arguments.required(1)?, arguments.required(2)?),
            }),
            "data" => Call::Input(key()?, arguments.required(1)?),
            "resize" => Call::Resize(key()?, arguments.required(1)?, arguments.required(2)?),
            "destroy" => Call::Kill(key()?),
            _ => return Ok(None),
        }))
    };
    call().transpose()
}

fn filesystem(verb: &str, params: Option<&RawValue>) -> Option<Result<Call, RpcError>> {
    let call = || -> Result<Option<Call>, RpcError> {
        let arguments = Arguments::parse(params, 2)?;
        let path = || arguments.required::<String>(0);
        Ok(Some(match verb {
            "list" => Call::List(path()?),
            "read" => Call::Read(path()?, Form::Text),
            "readBase64" => Call::Read(path()?, Form::Base64),
            "write" => Call::Write(path()?, arguments.required::<String>(1)?.into_bytes()),
            "writeBase64" => {
                let contents = BASE64
                    .decode(arguments.required::<String>(1)?)
                    .map_err(|error| RpcError::invalid_params(format!("invalid argument 1: {error}")))?;
                Call::Write(path()?, contents)
            }
            "remove" => Call::Remove(path()?),
            "makeDir" => Call::MakeDir(path()?),
            _ => return Ok(None),
        }))
    };
    call().transpose()
}

fn key(kind: Kind, arguments: &Arguments<'_>, index: usize) -> Result<Key, RpcError> {
    let id: String = arguments.required(index)?;
    if id.is_empty() || id.len() > MAX_ID {
        let message =
            format!("invalid argument {index}: an id of {} bytes, expected 1 to {MAX_ID}", id.len());
        return Err(RpcError::invalid_params(message));
    }
    Ok(Key { kind, id })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(method: &str, params: &str) -> Result<Call, RpcError> {
        let params: Option<Box<RawValue>> =
            (!params.is_empty()).then(|| serde_json::from_str(params).unwrap());
        Call::parse(method, params.as_deref())
    }

    fn process(id: &str) -> Key {
        Key { kind: Kind::Process, id: id.into() }
    }

    fn terminal(id: &str) -> Key {
        Key { kind: Kind::Terminal, id: id.into() }
    }

    #[test]
    fn the_calls_of_the_published_client_are_understood() {
        let command = |key: Key, command: Option<&str>, cwd: &str, size| {
            Call::Start(Start {
                key,
                command: command.map(Into::into),
                env: HashMap::new(),
                cwd: cwd.into(),
                size,
            })
        };
        for (method, params, expected) in [
            ("process_subscribe", r#"["onExit","p"]"#, Call::Subscribe(process("p"), Topic::Exit)),
            ("process_subscribe", r#"["onStdout","p"]"#, Call::Subscribe(process("p"), Topic::Stdout)),
            ("process_subscribe", r#"["onStderr","p"]"#, Call::Subscribe(process("p"), Topic::Stderr)),
            ("process_unsubscribe", r#"["0x1"]"#, Call::Unsubscribe("0x1".into())),
            ("process_start", r#"["p","ls",{},"/tmp"]"#, command(process("p"), Some("ls"), "/tmp", (0, 0))),
            ("process_start", r#"["p","ls",null]"#, command(process("p"), Some("ls"), "", (0, 0))),
            ("process_stdin", r#"["p","x\n"]"#, Call::Input(process("p"), "x\n".into())),
            ("process_kill", r#"["p"]"#, Call::Kill(process("p"))),
            ("terminal_subscribe", r#"["onData","t"]"#, Call::Subscribe(terminal("t"), Topic::Data)),
            ("terminal_start", r#"["t",80,24]"#, command(terminal("t"), None, "", (80, 24))),
            (
                "terminal_start",
                r#"["t",80,24,{},"ls","/"]"#,
                command(terminal("t"), Some("ls"), "/", (80, 24)),
            ),
            ("terminal_data", r#"["t","ls\r"]"#, Call::Input(terminal("t"), "ls\r".into())),
            ("terminal_resize", r#"["t",1,2]"#, Call::Resize(terminal("t"), 1, 2)),
            ("terminal_destroy", r#"["t"]"#, Call::Kill(terminal("t"))),
            ("filesystem_list", r#"["/"]"#, Call::List("/".into())),
            ("filesystem_read", r#"["/a"]"#, Call::Read("/a".into(), Form::Text)),
            ("filesystem_readBase64", r#"["/a"]"#, Call::Read("/a".into(), Form::Base64)),
            ("filesystem_write", r#"["/a","é"]"#, Call::Write("/a".into(), "é".into())),
            ("filesystem_writeBase64", r#"["/a","/wA="]"#, Call::Write("/a".into(), vec![0xff, 0])),
            ("filesystem_remove", r#"["/a"]"#, Call::Remove("/a".into())),
            ("filesystem_makeDir", r#"["/a"]"#, Call::MakeDir("/a".into())),
            ("filesystem_subscribe", r#"["watchDir","/a"]"#, Call::WatchDir("/a".into())),
            ("codeSnippet_subscribe", r#"["scanOpenedPorts"]"#, Call::ScanPorts),
        ] {
            assert_eq!(parse(method, params).unwrap(), expected, "{method}{params}");
        }
    }

    #[test]
    fn what_is_no_call_is_told_why() {
        for (method, params, code, message) in [
            ("nope", "", -32601, "the method nope does not exist/is not available"),
            ("process_nope", "[]", -32601, "the method process_nope does not exist/is not available"),
            ("rpc_modules", "[]", -32601, "the method rpc_modules does not exist/is not available"),
            (
                "process_subscribe",
                r#"["onData","p"]"#,
                -32601,
                "no \"onData\" subscription in process namespace",
            ),
            ("process_subscribe", "[]", -32602, "expected subscription name as first argument"),
            ("process_subscribe", r#"["onExit"]"#, -32602, "missing value for required argument 1"),
            (
                "process_subscribe",
                r#"["onExit",""]"#,
                -32602,
                "invalid argument 1: an id of 0 bytes, expected 1 to 128",
            ),
            ("process_start", r#"{"id":"p"}"#, -32602, "non-array args"),
            ("process_start", r#"["p"]"#, -32602, "missing value for required argument 1"),
            ("process_start", r#"["p","a",{},"",1]"#, -32602, "too many arguments, want at most 4"),
            ("filesystem_writeBase64", r#"["/a","?"]"#, -32602, "invalid argument 1: "),
            ("terminal_start", r#"["t",-1,24]"#, -32602, "invalid argument 1: "),
        ] {
            let error = parse(method, params).unwrap_err();
            assert_eq!(error.code, code, "{method}{params}: {error}");
            assert!(error.message.starts_with(message), "{method}{params}: {error}");
        }
    }
}
