//! Accidents of the workload: after each, and where it goes on also beside it, the agent answers and a process starts.

use std::time::Duration;

use e2e::{Channel, DEADLINE, TestSandbox};
use envd_proto::process::{ProcessConfig, StartRequest};
use sandbox_folder::client::{Exit, Output, Process};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

/// /health answers and a new process starts.
async fn assert_alive(sandbox: &TestSandbox) {
    let client = sandbox.client();
    tokio::time::timeout(DEADLINE, client.health()).await.expect("health answers").expect("and well");
    assert_eq!(sandbox.stdout("echo alive").await, "alive\n");
}

async fn start(sandbox: &TestSandbox, script: &str) -> Process {
    let config =
        ProcessConfig { cmd: "/bin/sh".into(), args: vec!["-c".into(), script.into()], ..Default::default() };
    sandbox.client().start(StartRequest { process: Some(config), ..Default::default() }).await.unwrap()
}

async fn first_line(process: &mut Process) -> String {
    let mut line = Vec::new();
    let reading = async {
        while !line.ends_with(b"\n") {
            match process.next().await.unwrap() {
                Output::Stdout(bytes) | Output::Stderr(bytes) | Output::Pty(bytes) => {
                    line.extend_from_slice(&bytes)
                }
                Output::Ended(exit) => panic!("it ended: {exit:?}"),
            }
        }
    };
    tokio::time::timeout(DEADLINE, reading).await.expect("a line");
    String::from_utf8(line).unwrap()
}

#[tokio::test]
async fn a_fork_bomb_leaves_room_for_a_new_process() {
    let sandbox = TestSandbox::start(Channel::Serial).await;
    // Each of them makes two of itself for as long as it can, and stays.
    let mut bomb = start(&sandbox, r#"echo go; bomb() { bomb | bomb & wait; sleep 1000; }; bomb"#).await;
    assert_eq!(first_line(&mut bomb).await, "go\n");
    // It has grown when forks fail, which the shells complain about.
    let complaint = async {
        loop {
            match bomb.next().await.unwrap() {
                Output::Stderr(bytes) if String::from_utf8_lossy(&bytes).contains("fork") => return,
                Output::Ended(exit) => panic!("the bomb ended: {exit:?}"),
                _ => {}
            }
        }
    };
    // Memory may run out first, and then the kernel kills them by and by: both are a full machine.
    let _ = tokio::time::timeout(Duration::from_secs(20), complaint).await;
    assert_alive(&sandbox).await;
    sandbox.sh("kill -9 -1").await;
    assert_alive(&sandbox).await;
    sandbox.stop().await;
}

#[tokio::test]
async fn exhausted_memory_kills_the_hog_and_says_so() {
    let sandbox = TestSandbox::start(Channel::Vsock).await;
    let bystander = start(&sandbox, "read line; echo $line").await;
    for _ in 0..3 {
        let done = sandbox.sh("exec hog memory").await;
        assert_eq!(done.exit, Exit::Signal(9));
        assert_alive(&sandbox).await;
    }
    let mut stdin = bystander.stdin();
    stdin.write("still here\n".into()).await.unwrap();
    let done = tokio::time::timeout(DEADLINE, bystander.output()).await.unwrap().unwrap();
    assert_eq!(done.stdout, b"still here\n");
    sandbox.stop().await;
}

#[tokio::test]
async fn a_full_disk_fails_writes_and_nothing_else() {
    let sandbox = TestSandbox::start(Channel::Serial).await;
    let client = sandbox.client();
    client.write_file("/root/kept", "as it was").await.unwrap();
    assert_ne!(sandbox.sh("dd if=/dev/zero of=/fill bs=64k").await.exit.code(), 0);
    sandbox.sh("cat /dev/zero > /fill2").await;
    assert_alive(&sandbox).await;
    let error = client.write_file("/root/kept", vec![b'x'; 4 << 20]).await.unwrap_err().to_string();
    assert!(error.contains("No space left"), "{error}");
    assert_eq!(client.read_file("/root/kept").await.unwrap(), b"as it was");
    assert_eq!(sandbox.stdout("ls -A /root").await, "kept\n");
    sandbox.stdout("rm /fill /fill2").await;
    client.write_file("/root/kept", "anew").await.unwrap();
    assert_eq!(client.read_file("/root/kept").await.unwrap(), b"anew");
    sandbox.stop().await;
}

#[tokio::test]
async fn a_million_open_files_are_the_hogs_own_trouble() {
    let sandbox = TestSandbox::of(Channel::Serial).set("memory_mib", 768).start().await;
    let mut hog = start(&sandbox, "exec hog files 1000000").await;
    let said = first_line(&mut hog).await;
    let count: u64 = said.split(' ').next().unwrap().parse().unwrap();
    assert!(count > 100_000, "{said}");
    println!("the hog has {said}");
    assert_alive(&sandbox).await;
    hog.stdin().close().await.unwrap();
    tokio::time::timeout(DEADLINE, hog.output()).await.unwrap().unwrap();
    assert_alive(&sandbox).await;
    sandbox.stop().await;
}

#[tokio::test]
async fn ten_thousand_short_processes_come_and_go() {
    let sandbox = TestSandbox::start(Channel::Vsock).await;
    assert_eq!(sandbox.stdout("hog processes 10000").await, "10000 processes\n");
    // The same through the orphanage: their parents are gone before them.
    sandbox.stdout("i=0; while [ $i -lt 300 ]; do (true & true &); i=$((i + 1)); done").await;
    assert_alive(&sandbox).await;
    assert_eq!(sandbox.stdout("grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l").await, "0\n");
    sandbox.stop().await;
}

#[tokio::test]
async fn a_kill_of_everything_spares_what_starts_processes() {
    let sandbox = TestSandbox::start(Channel::Serial).await;
    let mut victim = start(&sandbox, "echo ready; sleep 1000").await;
    first_line(&mut victim).await;
    // The shell that kills everything is spared by its own call.
    sandbox.sh("kill -9 -1; exit 0").await;
    let done = tokio::time::timeout(DEADLINE, victim.output()).await.unwrap().unwrap();
    assert_eq!(done.exit, Exit::Signal(9));
    assert_alive(&sandbox).await;
    sandbox.stop().await;
}

#[tokio::test]
async fn a_flood_of_connections_and_half_open_requests_passes() {
    for channel in Channel::ALL {
        let sandbox = TestSandbox::start(channel).await;
        let mut flood = Vec::new();
        for n in 0..600 {
            let mut stream = UnixStream::connect(sandbox.dir().join("vsock.sock")).await.unwrap();
            let begun: &[u8] = match n % 4 {
                0 => b"CONNECT 49983\n",
                1 => b"CONNECT 49983\nPOST /process.Process/Start HTTP/1.1\r\nhost: x\r\ncontent-le",
                2 => b"CONNECT 49983\nPRI * HTTP/2.0\r\n\r\nSM\r\n",
                _ => b"CONNECT 49984\nCONN",
            };
            // The sandbox may turn some away, which is its right.
            let _ = stream.write_all(begun).await;
            flood.push(stream);
        }
        drop(flood);
        assert_alive(&sandbox).await;
        sandbox.stop().await;
    }
}
