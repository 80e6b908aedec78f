//! A guest with a network: it fetches from an internet of the test's own, and does not reach the host that it runs on.
//!
//! The rules themselves are tested beside `sandbox-network`, packet by packet. Here it is real guests: addresses that their
//! agent configured, a resolver, a resume, a fork.

mod lives;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use e2e::{DEADLINE, TestData, binary, made};
use nix::sched::{CloneFlags, setns, unshare};
use serde_json::Value;
use tempfile::TempDir;

/// An ordinary user: a number that nobody has.
const USER: &str = "47111";

const HOST: &str = "\
ip link set lo up
ip link add wan type veth peer name inet
ip addr add 203.0.113.2/24 dev wan
ip link set wan up
ip route add default via 203.0.113.1
sysctl -q -w net.ipv4.ip_forward=1";

const INTERNET: &str = "\
ip link set lo up
ip addr add 203.0.113.1/24 dev inet
ip link set inet up
ip addr add 8.8.8.8/32 dev lo
ip addr add 10.255.255.53/32 dev lo";

#[test]
fn as_root_a_guest_reaches_the_internet_and_not_its_host() {
    a_guest_reaches_the_internet_and_not_its_host("tap");
}

#[test]
fn as_an_ordinary_user_a_guest_reaches_the_internet_and_not_its_host() {
    a_guest_reaches_the_internet_and_not_its_host("user");
}

fn a_guest_reaches_the_internet_and_not_its_host(mode: &'static str) {
    let Some(host) = Host::make(mode) else { return };
    let template = host.data.template("base");
    let template = template.to_str().expect("a plain path");
    let id = host.said(&["start", "-q", "--network", mode, "--dns", "10.255.255.53", template]);
    assert_eq!(host.fetch(&id, "8.8.8.8"), Ok("the internet".to_owned()));
    // By a resolver in a private network, behind the gateway's address.
    assert_eq!(host.fetch(&id, "site.example"), Ok("the internet".to_owned()));
    assert!(host.fetch(&id, "203.0.113.2").is_err(), "the host");
    assert!(host.fetch(&id, "10.255.255.53").is_err(), "a private network");
    let counters = host.counters(&id);
    assert!(counters("sent") > 0 && counters("received") > 0 && counters("resolver") >= 2);
    assert!(counters("reserved") >= 2, "the two that were refused");

    let change = ["network", &id, "--allow-cidr", "203.0.113.2", "--deny-cidr", "8.0.0.0/8"];
    assert!(host.said(&change).contains("allow  203.0.113.2\ndeny   8.0.0.0/8\n"));
    let changed = |id: &str| {
        assert_eq!(host.fetch(id, "203.0.113.2"), Ok("the host".to_owned()));
        assert!(host.fetch(id, "8.8.8.8").is_err());
        assert!(host.counters(id)("denied") > 0);
    };
    changed(&id);

    host.said(&["pause", &id]);
    host.becomes_clean();
    host.said(&["resume", &id]);
    changed(&id);

    // Two with the same address at one time.
    let fork = host.said(&["fork", &id]);
    changed(&fork);
    changed(&id);
    host.said(&["stop", "-t", "0", &id, &fork]);
    host.becomes_clean();
}

/// A network namespace that plays the host, another one that plays the internet.
struct Host {
    mode: &'static str,
    namespace: File,
    internet: File,
    /// The templates.
    data: TestData,
    /// What its user may write.
    own: TempDir,
    tun: PathBuf,
}

