//! What real builds need of this machine.

use std::path::Path;

/// A static busybox for images from scratch; `None`, with the reason on stderr, where this machine cannot build.
pub(crate) fn busybox() -> Option<&'static Path> {
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].iter().map(Path::new).find(|path| path.exists());
    if busybox.is_none() {
        eprintln!("SKIPPED: no /bin/busybox; install busybox-static");
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: builds mount overlays, which needs root");
        return None;
    }
    busybox
}
