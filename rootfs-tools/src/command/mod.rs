//! One file for each group of commands. Those that read say what is in an image, and how they exit.

pub(crate) mod chunk;
mod cp;
mod inspect;
mod ls;
mod verify;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Subcommand};
use oci::{Archive, ImageReference};
use rootfs_tools::{FileSystem, Source};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Check a file system, and that it holds what an image says
    #[command(after_help = verify::VERIFY_HELP)]
    Verify(verify::VerifyArgs),
    /// Show what two images differ in, by path
    #[command(after_help = verify::DIFF_HELP)]
    Diff(verify::DiffArgs),
    /// List a directory of a file system
    #[command(after_help = ls::HELP)]
    Ls(ls::LsArgs),
    /// Copy out of a file system, or into one
    #[command(after_help = cp::HELP)]
    Cp(cp::CpArgs),
    /// Show what an image or a file system is made of
    #[command(after_help = inspect::HELP)]
    Inspect(inspect::InspectArgs),
}

/// Runs a command to its exit code.
pub(crate) fn run(command: Command) -> ExitCode {
    // 1 says that there are differences, so nothing else may.
    let differs = matches!(command, Command::Verify(_) | Command::Diff(_));
    let result = match command {
        Command::Verify(args) => verify::verify(args),
        Command::Diff(args) => verify::diff(args),
        Command::Ls(args) => ls::ls(args).map(|()| true),
        Command::Cp(args) => cp::cp(args).map(|()| true),
        Command::Inspect(args) => inspect::inspect(args).map(|()| true),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("rootfs-tools: {error:#}");
            ExitCode::from(if differs { 2 } else { crate::exit_code(&error) })
        }
    }
}

/// Where local images are.
#[derive(Debug, Args)]
pub(crate) struct Images {
    /// Where local images are [default: $XDG_DATA_HOME/tiffin or ~/.local/share/tiffin]
    #[arg(long, value_name = "DIR", env = "TIFFIN_DATA_DIR")]
    data_dir: Option<PathBuf>,
}

/// What a word on the command line names: a file with an ext4 in it, `tree:FOLDER`, or an image.
struct Opened {
    source: Source,
    /// Its blobs stay as long as this does.
    _archive: Option<Archive>,
}

impl Images {
    fn open(&self, word: &str) -> anyhow::Result<Opened> {
        let path = Path::new(word);
        if path.is_file() || path.exists() && !path.is_dir() {
            let source = Source::FileSystem(Box::new(FileSystem::open(path)?));
            return Ok(Opened { source, _archive: None });
        }
        self.open_source(word)
    }

    /// A folder or an image, whatever files are called.
    fn open_source(&self, word: &str) -> anyhow::Result<Opened> {
        if let Some(folder) = word.strip_prefix(crate::cli::TREE).filter(|folder| !folder.is_empty()) {
            return Ok(Opened { source: Source::Folder(folder.into()), _archive: None });
        }
        let reference: ImageReference =
            word.parse().with_context(|| format!("{word}: neither a file here nor the name of an image"))?;
        let scratch = std::env::temp_dir();
        let (image, archive) = crate::open_reference(&reference, self.data_dir.as_deref(), &scratch)?;
        Ok(Opened { source: Source::Image(Box::new(image)), _archive: archive })
    }
}

/// `FILE:/PATH`, a path inside an image.
fn inside(word: &str) -> Option<(&Path, &str)> {
    let colon = word.find(":/")?;
    (colon > 0).then(|| (Path::new(&word[..colon]), &word[colon + 1..]))
}

/// Bytes for people.
fn readable(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = (bytes.max(1).ilog2() / 10).min(4);
    match unit {
        0 => format!("{bytes} B"),
        _ => {
            format!("{:.1} {}", bytes as f64 / f64::from(1u32 << 10).powi(unit as i32), UNITS[unit as usize])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_name_a_path_inside() {
        assert_eq!(inside("a.ext4:/etc/passwd"), Some((Path::new("a.ext4"), "/etc/passwd")));
        assert_eq!(inside("/tmp/a:b.ext4:/"), Some((Path::new("/tmp/a:b.ext4"), "/")));
        assert_eq!(inside("plain"), None);
        assert_eq!(inside("a:b"), None);
    }

    #[test]
    fn sizes_for_people() {
        assert_eq!(readable(0), "0 B");
        assert_eq!(readable(1536), "1.5 KiB");
        assert_eq!(readable(5 << 40), "5.0 TiB");
        assert_eq!(readable(u64::MAX), "16777216.0 TiB");
    }
}
