//! The command line.

mod build;
mod images;
mod templates;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use image_builder::{BootstrapOptions, Console, Error, Interrupt};
use oci::{ImageName, ImageReference, Store};
use serde::Serialize;
use template::DataDir;

use build::BuildCommand;
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
    /// Show no progress
    #[arg(long, short, global = true)]
    quiet: bool,
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
        "  image-builder build -t app --build-context alpine=docker-image://mine:1 --build-context assets=../assets .\n",
        "  image-builder build -t box --e2b-user --steps template.json --files uploads --template-image base=debian:bookworm\n\n",
        "RUN steps run as root on this machine, in containers with the host's network: build only Dockerfiles that you\n",
        "trust. Needs root; --check does not.\n\n",
        "The Dockerfile is CONTEXT/Dockerfile, else CONTEXT/e2b.Dockerfile. Rules of --check have the names of BuildKit's build\n",
        "checks; `# check=skip=RULE,...;error=true` at the top of a Dockerfile leaves some out, and makes the others errors.\n\n",
        "Exit codes: 0 done, 1 it failed, 2 wrong usage or bad input (also: warnings that the Dockerfile makes errors), 130\n",
        "interrupted. With --check: 0 no warnings, or none that is an error; 2 the Dockerfile is wrong, or warnings are errors."
    ))]
    Build(BuildCommand),
    /// Bring an image into the local store, from files or a registry
    #[command(after_help = concat!(
        "Examples:\n",
        "  image-builder load oci-archive:app.tar -t app:1\n",
        "  image-builder load oci:/srv/layout:v2 -t app:2\n",
        "  image-builder load alpine:3.20 -t alpine:3.20      pulls from docker.io\n\n",
        "Exit codes: 0 done, 1 it failed, 2 wrong usage or bad input."
    ))]
    Load {
        /// A name, oci:DIR[:TAG], oci-archive:FILE[:TAG], or what skopeo reads: docker://NAME, docker-archive:FILE, dir:DIR, ..
        source: ImageReference,
        /// The name that it gets
        #[arg(long, short, value_name = "NAME")]
        tag: ImageName,
        /// Print the result as JSON
        #[arg(long)]
        json: bool,
    },
    /// Write an image of the local store to files that skopeo and others read
    #[command(after_help = concat!(
        "Examples:\n",
        "  image-builder save app:1 -o oci-archive:app.tar\n",
        "  image-builder save app:1 -o oci:/srv/layout:v1\n\n",
        "Exit codes: 0 done, 1 it failed, 2 wrong usage or bad input."
    ))]
    Save {
        /// The image's name
        name: ImageName,
        /// oci:DIR[:TAG] or oci-archive:FILE[:TAG]
        #[arg(long, short, value_name = "DEST")]
        output: ImageReference,
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
    /// Make and look after templates, which sandboxes start from
    #[command(subcommand)]
    Template(TemplateCommand),
    /// The other half of a RUN step
    #[command(hide = true)]
    RunContainer { bundle: PathBuf, id: String, parent: u32 },
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
    match carry_out(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Our own errors say their causes themselves.
            match error.downcast_ref::<Error>() {
                Some(error) => eprintln!("image-builder: {error}"),
                None => eprintln!("image-builder: {error:#}"),
            }
            match error.downcast_ref::<Error>() {
                Some(Error::Interrupted) => ExitCode::from(image_builder::EXIT_INTERRUPTED as u8),
                Some(error) if error.is_bad_input() => ExitCode::from(2),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn carry_out(cli: Cli) -> anyhow::Result<()> {
    let data = DataDir::resolve(cli.global.data_dir.as_deref())
        .context("no data folder: neither --data-dir nor $HOME is set")?;
    let console = Console::new(cli.global.quiet);
    let store = || Store::open_or_create(&data.images()).map_err(Error::from);
    match cli.command {
        Command::Build(command) => build::build(command, &data, &console),
        Command::Load { source, tag, json } => {
            let _interrupt = Interrupt::install()?;
            let digest = image_builder::load(&store()?, &source, &tag, &console)?;
            let name = tag.canonical();
            print(json, &serde_json::json!({"name": name, "digest": digest}), &format!("{name} {digest}"))
        }
        Command::Save { name, output } => {
            let _interrupt = Interrupt::install()?;
            let digest = image_builder::save(&store()?, &name, &output, &console)?;
            line(&format!("{output} {digest}"))
        }
        Command::Images { json } => images::images(&store()?, json),
        Command::Bootstrap { name, variant, mirror, force, json } => {
            let interrupt = Interrupt::install()?;
            let options = BootstrapOptions { name, variant, mirror, force };
            let report = image_builder::bootstrap(&data, &options, &console, &interrupt)?;
            if report.existed {
                console.line(&format!("{} is there already; --force makes it anew", report.name));
            }
            print(json, &report, &format!("{} {}", report.name, report.digest))
        }
        Command::Template(command) => templates::template(command, &data, &console),
        Command::RunContainer { .. } => Ok(()),
    }
}

/// Prints the result: one line of JSON, or the text.
fn print(json: bool, value: &impl Serialize, text: &str) -> anyhow::Result<()> {
    match json {
        true => line(&serde_json::to_string(value)?),
        false => line(text),
    }
}

fn line(text: &str) -> anyhow::Result<()> {
    match writeln!(std::io::stdout().lock(), "{text}") {
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
