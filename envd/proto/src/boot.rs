//! What the agent finds in its machine: kernel arguments, disks and serial ports.

use std::fmt;
use std::str::FromStr;

/// Kernel argument: how the agent reaches its host. `serial`, `vsock`, or absent for the first of the two that is there.
pub const ARG_CHANNEL: &str = "envd.channel";

/// Kernel argument: the vsock port on the host for the control door. Absent means [`crate::CONTROL_PORT`].
pub const ARG_CONTROL_PORT: &str = "envd.control_port";

/// Kernel argument: `none` runs client calls in the agent's own root, without a container.
pub const ARG_CONTAINER: &str = "envd.container";

/// Kernel argument: the device of the root file system. Absent means the disk with serial [`ROOTFS_SERIAL`].
pub const ARG_ROOTFS: &str = "envd.rootfs";

/// Kernel argument: the device of the scratch file system. Absent means the disk with serial [`SCRATCH_SERIAL`].
pub const ARG_SCRATCH: &str = "envd.scratch";

/// Kernel argument: what the container may do, a [`Profile`]. Absent means `sandbox`.
pub const ARG_PROFILE: &str = "envd.profile";

/// Kernel argument: what runs as PID 1 of the container, an [`Init`]; a path is percent-encoded ([`encode_path`]). Absent
/// means `envd`.
pub const ARG_INIT: &str = "envd.init";

/// Kernel argument, any number of times: an absolute path of the container that sits on the scratch disk itself,
/// percent-encoded ([`encode_path`]). [`DOCKER_VOLUME`] always does.
pub const ARG_VOLUME: &str = "envd.volume";

/// The data of a container engine in the container: it mounts overlays, and an overlay cannot be upon an overlay.
pub const DOCKER_VOLUME: &str = "/var/lib/docker";

/// Volumes at most. Each is a mount, and an argument on the kernel's command line.
pub const MAX_VOLUMES: usize = 64;

/// Bytes of all volume arguments together: the command line of x86 has 2048 (`COMMAND_LINE_SIZE`), and others live there.
pub const MAX_VOLUME_ARGUMENTS: usize = 1200;

/// The virtio-blk serial of the read-only root file system.
pub const ROOTFS_SERIAL: &str = "rootfs";

/// The virtio-blk serial of the writable scratch file system.
pub const SCRATCH_SERIAL: &str = "scratch";

/// The name of the virtio-serial port that carries control records.
pub const CONTROL_SERIAL_PORT: &str = "ctl";

/// The name of the virtio-serial port that carries the mux.
pub const MUX_SERIAL_PORT: &str = "mux";

/// What the container may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Profile {
    /// Every capability; the virtual machine is the boundary.
    #[default]
    Sandbox,
    /// Docker's capabilities, seccomp and device rules, no new privileges: the container is a boundary too.
    Restricted,
}

impl Profile {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sandbox => "sandbox",
            Self::Restricted => "restricted",
        }
    }
}

impl FromStr for Profile {
    type Err = InvalidChoice;

    fn from_str(text: &str) -> Result<Self, InvalidChoice> {
        match text {
            "sandbox" => Ok(Self::Sandbox),
            "restricted" => Ok(Self::Restricted),
            _ => Err(InvalidChoice {
                what: "profile",
                expected: "sandbox or restricted",
                got: text.to_owned(),
            }),
        }
    }
}

/// What runs as PID 1 of the container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Init {
    /// The agent's own: it starts what clients want and reaps what they leave.
    #[default]
    Envd,
    /// The image's `/sbin/init`.
    Image,
    /// A program of the image, by its absolute path.
    Path(String),
}

impl FromStr for Init {
    type Err = InvalidChoice;

    fn from_str(text: &str) -> Result<Self, InvalidChoice> {
        match text {
            "envd" => Ok(Self::Envd),
            "image" => Ok(Self::Image),
            _ if text.starts_with('/') && text.len() <= MAX_PATH && !text.contains('\0') => {
                Ok(Self::Path(text.to_owned()))
            }
            _ => Err(InvalidChoice {
                what: "init",
                expected: "envd, image or the absolute path of a program in the image",
                got: text.to_owned(),
            }),
        }
    }
}

