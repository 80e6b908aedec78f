//! `cp`.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, anyhow};
use clap::Args;
use rootfs_tools::{Error, FileSystem, NewContent, Owner};

use super::{inside, readable};
use crate::{print_json, print_line};

pub(super) const HELP: &str = "\
Examples:
  rootfs-tools cp rootfs.ext4:/etc/passwd .           out of it, into a folder
  rootfs-tools cp rootfs.ext4:/usr/lib ./lib          a directory with everything below it
  rootfs-tools cp rootfs.ext4:/etc/hostname -         to the standard output
  rootfs-tools cp app rootfs.ext4:/usr/bin/           into it
  rootfs-tools cp site rootfs.ext4:/srv --chown 33:33
  date | rootfs-tools cp - rootfs.ext4:/etc/built

Out: no file of the host is replaced and no link followed; owners are kept when run as root. Into: a new file system is
written beside the old one, with its UUID, label and size (it grows when it must), and renamed over it.

Exit codes:
  0  copied
  1  this machine failed
  2  no such path, no ext4, a damaged one, or something is in the way
On 1 and 2 a copy into a file system leaves it as it was.";

#[derive(Debug, Args)]
pub(crate) struct CpArgs {
    /// What to copy: FILE:/PATH in a file system, a file or folder of this machine, or - for the standard input
    #[arg(value_name = "SOURCE")]
    source: String,
    /// Where to: a file or folder of this machine, - for the standard output, or FILE:/PATH in a file system
    #[arg(value_name = "DEST")]
    target: String,
    /// Who owns what is copied into a file system, as numbers [default: 0:0]
    #[arg(long, value_name = "UID:GID")]
    chown: Option<OwnerArg>,
    /// Print the report as one line of JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug)]
struct OwnerArg(Owner);

impl FromStr for OwnerArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = text.split_once(':').and_then(|(uid, gid)| Some((uid.parse().ok()?, gid.parse().ok()?)));
        let (uid, gid) = parsed.ok_or_else(|| "expected two numbers, as in 1000:1000".to_owned())?;
        Ok(Self(Owner { uid, gid }))
    }
}

pub(super) fn cp(args: CpArgs) -> anyhow::Result<()> {
    match (inside(&args.source), inside(&args.target)) {
        (Some((image, path)), None) => out(image, path, &args),
        (None, Some((image, path))) => into(image, path, &args),
        (Some(_), Some(_)) => Err(usage("both are in a file system: copy to this machine first")),
        (None, None) => Err(usage("neither is in a file system: one must be FILE:/PATH")),
    }
}

fn usage(reason: &str) -> anyhow::Error {
    anyhow!(Error::Invalid { what: "cp".to_owned(), reason: reason.to_owned() })
}

fn out(image: &Path, path: &str, args: &CpArgs) -> anyhow::Result<()> {
    if args.chown.is_some() {
        return Err(usage("--chown is for copies into a file system"));
    }
    let fs = FileSystem::open(image)?;
    if args.target == "-" {
        rootfs_tools::read_file(&fs, path.as_bytes(), &mut std::io::stdout())?;
        return Ok(());
    }
    let report = rootfs_tools::extract(&fs, path.as_bytes(), &PathBuf::from(&args.target))?;
    if args.json {
        return print_json(&report);
    }
    print_line(&format!("{} entries, {}", report.entries, readable(report.data)))?;
    if report.skipped_devices > 0 {
        eprintln!("rootfs-tools: {} devices were left out: only root may make them", report.skipped_devices);
    }
    if report.skipped_xattrs > 0 {
        eprintln!("rootfs-tools: {} extended attributes could not be set here", report.skipped_xattrs);
    }
    Ok(())
}

fn into(image: &Path, path: &str, args: &CpArgs) -> anyhow::Result<()> {
    let owner = args.chown.map(|OwnerArg(owner)| owner).unwrap_or_default();
    let mut stdin = std::io::stdin().lock();
    let source = PathBuf::from(&args.source);
    let what = if args.source == "-" { NewContent::Stream(&mut stdin) } else { NewContent::Path(&source) };
    let report = rootfs_tools::insert(image, what, path.as_bytes(), owner)
        .with_context(|| format!("copying {} into {}", args.source, image.display()))?;
    if args.json {
        return print_json(&report);
    }
    print_line(&format!("{}: {}, {}", image.display(), readable(report.size), report.digest))?;
    if let Some(before) = report.grown_from {
        eprintln!("rootfs-tools: it has grown from {} to {}", readable(before), readable(report.size));
    }
    if !report.lost_features.is_empty() {
        eprintln!("rootfs-tools: the new file system has no {}", report.lost_features.join(", "));
    }
    if report.dropped_sockets > 0 {
        eprintln!("rootfs-tools: {} sockets were left out", report.dropped_sockets);
    }
    Ok(())
}
