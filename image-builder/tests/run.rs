//! What `RUN` is given: mounts, networks, limits, Docker's confinement. By the program itself, on one static busybox, as root.

mod support;

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

const BASE: &str = "FROM scratch AS base\nCOPY busybox /bin/busybox\nRUN [\"/bin/busybox\", \"--install\", \"-s\", \"/bin\"]\n";

struct Case {
    dir: tempfile::TempDir,
}

impl Case {
    /// `None`, with the reason on stderr, where this machine cannot build.
    fn with_busybox() -> Option<Self> {
        let busybox = support::busybox()?;
        // Not on /tmp, which may be a tmpfs without the attributes that overlayfs needs.
        let dir = tempfile::Builder::new().prefix("run-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        fs::create_dir(dir.path().join("context")).unwrap();
        let case = Self { dir };
        fs::copy(busybox, case.path("context/busybox")).unwrap();
        Some(case)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, contents: &str) {
        let path = self.path("context").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, contents).unwrap();
    }

    fn command(&self, options: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_image-builder"));
        command.arg("--data-dir").arg(self.path("data")).args([
            "build",
            "--json",
            "--compression",
            "none",
            "-t",
        ]);
        command.arg("image").args(options).arg(self.path("context"));
        command
    }

    fn run(&self, dockerfile: &str, options: &[&str]) -> Output {
        self.write("Dockerfile", &format!("{BASE}{dockerfile}"));
        self.command(options).output().unwrap()
    }

    #[track_caller]
    fn build(&self, dockerfile: &str, options: &[&str]) -> Value {
        let output = self.run(dockerfile, options);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    #[track_caller]
    fn fails(&self, dockerfile: &str, options: &[&str], code: i32) -> String {
        let output = self.run(dockerfile, options);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{stderr}");
        assert!(self.leftovers().is_empty(), "{:?}", self.leftovers());
        stderr
    }

    fn blob(&self, digest: &Value) -> PathBuf {
        let digest = digest.as_str().unwrap().strip_prefix("sha256:").unwrap().to_owned();
        self.path("data/images/blobs/sha256").join(digest)
    }

    fn blob_json(&self, digest: &Value) -> Value {
        serde_json::from_slice(&fs::read(self.blob(digest)).unwrap()).unwrap()
    }

    /// The names in the image's top layer, by tar.
    fn top_layer(&self, report: &Value) -> Vec<String> {
        let manifest = self.blob_json(&report["digest"]);
        let layer = &manifest["layers"].as_array().unwrap().last().unwrap()["digest"];
        let output = Command::new("tar").arg("tf").arg(self.blob(layer)).output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
    }

    fn leftovers(&self) -> Vec<String> {
        let names = fs::read_dir(self.path("data/cache/layers")).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with('.')).collect()
    }
}

/// Whether any file below the folder holds the bytes.
fn holds(folder: &Path, needle: &[u8]) -> Option<PathBuf> {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let kind = fs::symlink_metadata(&path).unwrap().file_type();
        if kind.is_dir() {
            if let Some(found) = holds(&path, needle) {
                return Some(found);
            }
        } else if kind.is_file() {
            let mut contents = Vec::new();
            fs::File::open(&path).unwrap().read_to_end(&mut contents).unwrap();
            if contents.windows(needle.len()).any(|window| window == needle) {
                return Some(path);
            }
        }
    }
    None
}

#[test]
fn bind_mounts_show_files_and_leave_nothing() {
    let Some(case) = Case::with_busybox() else { return };
    case.write("folder/file", "of the context");
    case.write("single", "one file");
    let report = case.build(
        "RUN mkdir /made && echo stage > /made/file && ln -s made /link\n\
         FROM base\n\
         RUN --mount=target=/ctx,source=folder --mount=type=bind,source=single,target=/one/file \
             --mount=from=0,source=/link,target=/stage --mount=from=0,target=/stage-rw,rw \
             set -e; grep -q context /ctx/file; grep -q one /one/file; grep -q stage /stage/file; test ! -e /ctx/single; \
             ! touch /ctx/new 2>/dev/null; ! touch /stage/new 2>/dev/null; \
             echo more >> /stage-rw/made/file; rm /stage-rw/link; touch /stage-rw/new; echo x > /only\n",
        &[],
    );
    assert_eq!(case.top_layer(&report), ["only"]);
    // What was written there is gone, also for the next mount.
    case.build(
        "RUN mkdir /made && echo stage > /made/file && ln -s made /link\n\
         FROM base\n\
         RUN --mount=from=0,target=/s,rw test -L /s/link && test ! -e /s/new && test $(cat /s/made/file) = stage\n\
         RUN test ! -e /s\n",
        &[],
    );
    let stderr = case.fails("RUN --mount=target=/x,source=none true\n", &[], 2);
    assert!(stderr.contains("none: no such file"), "{stderr}");
    let stderr = case.fails("FROM base\nRUN --mount=from=base,target=/x,source=none true\n", &[], 2);
    assert!(stderr.contains("--mount source none: there is no such file"), "{stderr}");
}

