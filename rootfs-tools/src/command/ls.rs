//! `ls`.

use std::path::PathBuf;

use clap::Args;
use rootfs_tools::{FileSystem, Listed};

use crate::{print_json, print_line};

pub(super) const HELP: &str = "\
Examples:
  rootfs-tools ls rootfs.ext4                 the root
  rootfs-tools ls rootfs.ext4 /etc -l         type and mode, links, owner, size, time, name
  rootfs-tools ls rootfs.ext4 / -R --json     everything, as JSON

Paths are those of the image; what is not printable in them is escaped. Times are UTC.

Exit codes:
  0  done
  1  this machine failed
  2  no such path, no ext4, or a damaged one";

#[derive(Debug, Args)]
pub(crate) struct LsArgs {
    /// The ext4 file system
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// A path in it
    #[arg(value_name = "PATH", default_value = "/")]
    path: String,
    /// Show everything about each entry
    #[arg(short, long)]
    long: bool,
    /// Show everything below, too
    #[arg(short = 'R', long)]
    recursive: bool,
    /// Print the entries as one line of JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn ls(args: LsArgs) -> anyhow::Result<()> {
    let fs = FileSystem::open(&args.file)?;
    let listed = rootfs_tools::list(&fs, args.path.as_bytes(), args.recursive)?;
    if args.json {
        return print_json(&listed);
    }
    for entry in &listed {
        let name = match args.recursive {
            true => &entry.path[..],
            false => entry.path.rsplit('/').next().unwrap_or(&entry.path),
        };
        print_line(&if args.long { long(entry, name) } else { name.to_owned() })?;
    }
    Ok(())
}

fn long(entry: &Listed, name: &str) -> String {
    let Listed { permissions, links, uid, gid, size, mtime, kind, target, .. } = entry;
    // A device has its number where others have a size.
    let size = kind.split_once("device ").map_or(size.to_string(), |(_, number)| number.to_owned());
    let target = target.as_ref().map_or(String::new(), |target| format!(" -> {target}"));
    let time = time(mtime.0);
    format!("{permissions} {links:>3} {uid:>5} {gid:>5} {size:>10} {time} {name}{target}")
}

/// `2026-01-31T23:59:59Z`.
fn time(seconds: i64) -> String {
    let (day, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (mut year, mut left) = (1970 + day.div_euclid(146_097) * 400, day.rem_euclid(146_097));
    let is_leap = |year: i64| year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    loop {
        let days = if is_leap(year) { 366 } else { 365 };
        if left < days {
            break;
        }
        (year, left) = (year + 1, left - days);
    }
    let mut month = 1;
    for days in [31, if is_leap(year) { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if left < days {
            break;
        }
        (month, left) = (month + 1, left - days);
    }
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!("{year:04}-{month:02}-{:02}T{hour:02}:{minute:02}:{:02}Z", left + 1, second % 60)
}

#[cfg(test)]
mod tests {
    use super::time;

    /// The expected values are those of `date -u -d @SECONDS`.
    #[test]
    fn times() {
        assert_eq!(time(0), "1970-01-01T00:00:00Z");
        assert_eq!(time(-1), "1969-12-31T23:59:59Z");
        assert_eq!(time(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(time(1_700_000_000), "2023-11-14T22:13:20Z");
        assert_eq!(time(-2_147_483_648), "1901-12-13T20:45:52Z");
        assert_eq!(time(15_032_385_535), "2446-05-10T22:38:55Z");
    }
}
