//! A rehearsal, with the agent's own binary as the spawner.

use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use envd::machine::{Acts, Machine};
use envd::root::Root;
use envd::sandbox::Sandbox;
use envd::spawner::{self, Spawner};
use envd_proto::control::{Configure, error::Code};

/// There only to catch a hang.
const DEADLINE: Duration = Duration::from_secs(60);

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A machine whose spawner is started by `command`, with the spawner's socket as its standard input.
fn machine(command: &mut Command) -> (Killed, Machine) {
    let (agent, socket) = Spawner::socketpair().unwrap();
    let child = command.stdin(Stdio::from(socket)).stdout(Stdio::null()).spawn().unwrap();
    (Killed(child), machine_of(agent))
}

fn machine_of(agent: OwnedFd) -> Machine {
    Machine::new(Sandbox::new(Root::own(), Spawner::connect(agent).unwrap(), None))
}

#[tokio::test]
async fn the_agents_own_binary_runs_in_a_sandbox_that_is_nobodys() {
    let (_spawner, machine) = machine(Command::new(env!("CARGO_BIN_EXE_envd")).arg(spawner::CHILD));
    for _ in 0..3 {
        let done = tokio::time::timeout(DEADLINE, machine.rehearse()).await.unwrap().unwrap();
        assert_eq!(done.not_executed, "");
        assert!(done.duration_us > 0);
    }
    assert!(machine.sandbox().session().is_none(), "it is still nobody's");
    // Whoever owns it has no part in it: not the user, not the environment.
    let owner = Configure {
        default_user: "nobody-of-this-name".into(),
        env: [("PATH".into(), "/nonexistent".into())].into(),
        access_token: Some("secret".into()),
        ..Configure::default()
    };
    machine.sandbox().configure(owner).unwrap();
    assert_eq!(machine.rehearse().await.unwrap().not_executed, "");
}

#[tokio::test]
async fn what_cannot_be_executed_is_told_and_is_no_error() {
    let folder = tempfile::tempdir().unwrap();
    let binary = folder.path().join("envd");
    std::fs::copy(env!("CARGO_BIN_EXE_envd"), &binary).unwrap();
    let (_spawner, machine) = machine(Command::new(&binary).arg(spawner::CHILD));
    assert_eq!(machine.rehearse().await.unwrap().not_executed, "");
    std::fs::set_permissions(&binary, std::fs::Permissions::from_mode(0o400)).unwrap();
    let done = tokio::time::timeout(DEADLINE, machine.rehearse()).await.unwrap().unwrap();
    assert!(done.not_executed.ends_with("Permission denied (os error 13)"), "{done:?}");
}

#[tokio::test]
async fn a_spawner_that_is_gone_is_an_error_and_harms_nothing() {
    let (agent, socket) = Spawner::socketpair().unwrap();
    let machine = machine_of(agent);
    drop(socket);
    let refusal = tokio::time::timeout(DEADLINE, machine.rehearse()).await.unwrap().unwrap_err();
    assert_eq!(refusal.code, Code::Internal);
    assert!(refusal.message.contains("the rehearsal: "), "{refusal}");
    let sandbox: &Arc<Sandbox> = machine.sandbox();
    assert!(sandbox.session().is_none());
}
