//! The command line.

mod builds;
mod front;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use sandbox_folder::spec::ChannelChoice;
use template::DataDir;
use tiffin_gateway::config::{Capacity, Config, DEFAULT_PORT};
use tiffin_gateway::fleet::PoolSize;
use tiffin_gateway::host::{self, HostError};
use tiffin_gateway::operator::DEFAULT_TEAM;

use builds::{BuildArgs, BuildLimitArgs};
pub(crate) use front::{Backup, Ca, DomainAt, Front, TeamRate};

const AFTER_HELP: &str = "\
Examples:
  tiffin-gateway serve                          serve the E2B API on http://127.0.0.1:3000
  eval \"$(tiffin-gateway env)\"                  point the E2B SDKs of this shell at it, then:
  python3 -c 'from e2b import Sandbox; print(Sandbox.create().commands.run(\"uname -a\").stdout)'
  tiffin-gateway keys create --name ci          a key for somebody else; it is shown only now
  tiffin-gateway backup /var/backups/tiffin.db  a copy of the database; the gateway may run

Exit codes: 0 done, or stopped by a signal; 1 failure; 2 wrong usage or bad input; 3 this host cannot run sandboxes, or
only emulated ones and --allow-emulation was not given.";

const SERVE_AFTER_HELP: &str = "\
Examples:
  tiffin-gateway serve                          everything by default: port 3000 of this machine, no options
  tiffin-gateway serve --allow-emulation        on a machine without KVM, for trying
  tiffin-gateway serve --listen 0.0.0.0:443 --domain sandboxes.example.com --tls-cert chain.pem --tls-key key.pem
                                                for other machines too, with a certificate for the domain and *. of it
  tiffin-gateway serve --domain sandboxes.test --tls-self-signed
                                                HTTPS without one; `tiffin-gateway ca` prints what clients have to trust

On first use it makes the template `base`, a team `default` and a key of it. SIGTERM or Ctrl-C ends the gateway and not
its sandboxes: the next one on the same data folder finds them again. With HTTPS, SIGHUP reads the certificate again. Their timeouts end them, or `Sandbox.kill()`.

Exit codes: 0 stopped by a signal; 1 failure; 2 wrong usage or bad input; 3 this host cannot run sandboxes, or only
emulated ones and --allow-emulation was not given.";

/// Serve sandboxes on this machine to the E2B SDKs.
#[derive(Debug, Parser)]
#[command(version, after_help = AFTER_HELP, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the gateway until it is told to stop.
    Serve(Box<Serve>),
    /// Print what points the SDKs at this machine's gateway, for `eval`; it need not run.
    Env(Env),
    /// Make, list and revoke API keys.
    #[command(subcommand)]
    Keys(Keys),
    /// Make and list teams, and say what they may have.
    #[command(subcommand)]
    Teams(Teams),
    /// Copy the database while the gateway runs.
    Backup(Backup),
    /// Print the authority of `serve --tls-self-signed`, for clients to trust.
    Ca(Ca),
    /// Print the OpenAPI document of the control API; a gateway serves it as /openapi.json.
    Openapi,
}

#[derive(Debug, Args)]
#[command(after_help = SERVE_AFTER_HELP)]
pub(crate) struct Serve {
    /// Address and port to serve on
    #[arg(long, value_name = "ADDRESS", env = "TIFFIN_LISTEN", default_value_t = default_listen())]
    listen: SocketAddr,

    /// Serve on a host without hardware virtualization: slow, and no security boundary
    #[arg(long)]
    allow_emulation: bool,

    /// Domain of sandboxes' host names, `<port>-<id>.<domain>`; with `:PORT` where clients reach it at another port than this
    /// listens on
    #[arg(long, value_name = "DOMAIN", env = "TIFFIN_DOMAIN", default_value = "localhost", value_parser = front::domain_at)]
    pub(crate) domain: DomainAt,

    #[command(flatten)]
    pub(crate) front: Front,

    #[command(flatten)]
    builds: BuildArgs,

    #[command(flatten)]
    data: Data,

    /// Sandboxes at once [default: as many as the memory allows, up to 1000]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_sandboxes: Option<u32>,

    /// Virtual CPUs of all sandboxes together [default: 8 for each of this machine's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_cpus: Option<u32>,

    /// RAM of all sandboxes together in MiB [default: this machine's without a tenth]
    #[arg(long, value_name = "MiB", value_parser = clap::value_parser!(u64).range(1..))]
    max_memory: Option<u64>,

