//! Reading, writing, listing and deleting template folders.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::{ROOTFS_FILE, SCHEMA_VERSION, TEMPLATE_FILE, Template, TemplateName};

/// The longest `template.json` that is read: a hostile or broken folder must not fill the memory.
pub const MAX_TEMPLATE_JSON: u64 = 4 << 20;

/// What can go wrong with a template folder.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such template.
    #[error(
        "no template at {path}: {TEMPLATE_FILE} is missing (make one with `image-builder template create`)"
    )]
    Missing {
        /// The folder that was looked at.
        path: PathBuf,
    },
    /// The folder is there but not what it should be.
    #[error("corrupt template {path}: {reason}")]
    Corrupt {
        /// The template's folder.
        path: PathBuf,
        /// What was expected and what was found.
        reason: String,
    },
    /// The folder was written by another version.
    #[error(
        "template {path} has schema version {found}, this program reads {SCHEMA_VERSION}: make the template again"
    )]
    Version {
        /// The template's folder.
        path: PathBuf,
        /// The version in its `template.json`.
        found: u64,
    },
    /// The operating system refused.
    #[error("{path}: {error}")]
    Io {
        /// The file in question.
        path: PathBuf,
        /// The system's error.
        error: io::Error,
    },
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |error| Error::Io { path, error }
}

/// A template on disk, checked on opening.
#[derive(Clone, Debug)]
pub struct TemplateFolder {
    path: PathBuf,
    template: Template,
}

impl TemplateFolder {
    /// Reads `path/template.json` and checks that the rootfs beside it has the length that it names.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = path.join(TEMPLATE_FILE);
        let length = match fs::metadata(&file) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::Missing { path: path.to_owned() });
            }
            Err(error) => return Err(at(&file)(error)),
        };
        let corrupt = |reason: String| Error::Corrupt { path: path.to_owned(), reason };
        if length > MAX_TEMPLATE_JSON {
            return Err(corrupt(format!(
                "{TEMPLATE_FILE} has {length} bytes, at most {MAX_TEMPLATE_JSON} expected"
            )));
        }
        let text = fs::read(&file).map_err(at(&file))?;
        let template = parse_template(path, &text)?;
        let folder = Self { path: path.to_owned(), template };
        let rootfs = folder.rootfs();
        let expected = folder.template.rootfs.size;
        match fs::metadata(&rootfs) {
            Ok(metadata) if metadata.len() == expected => Ok(folder),
            Ok(metadata) => Err(corrupt(format!(
                "{ROOTFS_FILE} has {} bytes, expected {expected}: it was truncated or replaced; make the template again",
                metadata.len()
            ))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(corrupt(format!("{ROOTFS_FILE} is missing")))
            }
            Err(error) => Err(at(&rootfs)(error)),
        }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What `template.json` says.
    pub fn template(&self) -> &Template {
        &self.template
    }

    /// The root file system.
    pub fn rootfs(&self) -> PathBuf {
        self.path.join(ROOTFS_FILE)
    }

    /// The names of the templates under `templates`, sorted. What is being written is not listed.
    pub fn list(templates: &Path) -> Result<Vec<TemplateName>, Error> {
        let entries = match fs::read_dir(templates) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(at(templates)(error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(at(templates))?;
            let name = entry.file_name().to_str().and_then(|name| name.parse().ok());
            if let Some(name) = name.filter(|_| entry.path().join(TEMPLATE_FILE).exists()) {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// Unlinks the template. Sandboxes that run from it keep its open files.
    pub fn delete(self) -> Result<(), Error> {
        // template.json goes first: a half-deleted folder is then no template.
        let file = self.path.join(TEMPLATE_FILE);
        fs::remove_file(&file).map_err(at(&file))?;
        fs::remove_dir_all(&self.path).map_err(at(&self.path))
    }
}

/// Reads the text of a `template.json`; `path` is what it is called in errors.
pub fn parse_template(path: &Path, text: &[u8]) -> Result<Template, Error> {
    let corrupt = |reason: String| Error::Corrupt { path: path.to_owned(), reason };
    let value: serde_json::Value =
        serde_json::from_slice(text).map_err(|error| corrupt(format!("{TEMPLATE_FILE}: {error}")))?;
    match value.get("schema_version").and_then(serde_json::Value::as_u64) {
        Some(found) if found == u64::from(SCHEMA_VERSION) => {}
        Some(found) => return Err(Error::Version { path: path.to_owned(), found }),
        None => return Err(corrupt(format!("{TEMPLATE_FILE} has no schema_version"))),
    }
    serde_json::from_value(value).map_err(|error| corrupt(format!("{TEMPLATE_FILE}: {error}")))
}

/// A template being written under a temporary name; dropped without [`NewTemplate::publish`] it leaves nothing.
#[derive(Debug)]
pub struct NewTemplate {
    folder: tempfile::TempDir,
    target: PathBuf,
    // Held for as long as it is being written, and released by the kernel, however its writer ends.
    _lock: File,
}

/// What the name of an unfinished template begins with. The leading dot keeps it out of [`TemplateFolder::list`].
const NEW: &str = ".new-";

/// Removes what killed writers left in `templates`. Folders of living ones are not touched.
pub fn sweep(templates: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut swept = Vec::new();
    let entries = match fs::read_dir(templates) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(swept),
        Err(error) => return Err(at(templates)(error)),
    };
    for entry in entries {
        let entry = entry.map_err(at(templates))?;
        let path = entry.path();
        if !entry.file_name().as_encoded_bytes().starts_with(NEW.as_bytes()) || !is_folder(&path) {
            continue;
        }
        let Some(_lock) = locked(&path).map_err(at(&path))? else { continue };
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(&path)(error)),
            _ => swept.push(path),
        }
    }
    Ok(swept)
}

