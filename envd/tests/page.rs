//! The page for people with an orchestrator of their own (README.md) says what is so. Its commands run in the end-to-end
//! tests; here are its tables and messages.

use std::process::Command;

use envd_channel::line;
use envd_proto::control::{FromAgent, FromHost, from_agent, from_host};
use serde_json::Value;

const PAGE: &str = include_str!("../README.md");

/// The lines of all code blocks of this kind.
fn lines(kind: &str) -> Vec<&'static str> {
    let opening = format!("```{kind}\n");
    let blocks = PAGE.split(&opening).skip(1).map(|rest| rest.split_once("```").expect("a closed block").0);
    blocks.flat_map(str::lines).collect()
}

/// As JSON, with 64-bit numbers as the strings that protobuf's mapping makes of them.
fn value(line: &[u8]) -> Value {
    serde_json::from_slice(line).unwrap()
}

#[test]
fn its_messages_are_what_this_agent_reads_and_writes() {
    let from_host = lines("json host");
    for shown in &from_host {
        let (generation, message) = line::decode::<FromHost>(shown.as_bytes()).unwrap();
        assert!(message.request.is_some(), "{shown}");
        // Nothing of it was ignored.
        assert_eq!(value(&line::encode(generation, &message).unwrap()), value(shown.as_bytes()));
        if let Some(from_host::Request::Resume(resume)) = message.request {
            assert_eq!((resume.generation, resume.seed.len()), (generation, 32));
        }
    }
    let from_agent = lines("json agent");
    for shown in &from_agent {
        let (generation, message) = line::decode::<FromAgent>(shown.as_bytes()).unwrap();
        assert_eq!(value(&line::encode(generation, &message).unwrap()), value(shown.as_bytes()));
        if let Some(from_agent::Message::Hello(hello)) = message.message {
            assert_eq!(hello.protocol_version, envd_proto::PROTOCOL_VERSION);
            assert_eq!(hello.oldest_protocol_version, envd_proto::OLDEST_PROTOCOL_VERSION);
            assert_eq!(hello.agent_version, env!("CARGO_PKG_VERSION"));
        }
    }
    let kinds = ["configure", "freeze", "resume", "rehearse", "thaw", "stats", "shutdown"];
    for kind in kinds {
        assert!(from_host.iter().any(|line| line.contains(&format!("\"{kind}\":{{"))), "{kind}");
    }
}

/// The names and values of the `pub const` lines of a source file that begin with `prefix`.
fn constants<'a>(source: &'a str, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
    source.lines().filter_map(move |line| {
        let rest = line.strip_prefix("pub const ")?;
        let (name, value) = rest.split_once(": ")?;
        name.starts_with(prefix).then(|| (name, value.split_once("= ").map_or("", |(_, value)| value)))
    })
}

#[test]
fn every_kernel_argument_is_on_it_and_in_the_help() {
    let help = Command::new(env!("CARGO_BIN_EXE_envd")).arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let mut count = 0;
    for (name, value) in constants(include_str!("../proto/src/boot.rs"), "ARG_") {
        let argument = value.trim_end_matches(';').trim_matches('"');
        assert!(argument.starts_with("envd."), "{name}: {argument} is not namespaced");
        assert!(PAGE.contains(&format!("| `{argument}=")), "{argument} is not in the page's table");
        assert!(help.contains(&format!("  {argument}=")), "{argument} is not in the help");
        count += 1;
    }
    assert!(count >= 5, "the constants were found");
    for option in ["--listen", "--listen-ports", "--control", "--no-container", "--container", "--profile"] {
        assert!(help.contains(&format!("  {option} ")) && PAGE.contains(option), "{option}");
    }
}

#[test]
fn every_limit_of_the_wire_is_on_it() {
    let mut count = 0;
    for (name, _) in constants(include_str!("../proto/src/limits.rs"), "MAX_") {
        assert!(PAGE.contains(&format!("`{name}`")), "{name}");
        count += 1;
    }
    assert!(count >= 5, "the constants were found");
    use envd_proto::limits::*;
    let row = |name: &str| PAGE.lines().find(|line| line.starts_with(&format!("| `{name}`"))).unwrap();
    for (name, value, shown) in [
        ("MAX_CONTROL_MESSAGE", MAX_CONTROL_MESSAGE, 256 << 10),
        ("MAX_CONTROL_LINE", MAX_CONTROL_LINE, 1 << 20),
        ("MAX_CONNECT_MESSAGE", MAX_CONNECT_MESSAGE, 4 << 20),
        ("MAX_OUTPUT_CHUNK", MAX_OUTPUT_CHUNK, 32 << 10),
        ("MAX_MUX_STREAMS", MAX_MUX_STREAMS, 512),
        ("MAX_MUX_BUFFER", MAX_MUX_BUFFER, 128 << 20),
        ("MAX_LOG_LINE", MAX_LOG_LINE, 768),
    ] {
        assert_eq!(value, shown, "{name} changed: change the page too");
        let number = match shown {
            _ if shown >= 1 << 20 => format!("{} MiB", shown >> 20),
            _ if shown >= 1 << 10 => format!("{} KiB", shown >> 10),
            _ => shown.to_string(),
        };
        assert!(row(name).contains(&number), "{name}: {number}");
    }
}

#[test]
fn the_client_is_as_short_as_promised() {
    let client = include_str!("../examples/client.py");
    assert!(client.lines().count() <= 60);
    assert!(client.lines().all(|line| line.chars().count() <= 120));
    for import in ["base64", "http.client", "json", "os", "socket", "sys", "threading", "time"] {
        assert!(client.contains(import), "standard library only: {import}");
    }
}
