//! Real boots, real clients, faults: what the end-to-end tests share.
//!
//! [`TestSandbox`] starts `host-shim` as an orchestrator would, in a folder of its own, and talks to the sandbox over the
//! sockets there. `make test` builds what it needs and says where it is:
//!
//! ```text
//! TIFFIN_BIN          host-shim, image-builder, rootfs-tools
//! TIFFIN_KERNEL       the guest kernel
//! TIFFIN_GUEST_IMAGE  the initramfs with envd
//! TIFFIN_E2E_DATA     a data folder with the templates of tests/prepare.sh, `e2e` (a busybox image) first of all
//! ```

mod data;
mod life;
pub mod owner;
pub mod process;
mod sandbox;

use std::path::PathBuf;
use std::time::Duration;

pub use data::TestData;
pub use life::{Forked, Paused};
pub use sandbox::{Channel, TestSandbox, TestSandboxBuilder};

/// For anything that a test waits for: generous, and there only to catch a hang.
pub const DEADLINE: Duration = Duration::from_secs(120);

/// A file or folder that `make test` has made.
///
/// # Panics
///
/// When the variable is not set: the tests were not started by `make test`.
pub fn made(variable: &str) -> PathBuf {
    match std::env::var_os(variable) {
        Some(path) => path.into(),
        None => panic!("${variable} is not set: run the end-to-end tests with `make test` (or `make e2e`)"),
    }
}

/// The VMM of tests that do not want another one; `make test-kvm` names each of the host's in turn.
pub fn vmm() -> String {
    std::env::var("TIFFIN_E2E_VMM").unwrap_or_else(|_| "qemu".to_owned())
}

/// One of the project's binaries.
pub fn binary(name: &str) -> PathBuf {
    made("TIFFIN_BIN").join(name)
}

/// The folder of the template that the tests boot.
pub fn template() -> PathBuf {
    made("TIFFIN_E2E_DATA").join("templates/e2e")
}
