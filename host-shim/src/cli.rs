//! The command line.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args, Parser, Subcommand};
use host_shim::{Error, tools};
use sandbox_folder::spec::{AcceleratorChoice, ChannelChoice, ProfileChoice, SandboxSpec};
use template::{DataDir, RuntimeConfig, TEMPLATE_FILE, TemplateFolder};

const AFTER_HELP: &str = "\
Examples:
  host-shim doctor                              what this host can do, and what to install
  host-shim run python -- python3 -c 'print(1)' run a command in a fresh sandbox of the template `python`
  echo hi | host-shim run ./my-template -- cat  standard input, output and the exit code are carried through
  host-shim run --spec spec.json --dir /run/s1  a sandbox for an orchestrator; talk to it by the sockets in /run/s1

Exit codes: 0 ok, 1 failure, 2 bad usage or bad input. `run TEMPLATE` has its own, see `host-shim run --help`.";

const RUN_AFTER_HELP: &str = "\
Examples:
  host-shim run alpine                          the image's own ENTRYPOINT and CMD
  host-shim run alpine -- ls -l /               ENTRYPOINT stays, as with `docker run`; --entrypoint '' drops it
  host-shim run --memory 1g --cpus 2 -e A=1 -w /srv build -- make
  host-shim run --timings alpine -- true        where the time goes
  host-shim run --spec spec.json --dir /run/s1  one JSON line on stdout (and sd_notify) when it is ready

The first Ctrl-C or SIGTERM asks the command (with --spec: the sandbox) to end, the second ends it at once.

Exit codes of `run TEMPLATE`: the command's own; 128 + n when signal n ended it; 125 when host-shim or the VM failed,
also for bad input behind valid usage; 126 when the command cannot be executed; 127 when it was not found.
Exit codes of `run --spec` and `run --resume`: 0 stopped or powered off, 1 failed or crashed, 2 bad input, 3 paused.
Wrong options are always 2.";

/// Run sandboxes: one process, one virtual machine, nothing left behind.
#[derive(Debug, Parser)]
#[command(version, after_help = AFTER_HELP, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a command in a fresh sandbox, or a sandbox that others talk to.
    Run(Box<Run>),
    /// Look after templates.
    Template(Template),
    /// Show the format of spec.json.
    Spec(Spec),
    /// Say what this host can do, and what to install.
    Doctor(Doctor),
    /// Remove what killed sandboxes left; `run` does it too. Live sandboxes are not touched.
    Sweep(Sweep),
    /// Become a program that dies with its parent.
    #[command(name = host_shim::vmm::process::EXEC, hide = true)]
    VmmExec(VmmExec),
    /// Sweep a sandbox's folder when the other end of standard input is gone.
    #[command(name = host_shim::reaper::REAP, hide = true)]
    Reap { folder: PathBuf },
}

#[derive(Debug, Args)]
#[command(after_help = RUN_AFTER_HELP, group = ArgGroup::new("for_others").args(["spec", "resume"]))]
pub(crate) struct Run {
    /// Name of a template, or the path of a template's folder.
    #[arg(required_unless_present_any = ["spec", "resume"], conflicts_with = "spec")]
    pub(crate) template: Option<String>,

    /// The command with its arguments; the image's own when absent.
    #[arg(last = true, conflicts_with = "spec")]
    pub(crate) command: Vec<String>,

    /// Run the sandbox that this file describes (see `host-shim spec --schema`), until it ends or SIGTERM comes.
    #[arg(long, value_name = "FILE", requires = "dir")]
    pub(crate) spec: Option<PathBuf>,

    /// Let the paused sandbox in --dir go on; TEMPLATE is needed where its own is not at its place any more.
    #[arg(long, requires = "dir")]
    pub(crate) resume: bool,

    /// The sandbox's folder for --spec and --resume: sockets, state.json and logs. It is kept.
    #[arg(long, value_name = "DIR", requires = "for_others")]
    pub(crate) dir: Option<PathBuf>,

    /// Restore the sandbox of --spec and hold it, until `POST /configure` on its api.sock makes it somebody's.
    #[arg(long, requires = "spec")]
    pub(crate) park: bool,

    /// Begin a session of its own: signals of the caller's terminal and process group do not come here.
    #[arg(long, requires = "dir")]
    pub(crate) new_session: bool,

