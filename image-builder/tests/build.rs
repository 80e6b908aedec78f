//! Whole builds, by the program itself, on a base of one static busybox (Debian package `busybox-static`).
//!
//! They mount overlays and start containers, so they need root. Oracles are skopeo, umoci and tar.

mod support;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// The first lines of every Dockerfile here.
const BASE: &str =
    "FROM scratch\nCOPY busybox /bin/busybox\nRUN [\"/bin/busybox\", \"--install\", \"-s\", \"/bin\"]\n";

struct TestBuild {
    dir: tempfile::TempDir,
}

impl TestBuild {
    /// `None`, with the reason on stderr, where this machine cannot build.
    fn new() -> Option<Self> {
        let busybox = support::busybox()?;
        // Not on /tmp, which may be a tmpfs without the attributes that overlayfs needs.
        let dir = tempfile::Builder::new().prefix("build-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        fs::create_dir(dir.path().join("context")).unwrap();
        fs::copy(busybox, dir.path().join("context/busybox")).unwrap();
        Some(Self { dir })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, contents: &str) {
        let path = self.path("context").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, contents).unwrap();
    }

    fn program(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_image-builder"));
        command.arg("--data-dir").arg(self.path("data"));
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.program().args(arguments).output().unwrap()
    }

    fn build_with(&self, name: &str, dockerfile: &str, options: &[&str]) -> Output {
        self.write("Dockerfile", dockerfile);
        let context = self.path("context");
        let mut command = self.program();
        command.args(["build", "--json", "-t", name]).args(options).arg(context);
        command.output().unwrap()
    }

    fn build(&self, name: &str, dockerfile: &str) -> Value {
        report(&self.build_with(name, dockerfile, &[]))
    }

    /// What the files of a built image are, as skopeo and umoci see it.
    fn unpacked(&self, name: &str) -> Option<PathBuf> {
        let bundle = self.path(&format!("bundle-{name}"));
        let image = format!("{}:docker.io/library/{name}:latest", self.path("data/images").display());
        tool("umoci", &["unpack", "--image", &image, bundle.to_str().unwrap()])?;
        Some(bundle.join("rootfs"))
    }

    fn manifest(&self, digest: &str) -> Value {
        self.blob_json(digest)
    }

    fn blob(&self, digest: &str) -> PathBuf {
        self.path("data/images/blobs/sha256").join(digest.strip_prefix("sha256:").unwrap())
    }

    fn blob_json(&self, digest: &str) -> Value {
        serde_json::from_slice(&fs::read(self.blob(digest)).unwrap()).unwrap()
    }

    /// The names in the image's top layer, by tar. The layer must not be compressed.
    fn top_layer(&self, report: &Value) -> Vec<String> {
        let manifest = self.manifest(report["digest"].as_str().unwrap());
        let layer =
            manifest["layers"].as_array().unwrap().last().unwrap()["digest"].as_str().unwrap().to_owned();
        let output = Command::new("tar").arg("tf").arg(self.blob(&layer)).output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
    }

    fn leftovers(&self) -> Vec<String> {
        let names = fs::read_dir(self.path("data/cache/layers")).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with('.')).collect()
    }
}

#[track_caller]
fn report(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[track_caller]
fn failure(output: &Output, code: i32) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    stderr
}

/// The output of a program that is an oracle; `None`, with the reason on stderr, where it is not installed.
#[track_caller]
fn tool(program: &str, arguments: &[&str]) -> Option<String> {
    match Command::new(program).args(arguments).output() {
        Ok(output) => {
            assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
            Some(String::from_utf8(output.stdout).unwrap())
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("SKIPPED: {program} is not installed");
            None
        }
        Err(error) => panic!("{program}: {error}"),
    }
}

