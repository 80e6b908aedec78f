//! Tries a sandbox's network without a virtual machine: a guest that is a network namespace, and calls on standard input.
//!
//! ```text
//! {"connect":"203.0.113.1:7"}\n ──► guest's namespace: eth0 ═ frames ═ TAP ── the sandbox's network      {"ok":0}\n ──►
//! ```
//!
//! The tests drive it, as root and as an ordinary user.

mod frame;
mod guest;

use std::ffi::OsString;
use std::io::{BufRead, Write};
use std::process::{Command, ExitCode};

use sandbox_network::{Network, Rules, Uplink, helper};
use serde::Deserialize;
use serde_json::{Value, json};

use frame::Packet;
use guest::Guest;

/// What leads to the helper.
const HELPER: &str = "network-helper";

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Call {
    /// Opens a TCP connection, whose number is the answer.
    Connect(String),
    /// Sends a line by a connection and waits for one.
    Ask(usize, String),
    /// Waits for one without sending.
    Hear(usize),
    /// Asks by UDP.
    AskUdp(String, String),
    /// Sends a number of bytes by a new connection and waits for its end; the answer is in milliseconds.
    Upload(String, usize),
    /// Asks for a number of bytes by a new connection.
    Download(String, usize),
    /// Sends a packet past the guest's kernel.
    Send(Packet),
    /// Sends one to each of so many ports, from that of the packet upwards.
    Flood(Packet, u16),
    /// Takes another address.
    Address(String),
    /// Changes the rules.
    Change(Rules),
    /// Reports.
    Report,
    /// Ends the network, and goes on.
    End,
}

fn again() -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg(HELPER);
    command
}

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    match arguments.first().and_then(|word| word.to_str()) {
        Some(HELPER) => helper::main(arguments.get(1..).unwrap_or_default(), again()),
        Some("tap") => drive(Uplink::Veth),
        Some("user") => drive(Uplink::Pasta),
        _ => {
            eprintln!("expected tap or user");
            ExitCode::from(2)
        }
    }
}

fn drive(uplink: Uplink) -> ExitCode {
    let mut lines = std::io::stdin().lock().lines();
    let mut next = || lines.next().and_then(Result::ok);
    let Some(rules) = next().and_then(|line| serde_json::from_str(&line).ok()) else {
        eprintln!("expected the rules");
        return ExitCode::from(2);
    };
    // Before there are threads: an ordinary user needs a user namespace for the guest, too.
    let made = Network::start(again(), uplink, &rules).map_err(|error| error.to_string());
    let made = made.and_then(|(network, tap)| {
        Guest::new(tap).map(|guest| (network, guest)).map_err(|error| format!("the guest: {error}"))
    });
    let (network, mut guest) = match made {
        Ok(made) => made,
        Err(error) => {
            say(&json!({ "error": error }));
            return ExitCode::FAILURE;
        }
    };
    let mut network = Some(network);
    say(&json!({ "ok": "ready" }));
    while let Some(line) = next() {
        let answer = match serde_json::from_str(&line) {
            Ok(call) => carry_out(call, &mut network, &mut guest),
            Err(error) => Err(error.to_string()),
        };
        say(&match answer {
            Ok(value) => json!({ "ok": value }),
            Err(error) => json!({ "error": error }),
        });
    }
    ExitCode::SUCCESS
}

fn carry_out(call: Call, network: &mut Option<Network>, guest: &mut Guest) -> Result<Value, String> {
    let io = |error: std::io::Error| format!("{:?}", error.kind());
    let own = |error: sandbox_network::Error| error.to_string();
    let there = || "there is no network".to_owned();
    Ok(match call {
        Call::Connect(to) => guest.connect(&to).map_err(io)?.into(),
        Call::Ask(connection, line) => guest.ask(connection, Some(&line)).map_err(io)?.into(),
        Call::Hear(connection) => guest.ask(connection, None).map_err(io)?.into(),
        Call::AskUdp(to, line) => guest.ask_udp(&to, &line).map_err(io)?.into(),
        Call::Upload(to, bytes) => guest.upload(&to, bytes).map_err(io)?.into(),
        Call::Download(to, bytes) => guest.download(&to, bytes).map_err(io)?.into(),
        Call::Send(packet) => guest.send(&packet).map_err(io)?.into(),
        Call::Flood(first, count) => {
            for packet in first.of_ports(count) {
                guest.send(&packet).map_err(io)?;
            }
            count.into()
        }
        Call::Address(address) => guest.take_address(&address).map_err(io)?.into(),
        Call::Change(rules) => network.as_mut().ok_or_else(there)?.change(&rules).map_err(own)?.into(),
        Call::Report => {
            json!(network.as_mut().ok_or_else(there)?.report().map_err(own)?)
        }
        Call::End => {
            *network = None;
            Value::Null
        }
    })
}

fn say(value: &Value) {
    let mut out = std::io::stdout().lock();
    // Whoever has gone needs no answer.
    let _ = writeln!(out, "{value}").and_then(|()| out.flush());
}
