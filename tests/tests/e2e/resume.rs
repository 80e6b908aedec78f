//! Freeze, a snapshot of a real machine, Resume, Thaw: the same sandbox goes on, or two others do.
//!
//! Without host-shim, which has no words for snapshots yet: its command line, QEMU's monitor, and the control door by hand.

mod host;
mod idle;
mod machine;
mod qmp;
mod rehearse;
mod scratch;
mod vmgenid;

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::path::Path;
use std::sync::Arc;

use e2e::DEADLINE;
use envd_channel::control::Framing;
use envd_channel::mux::Mux;
use envd_channel::preamble;
use envd_proto::CLIENT_PORT;
use envd_proto::control::{
    Configure, Freeze, Interface, Network, Resumed, Route, StatsRequest, Thaw, error, from_host::Request,
    interface, resume::Kind,
};
use envd_proto::process::{OutputPolicy, ProcessConfig, StartOptions, StartRequest};
use sandbox_folder::client::{ClientError, Code, Output, Process, SandboxClient, connect_hybrid};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;

use host::{Host, Reattached, Replay, client, connect_mux, resume};
use machine::{Lab, Machine, Snapshot};

/// A time of the host that no guest has by itself: 2033-05-18, in seconds.
const LATER: i64 = 2_000_000_000;

/// What a machine that was restored may take until its clock is read.
const SOON: i64 = 600;

/// Prints numbers until it is told to end, in the middle of which it is frozen.
const COUNTER: &str = "i=0; while [ ! -e /tmp/stop ]; do i=$((i+1)); echo $i; done; echo end $i";

/// Keeps a file open that has no name any more.
const HOLDER: &str = "exec 3<>/root/held; echo before >&3; rm /root/held; echo ready; read line; \
                      echo $line >&3; cat /proc/self/fd/3";

/// Log of the counter's output: more than it prints on the way to the snapshot.
const LOG_BYTES: u32 = 32 << 20;

async fn timely<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, work).await.unwrap_or_else(|_| panic!("waiting for {what}"))
}

async fn start(client: &SandboxClient, script: &str, options: Option<StartOptions>) -> Process {
    let args = vec!["-c".to_owned(), script.to_owned()];
    let process = Some(ProcessConfig { cmd: "/bin/sh".into(), args, ..Default::default() });
    let request = StartRequest { process, options, stdin: Some(true), ..Default::default() };
    timely("a start", client.start(request)).await.expect("the process starts")
}

/// Starts a process that prints without end; with what it has printed so far. More is on its way, and nobody reads it.
async fn start_printing(client: &SandboxClient, script: &str) -> (Process, Vec<u8>) {
    let options = StartOptions {
        log_bytes: LOG_BYTES,
        output_policy: OutputPolicy::Block.into(),
        keep_ended_seconds: Some(600),
        ..Default::default()
    };
    let mut process = start(client, script, Some(options)).await;
    let read = stdout(&mut process).await;
    (process, read)
}

async fn stdout(process: &mut Process) -> Vec<u8> {
    match timely("output", process.next()).await.expect("output") {
        Output::Stdout(bytes) => bytes.to_vec(),
        other => panic!("{other:?}"),
    }
}

