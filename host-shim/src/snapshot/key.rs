//! Whether a snapshot fits: the host that it was made on, and the first difference.

use std::fmt;

use oci_spec::image::Digest;
use serde::{Deserialize, Serialize};

use super::Error;
use super::manifest::{GuestKey, SnapshotMachine};
use crate::vmm::Accelerator;

/// What a host must have for a snapshot's device state and RAM to mean the same on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostKey {
    /// Name of the VMM, as `QEMU`.
    pub vmm: String,
    /// Its version, as it prints it.
    pub vmm_version: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// [`cpu_digest`].
    pub cpu: Digest,
}

impl HostKey {
    /// This host with that VMM.
    pub fn of_this_host(vmm: &str, vmm_version: &str, accelerator: Accelerator) -> Result<Self, Error> {
        let _ = (vmm, vmm_version, accelerator);
        todo!()
    }

    /// The name of a template's folder for such snapshots: `<vmm>-<version>-<accelerator>-<cpu digest, 12 hex digits>`.
    pub fn folder_name(&self) -> String {
        todo!()
    }

    /// The first difference of a snapshot's key (`self`) to a host's.
    pub fn mismatch(&self, host: &Self) -> Option<Mismatch> {
        let _ = host;
        todo!()
    }
}

impl SnapshotMachine {
    /// The first difference of a snapshot's machine (`self`) to the one that is asked for. A larger disk is none.
    pub fn mismatch(&self, asked: &Self) -> Option<Mismatch> {
        let _ = asked;
        todo!()
    }
}

impl GuestKey {
    /// The first difference of what runs in a snapshot (`self`) to what would be booted.
    pub fn mismatch(&self, host: &Self) -> Option<Mismatch> {
        let _ = host;
        todo!()
    }
}

/// Who wants what the snapshot does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Demand {
    /// The host has something else.
    Host,
    /// The sandbox asks for something else.
    Sandbox,
}

/// Why a snapshot does not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// What differs, as `QEMU` or `CPUs`.
    pub what: &'static str,
    /// The snapshot's value.
    pub snapshot: String,
    /// The other value.
    pub host: String,
    /// Whose the other value is.
    pub demand: Demand,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, snapshot, host, demand } = self;
        match demand {
            Demand::Host => write!(f, "the snapshot was made with {what} {snapshot}, this host has {host}"),
            Demand::Sandbox => {
                write!(f, "the snapshot was made with {what} {snapshot}, the sandbox asks for {host}")
            }
        }
    }
}

/// The digest of the CPU as a guest of that accelerator sees it.
pub fn cpu_digest(accelerator: Accelerator) -> Result<Digest, Error> {
    let _ = accelerator;
    todo!()
}
