//! `envd build-step`: the command of a `RUN` step in a machine of its own, on disks that its host attached.
//!
//! ```text
//! stdin   a line of JSON, a [`Step`]; then nothing. Its end ends the step
//! stdout, stderr   those of the command, and nothing else
//! disks   lowers (read-only), upper: upper/ is what the command changed, outcome.json an [`Outcome`]
//! exit    0: the upper disk is unmounted and whole, and has an outcome. Else what failed is on stderr
//! ```

use serde::{Deserialize, Serialize};

use crate::control::Network;

/// The subcommand.
pub const COMMAND: &str = "build-step";

/// The directory of the upper disk that is the overlay's upper directory.
pub const UPPER: &str = "upper";

/// The file of the upper disk with the [`Outcome`].
pub const OUTCOME: &str = "outcome.json";

/// The longest line with a step: secrets, certificates and scripts travel in it.
pub const MAX_STEP: u64 = 64 << 20;

/// The longest outcome.
pub const MAX_OUTCOME: u64 = 64 << 10;

/// The directory that a file system cannot be without, and an image can.
pub const LOST_FOUND: &str = "lost+found";

/// What is run, and where.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// Its whole environment.
    pub env: Vec<(String, String)>,
    /// Its working directory, which is made where it is missing.
    pub workdir: String,
    /// The host name.
    pub hostname: String,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// The image: file systems by the serials of their disks, the highest first.
    pub lowers: Vec<String>,
    /// Whether the image has no `lost+found` in its root.
    pub hide_lost_found: bool,
    /// The serial of the disk that the changes go to.
    pub upper: String,
    /// What is mounted over the image, in this order.
    pub mounts: Vec<Mount>,
    /// The machine's network; none when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<Network>,
}

/// A mount over the image. Its mount point is not part of what the command changed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mount {
    /// Where, as an absolute path without symbolic links in the image.
    pub target: String,
    /// Whether the command may not write to it.
    pub read_only: bool,
    /// What.
    pub what: What,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// A file in memory.
    File {
        /// Its bytes in base64.
        contents: String,
        /// Permission bits.
        mode: u32,
        /// User.
        uid: u32,
        /// Group.
        gid: u32,
    },
    /// An empty file system in memory.
    Tmpfs {
        /// Its size in bytes; the kernel's default when absent.
        size: Option<u64>,
    },
    /// What is at a path of a file system; what is written goes with the step.
    Tree {
        /// The serials of its disks, the highest first.
        lowers: Vec<String>,
        /// Whether it has no `lost+found` in its root.
        hide_lost_found: bool,
        /// The path in it; links lead nowhere else.
        path: String,
    },
    /// The directory [`UPPER`] of a disk; what is written stays there.
    Kept {
        /// The serial of the disk.
        serial: String,
        /// Permission bits where the directory is new.
        mode: u32,
        /// User where it is new.
        uid: u32,
        /// Group where it is new.
        gid: u32,
    },
}

/// How a step ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The command ended by itself.
    Exited(i32),
    /// A signal ended the command.
    Killed {
        /// Its number.
        signal: i32,
        /// Whether memory had run out.
        out_of_memory: bool,
    },
    /// There was no command: why, in a sentence.
    Failed(String),
}
