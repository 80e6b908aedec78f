//! `run`, and the options that it shares with `start`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args};
use host_shim::{Error, tools};
use sandbox_folder::spec::{
    AcceleratorChoice, ChannelChoice, DiskSpec, ProfileChoice, SandboxSpec, VmmChoice,
};
use template::{DataDir, RuntimeConfig, TEMPLATE_FILE, TemplateFolder};

use super::network::NetworkOptions;
use crate::verbs::complete;

const RUN_AFTER_HELP: &str = "\
Examples:
  host-shim run alpine                          the image's own ENTRYPOINT and CMD
  host-shim run alpine -- ls -l /               ENTRYPOINT stays, as with `docker run`; --entrypoint '' drops it
  host-shim run --memory 1g --cpus 2 -e A=1 -w /srv build -- make
  host-shim run --timings alpine -- true        where the time goes
  host-shim run --spec spec.json --dir /run/s1           a sandbox for an orchestrator
  host-shim run --resume --dir /run/s1                   the paused sandbox of that folder goes on
  host-shim run --spec spec.json --resume --dir /run/s1  whichever of the two it is: for units that are started again

The first Ctrl-C or SIGTERM asks the command (with --dir: the sandbox) to end, the second ends it at once.

With --dir it stays in the foreground and uses these:
  stdout     one line of JSON when the sandbox is ready: `ready`, `dir`, `total_ms`, and all of state.json with the `phases`
  sd_notify  READY=1 then; STOPPING=1 when it ends; EXTEND_TIMEOUT_USEC while an end waits for a snapshot under way
  stderr     notes for people (not with --quiet), and why it failed; events are in DIR/shim.log, a line of JSON for each
  SIGTERM    its processes get SIGTERM and have 10 s, then the machine has 10 s to power off; a snapshot under way is finished first
  SIGKILL    its VMM dies with it; the next run on DIR, or `host-shim sweep`, cleans up what is left
Units for systemd and other orchestrators: host-shim/examples/orchestrators.

Exit codes of `run TEMPLATE`: the command's own; 128 + n when signal n ended it; 125 when host-shim or the VM failed,
also for bad input behind valid usage; 126 when the command cannot be executed; 127 when it was not found.
Exit codes with --dir: 0 stopped or powered off (also before it was ready), 1 failed or crashed, 2 bad input, or the folder
is another shim's, 3 paused: it can be resumed.
Wrong options are always 2.";

#[derive(Debug, Args)]
#[command(after_help = RUN_AFTER_HELP, group = ArgGroup::new("for_others").args(["spec", "resume"]).multiple(true))]
pub(crate) struct Run {
    /// Name of a template, or the path of a template's folder.
    #[arg(required_unless_present_any = ["spec", "resume"], conflicts_with = "spec", add = complete::templates())]
    pub(crate) template: Option<String>,

    /// The command with its arguments; the image's own when absent.
    #[arg(last = true, conflicts_with = "spec")]
    pub(crate) command: Vec<String>,

    /// Run the sandbox that this file describes (see `host-shim spec --schema`), until it ends or SIGTERM comes.
    #[arg(long, value_name = "FILE", requires = "dir", conflicts_with_all = ["Machine", "hostname"])]
    pub(crate) spec: Option<PathBuf>,

    /// Let the paused sandbox in --dir go on; with --spec, run that where none is paused. TEMPLATE is needed where its own
    /// is not at its place any more.
    #[arg(long, requires = "dir", conflicts_with_all = ["Machine", "hostname"])]
    pub(crate) resume: bool,

    /// The sandbox's folder for --spec and --resume: sockets, state.json and logs. It is kept.
    #[arg(long, value_name = "DIR", requires = "for_others")]
    pub(crate) dir: Option<PathBuf>,

    /// Restore the sandbox of --spec and hold it, until `POST /configure` on its api.sock makes it somebody's.
    #[arg(long, requires = "spec", conflicts_with = "resume")]
    pub(crate) park: bool,

    /// Begin a session of its own: signals of the caller's terminal and process group do not come here.
    #[arg(long, requires = "dir")]
    pub(crate) new_session: bool,

    #[command(flatten)]
    pub(crate) machine: Machine,

    /// Host name in the sandbox.
    #[arg(long, visible_alias = "name")]
    hostname: Option<String>,

    #[command(flatten)]
    pub(crate) host: Host,

    /// End the sandbox when standard input ends: with its caller, however that ends.
    #[arg(long, conflicts_with_all = ["spec", "resume"])]
    pub(crate) until_eof: bool,

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
    #[arg(long)]
    cpus: Option<u32>,

    /// RAM, in MiB or with a unit: 512, 512m, 2g.
    #[arg(long, value_parser = mib)]
    memory: Option<u64>,

    /// Writable disk, in MiB or with a unit: 1024, 10g.
    #[arg(long, value_parser = mib)]
    disk: Option<u64>,

    /// Give the machine this file as a further disk with a serial number; SERIAL:ro=FILE for one that it only reads.
    #[arg(long, value_name = "SERIAL=FILE")]
    attach: Vec<DiskSpec>,

    #[command(flatten)]
    network: NetworkOptions,

    #[command(flatten)]
    environment: Environment,

    /// User name or id, with `:group` if wanted.
    #[arg(short, long)]
    user: Option<String>,

    /// Working directory.
    #[arg(short, long, value_name = "PATH")]
    workdir: Option<String>,

