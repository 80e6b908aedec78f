//! The command line.

mod build;
mod explain;
mod fsck;
mod images;
mod prune;
mod registry;
mod run;
mod template_transfer;
mod templates;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};
use image_builder::{BootstrapOptions, Console, Error, Interrupt, ProgressMode};
use oci::{ImageName, ImageReference, Store};
use serde::Serialize;
use template::DataDir;

use build::BuildCommand;
use registry::{RegistryArgs, RegistryCommand};
use templates::TemplateCommand;

const EXIT_CODES: &str = "Exit codes: 0 done, 1 it failed, 2 wrong usage or bad input, 130 interrupted.";
/// Builds OCI images from Dockerfiles, and sandbox templates from images.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    global: Global,
}

#[derive(Debug, Args)]
struct Global {
    /// Where images, templates and the cache live [default: tiffin in $XDG_DATA_HOME or ~/.local/share]
    #[arg(long, global = true, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Show no progress, as --progress=quiet
    #[arg(long, short, global = true)]
    quiet: bool,
    /// How progress is shown on stderr
    ///
    /// With json, each line is an object. All have "type" and "time" (RFC 3339, milliseconds). type "step": "step" (as "[build
    /// 2/5]"), "status" (started, cached, shared, done, failed), "message" (the instruction). type "output": "step", "message"
    /// (a line of its command). type "work": "id", "status" (started, running, done), "message", "done" and "total" (bytes;
    /// total is null where it is not known). type "message" and type "error": "message".
    #[arg(long, global = true, value_enum, default_value = "auto", value_name = "MODE")]
    progress: ProgressArg,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ProgressArg {
    /// Bars on a terminal, plain lines elsewhere
    Auto,
    /// Plain lines
    Plain,
    /// Bars; plain lines where stderr is no terminal
    Tty,
    /// One JSON object a line
    Json,
    /// Nothing but errors
    Quiet,
}

impl Global {
    fn console(&self) -> Console {
        Console::with_progress(match self.progress {
            _ if self.quiet => ProgressMode::Quiet,
            ProgressArg::Auto => ProgressMode::Auto,
            ProgressArg::Plain => ProgressMode::Plain,
            ProgressArg::Tty => ProgressMode::Tty,
            ProgressArg::Json => ProgressMode::Json,
            ProgressArg::Quiet => ProgressMode::Quiet,
        })
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build an image from a Dockerfile
    #[command(after_help = concat!(
        "Examples:\n",
        "  image-builder build -t hello .\n",
        "  image-builder build -t app:1 -f docker/Dockerfile --build-arg VERSION=1.2 --target run .\n",
        "  image-builder build -t hello --host-ca .      behind a proxy with its own certificate\n",
        "  image-builder build --check .                 warnings only: nothing is built\n",
        "  image-builder build -t app --secret id=token,env=TOKEN --memory 2g --step-timeout 20m .\n",
        "  image-builder build --output type=oci,dest=app.tar --metadata-file app.json .\n",
        "  image-builder build -t app --cache-from ci-cache --cache-to ci-cache --progress json .\n",
        "  image-builder build -t app --build-context alpine=docker-image://mine:1 --build-context assets=../assets .\n",
        "  image-builder build -t box --e2b-user --steps template.json --files uploads --template-image base=debian:bookworm\n",
        "  SOURCE_DATE_EPOCH=$(git log -1 --format=%ct) image-builder build -t app --rewrite-timestamp .\n\n",
        "Stages that do not need each other are built at the same time. Steps are taken from the cache where instruction, files,\n",
        "build arguments in scope and the layers below are the same; image-builder explain tells why one was not.\n\n",
        "Where RUN steps run (--isolation; auto takes the first that works, and says which):\n",
        "  as root       containers with Docker's capabilities and seccomp profile. Root there is root of\n",
        "                this machine, so build only Dockerfiles that you trust.\n",
        "  as a user     the same in a user namespace with the ids of /etc/subuid and /etc/subgid\n",
        "                (package uidmap). No devices can be made, and --memory, --cpus and --pids-limit\n",
        "                are refused where the user may not make cgroups.\n",
        "  without ids   a user namespace in which only root exists. USER changes nothing; chown and\n",
        "                setuid do nothing and succeed. New files belong to root, files of the layers\n",
        "                below keep their owners.\n",
        "  vm            a virtual machine, where user namespaces are forbidden, and for Dockerfiles that\n",
        "                nobody trusts.\n",
        "Steps have the host's network unless --network says otherwise. --check needs no rights at all.\n\n",
        "The Dockerfile is CONTEXT/Dockerfile, else CONTEXT/e2b.Dockerfile. Rules of --check have the names of BuildKit's build\n",
        "checks; `# check=skip=RULE,...;error=true` at the top of a Dockerfile leaves some out, and makes the others errors.\n\n",
        "Exit codes: 0 done, 1 it failed, 2 wrong usage or bad input (also: warnings that the Dockerfile makes errors), 130\n",
        "interrupted. With --check: 0 no warnings, or none that is an error; 2 the Dockerfile is wrong, or warnings are errors."
    ))]
    Build(Box<BuildCommand>),
    /// Bring an image into the local store, from files or a registry
    #[command(after_help = concat!(
        "Examples:\n",
        "  image-builder load oci-archive:app.tar -t app:1\n",
        "  image-builder load oci:/srv/layout:v2 -t app:2\n",
        "  image-builder load docker-archive:saved.tar -t app:3      what docker save wrote\n",
        "  image-builder load alpine:3.20 -t alpine:3.20             pulls from docker.io\n\n",
        "Exit codes: 0 done, 1 it failed, 2 wrong usage or bad input."
    ))]
    Load {
        /// A name, docker://NAME, oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:NAME], or what skopeo reads:
        /// dir:DIR, docker-daemon:NAME, containers-storage:NAME
        source: ImageReference,
        /// The name that it gets
        #[arg(long, short, value_name = "NAME")]
        tag: ImageName,
        /// Print the result as JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        registry: RegistryArgs,
    },
    /// Write an image of the local store to files that skopeo and others read
    #[command(after_help = concat!(
        "Examples:\n",
        "  image-builder save app:1 -o oci-archive:app.tar\n",
        "  image-builder save app:1 -o oci:/srv/layout:v1\n",
        "  image-builder save app:1 -o docker-archive:app.tar      for docker load\n\n",
        "Exit codes: 0 done, 1 it failed, 2 wrong usage or bad input."
    ))]
    Save {
        /// The image's name
        name: ImageName,
        /// oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:NAME], docker://NAME, or what skopeo writes
        #[arg(long, short, value_name = "DEST")]
        output: ImageReference,
        /// Print the result as JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        registry: RegistryArgs,
    },
    /// List the images of the local store
    #[command(after_help = EXIT_CODES)]
    Images {
        /// Print a JSON list
        #[arg(long)]
        json: bool,
    },
    /// Make a Debian base image from a Debian mirror, without a registry
    #[command(after_help = concat!(
        "Examples:\n",
        "  image-builder bootstrap debian:bookworm\n",
        "  image-builder bootstrap debian:trixie --mirror http://mirror.example/debian\n\n",
        "Needs mmdebstrap. An image of that name that is there already is kept, unless --force is given.\n\n",
        "Exit codes: 0 done or already there, 1 it failed, 2 wrong usage or bad input, 130 interrupted."
    ))]
    Bootstrap {
        /// debian:SUITE
        name: ImageName,
        /// mmdebstrap's variant: which packages are in it
        #[arg(long, default_value = "minbase")]
        variant: String,
        /// The mirror [default: the one of this machine's apt, else mmdebstrap's own choice]
        #[arg(long, value_name = "URL")]
        mirror: Option<String>,
        /// Make it anew even if the name is taken
        #[arg(long)]
        force: bool,
        /// Print the result as JSON
        #[arg(long)]
        json: bool,
    },
    #[command(flatten)]
    Registry(RegistryCommand),
    /// Tell which steps of a build were cached, and why the others were not
    #[command(after_help = explain::HELP)]
    Explain(explain::ExplainCommand),
    /// Remove what builds left and nothing needs
    #[command(after_help = prune::HELP)]
    Prune(prune::PruneCommand),
    /// Look for damage in the local store and the cache
    #[command(after_help = fsck::HELP)]
    Fsck(fsck::FsckCommand),
    /// Make and look after templates, which sandboxes start from
    #[command(subcommand)]
    Template(TemplateCommand),
    /// The other half of a RUN step
    #[command(hide = true)]
    RunContainer { bundle: PathBuf, id: String, parent: u32 },
    /// Whether steps can run that way
    #[command(hide = true)]
    TryIsolation { way: String, folder: PathBuf },
    /// Give a process in a user namespace its ids
    #[command(hide = true)]
    MapIds { pid: u32, uids: String, gids: String },
}

