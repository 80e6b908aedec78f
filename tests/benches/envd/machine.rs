//! In the virtual machine: output and files over each channel, beside the channel with nothing on it.
//!
//! Raw is the ports door: bytes of a program behind a TCP port in the sandbox, copied by the agent as they are. It takes
//! the same way through the VMM and, on serial, through the mux.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use e2e::{Channel, TestSandbox};
use envd_proto::{CLIENT_PORT, PORTS_PORT};

use crate::host::{download, upload};
use crate::wire::{Wire, connect};
use crate::{Bound, Row, interleaved, rate};

const ROUNDS: usize = 5;
const TRANSFER: u64 = 32 << 20;
const SOURCE_PORT: u16 = 5001;
const SINK_PORT: u16 = 5002;

pub(crate) fn measure() -> Vec<Row> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let mut rows = Vec::new();
    for channel in Channel::ALL {
        let sandbox = runtime.block_on(TestSandbox::start(channel));
        rows.extend(transfers(channel, &sandbox, &runtime));
        runtime.block_on(sandbox.stop());
    }
    rows
}

fn transfers(channel: Channel, sandbox: &TestSandbox, runtime: &tokio::runtime::Runtime) -> Vec<Row> {
    let socket = sandbox.dir().join("vsock.sock");
    // Its programs go on behind the call that started them, and answer each connection anew.
    runtime.block_on(sandbox.stdout(&format!(
        "nc -ll -p {SOURCE_PORT} -e /bin/head -c {TRANSFER} /dev/zero </dev/null >/dev/null 2>&1 & \
         nc -ll -p {SINK_PORT} -e /bin/sh -c 'head -c {TRANSFER} >/dev/null; echo done' </dev/null >/dev/null 2>&1 & \
         head -c {TRANSFER} /dev/zero >/dev/shm/source; \
         until nc -z 127.0.0.1 {SOURCE_PORT} && nc -z 127.0.0.1 {SINK_PORT}; do :; done"
    )));
    let content = vec![0x5a; TRANSFER as usize];
    let wire = || Wire::new(dial(&socket, CLIENT_PORT).unwrap());
    let (mut wire_out, mut wire_down, mut wire_up) = (wire(), wire(), wire());
    let length = TRANSFER.to_string();

    let mut raw_down = || {
        let mut stream = port(&socket, SOURCE_PORT).unwrap();
        let mut buffer = vec![0; 256 << 10];
        let mut total = 0;
        while total < TRANSFER {
            match stream.read(&mut buffer).unwrap() {
                0 => panic!("the raw stream ended after {total} bytes"),
                count => total += count as u64,
            }
        }
    };
    let mut out = || {
        let printed = wire_out.run("/bin/head", &["-c", &length, "/dev/zero"]).unwrap();
        assert_eq!(printed, (TRANSFER, 0));
    };
    let mut down = || download(&mut wire_down, "/dev/shm/source");
    let [raw_down, out, down] = interleaved(ROUNDS, [&mut raw_down, &mut out, &mut down]);
    let mut raw_up = || {
        let mut stream = port(&socket, SINK_PORT).unwrap();
        stream.write_all(&content).unwrap();
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).unwrap();
        assert_eq!(answer, "done\n");
    };
    let mut up = || upload(&mut wire_up, "/dev/shm/uploaded", &content);
    let [raw_up, up] = interleaved(ROUNDS, [&mut raw_up, &mut up]);

    let row = |what: &str, time: f64, raw: f64| Row {
        what: format!("{channel:?}: {what}"),
        value: rate(TRANSFER, time),
        ratio: Some((raw / time, Bound::AtLeast(0.5))),
    };
    vec![
        Row::plain(format!("{channel:?}: raw, down"), rate(TRANSFER, raw_down)),
        row("standard output of a process", out, raw_down),
        row("a file down", down, raw_down),
        Row::plain(format!("{channel:?}: raw, up"), rate(TRANSFER, raw_up)),
        row("a file up", up, raw_up),
    ]
}

/// A stream to a port of the agent.
fn dial(socket: &Path, port: u32) -> io::Result<UnixStream> {
    let mut stream = connect(socket)?;
    ask(&mut stream, &port.to_string())?;
    Ok(stream)
}

/// A stream to a TCP port in the sandbox.
fn port(socket: &Path, port: u16) -> io::Result<UnixStream> {
    let mut stream = dial(socket, PORTS_PORT)?;
    ask(&mut stream, &port.to_string())?;
    Ok(stream)
}

/// `CONNECT`, and its answer to the line's end and not a byte more.
fn ask(stream: &mut UnixStream, port: &str) -> io::Result<()> {
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    let mut answer = Vec::new();
    let mut byte = [0];
    while !answer.ends_with(b"\n") {
        stream.read_exact(&mut byte)?;
        answer.push(byte[0]);
    }
    if answer.starts_with(b"OK") {
        return Ok(());
    }
    Err(io::Error::other(format!("CONNECT {port}: {}", String::from_utf8_lossy(&answer))))
}