    #[command(flatten)]
    pub(crate) machine: Machine,

    #[command(flatten)]
    pub(crate) host: Host,

    /// Print where the time went, on stderr.
    #[arg(long, conflicts_with = "spec")]
    pub(crate) timings: bool,

    /// Print the result as a line of JSON on stderr: id, exit code, phases.
    #[arg(long, conflicts_with = "spec")]
    pub(crate) json: bool,

    /// No notices on stderr.
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

/// What a spec says otherwise.
#[derive(Debug, Args)]
pub(crate) struct Machine {
    /// Virtual CPUs.
    #[arg(long, conflicts_with = "spec")]
    cpus: Option<u32>,

    /// RAM, in MiB or with a unit: 512, 512m, 2g.
    #[arg(long, value_parser = mib, conflicts_with = "spec")]
    memory: Option<u64>,

    /// Writable disk, in MiB or with a unit: 1024, 10g.
    #[arg(long, value_parser = mib, conflicts_with = "spec")]
    disk: Option<u64>,

    /// Set a variable of the environment; NAME alone takes the value from here.
    #[arg(short, long, value_name = "NAME[=VALUE]", conflicts_with = "spec")]
    env: Vec<String>,

    /// User name or id, with `:group` if wanted.
    #[arg(short, long, conflicts_with = "spec")]
    user: Option<String>,

    /// Working directory.
    #[arg(short, long, value_name = "PATH", conflicts_with = "spec")]
    workdir: Option<String>,

    /// Host name in the sandbox.
    #[arg(long, visible_alias = "name", conflicts_with = "spec")]
    hostname: Option<String>,

    /// Instead of the image's ENTRYPOINT; '' for none.
    #[arg(long, value_name = "PROGRAM", conflicts_with = "spec")]
    entrypoint: Option<String>,

    /// What carries streams between host and guest.
    #[arg(long, value_enum, default_value_t, conflicts_with = "spec")]
    channel: ChannelChoice,

    /// What runs the guest's instructions.
    #[arg(long, value_enum, default_value_t, conflicts_with = "spec")]
    accel: AcceleratorChoice,

    /// What the container may do.
    #[arg(long, value_enum, default_value_t, conflicts_with = "spec")]
    profile: ProfileChoice,

    /// PID 1 of the container: `envd`, `image` (its /sbin/init, as systemd), or the path of a program in the image.
    #[arg(long, value_name = "INIT", default_value = "envd", conflicts_with = "spec")]
    init: String,

    /// Seconds until the sandbox must be ready.
    #[arg(long, value_name = "SECONDS", default_value_t = host_shim::spec::DEFAULT_BOOT_TIMEOUT_S, conflicts_with = "spec")]
    boot_timeout: u64,
}

/// Where this host keeps things.
#[derive(Debug, Args)]
pub(crate) struct Host {
    /// Guest kernel (vmlinux) [default: ../share/tiffin/vmlinux beside host-shim]
    #[arg(long, value_name = "FILE", env = tools::KERNEL_ENV)]
    pub(crate) kernel: Option<PathBuf>,

    /// Guest image (initramfs with envd) [default: ../share/tiffin/guest-image.cpio beside host-shim]
    #[arg(long, value_name = "FILE", env = tools::GUEST_IMAGE_ENV)]
    pub(crate) guest_image: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) data: Data,
}

/// The data folder.
#[derive(Debug, Args)]
pub(crate) struct Data {
    /// Data folder [default: tiffin/ under $XDG_DATA_HOME or ~/.local/share]
    #[arg(long, value_name = "DIR", env = "TIFFIN_DATA_DIR")]
    data_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Spec {
    /// Print the JSON Schema.
    #[arg(long, required = true)]
    pub(crate) schema: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Exit codes: 0 sandboxes can run here (perhaps without KVM), 1 something is missing.")]
pub(crate) struct Doctor {
    /// Print the report as JSON.
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) host: Host,
}

#[derive(Debug, Args)]
pub(crate) struct Sweep {
    /// Print what was swept as JSON.
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) data: Data,
}

#[derive(Debug, Args)]
pub(crate) struct VmmExec {
    /// The process to die with.
    pub(crate) parent: i32,
    pub(crate) program: OsString,
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) args: Vec<OsString>,
}