/// Does what the command line says, and gives the exit code.
pub(crate) fn run(cli: Cli) -> ExitCode {
    if let Command::RunContainer { bundle, id, parent } = &cli.command {
        return match image_builder::run_container(bundle, id, *parent) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{}: {error}", bundle.display());
                ExitCode::FAILURE
            }
        };
    }
    let helped = match &cli.command {
        Command::TryIsolation { way, folder } => std::env::current_exe()
            .map_err(|error| error.to_string())
            .and_then(|program| image_builder::isolation::try_isolation(way, folder, &program)),
        Command::MapIds { pid, uids, gids } => image_builder::isolation::map_ids(*pid, uids, gids),
        _ => {
            let console = cli.global.console();
            return report(carry_out(cli, &console), &console);
        }
    };
    match helped {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("{reason}");
            ExitCode::FAILURE
        }
    }
}

fn report(result: anyhow::Result<ExitCode>, console: &Console) -> ExitCode {
    match result {
        Ok(code) => code,
        Err(error) => {
            // Our own errors say their causes themselves.
            console.error(&match error.downcast_ref::<Error>() {
                Some(error) => format!("image-builder: {error}"),
                None => format!("image-builder: {error:#}"),
            });
            match error.downcast_ref::<Error>() {
                Some(Error::Interrupted) => ExitCode::from(image_builder::EXIT_INTERRUPTED as u8),
                Some(error) if error.is_bad_input() => ExitCode::from(2),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn carry_out(cli: Cli, console: &Console) -> anyhow::Result<ExitCode> {
    let data = DataDir::resolve(cli.global.data_dir.as_deref())
        .context("no data folder: neither --data-dir nor $HOME is set")?;
    let store = || Store::open_or_create(&data.images()).map_err(Error::from);
    let done = match cli.command {
        Command::Explain(command) => explain::explain(command, &data),
        Command::Prune(command) => prune::prune(command, &data, console),
        Command::Fsck(command) => return fsck::fsck(command, &data, console),
        Command::Build(command) => build::build(*command, &data, console),
        Command::Load { source, tag, json, registry } => {
            let _interrupt = Interrupt::install()?;
            let digest = image_builder::load(&store()?, &source, &tag, &registry.options(), console)?;
            let name = tag.canonical();
            print(json, &serde_json::json!({"name": name, "digest": digest}), &format!("{name} {digest}"))
        }
        Command::Save { name, output, json, registry } => {
            let _interrupt = Interrupt::install()?;
            let saved = image_builder::save(&store()?, &name, &output, &registry.options(), console)?;
            print(json, &saved, &registry::told(&saved))
        }
        Command::Images { json } => images::images(&store()?, json),
        Command::Bootstrap { name, variant, mirror, force, json } => {
            let interrupt = Interrupt::install()?;
            let options = BootstrapOptions { name, variant, mirror, force };
            let report = image_builder::bootstrap(&data, &options, console, &interrupt)?;
            if report.existed {
                console.line(&format!("{} is there already; --force makes it anew", report.name));
            }
            print(json, &report, &format!("{} {}", report.name, report.digest))
        }
        Command::Registry(command) => registry::registry(command, store, console),
        Command::Template(command) => templates::template(command, &data, console),
        Command::RunContainer { .. } | Command::TryIsolation { .. } | Command::MapIds { .. } => Ok(()),
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// Prints the result: one line of JSON, or the text.
fn print(json: bool, value: &impl Serialize, text: &str) -> anyhow::Result<()> {
    match json {
        true => line(&serde_json::to_string(value)?),
        false => line(text),
    }
}

fn line(text: &str) -> anyhow::Result<()> {
    bytes(format!("{text}\n").as_bytes())
}

fn bytes(bytes: &[u8]) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        // `image-builder images | head` is no failure.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write to stdout"),
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
}
