//! What this host can do, and what to install for the rest.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde::Serialize;
use template::DataDir;
use tokio::process::Command;

use crate::vmm::kvm_probe::{self, Kvm};
use crate::vmm::{Kind, Program};
use crate::{Error, tools};

/// How much a check matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// It is there.
    Ok,
    /// Sandboxes run without it, slower or with less.
    Absent,
    /// No sandbox runs without it.
    Missing,
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// Whether it is there.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What to do, when something is to be done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// The report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether sandboxes can run.
    pub ready: bool,
    /// Every check.
    pub checks: Vec<Check>,
}

/// What was found out about the host, before anybody judges it.
#[derive(Debug)]
pub struct Facts {
    /// QEMU and the first line of its `--version`.
    pub qemu: Result<(PathBuf, String), Error>,
    /// Firecracker and its version.
    pub firecracker: Result<(PathBuf, String), Error>,
    /// The guest kernel.
    pub kernel: Result<PathBuf, Error>,
    /// The guest image.
    pub guest_image: Result<PathBuf, Error>,
    /// KVM; `None` when there is no VMM or kernel to try it with.
    pub kvm: Option<Kvm>,
    /// KVM as Firecracker finds it; `None` when there is none, or no kernel to try it with.
    pub firecracker_kvm: Option<Kvm>,
    /// Whether /dev/vhost-vsock can be opened.
    pub vhost_vsock: bool,
    /// The vhost-user-vsock daemon.
    pub vhost_device_vsock: Result<(PathBuf, String), Error>,
    /// The data folder.
    pub data_dir: PathBuf,
    /// Whether files under the data folder can share blocks.
    pub reflink: Result<bool, String>,
    /// The controllers of cgroup v2, or why there are none.
    pub cgroup2: Result<String, String>,
    /// What a filtered network of each kind misses.
    pub networks: [(&'static str, Result<(), sandbox_network::Missing>); 2],
    /// How many user namespaces may exist.
    pub user_namespaces: Result<u64, String>,
}

impl Facts {
    /// Looks at this host.
    pub async fn gather(
        data: &DataDir,
        kernel: Option<&Path>,
        guest_image: Option<&Path>,
    ) -> Result<Self, Error> {
        let (qemu, firecracker) = (Program::find(Kind::Qemu), Program::find(Kind::Firecracker));
        let vhost_device_vsock = with_version(tools::vhost_device_vsock()).await;
        let kernel = tools::kernel(kernel);
        let probe = async |vmm: &Result<Program, Error>| match (vmm, &kernel) {
            (Ok(vmm), Ok(kernel)) => kvm_probe::probe(vmm, kernel, &data.cache()).await.map(Some),
            _ => Ok(None),
        };
        let firecracker_kvm = probe(&firecracker).await?;
        let kvm = match probe(&qemu).await? {
            Some(kvm) => Some(kvm),
            None => firecracker_kvm.clone(),
        };
        Ok(Self {
            qemu: with_version(qemu.map(|qemu| qemu.path)).await,
            firecracker: with_version(firecracker.map(|firecracker| firecracker.path)).await,
            firecracker_kvm,
            guest_image: tools::guest_image(guest_image),
            kernel,
            kvm,
            vhost_vsock: crate::channel::vhost_vsock_is_usable(),
            vhost_device_vsock,
            data_dir: data.path().to_owned(),
            reflink: can_reflink(data.path()),
            cgroup2: cgroup2_controllers(),
            networks: crate::network::missing(),
            user_namespaces: user_namespaces(),
        })
    }

    /// The report on these facts.
    pub fn judge(&self) -> Report {
        let mut checks = Vec::new();
        let mut check = |name, status, found: String, remedy: Option<String>| {
            checks.push(Check { name, status, found, remedy });
        };
        let ok = Status::Ok;
        match &self.qemu {
            Ok((path, version)) => check("qemu", ok, format!("{version} ({})", path.display()), None),
            // The other one is enough.
            Err(error) if self.firecracker_kvm == Some(Kvm::Works) => {
                check("qemu", Status::Absent, "not found".into(), Some(remedy(error)));
            }
            Err(error) => check("qemu", Status::Missing, "not found".into(), Some(remedy(error))),
        }
        match (&self.firecracker, &self.firecracker_kvm) {
            (Ok((path, version)), Some(Kvm::Works)) => {
                check("firecracker", ok, format!("{version} ({})", path.display()), None);
            }
            (Ok((path, version)), kvm) => {
                let why = match kvm {
                    Some(Kvm::Unusable(reason)) => reason.as_str(),
                    _ => "not tried",
                };
                let found = format!("{version} ({}), without KVM: {why}", path.display());
                check("firecracker", Status::Absent, found, Some("until it runs guests QEMU is used".into()));
            }
            (Err(Error::Missing { .. }), _) => {
                let advice = "not needed; a release of it in PATH or named by $FIRECRACKER_BIN is used where KVM works";
                check("firecracker", Status::Absent, "not found".into(), Some(advice.into()));
            }
            // Named, and not there: nothing starts before that is put right.
            (Err(error), _) => {
                let advice = "put it right, or unset it".to_owned();
                check("firecracker", Status::Missing, error.to_string(), Some(advice));
            }
        }
        for (name, found) in [("guest kernel", &self.kernel), ("guest image", &self.guest_image)] {
            match found {
                Ok(path) => check(name, ok, path.display().to_string(), None),
                Err(error) => check(name, Status::Missing, "not found".into(), Some(remedy(error))),
            }
        }
        match &self.kvm {
            Some(Kvm::Works) => check("kvm", ok, "a guest kernel ran".into(), None),
            Some(Kvm::Unusable(reason)) => {
                let advice = "sandboxes run emulated, slower and not behind a security boundary; use a host with \
                              hardware or nested virtualization, and membership of the group kvm";
                check("kvm", Status::Absent, reason.clone(), Some(advice.into()));
            }
            None => {
                let advice = "found out once there are a VMM and a guest kernel to try it with";
                check("kvm", Status::Absent, "not tried".into(), Some(advice.into()));
            }
        }
        if self.vhost_vsock {
            check("vhost-vsock", ok, "/dev/vhost-vsock".into(), None);
        } else {
            let advice = "`modprobe vhost_vsock`; until then the serial channel is used";
            check(
                "vhost-vsock",
                Status::Absent,
                "/dev/vhost-vsock cannot be opened".into(),
                Some(advice.into()),
            );
        }
        match &self.vhost_device_vsock {
            Ok((path, version)) => {
                check("vhost-device-vsock", ok, format!("{version} ({})", path.display()), None);
            }
            Err(error) => {
                check("vhost-device-vsock", Status::Absent, "not found".into(), Some(remedy(error)));
            }
        }
        match &self.reflink {
            Ok(true) => {
                check("reflink", ok, format!("files under {} share blocks", self.data_dir.display()), None)
            }
            Ok(false) => {
                let advice = "copies of disks are copied byte by byte; put --data-dir on btrfs or XFS";
                let found = format!("not on {}", self.data_dir.display());
                check("reflink", Status::Absent, found, Some(advice.into()));
            }
            Err(error) => {
                let found = format!("{}: {error}", self.data_dir.display());
                check("data folder", Status::Missing, found, Some("name another with --data-dir".into()));
            }
        }
        match &self.cgroup2 {
            Ok(controllers) => check("cgroup v2", ok, controllers.clone(), None),
            Err(found) => {
                let advice = "boot with systemd.unified_cgroup_hierarchy=1 to limit what a VMM uses";
                check("cgroup v2", Status::Absent, found.clone(), Some(advice.into()));
            }
        }
        for (name, missing) in &self.networks {
            match missing {
                Ok(()) => check(name, ok, "can be made".into(), None),
                Err(missing) => {
                    check(name, Status::Absent, format!("no {}", missing.what), Some(missing.remedy.clone()));
                }
            }
        }
        match &self.user_namespaces {
            Ok(count @ 1..) => check("user namespaces", ok, format!("up to {count}"), None),
            Ok(0) => {
                let advice = "`sysctl user.max_user_namespaces=10000` for networks of ordinary users";
                check("user namespaces", Status::Absent, "switched off".into(), Some(advice.into()));
            }
            Err(found) => check("user namespaces", Status::Absent, found.clone(), None),
        }
        Report { ready: checks.iter().all(|check| check.status != Status::Missing), checks }
    }
}

impl Report {
    /// The report as a table.
    pub fn table(&self) -> String {
        let mut out = String::new();
        for check in &self.checks {
            let mark = match check.status {
                Status::Ok => "ok",
                Status::Absent => "no",
                Status::Missing => "MISSING",
            };
            out.push_str(&format!("{mark:<8} {:<19} {}\n", check.name, check.found));
            if let Some(remedy) = &check.remedy {
                out.push_str(&format!("{:<29}-> {remedy}\n", ""));
            }
        }
        out.push_str(if self.ready {
            "\nSandboxes can run on this host.\n"
        } else {
            "\nSandboxes cannot run on this host until what is MISSING is there.\n"
        });
        out
    }
}

fn remedy(error: &Error) -> String {
    match error {
        Error::Missing { remedy, .. } => remedy.clone(),
        other => other.to_string(),
    }
}

async fn with_version(program: Result<PathBuf, Error>) -> Result<(PathBuf, String), Error> {
    let program = program?;
    let version = match Command::new(&program).arg("--version").stdin(Stdio::null()).output().await {
        Ok(output) => {
            String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or("no version").to_owned()
        }
        Err(error) => error.to_string(),
    };
    Ok((program, version))
}

fn can_reflink(folder: &Path) -> Result<bool, String> {
    let attempt = || {
        std::fs::create_dir_all(folder)?;
        let [from, to] =
            ["from", "to"].map(|name| folder.join(format!(".doctor-{}-{name}", std::process::id())));
        let cloned = std::fs::write(&from, b"x").and_then(|()| {
            let out = std::fs::File::create(&to)?;
            Ok(rustix::fs::ioctl_ficlone(&out, std::fs::File::open(&from)?).is_ok())
        });
        for file in [from, to] {
            // The second is absent when the first could not be written.
            let _ = std::fs::remove_file(file);
        }
        cloned
    };
    attempt().map_err(|error: std::io::Error| error.to_string())
}

fn cgroup2_controllers() -> Result<String, String> {
    let file = "/sys/fs/cgroup/cgroup.controllers";
    match std::fs::read_to_string(file) {
        Ok(text) if !text.trim().is_empty() => Ok(text.trim().to_owned()),
        Ok(_) => Err("mounted, without controllers".to_owned()),
        Err(_) => Err("/sys/fs/cgroup is not cgroup v2".to_owned()),
    }
}

fn user_namespaces() -> Result<u64, String> {
    let file = "/proc/sys/user/max_user_namespaces";
    let text = std::fs::read_to_string(file).map_err(|error| format!("{file}: {error}"))?;
    text.trim().parse().map_err(|_| format!("{file}: expected a number, got {:?}", text.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(what: &str) -> Error {
        Error::Missing { what: what.into(), remedy: format!("install {what}") }
    }

    fn lacks(what: &str) -> sandbox_network::Missing {
        sandbox_network::Missing { what: what.into(), remedy: format!("install {what}") }
    }

    fn best() -> Facts {
        Facts {
            qemu: Ok(("/usr/bin/qemu-system-x86_64".into(), "QEMU emulator version 7.2".into())),
            firecracker: Ok(("/usr/bin/firecracker".into(), "Firecracker v1.12.0".into())),
            firecracker_kvm: Some(Kvm::Works),
            kernel: Ok("/k/vmlinux".into()),
            guest_image: Ok("/k/guest-image.cpio".into()),
            kvm: Some(Kvm::Works),
            vhost_vsock: true,
            vhost_device_vsock: Ok(("/usr/bin/vhost-device-vsock".into(), "vhost-device-vsock 0.3.0".into())),
            data_dir: "/data".into(),
            reflink: Ok(true),
            cgroup2: Ok("cpu memory pids".into()),
            networks: [("network user", Ok(())), ("network tap", Ok(()))],
            user_namespaces: Ok(100),
        }
    }

    #[test]
    fn a_host_with_everything_has_nothing_to_do() {
        let report = best().judge();
        assert!(report.ready);
        assert!(report.checks.iter().all(|check| check.status == Status::Ok && check.remedy.is_none()));
    }

    #[test]
    fn what_is_slower_is_told_apart_from_what_is_missing() {
        let poor = Facts {
            kvm: Some(Kvm::Unusable("/dev/kvm: Permission denied".into())),
            firecracker_kvm: Some(Kvm::Unusable("/dev/kvm: Permission denied".into())),
            vhost_vsock: false,
            vhost_device_vsock: Err(missing("vhost-device-vsock")),
            reflink: Ok(false),
            cgroup2: Err("/sys/fs/cgroup is not cgroup v2".into()),
            networks: [
                ("network user", Err(lacks("pasta"))),
                ("network tap", Err(lacks("CAP_NET_ADMIN with CAP_SYS_ADMIN"))),
            ],
            user_namespaces: Ok(0),
            ..best()
        };
        let report = poor.judge();
        assert!(report.ready, "no KVM is a notice, not an error");
        insta::assert_snapshot!(report.table());
    }

    #[test]
    fn either_vmm_is_enough() {
        let no_qemu = Facts { qemu: Err(missing("qemu-system-x86")), ..best() };
        let no_firecracker =
            Facts { firecracker: Err(missing("firecracker")), firecracker_kvm: None, ..best() };
        for facts in [no_qemu, no_firecracker] {
            let report = facts.judge();
            let absent = report.checks.iter().filter(|check| check.status == Status::Absent).count();
            assert!(report.ready && absent == 1, "{report:?}");
        }
    }

    #[test]
    fn each_missing_part_alone_stops_sandboxes_and_says_what_to_do() {
        let cases = [
            Facts {
                qemu: Err(missing("qemu-system-x86")),
                kvm: None,
                firecracker: Err(missing("firecracker")),
                firecracker_kvm: None,
                ..best()
            },
            Facts {
                firecracker: Err(Error::invalid("FIRECRACKER_BIN", "x")),
                firecracker_kvm: None,
                ..best()
            },
            Facts { kernel: Err(missing("a kernel")), kvm: None, ..best() },
            Facts { guest_image: Err(missing("a guest image")), ..best() },
            Facts { reflink: Err("Read-only file system".into()), ..best() },
        ];
        for facts in cases {
            let report = facts.judge();
            let missing =
                report.checks.iter().filter(|check| check.status == Status::Missing).collect::<Vec<_>>();
            assert!(!report.ready && missing.len() == 1 && missing[0].remedy.is_some(), "{report:?}");
        }
    }
}
