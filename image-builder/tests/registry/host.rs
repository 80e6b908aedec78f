//! A machine's data folder, and the program on it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use oci::layer::{Compression, Kind, LayerPath, LayerWriter, Metadata, Node};
use oci::{Descriptor, MediaType, Store};
use serde_json::{Value, json};

pub(crate) struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    pub(crate) fn new() -> Self {
        Self {
            dir: tempfile::Builder::new()
                .prefix("registry-")
                .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
                .unwrap(),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_image-builder"));
        command.arg("--data-dir").arg(self.path("data")).args(arguments).stdin(Stdio::null());
        // What this machine's owner is logged in to is not asked, and no proxy is between us.
        for variable in [
            "REGISTRY_AUTH_FILE",
            "CONTAINERS_REGISTRIES_CONF",
            "XDG_RUNTIME_DIR",
            "http_proxy",
            "HTTP_PROXY",
        ] {
            command.env_remove(variable);
        }
        command.env("DOCKER_CONFIG", self.path("docker")).env("HOME", self.dir.path());
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// What the program prints as JSON. It must succeed.
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let output = self.command(arguments).arg("--json").output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(text.lines().count(), 1, "one line of JSON and nothing else: {text}");
        serde_json::from_str(&text).unwrap()
    }

    /// What the program says when it fails with that exit code.
    pub(crate) fn fails(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
        assert!(output.stdout.is_empty(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stdout));
        stderr
    }

    pub(crate) fn store(&self) -> Store {
        Store::open_or_create(&self.path("data/images")).unwrap()
    }

    /// An image with a layer of each compression, under that name.
    pub(crate) fn image(&self, name: &str, architecture: &str) -> Descriptor {
        self.image_of(name, architecture, &[Compression::Gzip, Compression::Zstd, Compression::None])
    }

    /// An image with a layer of each of these.
    pub(crate) fn image_of(
        &self,
        name: &str,
        architecture: &str,
        compressions: &[Compression],
    ) -> Descriptor {
        let store = self.store();
        let (mut layers, mut diff_ids) = (Vec::new(), Vec::new());
        for (index, compression) in compressions.iter().copied().enumerate() {
            let mut writer = LayerWriter::new(&store, compression).unwrap();
            let contents = format!("{architecture} {index}\n").repeat(200_000 * index + 1);
            let node = Node {
                path: LayerPath::parse(format!("file{index}").as_bytes()).unwrap(),
                metadata: Metadata { mode: 0o644, ..Metadata::default() },
                kind: Kind::File { size: contents.len() as u64, offset: 0 },
            };
            writer.append(&node, contents.as_bytes()).unwrap();
            let written = writer.finish().unwrap();
            layers.push(written.descriptor);
            diff_ids.push(written.diff_id);
        }
        let history: Vec<_> = (0..compressions.len())
            .map(|step| json!({"created": "2026-01-02T03:04:05Z", "created_by": format!("step {step}")}))
            .collect();
        let config = json!({
            "architecture": architecture, "os": "linux", "created": "2026-01-02T03:04:05Z",
            "config": {"Env": ["PATH=/bin"], "Cmd": ["/file0"], "Labels": {"a": "b"}, "Healthcheck": {"Test": ["NONE"]}},
            "rootfs": {"type": "layers", "diff_ids": diff_ids}, "history": history,
        });
        let config = store.put_blob(MediaType::ImageConfig, config.to_string().as_bytes()).unwrap();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MediaType::ImageManifest, "config": config, "layers": layers,
            "annotations": {"org.example.note": "kept"},
        });
        let manifest = store.put_blob(MediaType::ImageManifest, manifest.to_string().as_bytes()).unwrap();
        store.tag(&format!("docker.io/library/{name}"), &manifest).unwrap();
        manifest
    }
}

/// The output of one of the oracles, which must succeed; `None`, with the reason on stderr, where it is not installed.
pub(crate) fn tool(program: &str, arguments: &[&str]) -> Option<String> {
    let output = match Command::new(program).args(arguments).stdin(Stdio::null()).output() {
        Ok(output) => output,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("SKIPPED: no {program}; install Debian's package");
            return None;
        }
        Err(error) => panic!("{program}: {error}"),
    };
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {stderr}{stdout}");
    Some(stdout.into_owned())
}

/// The digest of a manifest as skopeo prints it.
pub(crate) fn digest_of(raw: &str) -> String {
    oci::Hasher::digest_of(raw.as_bytes()).to_string()
}

/// Names of what is in a folder.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(folder)
        .map(|entries| {
            entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
        })
        .unwrap_or_default();
    names.sort();
    names
}
