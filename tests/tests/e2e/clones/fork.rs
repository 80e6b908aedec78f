//! Forks: others go on from a running sandbox, which goes on itself and is not disturbed.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use e2e::process::{COUNTER, HOLDER, counted, printed, printed_to_the_end, timely, type_line};
use e2e::{Channel, Forked, TestData, TestSandbox};
use sandbox_folder::client::{Code, Output, Process, SandboxClient, Stream};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Forks of one sandbox in a test, while calls are made.
const MOST_FORKS: u64 = 2;

/// What a sandbox is, a line for each thing. A booted one has the machine id of its image, here none.
const IDENTITY: &str =
    "hostname; cat /etc/machine-id 2>/dev/null || echo no-machine-id; cat /proc/sys/kernel/random/boot_id";

/// Numbers go in, the same come out, until it is told to stop.
async fn echo(mut stream: Stream, echoed: Arc<AtomicU64>, stop: Arc<AtomicBool>) {
    while !stop.load(Ordering::Relaxed) {
        let number = echoed.load(Ordering::Relaxed) + 1;
        stream.write_all(&number.to_be_bytes()).await.expect("the port takes bytes");
        stream.flush().await.expect("the port takes bytes");
        assert_eq!(timely("an echo", stream.read_u64()).await.expect("the port was not cut"), number);
        echoed.store(number, Ordering::Relaxed);
    }
}

/// One call after the other. New ones wait while the sandbox is forked; one that was on its way when the agent was told to hold
/// still is refused, and says that it can be tried again. Gives how many of those there were.
async fn call(client: SandboxClient, called: Arc<AtomicU64>, stop: Arc<AtomicBool>) -> u64 {
    let mut refused = 0;
    while !stop.load(Ordering::Relaxed) {
        match timely("an answer", client.stat("/bin/sh")).await {
            Ok(_) => drop(called.fetch_add(1, Ordering::Relaxed)),
            Err(error) => {
                assert_eq!(error.code(), Some(Code::Unavailable), "{error}");
                refused += 1;
            }
        }
    }
    refused
}

/// Reads all that is printed, to the end.
async fn follow(mut process: Process, read: Arc<AtomicU64>) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        match timely("output", process.next()).await.expect("the stream was not cut") {
            Output::Stdout(bytes) => all.extend_from_slice(&bytes),
            Output::Ended(exit) => {
                assert_eq!((exit.code(), process.take_dropped()), (0, 0));
                return all;
            }
            other => panic!("{other:?}"),
        }
        read.store(all.len() as u64, Ordering::Relaxed);
    }
}

