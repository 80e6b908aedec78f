//! The program itself, with small scripts in QEMU's place: what it says, and that it leaves nothing behind.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use template::{Machine, NewTemplate, Rootfs, RuntimeConfig, SCHEMA_VERSION, SourceImage, Template};

/// Long enough for the slowest machine; only a failing test waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

/// How every scripted QEMU begins: its version is asked before it is started.
const VERSION: &str = "#!/bin/sh\n[ \"$1\" = --version ] && { echo QEMU emulator version 0.1; exit; }\n";

struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    /// A data folder with the template `demo`, a kernel and a guest image that nothing reads, and `qemu` as QEMU.
    fn new(qemu: Option<&str>) -> Self {
        // Short: sockets must fit into their addresses.
        let dir = tempfile::Builder::new().prefix("shim").tempdir_in("/tmp").unwrap();
        let host = Self { dir };
        fs::create_dir(host.path("bin")).unwrap();
        for file in ["vmlinux", "guest.cpio"] {
            fs::write(host.path(file), "x").unwrap();
        }
        if let Some(script) = qemu {
            let program = host.path("bin/qemu-system-x86_64");
            fs::write(&program, format!("{VERSION}{script}\n")).unwrap();
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let new = NewTemplate::begin(&host.path("data/templates"), &"demo".parse().unwrap()).unwrap();
        fs::write(new.rootfs(), b"rootfs").unwrap();
        let digest = format!("sha256:{}", "a".repeat(64));
        let template = Template {
            schema_version: SCHEMA_VERSION,
            image: SourceImage { reference: "demo".into(), digest: digest.parse().unwrap() },
            kernel: None,
            guest_image: None,
            rootfs: Rootfs { digest: digest.parse().unwrap(), size: 6 },
            runtime: RuntimeConfig { cmd: vec!["true".into()], ..RuntimeConfig::default() },
            machine: Machine { disk_mib: 16, ..Machine::default() },
            snapshot_only: false,
        };
        new.publish(&template).unwrap();
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_host-shim"));
        command
            .args(args)
            .env("PATH", format!("{}:/usr/bin:/bin", self.path("bin").display()))
            .env("TIFFIN_DATA_DIR", self.path("data"))
            .env("TIFFIN_KERNEL", self.path("vmlinux"))
            .env("TIFFIN_GUEST_IMAGE", self.path("guest.cpio"))
            .env_remove("TIFFIN_VHOST_DEVICE_VSOCK")
            .stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> (i32, String, String) {
        let Output { status, stdout, stderr } = self.command(args).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (status.code().unwrap(), text(stdout), text(stderr))
    }

    fn sandboxes(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(self.path("data/sandboxes")) else { return Vec::new() };
        entries.map(|entry| entry.unwrap().path()).filter(|path| !path.ends_with(".lock")).collect()
    }

    /// Starts a run whose VMM only sleeps, and waits until that runs. Gives the shim and the VMM's pid.
    fn start_sleeper(&self, args: &[&str]) -> (Child, Pid) {
        let child = self.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let file = self.path("vmm.pid");
        until("the VMM runs", || fs::read_to_string(&file).is_ok_and(|text| text.ends_with('\n')));
        let pid = fs::read_to_string(&file).unwrap().trim().parse().unwrap();
        (child, Pid::from_raw(pid).unwrap())
    }

    fn sleeper(&self) {
        let script = format!("{VERSION}echo $$ > {}\nexec sleep 1000\n", self.path("vmm.pid").display());
        let program = self.path("bin/qemu-system-x86_64");
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Processes whose command line names this host's folder.
    fn processes(&self) -> Vec<String> {
        let needle = self.dir.path().to_str().unwrap();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap() {
            let Ok(command) = fs::read(entry.unwrap().path().join("cmdline")) else { continue };
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            if command.contains(needle) {
                found.push(command);
            }
        }
        found
    }

    fn assert_nothing_left(&self) {
        until("every process is gone", || self.processes().is_empty());
        until("every folder is gone", || self.sandboxes().is_empty());
    }
}

#[track_caller]
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn is_alive(pid: Pid) -> bool {
    // A zombie is dead: it waits for whoever adopted it.
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
    stat.is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or("").trim_start().starts_with('Z'))
}

fn text(mut source: impl Read) -> String {
    let mut out = String::new();
    source.read_to_string(&mut out).unwrap();
    out
}

const TCG: [&str; 4] = ["run", "--accel", "tcg", "demo"];

#[test]
fn a_dead_vmm_gives_its_own_words_and_leaves_nothing() {
    let host = Host::new(Some("echo 'qemu-system-x86_64: -kernel: bad magic' >&2; exit 1"));
    let (code, stdout, stderr) = host.run(&TCG);
    assert_eq!((code, stdout.as_str()), (125, ""), "{stderr}");
    assert!(
        stderr.contains("the VMM exited with code 1: qemu-system-x86_64: -kernel: bad magic"),
        "{stderr}"
    );
    host.assert_nothing_left();
}

#[test]
fn a_kernel_panic_is_told_in_its_own_words() {
    // File descriptor 3 is the console.
    let host = Host::new(Some("echo '[ 0.6] Kernel panic - not syncing: No working init found.' >&3"));
    let (code, _, stderr) = host.run(&TCG);
    assert_eq!(code, 125);
    assert!(
        stderr.contains("the guest's kernel gave up: Kernel panic - not syncing: No working init found."),
        "{stderr}"
    );
    host.assert_nothing_left();
}

#[test]
fn a_silent_guest_meets_the_deadline() {
    let host = Host::new(Some("echo booting >&3; exec sleep 1000"));
    let (code, _, stderr) = host.run(&["run", "--accel", "tcg", "--boot-timeout", "1", "demo"]);
    assert_eq!(code, 125);
    assert!(stderr.contains("not ready within 1 s: the agent's Hello did not happen"), "{stderr}");
    assert!(stderr.contains("booting"), "{stderr}");
    host.assert_nothing_left();
}

#[test]
fn a_guest_that_speaks_nonsense_on_the_control_port_ends_with_its_machine() {
    let host = Host::new(Some("head -c 100000 /dev/urandom >&4"));
    let (code, _, stderr) = host.run(&TCG);
    assert_eq!(code, 125);
    assert!(stderr.contains("the guest powered off before its agent was ready"), "{stderr}");
    host.assert_nothing_left();
}

#[test]
fn a_killed_shim_leaves_nothing() {
    let host = Host::new(None);
    host.sleeper();
    let (mut shim, vmm) = host.start_sleeper(&TCG);
    assert_eq!(host.sandboxes().len(), 1);
    shim.kill().unwrap();
    shim.wait().unwrap();
    until("the VMM is gone", || !is_alive(vmm));
    host.assert_nothing_left();
}

#[test]
fn a_killed_shim_leaves_a_callers_folder_that_says_so() {
    let host = Host::new(None);
    host.sleeper();
    let spec = host.path("spec.json");
    fs::write(&spec, r#"{"schema_version":1,"template":"data/templates/demo","accelerator":"tcg"}"#).unwrap();
    let dir = host.path("s");
    let args = ["run", "--spec", spec.to_str().unwrap(), "--dir", dir.to_str().unwrap()];
    let (mut shim, vmm) = host.start_sleeper(&args);
    // The shim writes it beside its other work.
    until("there is a console log", || dir.join("console.log").exists());
    let (code, _, stderr) = host.run(&args);
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("belongs to a host-shim that is running (pid"), "{stderr}");
    shim.kill().unwrap();
    shim.wait().unwrap();
    until("the VMM is gone", || !is_alive(vmm));
    let state = || fs::read_to_string(dir.join("state.json")).unwrap_or_default();
    until("the state says how it ended", || state().contains("shim_killed"));
    until("every process is gone", || host.processes().is_empty());
    for gone in ["scratch.ext4", "vmm", "api.sock", "vsock.sock"] {
        assert!(!dir.join(gone).exists(), "{gone} is left");
    }
    assert!(dir.join("console.log").exists());
}

#[test]
fn a_caller_that_gives_up_before_the_folder_is_taken_gets_no_sandbox() {
    let host = Host::new(Some("exit 1"));
    // A pipe in the spec's place holds the shim where it has not taken its folder yet.
    let (spec, dir) = (host.path("spec.json"), host.path("s"));
    assert!(Command::new("mkfifo").arg(&spec).status().unwrap().success());
    let args = ["run", "--spec", spec.to_str().unwrap(), "--dir", dir.to_str().unwrap(), "--new-session"];
    let shim = host.command(&args).stderr(Stdio::piped()).spawn().unwrap();
    let mut writer = fs::File::options().write(true).open(&spec).unwrap();
    fs::remove_file(&spec).unwrap();
    let template = host.path("data/templates/demo");
    writeln!(writer, r#"{{"schema_version":1,"template":{template:?},"accelerator":"tcg"}}"#).unwrap();
    drop(writer);
    let output = shim.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && stderr.contains("its caller has given up"), "{stderr}");
    assert!(!dir.exists());
    host.assert_nothing_left();
}

#[test]
fn a_signal_during_the_boot_ends_it() {
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let host = Host::new(None);
        host.sleeper();
        let (mut shim, vmm) = host.start_sleeper(&TCG);
        kill_process(Pid::from_child(&shim), signal).unwrap();
        assert_eq!(shim.wait().unwrap().code(), Some(125));
        assert!(!is_alive(vmm));
        let stderr = text(shim.stderr.take().unwrap());
        assert!(stderr.contains("interrupted before the sandbox was ready"), "{stderr}");
        host.assert_nothing_left();
    }
}

