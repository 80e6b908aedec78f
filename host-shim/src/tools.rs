//! Programs and files that a sandbox needs on its host, and where they are looked for.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::Error;

/// Environment variable that names the guest kernel.
pub const KERNEL_ENV: &str = "TIFFIN_KERNEL";
/// Environment variable that names the guest image.
pub const GUEST_IMAGE_ENV: &str = "TIFFIN_GUEST_IMAGE";
/// Environment variable that names the vhost-user-vsock daemon.
pub const VHOST_DEVICE_VSOCK_ENV: &str = "TIFFIN_VHOST_DEVICE_VSOCK";

const VHOST_DEVICE_VSOCK: &str = "vhost-device-vsock";

/// The first executable of that name in `PATH`, `/sbin` and `/usr/sbin`.
pub fn find_in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|folder| folder.join(name))
        .find(|file| is_executable(file))
}

/// The guest kernel: the one that is named, else the installed one.
pub fn kernel(named: Option<&Path>) -> Result<PathBuf, Error> {
    installed("guest kernel", named, KERNEL_ENV, "vmlinux", "--kernel", "guest-kernel/build.sh")
}

/// The guest image: the one that is named, else the installed one.
pub fn guest_image(named: Option<&Path>) -> Result<PathBuf, Error> {
    let make = "rootfs-tools guest-image";
    installed("guest image", named, GUEST_IMAGE_ENV, "guest-image.cpio", "--guest-image", make)
}

/// The vhost-user-vsock daemon: the one that is named by the environment, in PATH, or in `../libexec`.
pub fn vhost_device_vsock() -> Result<PathBuf, Error> {
    if let Some(named) = std::env::var_os(VHOST_DEVICE_VSOCK_ENV) {
        let named = PathBuf::from(named);
        if is_executable(&named) {
            return Ok(named);
        }
        let reason = format!("{} is no executable file", named.display());
        return Err(Error::invalid(VHOST_DEVICE_VSOCK_ENV, reason));
    }
    let beside = beside_binary(&["libexec", VHOST_DEVICE_VSOCK]);
    find_in_path(VHOST_DEVICE_VSOCK).or(beside.filter(|file| is_executable(file))).ok_or_else(|| Error::Missing {
        what: VHOST_DEVICE_VSOCK.to_owned(),
        remedy: format!(
            "looked in PATH and ../libexec beside host-shim; install it with `cargo install {VHOST_DEVICE_VSOCK} \
             --version 0.3.0`, name it in ${VHOST_DEVICE_VSOCK_ENV}, or use --channel serial"
        ),
    })
}

fn installed(
    what: &str,
    named: Option<&Path>,
    variable: &str,
    file: &str,
    option: &str,
    make: &str,
) -> Result<PathBuf, Error> {
    // What was named is used or refused, never silently replaced.
    if let Some(named) = named {
        return regular(named).ok_or_else(|| Error::invalid(what, format!("{} is no file", named.display())));
    }
    if let Some(named) = std::env::var_os(variable).map(PathBuf::from) {
        return regular(&named)
            .ok_or_else(|| Error::invalid(variable, format!("{} is no file", named.display())));
    }
    let beside = beside_binary(&["share", "tiffin", file]);
    beside.as_deref().and_then(regular).ok_or_else(|| Error::Missing {
        what: format!("the {what}"),
        remedy: format!(
            "looked at {}; make it with `{make}`, and name it with {option} or ${variable}",
            beside.unwrap_or_else(|| format!("../share/tiffin/{file}").into()).display()
        ),
    })
}

fn regular(path: &Path) -> Option<PathBuf> {
    path.is_file().then(|| std::path::absolute(path).ok()).flatten()
}

/// A path under the folder above the one that holds this program.
fn beside_binary(parts: &[&str]) -> Option<PathBuf> {
    let prefix = std::env::current_exe().ok()?.parent()?.parent()?.to_owned();
    Some(parts.iter().fold(prefix, |path, part| path.join(part)))
}

pub(crate) fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_named_is_used_or_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("vmlinux");
        let error = kernel(Some(&file)).unwrap_err().to_string();
        assert!(error.contains("vmlinux is no file"), "{error}");
        std::fs::write(&file, "").unwrap();
        assert_eq!(kernel(Some(&file)).unwrap(), file);
    }

    #[test]
    fn a_missing_one_says_where_it_was_looked_for() {
        let error =
            installed("guest kernel", None, "TIFFIN_NOT_SET", "no-such", "--kernel", "make it").unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("share/tiffin/no-such") && text.contains("--kernel or $TIFFIN_NOT_SET"),
            "{text}"
        );
    }
}
