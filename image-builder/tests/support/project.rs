//! A context, a data folder, and the program that builds the one into the other.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// A base of one static busybox; a Dockerfile goes on behind it.
pub(crate) const BASE: &str =
    "FROM scratch\nCOPY busybox /bin/busybox\nRUN [\"/bin/busybox\", \"--install\", \"-s\", \"/bin\"]\n";

/// Everything is in a folder that goes with this.
pub(crate) struct Project {
    dir: tempfile::TempDir,
}

impl Project {
    /// `None`, with the reason on stderr, where this machine cannot build.
    pub(crate) fn new() -> Option<Self> {
        let busybox = crate::support::busybox()?;
        // Not on /tmp, which may be a tmpfs without the attributes that overlayfs needs.
        let dir = tempfile::Builder::new().prefix("build-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        fs::create_dir(dir.path().join("context")).unwrap();
        fs::copy(busybox, dir.path().join("context/busybox")).unwrap();
        Some(Self { dir })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, contents: &str) {
        let path = self.path("context").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, contents).unwrap();
    }

    /// The program on the data folder of that name.
    pub(crate) fn program_on(&self, data: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_image-builder"));
        command.env_remove("SOURCE_DATE_EPOCH").arg("--data-dir").arg(self.path(data));
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.program_on("data").args(arguments).output().unwrap()
    }

    /// A build that is not started yet.
    pub(crate) fn build_on(&self, data: &str, dockerfile: &str, options: &[&str]) -> Command {
        self.write("Dockerfile", dockerfile);
        let mut command = self.program_on(data);
        command.args(["build", "--json"]).args(options).arg(self.path("context"));
        command
    }

    pub(crate) fn output(&self, dockerfile: &str, options: &[&str]) -> Output {
        self.build_on("data", dockerfile, options).output().unwrap()
    }

    #[track_caller]
    pub(crate) fn build(&self, dockerfile: &str, options: &[&str]) -> Value {
        json(&self.output(dockerfile, &[&["-t", "app"], options].concat()))
    }

    pub(crate) fn blob(&self, data: &str, digest: &str) -> PathBuf {
        self.path(data).join("images/blobs/sha256").join(digest.strip_prefix("sha256:").unwrap())
    }

    pub(crate) fn blob_json(&self, data: &str, digest: &str) -> Value {
        serde_json::from_slice(&fs::read(self.blob(data, digest)).unwrap()).unwrap()
    }

    /// What the whole image has at that path, by our own reader of file systems.
    pub(crate) fn file(&self, name: &str, path: &str) -> Vec<u8> {
        let layout = self.path("file-layout");
        let saved = self.run(&["save", name, "-o", &format!("oci:{}:x", layout.display())]);
        assert!(saved.status.success(), "{}", String::from_utf8_lossy(&saved.stderr));
        let store = oci::Store::open(&layout).unwrap();
        let image = store.image("x").unwrap();
        let mut found = None;
        for layer in &image.layers {
            let mut reader = oci::layer::LayerReader::new(layer.open().unwrap());
            while let Some(change) = reader.next_change().unwrap() {
                if let oci::layer::Change::Node(node) = change
                    && node.path.to_string() == path
                {
                    let mut contents = Vec::new();
                    std::io::Read::read_to_end(&mut reader, &mut contents).unwrap();
                    found = Some(contents);
                }
            }
        }
        found.unwrap_or_else(|| panic!("{name} has no {path}"))
    }

    /// What is half made.
    pub(crate) fn leftovers(&self) -> Vec<PathBuf> {
        let folders = ["data/cache/layers", "data/cache/steps", "data/images", "data/images/.incoming"];
        let mut found = Vec::new();
        for folder in folders {
            let Ok(entries) = fs::read_dir(self.path(folder)) else { continue };
            let half_made = |path: &Path| {
                let name = path.file_name().unwrap().to_string_lossy().into_owned();
                name.starts_with(".new-") || folder.ends_with(".incoming")
            };
            found.extend(entries.map(|entry| entry.unwrap().path()).filter(|path| half_made(path)));
        }
        found
    }
}

/// What the program printed.
#[track_caller]
pub(crate) fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// What a program said that failed with that code.
#[track_caller]
pub(crate) fn failure(output: &Output, code: i32) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{stderr}{}", String::from_utf8_lossy(&output.stdout));
    stderr
}

/// How many steps were carried out, cached and shared.
pub(crate) fn counts(report: &Value) -> (u64, u64, u64) {
    let count = |name: &str| report[name].as_u64().unwrap();
    (count("executed"), count("cached"), count("shared"))
}