#[test]
fn a_second_build_runs_nothing() {
    let Some(test) = TestBuild::new() else { return };
    test.write("file", "1");
    let dockerfile = format!(
        "{BASE}RUN head -c 32 /dev/urandom > /random\nCOPY file /file\nRUN cp /file /copy\nENV a=b\n"
    );
    let first = test.build("one", &dockerfile);
    assert_eq!((first["executed"].as_u64(), first["cached"].as_u64()), (Some(5), Some(0)));
    let second = test.build("two", &dockerfile);
    assert_eq!((second["executed"].as_u64(), second["cached"].as_u64()), (Some(0), Some(5)));
    assert_eq!(first["digest"], second["digest"], "random data would differ if anything had run");

    test.write("file", "2");
    let third = test.build("three", &dockerfile);
    assert_eq!((third["executed"].as_u64(), third["cached"].as_u64()), (Some(2), Some(3)));
    let fourth = report(&test.build_with("four", &dockerfile, &["--no-cache"]));
    assert_eq!(fourth["cached"].as_u64(), Some(0));
    assert_ne!(fourth["digest"], third["digest"]);
    assert!(test.leftovers().is_empty());
}

#[test]
fn layers_are_what_the_steps_did() {
    let Some(test) = TestBuild::new() else { return };
    test.write("tree/keep", "keep");
    test.write("tree/sub/gone", "gone");
    let dockerfile = format!(
        "{BASE}\
         RUN mkdir -p /etc && echo 'app:x:1000:1000::/home/app:/bin/sh' > /etc/passwd && echo 'app:x:1000:' > /etc/group\n\
         COPY --chown=app:app --chmod=0750 tree /srv/tree/\n\
         RUN rm -r /srv/tree/sub && mkdir /srv/tree/sub && echo new > /srv/tree/sub/new && rm /bin/vi \\\n\
         # a comment inside\n\
         \n\
         && ln /srv/tree/keep /srv/hard && ln -s keep /srv/tree/soft && chmod 4711 /srv/hard\n\
         WORKDIR /srv/work\n\
         USER app\n\
         RUN id -u > /tmp/uid 2>/dev/null || echo \"$(id -u) $HOME $(pwd)\"\n\
         ENV GREETING=\"hello world\"\n\
         EXPOSE 80 53/udp\n\
         LABEL a=b\n\
         ENTRYPOINT [\"/bin/sh\"]\n"
    );
    // umoci of 2022 knows no zstd.
    let output = test.build_with("app", &dockerfile, &["--compression", "gzip"]);
    let report = report(&output);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("| 1000 /home/app /srv/work"), "{stderr}");
    let manifest = test.manifest(report["digest"].as_str().unwrap());
    let config = test.blob_json(manifest["config"]["digest"].as_str().unwrap());
    assert_eq!(config["config"]["Env"], serde_json::json!(["GREETING=hello world"]));
    assert_eq!(config["config"]["User"], "app");
    assert_eq!(config["config"]["WorkingDir"], "/srv/work");
    assert_eq!(config["config"]["ExposedPorts"], serde_json::json!({"53/udp": {}, "80/tcp": {}}));

    let Some(root) = test.unpacked("app") else { return };
    assert!(!root.join("bin/vi").exists() && root.join("bin/sh").exists());
    assert!(!root.join("srv/tree/sub/gone").exists());
    assert_eq!(fs::read_to_string(root.join("srv/tree/sub/new")).unwrap(), "new\n");
    let (keep, hard) =
        (fs::metadata(root.join("srv/tree/keep")).unwrap(), fs::metadata(root.join("srv/hard")).unwrap());
    assert_eq!(keep.ino(), hard.ino());
    assert_eq!((keep.mode() & 0o7777, keep.uid(), keep.gid()), (0o4711, 1000, 1000));
    assert_eq!(fs::read_link(root.join("srv/tree/soft")).unwrap(), Path::new("keep"));
    assert!(root.join("srv/work").is_dir());
    for made_for_the_container in ["proc", "sys", "dev", "run", "etc/resolv.conf", "etc/hosts"] {
        assert!(!root.join(made_for_the_container).exists(), "{made_for_the_container}");
    }
}

#[test]
fn a_step_that_changes_nothing_makes_no_layer() {
    let Some(test) = TestBuild::new() else { return };
    let before = test.build("before", BASE);
    let after = test.build(
        "after",
        &format!("{BASE}RUN true\nRUN cat /etc/hosts /etc/resolv.conf >/dev/null\nWORKDIR /bin\n"),
    );
    assert_eq!(before["layers"], after["layers"]);
    let report =
        report(&test.build_with("one", &format!("{BASE}RUN echo x > /only\n"), &["--compression", "none"]));
    assert_eq!(test.top_layer(&report), ["only"]);
}

