//! What only a real machine has: terminals of the container, cgroups of processes, and memory that runs out.

use e2e::{Channel, DEADLINE, TestSandbox};
use envd_proto::CLIENT_PORT;
use envd_proto::process::process_selector::Selector;
use envd_proto::process::pty::Size;
use envd_proto::process::{
    ProcessConfig, ProcessSelector, Pty, Scope, SendSignalRequest, SendSignalResponse, Signal, StartOptions,
    StartRequest,
};
use sandbox_folder::client::{Exit, Output, connect_hybrid};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn shell(script: &str) -> StartRequest {
    let args = vec!["-c".to_owned(), script.to_owned()];
    let config = ProcessConfig { cmd: "/bin/sh".into(), args, ..Default::default() };
    StartRequest { process: Some(config), ..Default::default() }
}

/// All events of a process, from its beginning, as a client of the JSON codec gets them.
async fn replay(sandbox: &TestSandbox, pid: u32) -> String {
    let mut stream = connect_hybrid(&sandbox.dir().join("vsock.sock"), CLIENT_PORT).await.unwrap();
    let message = format!(r#"{{"process":{{"pid":{pid}}},"fromOffset":"0"}}"#);
    let head = format!(
        "POST /process.Process/Connect HTTP/1.1\r\nhost: sandbox\r\nconnection: close\r\n\
         content-type: application/connect+json\r\ncontent-length: {}\r\n\r\n",
        message.len() + 5
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_u8(0).await.unwrap();
    stream.write_u32(message.len() as u32).await.unwrap();
    stream.write_all(message.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    tokio::time::timeout(DEADLINE, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn a_terminal_is_one_of_the_containers() {
    let sandbox = TestSandbox::start(Channel::Serial).await;
    let script =
        "tty; stty size; cat /proc/self/cgroup; ls -l $(tty) | cut -d' ' -f1; echo <>/dev/tty && echo own";
    let size = Some(Size { cols: 99, rows: 33 });
    let request = StartRequest { pty: Some(Pty { size }), ..shell(script) };
    let done = sandbox.client().with_user("user").start(request).await.unwrap().output().await.unwrap();
    let text = String::from_utf8_lossy(&done.stdout).replace('\r', "");
    assert!(text.starts_with("/dev/pts/0\n33 99\n0::/pty\ncrw--w----\n"), "{text}");
    assert!(text.ends_with("own\n"), "{text}");
    // The image has no bash.
    let done = sandbox.client().output("/bin/bash", ["-l", "-c", "echo $0 is here"]).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&done.stdout), "/bin/sh is here\n");
    sandbox.stop().await;
}

#[tokio::test]
async fn a_cgroup_of_its_own_holds_all_that_a_process_started() {
    let sandbox = TestSandbox::start(Channel::Serial).await;
    let client = sandbox.client();
    let options = StartOptions { own_cgroup: true, ..Default::default() };
    // A daemon as they come: in a session of its own, its parents gone.
    let script = "(setsid sh -c 'sleep 1000 & sleep 1000' >/dev/null 2>&1 &); cat /proc/self/cgroup";
    let request = StartRequest { options: Some(options), ..shell(script) };
    let process = client.start(request).await.unwrap();
    let pid = process.pid();
    let done = tokio::time::timeout(DEADLINE, process.output()).await.unwrap().unwrap();
    let own = String::from_utf8_lossy(&done.stdout).trim().to_owned();
    assert!(own.starts_with("0::/user/process-"), "{own}");
    let directory = format!("/sys/fs/cgroup{}", own.trim_start_matches("0::"));
    sandbox.stdout(&format!("until [ $(wc -l < {directory}/cgroup.procs) -ge 2 ]; do :; done")).await;

    let selector = ProcessSelector { selector: Some(Selector::Pid(pid)) };
    let kill = SendSignalRequest {
        process: Some(selector),
        signal: Signal::Sigkill.into(),
        scope: Scope::Tree.into(),
    };
    client.unary::<_, SendSignalResponse>("process.Process/SendSignal", &kill).await.unwrap();
    sandbox.stdout(&format!("while [ -e {directory} ]; do :; done")).await;
    // Now there is nothing that it could reach.
    let gone = client.unary::<_, SendSignalResponse>("process.Process/SendSignal", &kill).await;
    assert!(gone.unwrap_err().to_string().contains("has ended"));
    sandbox.stop().await;
}

#[tokio::test]
async fn a_process_that_runs_out_of_memory_is_named() {
    let sandbox = TestSandbox::start(Channel::Serial).await;
    let client = sandbox.client();
    // tail keeps the last line, which never ends.
    let mut process = client.start(shell("exec tail /dev/zero")).await.unwrap();
    let pid = process.pid();
    let end = tokio::time::timeout(DEADLINE, process.next()).await.unwrap().unwrap();
    assert_eq!(end, Output::Ended(Exit::Signal(9)));
    let events = replay(&sandbox, pid).await;
    assert!(events.contains(r#""error":"signal: killed (out of memory)""#), "{events}");
    assert!(events.contains(r#""oomKilled":true"#), "{events}");

    // A child of the process: its end is its own, and says why.
    let process = client.start(shell("tail /dev/zero; echo $?; exit 3")).await.unwrap();
    let pid = process.pid();
    let done = tokio::time::timeout(DEADLINE, process.output()).await.unwrap().unwrap();
    assert_eq!((done.stdout.as_slice(), done.exit), (&b"137\n"[..], Exit::Code(3)));
    let events = replay(&sandbox, pid).await;
    assert!(events.contains(r#""error":"exit status 3","oomKilled":true"#), "{events}");

    // A kill is a kill, whatever somebody writes to the kernel's log.
    let forged = "<3>Out of memory: Killed process";
    let process = client
        .start(shell(&format!("[ -e /dev/kmsg ] || mknod /dev/kmsg c 1 11; for p in $(seq 1 400); do echo \"{forged} $p (sh) total-vm:1kB\" > /dev/kmsg; done; kill -9 $$")))
        .await
        .unwrap();
    let pid = process.pid();
    assert_eq!(process.output().await.unwrap().exit, Exit::Signal(9));
    let events = replay(&sandbox, pid).await;
    assert!(events.contains(r#""error":"signal: killed""#) && !events.contains("oomKilled"), "{events}");
    sandbox.stop().await;
}
