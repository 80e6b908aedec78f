//! The command line.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand};
use oci::{ImageReference, InvalidReference};
use rootfs_tools::{AgentPath, GuestImageCompression, Journal, Size, ZstdLevel};

use crate::command::chunk;

/// What comes before the name of a folder with an unpacked tree. (`dir:` is a transport of skopeo.)
pub(crate) const TREE: &str = "tree:";

const EXIT_CODES: &str = "\
Exit codes:
  0  the file is written
  1  this machine failed (no room on the disk, no permission, ..)
  2  bad usage or bad input (no such image, a corrupt layer, an image larger than --size)
On 1 and 2 no output is left behind.";

const BUILD_EXAMPLES: &str = "\
Examples:
  rootfs-tools build debian:bookworm -o rootfs.ext4          an image of the local store
  rootfs-tools build oci:./layout:v1 -o rootfs.ext4          an OCI image layout in a folder
  rootfs-tools build oci-archive:app.tar -o rootfs.ext4      one in a tar file
  rootfs-tools build tree:./folder -o rootfs.ext4               an unpacked tree
  rootfs-tools build docker-archive:saved.tar -o rootfs.ext4     what docker save wrote
  rootfs-tools build docker://debian:12 -o rootfs.ext4       of a registry, by skopeo, which must be installed; also
                                     docker-daemon:NAME, dir:DIR, containers-storage:NAME
  rootfs-tools build app -o rootfs.ext4 --free 256           with 256 MiB of room to write
  rootfs-tools build app -o rootfs.ext4 --size 2048 --json   a 2 GiB disk; the report as JSON

The same image and options always give the same bytes.

";

const BAKE_EXAMPLES: &str = "\
Examples:
  rootfs-tools bake debian:bookworm --envd envd -o disk.ext4 --free 512
  rootfs-tools bake oci:./layout:v1 --envd envd -o disk.ext4 --init-link       /sbin/init is the agent, too
  rootfs-tools bake app --envd envd -o disk.ext4 --path /usr/lib/tiffin/envd

The same image, binary and options always give the same bytes. How to boot the disk is in envd/README.md.

";

/// Turns OCI images into ext4 root file systems, without root, mounts or mkfs.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Write an image's layers as one ext4 file system
    #[command(after_help = format!("{BUILD_EXAMPLES}{EXIT_CODES}"))]
    Build(BuildArgs),
    /// Write an image's layers with the agent among them: a disk that boots with init=/sbin/envd
    #[command(after_help = format!("{BAKE_EXAMPLES}{EXIT_CODES}"))]
    Bake(BakeArgs),
    /// Write an empty ext4 file system, sparse and ready in milliseconds
    #[command(after_help = format!(
        "Example:\n  rootfs-tools empty --size 1024 -o scratch.ext4\n\n\
         It has no journal: it is meant for data that is thrown away after a crash.\n\n{EXIT_CODES}"
    ))]
    Empty(EmptyArgs),
    /// Make an ext4 file system larger in its file, without a copy
    #[command(after_help = "\
Example:
  rootfs-tools grow rootfs.ext4 --size 4096

It takes what this program writes, and what mke2fs makes with 4096-byte blocks and metadata_csum; clean and not mounted.
What it cannot grow is refused before anything is written.

Exit codes:
  0  the file system has the size
  1  this machine failed (no room on the disk, no permission, ..)
  2  it cannot be grown, or not so far")]
    Grow(GrowArgs),
    /// Write the guest image: an initramfs with the agent as /init
    #[command(after_help = format!(
        "Example:\n  rootfs-tools guest-image --envd target/x86_64-unknown-linux-gnu/agent/envd -o guest.cpio\n  \
         rootfs-tools guest-image --envd envd -o guest.cpio.zst --compress zstd\n\n{EXIT_CODES}"
    ))]
    GuestImage(GuestImageArgs),
    /// Keep files as chunks that they share, each with a manifest
    #[command(after_help = format!("{}{EXIT_CODES}", chunk::CHUNK_EXAMPLES))]
    Chunk(chunk::ChunkArgs),
    /// Make a file of its chunks again
    #[command(after_help = format!("{}{EXIT_CODES}", chunk::UNCHUNK_EXAMPLES))]
    Unchunk(chunk::UnchunkArgs),
    /// Remove the chunks that none of these manifests names
    #[command(after_help = format!("{}{EXIT_CODES}", chunk::PRUNE_EXAMPLES))]
    PruneChunks(chunk::PruneChunksArgs),
    #[command(flatten)]
    Read(crate::command::Command),
}