impl Host {
    fn make(mode: &'static str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: only root can make the network namespaces of this test");
            return None;
        }
        let (namespace, internet) = (new_namespace(), new_namespace());
        script(&namespace, HOST);
        let mut give = Command::new("ip");
        give.args(["link", "set", "inet", "netns", "/proc/self/fd/0"]).stdin(internet.try_clone().unwrap());
        assert!(inside(&namespace, move || give.status().unwrap().success()));
        script(&internet, INTERNET);
        serve(&internet, "the internet");
        serve(&namespace, "the host");
        resolve(&internet);
        let data = TestData::new();
        data.copy("base");
        let own = tempfile::Builder::new().prefix("tiffin-net-").tempdir().unwrap();
        // An ordinary user gets here, wherever the build is.
        fs::set_permissions(data.path(), PermissionsExt::from_mode(0o755)).unwrap();
        link(&binary("host-shim"), &data.path().join("host-shim"));
        link(&made("TIFFIN_KERNEL"), &data.path().join("vmlinux"));
        link(&made("TIFFIN_GUEST_IMAGE"), &data.path().join("guest-image.cpio"));
        let tun = data.path().join("tun");
        assert!(Command::new("mknod").arg(&tun).args(["c", "10", "200"]).status().unwrap().success());
        fs::set_permissions(&tun, PermissionsExt::from_mode(0o666)).unwrap();
        if mode == "user" {
            let user = USER.parse().ok();
            std::os::unix::fs::chown(own.path(), user, user).unwrap();
        }
        Some(Self { mode, namespace, internet, data, own, tun })
    }

    /// Runs host-shim in the host, as root or as the ordinary user.
    fn shim(&self, arguments: &[&str]) -> Output {
        let become_user = match self.mode {
            "user" => format!("setpriv --reuid {USER} --regid {USER} --clear-groups --"),
            _ => String::new(),
        };
        let line = format!(r#"mount --bind "$TUN" /dev/net/tun && exec {become_user} "$SHIM" "$@""#);
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "sh", "-c", &line, "sh"])
            .args(arguments)
            .env("TUN", &self.tun)
            .env("SHIM", self.data.path().join("host-shim"))
            .env("TIFFIN_KERNEL", self.data.path().join("vmlinux"))
            .env("TIFFIN_GUEST_IMAGE", self.data.path().join("guest-image.cpio"))
            .env("TIFFIN_DATA_DIR", self.own.path())
            .env("HOME", self.own.path())
            .stdin(Stdio::null());
        inside(&self.namespace, move || command.output().unwrap())
    }

    /// What it says when all is well.
    fn said(&self, arguments: &[&str]) -> String {
        let Output { status, stdout, stderr } = self.shim(arguments);
        assert!(status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&stderr));
        String::from_utf8(stdout).unwrap().trim().to_owned()
    }

    /// Fetches a page from inside.
    fn fetch(&self, id: &str, from: &str) -> Result<String, String> {
        let url = format!("http://{from}/");
        let done = self.shim(&["exec", id, "--", "curl", "-sS", "--max-time", "60", &url]);
        if done.status.success() {
            Ok(String::from_utf8(done.stdout).unwrap())
        } else {
            Err(String::from_utf8_lossy(&done.stderr).into_owned())
        }
    }

    /// The packets of each counter.
    fn counters(&self, id: &str) -> impl Fn(&str) -> u64 + use<> {
        let report: Value = serde_json::from_str(&self.said(&["network", id, "--json"])).unwrap();
        assert_eq!(report["uplink_up"], true);
        move |name| {
            let counters = report["counters"].as_array().unwrap();
            counters.iter().find(|counter| counter["name"] == name).unwrap()["packets"].as_u64().unwrap()
        }
    }

    /// Waits for what comes in its own time.
    fn until(&self, mut done: impl FnMut() -> bool) {
        let begin = Instant::now();
        while !done() {
            assert!(begin.elapsed() < DEADLINE, "it did not come");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until there are no links, no tables and no processes of sandboxes. The kernel takes namespaces apart in its own
    /// time.
    fn becomes_clean(&self) {
        let begin = Instant::now();
        loop {
            let links = script(&self.namespace, "ip -o link");
            let links = links.lines().filter(|line| line.contains("tiffin")).count();
            let tables = script(&self.namespace, "nft list tables");
            let users = processes_of_the_user();
            if links == 0 && tables.is_empty() && users.is_empty() {
                return;
            }
            assert!(
                begin.elapsed() < DEADLINE,
                "left are {links} links, tables {tables:?}, processes {users:?}"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let left = self.shim(&["ls", "-aq"]);
        for id in String::from_utf8_lossy(&left.stdout).lines() {
            self.shim(&["rm", "-f", id]);
        }
    }
}

fn processes_of_the_user() -> Vec<String> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let statuses = entries.filter_map(|entry| fs::read_to_string(entry.path().join("status")).ok());
    let of_user = |status: &String| {
        status.lines().any(|line| line.starts_with("Uid:") && line.split_whitespace().nth(1) == Some(USER))
    };
    statuses.filter(of_user).map(|status| status.lines().next().unwrap_or_default().to_owned()).collect()
}

fn link(from: &Path, to: &Path) {
    if fs::hard_link(from, to).is_err() {
        fs::copy(from, to).unwrap();
    }
}

fn new_namespace() -> File {
    let make = || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        File::open("/proc/thread-self/ns/net").unwrap()
    };
    std::thread::spawn(make).join().unwrap()
}

fn inside<T: Send + 'static>(namespace: &File, work: impl FnOnce() -> T + Send + 'static) -> T {
    let namespace = namespace.try_clone().unwrap();
    let there = move || {
        setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
        work()
    };
    std::thread::spawn(there).join().unwrap()
}

fn script(namespace: &File, script: &str) -> String {
    let script = script.to_owned();
    let done = inside(namespace, move || Command::new("sh").args(["-ec", &script]).output().unwrap());
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

/// A web server with one page.
fn serve(namespace: &File, page: &'static str) {
    let listener = inside(namespace, || TcpListener::bind("0.0.0.0:80").unwrap());
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let lines = BufReader::new(&stream).lines();
            // The head of the request, to its empty line.
            let _ = lines.map_while(Result::ok).find(String::is_empty);
            let length = page.len();
            let _ = write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{page}"
            );
        }
    });
}

/// A resolver to which every name is 8.8.8.8 and nothing has an IPv6 address.
fn resolve(namespace: &File) {
    let socket = inside(namespace, || UdpSocket::bind("10.255.255.53:53").unwrap());
    std::thread::spawn(move || {
        let mut question = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut question) {
            // RFC 1035: a header of 12 bytes, the name, then two bytes of type and two of class.
            let Some(name) = question[12..length].iter().position(|&byte| byte == 0) else { continue };
            let asked = &question[12..(12 + name + 5).min(length)];
            let is_a = asked[name + 1..name + 3] == [0, 1];
            let mut answer = question[..2].to_vec();
            answer.extend([0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0]);
            answer.extend(asked);
            if is_a {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 8, 8, 8, 8]);
            }
            let _ = socket.send_to(&answer, from);
        }
    });
}
