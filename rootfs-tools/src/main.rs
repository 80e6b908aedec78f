//! The `rootfs-tools` command.

mod cli;
mod command;
mod show;

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use clap::Parser;
use oci::{Archive, Image, ImageReference, SkopeoReference, Store};
use rootfs_tools::{BakeOptions, BuildOptions, BuildReport};
use serde_json::json;
use template::DataDir;

use cli::{BakeArgs, BuildArgs, Cli, Command, EmptyArgs, GrowArgs, GuestImageArgs, Input};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Build(args) => build(args),
        Command::Bake(args) => bake(args),
        Command::Empty(args) => empty(args),
        Command::Grow(args) => grow(args),
        Command::GuestImage(args) => guest_image(args),
        Command::Chunk(args) => command::chunk::chunk(args),
        Command::Unchunk(args) => command::chunk::unchunk(args),
        Command::PruneChunks(args) => command::chunk::prune(args),
        Command::Read(command) => return command::run(command),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rootfs-tools: {error:#}");
            ExitCode::from(exit_code(&error))
        }
    }
}

/// 2 where the input is at fault, 1 where the machine is.
fn exit_code(error: &anyhow::Error) -> u8 {
    let bad_input = error.chain().any(|cause| {
        cause.downcast_ref::<rootfs_tools::Error>().is_some_and(rootfs_tools::Error::is_bad_input)
            || cause.downcast_ref::<oci::Error>().is_some_and(oci::Error::is_bad_input)
    });
    if bad_input { 2 } else { 1 }
}

fn build(args: BuildArgs) -> anyhow::Result<()> {
    let options = BuildOptions { size: args.size(), journal: args.journal(), threads: None };
    let mut shown = show::Shown::new();
    let mut update = |progress| shown.update(progress);
    let report = match &args.image {
        Input::Folder(folder) => rootfs_tools::build_folder(folder, &options, &args.output, &mut update),
        Input::Image(reference) => {
            // An archive's blobs stay as long as this does.
            let (image, _archive) = open_image(&args, reference)?;
            rootfs_tools::build(&image, &options, &args.output, &mut update)
        }
    };
    shown.finish();
    let report = report.with_context(|| format!("building {}", args.image))?;
    if args.json {
        return print_json(&report);
    }
    summarise(&args.output, &report)
}

fn bake(args: BakeArgs) -> anyhow::Result<()> {
    let BakeArgs { build, envd, path, init_link } = args;
    let Input::Image(reference) = &build.image else {
        return Err(rootfs_tools::Error::Invalid {
            what: build.image.to_string(),
            reason: "the agent is baked into images only: copy it into the folder, then build".to_owned(),
        }
        .into());
    };
    let (image, _archive) = open_image(&build, reference)?;
    let options = BakeOptions { size: build.size(), journal: build.journal(), path, init_link };
    let mut shown = show::Shown::new();
    let report =
        rootfs_tools::bake(&image, &envd, &options, &build.output, &mut |progress| shown.update(progress));
    shown.finish();
    let report = report.with_context(|| format!("baking {} into {}", envd.display(), build.image))?;
    if build.json {
        return print_json(&report);
    }
    summarise(&build.output, &report)
}

fn open_image(args: &BuildArgs, reference: &ImageReference) -> anyhow::Result<(Image, Option<Archive>)> {
    // Beside the output, where there is room for an image.
    let scratch = args.output.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
    open_reference(reference, args.data_dir.as_deref(), scratch)
}

