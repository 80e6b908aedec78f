//! `image-builder build --isolation vm`: RUN steps in machines of their own.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Instant;

use e2e::{DEADLINE, binary, made};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use serde_json::Value;

/// Everything that a build needs of busybox.
const BASE: &str = "FROM scratch AS base\nCOPY busybox /bin/busybox\n\
                    RUN [\"/bin/busybox\", \"--install\", \"-s\", \"/bin\"]\n";

/// A context, and a data folder that goes with the test.
struct Kitchen(tempfile::TempDir);

impl Kitchen {
    fn new(dockerfile: &str) -> Self {
        // Container builds unpack layers there, which a tmpfs may not be able to do.
        let dir = tempfile::Builder::new().prefix("vm-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let kitchen = Self(dir);
        fs::create_dir_all(kitchen.at("context/files/sub")).unwrap();
        fs::copy("/bin/busybox", kitchen.at("context/busybox")).expect("busybox-static is installed");
        fs::write(kitchen.at("context/files/one"), "one\n").unwrap();
        fs::write(kitchen.at("context/files/sub/two"), "two\n").unwrap();
        fs::write(kitchen.at("context/Dockerfile"), format!("{BASE}{dockerfile}")).unwrap();
        kitchen
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, isolation: &str, options: &[&str]) -> Command {
        let mut command = Command::new(binary("image-builder"));
        command.arg("--data-dir").arg(self.at(isolation)).args(["build", "--isolation", isolation]);
        command.args(["--compression", "none", "--json", "-t", "app"]).args(options).arg(self.at("context"));
        command.env("TIFFIN_HOST_SHIM", binary("host-shim"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn try_build(&self, isolation: &str, options: &[&str]) -> Output {
        self.command(isolation, options).output().unwrap()
    }

    /// What the build said on the way.
    fn build(&self, isolation: &str, options: &[&str]) -> String {
        let done = self.try_build(isolation, options);
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(done.status.success(), "{said}");
        self.left_nothing();
        said
    }

    /// What a build says that fails.
    fn fail(&self, options: &[&str]) -> String {
        let done = self.try_build("vm", options);
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(1), "{said}");
        self.left_nothing();
        said
    }

    /// Neither machines nor half-made disks.
    fn left_nothing(&self) {
        let names = |folder: &str| -> Vec<String> {
            let entries = fs::read_dir(self.at("vm").join(folder)).into_iter().flatten();
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
        };
        let rest: Vec<_> = names("sandboxes").into_iter().filter(|name| !name.starts_with('.')).collect();
        assert!(rest.is_empty(), "sandboxes that stay: {rest:?}");
        let rest: Vec<_> = names("cache/rootfs").into_iter().filter(|name| name.starts_with('.')).collect();
        assert!(rest.is_empty(), "disks that stay: {rest:?}");
    }

    fn blob(&self, isolation: &str, digest: &Value) -> PathBuf {
        self.at(isolation).join("images/blobs").join(digest.as_str().unwrap().replace(':', "/"))
    }

    /// For each layer its instruction and its diff_id.
    fn layers(&self, isolation: &str) -> Vec<(String, String)> {
        let read = |path: &Path| -> Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
        let index = read(&self.at(isolation).join("images/index.json"));
        let manifest = read(&self.blob(isolation, &index["manifests"][0]["digest"]));
        let config = read(&self.blob(isolation, &manifest["config"]["digest"]));
        let with_layer = |entry: &&Value| entry["empty_layer"] != true;
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let history = config["history"].as_array().unwrap().iter().filter(with_layer);
        let steps = history.map(|entry| text(&entry["created_by"]));
        steps.zip(config["rootfs"]["diff_ids"].as_array().unwrap().iter().map(text)).collect()
    }

    /// The processes that work on this folder.
    fn processes(&self) -> Vec<Pid> {
        let of_ours = |pid: i32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(self.at("vm").to_str().unwrap())
        };
        let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| {
            entry.ok()?.file_name().to_str()?.parse::<i32>().ok().filter(|pid| of_ours(*pid))
        });
        pids.filter_map(Pid::from_raw).collect()
    }
}

/// A build that was started.
struct Running {
    child: Child,
    stderr: BufReader<std::process::ChildStderr>,
}

impl Running {
    fn start(kitchen: &Kitchen, until: &str) -> Self {
        let mut child = kitchen.command("vm", &[]).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let mut running = Self { child, stderr };
        let mut seen = String::new();
        while !seen.lines().last().is_some_and(|line| line.ends_with(until)) {
            assert_ne!(running.stderr.read_line(&mut seen).unwrap(), 0, "it ended: {seen}");
        }
        running
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Its exit code and its last words.
    fn end(mut self) -> (Option<i32>, String) {
        let mut words = String::new();
        self.stderr.read_to_string(&mut words).unwrap();
        (self.child.wait().unwrap().code(), words)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait_gone(processes: Vec<OwnedFd>) {
    let deadline = Instant::now() + DEADLINE;
    for process in processes {
        let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now())).unwrap();
        let ready = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&left)).unwrap();
        assert_eq!(ready, 1, "a process of the build is still there");
    }
}

