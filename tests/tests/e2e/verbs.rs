//! The verbs of the command line as a person uses them: a sandbox's life, and what is told about it.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use e2e::{DEADLINE, binary, made};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// A data folder of its own, with the templates of the others; nothing in it outlives the test.
pub(crate) struct Cli {
    data: tempfile::TempDir,
}

/// What a verb said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Cli {
    pub(crate) fn new() -> Self {
        // Short: sockets must fit into their addresses.
        let data = tempfile::Builder::new().prefix("verbs-").tempdir_in("/tmp").unwrap();
        let templates = made("TIFFIN_E2E_DATA").join("templates");
        std::os::unix::fs::symlink(templates, data.path().join("templates")).unwrap();
        Self { data }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.data.path().join(name)
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(binary("host-shim"));
        command.args(args).env("TIFFIN_DATA_DIR", self.data.path()).stdin(Stdio::null());
        command
    }

    /// Runs a verb to its end.
    #[track_caller]
    pub(crate) fn run(&self, args: &[&str]) -> Said {
        self.feed(args, b"")
    }

    /// Runs a verb with this input.
    #[track_caller]
    pub(crate) fn feed(&self, args: &[&str], input: &[u8]) -> Said {
        let mut command = self.command(args);
        let mut child = Running(
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap(),
        );
        let mut stdin = child.0.stdin.take().unwrap();
        let input = input.to_vec();
        // A verb that does not read ends without it.
        let feeding = std::thread::spawn(move || drop(stdin.write_all(&input)));
        let said = child.said();
        feeding.join().unwrap();
        said
    }

    /// Runs a verb that must succeed; gives what it printed.
    #[track_caller]
    pub(crate) fn ok(&self, args: &[&str]) -> String {
        let said = self.run(args);
        assert_eq!(said.code, 0, "{args:?}: {said:?}");
        said.out
    }

    /// Starts a verb and leaves it running.
    pub(crate) fn spawn(&self, args: &[&str]) -> Running {
        let mut command = self.command(args);
        Running(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    }

    /// Starts a sandbox; gives its id.
    #[track_caller]
    pub(crate) fn start(&self, args: &[&str]) -> String {
        let out = self.ok(&[&["start"], args].concat());
        let id = out.strip_suffix('\n').unwrap();
        assert!(!id.is_empty() && id.bytes().all(|byte| byte.is_ascii_alphanumeric()), "{out:?}");
        id.to_owned()
    }

    pub(crate) fn inspect(&self, id: &str) -> Value {
        serde_json::from_str::<Value>(&self.ok(&["inspect", id])).unwrap()[0].take()
    }

    /// Kills a sandbox's shim, and its machine with it.
    pub(crate) fn kill_shim(&self, id: &str) {
        let pid = self.inspect(id)["state"]["shim_pid"].as_i64().unwrap();
        kill_process(Pid::from_raw(pid.try_into().unwrap()).unwrap(), Signal::KILL).unwrap();
    }

    pub(crate) fn folders(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.path("sandboxes")) else { return Vec::new() };
        let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
        names.filter(|name| name != ".lock").collect()
    }
}

impl Drop for Cli {
    fn drop(&mut self) {
        let ids = self.command(&["ls", "-aq"]).output().unwrap();
        let ids = String::from_utf8_lossy(&ids.stdout).into_owned();
        if !ids.is_empty() {
            let args: Vec<_> = ["rm", "-f"].into_iter().chain(ids.lines()).collect();
            let done = self.command(&args).output();
            eprintln!("the end of the sandboxes: {done:?}");
        }
    }
}

/// A verb that runs; dropped, it is killed.
pub(crate) struct Running(pub(crate) Child);

