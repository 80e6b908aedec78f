//! Templates from images.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use oci::{Digest, Image, ImageReference, Store};
use rootfs_tools::{Progress, Size};
use serde::Serialize;
use template::{
    DataDir, Machine, NewTemplate, READY_LABEL, Rootfs, RuntimeConfig, SCHEMA_VERSION, START_LABEL,
    SourceImage, Template, TemplateFolder, TemplateName,
};

use crate::base::{self, PullOptions};
use crate::config::ImageConfig;
use crate::console::Console;
use crate::e2b_user;
use crate::error::Error;
use crate::interrupt::Interrupt;
use crate::warm::{self, Snapshot, SnapshotChoice, WarmOptions, Warmed};

const MIB: u64 = 1 << 20;

/// What a template is made from.
#[derive(Clone, Debug)]
pub struct TemplateOptions {
    /// Its name.
    pub name: TemplateName,
    /// The image.
    pub image: ImageReference,
    /// When and how a registry is asked for it.
    pub pull: PullOptions,
    /// The machine that its sandboxes get by default.
    pub machine: Machine,
    /// What its sandboxes start by themselves; what the image's label says by default, nothing when empty.
    pub start_command: Option<String>,
    /// What tells that they are ready; what the image's label says by default, nothing when empty.
    pub ready_command: Option<String>,
    /// Whether the user of E2B's sandboxes is added.
    pub e2b_user: bool,
    /// Size of the root file system in MiB; as small as the image by default.
    pub rootfs_mib: Option<u64>,
    /// The guest kernel that the template is made for, where one is known.
    pub kernel: Option<PathBuf>,
    /// The guest image that the template is made for, where one is known.
    pub guest_image: Option<PathBuf>,
    /// Whether it gets a snapshot at once.
    pub snapshot: SnapshotChoice,
    /// The program that makes it, where it is not beside this one or in PATH.
    pub host_shim: Option<PathBuf>,
}

/// What was made.
#[derive(Clone, Debug, Serialize)]
pub struct TemplateReport {
    /// The template's folder.
    pub path: PathBuf,
    /// Its contents.
    pub template: Template,
    /// Its snapshot.
    pub snapshot: Option<Snapshot>,
    /// Why it has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_snapshot: Option<String>,
}

/// Writes `templates/NAME`: the image as one read-only file system, how to run it, and a snapshot of the machine when it is ready.
pub fn create(
    data: &DataDir,
    options: &TemplateOptions,
    console: &Console,
    interrupt: &Interrupt,
) -> Result<TemplateReport, Error> {
    // Before anything is made.
    warm::find_host_shim(options.host_shim.as_deref())?;
    let store = Store::open_or_create(&data.images())?;
    let image = base::resolve(&store, &options.image, &options.pull, console)?;
    let image = match options.e2b_user {
        true => e2b_user::image_with_user(data, &store, image)?,
        false => image,
    };
    create_from(data, &image, options, console, interrupt)
}

/// As [`create`], from an image that is open already; the options say what it is called.
pub(crate) fn create_from(
    data: &DataDir,
    image: &Image,
    options: &TemplateOptions,
    console: &Console,
    interrupt: &Interrupt,
) -> Result<TemplateReport, Error> {
    let warm_options = WarmOptions {
        choice: options.snapshot,
        host_shim: options.host_shim.clone(),
        kernel: options.kernel.clone(),
        guest_image: options.guest_image.clone(),
    };
    let kernel = options.kernel.as_deref().map(digest_of).transpose()?;
    let guest_image = options.guest_image.as_deref().map(digest_of).transpose()?;
    let new = NewTemplate::begin(&data.templates(), &options.name)?;
    let size = match options.rootfs_mib {
        None => Size::Minimal,
        Some(mib) => Size::Exact(mib.checked_mul(MIB).ok_or_else(|| Error::Invalid {
            what: format!("--rootfs-size {mib}"),
            reason: "that is more MiB than a file can have".to_owned(),
        })?),
    };
    let report = write_rootfs(image, size, &new.rootfs(), console)?;
    let template = Template {
        schema_version: SCHEMA_VERSION,
        image: SourceImage { reference: options.image.to_string(), digest: image.digest.clone() },
        kernel,
        guest_image,
        rootfs: Rootfs { digest: report.digest, size: report.size },
        runtime: runtime(image, options),
        machine: options.machine,
        snapshot_only: false,
    };
    let path = new.publish(&template)?.path().to_owned();
    let (snapshot, no_snapshot) = match warm::warm(data, &path, &warm_options, console, interrupt)? {
        Warmed::Made(snapshot) => (Some(snapshot), None),
        Warmed::None(why) => (None, Some(why)),
    };
    Ok(TemplateReport { path, template, snapshot, no_snapshot })
}

/// Writes the image as one ext4 file system.
pub(crate) fn write_rootfs(
    image: &Image,
    size: Size,
    file: &Path,
    console: &Console,
) -> Result<rootfs_tools::BuildReport, Error> {
    let build_options = rootfs_tools::BuildOptions { size, ..Default::default() };
    let mut work = None;
    let mut written = 0;
    Ok(rootfs_tools::build(image, &build_options, file, &mut |progress| match progress {
        Progress::Indexing { layer, layers } => {
            work = Some(console.work(&format!("reading layer {layer} of {layers}"), None));
        }
        Progress::Writing { done, total } => {
            if written == 0 {
                work = Some(console.work("writing the file system", Some(total)));
            }
            if let Some(work) = &work {
                work.advance(done.saturating_sub(written));
            }
            written = done.max(1);
        }
        Progress::Syncing => work = Some(console.work("syncing to the disk", None)),
    })?)
}

/// The template of that name, read and checked.
pub fn open(data: &DataDir, name: &str) -> Result<TemplateFolder, Error> {
    let name = TemplateName::from_str(name)?;
    Ok(TemplateFolder::open(&data.templates().join(name.as_str()))?)
}

/// A file of an installation, `share/tiffin/NAME` above the folder of this program, if it is there.
pub fn installed(name: &str) -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?;
    let file = program.parent()?.parent()?.join("share/tiffin").join(name);
    file.is_file().then_some(file)
}

fn digest_of(file: &Path) -> Result<Digest, Error> {
    let failed = |error| Error::Io { path: file.to_owned(), error };
    let mut hasher = oci::Hasher::new();
    io::copy(&mut File::open(file).map_err(failed)?, &mut hasher).map_err(failed)?;
    Ok(hasher.finish().0)
}

fn runtime(image: &Image, options: &TemplateOptions) -> RuntimeConfig {
    let config = ImageConfig::from_json(&image.config_json);
    let command = |asked: &Option<String>, label| {
        asked.as_ref().or_else(|| config.labels.get(label)).filter(|command| !command.is_empty()).cloned()
    };
    RuntimeConfig {
        start_command: command(&options.start_command, START_LABEL),
        ready_command: command(&options.ready_command, READY_LABEL),
        env: config.env.into_iter().collect(),
        user: config.user,
        workdir: config.workdir,
        entrypoint: config.entrypoint.unwrap_or_default(),
        cmd: config.cmd.unwrap_or_default(),
        exposed_ports: config.exposed_ports.into_iter().collect(),
        volumes: config.volumes.into_iter().collect(),
        labels: config.labels,
    }
}
