//! The verbs that show sandboxes and change nothing.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::run::{Data, Host, Sandboxes};
use crate::verbs::complete;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  host-shim ls                            those that live or are paused
  host-shim ls -aq --filter label=job=7   ids of all with that label
  host-shim rm $(host-shim ls -q --filter phase=ended)

Filters: label=KEY, label=KEY=VALUE, name=TEXT, template=NAME, phase=PHASE; several of them all have to fit. A filter
for the phase implies -a. Exit codes: 0 ok, 1 failure.")]
pub(crate) struct List {
    /// Those that have ended too.
    #[arg(short, long)]
    pub(crate) all: bool,

    /// Only the ids.
    #[arg(short, long, conflicts_with = "json")]
    pub(crate) quiet: bool,

    /// Only what fits.
    #[arg(short, long = "filter", value_name = "KEY=VALUE", value_parser = crate::verbs::list::Filter::parse)]
    pub(crate) filters: Vec<crate::verbs::list::Filter>,

    /// Print a JSON array.
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) data: Data,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  host-shim inspect web | jq '.[0].phase'

Prints a JSON array, an object for each sandbox: id, name, phase, dir, state (state.json), spec (spec.json without its
access token). Exit codes: 0 ok, 1 one of them is not known.")]
pub(crate) struct Inspect {
    #[command(flatten)]
    pub(crate) given: Sandboxes,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  host-shim stats                     of all that run, again each second, until Ctrl-C
  host-shim stats --no-stream --json web

CPU is a share of one CPU, so that two busy ones are 200 %. Exit codes: 0 ok, 1 failure.")]
pub(crate) struct Stats {
    /// Once.
    #[arg(long)]
    pub(crate) no_stream: bool,

    /// Print a line of JSON for each sandbox.
    #[arg(long)]
    pub(crate) json: bool,

    /// Sandboxes; all that run when absent.
    #[arg(value_name = "ID", add = complete::ids())]
    pub(crate) ids: Vec<String>,

    #[command(flatten)]
    pub(crate) data: Data,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  host-shim debug web
  host-shim debug web --bundle web.tar.gz     the same as files, with more of the logs

Values of environment variables and the access token are left out; the logs are as the sandbox wrote them: look through
them before you give them away. Exit codes: 0 ok, 1 failure.")]
pub(crate) struct Debug {
    /// The sandbox.
    #[arg(add = complete::ids())]
    pub(crate) id: String,

    /// Write a .tar.gz in place of printing.
    #[arg(long, value_name = "FILE")]
    pub(crate) bundle: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) host: Host,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  echo 'source <(host-shim completions bash)' >> ~/.bashrc
  echo 'source <(host-shim completions zsh)' >> ~/.zshrc
  host-shim completions fish > ~/.config/fish/completions/host-shim.fish")]
pub(crate) struct Completions {
    /// The shell.
    pub(crate) shell: CompletionShell,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum CompletionShell {
    Bash,
    Zsh,
    Fish,
}
