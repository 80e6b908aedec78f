//! The command line.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};
use image_builder::plan::BuildArgs;
use image_builder::templates::{self, TemplateOptions, TemplateReport};
use image_builder::warm::SnapshotChoice;
use image_builder::{
    BootstrapOptions, BuildOptions, CheckOptions, CheckedWarning, Console, Error, Interrupt,
};
use oci::layer::Compression;
use oci::{ImageName, ImageReference, Store};
use serde::Serialize;
use template::{DataDir, Machine, TemplateFolder, TemplateName};

const EXIT_CODES: &str = "Exit codes: 0 done, 1 it failed, 2 wrong usage or bad input, 130 interrupted.";
/// Where distributions keep the bundle of certificates: Debian, Fedora, OpenSUSE, Alpine.
const CA_BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Builds OCI images from Dockerfiles, and sandbox templates from images.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    global: Global,
}

#[derive(Debug, Args)]
struct Global {
    /// Where images, templates and the cache live [default: tiffin in $XDG_DATA_HOME or ~/.local/share]
    #[arg(long, global = true, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Show no progress
    #[arg(long, short, global = true)]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build an image from a Dockerfile
    #[command(after_help = concat!(
        "Examples:\n",
        "  image-builder build -t hello .\n",
        "  image-builder build -t app:1 -f docker/Dockerfile --build-arg VERSION=1.2 --target run .\n",
        "  image-builder build -t hello --host-ca .      behind a proxy with its own certificate\n",
        "  image-builder build --check .                 warnings only: nothing is built\n\n",
        "RUN steps run as root on this machine, in containers with the host's network: build only Dockerfiles that you\n",
        "trust. Needs root; --check does not.\n\n",
        "The Dockerfile is CONTEXT/Dockerfile, else CONTEXT/e2b.Dockerfile. Rules of --check have the names of BuildKit's build\n",
        "checks; `# check=skip=RULE,...;error=true` at the top of a Dockerfile leaves some out, and makes the others errors.\n\n",
        "Exit codes: 0 done, 1 it failed, 2 wrong usage or bad input (also: warnings that the Dockerfile makes errors), 130\n",
        "interrupted. With --check: 0 no warnings, or none that is an error; 2 the Dockerfile is wrong, or warnings are errors."
    ))]
    Build(BuildCommand),
    /// Bring an image into the local store, from files or a registry
    #[command(after_help = concat!(
        "Examples:\n",
        "  image-builder load oci-archive:app.tar -t app:1\n",
        "  image-builder load oci:/srv/layout:v2 -t app:2\n",
        "  image-builder load alpine:3.20 -t alpine:3.20      pulls from docker.io\n\n",
        "Exit codes: 0 done, 1 it failed, 2 wrong usage or bad input."
    ))]
    Load {
        /// A name, oci:DIR[:TAG], oci-archive:FILE[:TAG], or what skopeo reads: docker://NAME, docker-archive:FILE, dir:DIR, ..
        source: ImageReference,
        /// The name that it gets
        #[arg(long, short, value_name = "NAME")]
        tag: ImageName,
        /// Print the result as JSON
        #[arg(long)]
        json: bool,
    },
    /// Write an image of the local store to files that skopeo and others read
    #[command(after_help = concat!(
        "Examples:\n",
        "  image-builder save app:1 -o oci-archive:app.tar\n",
        "  image-builder save app:1 -o oci:/srv/layout:v1\n\n",
        "Exit codes: 0 done, 1 it failed, 2 wrong usage or bad input."
    ))]
    Save {
        /// The image's name
        name: ImageName,
        /// oci:DIR[:TAG] or oci-archive:FILE[:TAG]
        #[arg(long, short, value_name = "DEST")]
        output: ImageReference,
    },
    /// List the images of the local store
    #[command(after_help = EXIT_CODES)]
    Images {
        /// Print a JSON list
        #[arg(long)]
        json: bool,
    },
    /// Make a Debian base image from a Debian mirror, without a registry
    #[command(after_help = concat!(
        "Examples:\n",
        "  image-builder bootstrap debian:bookworm\n",
        "  image-builder bootstrap debian:trixie --mirror http://mirror.example/debian\n\n",
        "Needs mmdebstrap. An image of that name that is there already is kept, unless --force is given.\n\n",
        "Exit codes: 0 done or already there, 1 it failed, 2 wrong usage or bad input, 130 interrupted."
    ))]
    Bootstrap {
        /// debian:SUITE
        name: ImageName,
        /// mmdebstrap's variant: which packages are in it
        #[arg(long, default_value = "minbase")]
        variant: String,
        /// The mirror [default: the one of this machine's apt, else mmdebstrap's own choice]
        #[arg(long, value_name = "URL")]
        mirror: Option<String>,
        /// Make it anew even if the name is taken
        #[arg(long)]
        force: bool,
        /// Print the result as JSON
        #[arg(long)]
        json: bool,
    },
    /// Make and look after templates, which sandboxes start from
    #[command(subcommand)]
    Template(TemplateCommand),
    /// The other half of a RUN step
    #[command(hide = true)]
    RunContainer { bundle: PathBuf, id: String, parent: u32 },
}