#[test]
fn host_certificates_are_seen_and_leave_no_trace() {
    let Some(test) = TestBuild::new() else { return };
    let bundle = test.path("bundle.crt");
    fs::write(&bundle, "-----BEGIN CERTIFICATE-----\nmarker\n").unwrap();
    let build = |name: &str, command: &str, options: &[&str]| {
        test.write("Dockerfile", &format!("{BASE}RUN {command} && echo x > /only\n"));
        let mut builder = test.program();
        builder.env("SSL_CERT_FILE", &bundle).args([
            "build",
            "--json",
            "--no-cache",
            "--compression",
            "none",
            "-t",
            name,
        ]);
        report(&builder.args(options).arg(test.path("context")).output().unwrap())
    };
    let with = build(
        "with",
        "grep -q marker \"$SSL_CERT_FILE\" && grep -q CaInfo \"$APT_CONFIG\" && test -n \"$NODE_EXTRA_CA_CERTS\"",
        &["--host-ca"],
    );
    let without = build("without", "test -z \"$SSL_CERT_FILE$APT_CONFIG\" && test ! -e /run", &[]);
    for report in [&with, &without] {
        assert_eq!(test.top_layer(report), ["only"]);
        let manifest = test.manifest(report["digest"].as_str().unwrap());
        let config = fs::read_to_string(test.blob(manifest["config"]["digest"].as_str().unwrap())).unwrap();
        assert!(!config.contains("ca.crt") && !config.contains("\"Env\""), "{config}");
    }
}

#[test]
fn a_failing_step_names_its_line_and_code() {
    let Some(test) = TestBuild::new() else { return };
    let stderr = failure(&test.build_with("bad", &format!("{BASE}\nRUN echo said && exit 7\n"), &[]), 1);
    assert!(stderr.contains("| said"), "{stderr}");
    assert!(
        stderr.contains("Dockerfile:5:1: the command exited with code 7\n    RUN echo said && exit 7"),
        "{stderr}"
    );
    let stderr = failure(&test.build_with("bad", &format!("{BASE}RUN [\"/no/such\"]\n"), &[]), 1);
    assert!(
        stderr.contains("Dockerfile:4:1: cannot start the command") && stderr.contains("/no/such"),
        "{stderr}"
    );
    let images: Value = report(&test.run(&["images", "--json"]));
    assert_eq!(images, serde_json::json!([]));
    assert!(test.leftovers().is_empty());
}

#[test]
fn bad_input_is_refused_before_anything_runs() {
    let Some(test) = TestBuild::new() else { return };
    fs::write(test.path("secret"), "secret").unwrap();
    std::os::unix::fs::symlink("../secret", test.path("context/link")).unwrap();
    for (dockerfile, text) in [
        ("FROM scratch\nCOPY ../secret /\n", "Dockerfile:2:1: ../secret: it leads outside of the context"),
        ("FROM scratch\nCOPY link /\n", "Dockerfile:2:1: link: it leads outside of the folder"),
        ("FROM scratch\nCOPY nope /\n", "Dockerfile:2:1: nope: no such file in the context"),
        ("FROM scratch\nRUNN x\n", "Dockerfile:2:1: unknown instruction \"RUNN\"; did you mean RUN?"),
        ("FROM oci:/no/such:x\n", "oci-layout is missing"),
        ("FROM scratch\nUSER who\nCOPY --chown=who busybox /\n", "/etc/passwd of the image has no such user"),
    ] {
        let stderr = failure(&test.build_with("bad", dockerfile, &[]), 2);
        assert!(stderr.contains(text), "{stderr}");
    }
    let stderr = failure(&test.build_with("bad", "FROM 127.0.0.1:1/no/image:1\n", &[]), 1);
    assert!(stderr.contains("the local store") && stderr.contains("the registry 127.0.0.1:1"), "{stderr}");
    failure(&test.run(&["build", "-t", "NOT/Valid", "."]), 2);
    failure(&test.run(&["save", "absent", "-o", "oci:x:y"]), 1);
}

