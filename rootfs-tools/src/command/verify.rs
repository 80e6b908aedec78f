//! `verify` and `diff`.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use rootfs_tools::{Change, Difference};
use serde_json::json;

use super::Images;
use crate::{print_json, print_line};

pub(super) const VERIFY_HELP: &str = "\
Examples:
  rootfs-tools verify rootfs.ext4                      structure, checksums, bitmaps, counts, links, directories
  rootfs-tools verify rootfs.ext4 debian:bookworm      and every entry against the image's layers
  rootfs-tools verify rootfs.ext4 oci:./layout --json

The file is only read. What was baked in or copied in is a difference, too.

Exit codes:
  0  nothing is wrong
  1  the file system is damaged, or differs from the image
  2  bad usage, or it cannot be read (no ext4, a feature that is not known, no such image)";

pub(super) const DIFF_HELP: &str = "\
Examples:
  rootfs-tools diff old.ext4 new.ext4
  rootfs-tools diff app:v1 app:v2            two images of the local store
  rootfs-tools diff rootfs.ext4 tree:./dir   a file system and a folder

A line begins with + (only in the second), - (only in the first) or ~ (in both, and what differs).

Exit codes:
  0  they hold the same
  1  they differ
  2  bad usage, or one of them cannot be read";

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// The ext4 file system
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// What it should hold: an image as for build, or tree:FOLDER
    #[arg(value_name = "IMAGE")]
    image: Option<String>,
    #[command(flatten)]
    images: Images,
    /// Print the report as one line of JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DiffArgs {
    /// The first: an ext4 file, an image as for build, or tree:FOLDER
    #[arg(value_name = "A")]
    first: String,
    /// The second
    #[arg(value_name = "B")]
    second: String,
    #[command(flatten)]
    images: Images,
    /// Print the differences as one line of JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn verify(args: VerifyArgs) -> anyhow::Result<bool> {
    let opened = args.image.as_deref().map(|image| args.images.open_source(image)).transpose()?;
    let source = opened.as_ref().map(|opened| &opened.source);
    let report = rootfs_tools::verify(&args.file, source)
        .with_context(|| format!("verifying {}", args.file.display()))?;
    if args.json {
        print_json(&report)?;
        return Ok(report.is_clean());
    }
    for finding in &report.findings {
        print_line(&finding.to_string())?;
    }
    let more = report.total_findings - report.findings.len() as u64;
    if more > 0 {
        print_line(&format!("and {more} more"))?;
    }
    show(&report.differences)?;
    let verdict = match (report.total_findings, report.differences.len(), &args.image) {
        (0, 0, None) => format!("{} entries, nothing is wrong", report.entries),
        (0, 0, Some(image)) => format!("{} entries, nothing is wrong, the same as {image}", report.entries),
        (0, differences, _) => format!("nothing is wrong, but {differences} entries differ"),
        (findings, differences, _) => format!("damaged: {findings} findings, {differences} differences"),
    };
    print_line(&format!("{}: {verdict}", args.file.display()))?;
    Ok(report.is_clean())
}

pub(super) fn diff(args: DiffArgs) -> anyhow::Result<bool> {
    let (first, second) = (args.images.open(&args.first)?, args.images.open(&args.second)?);
    let differences = rootfs_tools::diff(&first.source, &second.source)?;
    if args.json {
        print_json(&json!({ "differences": differences }))?;
    } else {
        show(&differences)?;
    }
    Ok(differences.is_empty())
}

fn show(differences: &[Difference]) -> anyhow::Result<()> {
    for Difference { path, change, what } in differences {
        let mark = match change {
            Change::Added => '+',
            Change::Removed => '-',
            Change::Changed => '~',
        };
        print_line(&format!("{mark} {path} ({})", what.join("; ")))?;
    }
    Ok(())
}