#[test]
fn a_mount_of_the_context_counts_in_the_key_and_its_target_may_be_relative() {
    let Some(case) = Case::with_busybox() else { return };
    let dockerfile = "WORKDIR /w\nRUN --mount=source=in,target=in cp /w/in /w/out\n";
    case.write("in", "1");
    case.build(dockerfile, &[]);
    assert_eq!(case.build(dockerfile, &[])["executed"], 0);
    case.write("in", "2");
    assert_eq!(case.build(dockerfile, &[])["executed"], 1);
}

#[test]
fn caches_are_kept_and_are_in_no_layer_or_key() {
    let Some(case) = Case::with_busybox() else { return };
    let step = |number: u32, test: &str| {
        format!(
            "RUN --mount=type=cache,target=/cache,id=shared {test}; echo {number} > /cache/file; echo {number} > /only\n"
        )
    };
    let report = case.build(&step(1, "test ! -e /cache/file"), &[]);
    assert_eq!(case.top_layer(&report), ["only"]);
    case.build(&step(2, "test $(cat /cache/file) = 1"), &[]);
    // Its contents changed since, and do not count.
    assert_eq!(case.build(&step(1, "test ! -e /cache/file"), &[])["executed"], 0);
    // Another id, by the target; modes and owners of a new folder.
    case.build(
        "RUN --mount=type=cache,target=/cache test ! -e /cache/file\n\
         RUN --mount=type=cache,target=/c,id=own,mode=1770,uid=5,gid=6 test \"$(stat -c '%a %u %g' /c)\" = '1770 5 6'\n\
         RUN mkdir -p /begin/sub && echo first > /begin/sub/file && chown 7 /begin/sub/file\n\
         FROM base\n\
         RUN --mount=type=cache,target=/c,from=0,source=/begin cat /c/sub/file && rm /c/sub/file && true\n",
        &["--target", "0"],
    );
    case.build(
        "RUN mkdir -p /begin/sub && echo first > /begin/sub/file && chown 7 /begin/sub/file\n\
         FROM base AS last\n\
         RUN --mount=type=cache,target=/c,from=0,source=/begin test $(cat /c/sub/file) = first && \
             test $(stat -c %u /c/sub/file) = 7 && rm /c/sub/file\n\
         RUN --mount=type=cache,target=/c,from=0,source=/begin test ! -e /c/sub/file && test -d /c/sub\n\
         RUN --mount=type=cache,target=/c,id=ro,ro ! touch /c/x 2>/dev/null\n",
        &[],
    );
}

