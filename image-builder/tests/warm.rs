//! `template create` and the snapshot of the template, with a script in host-shim's place.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// An installation of image-builder, beside which a script can be put, and an image of one file.
struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    /// `None`, with the reason on stderr, where this machine cannot build.
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: builds mount overlays, which needs root");
            return None;
        }
        // Not on /tmp, which may be a tmpfs without the attributes that overlayfs needs.
        let dir = tempfile::Builder::new().prefix("warm-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let host = Self { dir };
        fs::create_dir(host.path("bin")).unwrap();
        fs::create_dir(host.path("context")).unwrap();
        // What is built beside the real one must not be found.
        fs::hard_link(env!("CARGO_BIN_EXE_image-builder"), host.path("bin/image-builder")).unwrap();
        fs::write(host.path("context/Dockerfile"), "FROM scratch\nCOPY file /file\n").unwrap();
        fs::write(host.path("context/file"), "contents").unwrap();
        let built = host.command(&["build", "-t", "app", host.path("context").to_str().unwrap()]).output();
        let built = built.unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        Some(host)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// Puts a script beside image-builder that writes down how it was called.
    fn shim(&self, script: &str) {
        let path = self.path("bin/host-shim");
        let calls = self.path("calls");
        fs::write(&path, format!("#!/bin/sh\necho \"$*\" >> {}\n{script}", calls.display())).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.path("bin/image-builder"));
        command.arg("--data-dir").arg(self.path("data")).args(arguments).stdin(Stdio::null());
        for variable in ["TIFFIN_KERNEL", "TIFFIN_GUEST_IMAGE", "TIFFIN_HOST_SHIM"] {
            command.env_remove(variable);
        }
        // The system's alone: an installed host-shim must not be found either.
        command.env("PATH", "/usr/bin:/bin");
        command
    }

    fn create(&self, options: &[&str]) -> Output {
        let create = ["template", "create", "app", "--image", "app", "--json"];
        self.command(&[&create, options].concat()).output().unwrap()
    }

    fn template_is_there(&self) -> bool {
        self.path("data/templates/app/template.json").exists()
    }
}

#[track_caller]
fn done(output: &Output) -> (Value, String) {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{stderr}");
    (serde_json::from_slice(&output.stdout).unwrap(), stderr)
}

#[track_caller]
fn failure(output: &Output, code: i32) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(output.stdout.is_empty());
    stderr
}

const NOTE: &str = "note: the template has no snapshot, its sandboxes will boot: ";

#[test]
fn a_template_gets_its_snapshot_and_its_cost_is_told() {
    let Some(host) = Host::new() else { return };
    host.shim(
        r#"echo "host-shim: note: something to know" >&2
echo '{"template":"/t","snapshot":"/t/snapshots/s","stopped_ms":12.5,"ram_bytes":3145728,"disk_bytes":4096,"phases":[{"name":"boot","ms":900.0}]}'"#,
    );
    fs::write(host.path("vmlinux"), "kernel").unwrap();
    let (made, said) = done(&host.create(&["--kernel", host.path("vmlinux").to_str().unwrap()]));
    let expected = json!({
        "path": "/t/snapshots/s", "stopped_ms": 12.5, "ram_bytes": 3 << 20, "disk_bytes": 4096,
        "phases": [{ "name": "boot", "ms": 900.0 }],
    });
    assert_eq!(made["snapshot"], expected);
    assert!(made.get("no_snapshot").is_none() && said.contains("note: something to know"), "{said}");
    let (data, kernel) = (host.path("data"), host.path("vmlinux"));
    let (data, kernel) = (data.display(), kernel.display());
    let call = format!("template warm --json --data-dir {data} --kernel {kernel} {data}/templates/app\n");
    assert_eq!(host.text("calls"), call);
    let create = ["template", "create", "app", "--image", "app"];
    let shown = host.command(&create).output().unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.ends_with("\nsnapshot /t/snapshots/s (3 MiB of RAM)\n"), "{shown}");
}

