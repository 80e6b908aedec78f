//! The example unit, run as it is by a systemd of the test's own.
//!
//! ```text
//! the test ── unshare: a mount namespace, a cgroup of its own
//!               └── unshare: PID, mount, cgroup, UTS and IPC namespaces ── systemd --system, PID 1 there, with four units
//!                     /usr/local   host-shim, kernel, guest image          └── tiffin-sandbox@web1
//!                     /var/lib     a data folder of the test's
//! ```
//!
//! It ends with the pipe that the test holds, however the test ends.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};

use e2e::{binary, made, template};
use serde_json::{Value, json};

use super::shim::until;

const SYSTEMD: &str = "/lib/systemd/systemd";

/// Makes a cgroup, starts systemd in it, prints the pid of that, and ends both with standard input.
const OUTER: &str = r#"
set -eu
root=$1
mount -t cgroup2 cgroup2 "$root/cgroup"
group=$root/cgroup/tiffin-test-$$
mkdir "$group"
(
    echo 0 > "$group/cgroup.procs"
    exec unshare --cgroup --pid --mount --uts --ipc --fork --kill-child --mount-proc sh -c "$2" sh "$root" < /dev/null
) &
unshared=$!
while :; do
    child=$(cat "/proc/$unshared/task/$unshared/children" 2> /dev/null) || break
    [ -z "$child" ] || break
    sleep 0.01
done
echo ${child:-none}
cat > /dev/null
echo 1 > "$group/cgroup.kill"
wait $unshared || true
# A cgroup is busy until the kernel has done with what was killed in it.
until find "$group" -depth -type d -exec rmdir {} + 2> /dev/null; do sleep 0.01; done
"#;

/// Becomes systemd, with the test's files in their places and no other units.
const INNER: &str = r#"
set -eu
root=$1
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount --bind "$root/lib" /var/lib
mount --bind "$root/local" /usr/local
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin SYSTEMD_UNIT_PATH="$root/units" \
    /lib/systemd/systemd --system --unit=basic.target --log-target=kmsg --show-status=no
"#;

/// What every unit of the system needs to be there.
const TARGETS: [&str; 3] = ["sysinit.target", "basic.target", "shutdown.target"];

/// A systemd with the unit.
struct Manager {
    root: tempfile::TempDir,
    outer: Child,
    life: Option<ChildStdin>,
    pid: String,
}

