//! `image-builder build`.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, ValueEnum};
use image_builder::plan::BuildArgs;
use image_builder::{
    BuildOptions, CheckOptions, CheckedWarning, Console, Error, Interrupt, SecretSource, VmOptions, templates,
};
use oci::ImageName;
use oci::layer::Compression;
use template::DataDir;

use super::print;

/// Where distributions keep the bundle of certificates: Debian, Fedora, OpenSUSE, Alpine.
const CA_BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

#[derive(Debug, Args)]
pub(super) struct BuildCommand {
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
    /// Where RUN steps are run: container needs root, vm nothing of this host but QEMU and host-shim
    #[arg(long, value_enum, default_value = "container")]
    isolation: IsolationArg,
    /// MiB that a RUN step can write with --isolation vm; they take only what is written
    #[arg(long, value_name = "MIB", default_value_t = VmOptions::default().disk >> 20, value_parser = clap::value_parser!(u64).range(16..=16 << 20))]
    vm_disk: u64,
    /// A secret for RUN --mount=type=secret
    #[arg(long, value_name = "id=ID[,src=FILE][,env=NAME]")]
    secret: Vec<SecretSource>,
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

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum IsolationArg {
    /// A container of this host
    Container,
    /// A machine of its own: for Dockerfiles that nobody trusts
    Vm,
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
    if command.isolation == IsolationArg::Container {
        image_builder::isolate_mounts()?;
    }
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
        secrets: command.secret,
        vm: (command.isolation == IsolationArg::Vm)
            .then(|| VmOptions { disk: command.vm_disk << 20, ..vm_options() }),
    };
    let report = image_builder::build(data, &options, console, &interrupt)?;
    let text =
        report.names.iter().map(|name| format!("{name} {}", report.digest)).collect::<Vec<_>>().join("\n");
    print(command.json, &report, &text)
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
