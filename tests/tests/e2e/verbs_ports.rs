//! `port-forward`.

use std::io::{BufRead, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

use e2e::DEADLINE;
use rustix::process::Signal;

use super::verbs::{Cli, Running};

/// Gives back what it gets; its queue holds all connections of the test (busybox's nc has room for one).
const ECHO: &str = "
import socketserver
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(65536):
            self.request.sendall(data)
class Server(socketserver.ThreadingTCPServer):
    request_queue_size, daemon_threads = 256, True
with Server(('127.0.0.1', 7000), Echo) as server:
    print('listening')
    server.serve_forever()
";

fn address(line: &str) -> SocketAddr {
    line.split(" -> ").next().unwrap().parse().unwrap()
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream
}

#[test]
fn two_hundred_connections_at_once_each_with_its_own_end() {
    let cli = Cli::new();
    let id = cli.start(&["base"]);
    let mut server = cli.spawn(&["exec", "-e", "PYTHONUNBUFFERED=1", &id, "python3", "-c", ECHO]);
    assert_eq!(Running::line(&mut server.out()), "listening\n");
    let mut forwarding = cli.spawn(&["port-forward", &id, ":7000", "[::1]::7000", "0:7001"]);
    let mut lines = forwarding.out();
    let [first, second, third] = [(); 3].map(|()| Running::line(&mut lines));
    let (v4, v6, silent) = (address(&first), address(&second), address(&third));
    assert!(
        v4.ip().is_loopback() && v4.is_ipv4() && v6.is_ipv6() && first.ends_with(" -> 7000\n"),
        "{first}{second}"
    );

    let open: Vec<_> = (0..200).map(|n| connect(if n % 2 == 0 { v4 } else { v6 })).collect();
    let mut talking = Vec::new();
    for (n, mut stream) in open.into_iter().enumerate() {
        talking.push(std::thread::spawn(move || {
            let sent = format!("{n} ").repeat(2000);
            stream.write_all(sent.as_bytes()).unwrap();
            // The other direction goes on.
            stream.shutdown(Shutdown::Write).unwrap();
            let mut back = String::new();
            stream.read_to_string(&mut back).unwrap();
            assert!(back == sent, "connection {n}: {} bytes of {}", back.len(), sent.len());
        }));
    }
    for one in talking {
        one.join().unwrap();
    }
    // Where nobody listens a connection breaks, and is no empty answer.
    let mut refused = connect(silent);
    let broken = refused.read(&mut [0; 1]).unwrap_err();
    assert_eq!(broken.kind(), std::io::ErrorKind::ConnectionReset);
    forwarding.signal(Signal::INT);
    let said = forwarding.said();
    assert!(said.code == 0 && said.err.contains("nobody listens on port 7001"), "{said:?}");

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let said = cli.run(&["port-forward", &id, &format!("{}:7000", taken.local_addr().unwrap().port())]);
    assert!(said.code == 1 && said.err.contains("cannot listen on 127.0.0.1:"), "{said:?}");

    let mut forwarding = cli.spawn(&["port-forward", "--json", &id, ":7000"]);
    let mut lines = forwarding.out();
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    let ports: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!((&ports[0]["address"], &ports[0]["remote"]), (&"127.0.0.1".into(), &7000.into()));
    cli.ok(&["stop", "-t", "0", &id]);
    let said = forwarding.said();
    assert!(said.code == 1 && said.err.contains("the sandbox ended: stopped"), "{said:?}");
}