#[test]
fn stages_give_files_to_later_ones() {
    let Some(test) = TestBuild::new() else { return };
    let dockerfile = format!(
        "ARG where=/out\n{}ARG where\nRUN mkdir -p $where/d && echo built > $where/d/file && chown -R 5:6 $where && ln -s d $where/link\n\
         FROM scratch AS unused\nCOPY missing /\n\
         FROM scratch\nCOPY --from=make /out/link/ /got/\nCOPY --from=0 /bin/busybox /b\nCOPY <<here /inline\nv=$v\nhere\n",
        BASE.replace("FROM scratch", "FROM scratch AS make")
    );
    let report = report(&test.build_with("staged", &dockerfile, &["--compression", "gzip"]));
    assert_eq!(report["layers"], 3);
    let Some(root) = test.unpacked("staged") else { return };
    let file = root.join("got/file");
    assert_eq!(fs::read_to_string(&file).unwrap(), "built\n");
    assert_eq!(fs::metadata(&file).unwrap().uid(), 5, "between stages owners are kept");
    assert_eq!(fs::read_to_string(root.join("inline")).unwrap(), "v=\n");
}

#[test]
fn skopeo_reads_the_store_and_archives_come_back() {
    let Some(test) = TestBuild::new() else { return };
    let built = test.build("app:1", BASE);
    let digest = built["digest"].as_str().unwrap();
    let image = format!("oci:{}:docker.io/library/app:1", test.path("data/images").display());
    let Some(inspected) = tool("skopeo", &["inspect", &image]) else { return };
    let inspected: Value = serde_json::from_str(&inspected).unwrap();
    assert_eq!(inspected["Digest"], digest);
    tool("skopeo", &["copy", &image, &format!("dir:{}", test.path("dir").display())]).unwrap();

    let ours = format!("oci-archive:{}:v1", test.path("ours.tar").display());
    assert!(test.run(&["save", "app:1", "-o", &ours]).status.success());
    let theirs = format!("oci-archive:{}:v2", test.path("theirs.tar").display());
    tool("skopeo", &["copy", &ours, &theirs]).unwrap();
    let loaded = report(&test.run(&["load", &theirs, "-t", "back", "--json"]));
    assert_eq!(loaded["digest"], digest);
    let layout = format!("oci:{}:x", test.path("layout").display());
    assert!(test.run(&["save", "back", "-o", &layout]).status.success());
    assert_eq!(report(&test.run(&["load", &layout, "-t", "again:2", "--json"]))["digest"], digest);
    let names = report(&test.run(&["images", "--json"]));
    let names: Vec<_> =
        names.as_array().unwrap().iter().map(|image| image["name"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        ["docker.io/library/again:2", "docker.io/library/app:1", "docker.io/library/back:latest"]
    );
}

#[test]
fn a_corrupt_blob_is_refused_by_digest() {
    let Some(test) = TestBuild::new() else { return };
    let built = test.build("base", BASE);
    let manifest = test.manifest(built["digest"].as_str().unwrap());
    let layer = manifest["layers"][0]["digest"].as_str().unwrap();
    let mut bytes = fs::read(test.blob(layer)).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(test.blob(layer), bytes).unwrap();
    // The unpacked copy is still good; without it the blob is read.
    fs::remove_dir_all(test.path("data/cache/layers")).unwrap();
    let stderr = failure(&test.build_with("derived", "FROM base\nRUN true\n", &[]), 1);
    assert!(stderr.contains(layer) && stderr.contains("expected sha256:"), "{stderr}");
    assert!(test.leftovers().is_empty());
    let names = report(&test.run(&["images", "--json"]));
    assert_eq!(names.as_array().unwrap().len(), 1);
    test.build("other", "FROM scratch\nENV a=b\n");
}

#[test]
fn builds_at_the_same_time_lose_nothing() {
    let Some(test) = TestBuild::new() else { return };
    test.write("Dockerfile", &format!("{BASE}ARG n\nRUN echo $n > /n\n"));
    let children: Vec<_> = (0..4)
        .map(|number| {
            let mut command = test.program();
            let (name, arg) = (format!("parallel:{number}"), format!("n={number}"));
            command.args(["--quiet", "build", "-t", &name, "--build-arg", &arg]).arg(test.path("context"));
            command.stdout(Stdio::null()).spawn().unwrap()
        })
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(report(&test.run(&["images", "--json"])).as_array().unwrap().len(), 4);
}

/// Starts a build whose step says that it runs and then waits for ever. Gives the build and the step's process.
fn endless_build(test: &TestBuild) -> (std::process::Child, rustix::fd::OwnedFd) {
    let marker = format!("9{:09}", std::process::id());
    test.write("Dockerfile", &format!("{BASE}RUN echo running; sleep {marker}; true\n"));
    let mut command = test.program();
    command.args(["build", "--no-cache", "-t", "endless"]).arg(test.path("context"));
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stderr.as_mut().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line.ends_with("| running")), "the step did not run");
    let pid = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse::<i32>().ok())
        .find(|pid| {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let text = String::from_utf8_lossy(&command).into_owned();
            text.contains(&marker) && text.starts_with("/bin/sh")
        })
        .expect("the step has a process");
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    (child, rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap())
}

