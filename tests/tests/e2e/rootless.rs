//! `make demo` by an ordinary user, who is made for the test: nothing in it asks for root once packages and kernel are there.
//!
//! The programs are those that the tests have built: the user compiles nothing. The base image comes from a Debian mirror,
//! and the example installs a package, as in the demo.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use e2e::{binary, made};
use rustix::process::Pid;

/// For the whole demo, a bootstrap of Debian among it, on a slow machine.
const PATIENCE: Duration = Duration::from_secs(1000);

/// How many subordinate ids the user has.
const IDS: u32 = 65_536;

/// Waits for the end of its input, then removes the user with its processes and all that it made. It runs beside the test, for
/// one that is killed cleans nothing up.
const JANITOR: &str = r#"
home=$1 name=$2 first=$3 last=$4 lock=$5
cat > /dev/null
uid=$(id -u "$name" 2> /dev/null) || uid=none
left=1
while [ $left = 1 ]; do
    left=0
    for process in /proc/[0-9]*; do
        owner=$(stat -c %u "$process" 2> /dev/null) || continue
        if [ "$owner" = "$uid" ] || { [ "$owner" -ge "$first" ] && [ "$owner" -le "$last" ]; }; then
            kill -KILL "${process#/proc/}" 2> /dev/null && left=1
        fi
    done
done
flock "$lock" userdel --force "$name" > /dev/null 2>&1
rm -rf "$home"
"#;

/// A user of this machine with subordinate ids, who is removed when this is dropped, or its process ends.
struct User {
    name: String,
    uid: u32,
    gid: u32,
    home: PathBuf,
    janitor: Child,
}

