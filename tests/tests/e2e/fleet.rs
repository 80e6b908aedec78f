//! The gateway's fleet with real machines: made, found again by the next gateway, ended.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use e2e::{DEADLINE, TestSandbox, binary, made};
use rustix::process::{Pid, Signal, kill_process};
use template::DataDir;
use tiffin_gateway::config::{Capacity, Config};
use tiffin_gateway::fleet::{Fleet, NewSandbox, Sandbox};
use tiffin_gateway::operator;

/// A data folder with the templates of all tests.
struct Host(tempfile::TempDir);

impl Host {
    fn new() -> Self {
        let host = Self(tempfile::Builder::new().prefix("fleet").tempdir_in("/tmp").unwrap());
        // What was found out about this machine is shared too.
        for shared in ["templates", "cache"] {
            std::os::unix::fs::symlink(made("TIFFIN_E2E_DATA").join(shared), host.0.path().join(shared))
                .unwrap();
        }
        host
    }

    fn data(&self) -> DataDir {
        DataDir::resolve(Some(self.0.path())).unwrap()
    }

    async fn open(&self) -> Arc<Fleet> {
        let config = Config {
            listen: "127.0.0.1:0".parse().unwrap(),
            domain: "localhost".into(),
            data: self.data(),
            host_shim: binary("host-shim"),
            image_builder: PathBuf::new(),
            kernel: Some(made("TIFFIN_KERNEL")),
            guest_image: Some(made("TIFFIN_GUEST_IMAGE")),
            channel: Default::default(),
            allow_emulation: true,
            builds: Default::default(),
            capacity: Capacity::UNLIMITED,
        };
        Fleet::open(config, operator::open_store(&self.data()).unwrap()).await.unwrap()
    }

    async fn create(&self, fleet: &Fleet) -> Arc<Sandbox> {
        let team = operator::default_team(&operator::open_store(&self.data()).unwrap()).await.unwrap();
        let request = NewSandbox {
            template: "e2e".into(),
            timeout: Duration::from_secs(3600),
            metadata: Default::default(),
            env: [("A".to_owned(), "1".to_owned())].into(),
            secure: true,
            public_traffic: true,
            life: Default::default(),
        };
        fleet.create(&team, request).await.unwrap()
    }

    fn assert_nothing_left(&self) {
        assert_eq!(TestSandbox::processes_of(self.0.path()), [0; 0], "processes are left");
        assert_eq!(std::fs::read_dir(self.data().sandboxes()).unwrap().count(), 0, "folders are left");
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // After a failure: machines end with their shims.
        for pid in TestSandbox::processes_of(self.0.path()) {
            let _ = Pid::from_raw(pid).map(|pid| kill_process(pid, Signal::KILL));
        }
    }
}

async fn in_time<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, work).await.expect("it ends")
}

async fn stdout(sandbox: &Sandbox, script: &str) -> String {
    let client = sandbox.client();
    let done = in_time(client.output("/bin/sh", ["-c", script])).await.unwrap();
    String::from_utf8(done.stdout).unwrap()
}

fn pid(sandbox: &Sandbox, field: &str) -> Pid {
    let state = std::fs::read(sandbox.dir.join("state.json")).unwrap();
    let state: serde_json::Value = serde_json::from_slice(&state).unwrap();
    Pid::from_raw(i32::try_from(state[field].as_i64().unwrap()).unwrap()).unwrap()
}

#[test]
fn a_machine_outlives_its_gateway() {
    let host = Host::new();
    let first = tokio::runtime::Runtime::new().unwrap();
    let id = first.block_on(async {
        let fleet = host.open().await;
        let start = Instant::now();
        let sandbox = in_time(host.create(&fleet)).await;
        eprintln!("create: {:?}", start.elapsed());
        let said =
            stdout(&sandbox, "echo $A $E2B_SANDBOX $E2B_SANDBOX_ID $E2B_TEMPLATE_ID; echo kept > /tmp/note")
                .await;
        assert_eq!(said, format!("1 true {} e2e\n", sandbox.id()));
        let shim = pid(&sandbox, "shim_pid");
        assert_eq!(rustix::process::getsid(Some(shim)).unwrap(), shim, "a session of its own");
        sandbox.id().clone()
    });
    // As kill -9 does: nothing of it runs on.
    first.shutdown_timeout(DEADLINE);
    let second = tokio::runtime::Runtime::new().unwrap();
    second.block_on(async {
        let fleet = host.open().await;
        let sandbox = fleet.get(&id).expect("it is found again");
        assert_eq!(stdout(&sandbox, "cat /tmp/note").await, "kept\n");
        let start = Instant::now();
        assert!(in_time(fleet.kill(&id)).await.unwrap());
        eprintln!("kill: {:?}", start.elapsed());
        host.assert_nothing_left();
    });
}

#[tokio::test]
async fn a_machine_that_ends_by_itself_is_forgotten() {
    let host = Host::new();
    let fleet = host.open().await;
    let sandbox = in_time(host.create(&fleet)).await;
    kill_process(pid(&sandbox, "vmm_pid"), Signal::KILL).unwrap();
    in_time(sandbox.gone()).await;
    host.assert_nothing_left();

    let sandbox = in_time(host.create(&fleet)).await;
    // Its connection ends with the machine.
    let _ = in_time(sandbox.client().output("/bin/sh", ["-c", "poweroff -f; sleep 1000"])).await;
    in_time(sandbox.gone()).await;
    assert!(fleet.all().is_empty());
    host.assert_nothing_left();
}