/// What a script prints that must succeed.
async fn sh(client: &SandboxClient, script: &str) -> String {
    let running = client.output("/bin/sh", ["-c", script]);
    let done = timely(script, running).await.expect("the command runs");
    assert_eq!(done.exit.code(), 0, "{script}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).expect("text")
}

async fn write_file(client: &SandboxClient, path: &str, contents: impl Into<Vec<u8>>) {
    timely(path, client.write_file(path, contents.into())).await.expect("the file is written");
}

async fn pids(client: &SandboxClient) -> Vec<u32> {
    let mut pids: Vec<_> = timely("a list", client.processes())
        .await
        .expect("a list")
        .iter()
        .map(|process| process.pid)
        .collect();
    pids.sort_unstable();
    pids
}

fn refused<T>(result: Result<T, ClientError>) -> Option<Code> {
    result.err().expect("a refusal").code()
}

/// Whoever owns the sandbox is told that it is frozen, and nothing in it goes on. Gives the time on CPUs that the busy class
/// has had.
async fn is_frozen(host: &mut Host, client: &SandboxClient, busy: &str) -> u64 {
    let before = host.cpu_of(busy).await;
    for _ in 0..10 {
        timely("health", client.health()).await.expect("health is always answered");
        let unavailable = Some(Code::Unavailable);
        assert_eq!(refused(timely("a list", client.processes()).await), unavailable);
        assert_eq!(refused(timely("a start", client.output("/bin/true", [""; 0])).await), unavailable);
        assert_eq!(refused(timely("a stat", client.stat("/")).await), unavailable);
    }
    // What is in there never waits: it would have taken what these calls left of the one CPU.
    assert_eq!(host.cpu_of(busy).await, before, "something runs");
    before
}

/// A machine with serial ports that somebody owns.
struct Owned {
    machine: Machine,
    host: Host,
    mux: Arc<Mux>,
    client: SandboxClient,
}

impl Owned {
    async fn boot(lab: &Lab, configure: Configure) -> Self {
        let mut machine = lab.boot().await;
        let serial = machine.serial();
        let mut host = Host::new(serial.control, Framing::Records, 1);
        assert!(!host.hello().await.frozen);
        let mux = connect_mux(serial.mux, 1).await;
        let token = configure.access_token.clone();
        host.tell(Request::Configure(configure)).await;
        let client = owner(&mux, token.as_deref());
        Self { machine, host, mux, client }
    }

    /// Freezes it and stops it for good.
    async fn into_snapshot(mut self, lab: &Lab, freeze: Freeze, busy: &str) -> (Snapshot, u64) {
        self.host.tell(Request::Freeze(freeze)).await;
        let cpu = is_frozen(&mut self.host, &self.client, busy).await;
        (self.machine.into_snapshot(lab).await, cpu)
    }
}

fn owner(mux: &Arc<Mux>, token: Option<&str>) -> SandboxClient {
    match token {
        Some(token) => client(mux).with_token(token),
        None => client(mux),
    }
}

/// A machine that was restored and runs, and whose agent does not know it yet.
async fn restored(lab: &Lab, snapshot: &Snapshot, name: &str) -> (Machine, Host, tokio::net::UnixStream) {
    let mut machine = lab.restore(snapshot, name).await;
    // What the source had half sent is delivered into each restored machine: here a frame of a session that is over, and
    // the preamble of that session.
    let stale = [&b"\0\0\0\x01\0\0\0\x07\0\0 half a frame"[..], &preamble::encode(1), b"\xff\xff"].concat();
    machine.mux().write_all(&stale).await.expect("the port takes bytes");
    machine.go().await;
    let serial = machine.serial();
    (machine, Host::new(serial.control, Framing::Records, 1), serial.mux)
}

/// All that the counter prints, to its end.
fn counted(printed: &[u8]) -> u64 {
    let text = std::str::from_utf8(printed).expect("text");
    let last = text.lines().last().and_then(|line| line.strip_prefix("end ")).expect("its last line");
    let last: u64 = last.parse().expect("a number");
    let mut expected: String = (1..=last).map(|number| format!("{number}\n")).collect();
    expected.push_str(&format!("end {last}\n"));
    assert!(text == expected, "a byte was lost or came twice, among {} of {}", text.len(), expected.len());
    last
}

/// Tells the counter to end; it has printed more since the snapshot, and no byte is missing between.
async fn finish_counter(client: &SandboxClient, first: &[u8], reattached: Reattached) {
    sh(client, "touch /tmp/stop").await;
    let Replay { start, stdout, dropped, end } = reattached.replay().await;
    assert_eq!((start.offset, dropped), (Some(first.len() as u64), 0));
    assert_eq!((end.exit_code, end.exited), (0, true));
    counted(&[first, &stdout].concat());
}

/// The random numbers that were drawn at this second or later.
fn drawn_after(printed: &[u8], second: i64) -> HashSet<String> {
    let text = std::str::from_utf8(printed).expect("text");
    let lines = text.lines().map(|line| line.split_once(' ').expect("a second and a number"));
    let after = lines.filter(|(at, _)| at.parse::<i64>().expect("a second") >= second);
    let numbers: Vec<_> = after.map(|(_, number)| number.to_owned()).collect();
    let distinct: HashSet<_> = numbers.iter().cloned().collect();
    assert!(!numbers.is_empty() && distinct.len() == numbers.len(), "one machine drew a number twice");
    distinct
}

fn assert_all_done(resumed: &Resumed, names: &[&str]) {
    for part in &resumed.parts {
        assert_eq!(part.error, "", "{}", part.name);
    }
    assert_eq!(resumed.parts.iter().map(|part| part.name.as_str()).collect::<Vec<_>>(), names);
}

#[tokio::test]
async fn the_same_sandbox_goes_on_where_it_was_frozen() {
    let lab = Lab::new(Vec::new());
    let source = Owned::boot(&lab, Configure::default()).await;
    let random = lab.at("random");
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e/resume/random.c");
    let built = std::process::Command::new("cc").args(["-static", "-o"]).arg(&random).arg(program).status();
    assert!(built.expect("cc runs").success());
    write_file(&source.client, "/root/random", std::fs::read(random).expect("the program")).await;
    sh(&source.client, "chmod 755 /root/random").await;

    let mut holder = start(&source.client, HOLDER, None).await;
    assert_eq!(stdout(&mut holder).await, b"ready\n");
    let (counter, first) = start_printing(&source.client, COUNTER).await;
    let (drawer, _) = start_printing(&source.client, "exec /root/random").await;
    let [holder_pid, counter_pid, drawer_pid] = [&holder, &counter, &drawer].map(Process::pid);
    let running = pids(&source.client).await;
    assert_eq!(running, [holder_pid, counter_pid, drawer_pid]);
    let (snapshot, cpu) = source.into_snapshot(&lab, Freeze::default(), "user").await;
    drop((holder, counter, drawer));

    let mut drawn = Vec::new();
    // Twice from one snapshot: what differs is the seed.
    for (name, seed) in [("one", 1), ("two", 2)] {
        let (mut machine, mut host, mux) = restored(&lab, &snapshot, name).await;
        let resumed = host.resume(Kind::Same, seed, LATER, None).await;
        assert_all_done(&resumed, &["seed", "clock", "channel"]);
        let mux = connect_mux(mux, 2).await;
        let client = client(&mux);
        assert_eq!(
            is_frozen(&mut host, &client, "user").await,
            cpu,
            "it ran between the snapshot and the Thaw"
        );
        host.tell(Request::Thaw(Thaw {})).await;

        assert_eq!(pids(&client).await, running);
        let now: i64 = sh(&client, "date +%s").await.trim().parse().expect("a number");
        assert!((LATER..LATER + SOON).contains(&now), "{now}");
        let reattached = Reattached::over(&mux, counter_pid, first.len() as u64).await;
        finish_counter(&client, &first, reattached).await;
        // From its beginning, for whoever lost everything.
        let all = Reattached::over(&mux, counter_pid, 0).await.replay().await;
        assert_eq!((all.start.offset, all.dropped), (Some(0), 0));
        counted(&all.stdout);
        let all = Reattached::over(&mux, drawer_pid, 0).await.replay().await;
        drawn.push(drawn_after(&all.stdout, LATER));

        let reattached = Reattached::over(&mux, holder_pid, 0).await;
        let input = envd_proto::process::SendInputRequest {
            process: Some(envd_proto::process::ProcessSelector {
                selector: Some(envd_proto::process::process_selector::Selector::Pid(holder_pid)),
            }),
            input: Some(envd_proto::process::ProcessInput {
                input: Some(envd_proto::process::process_input::Input::Stdin("after\n".into())),
            }),
        };
        let sent: Result<envd_proto::process::SendInputResponse, _> =
            timely("input", client.unary("process.Process/SendInput", &input)).await;
        sent.expect("the process takes input");
        let held = reattached.replay().await;
        assert_eq!(String::from_utf8_lossy(&held.stdout), "ready\nbefore\nafter\n");
        machine.stop().await;
    }
    // The kernel's generator is a chain: two that began at one link would give the same numbers for a while.
    assert!(drawn[0].is_disjoint(&drawn[1]), "two machines drew the same random number");
}

/// A sandbox of this name, with an address and a token of its own.
fn tenant(name: &str, host: u8) -> Configure {
    let interface = Interface {
        interface: Some(interface::Interface::Name("eth0".into())),
        addresses: vec![format!("10.0.{host}.2/24")],
        routes: vec![Route { gateway: format!("10.0.{host}.1"), ..Default::default() }],
        new_mac: format!("02:00:00:00:01:{host:02x}"),
        ..Default::default()
    };
    Configure {
        sandbox_id: name.into(),
        hostname: name.into(),
        env: HashMap::from([("TENANT".into(), name.into())]),
        access_token: Some(format!("token-of-{name}")),
        network: Some(Network {
            interfaces: vec![interface],
            dns_servers: vec![format!("10.0.{host}.53")],
            dns_search: Vec::new(),
        }),
        ..Default::default()
    }
}

/// Stands in for OpenSSH's, which no image of the tests has: makes a host key where there is none.
const KEYGEN: &str = "#!/bin/sh\n[ \"$*\" = -A ] || exit 2\nkey=/etc/ssh/ssh_host_ed25519_key\n\
                      [ -e $key ] || head -c 32 /dev/urandom | hexdump -v -e '1/1 \"%02x\"' > $key\n";

/// What a clone's Resume does when no larger disk is asked for.
const PARTS: [&str; 9] =
    ["seed", "network", "hostname", "clock", "session", "machine-id", "boot-id", "hooks", "channel"];

/// A hook that writes down what it finds.
const HOOK: &str = "#!/bin/sh\nexec > /root/hook\necho $TIFFIN_SANDBOX_ID $TIFFIN_GENERATION $TIFFIN_RESUME_KIND\n\
                    hostname\ncat /etc/machine-id /proc/sys/kernel/random/boot_id\n\
                    grep frozen /sys/fs/cgroup/user/cgroup.events\nls /etc/ssh\n";

/// What makes a sandbox one of its own.
#[derive(Debug, PartialEq, Eq)]
struct Identity {
    machine_id: String,
    boot_id: String,
    host_key: String,
}

/// Makes one clone somebody's, and looks at everything that is to be its own.
async fn become_tenant(lab: &Lab, snapshot: &Snapshot, name: &str, number: u8, cpu: u64) -> Identity {
    let (mut machine, mut host, mux) = restored(lab, snapshot, name).await;
    let again = |generation| resume(Kind::Clone, generation, number, LATER, Some(tenant("forged", 9)));
    // A life that the machine was in already is not begun again, whoever says so.
    let error = host.ask_in(1, again(1)).await.expect_err("the generation of the snapshot");
    assert_eq!(error.code(), error::Code::FailedPrecondition);
    host.send(0, again(0)).await;

    let resumed = host.resume(Kind::Clone, number, LATER, Some(tenant(name, number))).await;
    assert_all_done(&resumed, &PARTS);
    let hooks: Vec<_> = resumed.hooks.iter().map(|hook| (hook.name.as_str(), hook.error.as_str())).collect();
    assert_eq!(hooks, [("10-look", ""), ("20-fails", "exit status: 3")]);

    // Nor is the life that it is in begun again, or heard of the one before.
    let error = host.ask(again(2)).await.expect_err("the generation that it is in");
    assert_eq!(error.code(), error::Code::FailedPrecondition);
    host.send(1, Request::Thaw(Thaw {})).await;
    host.send(1, again(1)).await;

    let mux = connect_mux(mux, 2).await;
    let client = owner(&mux, Some(&format!("token-of-{name}")));
    assert_eq!(is_frozen(&mut host, &client, "user").await, cpu, "it ran between the snapshot and the Thaw");
    host.tell(Request::Thaw(Thaw {})).await;

    for stranger in ["token-of-source", "token-of-forged", ""] {
        let stranger = owner(&mux, Some(stranger));
        let answer = timely("a list", stranger.processes()).await;
        assert_eq!(refused(answer), Some(Code::Unauthenticated));
    }
    assert_eq!(sh(&client, "hostname; cat /etc/hostname; echo $TENANT").await, format!("{name}\n").repeat(3));
    let now: i64 = sh(&client, "date +%s").await.trim().parse().expect("a number");
    assert!((LATER..LATER + SOON).contains(&now), "{now}");
    let addresses =
        sh(&client, "ip -o -4 address show eth0 | awk '{print $4}'; cat /sys/class/net/eth0/address").await;
    assert_eq!(addresses, format!("10.0.{number}.2/24\n02:00:00:00:01:{number:02x}\n"));
    let routes = sh(&client, "ip -4 route | awk '{print $1, $3}'; cat /etc/resolv.conf").await;
    assert_eq!(
        routes,
        format!("default 10.0.{number}.1\n10.0.{number}.0/24 eth0\nnameserver 10.0.{number}.53\n")
    );
    let [machine_id, boot_id] = ["/etc/machine-id", "/proc/sys/kernel/random/boot_id"];
    let (machine_id, boot_id) =
        (sh(&client, &format!("cat {machine_id}")).await, sh(&client, &format!("cat {boot_id}")).await);
    // All of this was there before anything of the tenant's ran, and no key of the template's was.
    assert_eq!(
        sh(&client, "cat /root/hook").await,
        format!("{name} 2 clone\n{name}\n{machine_id}{boot_id}frozen 1\nsshd_config\n")
    );
    // Nobody listens; but whoever connects has waited for the keys.
    assert!(timely("the port of SSH", client.connect_port(22)).await.is_err());
    let host_key = sh(&client, "cat /etc/ssh/ssh_host_ed25519_key").await;
    machine.stop().await;
    Identity { machine_id, boot_id, host_key }
}

#[tokio::test]
async fn two_clones_of_one_snapshot_are_two_others() {
    let lab = Lab::new(Vec::new());
    let source = Owned::boot(&lab, tenant("source", 1)).await;
    for (path, contents) in [
        ("/etc/ssh/ssh_host_ed25519_key", "of the template"),
        ("/etc/ssh/sshd_config", ""),
        ("/etc/machine-id", "00000000000000000000000000000001\n"),
        ("/usr/bin/ssh-keygen", KEYGEN),
        ("/etc/tiffin/resume.d/10-look", HOOK),
        ("/etc/tiffin/resume.d/20-fails", "#!/bin/sh\nexit 3\n"),
    ] {
        write_file(&source.client, path, contents).await;
    }
    sh(&source.client, "chmod 755 /usr/bin/ssh-keygen /etc/tiffin/resume.d/*").await;
    let addresses = sh(&source.client, "ip -o -4 address show eth0 | awk '{print $4}'").await;
    assert_eq!(addresses, "10.0.1.2/24\n");
    let ids = Identity {
        machine_id: sh(&source.client, "cat /etc/machine-id").await,
        boot_id: sh(&source.client, "cat /proc/sys/kernel/random/boot_id").await,
        host_key: sh(&source.client, "cat /etc/ssh/ssh_host_ed25519_key").await,
    };
    let (counter, _) = start_printing(&source.client, COUNTER).await;
    let freeze = Freeze { strip_ssh_host_keys: true, ..Freeze::default() };
    let (snapshot, cpu) = source.into_snapshot(&lab, freeze, "user").await;
    drop(counter);

    let (one, two) = tokio::join!(
        become_tenant(&lab, &snapshot, "one", 2, cpu),
        become_tenant(&lab, &snapshot, "two", 3, cpu)
    );
    for (this, that) in [(&ids, &one), (&ids, &two), (&one, &two)] {
        assert_ne!(this.machine_id, that.machine_id);
        assert_ne!(this.boot_id, that.boot_id);
        assert_ne!(this.host_key, that.host_key);
    }
    for id in [&one, &two] {
        assert_eq!((id.machine_id.len(), id.boot_id.len(), id.host_key.len()), (33, 37, 64), "{id:?}");
    }
}

/// The image's init is the tenant's, with all that it runs. The agent's own work in there goes on beside it.
#[tokio::test]
async fn an_init_of_the_image_is_frozen_with_its_services() {
    let lab = Lab::new(Vec::new()).with_init("/bin/init");
    let owner_of = |name: &str| Configure { hostname: name.into(), ..Default::default() };
    let source = Owned::boot(&lab, owner_of("source")).await;
    write_file(&source.client, "/etc/inittab", "::respawn:/bin/sh /root/service\n").await;
    write_file(&source.client, "/root/service", "echo $$ > /root/pid; while :; do :; done\n").await;
    let hook = "#!/bin/sh\nhostname > /root/hook; cat /sys/fs/cgroup/cgroup.freeze >> /root/hook\n";
    write_file(&source.client, "/etc/tiffin/resume.d/hook", hook).await;
    let pid = sh(
        &source.client,
        "chmod 755 /etc/tiffin/resume.d/hook; kill -HUP 1; until [ -s /root/pid ]; do sleep 0.1; done; cat /root/pid",
    )
    .await;
    let (snapshot, cpu) = source.into_snapshot(&lab, Freeze::default(), "init").await;

    let (_machine, mut host, mux) = restored(&lab, &snapshot, "clone").await;
    let resumed = host.resume(Kind::Clone, 1, LATER, Some(owner_of("clone"))).await;
    assert_eq!(resumed.hooks[0].error, "");
    let mux = connect_mux(mux, 2).await;
    let client = client(&mux);
    assert_eq!(is_frozen(&mut host, &client, "init").await, cpu, "it ran between the snapshot and the Thaw");
    host.tell(Request::Thaw(Thaw {})).await;
    assert_eq!(sh(&client, "cat /root/hook").await, "clone\n1\n");
    assert_eq!(sh(&client, "cat /root/pid; cat /proc/$(cat /root/pid)/comm").await, format!("{pid}sh\n"));
    let before = host.cpu_of("init").await;
    timely("the service to go on", async { while host.cpu_of("init").await == before {} }).await;
}

/// Asks for what must be refused with this code, and whose refusal must say this.
async fn refuses(host: &mut Host, generation: u64, request: Request, code: error::Code, says: &str) {
    let name = format!("{request:?}");
    let error = host.ask_in(generation, request).await.expect_err(&name);
    assert!(error.code() == code && error.message.contains(says), "{name}: {error:?}");
}

#[tokio::test]
async fn what_is_malformed_or_out_of_order_is_refused_and_costs_nothing() {
    use error::Code::{FailedPrecondition, Invalid};
    let lab = Lab::new(Vec::new());
    let Owned { machine: _machine, mut host, mux, client } = Owned::boot(&lab, tenant("source", 1)).await;
    let look = "hostname; echo $TENANT; date +%Y; ip -o -4 address show eth0 | awk '{print $4}'; cat /etc/resolv.conf";
    let before = sh(&client, look).await;
    assert!(before.starts_with("source\nsource\n") && before.contains("\n10.0.1.2/24\n"), "{before}");
    let (mut counter, _) = start_printing(&client, COUNTER).await;

    let same = |generation, seed: usize, time, configure| {
        let Request::Resume(mut request) = resume(Kind::Same, generation, 7, time, configure) else {
            unreachable!("a Resume")
        };
        request.seed.truncate(seed);
        Request::Resume(request)
    };
    let clone = |configure| resume(Kind::Clone, 2, 7, LATER, configure);
    let host_name = |hostname: &str| Configure { hostname: hostname.into(), ..tenant("other", 2) };
    let nowhere = {
        let mut configure = tenant("other", 2);
        let network = configure.network.as_mut().expect("a network");
        network.interfaces[0].interface = Some(interface::Interface::Name("eth7".into()));
        configure
    };

    // While it runs.
    refuses(&mut host, 1, Request::Thaw(Thaw {}), FailedPrecondition, "Freeze comes first").await;
    refuses(&mut host, 2, same(2, 64, LATER, None), FailedPrecondition, "Freeze comes first").await;
    refuses(&mut host, 2, clone(Some(tenant("other", 2))), FailedPrecondition, "Freeze comes first").await;
    refuses(&mut host, 1, Request::Configure(tenant("other", 2)), FailedPrecondition, "already").await;
    assert_eq!(sh(&client, look).await, before);

    // While it is frozen.
    host.tell(Request::Freeze(Freeze::default())).await;
    let cpu = is_frozen(&mut host, &client, "user").await;
    refuses(&mut host, 1, Request::Freeze(Freeze::default()), FailedPrecondition, "frozen already").await;
    for (generation, request, code, says) in [
        (1, same(1, 64, LATER, None), FailedPrecondition, "generation 1 is not above"),
        (3, same(2, 64, LATER, None), Invalid, "came in records of 3"),
        (2, resume(Kind::Unspecified, 2, 7, LATER, None), Invalid, "neither is said"),
        (2, same(2, 31, LATER, None), Invalid, "the seed has 31 bytes: expected 32"),
        (2, same(2, 64, 0, None), Invalid, "not after 1970"),
        (2, same(2, 64, LATER, Some(tenant("other", 2))), Invalid, "only a clone's"),
        (2, clone(None), Invalid, "needs a whole Configure"),
        (2, clone(Some(host_name("a b"))), Invalid, "hostname"),
        (2, clone(Some(nowhere)), Invalid, "eth7"),
    ] {
        refuses(&mut host, generation, request, code, says).await;
    }
    // What is no request at all is told under an id that no request has, and the port goes on.
    host.send_undecodable().await;
    assert_eq!(is_frozen(&mut host, &client, "user").await, cpu, "a refusal let it go on");
    assert!(host.ask(Request::Stats(StatsRequest {})).await.is_ok());

    host.tell(Request::Thaw(Thaw {})).await;
    assert_eq!(sh(&client, look).await, before);
    stdout(&mut counter).await;
    drop(mux);
}

/// A vhost-user-vsock device can be neither snapshotted nor restored (QEMU marks it unmigratable), and its daemon loses
/// bytes where a machine is only stopped and goes on (a quarter of the times on a busy host). So the machine runs, and its
/// host is another one: what the agent sees of a restore is that its connection is gone.
#[tokio::test]
async fn over_vsock_the_agent_finds_the_host_of_its_next_life() {
    let lab = Lab::new(Vec::new());
    let door = lab.at(&format!("vsock_{}", envd_proto::CONTROL_PORT));
    let listener = UnixListener::bind(&door).expect("a listener");
    let _machine = lab.boot_vsock().await;
    let (stream, _) = timely("the agent's call", listener.accept()).await.expect("the agent dials");
    let close = |listener: UnixListener| {
        drop(listener);
        std::fs::remove_file(&door).expect("the listener's socket");
    };
    close(listener);
    let mut host = Host::new(stream, Framing::Lines, 1);
    assert!(!host.hello().await.frozen);
    host.tell(Request::Configure(Configure::default())).await;
    let client = SandboxClient::unix(lab.at("vsock"));
    let (mut counter, mut first) = start_printing(&client, COUNTER).await;
    let pid = counter.pid();

    host.tell(Request::Freeze(Freeze::default())).await;
    let cpu = is_frozen(&mut host, &client, "user").await;
    let listener = UnixListener::bind(&door).expect("a listener");
    drop(host);
    let (stream, _) = timely("the agent's next call", listener.accept()).await.expect("the agent dials");
    close(listener);
    let mut host = Host::new(stream, Framing::Lines, 1);
    assert!(host.hello().await.frozen);
    assert_eq!(is_frozen(&mut host, &client, "user").await, cpu, "a lost host let it go on");
    let resumed = host.resume(Kind::Same, 5, LATER, None).await;
    assert_all_done(&resumed, &["seed", "clock", "channel"]);
    // The streams of the life before have ended, with what was on the way.
    loop {
        match timely("the end of the old stream", counter.next()).await {
            Ok(Output::Stdout(bytes)) => first.extend_from_slice(&bytes),
            Ok(other) => panic!("{other:?}"),
            Err(_) => break,
        }
    }
    assert_eq!(is_frozen(&mut host, &client, "user").await, cpu, "it ran before the Thaw");
    host.tell(Request::Thaw(Thaw {})).await;
    assert_eq!(pids(&client).await, [pid]);
    let stream = timely("a stream", connect_hybrid(&lab.at("vsock"), CLIENT_PORT)).await.expect("a stream");
    let reattached = Reattached::to(stream, pid, first.len() as u64).await;
    finish_counter(&client, &first, reattached).await;
}