/// What is done with templates.
#[derive(Debug, Args)]
pub(crate) struct Template {
    #[command(subcommand)]
    pub(crate) command: TemplateCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TemplateCommand {
    /// Boot a template, let it get ready, and keep the machine as a snapshot: its sandboxes start from it in milliseconds.
    Warm(Warm),
}

const WARM_AFTER_HELP: &str = "\
A snapshot fits only the QEMU, the accelerator and the CPU that it was made with, the same kernel and guest image, and the
template's own --cpus and --memory. Where it does not fit, sandboxes boot and say why. A snapshot that is there is replaced;
sandboxes that run from it keep it.

Exit codes: 0 ok, 1 failure, 2 bad usage or bad input, 4 this host misses something that sandboxes need.";

#[derive(Debug, Args)]
#[command(after_help = WARM_AFTER_HELP)]
pub(crate) struct Warm {
    /// Name of a template, or the path of a template's folder.
    #[arg(required_unless_present = "all")]
    template: Option<String>,

    /// Every template of the data folder that can be booted.
    #[arg(long, conflicts_with = "template")]
    pub(crate) all: bool,

    #[command(flatten)]
    pub(crate) host: Host,

    /// What runs the guest's instructions.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) accel: AcceleratorChoice,

    /// Seconds until the machine must have booted.
    #[arg(long, value_name = "SECONDS", default_value_t = host_shim::spec::DEFAULT_BOOT_TIMEOUT_S)]
    pub(crate) boot_timeout: u64,

    /// Print a line of JSON for each snapshot: paths, what it cost, phases.
    #[arg(long)]
    pub(crate) json: bool,

    /// No progress and no notices on stderr.
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

impl Warm {
    /// The templates that are meant.
    pub(crate) fn templates(&self, data: &DataDir) -> Result<Vec<TemplateFolder>, Error> {
        if let Some(name) = &self.template {
            return Ok(vec![TemplateFolder::open(&find_template(name, data)?)?]);
        }
        let mut templates = Vec::new();
        for name in TemplateFolder::list(&data.templates())? {
            let template = TemplateFolder::open(&data.templates().join(name.as_str()))?;
            if !template.template().snapshot_only {
                templates.push(template);
            }
        }
        Ok(templates)
    }
}

impl Data {
    /// The data folder.
    pub(crate) fn resolve(&self) -> Result<DataDir, Error> {
        DataDir::resolve(self.data_dir.as_deref()).ok_or_else(|| Error::Invalid {
            what: "data folder".to_owned(),
            reason: "neither --data-dir nor $XDG_DATA_HOME nor $HOME names one".to_owned(),
        })
    }
}

impl Run {
    /// The folder of a template.
    pub(crate) fn template_path(&self, name: &str) -> Result<PathBuf, Error> {
        find_template(name, &self.host.data.resolve()?)
    }

