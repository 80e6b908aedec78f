//! What this host runs sandboxes with.

use std::path::{Path, PathBuf};

use sandbox_folder::spec::AcceleratorChoice;
use template::SNAPSHOTS;

use super::Watch;
use crate::snapshot::{GuestKey, HostKey, SnapshotFolder};
use crate::spec::CheckedSpec;
use crate::vmm::kvm_probe::{self, Kvm};
use crate::vmm::{Accelerator, Kind, Program};
use crate::{Error, cache, tools};

/// The programs and files of this host for one sandbox.
pub(super) struct Host {
    pub(super) vmm: Program,
    pub(super) kernel: PathBuf,
    pub(super) guest_image: PathBuf,
    pub(super) accelerator: Accelerator,
    pub(super) key: HostKey,
    pub(super) cache: PathBuf,
}

impl Host {
    /// Looks for everything that a boot needs. What was found out before is remembered in `cache`.
    pub(super) async fn find(spec: &CheckedSpec, cache: &Path, watch: &dyn Watch) -> Result<Self, Error> {
        let kernel = tools::kernel(spec.kernel.as_deref());
        let vmm = choose_vmm(spec, kernel.as_deref().ok(), cache).await?;
        let kernel = kernel?;
        let guest_image = tools::guest_image(spec.guest_image.as_deref())?;
        let accelerator = choose(spec.accelerator, &vmm, &kernel, cache, watch).await?;
        let version = vmm.version(cache).await?;
        let key = HostKey::of_this_host(vmm.kind.name(), &version, accelerator)?;
        Ok(Self { vmm, kernel, guest_image, accelerator, key, cache: cache.to_owned() })
    }

    /// What a boot of `spec` has in it.
    pub(super) fn guest(&self, spec: &CheckedSpec) -> Result<GuestKey, Error> {
        Ok(GuestKey {
            kernel: cache::digest(&self.kernel, &self.cache)?,
            guest_image: cache::digest(&self.guest_image, &self.cache)?,
            rootfs: spec.rootfs_digest.clone(),
        })
    }
}

/// The VMM that a spec insists on, else the one that the snapshot wants that it can only go on from, else Firecracker where
/// that can do it, else QEMU.
async fn choose_vmm(spec: &CheckedSpec, kernel: Option<&Path>, cache: &Path) -> Result<Program, Error> {
    if let Some(kind) = Kind::chosen(spec.vmm) {
        kind.check(&spec.wishes())?;
        return Program::find(kind);
    }
    if let Some(kind) = wanted_by_snapshot(spec) {
        return Program::find(kind);
    }
    if Kind::Firecracker.lacks(&spec.wishes()).is_none()
        && let Some(kernel) = kernel
    {
        match Program::find(Kind::Firecracker) {
            Ok(firecracker) => match kvm_probe::probe(&firecracker, kernel, cache).await? {
                Kvm::Works => return Ok(firecracker),
                Kvm::Unusable(reason) => tracing::info!(reason, "Firecracker cannot be used"),
            },
            Err(Error::Missing { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Program::find(Kind::Qemu)
}

/// The VMM of a snapshot without which the sandbox cannot begin.
fn wanted_by_snapshot(spec: &CheckedSpec) -> Option<Kind> {
    let vmm = |folder: &Path| Kind::named(&SnapshotFolder::open(folder).ok()?.manifest().description.key.vmm);
    if let Some(named) = &spec.snapshot {
        // One that cannot be read is told when it is looked at for its own sake.
        return vmm(named);
    }
    let template = spec.template.as_ref().filter(|template| template.template().snapshot_only)?;
    let snapshots = std::fs::read_dir(template.path().join(SNAPSHOTS)).ok()?;
    snapshots.flatten().find_map(|entry| vmm(&entry.path()))
}

async fn choose(
    choice: AcceleratorChoice,
    vmm: &Program,
    kernel: &Path,
    cache: &Path,
    watch: &dyn Watch,
) -> Result<Accelerator, Error> {
    match (choice, vmm.kind) {
        (AcceleratorChoice::Kvm, _) => Ok(Accelerator::Kvm),
        // Firecracker is refused it before (`Kind::lacks`).
        (AcceleratorChoice::Tcg, _) => Ok(Accelerator::Tcg),
        (AcceleratorChoice::Auto, kind) => {
            match kvm_probe::probe(vmm, kernel, cache).await? {
                Kvm::Works => Ok(Accelerator::Kvm),
                Kvm::Unusable(reason) if kind == Kind::Firecracker => Err(Error::Missing {
                    what: "KVM, without which Firecracker runs nothing,".to_owned(),
                    remedy: format!("{reason}; use a host that has it, or --vmm qemu"),
                }),
                Kvm::Unusable(reason) => {
                    tracing::info!(reason, "KVM cannot be used");
                    watch.notice(&format!("no KVM ({reason}): the sandbox runs emulated (TCG), slower and not a security boundary"));
                    Ok(Accelerator::Tcg)
                }
            }
        }
    }
}
