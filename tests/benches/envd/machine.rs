//! In the virtual machine: output and files over each channel, beside the channel with nothing on it.
//!
//! Raw is the ports door: bytes of a program behind a TCP port in the sandbox, copied by the agent as they are. They take
//! the same way through the VMM and, on serial, through the mux, but also the sandbox's loopback device: what has a ratio
//! above 1 shows that the channel itself carries more than that, and is then the better yardstick for the rest.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use e2e::{Channel, TestSandbox};
use envd_proto::{CLIENT_PORT, PORTS_PORT};

use crate::host::{download, upload};
use crate::wire::{DEADLINE, Wire, connect};
use crate::{Bound, Row, interleaved, rate};

const ROUNDS: usize = 5;
const TRANSFER: u64 = 32 << 20;
const BLOCK: u64 = 256 << 10;
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
    // Its programs go on behind the call that started them, and answer each connection anew. They move large blocks: a
    // program's own system calls are dear where the machine is emulated.
    let blocks = format!("bs={BLOCK} count={} iflag=fullblock status=none", TRANSFER / BLOCK);
    runtime.block_on(sandbox.stdout(&format!(
        "nc -ll -p {SOURCE_PORT} -e /bin/dd if=/dev/zero {blocks} </dev/null >/dev/null 2>&1 & \
         nc -ll -p {SINK_PORT} -e /bin/sh -c 'dd of=/dev/null {blocks}; echo done' </dev/null >/dev/null 2>&1 & \
         dd if=/dev/zero of=/dev/shm/source {blocks}"
    )));
    for listening in [SOURCE_PORT, SINK_PORT] {
        let begin = Instant::now();
        while port(&socket, listening).is_err() {
            assert!(begin.elapsed() < DEADLINE, "nobody listens on port {listening} of the sandbox");
        }
    }
    let content = vec![0x5a; TRANSFER as usize];
    let wire = || Wire::new(dial(&socket, CLIENT_PORT).unwrap());
    let (mut wire_out, mut wire_down, mut wire_up) = (wire(), wire(), wire());
    let zeros: Vec<_> = std::iter::once("if=/dev/zero").chain(blocks.split(' ')).collect();

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
        let printed = wire_out.run("/bin/dd", &zeros).unwrap();
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
        Row::plain(format!("{channel:?}: raw (ports door), down"), rate(TRANSFER, raw_down)),
        row("standard output of a process", out, raw_down),
        row("a file down", down, raw_down),
        Row::plain(format!("{channel:?}: raw (ports door), up"), rate(TRANSFER, raw_up)),
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
