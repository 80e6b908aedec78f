//! Nothing is left after the end, whichever it was.

use std::path::Path;

use e2e::{Channel, DEADLINE, TestSandbox};

/// Waits for a condition that another process brings about.
async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    if tokio::time::timeout(DEADLINE, waiting).await.is_err() {
        panic!("{what}: not within {DEADLINE:?}");
    }
}

fn left_in(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.ends_with(".sock") || name.contains("scratch") || name == "vmm")
        .collect()
}

#[tokio::test]
async fn a_stop_leaves_no_process_and_no_socket() {
    for channel in Channel::ALL {
        let sandbox = TestSandbox::start(channel).await;
        let (dir, vmm) = (sandbox.dir(), sandbox.vmm());
        // A process that does not listen to SIGTERM does not stand in the way.
        let stubborn =
            sandbox.sh("sh -c 'trap \"\" TERM; while :; do sleep 1; done' >/dev/null 2>&1 &").await;
        assert_eq!(stubborn.exit.code(), 0);
        let folder = tempfile::tempdir().unwrap();
        let kept = folder.path().join("kept");
        std::fs::create_dir(&kept).unwrap();
        let state = sandbox.state();
        assert_eq!(state["vmm_pid"].as_i64(), Some(i64::from(vmm.as_raw_nonzero().get())));
        let (status, said) = sandbox_stop_keeping(sandbox, &kept).await;
        assert!(status.success(), "{said}");
        assert_eq!(left_in(&kept), Vec::<String>::new());
        assert!(TestSandbox::processes_of(&dir).is_empty());
        assert!(rustix::process::test_kill_process(vmm).is_err(), "the VMM is still there");
    }
}

/// Stops a sandbox and copies the names in its folder before the test's own clean-up removes it.
async fn sandbox_stop_keeping(sandbox: TestSandbox, kept: &Path) -> (std::process::ExitStatus, String) {
    let dir = sandbox.dir();
    rustix::process::kill_process(sandbox.shim(), rustix::process::Signal::TERM).unwrap();
    let stopped = sandbox.ended_keeping(|| {
        for entry in std::fs::read_dir(&dir).unwrap().flatten() {
            std::fs::write(kept.join(entry.file_name()), b"").unwrap();
        }
    });
    stopped.await
}

#[tokio::test]
async fn a_killed_shim_takes_everything_with_it() {
    for channel in Channel::ALL {
        let sandbox = TestSandbox::start(channel).await;
        let (dir, vmm) = (sandbox.dir(), sandbox.vmm());
        rustix::process::kill_process(sandbox.shim(), rustix::process::Signal::KILL).unwrap();
        eventually("the VMM dies with its shim", || rustix::process::test_kill_process(vmm).is_err()).await;
        eventually("no process is left", || TestSandbox::processes_of(&dir).is_empty()).await;
        eventually("no socket or disk is left", || left_in(&dir).is_empty()).await;
        drop(sandbox);
    }
}
