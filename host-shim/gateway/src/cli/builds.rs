//! Options for builds.

use std::time::Duration;

use clap::{Args, ValueEnum};
use tiffin_gateway::builds::{BuildLimits, BuildsConfig, Isolation, RegistryUrl};

/// How templates are built for teams.
#[derive(Debug, Args)]
#[command(next_help_heading = "Builds of templates")]
pub(crate) struct BuildArgs {
    /// Builds at once, of all teams [default: one for each two of this machine's CPUs]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_builds: Option<u32>,

    /// Where RUN steps of teams run
    #[arg(long, value_enum, default_value_t)]
    build_isolation: BuildIsolation,

    /// RUN steps have no network
    #[arg(long)]
    build_offline: bool,

    /// Time that a build has to clean up when it is ended
    #[arg(long, value_name = "SECONDS", default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..=600))]
    build_grace: u64,

    /// A registry that finished builds are pushed to, and from which templates come that are missing here:
    /// https://HOST[:PORT][/PREFIX], or http:// for one without TLS
    #[arg(long, value_name = "URL", env = "TIFFIN_REGISTRY")]
    registry: Option<RegistryUrl>,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum BuildIsolation {
    /// In virtual machines
    #[default]
    Vm,
    /// In containers: root of a step is root of this machine, so only for teams that you trust with it
    Container,
}

impl BuildArgs {
    pub(super) fn config(&self) -> BuildsConfig {
        let default = BuildsConfig::default();
        BuildsConfig {
            at_once: self.max_builds.unwrap_or(default.at_once),
            isolation: match self.build_isolation {
                BuildIsolation::Vm => Isolation::Vm,
                BuildIsolation::Container => Isolation::Container,
            },
            network: !self.build_offline,
            registry: self.registry.clone(),
            grace: Duration::from_secs(self.build_grace),
        }
    }
}

/// What the builds of a team may take.
#[derive(Debug, Args)]
pub(crate) struct BuildLimitArgs {
    /// Builds at once
    #[arg(long, value_name = "N")]
    at_once: Option<u32>,
    /// Builds that have not ended, those that wait among them
    #[arg(long, value_name = "N")]
    queued: Option<u32>,
    /// Templates
    #[arg(long, value_name = "N")]
    templates: Option<u32>,
    /// Disk for uploaded files in MiB
    #[arg(long, value_name = "MiB")]
    uploads: Option<u32>,
    /// Time of a build in minutes
    #[arg(long, value_name = "MINUTES")]
    minutes: Option<u32>,
}

impl BuildLimitArgs {
    /// The limits with what was named changed.
    pub(crate) fn over(&self, limits: BuildLimits) -> BuildLimits {
        BuildLimits {
            at_once: self.at_once.unwrap_or(limits.at_once),
            queued: self.queued.unwrap_or(limits.queued),
            templates: self.templates.unwrap_or(limits.templates),
            uploads_mib: self.uploads.unwrap_or(limits.uploads_mib),
            minutes: self.minutes.unwrap_or(limits.minutes),
        }
    }
}
