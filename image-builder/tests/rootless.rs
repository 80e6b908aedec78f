//! Builds by an ordinary user, who is made for the test: with ids of its own, with one id, and where user namespaces are
//! forbidden. The image is the one that root builds.

mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt, chown, lchown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// Every file and folder has a time of its own making, so that two builds are the same bytes.
const BASE: &str = "FROM scratch\nCOPY tree/ /\n";
/// The time of folders that COPY makes.
const EPOCH: &str = "1600000000";
const OLD: &str = "202001010000";

/// A user of this machine. Dropping it removes it with all that it made.
struct User {
    name: String,
    uid: u32,
    gid: u32,
    home: tempfile::TempDir,
}

impl User {
    /// `None`, with the reason on stderr, where this machine cannot make users. `number` tells the tests of one process
    /// apart.
    fn new(number: u32, with_ids: bool) -> Option<Self> {
        let busybox = support::busybox()?;
        for program in ["useradd", "usermod", "newuidmap"] {
            if !["/usr/sbin", "/usr/bin"].iter().any(|folder| Path::new(folder).join(program).exists()) {
                eprintln!("SKIPPED: no {program}; install passwd and uidmap");
                return None;
            }
        }
        // The user must get there, and overlayfs needs a real file system: neither target/ nor /tmp is sure to be one.
        let home = tempfile::Builder::new().prefix("tiffin-rootless-").tempdir_in("/var/tmp").unwrap();
        let name = format!("tfn{}n{number}", std::process::id());
        let _lock = lock();
        admin("useradd", &["--system", "--user-group", "--no-create-home", "--shell", "/bin/sh", &name]);
        let mut user = Self { name, uid: 0, gid: 0, home };
        let passwd = fs::read_to_string("/etc/passwd").unwrap();
        let line = passwd.lines().find(|line| line.starts_with(&format!("{}:", user.name))).unwrap();
        let mut ids = line.split(':').skip(2).map(|field| field.parse().unwrap_or_default());
        (user.uid, user.gid) = (ids.next().unwrap(), ids.next().unwrap());
        if with_ids {
            // Above what distributions give out.
            let first = 2_000_000_000 + std::process::id() % 10_000 * 65_536;
            let range = format!("{first}-{}", first + 65_535);
            admin("usermod", &["--add-subuids", &range, "--add-subgids", &range, &user.name]);
        }
        let program = user.path("image-builder");
        fs::copy(env!("CARGO_BIN_EXE_image-builder"), &program).unwrap();
        fs::create_dir_all(user.path("context/tree/bin")).unwrap();
        fs::create_dir_all(user.path("context/tree/d/old")).unwrap();
        fs::copy(busybox, user.path("context/tree/bin/busybox")).unwrap();
        for file in ["file", "gone", "old/file"] {
            fs::write(user.path("context/tree/d").join(file), file).unwrap();
        }
        let tree = user.path("context/tree");
        let old = ["-exec", "touch", "-h", "-t", OLD, "{}", "+"];
        assert!(Command::new("find").arg(&tree).args(old).status().unwrap().success());
        chown(user.home.path(), Some(user.uid), Some(user.gid)).unwrap();
        Some(user)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    fn dockerfile(&self, steps: &str) {
        fs::write(self.path("context/Dockerfile"), format!("{BASE}{steps}")).unwrap();
    }

    fn arguments(&self, data: &str, options: &[&str]) -> Vec<String> {
        let data = self.path(data).display().to_string();
        let context = self.path("context").display().to_string();
        let build = ["--data-dir", &data, "build", "--json", "--compression", "none", "-t", "image"];
        build.iter().chain(options).copied().chain([context.as_str()]).map(str::to_owned).collect()
    }

    /// Builds as this user.
    fn build(&self, options: &[&str]) -> Output {
        let mut command = Command::new(self.path("image-builder"));
        command
            .uid(self.uid)
            .gid(self.gid)
            .env("HOME", self.home.path())
            .env("SOURCE_DATE_EPOCH", EPOCH)
            .current_dir("/");
        command.args(self.arguments("data", options)).output().unwrap()
    }

    /// Removes all that this user's builds left.
    fn prune(&self) -> Output {
        let mut command = Command::new(self.path("image-builder"));
        command.uid(self.uid).gid(self.gid).env("HOME", self.home.path()).current_dir("/");
        command.arg("--data-dir").arg(self.path("data")).args(["prune", "--all"]).output().unwrap()
    }

    /// Builds as root.
    fn build_as_root(&self) -> Output {
        let mut command = Command::new(self.path("image-builder"));
        command.env("SOURCE_DATE_EPOCH", EPOCH).args(self.arguments("root-data", &[])).output().unwrap()
    }

    /// The digests of the layers' contents.
    #[track_caller]
    fn diff_ids(&self, data: &str, output: &Output) -> Value {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let blob = |digest: &Value| -> Value {
            let digest = digest.as_str().unwrap().strip_prefix("sha256:").unwrap().to_owned();
            let path = self.path(data).join("images/blobs/sha256").join(digest);
            serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
        };
        blob(&blob(&report["digest"])["config"]["digest"])["rootfs"]["diff_ids"].clone()
    }

    /// The folder of unpacked layers.
    fn layers(&self) -> PathBuf {
        let entries = fs::read_dir(self.path("data/cache")).unwrap().map(|entry| entry.unwrap().path());
        let is_layers = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with("layers");
        let mut found: Vec<_> = entries.filter(is_layers).collect();
        assert_eq!(found.len(), 1, "{found:?}");
        found.pop().unwrap()
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let _lock = lock();
        // Also its lines in /etc/subuid.
        let _ = Command::new("userdel").arg(&self.name).output();
    }
}

/// /etc/passwd and its friends are changed by one test at a time.
fn lock() -> fs::File {
    let file = fs::File::create(Path::new(env!("CARGO_TARGET_TMPDIR")).join("users.lock")).unwrap();
    file.lock().unwrap();
    file
}

#[track_caller]
fn admin(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Steps that need no owner but root and that of the layers below, and whose result has no time of its own.
fn steps_of_one_owner() -> String {
    format!(
        "COPY --chown=7:8 tree/d /owned\n\
         SHELL [\"/bin/busybox\", \"sh\", \"-euc\"]\n\
         RUN export PATH=/x; b=/bin/busybox; $b mkdir -p /new/sub; echo x > /new/sub/f; $b ln /new/sub/f /new/hard; \
             $b ln -s sub /new/soft; $b chmod 4711 /new/sub/f; echo more >> /owned/file; $b rm /owned/gone; \
             $b rm -r /owned/old; $b mkdir /owned/old; echo y > /owned/old/other; \
             $b touch -h -d {OLD} /new/soft; $b touch -d {OLD} /new/sub/f /new/sub /new /owned/file /owned/old/other /owned/old /owned\n"
    )
}

#[test]
fn with_subordinate_ids_the_image_is_roots() {
    let Some(user) = User::new(1, true) else { return };
    user.dockerfile(&format!(
        "FROM scratch\nCOPY tree/ /\n{}\
         RUN b=/bin/busybox; echo z > /mine; $b chown 33:34 /mine /owned/file; $b touch -d {OLD} /mine /owned/file\n\
         USER 1000:1001\n\
         RUN b=/bin/busybox; $b test $($b id -u) = 1000; ! echo x 2>/dev/null > /mine; ! $b unshare -m $b true 2>/dev/null; \
             $b grep -q 'Seccomp:.2' /proc/self/status; $b test $$ -lt 10\n\
         USER 0\n\
         RUN --network=none --mount=type=cache,target=/c --mount=type=tmpfs,target=/t --mount=from=0,target=/s,rw \
             b=/bin/busybox; $b touch /c/x /t/x /s/x; $b chown 5:5 /c/x; ! $b mknod /t/null c 1 3 2>/dev/null; \
             $b ip addr | $b grep -q 127.0.0.1\n",
        steps_of_one_owner()
    ));

    let ours = user.build(&[]);
    let told = stderr(&ours);
    let ids = user.diff_ids("data", &ours);
    assert!(
        told.contains("isolation: containers in a user namespace, with the ids of /etc/subuid"),
        "{told}"
    );
    assert_eq!(ids, user.diff_ids("root-data", &user.build_as_root()));
    assert_eq!(ids.as_array().unwrap().len(), 4);
    // What was unpacked belongs to the subordinate ids.
    let found =
        Command::new("find").arg(user.layers()).args(["-uid", "+1999999999", "-print", "-quit"]).output();
    assert!(!found.unwrap().stdout.is_empty());
    // Nothing but layers is left.
    let left: Vec<_> = fs::read_dir(user.path("data/cache"))
        .unwrap()
        .chain(fs::read_dir(user.layers()).unwrap())
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with('.'))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    let pruned = user.prune();
    assert!(pruned.status.success(), "{}", stderr(&pruned));
    let foreign =
        Command::new("find").arg(user.layers()).args(["-uid", "+1999999999", "-print", "-quit"]).output();
    assert_eq!(
        String::from_utf8(foreign.unwrap().stdout).unwrap(),
        "",
        "what the user could not remove is gone"
    );
    let output = user.build(&["--memory", "64m"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("--memory: this machine cannot hold a step to it"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn with_one_id_owners_below_are_kept() {
    let Some(user) = User::new(2, false) else { return };
    user.dockerfile(&steps_of_one_owner());
    let ours = user.build(&["--isolation", "container"]);
    let told = stderr(&ours);
    let ids = user.diff_ids("data", &ours);
    assert!(told.contains("isolation: containers in a user namespace with one id"), "{told}");
    assert_eq!(ids, user.diff_ids("root-data", &user.build_as_root()));

    // What cannot be done seems to be done; everything is root's.
    user.dockerfile(
        "COPY --chown=7:8 tree/d /owned\n\
         SHELL [\"/bin/busybox\", \"sh\", \"-euc\"]\n\
         USER 5:6\n\
         RUN b=/bin/busybox; echo x > /mine; $b chown 33:34 /mine; $b chgrp -R 3 /owned; $b test $($b id -u) = 0; \
             $b test $($b stat -c %u /mine) = 0; $b grep -q 'Seccomp:.2' /proc/self/status; $b test -r $APT_CONFIG\n\
         FROM scratch\nCOPY --from=0 /owned /owned\n",
    );
    let ids = user.diff_ids("data", &user.build(&[]));
    // A copy from a stage has the owners of that stage, not of this namespace.
    let layer = ids[0].as_str().unwrap().strip_prefix("sha256:").unwrap().to_owned();
    let layer = user.path("data/images/blobs/sha256").join(layer);
    let listed = Command::new("tar").args(["--numeric-owner", "-tvf"]).arg(layer).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    // The folder itself is the one that COPY made.
    let below = listed.lines().filter(|line| !line.ends_with(" owned/"));
    assert!(listed.lines().count() > 3 && below.clone().all(|line| line.contains(" 7/8 ")), "{listed}");
    // All of it is the user's own, who can remove it.
    let foreign =
        Command::new("find").arg(user.path("data")).args(["!", "-uid", &user.uid.to_string()]).output();
    assert_eq!(String::from_utf8(foreign.unwrap().stdout).unwrap(), "");
    let mut remove = Command::new("rm");
    remove.arg("-rf").arg(user.path("data")).uid(user.uid).gid(user.gid);
    assert!(remove.status().unwrap().success());
}

#[test]
fn where_namespaces_are_forbidden_auto_asks_for_a_machine() {
    let Some(user) = User::new(3, true) else { return };
    user.dockerfile("RUN [\"/bin/busybox\", \"true\"]\n");
    // The kernel refuses user namespaces in a chroot with the EPERM of a seccomp filter as Docker's.
    let chroot = user.path("chroot");
    fs::create_dir(&chroot).unwrap();
    lchown(&chroot, Some(0), Some(0)).unwrap();
    let build = |option: &str| {
        let script = "mount --rbind / \"$1\"; root=$1; owner=$2; shift 2; exec chroot --userspec=\"$owner\" \"$root\" \"$@\"";
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "sh", "-c", script, "sh"])
            .arg(&chroot)
            .arg(format!("{}:{}", user.uid, user.gid));
        command.arg(user.path("image-builder")).args(user.arguments("data", &["--isolation", option]));
        command.env("HOME", user.home.path()).output().unwrap()
    };
    let output = build("container");
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    let told = stderr(&output);
    for way in ["this user is not root", "with the ids of /etc/subuid: the kernel refuses", "with one id"] {
        assert!(told.contains(way), "{told}");
    }
    assert!(told.contains("use --isolation vm"), "{told}");
    let told = stderr(&build("auto"));
    assert!(told.contains("isolation: a virtual machine, because containers do not work here:"), "{told}");
    assert_eq!(fs::metadata(user.path("data")).unwrap().uid(), user.uid);
}