#[derive(Debug, Args)]
struct BuildCommand {
    /// The folder that COPY copies from, with the Dockerfile in it
    context: PathBuf,
    /// A name for the image; may be given more than once
    #[arg(long, short, value_name = "NAME", required_unless_present = "check")]
    tag: Vec<ImageName>,
    /// Tell what is wrong or doubtful in the Dockerfile, and build nothing
    #[arg(long)]
    check: bool,
    /// The Dockerfile [default: CONTEXT/Dockerfile, else CONTEXT/e2b.Dockerfile]
    #[arg(long, short, value_name = "FILE")]
    file: Option<PathBuf>,
    /// The value of an ARG; without =VALUE, that of the environment
    #[arg(long, value_name = "NAME[=VALUE]")]
    build_arg: Vec<String>,
    /// Stop at this stage
    #[arg(long, value_name = "STAGE")]
    target: Option<String>,
    /// Run every step, even if the cache has its result
    #[arg(long)]
    no_cache: bool,
    /// Let RUN steps use this machine's CA certificates; nothing of them is left in the image
    #[arg(long)]
    host_ca: bool,
    /// How new layers are compressed
    #[arg(long, value_enum, default_value = "zstd")]
    compression: CompressionArg,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum CompressionArg {
    /// Fast, read by current tools
    Zstd,
    /// Slower, read by every tool
    Gzip,
    /// None at all
    None,
}

#[derive(Debug, Subcommand)]
enum TemplateCommand {
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
}

#[derive(Debug, Args)]
struct CreateTemplate {
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

/// Does what the command line says, and gives the exit code.
pub(crate) fn run(cli: Cli) -> ExitCode {
    if let Command::RunContainer { bundle, id, parent } = &cli.command {
        return match image_builder::run_container(bundle, id, *parent) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{}: {error}", bundle.display());
                ExitCode::FAILURE
            }
        };
    }
    match carry_out(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Our own errors say their causes themselves.
            match error.downcast_ref::<Error>() {
                Some(error) => eprintln!("image-builder: {error}"),
                None => eprintln!("image-builder: {error:#}"),
            }
            match error.downcast_ref::<Error>() {
                Some(Error::Interrupted) => ExitCode::from(image_builder::EXIT_INTERRUPTED as u8),
                Some(error) if error.is_bad_input() => ExitCode::from(2),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn carry_out(cli: Cli) -> anyhow::Result<()> {
    let data = DataDir::resolve(cli.global.data_dir.as_deref())
        .context("no data folder: neither --data-dir nor $HOME is set")?;
    let console = Console::new(cli.global.quiet);
    let store = || Store::open_or_create(&data.images()).map_err(Error::from);
    match cli.command {
        Command::Build(command) => build(command, &data, &console),
        Command::Load { source, tag, json } => {
            let _interrupt = Interrupt::install()?;
            let digest = image_builder::load(&store()?, &source, &tag, &console)?;
            let name = tag.canonical();
            print(json, &serde_json::json!({"name": name, "digest": digest}), &format!("{name} {digest}"))
        }
        Command::Save { name, output } => {
            let _interrupt = Interrupt::install()?;
            let digest = image_builder::save(&store()?, &name, &output, &console)?;
            line(&format!("{output} {digest}"))
        }
        Command::Images { json } => images(&store()?, json),
        Command::Bootstrap { name, variant, mirror, force, json } => {
            let interrupt = Interrupt::install()?;
            let options = BootstrapOptions { name, variant, mirror, force };
            let report = image_builder::bootstrap(&data, &options, &console, &interrupt)?;
            if report.existed {
                console.line(&format!("{} is there already; --force makes it anew", report.name));
            }
            print(json, &report, &format!("{} {}", report.name, report.digest))
        }
        Command::Template(command) => template(command, &data, &console),
        Command::RunContainer { .. } => Ok(()),
    }
}

fn build(command: BuildCommand, data: &DataDir, console: &Console) -> anyhow::Result<()> {
    let mut args = BuildArgs::default();
    for arg in &command.build_arg {
        let (name, value) = match arg.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (arg.as_str(), std::env::var(arg).ok()),
        };
        if let Some(value) = value {
            args.0.insert(name.to_owned(), value);
        }
    }
    if command.check {
        let (context, dockerfile, target) = (command.context, command.file, command.target);
        return check(&CheckOptions { context, dockerfile, args, target }, command.json);
    }
    let host_ca = match command.host_ca {
        false => None,
        true => Some(host_ca()?),
    };
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    // Before any thread: the mask and the namespace are inherited.
    image_builder::isolate_mounts()?;
    let interrupt = Interrupt::install()?;
    let options = BuildOptions {
        context: command.context,
        dockerfile: command.file,
        names: command.tag,
        args,
        target: command.target,
        no_cache: command.no_cache,
        host_ca,
        compression: match command.compression {
            CompressionArg::Zstd => Compression::Zstd,
            CompressionArg::Gzip => Compression::Gzip,
            CompressionArg::None => Compression::None,
        },
        program,
    };
    let report = image_builder::build(data, &options, console, &interrupt)?;
    let text =
        report.names.iter().map(|name| format!("{name} {}", report.digest)).collect::<Vec<_>>().join("\n");
    print(command.json, &report, &text)
}

/// Prints the warnings: what was asked for, so on stdout.
fn check(options: &CheckOptions, json: bool) -> anyhow::Result<()> {
    let report = image_builder::check(options)?;
    let mut text = String::new();
    for warning in &report.warnings {
        let CheckedWarning { rule, line, column, message, text: written } = warning;
        text.push_str(&format!("{}:{line}:{column}: {rule}: {message}\n    {written}\n", report.file));
    }
    let count = report.warnings.len();
    let plural = if count == 1 { "" } else { "s" };
    text.push_str(&format!("{}: {count} warning{plural}", report.file));
    print(json, &report, &text)?;
    match report.error {
        true => Err(Error::Warnings { file: report.file, count }.into()),
        false => Ok(()),
    }
}

/// The bundle that `SSL_CERT_FILE` names, else the distribution's.
fn host_ca() -> Result<PathBuf, Error> {
    let named = std::env::var_os("SSL_CERT_FILE").map(PathBuf::from);
    let known = CA_BUNDLES.iter().map(PathBuf::from);
    named.into_iter().chain(known).find(|path| path.is_file()).ok_or_else(|| Error::Invalid {
        what: "--host-ca".to_owned(),
        reason: format!(
            "this machine has no bundle of certificates: looked at SSL_CERT_FILE and {}",
            CA_BUNDLES.join(", ")
        ),
    })
}

fn images(store: &Store, json: bool) -> anyhow::Result<()> {
    let images = image_builder::images(store)?;
    if json {
        return print(true, &images, "");
    }
    let width = images.iter().map(|image| image.name.len()).max().unwrap_or(0).max(4);
    line(&format!("{:width$}  {:19}  {:>6}  {:>10}  CREATED", "NAME", "DIGEST", "LAYERS", "SIZE"))?;
    for image in images {
        let size =
            image.size.map_or("damaged".to_owned(), |size| format!("{:.1} MiB", size as f64 / 1_048_576.0));
        let layers = image.layers.map_or("-".to_owned(), |layers| layers.to_string());
        let digest: String = image.digest.as_ref().chars().take(19).collect();
        let created = image.created.unwrap_or_default();
        line(&format!("{:width$}  {digest}  {layers:>6}  {size:>10}  {created}", image.name))?;
    }
    Ok(())
}

fn template(command: TemplateCommand, data: &DataDir, console: &Console) -> anyhow::Result<()> {
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
                rootfs_size,
                kernel,
                guest_image,
                snapshot,
                host_shim,
                json,
            } = *create;
            let interrupt = Interrupt::install()?;
            let machine = Machine { cpus, memory_mib: memory, disk_mib: disk };
            let options = TemplateOptions {
                name,
                image,
                machine,
                start_command: start,
                ready_command: ready,
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

/// Prints the result: one line of JSON, or the text.
fn print(json: bool, value: &impl Serialize, text: &str) -> anyhow::Result<()> {
    match json {
        true => line(&serde_json::to_string(value)?),
        false => line(text),
    }
}

fn line(text: &str) -> anyhow::Result<()> {
    match writeln!(std::io::stdout().lock(), "{text}") {
        // `image-builder images | head` is no failure.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write to stdout"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
