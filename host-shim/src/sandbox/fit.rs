//! Whether a sandbox boots or is restored, and the reason.

use std::path::Path;
use std::sync::Arc;

use sandbox_folder::spec::{ChannelChoice, RestoreChoice};
use template::SNAPSHOTS;

use super::Watch;
use super::host::Host;
use crate::Error;
use crate::snapshot::{self, Mismatch, SnapshotFolder, SnapshotMachine};
use crate::spec::CheckedSpec;

/// How a sandbox comes to life.
pub(super) enum Plan {
    /// It boots; with the reason where it could have been restored.
    Boot(Option<String>),
    /// It is a clone of this.
    Clone(Arc<SnapshotFolder>),
}

/// Looks for the snapshot that a sandbox is restored from, and checks it.
pub(super) fn plan(spec: &CheckedSpec, host: &Host, watch: &dyn Watch) -> Result<Plan, Error> {
    if let Some(named) = &spec.snapshot {
        let snapshot = SnapshotFolder::open(named)?;
        return match misfit(&snapshot, spec, host)? {
            None => {
                snapshot.verify_once(&host.cache)?;
                Ok(Plan::Clone(Arc::new(snapshot)))
            }
            Some(why) => {
                Err(Error::invalid("snapshot", format!("{}: {why}; it cannot be booted", named.display())))
            }
        };
    }
    if spec.restore == RestoreChoice::Never || spec.has_extras() {
        return Ok(Plan::Boot(None));
    }
    let why = match of_template(spec, host)? {
        Ok(snapshot) => return Ok(Plan::Clone(Arc::new(snapshot))),
        Err(why) => why,
    };
    let bootable = spec.template.as_ref().is_none_or(|template| !template.template().snapshot_only);
    if spec.restore == RestoreChoice::Always || !bootable {
        let why = why.unwrap_or_else(|| "the template has no snapshot".to_owned());
        let remedy = if bootable {
            "`host-shim template warm` makes one for this host"
        } else {
            "the template is a sandbox's snapshot, and cannot be booted"
        };
        return Err(Error::invalid("snapshot", format!("{why}; {remedy}")));
    }
    if let Some(why) = &why {
        tracing::info!(why, "the sandbox boots although there is a snapshot");
        watch.notice(&format!("{why}: the sandbox boots (slower)"));
    }
    Ok(Plan::Boot(why))
}

/// Refuses a paused sandbox that this host cannot go on with.
pub(super) fn check_resume(snapshot: &SnapshotFolder, host: &Host) -> Result<(), Error> {
    if let Some(differs) = snapshot.manifest().description.key.mismatch(&host.key) {
        return Err(Error::invalid("snapshot", format!("{differs}; it can be resumed only where it fits")));
    }
    Ok(snapshot.verify_once(&host.cache)?)
}

/// The template's snapshot that fits, or why none does; `None` where it has none at all.
fn of_template(spec: &CheckedSpec, host: &Host) -> Result<Result<SnapshotFolder, Option<String>>, Error> {
    let Some(template) = &spec.template else { return Ok(Err(None)) };
    let snapshots = template.path().join(SNAPSHOTS);
    let snapshot = match SnapshotFolder::open(&snapshots.join(host.key.folder_name())) {
        Ok(snapshot) => snapshot,
        Err(snapshot::Error::Missing { .. }) => return Ok(Err(of_another_host(&snapshots, host))),
        Err(error @ snapshot::Error::Io { .. }) => return Err(error.into()),
        Err(error) => return Ok(Err(Some(error.to_string()))),
    };
    if let Some(why) = misfit(&snapshot, spec, host)? {
        return Ok(Err(Some(why)));
    }
    match snapshot.verify_once(&host.cache) {
        Ok(()) => Ok(Ok(snapshot)),
        Err(error @ snapshot::Error::Io { .. }) => Err(error.into()),
        // Said, and not used: whoever damaged it did not damage the root file system with it.
        Err(error) => Ok(Err(Some(error.to_string()))),
    }
}

/// Why a snapshot does not fit, in a sentence.
fn misfit(snapshot: &SnapshotFolder, spec: &CheckedSpec, host: &Host) -> Result<Option<String>, Error> {
    match spec.channel {
        ChannelChoice::Auto | ChannelChoice::Serial => {}
        ChannelChoice::VhostVsock | ChannelChoice::VhostUserVsock => {
            return Ok(Some("a sandbox with a vsock device cannot be restored".to_owned()));
        }
    }
    let made = &snapshot.manifest().description;
    let machine = SnapshotMachine::of(spec, host.vmm.kind);
    let differs = made.key.mismatch(&host.key).or_else(|| made.machine.mismatch(&machine));
    let differs = match differs {
        Some(differs) => Some(differs),
        // A clone of a sandbox goes on with the kernel and the agent that it has; only a template's is made anew for others.
        None if spec.snapshot.is_some() => rootfs_differs(snapshot, spec),
        None => made.guest.mismatch(&host.guest(spec)?),
    };
    Ok(differs.map(|mismatch| mismatch.to_string()))
}

fn rootfs_differs(snapshot: &SnapshotFolder, spec: &CheckedSpec) -> Option<Mismatch> {
    let made = &snapshot.manifest().description.guest;
    made.mismatch(&snapshot::GuestKey { rootfs: spec.rootfs_digest.clone(), ..made.clone() })
}

/// What the snapshots of a template that are not this host's differ in.
fn of_another_host(snapshots: &Path, host: &Host) -> Option<String> {
    let others = std::fs::read_dir(snapshots).ok()?;
    // Any of them says it; the first that can be read does.
    others.flatten().find_map(|entry| {
        let other = SnapshotFolder::open(&entry.path()).ok()?;
        Some(other.manifest().description.key.mismatch(&host.key)?.to_string())
    })
}
