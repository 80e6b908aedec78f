//! Builds by the program, and their images as trees: what every test of files asks.
#![allow(dead_code, reason = "each test program asks for a part of it")]

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Output};

use oci::layer::{Change, Kind, LayerPath, LayerReader, Node};
use oci::{Image, Store};
use serde_json::Value;

/// A folder with a context and a store.
pub(crate) struct Builder {
    dir: tempfile::TempDir,
    /// More of the builds' environment.
    pub(crate) env: Vec<(&'static str, String)>,
}

/// A file of an image.
#[derive(Clone, Debug)]
pub(crate) struct TreeFile {
    pub(crate) node: Node,
    pub(crate) contents: Vec<u8>,
}

/// A built image.
pub(crate) struct Built {
    pub(crate) cached: u64,
    pub(crate) config: Value,
    pub(crate) files: BTreeMap<LayerPath, TreeFile>,
    layers: Vec<String>,
}

impl Builder {
    /// `None`, with the reason on stderr, where this machine cannot build.
    pub(crate) fn new(name: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: builds mount overlays, which needs root");
            return None;
        }
        // Not on /tmp, which may be a tmpfs without the attributes that overlayfs needs.
        let dir = tempfile::Builder::new()
            .prefix(&format!("{name}-"))
            .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
            .unwrap();
        fs::create_dir(dir.path().join("context")).unwrap();
        Some(Self { dir, env: Vec::new() })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn run(&self, dockerfile: &str, options: &[&str]) -> Output {
        fs::write(self.path("Dockerfile"), dockerfile).unwrap();
        let mut command = self.program();
        command.arg("--data-dir").arg(self.path("data")).args(["build", "--json", "-t", "built", "-f"]);
        command.arg(self.path("Dockerfile")).args(options).arg(self.path("context")).output().unwrap()
    }

    /// Builds with these arguments alone.
    #[track_caller]
    pub(crate) fn build_as(&self, arguments: &[&str]) -> Built {
        let output = self.command(arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        self.image(report["cached"].as_u64().unwrap())
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Output {
        let mut command = self.program();
        command.current_dir(self.dir.path()).args(["--data-dir", "data", "build", "--json", "-t", "built"]);
        command.args(arguments).output().unwrap()
    }

    /// Without this machine's proxies: servers of tests are on this machine.
    fn program(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_image-builder"));
        for name in ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"] {
            command.env_remove(name);
        }
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Files of the context.
    pub(crate) fn write(&self, files: &[(&str, &str)]) {
        for (name, contents) in files {
            let path = self.path("context").join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, contents).unwrap();
        }
    }

    #[track_caller]
    pub(crate) fn build(&self, dockerfile: &str, options: &[&str]) -> Built {
        self.build_and_listen(dockerfile, options).0
    }

    /// The image, and what was said on stderr.
    #[track_caller]
    pub(crate) fn build_and_listen(&self, dockerfile: &str, options: &[&str]) -> (Built, String) {
        let output = self.run(dockerfile, options);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{stderr}");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        (self.image(report["cached"].as_u64().unwrap()), stderr)
    }

    /// What a build that fails says.
    #[track_caller]
    pub(crate) fn failure(&self, dockerfile: &str, options: &[&str], code: i32) -> String {
        let output = self.run(dockerfile, options);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{stderr}");
        stderr
    }

    /// The image of the last build.
    #[track_caller]
    pub(crate) fn image(&self, cached: u64) -> Built {
        let store = Store::open(&self.path("data/images")).unwrap();
        let descriptor = store.resolve("docker.io/library/built:latest").unwrap().unwrap();
        let image = Image::open(&store, &descriptor).unwrap();
        let mut files = BTreeMap::new();
        for layer in &image.layers {
            apply(&mut files, layer.open().unwrap());
        }
        let layers = image.layers.iter().map(|layer| layer.diff_id.to_string()).collect();
        let config = image.config_json;
        Built { cached, config, files, layers }
    }
}

/// The rules of the OCI image specification for layers, on a map.
pub(crate) fn apply(files: &mut BTreeMap<LayerPath, TreeFile>, stream: impl Read) {
    let mut reader = LayerReader::new(stream);
    let lower: Vec<LayerPath> = files.keys().cloned().collect();
    let mut ours: Vec<LayerPath> = Vec::new();
    while let Some(change) = reader.next_change().unwrap() {
        match change {
            Change::Whiteout(path) => {
                files.retain(|other, _| !is_at_or_below(other, &path) || ours.contains(other))
            }
            Change::Opaque(path) => {
                let hidden = |other: &LayerPath| {
                    lower.contains(other)
                        && !ours.contains(other)
                        && *other != path
                        && is_at_or_below(other, &path)
                };
                files.retain(|other, _| !hidden(other));
            }
            Change::Node(node) => {
                let mut contents = Vec::new();
                if matches!(node.kind, Kind::File { .. } | Kind::Sparse { .. }) {
                    reader.read_to_end(&mut contents).unwrap();
                }
                if node.kind != Kind::Directory {
                    files.retain(|other, _| !is_at_or_below(other, &node.path));
                }
                ours.push(node.path.clone());
                files.insert(node.path.clone(), TreeFile { node, contents });
            }
        }
    }
}

fn is_at_or_below(path: &LayerPath, folder: &LayerPath) -> bool {
    path == folder || folder.is_root() || path.as_path().starts_with(folder.as_path())
}

impl Built {
    /// The diff_ids of its layers.
    pub(crate) fn layers(&self) -> &[String] {
        &self.layers
    }

