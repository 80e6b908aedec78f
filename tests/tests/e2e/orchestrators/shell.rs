//! The example for shells, run as it is.

use std::path::PathBuf;
use std::process::Command;

use e2e::{TestSandbox, binary, made, template};

fn example() -> Command {
    let file =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../host-shim/examples/orchestrators/sandbox.sh");
    let mut command = Command::new(file);
    let path = std::env::var("PATH").unwrap();
    command
        .env("PATH", format!("{}:{path}", made("TIFFIN_BIN").display()))
        .env("TIFFIN_DATA_DIR", made("TIFFIN_E2E_DATA"))
        .env("TIFFIN_KERNEL", made("TIFFIN_KERNEL"))
        .env("TIFFIN_GUEST_IMAGE", made("TIFFIN_GUEST_IMAGE"));
    command
}

#[test]
fn a_shell_leads_a_sandbox_through_its_whole_life() {
    assert!(binary("host-shim").exists());
    let folder = tempfile::Builder::new().prefix("tish").tempdir_in("/tmp").unwrap();
    let dir = folder.path().join("s");
    let output = example().arg(template()).arg(&dir).output().unwrap();
    let (stdout, stderr) =
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success() && stderr.is_empty(), "{stdout}{stderr}");
    let said: Vec<_> = stdout.lines().map(|line| line.split(": {").next().unwrap()).collect();
    let expected = [
        "ready",
        "inside: Linux",
        "paused, and nothing of it runs",
        "resumed",
        "still there: kept",
        "stopped",
    ];
    assert_eq!(said, expected, "{stdout}");
    assert!(TestSandbox::processes_of(&dir).is_empty());

    let output = example().arg("/no/such/template").arg(&dir).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("/no/such/template") && stderr.contains("host-shim ended with 2"), "{stderr}");
}
