//! A host and an internet of network namespaces, and a driver in the host that has a sandbox's network.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns, unshare};
use serde_json::{Value, json};
use tempfile::TempDir;

/// An ordinary user: a number that nobody has.
const USER: &str = "47110";

/// Everything that takes longer hangs.
const DEADLINE: Duration = Duration::from_secs(90);

const HOST: &str = "\
ip link set lo up
ip link add wan type veth peer name inet
ip addr add 203.0.113.2/24 dev wan
ip addr add 2001:db8:1::2/64 dev wan nodad
ip addr add 192.168.77.1/32 dev lo
ip link set wan up
ip route add default via 203.0.113.1
sysctl -q -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
ip -6 route add default via 2001:db8:1::1
";

const INTERNET: &str = "\
ip link set lo up
ip addr add 203.0.113.1/24 dev inet
ip addr add 2001:db8:1::1/64 dev inet nodad
ip link set inet up
for a in 8.8.8.8 1.1.1.1 10.1.2.3 10.1.2.4 10.2.0.1 10.255.255.53 172.16.0.1 192.168.1.1 100.64.0.1 169.254.169.254; do ip addr add $a/32 dev lo; done
ip route add blackhole 9.9.9.0/24
for a in 2606:4700::1111 fd00::1 2001:db8:bad::1; do ip addr add $a/128 dev lo nodad; done
";

pub(crate) struct World {
    host: File,
    _internet: File,
    folder: TempDir,
}