impl Manager {
    /// `None`, with the reason on stderr, where this machine cannot have one.
    fn start() -> Option<Self> {
        if !Path::new(SYSTEMD).exists() || !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: no {SYSTEMD}, or not root: a systemd of the test's own needs both");
            return None;
        }
        // Disks and snapshots: on a real file system, whatever /tmp is.
        let root = tempfile::Builder::new().prefix("tiu").tempdir_in("/var/tmp").unwrap();
        for folder in ["cgroup", "units", "local/bin", "local/share/tiffin", "lib/tiffin/templates"] {
            fs::create_dir_all(root.path().join(folder)).unwrap();
        }
        let units = root.path().join("units");
        for target in TARGETS {
            fs::write(units.join(target), "[Unit]\nDefaultDependencies=no\n").unwrap();
        }
        let unit = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
            .join("../host-shim/examples/orchestrators/tiffin-sandbox@.service");
        fs::copy(unit, units.join("tiffin-sandbox@.service")).unwrap();
        let local = root.path().join("local");
        place(&binary("host-shim"), &local.join("bin/host-shim"));
        place(&made("TIFFIN_KERNEL"), &local.join("share/tiffin/vmlinux"));
        place(&made("TIFFIN_GUEST_IMAGE"), &local.join("share/tiffin/guest-image.cpio"));
        let copy = root.path().join("lib/tiffin/templates/e2e");
        fs::create_dir(&copy).unwrap();
        for file in ["template.json", "rootfs.ext4"] {
            place(&template().join(file), &copy.join(file));
        }
        let log = fs::File::create(root.path().join("log")).unwrap();
        let mut outer = Command::new("unshare")
            .args(["--mount", "sh", "-c", OUTER, "sh"])
            .arg(root.path())
            .arg(INNER)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            // Who ends the test's group does not end this before it has cleaned up.
            .process_group(0)
            .spawn()
            .unwrap();
        let mut pid = String::new();
        let mut stdout = std::io::BufReader::new(outer.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut stdout, &mut pid).unwrap();
        let life = outer.stdin.take();
        let manager = Self { root, outer, life, pid: pid.trim().to_owned() };
        let may = manager.pid.parse::<u32>().is_ok();
        if may {
            until("systemd answers", || {
                manager.inside(&["systemctl", "is-active", "basic.target"]).status.success()
                    || !manager.runs()
            });
        }
        if !may || !manager.runs() {
            let said = fs::read_to_string(manager.root.path().join("log")).unwrap_or_default();
            eprintln!("SKIPPED: this machine does not let the test have a systemd of its own: {said}");
            return None;
        }
        Some(manager)
    }

    fn runs(&self) -> bool {
        Path::new(&format!("/proc/{}/root/run", self.pid)).exists()
    }

    /// A program beside systemd.
    fn inside(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.pid, "--mount", "--pid", "--ipc", "--uts", "--cgroup", "--"]);
        command.args(arguments).env("SYSTEMD_UNIT_PATH", self.root.path().join("units"));
        command.stdin(Stdio::null()).output().unwrap()
    }

    fn systemctl(&self, arguments: &[&str]) -> Output {
        self.inside(&[&["systemctl"], arguments].concat())
    }

    #[track_caller]
    fn must(&self, arguments: &[&str]) -> String {
        let output = self.inside(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {said}{}", self.look());
        String::from_utf8(output.stdout).unwrap()
    }

    /// host-shim, on the data folder of the unit.
    #[track_caller]
    fn shim(&self, verb: &str, arguments: &[&str]) -> String {
        self.must(&[&["/usr/local/bin/host-shim", verb, "--data-dir", "/var/lib/tiffin"], arguments].concat())
    }

    fn property(&self, name: &str, property: &str) -> String {
        let unit = format!("tiffin-sandbox@{name}");
        let output = self.systemctl(&["show", "--value", "--property", property, &unit]);
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    fn look(&self) -> String {
        let status = self.systemctl(&["status", "--no-pager", "--full", "tiffin-sandbox@web1"]);
        String::from_utf8_lossy(&status.stdout).into_owned()
    }

    /// Makes the folder of a sandbox, with a spec in it.
    fn spec(&self, name: &str, spec: &Value) -> PathBuf {
        let folder = self.root.path().join("lib/tiffin/sandboxes").join(name);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder).unwrap();
        fs::write(folder.join("spec.json"), spec.to_string()).unwrap();
        folder
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        drop(self.life.take());
        let _ = self.outer.wait();
    }
}

/// Puts a file into the test's folder, without a copy where that is possible.
fn place(from: &Path, to: &Path) {
    if fs::hard_link(from, to).is_err() {
        fs::copy(from, to).unwrap();
    }
}

fn state(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join("state.json")).unwrap_or_default()).unwrap_or_default()
}