#[test]
fn locked_caches_are_used_one_after_the_other() {
    let Some(case) = Case::with_busybox() else { return };
    // Each fails when it meets the other; the pipe holds the first until the second has said that it waits.
    let step = "RUN --mount=type=cache,target=/c,sharing=locked --mount=type=cache,target=/go,id=go \
                mkdir /c/busy && echo in && { test -z \"$HOLD\" || cat /go/pipe; } && rmdir /c/busy\n";
    case.build("RUN --mount=type=cache,target=/go,id=go mkfifo /go/pipe\n", &[]);
    let pipe = find(&case.path("data/cache/mounts"), "pipe").unwrap();
    case.write("Dockerfile", &format!("{BASE}ARG HOLD\n{step}"));
    let start = |hold: &str, name: &str| {
        let mut command = case.command(&["--no-cache", "-t", name, "--build-arg", hold]);
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let mut first = start("HOLD=1", "first");
    let first_stderr = wait_for(&mut first, "| in");
    let mut second = start("HOLD=", "second");
    let second_stderr = wait_for(&mut second, "waiting for the cache mount /c");
    fs::write(pipe, "go\n").unwrap();
    for (mut child, mut stderr) in [(first, first_stderr), (second, second_stderr)] {
        let mut rest = String::new();
        stderr.read_to_string(&mut rest).unwrap();
        assert!(child.wait().unwrap().success(), "{rest}");
    }
}

/// Reads the build's stderr up to a line with that text, and gives the rest.
#[track_caller]
fn wait_for(child: &mut std::process::Child, text: &str) -> impl Read + use<> {
    use std::io::BufRead;
    let mut stderr = std::io::BufReader::new(child.stderr.take().unwrap());
    let mut seen = String::new();
    loop {
        let start = seen.len();
        assert!(stderr.read_line(&mut seen).unwrap() > 0, "no {text:?} in {seen}");
        if seen[start..].contains(text) {
            return stderr;
        }
    }
}

fn find(folder: &Path, name: &str) -> Option<PathBuf> {
    fs::read_dir(folder).unwrap().find_map(|entry| {
        let path = entry.unwrap().path();
        if path.file_name().is_some_and(|found| found == name) {
            return Some(path);
        }
        if path.is_dir() { find(&path, name) } else { None }
    })
}

#[test]
fn tmpfs_mounts_are_as_large_as_they_say() {
    let Some(case) = Case::with_busybox() else { return };
    let report = case.build(
        "RUN --mount=type=tmpfs,target=/t,size=1m ! head -c 2000000 /dev/zero > /t/big 2>/dev/null && echo x > /only\n\
         RUN df -m /dev/shm | grep -q ' 8 ' && test $(ulimit -n) = 77\n",
        &["--shm-size", "8m", "--ulimit", "nofile=77"],
    );
    assert_eq!(case.top_layer(&report), ["only"]);
}

#[test]
fn secrets_are_seen_and_are_nowhere() {
    let Some(case) = Case::with_busybox() else { return };
    let (first, second) = ("first-hidden-value-1", "second-hidden-value-2");
    fs::write(case.path("secret"), first).unwrap();
    let file = format!("id=file,src={}", case.path("secret").display());
    // The length, because what a command looks for is in the image.
    let dockerfile = "RUN --mount=type=secret,id=file test $(wc -c < /run/secrets/file) = 20 && \
             test $(stat -c %a /run/secrets/file) = 400 && ! touch /run/secrets/file 2>/dev/null && echo x > /only\n\
         RUN --mount=type=secret,id=env,env=TOKEN test ${#TOKEN} = 21 && test ! -e /run && echo y > /only\n\
         RUN --mount=type=secret,id=file,target=/etc/s,mode=0444,uid=3,gid=4,required --mount=type=secret,id=absent \
             test \"$(stat -c '%a %u %g' /etc/s)\" = '444 3 4' && test ! -e /run/secrets/absent && echo z > /only\n";
    case.write("Dockerfile", &format!("{BASE}{dockerfile}"));
    let output = case
        .command(&["--secret", &file, "--secret", "id=env,env=HIDDEN"])
        .env("HIDDEN", second)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(case.top_layer(&report), ["only"]);
    for value in [first, second] {
        assert_eq!(holds(&case.path("data"), value.as_bytes()), None);
    }
    // Other values, the same key.
    fs::write(case.path("secret"), "other").unwrap();
    let output = case
        .command(&["--secret", &file, "--secret", "id=env,env=HIDDEN"])
        .env("HIDDEN", "x")
        .output()
        .unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["executed"], 0);
    let stderr = case.fails("RUN --mount=type=secret,id=absent,required true\n", &[], 2);
    assert!(
        stderr.contains("secret absent: the step requires it; give it with --secret id=absent"),
        "{stderr}"
    );
    let stderr = case.fails("RUN true\n", &["--secret", "id=a,src=/no/such/file"], 2);
    assert!(stderr.contains("--secret id=a: there is no file /no/such/file"), "{stderr}");
}

#[test]
fn networks_are_the_hosts_or_none() {
    let Some(case) = Case::with_busybox() else { return };
    let alone = "test \"$(ls /sys/class/net)\" = lo && grep -q 0100007F /proc/net/fib_trie || ip addr | grep -q 127.0.0.1";
    case.build(&format!("RUN --network=none {alone}\nRUN ip link show lo | grep -q UP\n"), &["--no-cache"]);
    for option in ["none", "isolated"] {
        case.build(
            &format!("RUN {alone}\nRUN --network=default test $(ip -o link | wc -l) = 1\n"),
            &["--no-cache", "--network", option],
        );
        let stderr = case.fails("RUN --network=host true\n", &["--network", option], 2);
        assert!(stderr.contains("RUN --network=host: the build has no network"), "{stderr}");
    }
}

