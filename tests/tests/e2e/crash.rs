//! Killed, cut off and out of space at every step: what a sandbox is afterwards, and that nothing is left of the rest.
//!
//! ```text
//! kill    strace kills the shim at its N-th file-system-changing call of a verb; with and without its reaper
//! vmm     a relay in front of QEMU's monitor kills QEMU at each command of a verb
//! full    the data folder is a file system of which K bytes are left
//! replace templates are replaced and made warm under running sandboxes
//! ```
//!
//! Nothing in host-shim knows of these tests. Each has a data folder of its own with a warm copy of the template `e2e`. By
//! default a sample of the steps is tried; with `TIFFIN_CRASH_EVERY=1` every step is (`make test-crash`).

mod full;
mod host;
mod kill;
mod replace;
mod vmm;

use host::{Case, Host, Phase, every, until};