    /// The spec and the command of `run TEMPLATE`.
    pub(crate) fn template_spec(&self, data: &DataDir) -> Result<(SandboxSpec, Vec<String>), Error> {
        let path = find_template(self.template.as_deref().unwrap_or_default(), data)?;
        let runtime = TemplateFolder::open(&path)?.template().runtime.clone();
        let machine = &self.machine;
        let spec = SandboxSpec {
            kernel: self.host.kernel.clone(),
            guest_image: self.host.guest_image.clone(),
            cpus: machine.cpus,
            memory_mib: machine.memory,
            disk_mib: machine.disk,
            channel: machine.channel,
            accelerator: machine.accel,
            profile: machine.profile,
            init: machine.init.clone(),
            env: environment(&machine.env)?,
            user: machine.user.clone(),
            workdir: machine.workdir.clone(),
            hostname: machine.hostname.clone(),
            boot_timeout_s: Some(machine.boot_timeout),
            ..SandboxSpec::new(path)
        };
        let argv = command(runtime, machine.entrypoint.as_deref(), self.command.clone())?;
        Ok((spec, argv))
    }
}

/// ENTRYPOINT + CMD, the latter replaced by the user's; another entrypoint drops the image's CMD, as in docker.
fn command(
    runtime: RuntimeConfig,
    entrypoint: Option<&str>,
    command: Vec<String>,
) -> Result<Vec<String>, Error> {
    let mut argv = match entrypoint {
        None => runtime.entrypoint,
        Some("") => Vec::new(),
        Some(program) => vec![program.to_owned()],
    };
    argv.extend(if command.is_empty() && entrypoint.is_none() { runtime.cmd } else { command });
    if argv.first().is_none_or(String::is_empty) {
        return Err(Error::Invalid {
            what: "command".to_owned(),
            reason: "the image has neither ENTRYPOINT nor CMD: give a command after `--`".to_owned(),
        });
    }
    Ok(argv)
}

fn environment(given: &[String]) -> Result<BTreeMap<String, String>, Error> {
    let mut env = BTreeMap::new();
    for entry in given {
        match entry.split_once('=') {
            Some((name, value)) => drop(env.insert(name.to_owned(), value.to_owned())),
            // As in docker: a variable that is not set here is not set there.
            None => match std::env::var(entry) {
                Ok(value) => drop(env.insert(entry.clone(), value)),
                Err(std::env::VarError::NotPresent) => {}
                Err(error) => {
                    return Err(Error::Invalid {
                        what: "env".to_owned(),
                        reason: format!("{entry}: {error}"),
                    });
                }
            },
        }
    }
    Ok(env)
}

fn find_template(name: &str, data: &DataDir) -> Result<PathBuf, Error> {
    let path = Path::new(name);
    if name.contains('/') || name.starts_with('.') {
        return Ok(path.to_owned());
    }
    let templates = data.templates();
    if let Ok(plain) = name.parse::<template::TemplateName>() {
        let folder = templates.join(plain.as_str());
        if folder.exists() {
            return Ok(folder);
        }
    }
    if path.join(TEMPLATE_FILE).exists() {
        return Ok(path.to_owned());
    }
    let known = TemplateFolder::list(&templates)?;
    let known = known.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(", ");
    let there = if known.is_empty() { "there are none".to_owned() } else { format!("there are: {known}") };
    let reason = format!(
        "no template {name:?} in {} ({there}), and no folder of that name here; make one with \
         `image-builder template create`",
        templates.display()
    );
    Err(Error::Invalid { what: "template".to_owned(), reason })
}

/// MiB, or a number with a unit.
fn mib(text: &str) -> Result<u64, String> {
    let expected = || format!("expected MiB or a number with the unit m or g, got {text:?}");
    let lower = text.to_ascii_lowercase();
    let (digits, factor) = match lower.trim_end_matches("ib").trim_end_matches('b') {
        number if number.ends_with('g') => (number.trim_end_matches('g'), 1024),
        number => (number.trim_end_matches('m'), 1),
    };
    let number: u64 = digits.parse().map_err(|_| expected())?;
    number.checked_mul(factor).ok_or_else(expected)
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
    fn sizes_have_units() {
        for (text, expected) in [("512", 512), ("512m", 512), ("2g", 2048), ("2GiB", 2048), ("1GB", 1024)] {
            assert_eq!(mib(text), Ok(expected));
        }
        for text in ["", "g", "-1", "1.5g", "1t", "99999999999999999999", "18446744073709551615g"] {
            assert!(mib(text).is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn entrypoint_and_cmd_are_those_of_docker() {
        let list = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let image = |entrypoint: &[&str], cmd: &[&str]| RuntimeConfig {
            entrypoint: list(entrypoint),
            cmd: list(cmd),
            ..RuntimeConfig::default()
        };
        for (runtime, entrypoint, given, expected) in [
            (image(&["/e"], &["c"]), None, list(&[]), list(&["/e", "c"])),
            (image(&["/e"], &["c"]), None, list(&["x", "y"]), list(&["/e", "x", "y"])),
            (image(&["/e"], &["c"]), Some("/f"), list(&[]), list(&["/f"])),
            (image(&["/e"], &["c"]), Some(""), list(&["x"]), list(&["x"])),
            (image(&[], &["c"]), None, list(&[]), list(&["c"])),
        ] {
            assert_eq!(command(runtime, entrypoint, given).unwrap(), expected);
        }
        let error = command(image(&[], &[]), None, vec![]).unwrap_err();
        assert!(error.to_string().contains("give a command after `--`"));
    }

    #[test]
    fn an_unknown_template_names_those_that_are_there() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::resolve(Some(dir.path())).unwrap();
        let error = find_template("nope", &data).unwrap_err();
        assert!(error.to_string().contains("there are none") && error.is_bad_input(), "{error}");
        assert_eq!(find_template("./nope", &data).unwrap(), Path::new("./nope"));
    }
}
