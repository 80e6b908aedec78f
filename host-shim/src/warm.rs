//! `template warm`: boots a template, lets it get ready, and keeps the machine as the snapshot that its sandboxes are clones of.

use std::path::{Path, PathBuf};

use sandbox_folder::calls::Taken;
use sandbox_folder::spec::{RestoreChoice, SandboxSpec};
use sandbox_folder::{End, Phase};
use serde::Serialize;
use template::{SNAPSHOTS, TemplateFolder};

use crate::Error;
use crate::dir::SandboxDir;
use crate::run::Interrupt;
use crate::sandbox::{Aim, Sandbox, Watch};
use crate::snapshot::{self, Verb};
use crate::spec::CheckedSpec;

/// A template that was made warm.
#[derive(Debug, Serialize)]
pub struct Warmed {
    /// The template's folder.
    pub template: PathBuf,
    /// The folder of the snapshot.
    pub snapshot: PathBuf,
    /// What taking it cost.
    #[serde(flatten)]
    pub taken: Taken,
    /// What took how long before it.
    pub phases: Vec<Phase>,
}

/// What a machine is made with that is not the template's.
#[derive(Clone, Debug, Default)]
pub struct Choices {
    /// The guest kernel.
    pub kernel: Option<PathBuf>,
    /// The guest image.
    pub guest_image: Option<PathBuf>,
    /// The virtual machine monitor.
    pub vmm: sandbox_folder::spec::VmmChoice,
    /// What runs the guest's instructions.
    pub accelerator: sandbox_folder::spec::AcceleratorChoice,
    /// Seconds until the agent is ready.
    pub boot_timeout_s: Option<u64>,
}

/// Makes, or makes again, the snapshot of a template for this host. Sandboxes that run from the one before keep it.
pub async fn warm(
    template: &TemplateFolder,
    choices: &Choices,
    sandboxes: &Path,
    cache: &Path,
    interrupt: &Interrupt,
    watch: &dyn Watch,
) -> Result<Warmed, Error> {
    if template.template().snapshot_only {
        let reason = "it is a sandbox's snapshot, and cannot be booted to make another";
        return Err(Error::invalid("template", format!("{}: {reason}", template.path().display())));
    }
    let spec = CheckedSpec::new(SandboxSpec {
        kernel: choices.kernel.clone(),
        guest_image: choices.guest_image.clone(),
        vmm: choices.vmm,
        accelerator: choices.accelerator,
        boot_timeout_s: choices.boot_timeout_s,
        restore: RestoreChoice::Never,
        ..SandboxSpec::new(template.path())
    })?;
    let snapshots = template.path().join(SNAPSHOTS);
    match std::fs::create_dir(&snapshots) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(Error::io("make the folder", &snapshots)(error));
        }
        _ => {}
    }
    // What a killed one has left.
    snapshot::sweep(&snapshots)?;
    let dir = SandboxDir::create(sandboxes, &spec.id)?;
    let mut sandbox = Sandbox::start(dir, spec, Aim::Run, cache, &interrupt.first, watch).await?;
    watch.step("writing the snapshot");
    let kept = tokio::select! {
        kept = sandbox.keep(Verb::Template, &snapshots, &snapshots) => kept,
        () = interrupt.first.cancelled() => Err(Error::Interrupted),
    };
    let phases = sandbox.timings().phases().to_vec();
    watch.step("");
    match kept {
        Ok(kept) => {
            sandbox.finish(End::Stopped).await?;
            let template = template.path().to_owned();
            Ok(Warmed { template, snapshot: kept.path, taken: kept.taken, phases })
        }
        Err(error) => {
            sandbox.finish(End::Failed { message: error.to_string() }).await?;
            Err(error)
        }
    }
}
