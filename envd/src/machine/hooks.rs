//! The image's hooks on a clone's resume: executable files of /etc/tiffin/resume.d, in lexical order, as root.
//!
//! They run before the thaw, so that the tenant's programs find everything renewed. One that fails or hangs is told and
//! does not stop the resume: an image must not be able to make its sandboxes unusable by accident.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use envd_proto::control::resumed::Hook;

use super::program::Program;
use crate::sandbox::Sandbox;

const FOLDER: &str = "/etc/tiffin/resume.d";

/// Hooks of an image; more are not run.
const MAX_HOOKS: usize = 64;

/// How long one hook has, and all together.
const HOOK_DEADLINE: Duration = Duration::from_secs(10);
const ALL_DEADLINE: Duration = Duration::from_secs(30);

/// How long the listing of the folder has: it may be on a file system whose server is frozen.
const LIST_DEADLINE: Duration = Duration::from_secs(5);

/// Runs them all; what happened to each.
pub(super) async fn run(sandbox: &Sandbox, env: &[String]) -> Vec<Hook> {
    run_in(sandbox, FOLDER, env, HOOK_DEADLINE, ALL_DEADLINE).await
}

async fn run_in(
    sandbox: &Sandbox,
    folder: &'static str,
    env: &[String],
    each: Duration,
    all: Duration,
) -> Vec<Hook> {
    let listed = tokio::time::timeout(LIST_DEADLINE, sandbox.root().run(move || list(folder))).await;
    let names = match listed {
        Ok(Ok(names)) => names,
        Ok(Err(error)) => return vec![told(folder, error.to_string(), Duration::ZERO)],
        Err(_) => return vec![told(folder, "it could not be listed in time".to_owned(), LIST_DEADLINE)],
    };
    let begin = Instant::now();
    let mut hooks = Vec::new();
    for name in names {
        let left = all.saturating_sub(begin.elapsed());
        if left.is_zero() {
            let error = format!("not run: the hooks before it took longer than {} s", all.as_secs_f32());
            hooks.push(told(&name, error, Duration::ZERO));
            continue;
        }
        let program = Program {
            path: format!("{folder}/{name}"),
            arguments: Vec::new(),
            env: env.to_vec(),
            deadline: each.min(left),
            low_priority: false,
        };
        let start = Instant::now();
        let error = program.run(sandbox).await.err().unwrap_or_default();
        hooks.push(told(&name, error, start.elapsed()));
    }
    hooks
}

fn told(name: &str, error: String, duration: Duration) -> Hook {
    if !error.is_empty() {
        crate::log::warn(format_args!("resume hook {name}: {error}"));
    }
    let duration_ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    Hook { name: name.to_owned(), error, duration_ms }
}

fn list(folder: &str) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    match fs::read_dir(folder) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
        Err(error) => return Err(error),
        Ok(entries) => {
            for entry in entries {
                let entry = entry?;
                // Links are followed, as run-parts does; names that are no text are nobody's hooks.
                let (Ok(name), Ok(metadata)) = (entry.file_name().into_string(), fs::metadata(entry.path()))
                else {
                    continue;
                };
                if metadata.is_file() && metadata.permissions().mode() & 0o111 != 0 {
                    names.push(name);
                }
            }
        }
    }
    names.sort_unstable();
    names.truncate(MAX_HOOKS);
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::root::Root;
    use crate::spawner::{Spawner, child};
    use std::process::{Child, Command, Stdio};

    struct Killed(Child);

    impl Drop for Killed {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// A spawner wants a process where no other thread takes its SIGCHLD: this test's own program, with the signal blocked
    /// in all of its threads.
    fn spawner() -> (Killed, Spawner) {
        let (agent, socket) = Spawner::socketpair().unwrap();
        let this = std::env::current_exe().unwrap();
        let name = "machine::hooks::tests::no_test_but_the_spawner_of_one";
        let child = Command::new("env")
            .arg("--block-signal=CHLD")
            .arg(this)
            .args(["--exact", name, "--ignored", "--test-threads=1"])
            .stdin(Stdio::from(socket))
            .stdout(Stdio::null())
            .spawn();
        (Killed(child.unwrap()), Spawner::connect(agent).unwrap())
    }

    #[test]
    #[ignore = "no test: the spawner of the test below"]
    fn no_test_but_the_spawner_of_one() {
        child().unwrap();
    }

    #[tokio::test]
    async fn hooks_run_in_order_and_one_that_fails_or_hangs_is_told() {
        let (_child, spawner) = spawner();
        let sandbox = Sandbox::new(Root::own(), spawner, None);
        let folder = tempfile::tempdir().unwrap();
        let script = |name: &str, text: &str, mode: u32| {
            let path = folder.path().join(name);
            fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        let log = folder.path().join("log");
        script("20-second", &format!("echo $TIFFIN_GENERATION >> {}; exit 3", log.display()), 0o755);
        script("10-first", &format!("echo first >> {}; echo output", log.display()), 0o755);
        script("30-hangs", "while :; do sleep 1; done", 0o755);
        script("15-not-executable", "exit 1", 0o644);
        script("40-last", &format!("echo last >> {}", log.display()), 0o755);
        let leaked: &'static str = Box::leak(folder.path().display().to_string().into_boxed_str());
        let env = ["TIFFIN_GENERATION=7".to_owned()];
        let each = Duration::from_secs(3);
        let hooks = run_in(&sandbox, leaked, &env, each, Duration::from_secs(60)).await;
        let told: Vec<_> = hooks.iter().map(|hook| (hook.name.as_str(), hook.error.as_str())).collect();
        assert_eq!(
            told,
            [
                ("10-first", ""),
                ("20-second", "exit status: 3"),
                ("30-hangs", "killed: it ran longer than 3 s"),
                ("40-last", ""),
            ]
        );
        assert_eq!(fs::read_to_string(&log).unwrap(), "first\n7\nlast\n");
        assert!(hooks[2].duration_ms >= 3000);
        // What is not there are no hooks.
        assert_eq!(run_in(&sandbox, "/nonexistent/resume.d", &env, each, each).await, vec![]);
    }
}