#[test]
fn missing_things_are_named_with_what_to_install() {
    let host = Host::new(None);
    let mut command = host.command(&TCG);
    let output = command.env("PATH", host.path("bin")).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    // A machine that has QEMU in /usr/sbin does not exist.
    assert_eq!(output.status.code(), Some(125));
    assert!(
        stderr.contains("qemu-system-x86_64 is missing")
            && stderr.contains("apt-get install qemu-system-x86")
    );
    let output = host.command(&TCG).env_remove("TIFFIN_KERNEL").output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("share/tiffin/vmlinux") || stderr.contains("qemu-system-x86_64"), "{stderr}");
    host.assert_nothing_left();
}

#[test]
fn bad_usage_is_2_and_bad_input_of_run_is_125() {
    let host = Host::new(Some("exit 1"));
    for args in
        [&["run"][..], &["novel"], &["run", "demo", "--cpus", "x"], &["run", "--spec", "x"], &["spec"]]
    {
        assert_eq!(host.run(args).0, 2, "{args:?}");
    }
    let (code, _, stderr) = host.run(&["run", "nope"]);
    assert_eq!(code, 125);
    assert!(stderr.contains("no template \"nope\"") && stderr.contains("there are: demo"), "{stderr}");
    let missing = host.path("none.json");
    let (code, _, stderr) = host.run(&["run", "--spec", missing.to_str().unwrap(), "--dir", "/nowhere"]);
    assert_eq!(code, 2, "{stderr}");
    fs::write(&missing, "{").unwrap();
    assert_eq!(host.run(&["run", "--spec", missing.to_str().unwrap(), "--dir", "/nowhere"]).0, 2);
    // A truncated rootfs is found before a boot.
    let rootfs = host.path("data/templates/demo/rootfs.ext4");
    fs::remove_file(&rootfs).unwrap();
    fs::write(&rootfs, "roo").unwrap();
    let (code, _, stderr) = host.run(&TCG);
    assert_eq!(code, 125);
    assert!(stderr.contains("has 3 bytes, expected 6: it was truncated"), "{stderr}");
    host.assert_nothing_left();
}

#[test]
fn the_schema_and_the_reports_are_json() {
    let host = Host::new(Some("echo QEMU emulator version 7.2; exit 0"));
    let (code, stdout, _) = host.run(&["spec", "--schema"]);
    let schema: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((code, &schema["additionalProperties"]), (0, &false.into()));
    let (code, stdout, _) = host.run(&["doctor", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((code, &report["ready"]), (0, &true.into()));
    let (code, stdout, _) = host.run(&["sweep", "--json"]);
    assert_eq!((code, stdout.as_str()), (0, "[]\n"));
}

#[test]
fn a_child_of_a_dead_parent_does_not_start() {
    let marker = Path::new("/nonexistent");
    let status = Command::new(env!("CARGO_BIN_EXE_host-shim"))
        .args(["vmm-exec", "1", "touch"])
        .arg(marker)
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert_eq!(status.status.code(), Some(127));
    assert!(String::from_utf8_lossy(&status.stderr).contains("the parent is gone"));
}