impl User {
    /// `None`, with the reason on stderr, where this machine cannot make users.
    fn new() -> Option<Self> {
        for program in ["useradd", "usermod", "newuidmap", "mmdebstrap"] {
            if !["/usr/sbin", "/usr/bin"].iter().any(|folder| Path::new(folder).join(program).exists()) {
                eprintln!("SKIPPED: no {program}; install passwd, uidmap and mmdebstrap");
                return None;
            }
        }
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: only root can make a user");
            return None;
        }
        // The user must get there, and overlayfs needs a real file system: neither target/ nor /tmp is sure to be one.
        let home = tempfile::Builder::new().prefix("tfd").tempdir_in("/var/tmp").unwrap().keep();
        let name = format!("tfd{}", std::process::id());
        // Above what distributions give out.
        let first = 3_000_000_000_u32 + std::process::id() % 10_000 * IDS;
        let last = first + IDS - 1;
        let janitor = Command::new("sh")
            .args(["-c", JANITOR, "sh"])
            .arg(&home)
            .args([&name, &first.to_string(), &last.to_string()])
            .arg(users_lock())
            .stdin(Stdio::piped())
            // Who ends the test's group does not end this.
            .process_group(0)
            .spawn()
            .unwrap();
        users("useradd", &["--system", "--user-group", "--no-create-home", "--shell", "/bin/sh", &name]);
        let mut user = Self { name, uid: 0, gid: 0, home, janitor };
        let passwd = fs::read_to_string("/etc/passwd").unwrap();
        let line = passwd.lines().find(|line| line.starts_with(&format!("{}:", user.name))).unwrap();
        let mut ids = line.split(':').skip(2).map(|field| field.parse().unwrap_or_default());
        (user.uid, user.gid) = (ids.next().unwrap(), ids.next().unwrap());
        let range = format!("{first}-{last}");
        users("usermod", &["--add-subuids", &range, "--add-subgids", &range, &user.name]);
        // As a distribution makes it; the ids of the user's own namespaces must get through.
        fs::set_permissions(&user.home, fs::Permissions::from_mode(0o711)).unwrap();
        chown(&user.home, Some(user.uid), Some(user.gid)).unwrap();
        // So that nothing of a test that is ended stays in /tmp.
        fs::set_permissions(user.folder("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
        Some(user)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.join(name)
    }

    /// Makes a folder of the user's.
    fn folder(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(&path).unwrap();
        for folder in path.ancestors().take_while(|folder| *folder != self.home) {
            chown(folder, Some(self.uid), Some(self.gid)).unwrap();
        }
        path
    }

    /// Runs a program as this user, who has nothing of the test's surroundings but what names mirrors and certificates.
    #[track_caller]
    fn run(&self, folder: &Path, program: &str, arguments: &[&str]) -> Output {
        let mut command = Command::new(program);
        for (variable, _) in std::env::vars_os() {
            let name = variable.to_string_lossy();
            if ["TIFFIN_", "CARGO", "RUST", "NEXTEST", "XDG_", "MAKE", "MFLAGS"]
                .iter()
                .any(|own| name.starts_with(own))
            {
                command.env_remove(&variable);
            }
        }
        command.env("HOME", &self.home).env("USER", &self.name).env("TMPDIR", self.path("tmp"));
        command.args(arguments).uid(self.uid).gid(self.gid).current_dir(folder).stdin(Stdio::null());
        let file = |name: &str| fs::File::create(self.path(name)).unwrap();
        let mut child = command.stdout(file("stdout")).stderr(file("stderr")).spawn().unwrap();
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                panic!(
                    "{program} {arguments:?} did not end: {}",
                    fs::read_to_string(self.path("stderr")).unwrap()
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        let read = |name: &str| fs::read(self.path(name)).unwrap();
        Output { status, stdout: read("stdout"), stderr: read("stderr") }
    }

    #[track_caller]
    fn must(&self, folder: &Path, program: &str, arguments: &[&str]) -> String {
        let output = self.run(folder, program, arguments);
        let (stdout, stderr) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{program} {arguments:?}: {}\n{stdout}\n{stderr}", output.status);
        stdout.into_owned()
    }

    /// Processes of this user's.
    fn processes(&self) -> Vec<Pid> {
        let entries = fs::read_dir("/proc").unwrap().flatten();
        let mine = entries.filter(|entry| entry.metadata().is_ok_and(|process| process.uid() == self.uid));
        let pids = mine.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter_map(Pid::from_raw).collect()
    }
}

impl Drop for User {
    fn drop(&mut self) {
        drop(self.janitor.stdin.take());
        let _ = self.janitor.wait();
    }
}

/// /etc/passwd and its friends are changed by one test at a time.
fn users_lock() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("users.lock")
}

#[track_caller]
fn users(program: &str, arguments: &[&str]) {
    let file = fs::File::create(users_lock()).unwrap();
    file.lock().unwrap();
    admin(program, arguments);
}

#[track_caller]
fn admin(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The files of the project, as somebody has them who has cloned it.
fn clone(user: &User) -> PathBuf {
    let (source, tree) = (Path::new(env!("CARGO_MANIFEST_DIR")).join(".."), user.folder("tiffin"));
    let script = "cd \"$1\" && if [ -e .git ]; then git ls-files -z --cached --others --exclude-standard; else find . -path ./target -prune -o -type f -print0; fi \
                  | tar --create --null --ignore-failed-read --files-from - | tar --extract --directory \"$2\" --owner \"$3\"";
    let owner = format!("{}:{}", user.uid, user.gid);
    let copy = Command::new("bash")
        .args(["-euo", "pipefail", "-c", script, "bash"])
        .arg(source)
        .arg(&tree)
        .arg(&owner)
        .output();
    let copy = copy.unwrap();
    assert!(copy.status.success(), "{}", String::from_utf8_lossy(&copy.stderr));
    admin("chown", &["--recursive", &owner, tree.to_str().unwrap()]);
    tree
}

/// The kernels that were built, in a folder of root's that everybody may read.
fn shared_cache(user: &User) -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache");
    let kernels = std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("tiffin/kernel");
    let cache = user.path("shared");
    fs::create_dir_all(cache.join("kernel")).unwrap();
    for entry in
        fs::read_dir(&kernels).unwrap_or_else(|error| panic!("{}: {error}: make kernel", kernels.display()))
    {
        let (entry, copy) = (entry.unwrap(), cache.join("kernel"));
        if !entry.path().join("info").exists() {
            continue;
        }
        let copy = copy.join(entry.file_name());
        fs::create_dir(&copy).unwrap();
        for file in ["vmlinux", "config", "info"] {
            fs::copy(entry.path().join(file), copy.join(file)).unwrap();
        }
    }
    cache
}

#[test]
fn an_ordinary_user_gets_through_the_demo() {
    let Some(user) = User::new() else { return };
    let tree = clone(&user);
    let cache = format!("CACHE={}", shared_cache(&user).display());

    // Where all packages are there nobody calls apt; where one is not, it is said who can.
    user.must(&tree, "make", &["packages"]);
    let output = user.run(&tree, "make", &["packages", "MORE_PACKAGES=tiffin-is-no-package"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success()
            && said.contains("only root can install: apt-get install tiffin-is-no-package"),
        "{said}"
    );
    user.must(&tree, "make", &["kernel", &cache]);

    // What `make install` puts down.
    let prefix = user.folder("prefix");
    for folder in ["prefix/bin", "prefix/share/tiffin"] {
        user.folder(folder);
    }
    let place = |from: &Path, to: &str| {
        let to = prefix.join(to);
        match fs::hard_link(from, &to) {
            Err(error) if error.kind() == ErrorKind::CrossesDevices => {
                fs::copy(from, &to).unwrap();
            }
            linked => linked.unwrap(),
        }
    };
    for name in ["image-builder", "rootfs-tools", "host-shim"] {
        place(&binary(name), &format!("bin/{name}"));
    }
    place(&made("TIFFIN_AGENT"), "bin/envd");
    let kernel = prefix.join("share/tiffin/vmlinux");
    user.must(&tree, "cp", &["target/guest/vmlinux", kernel.to_str().unwrap()]);
    let (tools, envd) = (prefix.join("bin/rootfs-tools"), prefix.join("bin/envd"));
    let image = prefix.join("share/tiffin/guest-image.cpio");
    let arguments = ["guest-image", "--envd", envd.to_str().unwrap(), "-o", image.to_str().unwrap()];
    user.must(&tree, tools.to_str().unwrap(), &arguments);

    let said = user.must(&tree, "make", &["demo-run", &format!("PREFIX={}", prefix.display())]);
    assert!(
        said.contains("< hello from Linux") && said.contains("< no note here: this sandbox is a new one >"),
        "{said}"
    );
    // Nothing of it is left but data, and that is the user's or the user's namespaces'.
    assert!(user.processes().is_empty(), "{:?}", user.processes());
    let sandboxes = fs::read_dir(tree.join("target/demo/data/sandboxes")).unwrap();
    assert_eq!(sandboxes.filter(|entry| entry.as_ref().unwrap().file_name() != ".lock").count(), 0);
    let roots = Command::new("find").arg(tree.join("target")).args(["-uid", "0", "-print", "-quit"]).output();
    assert_eq!(String::from_utf8(roots.unwrap().stdout).unwrap(), "");
}
