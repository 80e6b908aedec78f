//! host-shim as orchestrators use it: what `run --dir` promises them, and the examples beside it, run for real.

mod promises;
mod shell;
mod shim;
mod systemd;