/// Waits for the end of the process; a hang is a failure, after a time that no machine needs.
#[track_caller]
fn ends(process: &rustix::fd::OwnedFd) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(process, PollFlags::IN)];
    let limit = Timespec { tv_sec: 60, tv_nsec: 0 };
    assert_eq!(poll(&mut fds, Some(&limit)).unwrap(), 1, "the step outlived its build");
}

#[test]
fn ctrl_c_ends_the_step_and_cleans_up() {
    let Some(test) = TestBuild::new() else { return };
    let (mut child, step) = endless_build(&test);
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    ends(&step);
    assert!(test.leftovers().is_empty());
}

#[test]
fn a_killed_build_leaves_no_process_no_mount_and_what_the_next_one_sweeps() {
    let Some(test) = TestBuild::new() else { return };
    let (mut child, step) = endless_build(&test);
    child.kill().unwrap();
    child.wait().unwrap();
    ends(&step);
    assert_eq!(test.leftovers().len(), 1);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(test.path("data").to_str().unwrap()));
    test.build("next", BASE);
    assert!(test.leftovers().is_empty());
}

#[test]
fn templates_are_made_from_images() {
    let Some(test) = TestBuild::new() else { return };
    let built = test.build("app", &format!("{BASE}ENV A=b\nWORKDIR /w\nCMD [\"sh\"]\n"));
    let create = [
        "template",
        "create",
        "app",
        "--image",
        "app",
        "--cpus",
        "2",
        "--memory",
        "256",
        "--disk",
        "64",
        "--snapshot",
        "never",
        "--json",
    ];
    let made = report(&test.run(&create));
    assert_eq!(made["template"]["image"]["digest"], built["digest"]);
    assert_eq!(
        made["template"]["machine"],
        serde_json::json!({"cpus": 2, "memory_mib": 256, "disk_mib": 64})
    );
    assert_eq!(made["template"]["runtime"]["env"], serde_json::json!({"A": "b"}));
    assert_eq!(report(&test.run(&["template", "list", "--json"])), serde_json::json!(["app"]));
    assert_eq!(report(&test.run(&["template", "inspect", "app"])), made["template"]);

    assert!(made["template"]["runtime"].get("start_command").is_none());

    // A template's commands are its options, else its image's labels, which images FROM that one inherit.
    test.build("server", &format!("{BASE}LABEL tiffin.start=\"run it\" tiffin.ready=check\n"));
    test.build("more", "FROM server\nENV A=b\n");
    for (options, start, ready) in [
        (&[][..], "run it".into(), "check".into()),
        (&["--start", "other", "--ready", ""], "other".into(), Value::Null),
    ] {
        let create = ["template", "create", "more", "--image", "more", "--snapshot", "never", "--json"];
        let create = [&create, options].concat();
        let runtime = &report(&test.run(&create))["template"]["runtime"];
        assert_eq!((&runtime["start_command"], &runtime["ready_command"]), (&start, &ready));
    }
    assert!(test.run(&["template", "delete", "more"]).status.success());

    let small = ["template", "create", "small", "--image", "app", "--rootfs-size", "1"];
    let stderr = failure(&test.run(&small), 2);
    assert!(
        stderr.contains("the size asked for is 1 MiB") && stderr.contains("the contents need"),
        "{stderr}"
    );
    assert!(test.run(&["template", "delete", "app"]).status.success());
    failure(&test.run(&["template", "inspect", "app"]), 1);
    assert_eq!(fs::read_dir(test.path("data/templates")).unwrap().count(), 0);
}
