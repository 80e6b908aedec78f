//! The same Dockerfiles by buildah (Debian package `buildah`) and by the program: the trees and the configs must be the same.
//!
//! buildah is a peer and not the measure: where it differs from BuildKit, BuildKit counts, and the case says so with the
//! reason. Both build as root, buildah with `--isolation chroot` and storage of its own in the test's folder.

#[path = "support/trees.rs"]
mod trees;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use oci::layer::{Kind, LayerPath};
use serde_json::Value;
use trees::{Builder, TreeFile};

const BASE: &str = "FROM scratch\nCOPY busybox /bin/busybox\nRUN [\"/bin/busybox\", \"--install\", \"-s\", \"/bin\"]\n\
    COPY <<end /etc/passwd\nroot:x:0:0:root:/root:/bin/sh\napp:x:1000:100:App:/home/app:/bin/sh\nend\n\
    COPY <<end /etc/group\nroot:x:0:\nusers:x:100:app\nstaff:x:50:\nend\n\
    RUN mkdir /tmp && chmod 1777 /tmp\n\
    ENV PATH=/bin LANG=C\nCMD [\"/bin/sh\"]\nLABEL base=yes\n";

/// What buildah's containers leave in every image with a RUN: places to mount, and files for the network.
const LEFT_BY_BUILDAH: [&str; 8] =
    ["/dev", "/proc", "/sys", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/run", "/etc"];

/// Files of the context with setuid or setgid: buildah's COPY takes those bits away, BuildKit's keeps them.
const LOSES_SET_ID: [&str; 2] = ["/setuid", "/sub"];

/// The fields of a config that are compared.
const FIELDS: [&str; 12] = [
    "Env",
    "Cmd",
    "Entrypoint",
    "User",
    "WorkingDir",
    "Labels",
    "ExposedPorts",
    "Volumes",
    "StopSignal",
    "Shell",
    "Healthcheck",
    "OnBuild",
];

/// A Dockerfile on the base.
struct Case {
    title: &'static str,
    dockerfile: &'static str,
    /// Lines of one tree or the other that begin so, with a space behind, and fields of the config, where buildah differs
    /// from BuildKit, with the reason.
    known: &'static [(&'static str, &'static str)],
}

const fn case(title: &'static str, dockerfile: &'static str) -> Case {
    Case { title, dockerfile, known: &[] }
}

/// buildah's storage, and both sides' base.
struct Both {
    builder: Builder,
}

impl Both {
    /// `None`, with the reason on stderr, where one of them cannot build.
    fn new(name: &str) -> Option<Self> {
        let builder = Builder::new(name)?;
        let busybox = ["/bin/busybox", "/usr/bin/busybox"].iter().find(|path| fs::exists(path).unwrap());
        let Some(busybox) = busybox else {
            eprintln!("SKIPPED: no /bin/busybox; install busybox-static");
            return None;
        };
        if Command::new("buildah").arg("--version").output().is_err() {
            eprintln!("SKIPPED: buildah is not installed");
            return None;
        }
        fs::copy(busybox, builder.path("context/busybox")).unwrap();
        fs::write(builder.path("Dockerfile"), BASE).unwrap();
        builder.build_as(&["-t", "localhost/base", "--compression", "gzip", "-f", "Dockerfile", "context"]);
        fs::remove_file(builder.path("context/busybox")).unwrap();
        let both = Self { builder };
        // A relative path: buildah makes a name of it, and names have no capitals.
        both.buildah(&["pull", "-q", "oci:data/images:localhost/base:latest"]);
        let id = both.buildah(&["images", "-q"]);
        both.buildah(&["tag", id.trim(), "localhost/base:latest"]);
        Some(both)
    }

    #[track_caller]
    fn buildah(&self, arguments: &[&str]) -> String {
        let mut command = Command::new("buildah");
        command.current_dir(self.builder.path("."));
        command
            .arg("--root")
            .arg(self.builder.path("buildah"))
            .arg("--runroot")
            .arg(self.builder.path("buildah-run"));
        let output = command.args(["--storage-driver", "vfs"]).args(arguments).output().unwrap();
        assert!(
            output.status.success(),
            "buildah {arguments:?}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// The tree and the config that buildah makes.
    fn theirs(&self, text: &str) -> (BTreeMap<LayerPath, TreeFile>, Value) {
        let (file, context) = (self.builder.path("Dockerfile"), self.builder.path("context"));
        fs::write(&file, text).unwrap();
        let out = self.builder.path("out");
        self.buildah(&[
            "bud",
            "-q",
            "--isolation",
            "chroot",
            "--format",
            "docker",
            "--pull-never",
            "--identity-label=false",
            "--network",
            "host",
            "-t",
            "case",
            "-f",
            file.to_str().unwrap(),
            context.to_str().unwrap(),
        ]);
        self.buildah(&["push", "-q", "case", &format!("oci:{}:case", out.display())]);
        let inspected: Value =
            serde_json::from_str(&self.buildah(&["inspect", "--type", "image", "case"])).unwrap();
        self.buildah(&["rmi", "case"]);
        let store = oci::Store::open(&out).unwrap();
        let descriptor = store.resolve("case").unwrap().unwrap();
        let image = oci::Image::open(&store, &descriptor).unwrap();
        let mut files = BTreeMap::new();
        image.layers.iter().for_each(|layer| trees::apply(&mut files, layer.open().unwrap()));
        fs::remove_dir_all(&out).unwrap();
        (files, inspected["Docker"]["config"].clone())
    }

    /// What differs, one line each.
    fn differences(&self, case: &Case) -> Vec<String> {
        let text = format!("FROM localhost/base:latest\n{}", case.dockerfile);
        let (files, config) = self.theirs(&text);
        let ours = self.builder.build(&text, &[]);
        let known = |line: &str| {
            case.known.iter().any(|(start, _)| line.split(' ').next() == Some(*start))
                || line
                    .split(' ')
                    .next()
                    .is_some_and(|path| LOSES_SET_ID.iter().any(|name| path.ends_with(name)))
                || LEFT_BY_BUILDAH.contains(&line.split(' ').next().unwrap_or_default())
                || ["/dev/", "/proc/", "/sys/", "/run/"].iter().any(|folder| line.starts_with(folder))
        };
        let (theirs, mine) = (lines(&files), lines(&ours.files));
        let mut differences = Vec::new();
        for line in theirs.iter().filter(|line| !mine.contains(line) && !known(line)) {
            differences.push(format!("buildah only: {line}"));
        }
        for line in mine.iter().filter(|line| !theirs.contains(line) && !known(line)) {
            differences.push(format!("ours only:    {line}"));
        }
        for field in FIELDS.iter().filter(|field| !known(field)) {
            let (theirs, mine) = (present(&config[field]), present(&ours.config["config"][field]));
            if theirs != mine {
                differences.push(format!("{field}: buildah {theirs}, ours {mine}"));
            }
        }
        differences
    }

    fn check(&self, cases: &[Case]) {
        let mut differences = String::new();
        for case in cases {
            for line in self.differences(case) {
                differences.push_str(&format!("{}: {line}\n", case.title));
            }
            assert!(case.known.iter().all(|(_, reason)| !reason.is_empty()));
        }
        assert!(differences.is_empty(), "\n{differences}");
    }
}

fn is_variable(item: &Value) -> bool {
    item.as_str().is_some_and(|text| text.contains('='))
}

/// Nothing is the same as an empty thing.
fn present(value: &Value) -> Value {
    let empty = match value {
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    };
    let mut value = if empty { Value::Null } else { value.clone() };
    if let Some(items) = value.as_array_mut().filter(|items| items.iter().all(is_variable)) {
        // buildah puts a variable that changes at the end, BuildKit leaves it where it is.
        items.sort_by_key(|item| item.to_string());
    }
    // Docker's own writers leave out what is 0.
    if let Some(fields) = value.as_object_mut() {
        fields.retain(|_, field| field.as_u64() != Some(0));
    }
    value
}

/// Each file as a line; of a file with several names all of them, as the order of a layer is nobody's business. Times are
/// compared where COPY keeps them: files of the context are of one second in 2001.
fn lines(files: &BTreeMap<LayerPath, TreeFile>) -> Vec<String> {
    let first = |path: &LayerPath| -> LayerPath {
        let mut path = path.clone();
        while let Some(TreeFile { node, .. }) = files.get(&path)
            && let Kind::HardLink(target) = &node.kind
        {
            path = target.clone();
        }
        path
    };
    let mut names: BTreeMap<LayerPath, Vec<String>> = BTreeMap::new();
    for path in files.keys() {
        names.entry(first(path)).or_default().push(path.to_string());
    }
    let mut lines = Vec::new();
    for path in files.keys().filter(|path| !path.is_root()) {
        let TreeFile { node, contents } = &files[&first(path)];
        let metadata = &node.metadata;
        let (mode, uid, gid) = (metadata.mode, metadata.uid, metadata.gid);
        let kind = match &node.kind {
            Kind::File { .. } | Kind::Sparse { .. } => format!("file {}", oci::Hasher::digest_of(contents)),
            Kind::Symlink(target) => format!("link {}", String::from_utf8_lossy(target)),
            other => format!("{other:?}"),
        };
        let mode = if matches!(node.kind, Kind::Symlink(_)) { 0o777 } else { mode };
        let time = match metadata.mtime.seconds {
            OLD => " of 2001",
            _ => "",
        };
        let all = &names[&first(path)];
        let all = if all.len() > 1 { format!(" = {all:?}") } else { String::new() };
        let xattrs =
            if metadata.xattrs.is_empty() { String::new() } else { format!(" {:?}", metadata.xattrs) };
        lines.push(format!("{path} {mode:o} {uid}:{gid} {kind}{time}{all}{xattrs}"));
    }
    lines
}

/// The time of every file in the context.
const OLD: i64 = 1_000_000_000;

/// A context with one of everything.
fn fill(builder: &Builder) {
    builder.write(&[
        ("a.txt", "a"),
        ("b.txt", "b"),
        ("run.sh", "#!/bin/sh\necho run\n"),
        ("with space", "space"),
        ("d/x", "x"),
        ("d/sub/y", "y"),
        ("d/sub/z.md", "z"),
        ("d/setuid", "s"),
        ("twins/one", "twin"),
        ("ignored.txt", "ignored"),
        ("d/ignored.txt", "not"),
        (".dockerignore", "ignored.txt\n.dockerignore\n"),
    ]);
    let context = builder.path("context");
    fs::create_dir_all(context.join("empty/inner")).unwrap();
    fs::hard_link(context.join("twins/one"), context.join("twins/two")).unwrap();
    symlink("x", context.join("d/link")).unwrap();
    symlink("d", context.join("dirlink")).unwrap();
    symlink("a.txt", context.join("filelink")).unwrap();
    symlink("/etc/nowhere", context.join("d/dangling")).unwrap();
    for (path, mode) in [
        ("a.txt", 0o644),
        ("b.txt", 0o600),
        ("run.sh", 0o755),
        ("d", 0o750),
        ("d/x", 0o640),
        ("d/sub", 0o2775),
        ("d/setuid", 0o4755),
        ("empty", 0o711),
        ("empty/inner", 0o1777),
        ("twins/one", 0o644),
        ("with space", 0o644),
        ("d/sub/y", 0o644),
        ("d/sub/z.md", 0o644),
        ("twins", 0o755),
        ("d/ignored.txt", 0o644),
    ] {
        fs::set_permissions(context.join(path), fs::Permissions::from_mode(mode)).unwrap();
    }
    let owner = ["--owner=7", "--group=8", "--numeric-owner", "--mtime=@1000000000"];
    let mut tar = Command::new("tar");
    tar.args(owner)
        .arg("-C")
        .arg(&context)
        .arg("-czf")
        .arg(builder.path("a.tgz"))
        .args(["d", "twins", "empty"]);
    assert!(tar.status().unwrap().success());
    fs::rename(builder.path("a.tgz"), context.join("a.tgz")).unwrap();
    age(&context);
}

/// Gives everything below one time, innermost first.
fn age(path: &Path) {
    if fs::symlink_metadata(path).unwrap().is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            age(&entry.unwrap().path());
        }
    }
    let time = rustix::fs::Timespec { tv_sec: OLD, tv_nsec: 0 };
    let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

#[test]
fn files_are_copied_as_buildah_copies_them() {
    let Some(both) = Both::new("differential-files") else { return };
    fill(&both.builder);
    both.check(&[
        case(
            "files and folders",
            "COPY a.txt /new\nCOPY a.txt run.sh /in/\nCOPY b.txt /tmp\nCOPY *.txt /t/\nCOPY d /srv\nCOPY d/ /srv2/\n",
        ),
        case("all", "COPY . /all/\n"),
        case("modes and empty folders", "COPY empty /e\nCOPY d/setuid /s/\n"),
        case("links as sources", "COPY filelink /f\nCOPY dirlink /g\n"),
        case("a name with a space", "COPY [\"with space\", \"/spaced name\"]\n"),
        case("owners by number", "COPY --chown=5:6 d /o\n"),
        case("owners by name", "COPY --chown=app d /o\nCOPY --chown=app:staff a.txt /p\nCOPY --chown=:staff a.txt /q\n"),
        case("an octal mode", "COPY --chmod=640 a.txt run.sh /m/\n"),
        case("from a stage", "FROM localhost/base:latest AS two\nCOPY --chown=9:9 d /d\nFROM localhost/base:latest\nCOPY --from=two /d /e\n"),
        case("through a link of the image", "RUN ln -s /srv /l && mkdir /srv\nCOPY a.txt /l/\nCOPY d /l\n"),
        case("over what is there", "COPY a.txt /f\nCOPY b.txt /f\nCOPY d /d\nCOPY twins /d\n"),
        case("an archive", "ADD a.tgz /unpacked/\n"),
        case("an archive as it is", "COPY a.tgz /packed\n"),
        case("several sources of a kind", "ADD a.txt d /mixed/\n"),
        case("to the working directory", "WORKDIR /w/x\nCOPY a.txt .\nCOPY b.txt ../up\n"),
    ]);
}

#[test]
fn configs_are_what_buildah_writes() {
    let Some(both) = Both::new("differential-config") else { return };
    fill(&both.builder);
    both.check(&[
        case("environment", "ARG a=1\nENV b=$a c=\"two words\" d='$a' PATH=/x:$PATH\nENV e f g\n"),
        case("expansion", "ARG x=abc\nENV y=${x:-z} z=${u:-def} w=${x:+set} v=${u:+set} s=\\$x\n"),
        case("labels", "LABEL a=b \"c d\"=\"e f\" base=no\nLABEL multi=\"one \\\n two\"\n"),
        case("ports", "EXPOSE 80 443/tcp 53/udp\nEXPOSE 80\n"),
        case("a command as text", "CMD echo hello\n"),
        case("a command as words", "CMD [\"echo\", \"hello\"]\n"),
        case("an entry point", "CMD x\nENTRYPOINT [\"/bin/sh\", \"-c\"]\n"),
        case("an entry point that drops the base's command", "ENTRYPOINT /bin/true\n"),
        case("a user", "USER app\nWORKDIR /home/app\n"),
        case("users and groups", "USER 5:6\nUSER app:staff\n"),
        case("working directories", "WORKDIR /a\nWORKDIR b\nWORKDIR ../c\nENV d=e\nWORKDIR $d\n"),
        case("a stop signal", "STOPSIGNAL SIGUSR1\n"),
        Case {
            title: "another shell",
            dockerfile: "SHELL [\"/bin/ash\", \"-ec\"]\nCMD x\n",
            known: &[(
                "Cmd",
                "buildah 1.28 runs CMD with /bin/sh -c, whatever SHELL says; the reference says SHELL",
            )],
        },
        case("a health check", "HEALTHCHECK --interval=5s --timeout=3s --retries=2 CMD true\n"),
        case("no health check", "HEALTHCHECK NONE\n"),
        case("triggers", "ONBUILD RUN echo x\nONBUILD COPY a.txt /x\n"),
        Case {
            title: "volumes",
            dockerfile: "VOLUME /v\nVOLUME [\"/w\", \"/x\"]\n",
            known: &[
                ("/w", "buildah makes folders for some volumes"),
                ("/x", "BuildKit's VOLUME changes the config alone"),
            ],
        },
    ]);
}

#[test]
fn commands_see_and_leave_the_same() {
    let Some(both) = Both::new("differential-run") else { return };
    fill(&both.builder);
    both.check(&[
        case("files and modes", "RUN mkdir -p /r/d && echo x > /r/d/f && chmod 4711 /r/d/f && ln /r/d/f /r/g && ln -s g /r/h && mkfifo /r/p\n"),
        case("removals", "COPY d /d\nRUN rm -r /d/sub && rm /bin/vi && mkdir /d/sub && echo n > /d/sub/n\n"),
        case("the environment", "ARG a=1\nENV b=2\nUSER app\nWORKDIR /tmp\nRUN echo \"$a $b $HOME $(id -u) $(id -g) $(pwd) $PATH\" > /tmp/said\n"),
        case("owners", "RUN echo x > /f && chown app:staff /f && chmod 2755 /f\n"),
        case("another shell", "SHELL [\"/bin/sh\", \"-uc\"]\nRUN echo \"$-\" | grep -o u > /f\n"),
        case("continuations", "RUN echo one \\\n  # a comment\n\n  two > /f \\\n  && echo three >> /f\n"),
        case("words", "RUN [\"/bin/sh\", \"-c\", \"echo $PATH > /f\"]\n"),
        case("stages", "FROM localhost/base:latest AS make\nRUN echo made > /made\nFROM make AS more\nRUN echo more > /more\nFROM localhost/base:latest\nCOPY --from=more /made /more /x/\nCOPY --from=more /made /y\n"),
    ]);
}