const TREES: &str = r"
RUN mkdir -p /etc /tmp /home/app /data/opaque/deep /data/keep && chmod 1777 /tmp \
 && echo 'root:x:0:0:root:/root:/bin/sh' > /etc/passwd && echo 'app:x:1000:1000:app:/home/app:/bin/sh' >> /etc/passwd \
 && printf 'app:x:1000:\nstaff:x:50:app\n' > /etc/group && chown 1000:1000 /home/app \
 && echo a > /data/opaque/a && echo b > /data/opaque/deep/b && echo k > /data/keep/k && ln /data/keep/k /data/keep/k2 \
 && echo g > /data/gone && setfattr -n user.a -v b /data/gone 2>/dev/null; \
 find /bin /data /home /tmp -exec touch -h -d '2020-01-02 03:04:05' {} + && touch -d '2020-01-02 03:04:05' /etc/* /etc /
FROM base AS second
USER app
WORKDIR /home/app
RUN id > who && echo $HOME > home && umask > mask && chmod 4755 mask && touch -d '2020-01-02 03:04:05' who home mask .
USER root
RUN rm -rf /data/opaque && mkdir /data/opaque && echo new > /data/opaque/new && rm /data/gone \
 && ln /data/keep/k /data/keep/k3 && chmod 600 /data/keep/k2 && mkfifo /data/pipe && mknod /data/null c 1 3 \
 && ln -s /nowhere /data/link && truncate -s 3M /data/sparse && printf x | dd of=/data/sparse bs=1M seek=1 conv=notrunc \
 && find /data -exec touch -h -d '2020-01-02 03:04:05' {} +
RUN <<EOF
grep -h ^Cap /proc/self/status > /script
echo $$ $0 $PATH >> /script; hostname >> /script; ls /dev >> /script
touch -d '2020-01-02 03:04:05' /script /
EOF
RUN true
FROM second
COPY --from=second /data/keep /copied
RUN rm /bin/vi && test ! -e /bin/vi && touch -d '2020-01-02 03:04:05' /bin
";

#[test]
fn a_machine_makes_the_layers_that_a_container_makes() {
    let kitchen = Kitchen::new(TREES);
    kitchen.build("vm", &[]);
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: the comparison with containers needs root");
        return;
    }
    kitchen.build("container", &[]);
    let (vm, container) = (kitchen.layers("vm"), kitchen.layers("container"));
    assert_eq!(vm.len(), container.len());
    let mut compared = 0;
    for ((step, diff_id), of_container) in vm.iter().zip(&container) {
        // The others have the time of the build in them.
        if step.contains("2020-01-02") || step.contains("<<EOF") {
            assert_eq!((step, diff_id), (&of_container.0, &of_container.1));
            compared += 1;
        }
    }
    assert_eq!(compared, 5);
    // What is cached is cached for both: the next build runs nothing.
    assert!(kitchen.build("vm", &[]).contains("(cached)"));
}

const MOUNTS: &str = r#"
RUN mkdir -p /data/keep && echo kept > /data/keep/k
FROM base AS second
WORKDIR /w
RUN --mount=type=bind,source=files,target=/mnt/files cp /mnt/files/sub/two /two && ! touch /mnt/files/x
RUN --mount=type=bind,source=files/one,target=relative cat relative && ! touch relative
RUN --mount=type=bind,from=base,source=/data,target=/mnt,rw echo x > /mnt/x && cat /mnt/keep/k && rm -r /mnt/keep
RUN --mount=type=bind,from=base,target=/mnt ls /mnt > /names && test -e /mnt/data/keep/k
RUN --mount=type=tmpfs,target=/mnt,size=1m ! dd if=/dev/zero of=/mnt/y bs=1M count=2
RUN --mount=type=cache,target=/cache echo 1 >> /cache/log
RUN --mount=type=cache,target=/cache --mount=type=cache,id=b,target=/o,mode=700,uid=5 test "$(stat -c %a:%u /o)" = 700:5 \
 && echo 2 >> /cache/log && echo "lines $(wc -l < /cache/log)"
RUN --mount=type=cache,id=s,from=base,source=/data,target=/s cat /s/keep/k && echo more > /s/more
RUN --mount=type=cache,id=s,from=base,source=/data,target=/s cat /s/more
RUN --mount=type=secret,id=token,mode=0440,gid=7 --mount=type=secret,id=token,env=TOKEN --mount=type=secret,id=none,target=/no \
 test "$(stat -c %a:%g /run/secrets/token)" = 440:7 && test "$TOKEN" = "$(cat /run/secrets/token)" && test ! -e /no
RUN echo mine > /etc/hosts && test ! -e /mnt && test ! -e /cache && test ! -e /run && ls / > /root-names
"#;

#[test]
fn mounts_show_what_they_should_and_leave_nothing() {
    let kitchen = Kitchen::new(MOUNTS);
    // Not as one word in a command line, which would be in the image's history.
    let secret = format!("s3cret-{}", std::process::id());
    fs::write(kitchen.at("token"), &secret).unwrap();
    let option = format!("id=token,src={}", kitchen.at("token").display());
    let said = kitchen.build("vm", &["--secret", &option]);
    for line in ["| one", "| kept", "| lines 2", "| more"] {
        assert!(said.lines().any(|said| said.ends_with(line)), "{line}: {said}");
    }
    let mut left = vec![kitchen.at("vm")];
    let mut looked = 0;
    while let Some(path) = left.pop() {
        if path.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        // The disks of caches are 10 GiB of holes, and were not in the machine that had the secret.
        } else if !path.to_str().unwrap().contains("mounts-vm") {
            let bytes = fs::read(&path).unwrap();
            let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!found, "the secret is in {}", path.display());
            looked += 1;
        }
    }
    assert!(looked > 20, "{looked} files");
}

#[test]
fn an_ordinary_user_builds_where_user_namespaces_are_forbidden() {
    if !rustix::process::geteuid().is_root() {
        // Then every other test is this one.
        eprintln!("SKIPPED: only root becomes another user");
        return;
    }
    let kitchen =
        Kitchen::new("RUN id -u > /who && test $(id -u) = 0 && mknod /null c 1 3 && chown 7:8 /null\n");
    // Where nobody else may look, nobody finds them.
    let home = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o755)).tempdir().unwrap();
    for (name, file) in [
        ("image-builder", binary("image-builder")),
        ("host-shim", binary("host-shim")),
        ("vmlinux", made("TIFFIN_KERNEL")),
        ("guest-image.cpio", made("TIFFIN_GUEST_IMAGE")),
    ] {
        fs::copy(file, home.path().join(name)).unwrap();
    }
    let copied = Command::new("cp").arg("-r").arg(kitchen.at("context")).arg(home.path()).status().unwrap();
    assert!(copied.success());
    fs::create_dir(home.path().join("data")).unwrap();
    std::os::unix::fs::chown(home.path().join("data"), Some(65534), Some(65534)).unwrap();
    // The limit is that of a user namespace that is made for it; what it gives is given up at once.
    let script = "echo 0 > /proc/sys/user/max_user_namespaces
        exec setpriv --inh-caps=-all --ambient-caps=-all --bounding-set=-all --no-new-privs sh -c '
            ! unshare -U true 2>/dev/null || exit 99
            export TIFFIN_KERNEL=$PWD/vmlinux TIFFIN_GUEST_IMAGE=$PWD/guest-image.cpio TIFFIN_HOST_SHIM=$PWD/host-shim
            exec ./image-builder --data-dir data build --isolation vm -t app context'";
    let user = ["--reuid=65534", "--regid=65534", "--clear-groups"];
    let namespace = ["unshare", "--user", "--map-current-user", "--keep-caps", "sh", "-c", script];
    let done = Command::new("setpriv").args(user).args(namespace).current_dir(home.path()).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{:?}: {said}", done.status);
}

#[test]
fn a_failure_says_what_it_was() {
    let kitchen = |step: &str| Kitchen::new(&format!("{step}\n"));
    let said = kitchen("RUN echo out; echo err >&2; exit 42").fail(&[]);
    assert!(said.contains("the command exited with code 42"), "{said}");
    assert!(said.contains("| out\n") && said.contains("| err\n"), "{said}");
    let said = kitchen("RUN [\"no-such-program\"]").fail(&[]);
    assert!(said.contains("no-such-program: it is not in PATH"), "{said}");
    let said = kitchen("RUN kill -9 $$; tail /dev/zero").fail(&[]);
    assert!(said.contains("it took more memory than its machine has"), "{said}");
    let said = kitchen("RUN dd if=/dev/zero of=/big bs=1M").fail(&["--vm-disk", "64"]);
    assert!(said.contains("No space left on device"), "{said}");
    assert!(said.contains("exited with code 1"), "{said}");
    let said = kitchen("RUN while sleep 1000 & do :; done").fail(&[]);
    assert!(said.contains("can't fork"), "{said}");
    assert!(said.contains("exited with code"), "{said}");
}

#[test]
fn a_step_cannot_do_what_a_container_cannot() {
    Kitchen::new(
        "RUN mknod /disk b 254 33 && for bad in 'reboot -f' 'mount -t tmpfs t /bin' 'ip addr del 10.0.2.2/32 dev lo' \
         'dd if=/disk of=/dev/null count=1' 'tee /proc/sys/kernel/hostname'; do ! $bad || exit 3; done\n",
    )
    .build("vm", &[]);
}

#[test]
fn ctrl_c_ends_the_machine() {
    let kitchen = Kitchen::new("RUN echo started; sleep 100000\n");
    let running = Running::start(&kitchen, "| started");
    kill_process(running.pid(), Signal::INT).unwrap();
    let (code, words) = running.end();
    assert_eq!(code, Some(130), "{words}");
    assert!(words.contains("interrupted"), "{words}");
    assert!(kitchen.processes().is_empty());
    kitchen.left_nothing();
}

#[test]
fn a_killed_build_leaves_no_machine() {
    let kitchen = Kitchen::new("RUN echo started; sleep 100000\n");
    let running = Running::start(&kitchen, "| started");
    let processes = kitchen.processes();
    assert!(processes.len() >= 3, "image-builder, host-shim and its VMM, got {processes:?}");
    let open = |pid: &Pid| pidfd_open(*pid, PidfdFlags::empty()).unwrap();
    let processes = processes.iter().map(open).collect();
    kill_process(running.pid(), Signal::KILL).unwrap();
    wait_gone(processes);
    drop(running);
    // The next build clears up and works.
    fs::write(kitchen.at("context/Dockerfile"), format!("{BASE}RUN true\n")).unwrap();
    kitchen.build("vm", &[]);
}

#[test]
fn a_machine_that_dies_is_an_error() {
    let kitchen = Kitchen::new("RUN echo started; sleep 100000\n");
    let running = Running::start(&kitchen, "| started");
    let is_vmm = |pid: &&Pid| {
        fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero())).unwrap().starts_with("qemu")
    };
    let processes = kitchen.processes();
    let vmm = processes.iter().find(is_vmm).expect("the step has a machine");
    kill_process(*vmm, Signal::KILL).unwrap();
    let (code, words) = running.end();
    assert_eq!(code, Some(1), "{words}");
    assert!(words.contains("the machine of the step"), "{words}");
    kitchen.left_nothing();
}

#[test]
fn a_step_has_a_network_and_no_way_to_the_hosts_loopback() {
    let inside = TcpListener::bind("127.0.0.1:0").unwrap();
    inside.set_nonblocking(true).unwrap();
    let port = inside.local_addr().unwrap().port();
    // No packet is sent: it tells which address this machine has to others.
    let probe = UdpSocket::bind("0.0.0.0:0").unwrap();
    let own = probe.connect("192.0.2.1:9").and_then(|()| probe.local_addr()).map(|address| address.ip());
    let mut steps = format!(
        "RUN for host in 10.0.2.2 10.0.2.3 10.0.2.15 127.0.0.1; do ! nc -w 5 $host {port} </dev/null || exit 3; done\n\
         RUN --network=none ! ip link show eth0\n"
    );
    let mut server = None;
    match own {
        Ok(address) if !address.is_loopback() => {
            let outside = TcpListener::bind((address, 0)).unwrap();
            let port = outside.local_addr().unwrap().port();
            steps.push_str(&format!("RUN nc -w 60 {address} {port} </dev/null\n"));
            server = Some(std::thread::spawn(move || outside.accept().unwrap().0.write_all(b"hello\n")));
        }
        _ => eprintln!("SKIPPED: this machine has no network"),
    }
    let said = Kitchen::new(&steps).build("vm", &[]);
    assert_eq!(inside.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    if let Some(server) = server {
        assert!(said.contains("| hello"), "{said}");
        server.join().unwrap().unwrap();
    }
    let refused = Kitchen::new("RUN --network=host true\n").try_build("vm", &[]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(said.contains("--isolation container"), "{said}");
}
