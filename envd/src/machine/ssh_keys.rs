//! SSH host keys: never shared between clones of a template, made where they are missing when they are first needed.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::sync::Mutex;

use super::program::Program;
use crate::sandbox::Sandbox;

const FOLDER: &str = "/etc/ssh";

/// Where images have it.
const KEYGEN: [&str; 4] =
    ["/usr/bin/ssh-keygen", "/bin/ssh-keygen", "/usr/local/bin/ssh-keygen", "/usr/sbin/ssh-keygen"];

/// RSA keys take long where the CPU is emulated.
const DEADLINE: Duration = Duration::from_secs(300);

/// How long a look at the folder has.
const LOOK_DEADLINE: Duration = Duration::from_secs(5);

/// Makes the keys, one at a time.
#[derive(Debug, Default)]
pub(crate) struct SshKeys {
    making: Mutex<()>,
}

impl SshKeys {
    /// What makes the image's missing keys; `None` when none are missing, or nothing can be known in time.
    pub(super) async fn look(&self, sandbox: &Sandbox) -> Option<&'static str> {
        let look = sandbox.root().run(|| missing(Path::new(FOLDER)));
        tokio::time::timeout(LOOK_DEADLINE, look).await.ok()?.ok()?
    }

    /// Returns when the image has host keys, or cannot have any. At most [`DEADLINE`].
    pub(crate) async fn ensure(&self, sandbox: &Sandbox) {
        let _one = self.making.lock().await;
        let Some(keygen) = self.look(sandbox).await else { return };
        let program = Program {
            path: keygen.to_owned(),
            arguments: vec!["-A".to_owned()],
            env: Vec::new(),
            deadline: DEADLINE,
            low_priority: true,
        };
        if let Err(error) = program.run(sandbox).await {
            crate::log::warn(format_args!("making SSH host keys: {error}"));
        }
    }
}

/// The ssh-keygen of an image that has an SSH server's folder and no host keys in it.
fn missing(folder: &Path) -> io::Result<Option<&'static str>> {
    if !folder.is_dir() || !host_keys(folder)?.is_empty() {
        return Ok(None);
    }
    Ok(KEYGEN.into_iter().find(|path| Path::new(path).is_file()))
}

/// Removes them from a template. Call it on a thread of the sandbox's root.
pub(super) fn strip() -> io::Result<()> {
    strip_from(Path::new(FOLDER))
}

fn strip_from(folder: &Path) -> io::Result<()> {
    for name in host_keys(folder)? {
        fs::remove_file(folder.join(name))?;
    }
    Ok(())
}

/// `ssh_host_*_key` and what belongs to it.
fn host_keys(folder: &Path) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    let entries = match fs::read_dir(folder) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(found);
        }
        entries => entries?,
    };
    for entry in entries {
        let Ok(name) = entry?.file_name().into_string() else { continue };
        if name.strip_prefix("ssh_host_").is_some_and(|rest| rest.contains("_key")) {
            found.push(name);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_keys_go_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["ssh_host_rsa_key", "ssh_host_ed25519_key.pub", "sshd_config", "ssh_host_note"] {
            fs::write(folder.path().join(name), "x").unwrap();
        }
        strip_from(folder.path()).unwrap();
        let mut left: Vec<_> =
            fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["ssh_host_note", "sshd_config"]);
        strip_from(Path::new("/nonexistent")).unwrap();
        let has_keygen = KEYGEN.iter().any(|path| Path::new(path).is_file());
        assert_eq!(missing(folder.path()).unwrap().is_some(), has_keygen);
        fs::write(folder.path().join("ssh_host_rsa_key"), "x").unwrap();
        assert_eq!(missing(folder.path()).unwrap(), None);
    }
}
