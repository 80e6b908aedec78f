//! What this machine has: the programs that the gateway starts, and whether it runs sandboxes behind a boundary.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde::Deserialize;
use tokio::process::Command;

use crate::config::Config;

/// Sandboxes cannot run here, or not as the operator wants them.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A program is not there.
    #[error("{program} is missing: looked beside tiffin-gateway and in PATH; name it with {option}")]
    NoProgram {
        /// Its name.
        program: &'static str,
        /// The option that names it.
        option: &'static str,
    },
    /// What was named is no program.
    #[error("{option}: {} is no executable file", path.display())]
    NotExecutable {
        /// The option.
        option: &'static str,
        /// What it names.
        path: PathBuf,
    },
    /// Something that every sandbox needs is not there.
    #[error("sandboxes cannot run on this host:{}", list(missing))]
    NotReady {
        /// What is missing, with what to do.
        missing: Vec<String>,
    },
    /// There is no usable hardware virtualization.
    #[error(
        "this host has no usable hardware virtualization ({reason}): sandboxes would run emulated, which is slow and no \
         security boundary. Use a machine with KVM; for trying, give --allow-emulation"
    )]
    NoVirtualization {
        /// Why.
        reason: String,
    },
    /// `host-shim doctor` did not say.
    #[error("`{} doctor` failed: {reason}", program.display())]
    Doctor {
        /// The program.
        program: PathBuf,
        /// Why.
        reason: String,
    },
}

fn list(lines: &[String]) -> String {
    lines.iter().map(|line| format!("\n  {line}")).collect()
}

/// A program: the named one, else the one beside this program, else the first in PATH.
pub fn program(
    named: Option<&Path>,
    program: &'static str,
    option: &'static str,
) -> Result<PathBuf, HostError> {
    if let Some(path) = named {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        return match is_executable(&path) {
            true => Ok(path),
            false => Err(HostError::NotExecutable { option, path }),
        };
    }
    let beside = std::env::current_exe().ok().and_then(|own| Some(own.parent()?.join(program)));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path).map(|folder| folder.join(program));
    beside
        .into_iter()
        .chain(in_path)
        .find(|file| file.is_absolute() && is_executable(file))
        .ok_or(HostError::NoProgram { program, option })
}

fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

#[derive(Debug, Deserialize)]
struct Report {
    ready: bool,
    checks: Vec<Check>,
}

#[derive(Debug, Deserialize)]
struct Check {
    name: String,
    status: String,
    found: String,
    #[serde(default)]
    remedy: Option<String>,
}

/// Asks `host-shim doctor`. `Ok` with a warning where sandboxes will run emulated because the operator allows it.
pub async fn check(config: &Config) -> Result<Option<String>, HostError> {
    let failed = |reason: String| HostError::Doctor { program: config.host_shim.clone(), reason };
    let mut command = Command::new(&config.host_shim);
    command.args(["doctor", "--json", "--data-dir"]).arg(config.data.path()).stdin(Stdio::null());
    for (option, file) in [("--kernel", &config.kernel), ("--guest-image", &config.guest_image)] {
        if let Some(file) = file {
            command.arg(option).arg(file);
        }
    }
    let output = command.output().await.map_err(|error| failed(error.to_string()))?;
    let report: Report = serde_json::from_slice(&output.stdout).map_err(|_| {
        failed(format!("{} ({})", String::from_utf8_lossy(&output.stderr).trim(), output.status))
    })?;
    judge(report, config.allow_emulation)
}

fn judge(report: Report, allow_emulation: bool) -> Result<Option<String>, HostError> {
    if !report.ready {
        let missing = report.checks.iter().filter(|check| check.status == "missing").map(|check| {
            let remedy = check.remedy.as_deref().unwrap_or("see `host-shim doctor`");
            format!("{}: {} ({remedy})", check.name, check.found)
        });
        return Err(HostError::NotReady { missing: missing.collect() });
    }
    let kvm = report.checks.iter().find(|check| check.name == "kvm");
    match kvm {
        Some(kvm) if kvm.status == "ok" => Ok(None),
        other => {
            let reason = other.map_or("not tried", |kvm| &kvm.found).to_owned();
            if allow_emulation { Ok(Some(reason)) } else { Err(HostError::NoVirtualization { reason }) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(text: &str) -> Report {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn emulation_must_be_allowed_and_what_is_missing_is_named() {
        let works = r#"{"ready":true,"checks":[{"name":"kvm","status":"ok","found":"a guest kernel ran"}]}"#;
        assert_eq!(judge(report(works), false).unwrap(), None);
        let none = r#"{"ready":true,"checks":[{"name":"kvm","status":"absent","found":"/dev/kvm: No such file","novel":1}]}"#;
        assert_eq!(judge(report(none), true).unwrap().unwrap(), "/dev/kvm: No such file");
        let error = judge(report(none), false).unwrap_err().to_string();
        assert!(error.contains("(/dev/kvm: No such file)") && error.contains("--allow-emulation"), "{error}");
        let poor = r#"{"ready":false,"checks":[{"name":"qemu","status":"missing","found":"not found","remedy":"install it"}]}"#;
        let error = judge(report(poor), true).unwrap_err().to_string();
        assert!(error.contains("\n  qemu: not found (install it)"), "{error}");
    }

    #[test]
    fn a_program_is_found_or_named() {
        assert!(program(None, "sh", "--sh").unwrap().is_absolute());
        assert!(matches!(program(None, "no-such-program", "--x"), Err(HostError::NoProgram { .. })));
        let error = program(Some(Path::new("/etc/passwd")), "sh", "--sh").unwrap_err().to_string();
        assert_eq!(error, "--sh: /etc/passwd is no executable file");
    }
}
