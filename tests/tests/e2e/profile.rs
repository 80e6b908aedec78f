//! What the two profiles allow, and that `restricted` holds against root inside.

use e2e::{Channel, TestSandbox};

/// The scratch disk as the image of the tests brings it along (block 254:16).
const DISK: &str = "/scratch-disk";

/// A sandbox of a profile, with the program that asks what no shell can.
async fn sandbox(profile: &str) -> TestSandbox {
    let folder = tempfile::tempdir().unwrap();
    let probe = folder.path().join("probe");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/probe.c");
    let built = std::process::Command::new("cc").args(["-static", "-o"]).arg(&probe).arg(source).status();
    assert!(built.expect("cc runs").success());
    let sandbox = TestSandbox::of(Channel::Serial).set("profile", profile).start().await;
    sandbox.client().write_file("/root/probe", std::fs::read(probe).unwrap()).await.unwrap();
    sandbox.stdout("chmod 4755 /root /root/probe").await;
    sandbox
}

/// What the kernel answers to each question.
async fn answers(sandbox: &TestSandbox, questions: &[&str]) -> Vec<String> {
    let answers = sandbox.stdout(&format!("/root/probe {}", questions.join(" "))).await;
    answers.lines().map(|line| line.split_once(' ').expect("question and answer").1.to_owned()).collect()
}

/// The standard error of a script that must fail.
async fn refusal(sandbox: &TestSandbox, script: &str) -> String {
    let done = sandbox.sh(script).await;
    assert_ne!(done.exit.code(), 0, "{script} succeeded: {}", String::from_utf8_lossy(&done.stdout));
    String::from_utf8(done.stderr).unwrap()
}

/// The major and minor number of the scratch disk, which must be those of [`DISK`].
async fn scratch_numbers(sandbox: &TestSandbox) -> String {
    let numbers = sandbox.stdout("sed 's/:/ /' /sys/class/block/vdb/dev").await;
    assert_eq!(sandbox.stdout(&format!("stat -c '%t %T' {DISK}")).await, "fe 10\n");
    assert_eq!(numbers, "254 16\n", "the image's node is no longer the scratch disk");
    numbers.trim_end().to_owned()
}

#[tokio::test]
async fn restricted_keeps_root_from_the_machine() {
    let sandbox = sandbox("restricted").await;
    let numbers = scratch_numbers(&sandbox).await;

    let status = sandbox.stdout("cat /proc/self/status").await;
    for line in [
        "CapInh:\t0000000000000000",
        "CapPrm:\t00000000a80425fb",
        "CapEff:\t00000000a80425fb",
        "CapBnd:\t00000000a80425fb",
        "CapAmb:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
    ] {
        assert!(status.lines().any(|found| found == line), "no '{line}' in {status}");
    }
    // PID 1 has no more than these either.
    assert!(sandbox.stdout("cat /proc/1/status").await.contains("CapBnd:\t00000000a80425fb"));

    for script in [
        &format!("mknod /root/disk b {numbers}"),
        "mknod /dev/mem c 1 1",
        "mknod /dev/fuse c 10 229",
        "mount -t tmpfs none /tmp",
        "umount /proc/sys",
        "mount -o remount,rw /proc/sys",
        "unshare -U true",
        "unshare -m true",
        "chroot / mount -t proc proc /tmp",
    ] {
        let said = refusal(&sandbox, script).await;
        assert!(said.contains("not permitted") || said.contains("denied"), "{script}: {said}");
    }
    let said = refusal(&sandbox, &format!("head -c 1 {DISK}")).await;
    assert!(said.contains("denied") || said.contains("not permitted"), "{said}");
    refusal(&sandbox, "ls /dev/fuse /dev/net/tun").await;

    let questions = [
        ("vsock", "EPERM"),
        ("vsock-high-bits", "EPERM"),
        ("io_uring", "EPERM"),
        ("bpf", "EPERM"),
        ("keyctl", "EPERM"),
        ("clone-newuser", "EPERM"),
        ("clone3", "ENOSYS"),
        ("ptrace-1", "EPERM"),
        #[cfg(target_arch = "x86_64")]
        ("x32-getpid", "EPERM"),
        // What programs need.
        ("inet", "ok"),
        ("unix", "ok"),
        ("ptrace-child", "ok"),
    ];
    assert_eq!(
        answers(&sandbox, &questions.map(|(question, _)| question)).await,
        questions.map(|(_, answer)| answer)
    );

    for path in ["/proc/1/environ", "/proc/1/mem", "/proc/1/exe", "/proc/1/root/etc"] {
        refusal(&sandbox, &format!("head -c 1 {path}")).await;
    }
    for path in ["/proc/interrupts", "/proc/keys", "/proc/timer_list"] {
        assert_eq!(sandbox.stdout(&format!("cat {path}")).await, "", "{path} is not masked");
    }
    assert_eq!(sandbox.stdout("ls -A /sys/firmware").await, "");
    for path in [
        "/proc/sys/kernel/hostname",
        "/proc/sysrq-trigger",
        "/sys/power/state",
        "/sys/fs/cgroup/cgroup.procs",
    ] {
        let said = refusal(&sandbox, &format!("echo 1 > {path}")).await;
        assert!(said.contains("Read-only") || said.contains("nonexistent"), "{path}: {said}");
    }
    sandbox.stop().await;
}

