//! Processes in a sandbox that are looked at while they run.

use std::future::Future;

use envd_proto::process::process_selector::Selector;
use envd_proto::process::{
    OutputPolicy, ProcessConfig, ProcessSelector, Pty, StartOptions, StartRequest, pty,
};
use sandbox_folder::client::{Output, Process, SandboxClient, Stdin};

use crate::{DEADLINE, TestSandbox};

/// The log of a process's output: more than one prints in a test.
const LOG_BYTES: u32 = 32 << 20;

/// Prints numbers, each once, until /tmp/stop is there, and then how many. It never waits for a reader.
pub const COUNTER: &str = "i=0; while [ ! -e /tmp/stop ]; do i=$((i+1)); echo $i; done; echo end $i";

/// Keeps a file open that has no name any more; says what is in it when it has got a line of input, which goes to its end.
pub const HOLDER: &str = "exec 3<>/root/held; echo before >&3; rm /root/held; echo ready; read line; \
                          echo $line >&3; cat /proc/self/fd/3";

/// Waits for what must come.
///
/// # Panics
///
/// When it does not come in time.
pub async fn timely<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, work).await.unwrap_or_else(|_| panic!("waiting for {what}"))
}

/// Selects a process by its pid.
pub fn by_pid(pid: u32) -> ProcessSelector {
    ProcessSelector { selector: Some(Selector::Pid(pid)) }
}

impl TestSandbox {
    /// Starts a shell script whose input stays open, and of whose output nothing is ever lost.
    pub async fn start_script(&self, script: &str) -> Process {
        self.start_with(script, None).await
    }

    /// Starts a shell script on a terminal.
    pub async fn start_on_terminal(&self, script: &str) -> Process {
        self.start_with(script, Some(Pty { size: Some(pty::Size { cols: 91, rows: 33 }) })).await
    }

    async fn start_with(&self, script: &str, pty: Option<Pty>) -> Process {
        let args = vec!["-c".to_owned(), script.to_owned()];
        let request = StartRequest {
            process: Some(ProcessConfig { cmd: "/bin/sh".into(), args, ..Default::default() }),
            pty,
            stdin: Some(true),
            options: Some(StartOptions {
                log_bytes: LOG_BYTES,
                output_policy: OutputPolicy::Block.into(),
                keep_ended_seconds: Some(600),
                ..Default::default()
            }),
            ..Default::default()
        };
        timely("a start", self.client().start(request)).await.expect("the process starts")
    }

    /// Attaches to a process, at this byte of its output.
    pub async fn attach(&self, pid: u32, offset: u64) -> Process {
        timely("a process", self.client().attach(by_pid(pid), Some(offset)))
            .await
            .expect("the process is there")
    }

    /// The pids of the processes that were started over the client door, sorted.
    pub async fn pids(&self) -> Vec<u32> {
        let listed = timely("a list", self.client().processes()).await.expect("a list");
        let mut pids: Vec<_> = listed.iter().map(|process| process.pid).collect();
        pids.sort_unstable();
        pids
    }
}

/// What a process prints next.
pub async fn printed(process: &mut Process) -> Vec<u8> {
    match timely("output", process.next()).await.expect("output") {
        Output::Stdout(bytes) | Output::Pty(bytes) => bytes.to_vec(),
        other => panic!("{other:?}"),
    }
}

/// Reads until what was printed ends with this; gives all of it.
pub async fn printed_until(process: &mut Process, end: &str) -> String {
    let mut all = Vec::new();
    while !String::from_utf8_lossy(&all).ends_with(end) {
        all.extend(printed(process).await);
    }
    String::from_utf8(all).expect("text")
}

/// Reads all that a process prints to its end, which must be a success; not a byte may be lost.
pub async fn printed_to_the_end(mut process: Process) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        match timely("output", process.next()).await.expect("output") {
            Output::Stdout(bytes) | Output::Pty(bytes) => all.extend_from_slice(&bytes),
            Output::Stderr(bytes) => panic!("{}", String::from_utf8_lossy(&bytes)),
            Output::Ended(exit) => {
                assert_eq!((exit.code(), process.take_dropped()), (0, 0));
                return all;
            }
        }
    }
}

/// Checks the whole output of [`COUNTER`]; gives how far it has come.
pub fn counted(printed: &[u8]) -> u64 {
    let text = std::str::from_utf8(printed).expect("text");
    let last = text.lines().last().and_then(|line| line.strip_prefix("end ")).expect("its last line");
    let last: u64 = last.parse().expect("a number");
    let mut expected: String = (1..=last).map(|number| format!("{number}\n")).collect();
    expected.push_str(&format!("end {last}\n"));
    assert!(text == expected, "a byte was lost or came twice, among {} of {}", text.len(), expected.len());
    last
}

/// Writes a line to the input of a process that was started before, perhaps over another connection.
pub async fn type_line(client: &SandboxClient, pid: u32, line: &str) {
    type_into(attached(client, pid).await.stdin(), line).await;
}

/// Writes a line to its terminal.
pub async fn type_on_terminal(client: &SandboxClient, pid: u32, line: &str) {
    type_into(attached(client, pid).await.terminal(), line).await;
}

async fn attached(client: &SandboxClient, pid: u32) -> Process {
    timely("a process", client.attach(by_pid(pid), None)).await.expect("the process is there")
}

async fn type_into(mut input: Stdin, line: &str) {
    timely("input", input.write(format!("{line}\n").into())).await.expect("the process takes input");
}
