//! The options of `image-builder build` that are about RUN steps.

use std::time::Duration;

use clap::{Args, ValueEnum};
use image_builder::limits::{Cpus, Pids, StepLimits, Ulimit, parse_duration, parse_size};
use image_builder::{Error, Isolation, Network, RunOptions, SecretSource, Secrets};

#[derive(Debug, Args)]
#[command(next_help_heading = "RUN steps")]
pub(super) struct RunArgs {
    /// Where they run
    #[arg(long, value_enum, default_value = "auto")]
    pub(super) isolation: IsolationArg,
    /// A secret for RUN --mount=type=secret: id=ID[,src=FILE][,env=NAME]; may be given more than once
    #[arg(long, value_name = "SECRET")]
    secret: Vec<SecretSource>,
    /// Their network
    #[arg(long, value_enum, default_value = "host")]
    network: NetworkArg,
    /// The most memory of a step, as 512m
    #[arg(long, short, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,
    /// The most processors that a step keeps busy, as 1.5
    #[arg(long, value_name = "NUMBER")]
    cpus: Option<Cpus>,
    /// The most processes and threads of a step; 0 for no limit [default: 16384, where this machine can]
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    pids_limit: Option<Pids>,
    /// The longest time of a step, as 90s or 1h30m
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    step_timeout: Option<Duration>,
    /// The size of /dev/shm [default: 64m]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    shm_size: Option<u64>,
    /// A resource limit of processes, as nofile=1024:4096; may be given more than once
    #[arg(long, value_name = "LIMIT")]
    ulimit: Vec<Ulimit>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum IsolationArg {
    /// The first that works
    Auto,
    /// Containers on this machine, as root or in a user namespace
    Container,
    /// A virtual machine
    Vm,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum NetworkArg {
    /// This machine's; the same as default
    #[value(alias = "default")]
    Host,
    /// A network namespace with nothing but loopback; RUN --network=host is an error
    None,
    /// The same as none
    Isolated,
}

impl From<IsolationArg> for Isolation {
    fn from(arg: IsolationArg) -> Self {
        match arg {
            IsolationArg::Auto => Self::Auto,
            IsolationArg::Container => Self::Container,
            IsolationArg::Vm => Self::Vm,
        }
    }
}

impl RunArgs {
    /// Reads the secrets, too: a missing one is told before anything is built.
    pub(super) fn options(&self) -> Result<RunOptions, Error> {
        let mut limits = StepLimits {
            memory: self.memory,
            cpus: self.cpus,
            timeout: self.step_timeout,
            ulimits: self.ulimit.clone(),
            ..StepLimits::default()
        };
        limits.pids = self.pids_limit.unwrap_or_default();
        limits.shm_size = self.shm_size.unwrap_or(limits.shm_size);
        let network = match self.network {
            NetworkArg::Host => Network::Host,
            NetworkArg::None | NetworkArg::Isolated => Network::None,
        };
        Ok(RunOptions { secrets: Secrets::read(&self.secret)?, network, limits })
    }
}