#[tokio::test]
async fn restricted_is_no_hindrance_to_ordinary_work() {
    let sandbox = sandbox("restricted").await;
    // The probe is setuid root, which gives its caller nothing.
    let asked = sandbox.client().with_user("user").output("/root/probe", ["root", "unix"]).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&asked.stdout), "root EACCES\nunix ok\n");
    let script = "seq 1000 | sort -rn | head -1; echo x > /tmp/x; chown user /tmp/x; stat -c %U /tmp/x; \
                  (sleep 0; echo child) & wait; head -c 4 /dev/urandom | wc -c; echo gone > /dev/null";
    assert_eq!(sandbox.stdout(script).await, "1000\nuser\nchild\n4\n");
    sandbox.stdout("kill -9 1; kill -TERM 1; true").await;
    assert_eq!(sandbox.stdout("cat /data/deep/file; id -u").await, "seed\n0\n");
    let (status, said) = sandbox.stop().await;
    assert!(status.success(), "{said}");
}

#[tokio::test]
async fn sandbox_is_root_in_its_machine_but_not_on_its_disks() {
    let sandbox = sandbox("sandbox").await;
    let numbers = scratch_numbers(&sandbox).await;
    let status = sandbox.stdout("cat /proc/self/status").await;
    for line in ["CapEff:\t000001ffffffffff", "NoNewPrivs:\t0", "Seccomp:\t0"] {
        assert!(status.lines().any(|found| found == line), "no '{line}' in {status}");
    }
    let script = "mount -t tmpfs none /mnt && mknod /mnt/null c 1 3 && echo x > /mnt/null && unshare -m true && \
                  ls /dev/fuse /dev/net/tun";
    sandbox.stdout(&format!("mkdir /mnt; {script}")).await;
    assert_eq!(answers(&sandbox, &["vsock", "io_uring", "clone-newuser", "clone3"]).await, ["ok"; 4]);
    let asked = sandbox.client().with_user("user").output("/root/probe", ["root"]).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&asked.stdout), "root ok\n", "setuid programs work");
    // The disks below the overlay: neither made, nor opened, nor reached by the kernel's own list of nodes.
    let rootfs = sandbox.stdout("sed 's/:/ /' /sys/class/block/vda/dev").await;
    for script in [
        format!("mknod /mnt/disk b {numbers}"),
        format!("mknod /mnt/disk b {rootfs}"),
        format!("head -c 1 {DISK}"),
        format!("mkdir -p /x && mount -t ext4 {DISK} /x"),
        "mkdir -p /d && mount -t devtmpfs none /d && head -c 1 /d/vda".to_owned(),
    ] {
        let said = refusal(&sandbox, &script).await;
        assert!(said.contains("not permitted") || said.contains("denied"), "{script}: {said}");
    }
    sandbox.stop().await;
}

#[tokio::test]
async fn an_unknown_choice_is_refused_before_the_boot() {
    for (field, value, expected) in [
        ("profile", "none", "expected `sandbox` or `restricted`"),
        ("init", "systemd", "expected envd, image or the absolute path"),
    ] {
        let Err(said) = TestSandbox::of(Channel::Serial).set(field, value).try_start().await else {
            panic!("{field} {value} started");
        };
        assert!(said.contains(expected), "{said}");
    }
}