fn is_folder(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir())
}

/// The lock of a folder; nothing if somebody has it, or if the folder is gone.
fn locked(path: &Path) -> io::Result<Option<File>> {
    let folder = match File::open(path) {
        Ok(folder) => folder,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    match folder.try_lock() {
        Ok(()) => Ok(path.exists().then_some(folder)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

impl NewTemplate {
    /// Starts a template that will be `templates/NAME`. What killed writers left there is removed.
    pub fn begin(templates: &Path, name: &TemplateName) -> Result<Self, Error> {
        fs::create_dir_all(templates).map_err(at(templates))?;
        sweep(templates)?;
        loop {
            let folder = tempfile::Builder::new().prefix(NEW).tempdir_in(templates).map_err(at(templates))?;
            // A sweeper can come between the folder and its lock: then another folder is made.
            if let Some(lock) = locked(folder.path()).map_err(at(folder.path()))? {
                return Ok(Self { folder, target: templates.join(name.as_str()), _lock: lock });
            }
        }
    }

    /// The temporary folder, for whatever is published with it.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Where to write the root file system.
    pub fn rootfs(&self) -> PathBuf {
        self.folder.path().join(ROOTFS_FILE)
    }

    /// Writes `template.json`, syncs, and puts the folder in its place; a template of that name is replaced.
    pub fn publish(self, template: &Template) -> Result<TemplateFolder, Error> {
        let rootfs = self.rootfs();
        let mut permissions = fs::metadata(&rootfs).map_err(at(&rootfs))?.permissions();
        permissions.set_readonly(true);
        fs::set_permissions(&rootfs, permissions).map_err(at(&rootfs))?;
        File::open(&rootfs).and_then(|file| file.sync_all()).map_err(at(&rootfs))?;

        let file = self.folder.path().join(TEMPLATE_FILE);
        let mut text = serde_json::to_vec_pretty(template).map_err(|error| at(&file)(error.into()))?;
        text.push(b'\n');
        File::create(&file)
            .and_then(|mut out| out.write_all(&text).and_then(|()| out.sync_all()))
            .map_err(at(&file))?;
        make_readable(self.folder.path())?;
        sync_directory(self.folder.path())?;

        let written = self.folder.path().to_owned();
        // rename(2) replaces only an empty directory. Exchanged, there is a template of that name at every moment.
        let rename = |flags| renameat_with(CWD, &written, CWD, &self.target, flags);
        let replaced = loop {
            match rename(RenameFlags::NOREPLACE) {
                Ok(()) => break false,
                Err(Errno::EXIST) => {}
                Err(error) => return Err(at(&self.target)(error.into())),
            }
            match rename(RenameFlags::EXCHANGE) {
                Ok(()) => break true,
                // It went away between the two.
                Err(Errno::NOENT) => {}
                Err(error) => return Err(at(&self.target)(error.into())),
            }
        };
        // The folder has its final name now; the guard must not remove it under the old one.
        let _ = self.folder.keep();
        if let Some(parent) = self.target.parent() {
            sync_directory(parent)?;
        }
        if replaced {
            match fs::remove_dir_all(&written) {
                // A sweeper was first.
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(&written)(error)),
                _ => {}
            }
        }
        TemplateFolder::open(&self.target)
    }
}

/// Temporary folders are made 0700; a template is for whoever may reach the data folder.
fn make_readable(path: &Path) -> Result<(), Error> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).map_err(at(path))
}

fn sync_directory(path: &Path) -> Result<(), Error> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(at(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Machine, Rootfs, RuntimeConfig, SourceImage};
    use std::str::FromStr;

    fn digest(fill: char) -> oci_spec::image::Digest {
        oci_spec::image::Digest::from_str(&format!("sha256:{}", fill.to_string().repeat(64))).unwrap()
    }

    fn template(size: u64) -> Template {
        Template {
            schema_version: SCHEMA_VERSION,
            image: SourceImage { reference: "demo".into(), digest: digest('a') },
            kernel: None,
            guest_image: Some(digest('b')),
            rootfs: Rootfs { digest: digest('c'), size },
            runtime: RuntimeConfig { user: "user".into(), ..RuntimeConfig::default() },
            machine: Machine::default(),
            snapshot_only: false,
        }
    }

    fn write(templates: &Path, name: &str, contents: &[u8]) -> TemplateFolder {
        let new = NewTemplate::begin(templates, &name.parse().unwrap()).unwrap();
        fs::write(new.rootfs(), contents).unwrap();
        new.publish(&template(contents.len() as u64)).unwrap()
    }

    #[test]
    fn a_template_is_whole_or_absent() {
        let dir = tempfile::tempdir().unwrap();
        let unfinished = NewTemplate::begin(dir.path(), &"demo".parse().unwrap()).unwrap();
        fs::write(unfinished.rootfs(), b"half").unwrap();
        assert!(TemplateFolder::list(dir.path()).unwrap().is_empty());
        drop(unfinished);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);

        write(dir.path(), "demo", b"first");
        let second = write(dir.path(), "demo", b"the second");
        assert_eq!(second.template().rootfs.size, 10);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "the replaced template is gone");
        assert_eq!(TemplateFolder::list(dir.path()).unwrap(), vec!["demo".parse().unwrap()]);
        second.delete().unwrap();
        assert!(matches!(TemplateFolder::open(&dir.path().join("demo")), Err(Error::Missing { .. })));
    }

    #[test]
    fn what_a_killed_writer_left_goes_with_the_next_one_and_a_living_ones_stays() {
        let dir = tempfile::tempdir().unwrap();
        let name = "demo".parse().unwrap();
        let living = NewTemplate::begin(dir.path(), &name).unwrap();
        let killed = NewTemplate::begin(dir.path(), &name).unwrap();
        fs::write(killed.rootfs(), b"half").unwrap();
        let NewTemplate { folder, _lock, .. } = killed;
        let left = folder.keep();
        assert_eq!(sweep(dir.path()).unwrap(), Vec::<PathBuf>::new(), "both are locked");
        drop(_lock); // As the kernel does for a killed process.
        let next = NewTemplate::begin(dir.path(), &name).unwrap();
        assert!(!left.exists() && living.path().exists() && next.path().exists());
        assert!(sweep(&dir.path().join("none")).unwrap().is_empty());
    }

    #[test]
    fn damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let folder = write(dir.path(), "demo", b"contents");
        let path = folder.path().to_owned();
        fs::remove_file(folder.rootfs()).unwrap();
        let missing = TemplateFolder::open(&path).unwrap_err().to_string();
        assert!(missing.contains("rootfs.ext4 is missing"), "{missing}");
        fs::write(folder.rootfs(), b"cont").unwrap();
        let short = TemplateFolder::open(&path).unwrap_err().to_string();
        assert!(short.contains("has 4 bytes, expected 8"), "{short}");
        fs::write(path.join(TEMPLATE_FILE), br#"{"schema_version": 9}"#).unwrap();
        assert!(matches!(TemplateFolder::open(&path), Err(Error::Version { found: 9, .. })));
        fs::write(path.join(TEMPLATE_FILE), b"{").unwrap();
        assert!(matches!(TemplateFolder::open(&path), Err(Error::Corrupt { .. })));
    }
}