#[test]
fn where_sandboxes_cannot_run_it_is_told_and_only_always_fails() {
    let Some(host) = Host::new() else { return };
    let (made, said) = done(&host.create(&[]));
    let missing = "host-shim is missing: looked beside image-builder and in PATH; name it with --host-shim";
    assert_eq!((&made["snapshot"], made["no_snapshot"].as_str()), (&Value::Null, Some(missing)));
    assert!(said.ends_with(&format!("{NOTE}{missing}\n")), "{said}");
    failure(&host.create(&["--snapshot", "always"]), 1);

    host.shim("echo 'host-shim: qemu-system-x86_64 is missing: install it' >&2; exit 4");
    let (made, said) = done(&host.create(&[]));
    assert_eq!(made["no_snapshot"], "qemu-system-x86_64 is missing: install it");
    assert!(said.ends_with(&format!("{NOTE}qemu-system-x86_64 is missing: install it\n")), "{said}");
    let said = failure(&host.create(&["--snapshot", "always"]), 1);
    assert!(said.contains("could not be made: qemu-system-x86_64 is missing: install it\n"), "{said}");
    assert!(host.template_is_there());

    fs::remove_file(host.path("calls")).unwrap();
    let (made, said) = done(&host.create(&["--snapshot", "never"]));
    assert_eq!((&made["snapshot"], made["no_snapshot"].as_str()), (&Value::Null, Some("--snapshot never")));
    assert!(!said.contains("no snapshot") && !host.path("calls").exists(), "{said}");
}

#[test]
fn a_machine_or_a_command_that_fails_is_told_in_its_words_and_the_template_stays() {
    let Some(host) = Host::new() else { return };
    for (script, expected) in [
        (
            "printf 'host-shim: the start command ended with 7:\\nno such module\\n' >&2; exit 1",
            "the start command ended with 7:\nno such module\n",
        ),
        ("exit 1", "host-shim ended with exit code 1\n"),
        ("kill -9 $$", "host-shim was ended by a signal\n"),
        (
            "echo '{\"ready\":true}'",
            "host-shim said \"{\\\"ready\\\":true}\", expected its result: missing field",
        ),
    ] {
        host.shim(script);
        for choice in ["auto", "always"] {
            let said = failure(&host.create(&["--snapshot", choice]), 1);
            let path = host.path("data/templates/app");
            let start = format!(
                "image-builder: the template {} was made and stays, but its snapshot could not be made: ",
                path.display()
            );
            assert!(said.contains(&(start + expected)), "{said}");
            assert!(said.ends_with("`host-shim template warm` tries again; --snapshot never does without\n"));
            assert!(host.template_is_there());
        }
    }
    // Endless words are no reason to grow.
    host.shim("head -c 20000000 /dev/zero | tr '\\0' 'x' >&2; exit 1");
    let said = failure(&host.create(&[]), 1);
    assert!(said.len() < 64 << 10, "{}", said.len());
}

#[test]
fn what_is_named_is_used_or_refused() {
    let Some(host) = Host::new() else { return };
    let named = host.path("elsewhere");
    let options = ["--host-shim", named.to_str().unwrap()];
    let said = failure(&host.create(&options), 2);
    assert!(said.contains("elsewhere: that is no executable file") && !host.template_is_there(), "{said}");
    host.shim("exit 4");
    fs::rename(host.path("bin/host-shim"), &named).unwrap();
    done(&host.create(&options));
    assert_eq!(host.text("calls").lines().count(), 1);
    fs::write(host.path("bin/host-shim"), "not executable").unwrap();
    let (made, _) = done(&host.create(&[]));
    assert!(made["no_snapshot"].as_str().unwrap().starts_with("host-shim is missing"), "{made}");
}

#[test]
fn an_interrupt_ends_host_shim_and_keeps_the_template() {
    let Some(host) = Host::new() else { return };
    // It says that it runs by a notice, which is passed on at once.
    host.shim(
        "trap 'echo ended > \"$0.ended\"; kill $!; exit 1' TERM\necho 'host-shim: note: started' >&2\nsleep 1000 >/dev/null 2>&1 &\nwait",
    );
    let create = ["template", "create", "app", "--image", "app"];
    let mut child = host.command(&create).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line == "host-shim: note: started"), "it ended too early");
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let said: Vec<_> = lines.collect();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{said:?}");
    assert_eq!(host.text("bin/host-shim.ended"), "ended\n");
    assert!(said[0].ends_with("templates/app stays, without a snapshot"), "{said:?}");
    assert!(host.template_is_there());
}