    /// Keep N sandboxes of a template ready for whoever creates one (may be given several times)
    #[arg(long, value_name = "TEMPLATE=N")]
    pub(crate) pool: Vec<PoolSize>,

    /// Do not make the template `base`
    #[arg(long)]
    no_base: bool,

    /// How log lines look, on standard error; $TIFFIN_LOG filters them (as `debug`, or `tiffin_gateway::fleet=debug`)
    #[arg(long, value_enum, default_value_t)]
    pub(crate) log_format: LogFormat,

    /// What carries streams between the sandboxes and this machine
    #[arg(long, value_enum, default_value_t)]
    channel: ChannelChoice,

    /// Guest kernel (vmlinux) [default: ../share/tiffin/vmlinux beside host-shim]
    #[arg(long, value_name = "FILE", env = "TIFFIN_KERNEL")]
    kernel: Option<PathBuf>,

    /// Guest image (initramfs with envd) [default: ../share/tiffin/guest-image.cpio beside host-shim]
    #[arg(long, value_name = "FILE", env = "TIFFIN_GUEST_IMAGE")]
    guest_image: Option<PathBuf>,

    /// The program host-shim [default: beside tiffin-gateway, else in PATH]
    #[arg(long, value_name = "FILE")]
    host_shim: Option<PathBuf>,

    /// The program image-builder [default: beside tiffin-gateway, else in PATH]
    #[arg(long, value_name = "FILE")]
    image_builder: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people
    #[default]
    Text,
    /// A JSON object on each line
    Json,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  eval \"$(tiffin-gateway env)\"

The key is the operator's own, of the team `default`: it is kept in the file gateway.key (0600) of the data folder, and
made where it is not there. Exit codes: 0 done, 1 failure, 2 wrong usage.")]
pub(crate) struct Env {
    /// Address of the gateway [default: where it last served from this data folder, else 127.0.0.1:3000]
    #[arg(long, value_name = "ADDRESS", env = "TIFFIN_LISTEN")]
    pub(crate) listen: Option<SocketAddr>,