/// What goes on with a sandbox, whatever is done with it: a process that always prints, a port, calls.
struct Streams {
    counter: tokio::task::JoinHandle<Vec<u8>>,
    read: Arc<AtomicU64>,
    echo: tokio::task::JoinHandle<()>,
    echoed: Arc<AtomicU64>,
    calls: tokio::task::JoinHandle<u64>,
    called: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Streams {
    async fn of(sandbox: &TestSandbox) -> Self {
        let counter = sandbox.start_script(&COUNTER.replace("/tmp/stop", "/tmp/quit")).await;
        let listen = "nc -ll -p 8080 -e cat >/dev/null 2>&1 & until grep -q ':1F90 ' /proc/net/tcp /proc/net/tcp6; do :; done";
        assert_eq!(sandbox.sh(listen).await.exit.code(), 0);
        let port = sandbox.client().connect_port(8080).await.expect("the port is open");
        let (read, echoed, called, stop) =
            (Arc::default(), Arc::default(), Arc::default(), Arc::<AtomicBool>::default());
        let streams = Self {
            counter: tokio::spawn(follow(counter, Arc::clone(&read))),
            echo: tokio::spawn(echo(port, Arc::clone(&echoed), Arc::clone(&stop))),
            calls: tokio::spawn(call(sandbox.client(), Arc::clone(&called), Arc::clone(&stop))),
            read,
            echoed,
            called,
            stop,
        };
        streams.go_on().await;
        streams
    }

    /// Waits until more has come over each.
    async fn go_on(&self) {
        for counted in [&self.read, &self.echoed, &self.called] {
            let before = counted.load(Ordering::Relaxed);
            timely("a stream to go on", async {
                while counted.load(Ordering::Relaxed) < before + 10 {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            })
            .await;
        }
    }

    /// Not a byte of them was lost.
    async fn end(self, sandbox: &TestSandbox) {
        self.go_on().await;
        self.stop.store(true, Ordering::Relaxed);
        self.echo.await.expect("the port goes on");
        let refused = self.calls.await.expect("the calls go on");
        sandbox.stdout("touch /tmp/quit").await;
        let counted = counted(&self.counter.await.expect("the counter goes on"));
        let [echoed, called] = [self.echoed, self.called].map(|count| count.load(Ordering::Relaxed));
        println!("not disturbed: {counted} lines, {echoed} echoes, {called} calls, {refused} refused");
        // One after the other: of each fork at most the one that was on its way.
        assert!(refused <= MOST_FORKS, "{refused}");
    }
}

/// What was going on when a sandbox was forked, and goes on in it and in every fork.
struct Going {
    counter: u32,
    first: Vec<u8>,
    holder: u32,
}

impl Going {
    async fn on(sandbox: &TestSandbox) -> Self {
        let mut counter = sandbox.start_script(COUNTER).await;
        let first = printed(&mut counter).await;
        let mut holder = sandbox.start_script(HOLDER).await;
        assert_eq!(printed(&mut holder).await, b"ready\n");
        Self { counter: counter.pid(), first, holder: Process::pid(&holder) }
    }

    /// Ends it in one sandbox: half of the output was read, the other half was waiting.
    async fn end(&self, sandbox: &TestSandbox, word: &str) {
        type_line(&sandbox.client(), self.holder, word).await;
        let held = printed_to_the_end(sandbox.attach(self.holder, 0).await).await;
        assert_eq!(String::from_utf8_lossy(&held), format!("ready\nbefore\n{word}\n"));
        sandbox.stdout("touch /tmp/stop").await;
        let rest = sandbox.attach(self.counter, self.first.len() as u64).await;
        counted(&[self.first.clone(), printed_to_the_end(rest).await].concat());
    }
}

fn inode(path: &Path) -> (u64, u64) {
    let metadata = fs::metadata(path).unwrap();
    (metadata.dev(), metadata.ino())
}

/// A child with a name, a token and an environment of its own.
async fn child(forked: &Forked, name: &str) -> TestSandbox {
    let child =
        forked.child().set("id", format!("n1a{name}")).set("access_token", format!("token-of-{name}"));
    let mut env = forked.taken()["spec"]["env"].clone();
    env["TENANT"] = json!(name);
    let child = child.set("env", env).start().await;
    println!("child {name}: {} ms {}", child.ready()["total_ms"], child.ready()["phases"]);
    assert_eq!(
        (&child.state()["start"], &child.state()["id"]),
        (&json!("cloned"), &json!(format!("n1a{name}")))
    );
    child
}

/// It is nobody else.
async fn assert_itself(sandbox: &TestSandbox, name: &str, others: &mut Vec<String>) {
    let said = sandbox.stdout(&format!("{IDENTITY}; echo $TENANT")).await;
    let lines: Vec<_> = said.lines().map(str::to_owned).collect();
    let [hostname, machine_id, boot_id, tenant] = &lines[..] else { panic!("{said}") };
    assert_eq!((hostname.as_str(), tenant.as_str()), (&*format!("n1a{name}"), name));
    for own in [hostname, machine_id, boot_id] {
        assert!(!others.contains(own), "{own} is another's");
        others.push(own.clone());
    }
    let socket = sandbox.dir().join("vsock.sock");
    for stranger in ["token-of-source", "token-of-one", "token-of-two", "token-of-deep"] {
        let answer = SandboxClient::unix(&socket).with_token(stranger).processes().await;
        if stranger == format!("token-of-{name}") {
            assert!(answer.is_ok());
        } else {
            assert_eq!(answer.unwrap_err().code(), Some(Code::Unauthenticated), "{stranger}");
        }
    }
}

fn assert_taken(what: &str, taken: &Value, base: &Path, forked: &Forked) {
    println!(
        "{what}: stopped {} ms, {} bytes of RAM, {} of disk",
        taken["stopped_ms"], taken["ram_bytes"], taken["disk_bytes"]
    );
    assert!(taken["stopped_ms"].as_f64().unwrap() > 0.0 && taken["ram_bytes"].as_u64().unwrap() > 0);
    // However deep: one base, which is the same file, and one delta over it.
    for name in ["ram", "scratch.ext4"] {
        assert_eq!(inode(&forked.path().join(name)), inode(&base.join(name)), "{what}: {name}");
    }
    assert!(forked.path().join("ram.delta").metadata().unwrap().len() > 0);
    let chain = super::sharing::chain(&forked.path().join("scratch.qcow2"));
    assert_eq!(chain.iter().map(|disk| &disk["format"]).collect::<Vec<_>>(), ["qcow2", "raw"], "{what}");
}

#[tokio::test]
async fn forks_of_forks_go_on_and_the_source_is_not_disturbed() {
    let source =
        TestSandbox::of(Channel::Serial).set("id", "n1asource").set("access_token", "token-of-source");
    let source = source.set("env", json!({ "TENANT": "source", "LEFT": "over" })).start().await;
    let (going, streams) = (Going::on(&source).await, Streams::of(&source).await);
    source.stdout("echo before > /root/before; sync").await;

    let first = source.fork().await;
    assert_eq!(source.state()["phase"], "running");
    println!("fork of a booted one: {}", first.taken());
    streams.go_on().await;
    assert!(first.taken()["stopped_ms"].as_f64().unwrap() > 0.0);
    source.stdout("echo source > /root/after; echo source > /dev/shm/after; sync").await;
    let one = child(&first, "one").await;
    let streams_of_one = {
        // The fork's own streams: those of the source are not its.
        assert_eq!(
            one.stdout("cat /root/before; ls /root/after /dev/shm/after 2>/dev/null; echo $LEFT").await,
            "before\nover\n"
        );
        one.stdout("rm -f /tmp/quit; kill $(pidof nc) 2>/dev/null; true").await;
        Streams::of(&one).await
    };
    one.stdout("echo one > /root/after").await;
    assert_eq!(source.stdout("cat /root/after /dev/shm/after").await, "source\nsource\n");

    let second = one.fork().await;
    assert_taken("fork of a fork", second.taken(), &first.path(), &second);
    one.stdout("echo later > /root/after").await;
    let two = child(&second, "two").await;
    assert_eq!(two.stdout("cat /root/before /root/after; ls /dev/shm").await, "before\none\n");
    two.stdout("echo two > /root/after; head -c 4000000 /dev/urandom > /dev/shm/own").await;
    let third = two.fork().await;
    assert_taken("fork of a fork of a fork", third.taken(), &first.path(), &third);
    let deep = child(&third, "deep").await;
    assert_eq!(
        deep.stdout("cat /root/before /root/after; cmp /dev/shm/own /dev/shm/own && ls /dev/shm").await,
        "before\ntwo\nown\n"
    );

    let mut others = Vec::new();
    for (sandbox, name) in [(&source, "source"), (&one, "one"), (&two, "two"), (&deep, "deep")] {
        assert_itself(sandbox, name, &mut others).await;
        going.end(sandbox, name).await;
    }
    streams_of_one.end(&one).await;
    streams.end(&source).await;
    assert_eq!(one.stdout("cat /root/after").await, "later\n");

    // Twice from one fork, without a name: each gets one.
    let (three, four) = (first.child().start().await, first.child().start().await);
    let (said, other) = (three.stdout(IDENTITY).await, four.stdout(IDENTITY).await);
    assert!(said.lines().zip(other.lines()).all(|(one, two)| one != two), "{said}{other}");
    assert_eq!(said.lines().next(), three.state()["id"].as_str());
    // The sources' and the fork's own ends do them no harm.
    drop(first);
    source.stop().await;
    let fifth = four.fork().await;
    fifth.child().start().await.stop().await;
    for sandbox in [one, two, three, four, deep] {
        sandbox.stop().await;
    }
}

#[tokio::test]
async fn a_fork_of_a_clone_shares_the_templates_files() {
    let data = TestData::warmed("e2e");
    let clone = TestSandbox::clone_of(&data, "e2e").start().await;
    clone.stdout("head -c 8388608 /dev/urandom > /dev/shm/own").await;
    let streams = Streams::of(&clone).await;
    let forked = clone.fork().await;
    assert_taken("fork of a clone", forked.taken(), &data.snapshot("e2e"), &forked);
    let again = clone.fork().await;
    assert_taken("another", again.taken(), &data.snapshot("e2e"), &again);
    streams.end(&clone).await;
    let refusal = clone.call("POST /fork", json!({ "path": forked.path() })).await.refusal(400);
    assert!(refusal.contains("is there already"), "{refusal}");

    // A template of it, whose sandboxes go on from here: it is warm, and nothing else.
    let digest = clone.stdout("sha256sum < /dev/shm/own").await;
    println!("snapshot: {}", clone.snapshot(&data.template("made")).await);
    let child = forked.child().start().await;
    assert_eq!(child.stdout("sha256sum < /dev/shm/own").await, digest);
    child.stop().await;
    // The template that it was made from can go.
    fs::remove_dir_all(data.template("e2e")).unwrap();
    let made = TestSandbox::clone_of(&data, "made").start().await;
    assert_eq!(made.stdout("sha256sum < /dev/shm/own").await, digest);
    assert_ne!(made.stdout(IDENTITY).await, clone.stdout(IDENTITY).await);
    assert_eq!(inode(&data.snapshot("made").join("ram")), inode(&forked.path().join("ram")));
    made.stop().await;
    let cold = TestSandbox::clone_of(&data, "made").set("restore", "auto").set("cpus", 2).try_start().await;
    let said = cold.err().expect("there is nothing to boot");
    assert!(said.contains("--cpus 1, the sandbox asks for 2") && said.contains("cannot be booted"), "{said}");
    clone.stop().await;
}
