//! `image-builder fsck`.

use std::process::ExitCode;

use clap::Args;
use image_builder::{Console, FindingKind};
use template::DataDir;

use super::print;

/// What is damaged, and stays so.
const EXIT_DAMAGED: u8 = 3;

pub(super) const HELP: &str = concat!(
    "Examples:\n",
    "  image-builder fsck\n",
    "  image-builder fsck --repair --json\n\n",
    "Reads every blob and checks its digest, looks whether each image and each result of a step has all of its blobs, and for\n",
    "files that belong to nothing. --repair removes what is damaged, and the names of images that lack something: pull or\n",
    "build them again. What an ended program left half made is told, but is no damage: the next build removes it.\n\n",
    "Exit codes: 0 no damage, or all of it was removed; 1 it failed, 2 wrong usage, 3 there is damage."
);

#[derive(Debug, Args)]
pub(super) struct FsckCommand {
    /// Remove what is damaged
    #[arg(long)]
    repair: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Carries the command out.
pub(super) fn fsck(command: FsckCommand, data: &DataDir, console: &Console) -> anyhow::Result<ExitCode> {
    let report = image_builder::fsck(data, command.repair, console)?;
    let mut text = String::new();
    for finding in &report.findings {
        let kind = match finding.kind {
            FindingKind::Index => "index",
            FindingKind::Blob => "blob",
            FindingKind::Image => "image",
            FindingKind::Step => "step",
            FindingKind::Stray => "stray file",
            FindingKind::HalfMade => "half made",
        };
        let removed = if finding.removed { " (removed)" } else { "" };
        text.push_str(&format!("{kind} {}: {}{removed}\n", finding.place, finding.problem));
    }
    let damaged = report.is_damaged();
    let verdict = match (damaged, report.findings.iter().any(|finding| finding.kind != FindingKind::HalfMade))
    {
        (true, _) if command.repair => "damage is left",
        (true, _) => "there is damage; fsck --repair removes it",
        (false, true) => "the damage was removed",
        (false, false) => "no damage",
    };
    text.push_str(&format!(
        "{} blobs, {} images, {} results of steps: {verdict}",
        report.blobs, report.images, report.steps
    ));
    print(command.json, &report, &text)?;
    Ok(if damaged { ExitCode::from(EXIT_DAMAGED) } else { ExitCode::SUCCESS })
}