    #[command(flatten)]
    pub(crate) data: Data,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Keys {
    /// Make a key and print it, this one time; only its hash is kept.
    Create {
        /// Whose it is
        #[arg(long, value_name = "NAME", default_value = DEFAULT_TEAM)]
        team: String,
        /// What it is for
        #[arg(long, default_value = "", value_parser = name)]
        name: String,
        #[command(flatten)]
        data: Data,
    },
    /// List the keys of every team, without the keys themselves.
    List {
        /// Print a JSON list
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        data: Data,
    },
    /// Make a key useless, at once.
    Revoke {
        /// Its number in the list
        id: i64,
        #[command(flatten)]
        data: Data,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Teams {
    /// Make a team. One never sees another's sandboxes.
    Create {
        #[arg(value_parser = team_name)]
        name: String,
        #[command(flatten)]
        limits: Limits,
        #[command(flatten)]
        data: Data,
    },
    /// List the teams and what they may have.
    List {
        /// Print a JSON list
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        data: Data,
    },
    /// Change what the builds of a team may take, and print it; what is not named stays.
    Builds {
        name: String,
        #[command(flatten)]
        limits: BuildLimitArgs,
        #[command(flatten)]
        data: Data,
    },
    /// Change what a team may have; what is not named stays.
    Quota {
        name: String,
        #[command(flatten)]
        limits: Limits,
        #[command(flatten)]
        data: Data,
    },
}

/// What a team may have at once.
#[derive(Debug, Args)]
pub(crate) struct Limits {
    /// Sandboxes, or `unlimited`
    #[arg(long, value_name = "N", value_parser = limit)]
    sandboxes: Option<u32>,
    /// Virtual CPUs of them together, or `unlimited`
    #[arg(long, value_name = "N", value_parser = limit)]
    cpus: Option<u32>,
    /// RAM of them together in MiB, or `unlimited`
    #[arg(long, value_name = "MiB", value_parser = limit)]
    memory: Option<u32>,
    /// Requests of it to the control API in a second, `unlimited`, or `default` for what `serve` was told
    #[arg(long, value_name = "N", value_parser = front::team_rate)]
    pub(crate) requests: Option<TeamRate>,
    /// Disk of paused sandboxes and snapshots in MiB, or `unlimited`
    #[arg(long, value_name = "MiB", value_parser = limit)]
    pub(crate) disk: Option<u32>,
}

impl Limits {
    /// The quota with what was named changed.
    pub(crate) fn over(&self, quota: Capacity) -> Capacity {
        Capacity {
            sandboxes: self.sandboxes.unwrap_or(quota.sandboxes),
            cpus: self.cpus.unwrap_or(quota.cpus),
            memory_mib: self.memory.map_or(quota.memory_mib, u64::from),
        }
    }
}

/// The data folder.
#[derive(Debug, Args)]
pub(crate) struct Data {
    /// Data folder [default: tiffin/ under $XDG_DATA_HOME or ~/.local/share]
    #[arg(long, value_name = "DIR", env = "TIFFIN_DATA_DIR")]
    data_dir: Option<PathBuf>,
}

impl Data {
    pub(crate) fn resolve(&self) -> anyhow::Result<DataDir> {
        let resolved = DataDir::resolve(self.data_dir.as_deref());
        resolved.ok_or_else(|| {
            anyhow::anyhow!("neither --data-dir nor $XDG_DATA_HOME nor $HOME names a data folder")
        })
    }
}

impl Serve {
    /// Whether the template `base` is made.
    pub(crate) fn makes_base(&self) -> bool {
        !self.no_base
    }

    /// The configuration, with this machine's own values where nothing was said.
    pub(crate) fn config(&self) -> anyhow::Result<Config> {
        let machine = Capacity::of_this_machine();
        Ok(Config {
            listen: self.listen,
            domain: self.domain.name.clone(),
            data: self.data.resolve()?,
            host_shim: host::program(self.host_shim.as_deref(), "host-shim", "--host-shim")?,
            image_builder: self.image_builder()?,
            kernel: absolute(&self.kernel)?,
            guest_image: absolute(&self.guest_image)?,
            channel: self.channel,
            allow_emulation: self.allow_emulation,
            capacity: Capacity {
                sandboxes: self.max_sandboxes.unwrap_or(machine.sandboxes),
                cpus: self.max_cpus.unwrap_or(machine.cpus),
                memory_mib: self.max_memory.unwrap_or(machine.memory_mib),
            },
            builds: self.builds.config(),
        })
    }

    fn image_builder(&self) -> Result<PathBuf, HostError> {
        match host::program(self.image_builder.as_deref(), "image-builder", "--image-builder") {
            // Only `base` and builds need it, and say so then.
            Err(HostError::NoProgram { program, .. }) => Ok(program.into()),
            other => other,
        }
    }
}

/// Sandboxes' shims run elsewhere.
fn absolute(path: &Option<PathBuf>) -> std::io::Result<Option<PathBuf>> {
    path.as_deref().map(std::path::absolute).transpose()
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], DEFAULT_PORT))
}

/// A host name, in lower case.
fn domain(text: &str) -> Result<String, String> {
    match text.len() <= MAX_DOMAIN && text.split('.').all(is_label) {
        true => Ok(text.to_ascii_lowercase()),
        false => Err(format!("expected a host name as sandboxes.example.com, got {text:?}")),
    }
}

/// The longest host name (RFC 1035, 2.3.4) without a sandbox's label.
const MAX_DOMAIN: usize = 253 - 64;

/// A label of a host name (RFC 1123, 2.1).
fn is_label(label: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    (1..=63).contains(&label.len())
        && label.bytes().all(plain)
        && !label.starts_with('-')
        && !label.ends_with('-')
}

/// Names are for people, in lists: short, on one line.
const MAX_NAME: usize = 100;

fn name(text: &str) -> Result<String, String> {
    match text.chars().count() <= MAX_NAME && !text.chars().any(char::is_control) {
        true => Ok(text.to_owned()),
        false => Err(format!("expected at most {MAX_NAME} characters, none of them a control character")),
    }
}

fn team_name(text: &str) -> Result<String, String> {
    if text.trim().is_empty() { Err("expected a name".to_owned()) } else { name(text) }
}

fn limit(text: &str) -> Result<u32, String> {
    match text {
        "unlimited" => Ok(u32::MAX),
        number => number.parse().map_err(|_| format!("expected a number or `unlimited`, got {number:?}")),
    }
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
    fn quotas_change_only_where_they_are_named() {
        let Command::Teams(Teams::Quota { limits, .. }) =
            Cli::parse_from(["x", "teams", "quota", "a", "--cpus", "unlimited", "--memory", "7"]).command
        else {
            panic!("another command");
        };
        let changed = limits.over(Capacity { sandboxes: 3, cpus: 4, memory_mib: 5 });
        assert_eq!(changed, Capacity { sandboxes: 3, cpus: u32::MAX, memory_mib: 7 });
    }
}
