//! Where images, templates and sandboxes of this machine live.

use std::path::{Path, PathBuf};

/// The data folder: `--data-dir`, else `tiffin/` under `$XDG_DATA_HOME`, else `~/.local/share/tiffin`.
#[derive(Clone, Debug)]
pub struct DataDir(PathBuf);

impl DataDir {
    /// The folder that the user named, or the default one. `None` when neither a name nor `$HOME` is there.
    pub fn resolve(named: Option<&Path>) -> Option<Self> {
        let absolute =
            |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let path = match named {
            Some(path) => std::path::absolute(path).ok()?,
            None => absolute("XDG_DATA_HOME")
                .or_else(|| Some(absolute("HOME")?.join(".local/share")))?
                .join("tiffin"),
        };
        Some(Self(path))
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The local image store, an OCI image layout.
    pub fn images(&self) -> PathBuf {
        self.0.join("images")
    }

    /// A folder for each template.
    pub fn templates(&self) -> PathBuf {
        self.0.join("templates")
    }

    /// A folder for each sandbox.
    pub fn sandboxes(&self) -> PathBuf {
        self.0.join("sandboxes")
    }

    /// What can be made again: build cache, downloads.
    pub fn cache(&self) -> PathBuf {
        self.0.join("cache")
    }
}