    /// Each file as a line: path, type, mode, owner, attributes, and what is in it; of a further name of a file the first.
    pub(crate) fn lines(&self) -> Vec<String> {
        self.files.iter().filter(|(path, _)| !path.is_root()).map(|(path, file)| line(path, file)).collect()
    }

    #[track_caller]
    pub(crate) fn file(&self, path: &str) -> &TreeFile {
        let Some(file) = self.files.get(&LayerPath::parse(path.as_bytes()).unwrap()) else {
            panic!("no {path} in {:#?}", self.lines())
        };
        file
    }

    #[track_caller]
    pub(crate) fn contents(&self, path: &str) -> Vec<u8> {
        self.file(path).contents.clone()
    }

    #[track_caller]
    pub(crate) fn mtime(&self, path: &str) -> i64 {
        self.file(path).node.metadata.mtime.seconds
    }
}

fn line(path: &LayerPath, file: &TreeFile) -> String {
    let metadata = &file.node.metadata;
    let owner = format!("{}:{}", metadata.uid, metadata.gid);
    let mode = format!("{:o}", metadata.mode);
    let mut xattrs = String::new();
    for (name, value) in &metadata.xattrs {
        xattrs.push_str(&format!("{}={} ", String::from_utf8_lossy(name), String::from_utf8_lossy(value)));
    }
    let contents = || match file.contents.len() {
        0..100 => String::from_utf8_lossy(&file.contents).into_owned(),
        _ => oci::Hasher::digest_of(&file.contents).to_string(),
    };
    let line = match &file.node.kind {
        Kind::Directory => format!("{path} d {mode} {owner} {xattrs}"),
        Kind::File { .. } | Kind::Sparse { .. } => format!("{path} f {mode} {owner} {xattrs}{}", contents()),
        Kind::Symlink(target) => format!("{path} l {owner} {}", String::from_utf8_lossy(target)),
        Kind::HardLink(target) => format!("{path} h {target}"),
        Kind::Fifo => format!("{path} p {mode} {owner} {xattrs}"),
        Kind::CharDevice { major, minor } => format!("{path} c {mode} {owner} {major}:{minor}"),
        Kind::BlockDevice { major, minor } => format!("{path} b {mode} {owner} {major}:{minor}"),
    };
    line.trim_end().to_owned()
}
