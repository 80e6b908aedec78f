//! The command line: a file for each group of verbs.

mod inside;
mod life;
mod look;
mod network;
mod run;
mod template;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

pub(crate) use inside::{Copy, Exec, Logs, PortForward, Process, Ps, Shell};
pub(crate) use life::{Configure, Fork, Pause, Remove, Restore, Resume, Snapshot, Start, Stop, labels};
pub(crate) use look::{CompletionShell, Completions, Debug, Inspect, List, Stats};
pub(crate) use network::NetworkVerb;
pub(crate) use run::{Data, Host, Run, find_template};
pub(crate) use template::{Template, TemplateCommand};

const AFTER_HELP: &str = "\
Examples:
  host-shim doctor                              what this host can do, and what to install
  host-shim run python -- python3 -c 'print(1)' run a command in a fresh sandbox of the template `python`
  id=$(host-shim start python)                  a sandbox that stays; then:
  host-shim exec $id -- python3 -c 'print(1)'     run a command in it
  host-shim shell $id                             look around in it
  host-shim cp ./app $id:/srv                     copy files into it, or out of it
  host-shim stop $id && host-shim rm $id          end it, and forget it
  host-shim run --spec spec.json --dir /run/s1  a sandbox for an orchestrator; talk to it by the sockets in /run/s1

An ID is a sandbox's id, the beginning of one, what --name said, or the path of its folder (with a slash in it).
Exit codes: 0 ok, 1 failure, 2 bad usage or bad input. `run TEMPLATE`, `start`, `exec` and `shell` have docker's as well
(125, 126, 127, 128 + n): see their --help.";

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
    /// Start a sandbox that stays; print its id.
    Start(Box<Start>),
    /// Run a command in a sandbox.
    Exec(Exec),
    /// Open a shell in a sandbox: `exec -it` with the user's shell.
    Shell(Shell),
    /// Copy files between a sandbox and this machine, or between sandboxes.
    Cp(Copy),
    /// List sandboxes.
    #[command(visible_alias = "list")]
    Ls(List),
    /// Show what a sandbox's command, its console or its shim has printed.
    Logs(Logs),
    /// List the processes that were started in a sandbox.
    #[command(visible_alias = "top")]
    Ps(Ps),
    /// Print all that is known about sandboxes, as JSON.
    Inspect(Inspect),
    /// Put sandboxes on the disk, with their processes, and free their memory.
    Pause(Pause),
    /// Bring a paused sandbox back.
    Resume(Resume),
    /// Make a template of a running sandbox.
    Snapshot(Snapshot),
    /// Make sandboxes that go on from where a running one is.
    Fork(Fork),
    /// Make a parked sandbox somebody's.
    Configure(Configure),
    /// End sandboxes.
    Stop(Stop),
    /// Remove sandboxes that have ended.
    #[command(visible_alias = "remove")]
    Rm(Remove),
    /// Show what sandboxes use of CPU, memory and disk.
    Stats(Stats),
    /// Show what a sandbox's network lets through, or change it while it runs.
    Network(NetworkVerb),
    /// Let programs here connect to ports in a sandbox.
    PortForward(PortForward),
    /// Gather what helps in a report of a fault.
    Debug(Debug),
    /// Print what makes the Tab key complete verbs, ids and templates.
    Completions(Completions),
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
    /// Hold the network of a sandbox, until the other end of standard input is gone.
    #[command(name = host_shim::network::HELPER, hide = true)]
    NetworkHelper {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Sweep a sandbox's folder when the other end of standard input is gone.
    #[command(name = host_shim::reaper::REAP, hide = true)]
    Reap { folder: PathBuf },
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

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_has_help_with_an_example_or_says_how_it_ends() {
        for verb in Cli::command().get_subcommands_mut().filter(|verb| !verb.is_hide_set()) {
            let help = verb.render_long_help().to_string();
            let told = help.contains("Example") || help.contains("Exit codes");
            // These three print one thing.
            let plain = ["spec", "sweep", "template"].contains(&verb.get_name());
            assert!(told || plain, "{help}");
        }
    }
}