/// The image, and what keeps its blobs for as long as they are read. An archive is unpacked in `scratch`.
fn open_reference(
    reference: &ImageReference,
    data_dir: Option<&Path>,
    scratch: &Path,
) -> anyhow::Result<(Image, Option<Archive>)> {
    let context = || format!("opening image {reference}");
    let opened = |fetched: Result<Archive, oci::Error>| {
        let fetched = fetched.with_context(context)?;
        let descriptor = fetched.store().resolve_or_only(None).with_context(context)?;
        Ok((Image::open(fetched.store(), &descriptor).with_context(context)?, Some(fetched)))
    };
    match reference {
        ImageReference::Name(name) => {
            let data_dir = DataDir::resolve(data_dir)
                .ok_or_else(|| anyhow!("neither --data-dir nor $HOME says where the local images are"))?;
            let hint = || {
                format!(
                    "{}: the local store is {} (--data-dir chooses another; oci:DIR:TAG and oci-archive:FILE need none; docker://NAME fetches it with skopeo)",
                    context(),
                    data_dir.images().display()
                )
            };
            let store = Store::open(&data_dir.images()).with_context(hint)?;
            Ok((store.image(&name.canonical()).with_context(hint)?, None))
        }
        ImageReference::Layout { directory, tag } => {
            let store = Store::open(directory).with_context(context)?;
            let descriptor = store.resolve_or_only(tag.as_deref()).with_context(context)?;
            Ok((Image::open(&store, &descriptor).with_context(context)?, None))
        }
        // image-builder has a client of its own; this program is to stay small.
        ImageReference::Registry(name) => opened(SkopeoReference::of_registry(name).fetch(scratch)),
        ImageReference::Skopeo(reference) => opened(reference.fetch(scratch)),
        ImageReference::DockerArchive { file, name } => {
            opened(oci::open_docker_archive(file, name.as_deref(), scratch))
        }
        ImageReference::Archive { file, tag } => {
            let archive = Archive::open(file, scratch).with_context(context)?;
            let descriptor = archive.store().resolve_or_only(tag.as_deref()).with_context(context)?;
            Ok((Image::open(archive.store(), &descriptor).with_context(context)?, Some(archive)))
        }
    }
}

fn summarise(output: &Path, report: &BuildReport) -> anyhow::Result<()> {
    let BuildReport { digest, size, entries, data, index_ms, write_ms, sync_ms, .. } = report;
    print_line(&format!(
        "{}: {} MiB, {entries} entries, {} MiB of data, {digest}",
        output.display(),
        size.div_ceil(1 << 20),
        data.div_ceil(1 << 20),
    ))?;
    print_line(&format!(
        "read the entries in {index_ms} ms, wrote in {write_ms} ms, synced in {sync_ms} ms"
    ))?;
    if report.dropped_xattrs > 0 {
        eprintln!(
            "rootfs-tools: {} extended attributes were left out: kept are user, trusted (but for trusted.overlay), security and POSIX ACLs",
            report.dropped_xattrs
        );
    }
    if report.dropped_sockets > 0 {
        eprintln!("rootfs-tools: {} sockets were left out", report.dropped_sockets);
    }
    Ok(())
}

fn empty(args: EmptyArgs) -> anyhow::Result<()> {
    let seed = match &args.seed {
        Some(seed) => seed.clone().into_bytes(),
        None => fresh_seed()?,
    };
    let bytes = args.size << 20;
    rootfs_tools::empty(&args.output, bytes, args.label.as_deref(), &seed)
        .with_context(|| format!("writing an empty file system to {}", args.output.display()))?;
    if args.json {
        return print_json(&json!({ "size": bytes }));
    }
    print_line(&format!("{}: {} MiB, empty", args.output.display(), args.size))
}

/// Two empty file systems in one machine must not share a UUID.
fn fresh_seed() -> anyhow::Result<Vec<u8>> {
    use std::io::Read;
    let mut seed = vec![0; 32];
    let source = Path::new("/dev/urandom");
    std::fs::File::open(source)
        .and_then(|mut file| file.read_exact(&mut seed))
        .with_context(|| source.display().to_string())?;
    Ok(seed)
}

fn grow(args: GrowArgs) -> anyhow::Result<()> {
    let report = rootfs_tools::grow(&args.file, args.size << 20).context("growing a file system")?;
    if args.json {
        return print_json(&report);
    }
    let (before, after) = (report.before.div_ceil(1 << 20), report.after >> 20);
    print_line(&format!("{}: {before} MiB before, {after} MiB now", args.file.display()))
}

fn guest_image(args: GuestImageArgs) -> anyhow::Result<()> {
    let report = rootfs_tools::guest_image_compressed(&args.envd, args.compression(), &args.output)
        .with_context(|| format!("writing the guest image {}", args.output.display()))?;
    if args.json {
        return print_json(&report);
    }
    print_line(&format!("{}: {} KiB, {}", args.output.display(), report.size.div_ceil(1024), report.digest))
}

fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    print_line(&serde_json::to_string(value)?)
}

/// Like println!, but a closed pipe is an error and not a panic.
fn print_line(line: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{line}").context("writing to the standard output")
}