impl World {
    /// `None`, with a word, where there is no root to make it.
    pub(crate) fn make() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: only root can make the network namespaces of this test");
            return None;
        }
        let (host, internet) = (namespace(), namespace());
        shell(&host, HOST);
        let mut peer = Command::new("ip");
        peer.args(["link", "set", "inet", "netns", "/proc/self/fd/0"]).stdin(internet.try_clone().unwrap());
        assert!(inside(&host, move || peer.status().unwrap().success()));
        shell(&internet, INTERNET);
        for port in [7, 53, 9] {
            serve_tcp(&internet, port);
        }
        serve_tcp(&host, 7);
        for resolver in ["10.255.255.53:53", "8.8.8.8:53"] {
            serve_udp(&internet, resolver);
        }
        serve_udp(&host, "203.0.113.2:53");
        let folder = tempfile::tempdir().unwrap();
        std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
        // Where an ordinary user gets to, whoever's the build folder is.
        let program = folder.path().join("sandbox-network");
        std::fs::copy(env!("CARGO_BIN_EXE_sandbox-network"), program).unwrap();
        // As udev makes it; here it may be for root only.
        let tun = folder.path().join("tun");
        assert!(Command::new("mknod").arg(&tun).args(["c", "10", "200"]).status().unwrap().success());
        std::fs::set_permissions(&tun, PermissionsExt::from_mode(0o666)).unwrap();
        Some(Self { host, _internet: internet, folder })
    }

    /// A guest with a network, in the host: as root for `tap`, else as an ordinary user.
    pub(crate) fn drive(&self, mode: &str, rules: &Value) -> Driver {
        let mut driver = self.start(mode, rules, "");
        assert_eq!(driver.answer(), json!({"ok": "ready"}));
        driver
    }

    /// Why there is none.
    pub(crate) fn refused(&self, mode: &str, rules: &Value) -> String {
        self.start(mode, rules, "").answer()["error"].as_str().expect("it is refused").to_owned()
    }

    /// Why there is none where a program or a device is not.
    pub(crate) fn refused_without(&self, absent: &str, mode: &str) -> String {
        let rules = json!({"allow": [], "deny": [], "egress": null, "ingress": null, "resolvers": []});
        // What is no file is no program, wherever it is found.
        let hide = match absent {
            "/dev/net/tun" => "mount --bind /proc/version /dev/net/tun && ".to_owned(),
            program => format!(
                "for place in /usr/local/sbin /usr/local/bin /usr/sbin /usr/bin /sbin /bin; do \
                 [ ! -e $place/{program} ] || mount --bind /dev/null $place/{program}; done && "
            ),
        };
        self.start(mode, &rules, &hide).answer()["error"].as_str().expect("it is refused").to_owned()
    }

    fn start(&self, mode: &str, rules: &Value, hide: &str) -> Driver {
        let file = |name: &str| self.folder.path().join(name).display().to_string();
        let (program, tun) = (file("sandbox-network"), file("tun"));
        let become_user = match mode {
            "tap" => String::new(),
            _ => format!("setpriv --reuid {USER} --regid {USER} --clear-groups --"),
        };
        let script = format!("mount --bind {tun} /dev/net/tun && {hide}exec {become_user} {program} {mode}");
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = inside(&self.host, move || command.spawn().unwrap());
        let (calls, answers) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        let mut driver = Driver { process, calls, answers: BufReader::new(answers) };
        driver.tell(rules);
        driver
    }

    /// Runs a script in the host.
    pub(crate) fn host(&self, script: &str) {
        shell(&self.host, script);
    }

    /// The host's ends of uplinks.
    pub(crate) fn links(&self) -> Vec<String> {
        let text = output(&self.host, "ip -o link");
        let names = text.lines().filter_map(|line| line.split([':', '@']).nth(1));
        names.map(|name| name.trim().to_owned()).filter(|name| name.starts_with("tiffin")).collect()
    }

    /// The other end's address.
    pub(crate) fn inside_of(&self, link: &str) -> std::net::Ipv4Addr {
        let text = output(&self.host, &format!("ip -o -4 addr show dev {link}"));
        let address = text.split_whitespace().find_map(|word| word.strip_suffix("/31")).unwrap();
        let address: std::net::Ipv4Addr = address.parse().unwrap();
        (address.to_bits() + 1).into()
    }

    pub(crate) fn tables(&self) -> Vec<String> {
        output(&self.host, "nft list tables").lines().map(str::to_owned).collect()
    }

    pub(crate) fn connect_from_host(&self, to: &str) -> std::io::Result<()> {
        let to = to.parse().unwrap();
        inside(&self.host, move || TcpStream::connect_timeout(&to, Duration::from_secs(2)).map(drop))
    }

    /// The descendants of a process.
    pub(crate) fn processes_under(&self, pid: u32) -> Vec<i32> {
        let mut parents = BTreeMap::new();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            let status = std::fs::read_to_string(entry.path().join("status")).unwrap_or_default();
            let parent =
                status.lines().find_map(|line| line.strip_prefix("PPid:")?.trim().parse::<i32>().ok());
            parents.extend(parent.map(|parent| (pid, parent)));
        }
        let root = i32::try_from(pid).unwrap();
        let descends = |mut pid: i32| loop {
            match parents.get(&pid) {
                Some(&parent) if parent == root => return true,
                Some(&parent) if parent > 1 => pid = parent,
                _ => return false,
            }
        };
        parents.keys().copied().filter(|&pid| descends(pid)).collect()
    }

    pub(crate) fn program(pid: i32) -> Option<String> {
        std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()
    }

    /// Waits for what comes in its own time.
    pub(crate) fn until(&self, mut done: impl FnMut() -> bool) {
        let begin = Instant::now();
        while !done() {
            assert!(begin.elapsed() < DEADLINE, "it did not come");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Kills a process that the test has started.
    pub(crate) fn kill(pid: i32) {
        let pid = rustix::process::Pid::from_raw(pid).expect("a process");
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }

    /// Waits until these processes are gone, and with them every trace on the host. The kernel takes namespaces apart in its
    /// own time.
    pub(crate) fn becomes_clean(&self, processes: &[i32]) {
        let begin = Instant::now();
        loop {
            let alive: Vec<_> =
                processes.iter().filter(|pid| Path::new(&format!("/proc/{pid}")).exists()).collect();
            let (links, tables) = (self.links(), self.tables());
            if alive.is_empty() && links.is_empty() && tables.is_empty() {
                return;
            }
            assert!(begin.elapsed() < DEADLINE, "left are {alive:?}, {links:?}, {tables:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // What the drivers have left takes itself apart: nothing of it outlives the test.
        let begin = Instant::now();
        while !(self.links().is_empty() && self.tables().is_empty()) && begin.elapsed() < DEADLINE {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The program that has the network. Dropped, it is killed.
pub(crate) struct Driver {
    process: Child,
    calls: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Driver {
    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    pub(crate) fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// A call.
    pub(crate) fn call(&mut self, call: Value) -> Value {
        self.tell(&call);
        self.answer()
    }

    /// A call that succeeds.
    pub(crate) fn ok(&mut self, call: Value) -> Value {
        self.tell(&call);
        let answer = self.answer();
        assert!(answer.get("ok").is_some(), "{call}: {answer}");
        answer["ok"].clone()
    }

    /// A call that fails.
    pub(crate) fn error(&mut self, call: Value) -> String {
        self.tell(&call);
        let answer = self.answer();
        let error = answer.get("error").unwrap_or_else(|| panic!("{call}: {answer}"));
        error.as_str().unwrap().to_owned()
    }

    /// The packets of each counter.
    pub(crate) fn counters(&mut self) -> BTreeMap<String, u64> {
        let report = self.ok(json!("report"));
        assert_eq!(report["uplink_up"], true);
        let counters = report["counters"].as_array().unwrap().iter();
        counters
            .map(|one| (one["name"].as_str().unwrap().to_owned(), one["packets"].as_u64().unwrap()))
            .collect()
    }

    fn tell(&mut self, call: &Value) {
        writeln!(self.calls, "{call}").unwrap();
    }

    fn answer(&mut self) -> Value {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn namespace() -> File {
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

fn shell(namespace: &File, script: &str) {
    let script = script.to_owned();
    let done = inside(namespace, move || Command::new("sh").args(["-ec", &script]).status().unwrap());
    assert!(done.success());
}

fn output(namespace: &File, script: &str) -> String {
    let script = script.to_owned();
    let done = inside(namespace, move || Command::new("sh").args(["-ec", &script]).output().unwrap());
    String::from_utf8(done.stdout).unwrap()
}

/// Says each line again; `send N` is answered with as many bytes. Port 9 says nothing, and hears to the end.
fn serve_tcp(namespace: &File, port: u16) {
    let listener = inside(namespace, move || TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || answer(&stream, port));
        }
    });
}

fn answer(mut stream: &TcpStream, port: u16) {
    if port == 9 {
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
        return;
    }
    for line in BufReader::new(stream).lines().map_while(Result::ok) {
        let sent = match line.strip_prefix("send ") {
            Some(bytes) => {
                let mut zeros = std::io::repeat(0).take(bytes.parse().unwrap());
                std::io::copy(&mut zeros, &mut stream).map(drop)
            }
            None => writeln!(stream, "{line}"),
        };
        if sent.is_err() {
            return;
        }
    }
}

fn serve_udp(namespace: &File, address: &'static str) {
    let socket = inside(namespace, move || UdpSocket::bind(address).unwrap());
    std::thread::spawn(move || {
        let mut question = [0; 1500];
        while let Ok((length, from)) = socket.recv_from(&mut question) {
            let _ = socket.send_to(&question[..length], from);
        }
    });
}
