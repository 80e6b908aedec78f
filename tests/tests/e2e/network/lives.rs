//! A network over the lives of its guest: a snapshot that had none, a fork in the middle of a connection, a shim that is
//! killed. And a guest without one.

use e2e::{Channel, TestSandbox};

use super::*;

/// Says a line and hears it again, for ever, and writes down how that goes.
const TALK: &str = "
import socket, time
log = open('/tmp/talk', 'a', buffering=1)
talk = socket.create_connection(('8.8.8.8', 7))
try:
    while True:
        talk.sendall(b'x')
        log.write(f'heard {len(talk.recv(1))}\\n')
        time.sleep(0.2)
except OSError as error:
    log.write(f'{type(error).__name__}\\n')
";

#[test]
fn as_root_a_restored_guest_has_a_network_of_its_own() {
    a_restored_guest_has_a_network_of_its_own("tap");
}

#[test]
fn as_an_ordinary_user_a_restored_guest_has_a_network_of_its_own() {
    a_restored_guest_has_a_network_of_its_own("user");
}

fn a_restored_guest_has_a_network_of_its_own(mode: &'static str) {
    let Some(host) = Host::make(mode) else { return };
    echo(&host.internet);
    // As every template it is warmed without a network.
    host.data.warm("base");
    let template = host.data.template("base");
    if mode == "user" {
        // The RAM of a machine is its owner's alone.
        let owned = Command::new("chown").args(["-R", USER]).arg(template.join("snapshots")).status();
        assert!(owned.unwrap().success());
    }
    let template = template.to_str().expect("a plain path");
    let start = ["start", "-q", "--restore", "--network", mode, "--dns", "10.255.255.53", template];
    let source = host.said(&start);
    assert_eq!(host.fetch(&source, "site.example"), Ok("the internet".to_owned()));
    assert!(host.fetch(&source, "203.0.113.2").is_err(), "the host");

    host.said(&["exec", "-d", &source, "--", "python3", "-c", TALK]);
    // Before it begins there is no file.
    let talked = |id: &str| host.said(&["exec", id, "--", "sh", "-c", "cat /tmp/talk || true"]);
    host.until(|| talked(&source).lines().count() > 3);
    let fork = host.said(&["fork", &source]);
    // What it goes on with is no connection of its network: it is told so, and not left to wait.
    host.until(|| talked(&fork).ends_with("ConnectionResetError"));
    assert!(host.counters(&fork)("invalid") > 0);
    assert_eq!(host.fetch(&fork, "site.example"), Ok("the internet".to_owned()));
    let before = talked(&source).lines().count();
    host.until(|| talked(&source).lines().count() > before + 3);
    assert!(!talked(&source).contains("Error"), "the source's goes on");

    host.said(&["stop", "-t", "0", &fork]);
    // Of its shim nothing can be tidied up by itself.
    let state =
        fs::read_to_string(host.own.path().join("sandboxes").join(&source).join("state.json")).unwrap();
    let state: Value = serde_json::from_str(&state).unwrap();
    let shim =
        state["shim_pid"].as_i64().and_then(|pid| rustix::process::Pid::from_raw(pid.try_into().ok()?));
    rustix::process::kill_process(shim.expect("a shim"), rustix::process::Signal::KILL).unwrap();
    host.becomes_clean();
}

#[tokio::test]
async fn without_a_network_nothing_is_behind_the_device() {
    let sandbox = TestSandbox::start(Channel::Serial).await;
    assert_eq!(sandbox.stdout("ls /sys/class/net").await, "eth0\nlo\n");
    assert_eq!(
        sandbox.stdout("ip -o -4 route; ip -o -6 route; cat /sys/class/net/eth0/operstate").await,
        "down\n"
    );
    // Root may configure it.
    let try_it =
        "ip link set eth0 up && ip addr add 198.19.0.2/30 dev eth0 && ip route add default via 198.19.0.1
                  for to in 198.19.0.1 10.0.2.2 8.8.8.8; do ! nc -w 2 $to 80 </dev/null || exit 1; done
                  cat /sys/class/net/eth0/statistics/rx_packets";
    assert_eq!(sandbox.stdout(try_it).await, "0\n");
    sandbox.stop().await;
}

/// Says every byte again.
fn echo(namespace: &File) {
    let listener = inside(namespace, || TcpListener::bind("0.0.0.0:7").unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || std::io::copy(&mut &stream, &mut &stream));
        }
    });
}
