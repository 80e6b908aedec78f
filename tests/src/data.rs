//! A data folder of a test's own.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::{binary, made, vmm};

/// A data folder with templates that a test may change. What was found out about this host is shared with all tests.
pub struct TestData {
    folder: tempfile::TempDir,
}

impl TestData {
    /// One without templates.
    pub fn new() -> Self {
        let folder =
            tempfile::Builder::new().prefix("tiffin-data-").tempdir().expect("a folder for the data");
        fs::create_dir(folder.path().join("templates")).expect("a folder for the templates");
        let cache = made("TIFFIN_E2E_DATA").join("cache");
        fs::create_dir_all(&cache).expect("the shared cache");
        std::os::unix::fs::symlink(cache, folder.path().join("cache")).expect("a link to the cache");
        Self { folder }
    }

    /// One with a copy of a template of all tests, which is warm.
    pub fn warmed(template: &str) -> Self {
        let data = Self::new();
        data.copy(template);
        data.warm(template);
        data
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The folder of a template.
    pub fn template(&self, name: &str) -> PathBuf {
        self.path().join("templates").join(name)
    }

    /// Copies a template of all tests, without its snapshots.
    pub fn copy(&self, name: &str) {
        self.copy_as(name, name);
    }

    /// Copies a template of all tests under another name.
    pub fn copy_as(&self, name: &str, new: &str) {
        let (source, copy) = (made("TIFFIN_E2E_DATA").join("templates").join(name), self.template(new));
        fs::create_dir(&copy).expect("a folder for the template");
        fs::copy(source.join("template.json"), copy.join("template.json")).expect("its template.json");
        let rootfs = "rootfs.ext4";
        match fs::hard_link(source.join(rootfs), copy.join(rootfs)) {
            Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
                fs::copy(source.join(rootfs), copy.join(rootfs)).expect("its rootfs");
            }
            linked => linked.expect("its rootfs"),
        }
    }

    /// Changes a JSON file below the folder.
    pub fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
        let mut value = serde_json::from_slice(&fs::read(path).expect("the file")).expect("JSON");
        change(&mut value);
        // Not in place: the file may be a link, and is read-only.
        fs::remove_file(path).expect("the old file goes");
        fs::write(path, value.to_string()).expect("the new file");
    }

    /// Makes a template's snapshot for this host; gives what `template warm --json` says.
    pub fn warm(&self, name: &str) -> Value {
        self.try_warm(name).unwrap_or_else(|said| panic!("{name} was not warmed: {said}"))
    }

    /// As [`TestData::warm`]; gives what was said on standard error when it fails.
    pub fn try_warm(&self, name: &str) -> Result<Value, String> {
        let done = Command::new(binary("host-shim"))
            .args(["template", "warm", "--vmm", &vmm(), "--json", name, "--data-dir"])
            .arg(self.path())
            .arg("--kernel")
            .arg(made("TIFFIN_KERNEL"))
            .arg("--guest-image")
            .arg(made("TIFFIN_GUEST_IMAGE"))
            .output()
            .expect("host-shim runs");
        if done.status.success() {
            return Ok(serde_json::from_slice(&done.stdout).expect("a line of JSON"));
        }
        Err(String::from_utf8_lossy(&done.stderr).into_owned())
    }

    /// The only snapshot of a template.
    pub fn snapshot(&self, name: &str) -> PathBuf {
        let snapshots = self.template(name).join("snapshots");
        let mut found =
            fs::read_dir(snapshots).expect("a warm template").map(|entry| entry.expect("an entry").path());
        let snapshot = found.next().expect("a snapshot");
        assert!(found.next().is_none(), "more than one snapshot, or what was left of one");
        snapshot
    }
}

impl Default for TestData {
    fn default() -> Self {
        Self::new()
    }
}