#[derive(Debug, Args)]
pub(crate) struct BuildArgs {
    /// The image: a name in the local store, oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:NAME], what skopeo reads (docker://NAME, ..);
    /// or tree:FOLDER, an unpacked tree
    #[arg(value_name = "IMAGE")]
    pub(crate) image: Input,
    /// The file to write
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    /// Size of the file system in MiB [default: as small as the contents]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=MAX_MIB), conflicts_with = "free")]
    size: Option<u64>,
    /// Room for new files in MiB
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(0..=MAX_MIB))]
    free: Option<u64>,
    /// With a journal, of MIB or the size that mke2fs would choose
    #[arg(long, value_name = "MIB", num_args = 0..=1, require_equals = true, value_parser = clap::value_parser!(u64).range(4..=40_000))]
    journal: Option<Option<u64>>,
    /// Where local images are [default: $XDG_DATA_HOME/tiffin or ~/.local/share/tiffin]
    #[arg(long, value_name = "DIR", env = "TIFFIN_DATA_DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// Print the report as one line of JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Where a file system comes from.
#[derive(Clone, Debug)]
pub(crate) enum Input {
    /// A folder of this machine.
    Folder(PathBuf),
    /// An image.
    Image(ImageReference),
}

impl FromStr for Input {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix(TREE) {
            Some(folder) if !folder.is_empty() => Ok(Self::Folder(folder.into())),
            _ => text.parse().map(Self::Image),
        }
    }
}

impl fmt::Display for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(folder) => write!(f, "{TREE}{}", folder.display()),
            Self::Image(image) => image.fmt(f),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct BakeArgs {
    #[command(flatten)]
    pub(crate) build: BuildArgs,
    /// The agent's binary, statically linked
    #[arg(long, value_name = "FILE")]
    pub(crate) envd: PathBuf,
    /// Where it goes in the image
    #[arg(long, value_name = "PATH", default_value_t)]
    pub(crate) path: AgentPath,
    /// Make /sbin/init a link to it, in place of what the image has there
    #[arg(long)]
    pub(crate) init_link: bool,
}

/// 16 TiB, the library's limit.
const MAX_MIB: u64 = 16 << 20;

impl BuildArgs {
    pub(crate) fn size(&self) -> Size {
        match (self.size, self.free) {
            (Some(mib), _) => Size::Exact(mib << 20),
            (None, Some(mib)) => Size::Free(mib << 20),
            (None, None) => Size::Minimal,
        }
    }
}

impl BuildArgs {
    pub(crate) fn journal(&self) -> Journal {
        match self.journal {
            None => Journal::None,
            Some(None) => Journal::Auto,
            Some(Some(mib)) => Journal::Size(mib << 20),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct EmptyArgs {
    /// Size of the file system in MiB
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=MAX_MIB))]
    pub(crate) size: u64,
    /// The file to write
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    /// Volume label of at most 16 bytes
    #[arg(long)]
    pub(crate) label: Option<String>,
    /// Text that UUID and hash seed follow from; the same text gives the same bytes [default: random]
    #[arg(long)]
    pub(crate) seed: Option<String>,
    /// Print the result as one line of JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct GrowArgs {
    /// The file with the file system
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// New size of the file system in MiB
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=MAX_MIB))]
    pub(crate) size: u64,
    /// Print the result as one line of JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct GuestImageArgs {
    /// The agent's binary, statically linked
    #[arg(long, value_name = "FILE")]
    pub(crate) envd: PathBuf,
    /// Compress it, for a kernel with CONFIG_RD_ZSTD: zstd, or zstd:LEVEL with a level of 1 to 19 [default: not]
    #[arg(long, value_name = "zstd[:LEVEL]", value_parser = parse_compression)]
    compress: Option<GuestImageCompression>,
    /// The file to write
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    /// Print the result as one line of JSON
    #[arg(long)]
    pub(crate) json: bool,
}

impl GuestImageArgs {
    pub(crate) fn compression(&self) -> GuestImageCompression {
        self.compress.unwrap_or_default()
    }
}

fn parse_compression(text: &str) -> Result<GuestImageCompression, String> {
    let level = match text.split_once(':') {
        None if text == "zstd" => Some(ZstdLevel::default()),
        Some(("zstd", level)) => level.parse().ok().and_then(ZstdLevel::new),
        _ => None,
    };
    level.map(GuestImageCompression::Zstd).ok_or_else(|| "expected zstd, or zstd:1 to zstd:19".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes() {
        let size = |extra: &[&str]| {
            let args = ["rootfs-tools", "build", "debian", "-o", "x"].iter().chain(extra);
            match Cli::try_parse_from(args).map(|cli| cli.command) {
                Ok(Command::Build(args)) => Some(args.size()),
                _ => None,
            }
        };
        assert_eq!(size(&[]), Some(Size::Minimal));
        assert_eq!(size(&["--size", "3"]), Some(Size::Exact(3 << 20)));
        assert_eq!(size(&["--free", "3"]), Some(Size::Free(3 << 20)));
        for bad in [
            &["--size", "0"][..],
            &["--size", "3", "--free", "3"],
            &["--size", "16777217"],
            &["--size", "-1"],
        ] {
            assert_eq!(size(bad), None, "{bad:?}");
        }
    }
}
