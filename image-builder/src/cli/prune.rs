//! `image-builder prune`.

use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use image_builder::{Console, PruneOptions};
use template::DataDir;

use super::print;

pub(super) const HELP: &str = concat!(
    "Examples:\n",
    "  image-builder prune                                what is of no use to anybody\n",
    "  image-builder prune --max-age 7d --max-size 10GiB  for a nightly job\n",
    "  image-builder prune --all --dry-run\n\n",
    "Looks at results of steps, unpacked layers, cache mounts of RUN and root file systems of vm isolation; with them go the\n",
    "blobs that neither an image nor a result names. Images with a name, and templates, are never touched. Builds may run\n",
    "meanwhile: what they use stays.\n\n",
    "Exit codes: 0 done, 1 something could not be removed, 2 wrong usage."
);

#[derive(Debug, Args)]
pub(super) struct PruneCommand {
    /// Remove what was not used for so long, as 12h, 7d or 2w
    #[arg(long, value_name = "TIME", value_parser = age)]
    max_age: Option<Duration>,
    /// Remove what was used least recently until no more than this is left, as 500MB or 10GiB
    #[arg(long, value_name = "SIZE", value_parser = size)]
    max_size: Option<u64>,
    /// Remove everything that can be made again
    #[arg(long)]
    all: bool,
    /// Tell what would be removed
    #[arg(long)]
    dry_run: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Carries the command out.
pub(super) fn prune(command: PruneCommand, data: &DataDir, console: &Console) -> anyhow::Result<()> {
    let PruneCommand { max_age, max_size, all, dry_run, json } = command;
    let options = PruneOptions { max_age, max_size, all, dry_run };
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    // Before any thread: what a user's builds unpacked may belong to ids that only their namespace has.
    image_builder::isolation::enter_to_remove(data, &program)?;
    let report = image_builder::prune(data, &options, console)?;
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / 1_048_576.0);
    for pruned in &report.removed {
        console.line(&format!("{} {}", mib(pruned.size), pruned.path.display()));
    }
    let what = if dry_run { "would be removed" } else { "removed" };
    let mut text =
        format!("{} in {} things {what}, {} left", mib(report.freed), report.removed.len(), mib(report.left));
    if report.in_use > 0 {
        text.push_str(&format!(", {} things kept for running builds", report.in_use));
    }
    print(json, &report, &text)?;
    match report.failed.as_slice() {
        [] => Ok(()),
        [first, ..] => bail!("{} things could not be removed, the first: {first}", report.failed.len()),
    }
}

/// The number at the beginning, and the unit behind it.
fn number(text: &str) -> Option<(f64, &str)> {
    let end =
        text.find(|character: char| !character.is_ascii_digit() && character != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    Some((number.parse().ok()?, unit.trim()))
}

fn age(text: &str) -> Result<Duration, String> {
    let expected = || format!("{text:?}: expected a number with s, m, h, d or w");
    let (number, unit) = number(text).ok_or_else(expected)?;
    let seconds = match unit {
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        "d" => 86_400.0,
        "w" => 604_800.0,
        _ => return Err(expected()),
    };
    Duration::try_from_secs_f64(number * seconds).map_err(|_| expected())
}

fn size(text: &str) -> Result<u64, String> {
    let expected = || format!("{text:?}: expected a number with B, KB, MB, GB, TB, KiB, MiB, GiB or TiB");
    let (number, unit) = number(text).ok_or_else(expected)?;
    let unit = unit.to_ascii_lowercase();
    let factor = match unit.as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "t" | "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1_048_576.0,
        "gib" => 1_073_741_824.0,
        "tib" => 1_099_511_627_776.0,
        _ => return Err(expected()),
    };
    let bytes = number * factor;
    if bytes < u64::MAX as f64 { Ok(bytes as u64) } else { Err(expected()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_ages_have_units() {
        assert_eq!(age("7d"), Ok(Duration::from_secs(604_800)));
        assert_eq!(age("1.5h"), Ok(Duration::from_secs(5400)));
        assert_eq!((size("10GiB"), size("1.5kb"), size("7")), (Ok(10 << 30), Ok(1500), Ok(7)));
        for wrong in ["", "d", "7", "7y", "-1d", "1e99d", "1.2.3d"] {
            assert!(age(wrong).is_err(), "{wrong}");
        }
        for wrong in ["", "GB", "1XB", "-1", "99999999999999999999TB"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
