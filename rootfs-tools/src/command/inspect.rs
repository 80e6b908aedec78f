//! `inspect`.

use clap::Args;
use oci::Image;
use rootfs_tools::{FileSystem, ImageFacts, Sizes, Source};
use serde_json::json;

use super::{Images, readable};
use crate::{print_json, print_line};

pub(super) const HELP: &str = "\
Examples:
  rootfs-tools inspect debian:bookworm              config and layers
  rootfs-tools inspect debian:bookworm --why-big    what takes the space, and what later layers hide
  rootfs-tools inspect rootfs.ext4                  size, free space, features
  rootfs-tools inspect rootfs.ext4 --why-big --top 5

Exit codes:
  0  done
  1  this machine failed
  2  no such image, no ext4, or a damaged one";

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// An ext4 file, or an image as for build
    #[arg(value_name = "IMAGE")]
    image: String,
    /// Show the largest directories and files
    #[arg(long)]
    why_big: bool,
    /// How many of them
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
    top: u16,
    #[command(flatten)]
    images: Images,
    /// Print everything as one line of JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn inspect(args: InspectArgs) -> anyhow::Result<()> {
    let opened = args.images.open(&args.image)?;
    match &opened.source {
        Source::FileSystem(fs) => file_system(fs, &args),
        Source::Image(image) => oci_image(image, &args),
        Source::Folder(_) => Err(rootfs_tools::Error::Invalid {
            what: args.image.clone(),
            reason: "expected an image or an ext4 file, not a folder".to_owned(),
        }
        .into()),
    }
}

fn file_system(fs: &FileSystem, args: &InspectArgs) -> anyhow::Result<()> {
    let contents = fs.tree()?;
    let largest =
        if args.why_big { rootfs_tools::largest(&contents.tree, args.top.into()) } else { Sizes::default() };
    let superblock = fs.superblock();
    let block_size = u64::from(superblock.block_size);
    let (size, free) = (superblock.size(), superblock.free_blocks * block_size);
    let entries = contents.numbers.len() as u64 + contents.dropped_sockets;
    if args.json {
        return print_json(&json!({
            "superblock": superblock, "size": size, "free": free, "entries": entries,
            "largest": args.why_big.then_some(largest),
        }));
    }
    let label = if superblock.label.is_empty() { "none" } else { &superblock.label };
    print_line(&format!(
        "size        {} ({} blocks of {block_size} bytes)",
        readable(size),
        superblock.blocks
    ))?;
    print_line(&format!("free        {}", readable(free)))?;
    print_line(&format!("entries     {entries}"))?;
    let used = superblock.inodes - superblock.free_inodes.min(superblock.inodes);
    print_line(&format!(
        "inodes      {used} of {} in use, {} bytes each",
        superblock.inodes, superblock.inode_size
    ))?;
    print_line(&format!("UUID        {}", superblock.uuid_text()))?;
    print_line(&format!("label       {}", label.escape_debug()))?;
    print_line(&format!("features    {}", superblock.features.join(" ")))?;
    let state = if superblock.clean { "clean" } else { "not clean" };
    print_line(&format!("state       {state}, {} mounts", superblock.mounts))?;
    show_sizes(&largest)
}

fn oci_image(image: &Image, args: &InspectArgs) -> anyhow::Result<()> {
    let facts = rootfs_tools::image_facts(image, args.top.into())?;
    if args.json {
        return print_json(&facts);
    }
    let ImageFacts { digest, config, layers, entries, largest, lost } = &facts;
    print_line(&format!("digest      {digest}"))?;
    let field = |pointer: &str| config.pointer(pointer).filter(|value| !value.is_null());
    for (name, pointer) in [
        ("platform", "/os"),
        ("", "/architecture"),
        ("created", "/created"),
        ("user", "/config/User"),
        ("workdir", "/config/WorkingDir"),
        ("entrypoint", "/config/Entrypoint"),
        ("command", "/config/Cmd"),
        ("env", "/config/Env"),
        ("ports", "/config/ExposedPorts"),
        ("volumes", "/config/Volumes"),
        ("labels", "/config/Labels"),
    ] {
        if let Some(value) = field(pointer) {
            print_line(&format!("{name:<11} {value}"))?;
        }
    }
    print_line(&format!("entries     {entries}"))?;
    for (layer, number) in layers.iter().zip(1..) {
        print_line(&format!(
            "layer {number:<5} {} {}, {} entries, {} of data, {} of it hidden later ({})",
            layer.digest,
            readable(layer.size),
            layer.entries,
            readable(layer.data),
            readable(layer.lost),
            layer.media_type,
        ))?;
    }
    if !args.why_big {
        return Ok(());
    }
    show_sizes(largest)?;
    if !lost.is_empty() {
        print_line("hidden by later layers:")?;
    }
    for file in lost {
        print_line(&format!("{:>12}  {} (layer {})", readable(file.size), file.path, file.layer))?;
    }
    Ok(())
}

fn show_sizes(sizes: &Sizes) -> anyhow::Result<()> {
    for (title, list) in [("directories:", &sizes.directories), ("files:", &sizes.files)] {
        if !list.is_empty() {
            print_line(title)?;
        }
        for entry in list {
            print_line(&format!("{:>12}  {}", readable(entry.size), entry.path))?;
        }
    }
    Ok(())
}
