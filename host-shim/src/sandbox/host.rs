//! What this host runs sandboxes with.

use std::path::{Path, PathBuf};

use sandbox_folder::spec::AcceleratorChoice;

use super::Watch;
use crate::snapshot::{GuestKey, HostKey};
use crate::spec::CheckedSpec;
use crate::vmm::kvm_probe::{self, Kvm};
use crate::vmm::{Accelerator, qemu};
use crate::{Error, cache, tools};

/// The name of the only VMM, as it is said to users.
const VMM: &str = "QEMU";

/// The programs and files of this host for one sandbox.
pub(super) struct Host {
    pub(super) qemu: PathBuf,
    pub(super) kernel: PathBuf,
    pub(super) guest_image: PathBuf,
    pub(super) accelerator: Accelerator,
    pub(super) key: HostKey,
    pub(super) cache: PathBuf,
}

impl Host {
    /// Looks for everything that a boot needs. What was found out before is remembered in `cache`.
    pub(super) async fn find(spec: &CheckedSpec, cache: &Path, watch: &dyn Watch) -> Result<Self, Error> {
        let qemu = qemu::find()?;
        let kernel = tools::kernel(spec.kernel.as_deref())?;
        let guest_image = tools::guest_image(spec.guest_image.as_deref())?;
        let accelerator = choose(spec.accelerator, &qemu, &kernel, cache, watch).await?;
        let version = qemu::version(&qemu, cache).await?;
        let key = HostKey::of_this_host(VMM, &version, accelerator)?;
        Ok(Self { qemu, kernel, guest_image, accelerator, key, cache: cache.to_owned() })
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

async fn choose(
    choice: AcceleratorChoice,
    qemu: &Path,
    kernel: &Path,
    cache: &Path,
    watch: &dyn Watch,
) -> Result<Accelerator, Error> {
    match choice {
        AcceleratorChoice::Kvm => Ok(Accelerator::Kvm),
        AcceleratorChoice::Tcg => Ok(Accelerator::Tcg),
        AcceleratorChoice::Auto => {
            match kvm_probe::probe(qemu, kernel, cache).await? {
                Kvm::Works => Ok(Accelerator::Kvm),
                Kvm::Unusable(reason) => {
                    tracing::info!(reason, "KVM cannot be used");
                    watch.notice(&format!("no KVM ({reason}): the sandbox runs emulated (TCG), slower and not a security boundary"));
                    Ok(Accelerator::Tcg)
                }
            }
        }
    }
}