#[test]
fn systemd_leads_a_sandbox_by_the_unit() {
    let Some(manager) = Manager::start() else { return };
    let unit = "tiffin-sandbox@web1";
    let file = manager.root.path().join("units/tiffin-sandbox@.service");
    let verified = manager.inside(&["systemd-analyze", "verify", file.to_str().unwrap()]);
    let said = String::from_utf8_lossy(&verified.stderr);
    assert!(verified.status.success() && said.is_empty(), "{said}");

    // Without a spec there is nothing to start, and it is said.
    assert!(!manager.systemctl(&["start", unit]).status.success());
    assert_eq!(manager.property("web1", "AssertResult"), "no");

    // `start` returns when the sandbox is ready.
    let spec = json!({ "schema_version": 1, "id": "web1", "template": "/var/lib/tiffin/templates/e2e" });
    let folder = manager.spec("web1", &spec);
    manager.must(&["systemctl", "start", unit]);
    assert_eq!(manager.property("web1", "ActiveState"), "active");
    let status = manager.property("web1", "StatusText");
    assert!(status.starts_with("web1 is running, booted on "), "{status}");
    assert_eq!(state(&folder)["phase"], "running");
    assert_eq!(manager.shim("exec", &["web1", "--", "sh", "-c", "echo kept > /root/note; uname"]), "Linux\n");
    // All that it runs is in the unit's cgroup: what systemd limits and kills is the whole sandbox.
    let cgroup = fs::read_to_string(format!(
        "/proc/{}/root/sys/fs/cgroup{}/cgroup.procs",
        manager.pid,
        manager.property("web1", "ControlGroup")
    ));
    assert!(cgroup.unwrap().lines().count() >= 3, "shim, reaper, VMM");

    // Paused is a success, nothing runs, and nobody restarts it.
    manager.shim("pause", &["web1"]);
    until("the unit is inactive", || manager.property("web1", "ActiveState") == "inactive");
    assert_eq!(
        (manager.property("web1", "Result"), &state(&folder)["phase"]),
        ("success".into(), &json!("paused"))
    );
    manager.must(&["systemctl", "start", unit]);
    assert_eq!(
        (&state(&folder)["start"], manager.property("web1", "NRestarts")),
        (&json!("resumed"), "0".into())
    );
    assert_eq!(manager.shim("exec", &["web1", "--", "cat", "/root/note"]), "kept\n");

    // A shim that is killed takes its VMM with it, and is started again on the same folder.
    let first = manager.property("web1", "MainPID");
    manager.must(&["systemctl", "kill", "--kill-whom=main", "--signal=KILL", unit]);
    until("it is restarted", || {
        manager.property("web1", "NRestarts") == "1" && manager.property("web1", "ActiveState") == "active"
    });
    assert_ne!(manager.property("web1", "MainPID"), first);
    assert_eq!((&state(&folder)["start"], &state(&folder)["phase"]), (&json!("booted"), &json!("running")));

    manager.must(&["systemctl", "stop", unit]);
    assert_eq!(
        (manager.property("web1", "ActiveState"), manager.property("web1", "Result")),
        ("inactive".into(), "success".into())
    );
    assert_eq!(
        (&state(&folder)["phase"], &state(&folder)["end"]["reason"]),
        (&json!("ended"), &json!("stopped"))
    );
    assert!(!folder.join("api.sock").exists() && !folder.join("scratch.ext4").exists());

    // A stop while it boots is not a failure either.
    manager.must(&["systemctl", "start", "--no-block", unit]);
    until("its machine boots", || state(&folder)["phase"] == "booting");
    manager.must(&["systemctl", "stop", unit]);
    assert_eq!(
        (manager.property("web1", "ActiveState"), manager.property("web1", "Result")),
        ("inactive".into(), "success".into())
    );

    // Bad input is not tried again.
    manager.spec("bad1", &json!({ "schema_version": 1, "template": "/no/such/template" }));
    assert!(!manager.systemctl(&["start", "tiffin-sandbox@bad1"]).status.success());
    assert_eq!(
        (manager.property("bad1", "ActiveState"), manager.property("bad1", "ExecMainStatus")),
        ("failed".into(), "2".into())
    );
    assert_eq!(manager.property("bad1", "NRestarts"), "0");

    // What a killed shim leaves is swept also when nobody starts it again.
    manager.must(&["systemctl", "start", unit]);
    let drop_in = manager.root.path().join("units/tiffin-sandbox@.service.d");
    fs::create_dir(&drop_in).unwrap();
    fs::write(drop_in.join("once.conf"), "[Service]\nRestart=no\n").unwrap();
    manager.must(&["systemctl", "daemon-reload"]);
    manager.must(&["systemctl", "kill", "--kill-whom=main", "--signal=KILL", unit]);
    until("the unit has failed", || manager.property("web1", "ActiveState") == "failed");
    assert_eq!(state(&folder)["end"]["reason"], "shim_killed");
    assert!(!folder.join("api.sock").exists() && !folder.join("scratch.ext4").exists());
}
