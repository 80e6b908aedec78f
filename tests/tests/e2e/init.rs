//! What can be PID 1 of the container.

use e2e::{Channel, DEADLINE, TestSandbox, TestSandboxBuilder, made};
use envd_proto::process::{ProcessConfig, StartRequest};
use sandbox_folder::client::{Output, Process};

fn systemd() -> TestSandboxBuilder {
    let template = made("TIFFIN_E2E_DATA").join("templates/systemd");
    TestSandbox::of(Channel::Serial).set("template", template.to_str().unwrap()).set("init", "image")
}

/// systemd answers once its socket is there; a client can be quicker.
const BOOTED: &str = "until [ -S /run/systemd/private ] && [ -S /run/dbus/system_bus_socket ]; do sleep 0.1; done; \
                      systemctl is-system-running --wait";

async fn start(sandbox: &TestSandbox, command: &str, arguments: &[&str]) -> Process {
    let config = ProcessConfig {
        cmd: command.into(),
        args: arguments.iter().map(|&argument| argument.to_owned()).collect(),
        ..Default::default()
    };
    let request = StartRequest { process: Some(config), ..Default::default() };
    sandbox.client().start(request).await.unwrap()
}

/// A process whose end was seen and whose status died with the spawner: told once, as an unknown end.
async fn lost(mut process: Process) {
    let end = tokio::time::timeout(DEADLINE, process.next()).await.expect("its end is seen");
    let error = end.unwrap_err().to_string();
    assert!(error.contains("spawner died"), "{error}");
}

/// Stops it; its init ends by itself when it is asked to.
async fn stopped_in_order(sandbox: TestSandbox) {
    let console = sandbox.dir().join("console.log");
    rustix::process::kill_process(sandbox.shim(), rustix::process::Signal::TERM).unwrap();
    let mut printed = String::new();
    let (status, said) = sandbox.ended_keeping(|| printed = std::fs::read_to_string(console).unwrap()).await;
    assert!(status.success(), "{said}");
    assert!(!printed.contains("did not end"), "{printed}");
}

#[tokio::test]
async fn systemd_boots_starts_units_and_stops_in_order() {
    let sandbox = systemd().start().await;
    let state = sandbox.sh(BOOTED).await;
    let state = String::from_utf8(state.stdout).unwrap();
    assert!(["running", "degraded"].contains(&state.trim_end()), "{state}");
    assert_eq!(
        sandbox.stdout("cat /proc/1/comm; systemd-detect-virt --container").await,
        "systemd\ncontainer-other\n"
    );

    let unit = "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/sh -c 'echo from the unit; cat /proc/self/cgroup > /run/hello'\n\
                ExecStop=/bin/sh -c 'echo stopped > /srv/data/stopped; sync'\n";
    sandbox.client().write_file("/etc/systemd/system/hello.service", unit.as_bytes().to_vec()).await.unwrap();
    assert_eq!(
        sandbox.stdout("systemctl daemon-reload && systemctl start hello && systemctl is-active hello && cat /run/hello").await,
        "active\n0::/system.slice/hello.service\n"
    );
    let journal = sandbox.stdout("journalctl --sync; journalctl -u hello -o cat --no-pager").await;
    assert!(journal.contains("from the unit"), "{journal}");
    // What clients start lives beside what systemd manages.
    assert_eq!(sandbox.stdout("cat /proc/self/cgroup").await, "0::/../user\n");

    stopped_in_order(sandbox).await;
}

#[tokio::test]
async fn a_spawner_that_is_killed_is_made_again() {
    let sandbox = systemd().start().await;
    let client = sandbox.client();
    let sleeper = start(&sandbox, "/bin/sleep", &["1000"]).await;
    // Survives the spawner: a process that is not killed with it.
    let mut spared = start(&sandbox, "/bin/sh", &["-c", "sleep 5; echo end"]).await;
    assert_eq!(client.processes().await.unwrap().len(), 2);
    for round in 0..3 {
        // The spawner is the parent of what clients start.
        let killed = tokio::time::timeout(
            DEADLINE,
            start(&sandbox, "/bin/sh", &["-c", "kill -9 $PPID"]).await.output(),
        );
        // Its own end, or that its status is lost.
        drop(killed.await.expect("the call ends"));
        assert_eq!(sandbox.stdout("echo again").await, "again\n", "round {round}");
    }
    assert_eq!(spared.next().await.unwrap(), Output::Stdout("end\n".into()));
    lost(spared).await;

    // Everything but PID 1 and the killer, the spawner too.
    let killer = start(&sandbox, "/bin/sh", &["-c", "kill -9 -1"]).await;
    drop(tokio::time::timeout(DEADLINE, killer.output()).await.expect("the call ends"));
    lost(sleeper).await;
    assert_eq!(sandbox.stdout("echo alive; cat /proc/1/comm").await, "alive\nsystemd\n");
    assert!(client.processes().await.unwrap().is_empty());
    sandbox.stop().await;
}

#[tokio::test]
async fn a_path_names_the_init() {
    let sandbox = TestSandbox::of(Channel::Serial).set("init", "/bin/init").start().await;
    assert_eq!(
        sandbox.stdout("cat /proc/1/comm; tr '\\0' '\\n' < /proc/1/environ | grep container").await,
        "init\ncontainer=tiffin\n"
    );
    stopped_in_order(sandbox).await;
}

#[tokio::test]
async fn restricted_holds_below_an_init_of_the_image() {
    let sandbox =
        TestSandbox::of(Channel::Serial).set("init", "/bin/init").set("profile", "restricted").start().await;
    for pid in ["1", "self"] {
        let status = sandbox.stdout(&format!("cat /proc/{pid}/status")).await;
        for line in
            ["CapEff:\t00000000a80425fb", "CapBnd:\t00000000a80425fb", "NoNewPrivs:\t1", "Seccomp:\t2"]
        {
            assert!(status.lines().any(|found| found == line), "{pid}: no '{line}' in {status}");
        }
    }
    assert_ne!(sandbox.sh("mount -t tmpfs none /tmp").await.exit.code(), 0);
    assert_ne!(sandbox.sh("mknod /tmp/disk b 254 16").await.exit.code(), 0);
    // The spawner, which has no filter, cannot be looked into.
    assert_ne!(sandbox.sh("head -c 1 /proc/$PPID/environ").await.exit.code(), 0);
    sandbox.stop().await;
}

#[tokio::test]
async fn an_init_that_is_not_there_is_told_with_what_to_do() {
    for (init, expected) in [
        (
            "image",
            "container: init /sbin/init: not a program of the image: No such file or directory (os error 2); install",
        ),
        ("/nope", "container: init /nope: not a program of the image"),
        ("/etc/passwd", "it is not executable"),
        ("/etc", "expected a file"),
    ] {
        let Err(said) = TestSandbox::of(Channel::Serial).set("init", init).try_start().await else {
            panic!("{init} started");
        };
        assert!(said.contains(expected), "{init}: {said}");
    }
}
