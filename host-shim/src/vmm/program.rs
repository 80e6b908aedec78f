//! Which VMM runs a sandbox, and what it cannot do.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use sandbox_folder::spec::{AcceleratorChoice, ChannelChoice, VmmChoice};

use super::{firecracker, process, qemu};
use crate::Error;
use crate::cache::Answer;

/// A VMM that there is a driver for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// QEMU, with its machine `microvm`.
    Qemu,
    /// Firecracker.
    Firecracker,
}

impl Kind {
    /// Its name, to users and in the manifests of snapshots.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qemu => "QEMU",
            Self::Firecracker => "Firecracker",
        }
    }

    /// The VMM of that [name](Self::name).
    pub fn named(name: &str) -> Option<Self> {
        [Self::Qemu, Self::Firecracker].into_iter().find(|kind| kind.name() == name)
    }

    /// As a spec says it.
    pub fn choice(self) -> VmmChoice {
        match self {
            Self::Qemu => VmmChoice::Qemu,
            Self::Firecracker => VmmChoice::Firecracker,
        }
    }

    /// The one that a spec insists on.
    pub fn chosen(choice: VmmChoice) -> Option<Self> {
        match choice {
            VmmChoice::Auto => None,
            VmmChoice::Qemu => Some(Self::Qemu),
            VmmChoice::Firecracker => Some(Self::Firecracker),
        }
    }

    /// What of these wishes it cannot do, in words that follow its name.
    pub fn lacks(self, wishes: &Wishes) -> Option<String> {
        match self {
            // Whatever can be asked for.
            Self::Qemu => None,
            Self::Firecracker => {
                let instead = match wishes.channel {
                    ChannelChoice::Auto => None,
                    ChannelChoice::Serial => Some("serial"),
                    ChannelChoice::VhostVsock => Some("vhost-vsock"),
                    ChannelChoice::VhostUserVsock => Some("vhost-user-vsock"),
                };
                if let Some(channel) = instead {
                    return Some(format!("has a channel of its own and not {channel}: leave --channel out"));
                }
                if wishes.accelerator == AcceleratorChoice::Tcg {
                    return Some("runs guests on KVM only, and not with --accel tcg".to_owned());
                }
                if wishes.extras {
                    // A device of it needs a TAP in its own network namespace, and one that was not there at a boot cannot
                    // be added to the snapshot: every machine would have to have one.
                    return Some("has no --attach and no --network other than none here".to_owned());
                }
                (wishes.cpus > firecracker::MAX_CPUS).then(|| {
                    format!(
                        "gives a guest at most {} virtual CPUs, and not {}",
                        firecracker::MAX_CPUS,
                        wishes.cpus
                    )
                })
            }
        }
    }

    /// What `--version` begins with.
    fn words_before_version(self) -> &'static str {
        match self {
            Self::Qemu => "QEMU emulator version ",
            Self::Firecracker => "Firecracker v",
        }
    }

    /// As [`Kind::lacks`], for somebody who insists on this VMM.
    pub fn check(self, wishes: &Wishes) -> Result<(), Error> {
        match self.lacks(wishes) {
            None => Ok(()),
            Some(lack) => {
                let reason = format!("{} {lack}; --vmm qemu can do it", self.name());
                Err(Error::invalid(format!("--vmm {}", self.name().to_ascii_lowercase()), reason))
            }
        }
    }
}

/// What a spec asks of a VMM that not every VMM can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wishes {
    /// What carries streams.
    pub channel: ChannelChoice,
    /// What runs the guest's instructions.
    pub accelerator: AcceleratorChoice,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Whether there are further disks, or a network.
    pub extras: bool,
}

/// A VMM of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// Which it is.
    pub kind: Kind,
    /// Where it is, as an absolute path.
    pub path: PathBuf,
}

impl Program {
    /// The VMM of that kind.
    pub fn find(kind: Kind) -> Result<Self, Error> {
        let path = match kind {
            Kind::Qemu => qemu::find()?,
            Kind::Firecracker => firecracker::find()?,
        };
        Ok(Self { kind, path })
    }

    /// Its version, as it says it: `1.12.0`, `7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)`. A package's revision counts: QEMU's
    /// device state has changed within one version.
    pub async fn version(&self, cache: &Path) -> Result<String, Error> {
        let (words, program) = (self.kind.words_before_version(), &self.path);
        let known = Answer::about(cache, &self.kind.name().to_ascii_lowercase(), b"", &[program])?;
        if let Some(version) = known.read() {
            return Ok(version);
        }
        let spawn = |source| Error::Spawn { program: program.display().to_string(), source };
        let asked = process::bound(program, ["--version"], Vec::new())?.stdin(Stdio::null()).output();
        let output = asked.await.map_err(spawn)?;
        let said = String::from_utf8_lossy(&output.stdout);
        let version = said.lines().next().and_then(|line| line.strip_prefix(words));
        let version = version.map(str::trim).filter(|version| !version.is_empty()).ok_or_else(|| {
            let reason = format!("`{} --version` said {:?}", program.display(), said.trim());
            Error::invalid(self.kind.name(), reason)
        })?;
        known.keep(version);
        Ok(version.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_firecracker_cannot_do_is_said_with_what_can() {
        let plain = Wishes {
            channel: ChannelChoice::Auto,
            accelerator: AcceleratorChoice::Auto,
            cpus: 32,
            extras: false,
        };
        assert!(Kind::Firecracker.check(&plain).is_ok());
        let kvm = Wishes { accelerator: AcceleratorChoice::Kvm, ..plain };
        assert_eq!(Kind::Firecracker.lacks(&kvm), None);
        for (wishes, expected) in [
            (Wishes { channel: ChannelChoice::Serial, ..plain }, "not serial: leave --channel out"),
            (Wishes { channel: ChannelChoice::VhostVsock, ..plain }, "not vhost-vsock"),
            (Wishes { channel: ChannelChoice::VhostUserVsock, ..plain }, "not vhost-user-vsock"),
            (Wishes { accelerator: AcceleratorChoice::Tcg, ..plain }, "on KVM only"),
            (Wishes { extras: true, ..plain }, "no --attach and no --network other than none"),
            (Wishes { cpus: 33, ..plain }, "at most 32 virtual CPUs, and not 33"),
        ] {
            let error = Kind::Firecracker.check(&wishes).unwrap_err();
            let said = error.to_string();
            assert!(said.starts_with("invalid --vmm firecracker: Firecracker "), "{said}");
            assert!(said.contains(expected) && said.ends_with("; --vmm qemu can do it"), "{said}");
            assert!(error.is_bad_input());
            assert!(Kind::Qemu.check(&wishes).is_ok());
        }
    }

    #[test]
    fn a_manifest_names_the_vmm_that_restores_it() {
        for kind in [Kind::Qemu, Kind::Firecracker] {
            assert_eq!(Kind::named(kind.name()), Some(kind));
            assert_eq!(Kind::chosen(kind.choice()), Some(kind));
        }
        assert_eq!(Kind::named("Cloud Hypervisor"), None);
        assert_eq!(Kind::chosen(VmmChoice::Auto), None);
    }
}
