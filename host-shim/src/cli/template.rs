//! `template`: what is done with templates.

use clap::{Args, Subcommand};
use host_shim::Error;
use sandbox_folder::spec::{AcceleratorChoice, VmmChoice};
use template::{DataDir, TemplateFolder};

use super::run::{Host, find_template};
use crate::verbs::complete;

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
Examples:
  host-shim template warm python                for this host; again after an update of the VMM, kernel or agent
  host-shim template warm --all --json

A snapshot fits only the VMM, the accelerator and the CPU that it was made with, the same kernel and guest image, and the
template's own --cpus and --memory. Where it does not fit, sandboxes boot and say why. A snapshot that is there is replaced;
sandboxes that run from it keep it.

Exit codes: 0 ok, 1 failure, 2 bad usage or bad input, 4 this host misses something that sandboxes need.";

#[derive(Debug, Args)]
#[command(after_help = WARM_AFTER_HELP)]
pub(crate) struct Warm {
    /// Name of a template, or the path of a template's folder.
    #[arg(required_unless_present = "all", add = complete::templates())]
    template: Option<String>,

    /// Every template of the data folder that can be booted.
    #[arg(long, conflicts_with = "template")]
    pub(crate) all: bool,

    #[command(flatten)]
    pub(crate) host: Host,

    /// The virtual machine monitor.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) vmm: VmmChoice,

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
