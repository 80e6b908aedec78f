//! `image-builder build`.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, ValueEnum};
use image_builder::contexts::Contexts;
use image_builder::plan::BuildArgs;
use image_builder::{
    BuildOptions, BuildOutput, CheckOptions, CheckedWarning, Console, Error, Interrupt, StepsOptions,
    VmOptions, templates,
};
use oci::ImageName;
use oci::layer::Compression;
use template::DataDir;

use super::print;
use super::registry::RegistryArgs;
use super::run::RunArgs;

/// Where distributions keep the bundle of certificates: Debian, Fedora, OpenSUSE, Alpine.
const CA_BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

#[derive(Debug, Args)]
pub(super) struct BuildCommand {
    /// The folder that COPY copies from, with the Dockerfile in it [default with --steps: the folder of its FILE]
    #[arg(required_unless_present = "steps")]
    context: Option<PathBuf>,
    /// A name for the image; may be given more than once
    #[arg(long, short, value_name = "NAME", required_unless_present_any = ["check", "output"])]
    tag: Vec<ImageName>,
    /// What to make of the image: type=oci,dest=DIR|FILE.tar[,tar=BOOL][,tag=TAG], type=rootfs,dest=FILE[,size=MiB], or
    /// type=template,name=NAME[,cpus=N][,memory=MiB][,disk=MiB][,rootfs-size=MiB][,start=CMD][,ready=CMD]
    /// [,snapshot=auto|always|never]; may be given more than once
    #[arg(long, short, value_name = "SPEC")]
    output: Vec<BuildOutput>,
    /// Write digests and names to this file, with docker buildx's keys
    #[arg(long, value_name = "FILE")]
    metadata_file: Option<PathBuf>,
    /// Write the image's id (the digest of its config) to this file
    #[arg(long, value_name = "FILE")]
    iidfile: Option<PathBuf>,
    /// A label of the image, over those of the Dockerfile
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    label: Vec<(String, String)>,
    /// An annotation of the image's manifest
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    annotation: Vec<(String, String)>,
    /// Tell what is wrong or doubtful in the Dockerfile, and build nothing
    #[arg(long)]
    check: bool,
    /// The Dockerfile [default: CONTEXT/Dockerfile, else CONTEXT/e2b.Dockerfile]
    #[arg(long, short, value_name = "FILE")]
    file: Option<PathBuf>,
    /// The value of an ARG; without =VALUE, that of the environment
    #[arg(long, value_name = "NAME[=VALUE]")]
    build_arg: Vec<String>,
    /// Another tree for FROM, COPY --from and mounts: NAME=FOLDER, NAME=docker-image://IMAGE, NAME=oci-layout://FOLDER[:TAG] or
    /// NAME=target:STAGE; it comes before a stage or image of that name
    #[arg(long, value_name = "NAME=SOURCE")]
    build_context: Vec<String>,
    /// Build the steps of an E2B template, as its clients send them (JSON with fromImage or fromTemplate, and steps), in place
    /// of a Dockerfile
    #[arg(long, value_name = "FILE", conflicts_with_all = ["file", "check", "target"])]
    steps: Option<PathBuf>,
    /// The folder with the files of the steps: HASH.tar or HASH.tar.gz for each filesHash
    #[arg(long, value_name = "DIR", requires = "steps")]
    files: Option<PathBuf>,
    /// The image of a template that fromTemplate names
    #[arg(long, value_name = "TEMPLATE=IMAGE", requires = "steps")]
    template_image: Vec<String>,
    /// Add the user `user` of E2B's sandboxes (home, passwordless sudo), as the last layer; runs nothing of the image
    #[arg(long)]
    e2b_user: bool,
    /// Stop at this stage
    #[arg(long, value_name = "STAGE")]
    target: Option<String>,
    /// Run every step, even if the cache has its result
    #[arg(long)]
    no_cache: bool,
    /// Run every step of this stage, even if the cache has its result
    #[arg(long, value_name = "STAGE", value_delimiter = ',')]
    no_cache_filter: Vec<String>,
    /// Ask the registries for the base images, even if the local store has them
    #[arg(long)]
    pull: bool,
    /// How many steps may run at the same time [default: the number of CPUs, at least 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    jobs: Option<u16>,
    /// Use results of steps that --cache-to wrote on this or another machine
    #[arg(long, value_name = "DIR")]
    cache_from: Vec<PathBuf>,
    /// Write the results of this build's steps to a folder, an OCI layout that other machines can use
    #[arg(long, value_name = "DIR")]
    cache_to: Option<PathBuf>,
    /// Let no file of the new layers be newer than SOURCE_DATE_EPOCH (a variable, or a --build-arg)
    #[arg(long)]
    rewrite_timestamp: bool,
    /// MiB that a RUN step can write with --isolation vm; they take only what is written
    #[arg(long, value_name = "MIB", default_value_t = VmOptions::default().disk >> 20, value_parser = clap::value_parser!(u64).range(16..=16 << 20))]
    vm_disk: u64,
    /// Let RUN steps use this machine's CA certificates; nothing of them is left in the image
    #[arg(long)]
    host_ca: bool,
    /// How new layers are compressed
    #[arg(long, value_enum, default_value = "zstd")]
    compression: CompressionArg,
    #[command(flatten)]
    run: RunArgs,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    registry: RegistryArgs,
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

/// Carries the command out.
pub(super) fn build(command: BuildCommand, data: &DataDir, console: &Console) -> anyhow::Result<()> {
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
    let mut contexts = Contexts::default();
    for context in &command.build_context {
        contexts.parse(context)?;
    }
    let of_steps = command.steps.as_ref().and_then(|file| file.parent()).map(|folder| match folder {
        folder if folder.as_os_str().is_empty() => PathBuf::from("."),
        folder => folder.to_owned(),
    });
    let context = command.context.or(of_steps).unwrap_or_else(|| PathBuf::from("."));
    if command.check {
        let (dockerfile, target) = (command.file, command.target);
        return check(&CheckOptions { context, dockerfile, args, contexts, target }, command.json);
    }
    let steps = match command.steps {
        None => None,
        Some(file) => {
            let mut steps = StepsOptions { file, files: command.files, templates: Default::default() };
            for written in &command.template_image {
                let (name, image) = written.split_once('=').ok_or_else(|| Error::Invalid {
                    what: format!("--template-image {written:?}"),
                    reason: "expected TEMPLATE=IMAGE, as base=debian:bookworm".to_owned(),
                })?;
                steps.templates.insert(name.to_owned(), image.parse().map_err(Error::from)?);
            }
            Some(steps)
        }
    };
    let host_ca = match command.host_ca {
        false => None,
        true => Some(host_ca()?),
    };
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let run = command.run.options()?;
    // Before any thread: the mask and the namespace are inherited.
    let isolation = image_builder::enter(command.run.isolation.into(), data, &program, console)?;
    let interrupt = Interrupt::install()?;
    let options = BuildOptions {
        context,
        dockerfile: command.file,
        names: command.tag,
        args,
        contexts,
        steps,
        e2b_user: command.e2b_user,
        target: command.target,
        no_cache: command.no_cache,
        no_cache_filter: command.no_cache_filter,
        pull: command.pull,
        registries: command.registry.options(),
        jobs: command.jobs.map(usize::from),
        cache_from: absolute(command.cache_from)?,
        cache_to: absolute(command.cache_to)?.pop(),
        rewrite_timestamp: command.rewrite_timestamp,
        labels: command.label.into_iter().collect(),
        annotations: command.annotation.into_iter().collect(),
        outputs: command.output,
        metadata_file: command.metadata_file,
        iidfile: command.iidfile,
        host_ca,
        compression: match command.compression {
            CompressionArg::Zstd => Compression::Zstd,
            CompressionArg::Gzip => Compression::Gzip,
            CompressionArg::None => Compression::None,
        },
        program,
        isolation,
        run,
        vm: VmOptions { disk: command.vm_disk << 20, ..vm_options() },
    };
    let report = image_builder::build(data, &options, console, &interrupt)?;
    let named = report.names.iter().map(|name| format!("{name} {}", report.digest));
    let written = report.outputs.iter().map(|output| format!("{} {}", output.path.display(), report.digest));
    let text = named.chain(written).collect::<Vec<_>>().join("\n");
    print(command.json, &report, &text)
}

/// Folders that stand in messages, and that other threads than this one open.
fn absolute(folders: impl IntoIterator<Item = PathBuf>) -> Result<Vec<PathBuf>, Error> {
    let absolute =
        |folder: PathBuf| std::path::absolute(&folder).map_err(|error| Error::Io { path: folder, error });
    folders.into_iter().map(absolute).collect()
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("expected NAME=VALUE".to_owned()),
    }
}

/// Kernel, guest image and host-shim as `template create` finds them.
fn vm_options() -> VmOptions {
    let named = |variable: &str| std::env::var_os(variable).map(PathBuf::from);
    VmOptions {
        host_shim: named("TIFFIN_HOST_SHIM"),
        kernel: named("TIFFIN_KERNEL").or_else(|| templates::installed("vmlinux")),
        guest_image: named("TIFFIN_GUEST_IMAGE").or_else(|| templates::installed("guest-image.cpio")),
        ..VmOptions::default()
    }
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