impl Running {
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.0)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Waits for the next line of its output.
    #[track_caller]
    pub(crate) fn line(out: &mut impl BufRead) -> String {
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        line
    }

    pub(crate) fn out(&mut self) -> BufReader<std::process::ChildStdout> {
        BufReader::new(self.0.stdout.take().unwrap())
    }

    /// Waits for its end, and gives what it said that nobody has read.
    #[track_caller]
    pub(crate) fn said(&mut self) -> Said {
        fn read(source: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<String> {
            std::thread::spawn(move || {
                let mut bytes = Vec::new();
                if let Some(mut source) = source {
                    source.read_to_end(&mut bytes).unwrap();
                }
                String::from_utf8_lossy(&bytes).into_owned()
            })
        }
        let (out, err) = (read(self.0.stdout.take()), read(self.0.stderr.take()));
        let code = self.wait();
        Said { code, out: out.join().unwrap(), err: err.join().unwrap() }
    }

    /// Its exit code, or 1000 + n for signal n.
    #[track_caller]
    pub(crate) fn wait(&mut self) -> i32 {
        use std::os::unix::process::ExitStatusExt;
        let begin = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code().unwrap_or_else(|| 1000 + status.signal().unwrap());
            }
            assert!(begin.elapsed() < DEADLINE, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[track_caller]
pub(crate) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < DEADLINE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_sandbox_from_start_to_rm() {
    let cli = Cli::new();
    let script = "echo out; echo err >&2; echo $A; while :; do read -r line < /tmp/pipe && echo $line; done";
    let id = cli.start(&[
        "--name",
        "web",
        "-l",
        "job=7",
        "-e",
        "A=from start",
        "--hostname",
        "box",
        "-w",
        "/tmp",
        "-u",
        "user",
        "e2e",
        "--",
        "sh",
        "-c",
        &format!("mkfifo /tmp/pipe; {script}"),
    ]);

    // Every way to name it means it.
    let folder = cli.path("sandboxes").join(&id);
    for name in [&id, &id[..10], "web", folder.to_str().unwrap()] {
        assert_eq!(cli.inspect(name)["id"], id.as_str());
    }
    let seen = cli.inspect("web");
    assert_eq!(
        (&seen["phase"], &seen["name"], &seen["template"]),
        (&"running".into(), &"web".into(), &"e2e".into())
    );
    assert_eq!(seen["labels"], serde_json::json!({"job": "7"}));
    let listed = cli.ok(&["ls"]);
    let lines: Vec<_> = listed.lines().collect();
    assert!(lines[0].starts_with("ID ") && lines.len() == 2, "{listed}");
    for part in [id.as_str(), "web", "e2e", "running", "job=7"] {
        assert!(lines[1].contains(part), "{listed}");
    }
    for (filter, fits) in [
        ("label=job=7", true),
        ("label=job", true),
        ("label=job=8", false),
        ("name=we", true),
        ("template=e2e", true),
        ("phase=ended", false),
    ] {
        let expected = if fits { format!("{id}\n") } else { String::new() };
        assert_eq!(cli.ok(&["ls", "-q", "--filter", filter]), expected, "{filter}");
    }

    // The command's output, with its streams apart; what comes later too.
    let mut following = cli.spawn(&["logs", "-f", "web"]);
    let mut lines = following.out();
    assert_eq!([Running::line(&mut lines), Running::line(&mut lines)], ["out\n", "from start\n"]);
    // It waits for a line, and ends with it.
    let processes: Value = serde_json::from_str(&cli.ok(&["ps", "--json", "web"])).unwrap();
    assert_eq!((&processes[0]["tag"], &processes[0]["command"][0]), (&"tiffin.main".into(), &"sh".into()));
    assert!(cli.ok(&["ps", "web"]).contains("tiffin.main"));
    cli.ok(&["exec", "web", "--", "sh", "-c", "echo later > /tmp/pipe"]);
    assert_eq!(Running::line(&mut lines), "later\n");
    let said = cli.run(&["logs", "web"]);
    assert_eq!((said.out.as_str(), said.err.as_str()), ("out\nfrom start\nlater\n", "err\n"));
    assert_eq!(cli.ok(&["logs", "--tail", "1", "web"]), "later\n");
    assert!(cli.ok(&["logs", "--shim", "web"]).contains("the sandbox's life goes on"));

    let stats: Value = serde_json::from_str(&cli.ok(&["stats", "--no-stream", "--json", "web"])).unwrap();
    for field in ["memory_used", "memory_total", "disk_used", "disk_total", "pids"] {
        assert!(stats[field].as_u64().is_some_and(|value| value > 0), "{field}: {stats}");
    }
    assert!(cli.ok(&["stats", "--no-stream"]).contains(&id));

    let debug = cli.ok(&["debug", "web"]);
    for part in [
        "=== sandbox.json",
        "=== console.log",
        "=== shim.log",
        "=== doctor.txt",
        "VmRSS:",
        "the agent answers",
    ] {
        assert!(debug.contains(part), "{part} is not in:\n{debug}");
    }
    assert!(!debug.contains("from start"), "a variable's value is in it");
    let bundle = cli.path("bundle.tar.gz");
    cli.ok(&["debug", "web", "--bundle", bundle.to_str().unwrap()]);
    let listed = Command::new("tar").arg("tzf").arg(&bundle).output().unwrap();
    assert!(String::from_utf8_lossy(&listed.stdout).contains("/sandbox.json"), "{listed:?}");

    // A name is taken as long as its folder is there.
    let said = cli.run(&["start", "--name", "web", "e2e"]);
    assert!(said.code == 125 && said.err.contains("is the name of"), "{said:?}");
    let said = cli.run(&["rm", "web"]);
    assert!(said.code == 1 && said.err.contains("stop it before you remove it"), "{said:?}");
    assert_eq!(cli.ok(&["stop", "-t", "5", "web", &id]), format!("web\n{id}\n"));
    assert_eq!(following.wait(), 1, "whoever follows learns of the end");
    assert_eq!(cli.ok(&["stop", "web"]), "web\n", "a second time is no error");
    assert_eq!(cli.ok(&["ls", "-q"]), "");
    assert_eq!(cli.ok(&["ls", "-aq"]), format!("{id}\n"));
    assert_eq!(cli.inspect("web")["end"], "stopped");
    assert!(cli.ok(&["logs", "--console", "web"]).is_ascii());
    let said = cli.run(&["logs", "web"]);
    assert!(said.code == 1 && said.err.contains("is ended") && said.err.contains("--console"), "{said:?}");
    assert_eq!(cli.ok(&["rm", "web"]), "web\n");
    assert_eq!(cli.folders(), [""; 0]);
}

#[test]
fn docker_s_codes_and_words_for_what_is_not_there() {
    let cli = Cli::new();
    for (args, code, words) in [
        (&["stop", "nope"][..], 1, "No such sandbox: nope"),
        (&["rm", "nope"], 1, "No such sandbox: nope"),
        (&["rm", "-f", "nope"], 0, "No such sandbox: nope"),
        (&["exec", "nope", "true"], 125, "No such sandbox: nope"),
        (&["logs", "nope"], 1, "No such sandbox: nope"),
        (&["ps", "nope"], 1, "No such sandbox"),
        (&["stats", "--no-stream", "nope"], 1, "No such sandbox"),
        (&["pause", "nope"], 1, "No such sandbox"),
        (&["resume", "nope"], 1, "No such sandbox"),
        (&["snapshot", "nope", "new"], 1, "No such sandbox"),
        (&["fork", "nope"], 1, "No such sandbox"),
        (&["configure", "nope"], 1, "No such sandbox"),
        (&["port-forward", "nope", "80"], 1, "No such sandbox"),
        (&["debug", "nope"], 1, "No such sandbox"),
        (&["cp", "nope:/x", "."], 1, "No such sandbox"),
        (&["cp", "./x", "./y"], 1, "neither SRC nor DST is in a sandbox"),
        (&["inspect", "./nope"], 1, "is no sandbox's folder"),
        (&["start", "nope"], 125, "no template \"nope\""),
        (&["start", "--novel", "e2e"], 2, "--novel"),
        (&["start", "--timeout", "soon", "e2e"], 2, "1h30m"),
        (&["exec", "nope"], 2, "COMMAND"),
        (&["port-forward", "x", "a:b"], 2, "[[BIND:]LOCAL:]REMOTE"),
    ] {
        let said = cli.run(args);
        assert!(said.code == code && said.err.contains(words), "{args:?}: {said:?}");
    }
    assert_eq!(cli.run(&["inspect", "nope"]).out, "[]\n");
    assert_eq!(cli.ok(&["ls", "--json"]), "[]\n");
    assert_eq!(cli.folders(), [""; 0]);
}

#[test]
fn a_start_that_fails_says_why_and_leaves_no_folder() {
    let cli = Cli::new();
    for (args, code, words) in [
        (&["e2e", "--", "/no/such"][..], 127, "No such file"),
        (&["e2e", "--", "/etc/passwd"], 126, "Permission denied"),
        (&["--kernel", "/nonexistent", "e2e"], 125, "/nonexistent"),
        (&["--boot-timeout", "1", "--kernel", "/bin/true", "e2e"], 125, ""),
        (&["--entrypoint", "/bin/sh", "e2e", "--", "-c", "true"], 0, ""),
    ] {
        let said = cli.run(&[&["start"], args].concat());
        assert!(said.code == code && said.err.contains(words), "{args:?}: {said:?}");
        let left = cli.folders().len();
        assert_eq!(left, usize::from(code == 0), "{args:?}: {:?}", cli.folders());
    }
}

#[test]
fn a_start_that_is_interrupted_leaves_nothing() {
    for signal in [Signal::INT, Signal::TERM] {
        let cli = Cli::new();
        let mut starting = cli.spawn(&["start", "e2e"]);
        // Its machine boots.
        until("a VMM runs", || {
            let state = cli.folders().first().map(|id| cli.path("sandboxes").join(id).join("state.json"));
            state.is_some_and(|state| {
                std::fs::read_to_string(state).is_ok_and(|text| text.contains("vmm_pid"))
            })
        });
        let processes = || e2e::TestSandbox::processes_of(&cli.path("sandboxes"));
        starting.signal(signal);
        let said = starting.said();
        // It may have been ready by then.
        if said.code == 125 {
            assert!(said.err.contains("interrupted"), "{said:?}");
            assert_eq!(cli.folders(), [""; 0]);
            until("every process is gone", || processes().is_empty());
        } else {
            assert_eq!(said.code, 0, "{said:?}");
        }
    }
}

#[test]
fn rm_at_start_takes_the_folder_with_the_sandbox() {
    let cli = Cli::new();
    let id = cli.start(&["--rm", "e2e"]);
    let said = cli.run(&["pause", &id]);
    assert!(said.code == 1 && said.err.contains("nothing would be left"), "{said:?}");
    cli.ok(&["stop", "-t", "0", &id]);
    assert_eq!(cli.folders(), [""; 0]);
    let id = cli.start(&["--rm", "e2e"]);
    cli.kill_shim(&id);
    until("a killed one is swept", || cli.folders().is_empty());
}

#[test]
fn a_killed_sandbox_is_told_and_removed() {
    let cli = Cli::new();
    let id = cli.start(&["e2e"]);
    cli.kill_shim(&id);
    until("its end is noted", || cli.inspect(&id)["phase"] == "ended");
    assert_eq!(cli.inspect(&id)["end"], "its host-shim was killed");
    assert_eq!(cli.ok(&["stop", &id]), format!("{id}\n"));
    assert_eq!(cli.ok(&["rm", &id]), format!("{id}\n"));
    let id = cli.start(&["e2e"]);
    assert_eq!(cli.ok(&["rm", "-f", &id]), format!("{id}\n"), "a running one");
    assert_eq!(cli.folders(), [""; 0]);
}

#[test]
fn the_tab_key_completes_ids_and_templates() {
    let cli = Cli::new();
    let id = cli.start(&["--name", "web", "e2e"]);
    let complete = |words: &[&str]| {
        let mut command = cli.command(&[&["--"], words].concat());
        command.env("HOST_SHIM_COMPLETE", "bash").env("_CLAP_IFS", "\n");
        let output = command.env("_CLAP_COMPLETE_INDEX", (words.len() - 1).to_string()).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    for words in [&["host-shim", "exec", ""][..], &["host-shim", "stop", ""], &["host-shim", "rm", "-f", ""]]
    {
        let found = complete(words);
        assert!(found.lines().any(|line| line == id) && found.lines().any(|line| line == "web"), "{found}");
    }
    assert_eq!(complete(&["host-shim", "exec", "we"]), "web");
    assert!(complete(&["host-shim", "start", "e2"]).lines().any(|line| line == "e2e"));
    assert!(complete(&["host-shim", "port-"]).contains("port-forward"));
    for shell in ["bash", "zsh", "fish"] {
        let script = cli.ok(&["completions", shell]);
        assert!(script.contains("HOST_SHIM_COMPLETE"), "{script}");
    }
    let script = cli.path("script");
    std::fs::write(&script, cli.ok(&["completions", "bash"])).unwrap();
    assert!(Command::new("bash").arg("-n").arg(&script).status().unwrap().success());
}

/// The high-water mark of a process's memory, in KiB.
pub(crate) fn peak_kib(pid: Pid) -> u64 {
    let status = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
