//! `image-builder template`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use image_builder::templates::{self, TemplateOptions, TemplateReport};
use image_builder::warm::SnapshotChoice;
use image_builder::{Console, Error, Interrupt, PullOptions};
use oci::ImageReference;
use template::{DataDir, Machine, TemplateFolder, TemplateName};

use super::print;
use super::registry::RegistryArgs;
use super::template_transfer::{self, TransferCommand};

#[derive(Debug, Subcommand)]
pub(super) enum TemplateCommand {
    /// Make a template from an image
    #[command(after_help = concat!(
        "Examples:\n",
        "  image-builder template create hello --image hello\n",
        "  image-builder template create big --image oci-archive:app.tar --cpus 2 --memory 2048 --disk 8192\n",
        "  image-builder template create web --image web --start 'exec ./server' --ready 'curl -fs localhost:8080'\n\n",
        "A template of that name is replaced; running sandboxes keep the old one. Then host-shim starts a sandbox of it, runs the\n",
        "start command, waits for the ready command, and keeps the machine as the snapshot that sandboxes on this host are clones of.\n",
        "On a host where host-shim, QEMU, the kernel or the guest image is missing there is none, which is told: sandboxes boot.\n",
        "`host-shim template warm` makes it, or makes it again.\n\n",
        "Exit codes: 0 done, 1 it failed (the template stays when only its snapshot failed), 2 wrong usage or bad input (also:\n",
        "the image is larger than --rootfs-size), 130 interrupted."
    ))]
    Create(Box<CreateTemplate>),
    /// List the templates
    List {
        /// Print a JSON list
        #[arg(long)]
        json: bool,
    },
    /// Print a template's contents as JSON
    Inspect {
        /// The template's name
        name: String,
    },
    /// Delete a template; running sandboxes keep it
    Delete {
        /// The template's name
        name: String,
    },
    #[command(flatten)]
    Transfer(Box<TransferCommand>),
}

#[derive(Debug, Args)]
pub(super) struct CreateTemplate {
    /// The template's name
    name: TemplateName,
    /// A name, oci:DIR[:TAG] or oci-archive:FILE[:TAG]
    #[arg(long, value_name = "REF")]
    image: ImageReference,
    /// Virtual CPUs of its sandboxes
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    cpus: u32,
    /// RAM of its sandboxes in MiB
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u64).range(64..=16_777_216), value_name = "MiB")]
    memory: u64,
    /// Scratch disk of its sandboxes in MiB
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=16_777_216), value_name = "MiB")]
    disk: u64,
    /// A shell command that runs in each sandbox before anybody gets it, and goes on [default: the image's label
    /// tiffin.start]
    #[arg(long, value_name = "CMD")]
    start: Option<String>,
    /// A shell command that is repeated until it succeeds, before anybody gets a sandbox [default: the image's label
    /// tiffin.ready]
    #[arg(long, value_name = "CMD")]
    ready: Option<String>,
    /// Add the user `user` of E2B's sandboxes (home, passwordless sudo); runs nothing of the image. Needs root
    #[arg(long)]
    e2b_user: bool,
    /// Size of the root file system in MiB [default: as small as the image]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=16_777_216), value_name = "MiB")]
    rootfs_size: Option<u64>,
    /// The guest kernel that it is made for [default: ../share/tiffin/vmlinux beside image-builder, if it is there]
    #[arg(long, value_name = "FILE", env = "TIFFIN_KERNEL")]
    kernel: Option<PathBuf>,
    /// The guest image that it is made for [default: ../share/tiffin/guest-image.cpio, if it is there]
    #[arg(long, value_name = "FILE", env = "TIFFIN_GUEST_IMAGE")]
    guest_image: Option<PathBuf>,
    /// Whether the template gets its snapshot now
    #[arg(long, value_enum, default_value = "auto", value_name = "WHEN")]
    snapshot: SnapshotArg,
    /// The program host-shim, which makes the snapshot [default: beside image-builder, else in PATH]
    #[arg(long, value_name = "FILE", env = "TIFFIN_HOST_SHIM")]
    host_shim: Option<PathBuf>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    registry: RegistryArgs,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum SnapshotArg {
    /// Where this host can run sandboxes
    Auto,
    /// Yes, or fail
    Always,
    /// No: sandboxes boot
    Never,
}

/// Carries the command out.
pub(super) fn template(command: TemplateCommand, data: &DataDir, console: &Console) -> anyhow::Result<()> {
    match command {
        TemplateCommand::Create(create) => {
            let CreateTemplate {
                name,
                image,
                cpus,
                memory,
                disk,
                start,
                ready,
                e2b_user,
                rootfs_size,
                kernel,
                guest_image,
                snapshot,
                host_shim,
                json,
                registry,
            } = *create;
            let interrupt = Interrupt::install()?;
            let machine = Machine { cpus, memory_mib: memory, disk_mib: disk };
            let options = TemplateOptions {
                name,
                image,
                pull: PullOptions { registries: registry.options(), ..PullOptions::default() },
                machine,
                start_command: start,
                ready_command: ready,
                e2b_user,
                rootfs_mib: rootfs_size,
                kernel: kernel.or_else(|| templates::installed("vmlinux")),
                guest_image: guest_image.or_else(|| templates::installed("guest-image.cpio")),
                snapshot: match snapshot {
                    SnapshotArg::Auto => SnapshotChoice::Auto,
                    SnapshotArg::Always => SnapshotChoice::Always,
                    SnapshotArg::Never => SnapshotChoice::Never,
                },
                host_shim,
            };
            let report = templates::create(data, &options, console, &interrupt)?;
            if let Some(why) =
                report.no_snapshot.as_deref().filter(|_| options.snapshot != SnapshotChoice::Never)
            {
                console.line(&format!("note: the template has no snapshot, its sandboxes will boot: {why}"));
            }
            print(json, &report, &told(&report))
        }
        TemplateCommand::List { json } => {
            let names = TemplateFolder::list(&data.templates()).map_err(Error::from)?;
            let text = names.iter().map(TemplateName::to_string).collect::<Vec<_>>().join("\n");
            if names.is_empty() && !json { Ok(()) } else { print(json, &names, &text) }
        }
        TemplateCommand::Inspect { name } => print(true, templates::open(data, &name)?.template(), ""),
        TemplateCommand::Delete { name } => {
            templates::open(data, &name)?.delete().map_err(Error::from)?;
            Ok(())
        }
        TemplateCommand::Transfer(command) => template_transfer::transfer(*command, data, console),
    }
}

/// What was made, for people.
fn told(report: &TemplateReport) -> String {
    let TemplateReport { path, template, snapshot, .. } = report;
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let snapshot = match snapshot {
        Some(snapshot) => format!("{} ({} MiB of RAM)", snapshot.path.display(), mib(snapshot.ram_bytes)),
        None => "none".to_owned(),
    };
    format!(
        "{}\nimage    {}\nrootfs   {} ({} MiB)\nsnapshot {snapshot}",
        path.display(),
        template.image.digest,
        template.rootfs.digest,
        mib(template.rootfs.size)
    )
}
