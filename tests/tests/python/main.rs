//! Other people's code as the judge: E2B's published client, and protobuf's own JSON mapping.
//!
//! `make test` installs them and names the programs that run them in `TIFFIN_PYTHON` and `TIFFIN_NODE`.

mod gateway;
mod methods;
mod protojson;
mod registry;
mod sdk;
mod tls;

use std::path::{Path, PathBuf};
use std::process::Command;

/// A script of tests/python, in the Python that has the packages it needs.
fn python(script: &str) -> Command {
    let folder: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("python");
    let mut command = Command::new(e2e::made("TIFFIN_PYTHON"));
    command.arg(folder.join(script));
    command
}