    /// Instead of the image's ENTRYPOINT; '' for none.
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,

    /// The virtual machine monitor.
    #[arg(long, value_enum, default_value_t)]
    vmm: VmmChoice,

    /// What carries streams between host and guest.
    #[arg(long, value_enum, default_value_t)]
    channel: ChannelChoice,

    /// What runs the guest's instructions.
    #[arg(long, value_enum, default_value_t)]
    accel: AcceleratorChoice,

    /// What the container may do.
    #[arg(long, value_enum, default_value_t)]
    profile: ProfileChoice,

    /// PID 1 of the container: `envd`, `image` (its /sbin/init, as systemd), or the path of a program in the image.
    #[arg(long, value_name = "INIT", default_value = "envd")]
    init: String,

    /// Seconds until the sandbox must be ready.
    #[arg(long, value_name = "SECONDS", default_value_t = host_shim::spec::DEFAULT_BOOT_TIMEOUT_S)]
    boot_timeout: u64,
}

/// Variables of processes.
#[derive(Debug, Args)]
pub(crate) struct Environment {
    /// Set a variable of the environment; NAME alone takes the value from here.
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,

    /// Set the variables that a file has, a NAME=VALUE on each line; # begins a comment.
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
}

impl Environment {
    /// The variables with their values.
    pub(crate) fn read(&self) -> Result<BTreeMap<String, String>, Error> {
        environment(&self.env, &self.env_file)
    }
}

/// Sandboxes that exist.
#[derive(Debug, Args)]
pub(crate) struct Sandboxes {
    /// Sandboxes.
    #[arg(required = true, value_name = "ID", add = complete::ids())]
    pub(crate) ids: Vec<String>,

    #[command(flatten)]
    pub(crate) data: Data,
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
    pub(crate) data_dir: Option<PathBuf>,
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
        let spec = SandboxSpec { hostname: self.hostname.clone(), ..self.machine.spec(&self.host, path)? };
        let argv = self.machine.argv(&spec, self.command.clone())?;
        Ok((spec, argv))
    }
}

impl Machine {
    /// A spec that says what the options say.
    pub(crate) fn spec(&self, host: &Host, template: PathBuf) -> Result<SandboxSpec, Error> {
        Ok(SandboxSpec {
            kernel: host.kernel.clone(),
            guest_image: host.guest_image.clone(),
            cpus: self.cpus,
            memory_mib: self.memory,
            disk_mib: self.disk,
            disks: self.attach.clone(),
            network: self.network.spec(),
            vmm: self.vmm,
            channel: self.channel,
            accelerator: self.accel,
            profile: self.profile,
            init: self.init.clone(),
            env: self.environment.read()?,
            user: self.user.clone(),
            workdir: self.workdir.clone(),
            boot_timeout_s: Some(self.boot_timeout),
            ..SandboxSpec::new(template)
        })
    }

    /// The command of that spec's sandbox.
    pub(crate) fn argv(&self, spec: &SandboxSpec, given: Vec<String>) -> Result<Vec<String>, Error> {
        let runtime = TemplateFolder::open(&spec.template)?.template().runtime.clone();
        command(runtime, self.entrypoint.as_deref(), given)
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

/// The variables of `-e`, over those of `--env-file`.
fn environment(given: &[String], files: &[PathBuf]) -> Result<BTreeMap<String, String>, Error> {
    let mut env = BTreeMap::new();
    for file in files {
        let text = std::fs::read_to_string(file).map_err(|source| Error::Io {
            action: "read",
            path: file.clone(),
            source,
        })?;
        for line in
            text.lines().map(str::trim_start).filter(|line| !line.is_empty() && !line.starts_with('#'))
        {
            set(&mut env, line)?;
        }
    }
    for entry in given {
        set(&mut env, entry)?;
    }
    Ok(env)
}

fn set(env: &mut BTreeMap<String, String>, entry: &str) -> Result<(), Error> {
    let invalid = |reason: String| Error::Invalid { what: "env".to_owned(), reason };
    match entry.split_once('=') {
        Some(("", _)) => return Err(invalid(format!("{entry:?} has no name before the ="))),
        Some((name, value)) => drop(env.insert(name.to_owned(), value.to_owned())),
        // As in docker: a variable that is not set here is not set there.
        None => match std::env::var(entry) {
            Ok(value) => drop(env.insert(entry.to_owned(), value)),
            Err(std::env::VarError::NotPresent) => {}
            Err(error) => return Err(invalid(format!("{entry}: {error}"))),
        },
    }
    Ok(())
}

pub(crate) fn find_template(name: &str, data: &DataDir) -> Result<PathBuf, Error> {
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
pub(crate) fn mib(text: &str) -> Result<u64, String> {
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

    #[test]
    fn variables_come_from_the_line_a_file_and_the_environment() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("env");
        std::fs::write(&file, "# comment\n\n A=1\nB=x=y z\nHOME\nNOT_SET_ANYWHERE\n").unwrap();
        let env = environment(&["A=2".to_owned(), "E=".to_owned()], std::slice::from_ref(&file)).unwrap();
        let expected = [("A", "2"), ("B", "x=y z"), ("E", ""), ("HOME", &std::env::var("HOME").unwrap())];
        assert_eq!(env, expected.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
        assert!(environment(&["=1".to_owned()], &[]).is_err());
        assert!(environment(&[], &[dir.path().join("none")]).unwrap_err().to_string().contains("none"));
    }
}