#[test]
fn steps_are_confined_as_dockers_are() {
    let Some(case) = Case::with_busybox() else { return };
    case.build(
        "RUN grep -q 'Seccomp:.2' /proc/self/status && grep -q 'CapEff:.00000000a80425fb' /proc/self/status && \
             grep -q 'NoNewPrivs:.0' /proc/self/status && test $$ -lt 10\n\
         RUN ! unshare -m true 2>/dev/null && ! mount -t tmpfs x /mnt 2>/dev/null && ! chroot / unshare -U true 2>/dev/null\n\
         RUN test -z \"$(cat /proc/timer_list 2>/dev/null)\" && ! echo x 2>/dev/null > /proc/sys/kernel/hostname && \
             test \"$(hostname)\" = build && ! echo 1 2>/dev/null > /sys/kernel/notes\n",
        &[],
    );
}

#[test]
fn a_step_cannot_make_what_readers_would_take_for_a_mark() {
    let Some(case) = Case::with_busybox() else { return };
    for made in ["RUN touch /bin/.wh.ls\n", "RUN mkdir -p /srv/.wh..wh..opq\n"] {
        let stderr = case.fails(made, &[], 2);
        assert!(stderr.contains("no image can hold a file whose name begins with .wh."), "{stderr}");
        assert!(stderr.contains("Dockerfile:4:1"), "{stderr}");
    }
}

#[test]
fn limits_end_steps_and_are_named() {
    let Some(case) = Case::with_busybox() else { return };
    let stderr = case.fails("RUN sleep 1000 & sleep 1000; true\n", &["--step-timeout", "300ms"], 1);
    assert!(stderr.contains("the command took longer than --step-timeout 300ms, and was killed"), "{stderr}");
    for (option, value) in
        [("--memory", "x"), ("--cpus", "0"), ("--pids-limit", "-7"), ("--step-timeout", "0s")]
    {
        case.fails("RUN true\n", &[option, value], 2);
    }
    let output = case.run("RUN true\n", &["--memory", "64m", "--pids-limit", "50", "--cpus", "1.5"]);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    if !output.status.success() {
        assert!(stderr.contains("this machine cannot hold a step to it"), "{stderr}");
        assert!(!stderr.contains("[3/"), "it says so before it begins: {stderr}");
        eprintln!("SKIPPED: no cgroup controllers here");
        return;
    }
    let hog = "RUN x=$(head -c 300000000 /dev/zero | tr '\\0' x); true\n";
    let stderr = case.fails(hog, &["--memory", "64m"], 1);
    assert!(stderr.contains("the command ran out of memory (--memory 64 MiB)"), "{stderr}");
    let bomb = "RUN for i in $(seq 100); do sleep 1000 & done\n";
    let stderr = case.fails(bomb, &["--pids-limit", "50"], 1);
    assert!(stderr.contains("can't fork") || stderr.contains("Resource temporarily"), "{stderr}");
    for group in ["/sys/fs/cgroup", "/sys/fs/cgroup/memory", "/sys/fs/cgroup/pids", "/sys/fs/cgroup/cpu"] {
        let Ok(entries) = fs::read_dir(group) else { continue };
        // Of this test's builds: others are at work, too.
        let ours =
            entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("tiffin-probe"));
        assert_eq!(ours.count(), 0);
    }
}

#[test]
fn an_interrupted_step_leaves_its_locks_and_mounts() {
    let Some(case) = Case::with_busybox() else { return };
    case.write(
        "Dockerfile",
        &format!(
            "{BASE}RUN --mount=type=cache,target=/c,sharing=locked --mount=target=/ctx echo in; sleep 1000\n"
        ),
    );
    let mut child =
        case.command(&["--no-cache"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let _stderr = wait_for(&mut child, "| in");
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(case.leftovers().is_empty(), "{:?}", case.leftovers());
    case.build("RUN --mount=type=cache,target=/c,sharing=locked true\n", &[]);
}
