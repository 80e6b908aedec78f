//! `image-builder template push`, `pull`, `export` and `import`.

use std::path::PathBuf;

use clap::Subcommand;
use image_builder::template_transfer::{self, TransferReport};
use image_builder::{Console, Error, Interrupt};
use oci::{ImageName, ImageReference};
use template::{DataDir, TemplateName};

use super::print;
use super::registry::RegistryArgs;

#[derive(Debug, Subcommand)]
pub(super) enum TransferCommand {
    /// Bring a template to a registry
    #[command(after_help = concat!(
        "Examples:\n",
        "  image-builder template push web docker://registry.example/templates/web:3\n\n",
        "It is an OCI artifact: what to run, and the root file system in chunks of 1 MiB or more. Chunks that the registry has\n",
        "are not sent. Snapshots stay here: the other machine makes its own with `host-shim template warm`.\n\n",
        "Exit codes: 0 done, 1 it failed, 2 wrong usage or bad input, 130 interrupted."
    ))]
    Push {
        /// The template's name
        name: TemplateName,
        /// docker://REGISTRY/NAME:TAG
        destination: ImageReference,
        /// Print the result as JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        registry: RegistryArgs,
    },
    /// Fetch a template from a registry
    #[command(after_help = concat!(
        "Examples:\n",
        "  image-builder template pull docker://registry.example/templates/web:3\n",
        "  image-builder template pull docker://registry.example/templates/web:3 web-next\n\n",
        "A template of that name is replaced when the new one is whole; running sandboxes keep the old one. Chunks that this\n",
        "machine's templates have in common are fetched once.\n\n",
        "Exit codes: 0 done, 1 it failed, 2 wrong usage or bad input, 130 interrupted."
    ))]
    Pull {
        /// docker://REGISTRY/NAME:TAG
        source: ImageReference,
        /// The template's name here [default: the last part of the registry's]
        name: Option<TemplateName>,
        /// Print the result as JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        registry: RegistryArgs,
    },
    /// Write a template to one file
    #[command(after_help = concat!(
        "Examples:\n",
        "  image-builder template export web web.tar\n",
        "  skopeo copy oci-archive:web.tar docker://registry.example/templates/web:3      the same artifact\n\n",
        "Exit codes: 0 done, 1 it failed, 2 wrong usage or bad input, 130 interrupted."
    ))]
    Export {
        /// The template's name
        name: TemplateName,
        /// The file, which is replaced
        file: PathBuf,
        /// Print the result as JSON
        #[arg(long)]
        json: bool,
    },
    /// Make a template of a file that export wrote
    #[command(after_help = concat!(
        "Examples:\n",
        "  image-builder template import web.tar\n",
        "  image-builder template import web.tar web-next\n\n",
        "A template of that name is replaced when the new one is whole and every digest is right.\n\n",
        "Exit codes: 0 done, 1 it failed, 2 wrong usage or bad input, 130 interrupted."
    ))]
    Import {
        /// The file
        file: PathBuf,
        /// The template's name here [default: the one that it had]
        name: Option<TemplateName>,
        /// Print the result as JSON
        #[arg(long)]
        json: bool,
    },
}

/// Carries the command out.
pub(super) fn transfer(command: TransferCommand, data: &DataDir, console: &Console) -> anyhow::Result<()> {
    let _interrupt = Interrupt::install()?;
    let (report, json) = match command {
        TransferCommand::Push { name, destination, json, registry } => {
            let destination = in_registry(destination)?;
            (template_transfer::push(data, &name, &destination, &registry.options(), console)?, json)
        }
        TransferCommand::Pull { source, name, json, registry } => {
            let source = in_registry(source)?;
            (template_transfer::pull(data, &source, name.as_ref(), &registry.options(), console)?, json)
        }
        TransferCommand::Export { name, file, json } => {
            (template_transfer::export(data, &name, &file, console)?, json)
        }
        TransferCommand::Import { file, name, json } => {
            (template_transfer::import(data, &file, name.as_ref(), console)?, json)
        }
    };
    let TransferReport { name, place, digest, chunks, moved, .. } = &report;
    print(json, &report, &format!("{name} {place} {digest}\n{moved} of {chunks} chunks moved"))
}

fn in_registry(reference: ImageReference) -> Result<ImageName, Error> {
    match reference {
        ImageReference::Registry(name) | ImageReference::Name(name) => Ok(name),
        other => Err(Error::Invalid {
            what: other.to_string(),
            reason: "expected docker://REGISTRY/NAME:TAG; for files there are template export and import"
                .to_owned(),
        }),
    }
}