impl fmt::Display for Init {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Envd => "envd",
            Self::Image => "image",
            Self::Path(path) => path,
        })
    }
}

/// A choice that there is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidChoice {
    /// What was to be chosen.
    pub what: &'static str,
    /// What there is.
    pub expected: &'static str,
    /// What was asked for.
    pub got: String,
}

impl fmt::Display for InvalidChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: expected {}, got {:?}", self.what, self.expected, self.got)
    }
}

impl std::error::Error for InvalidChoice {}

/// Bytes of a path on the command line. The encoded form of a volume names a directory too, of which Linux takes 255 bytes.
pub const MAX_PATH: usize = 255;

/// A path as one word of the kernel's command line, and as the name of a file: what neither can hold is `%XX`.
pub fn encode_path(path: &str) -> String {
    let mut word = String::with_capacity(path.len());
    for byte in path.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'_' | b'-' | b'+' => {
                word.push(byte.into())
            }
            _ => word.push_str(&format!("%{byte:02X}")),
        }
    }
    word
}

/// What [`encode_path`] was given; `None` when the word is not of its making.
pub fn decode_path(word: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(word.len());
    let mut rest = word.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        if first != b'%' {
            bytes.push(first);
            continue;
        }
        let digits = std::str::from_utf8(rest.get(..2)?).ok()?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = &rest[2..];
    }
    String::from_utf8(bytes).ok().filter(|path| !path.contains('\0'))
}

/// A volume's path without `.`, double and trailing slashes; `None` for one that is relative, the root itself, has `..`,
/// or lies where the container's own file systems are.
pub fn normal_volume(path: &str) -> Option<String> {
    let parts = path.strip_prefix('/')?.split('/').filter(|part| !part.is_empty() && *part != ".");
    let normal: String = parts.map(|part| format!("/{part}")).collect();
    let kernel = ["/proc", "/sys", "/dev"]
        .iter()
        .any(|at| normal.strip_prefix(at).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')));
    let fits = volume_name(&normal).len() <= MAX_PATH && !normal.contains('\0');
    let inside = !normal.is_empty() && !normal.split('/').any(|part| part == "..");
    (fits && inside && !kernel).then_some(normal)
}

/// The name of the directory that holds a volume.
pub fn volume_name(path: &str) -> String {
    encode_path(path).replace('/', "%2F")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_read_and_written() {
        for text in ["envd", "image", "/lib/systemd/systemd"] {
            assert_eq!(text.parse::<Init>().unwrap().to_string(), text);
        }
        for text in ["sandbox", "restricted"] {
            assert_eq!(text.parse::<Profile>().unwrap().name(), text);
        }
        let error = "none".parse::<Profile>().unwrap_err().to_string();
        assert_eq!(error, "profile: expected sandbox or restricted, got \"none\"");
        for text in ["", "systemd", "sbin/init", "/a\0b"] {
            assert!(text.parse::<Init>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_path_survives_the_command_line() {
        for path in ["/data", "/my data/\"x\"", "/ünïcode", "/a%20b", "/a\nb"] {
            let word = encode_path(path);
            assert!(word.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"'), "{word}");
            assert_eq!(decode_path(&word).as_deref(), Some(path));
        }
        for word in ["%", "%1", "%zz", "%FF", "%00"] {
            assert_eq!(decode_path(word), None, "{word}");
        }
    }

    #[test]
    fn volumes_are_paths_of_the_tree() {
        assert_eq!(normal_volume("/var//lib/./x/").as_deref(), Some("/var/lib/x"));
        assert_eq!(normal_volume("/processes").as_deref(), Some("/processes"));
        for path in [
            "",
            "/",
            "//",
            "data",
            "/a/../b",
            "/proc",
            "/proc/x",
            "/dev/",
            "/a\0b",
            &format!("/{}", "x".repeat(255)),
        ] {
            assert_eq!(normal_volume(path), None, "{path:?}");
        }
    }
}
