//! The verbs about what is in a sandbox.

use clap::Args;

use super::run::{Data, Environment};
use crate::verbs::complete;

/// How a process in a sandbox is started; the options of `exec` and `shell`.
#[derive(Debug, Args)]
pub(crate) struct Process {
    #[command(flatten)]
    pub(crate) environment: Environment,

    /// User name or id, with `:group` if wanted.
    #[arg(short, long)]
    pub(crate) user: Option<String>,

    /// Working directory.
    #[arg(short, long, value_name = "PATH")]
    pub(crate) workdir: Option<String>,

    /// The keys that leave a terminal, its process running: letters, or ctrl- and one of a-z @ [ \ ] ^ _.
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q", value_parser = crate::verbs::detach::Keys::parse)]
    pub(crate) detach_keys: crate::verbs::detach::Keys,

    #[command(flatten)]
    pub(crate) data: Data,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  host-shim exec web -- ls -l /srv               standard output, errors and the exit code are carried through
  tar c . | host-shim exec -i web -- tar x -C /srv
  host-shim exec -it web -- python3              a terminal; Ctrl-P Ctrl-Q leaves it, and python3 goes on
  host-shim exec -d web -- ./serve               starts it and returns

The `--` may be left out. Without -t, SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGTSTP and SIGCONT go to the
process in the sandbox; the third of the first four that is not answered ends `exec`.

Exit codes: the command's own; 128 + n when signal n ended it (141 when nobody reads the output any more); 125 when
host-shim or the sandbox failed; 126 when the command cannot be executed; 127 when it was not found; 0 after leaving it
with the keys; 2 for wrong options.")]
pub(crate) struct Exec {
    /// Standard input goes to the command.
    #[arg(short, long)]
    pub(crate) interactive: bool,

    /// The command has a terminal: with -i, this one's.
    #[arg(short, long)]
    pub(crate) tty: bool,

    /// Start the command and return.
    #[arg(short, long, conflicts_with_all = ["interactive", "tty"])]
    pub(crate) detach: bool,

    #[command(flatten)]
    pub(crate) process: Process,

    /// Print the result as a line of JSON: on stderr at the end, with -d on stdout.
    #[arg(long)]
    pub(crate) json: bool,

    /// The sandbox.
    #[arg(add = complete::ids())]
    pub(crate) id: String,

    /// The command with its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  host-shim shell -u root web

The shell is the one that /etc/passwd of the sandbox names for the user, else /bin/sh. Exit codes: as `exec`.")]
pub(crate) struct Shell {
    #[command(flatten)]
    pub(crate) process: Process,

    /// The sandbox.
    #[arg(add = complete::ids())]
    pub(crate) id: String,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  host-shim cp ./app web:/srv              /srv/app, or /srv when that is not there yet
  host-shim cp ./app/. web:/srv            what is in ./app, into /srv
  host-shim cp web:/var/log/app.log .      out of the sandbox
  host-shim cp web:/srv db:/srv            from one sandbox to another
  host-shim cp web:/srv - | tar t          as a tar stream; `cp - web:/srv` unpacks one
  host-shim cp ./a:b web:/srv              a path with a colon begins with `.` or `/`

The rules are docker's: a directory goes into one that is there and becomes one that is not; a path that ends with `/.`
means what is in the directory; a path in the sandbox that does not begin with / counts from /. Modes, times and links are
kept; in the sandbox the files belong to --user, here to you. Files appear whole or not at all. Devices, FIFOs and
sockets are left out and told.

Exit codes: 0 ok, 1 failure or something was left out.")]
pub(crate) struct Copy {
    /// Follow the link that SRC is.
    #[arg(short = 'L', long)]
    pub(crate) follow_link: bool,

    /// Whom the files belong to in the sandbox; its default user when absent.
    #[arg(short, long)]
    pub(crate) user: Option<String>,

    /// No progress on stderr.
    #[arg(short, long)]
    pub(crate) quiet: bool,

    /// What to copy: PATH, ID:PATH, or - for a tar stream on standard input.
    #[arg(value_name = "SRC", add = complete::ids())]
    pub(crate) source: std::ffi::OsString,

    /// Where to: PATH, ID:PATH, or - for a tar stream on standard output.
    #[arg(value_name = "DST", add = complete::ids())]
    pub(crate) destination: std::ffi::OsString,

    #[command(flatten)]
    pub(crate) data: Data,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  host-shim logs -f web             what the command of `start TEMPLATE -- CMD` prints
  host-shim logs --tail 20 --console web

The sandbox keeps the last MiB of the command's output, and for an hour after its end; the console and the shim's
log are files of its folder, and stay. Exit codes: 0 ok, 1 failure.")]
pub(crate) struct Logs {
    /// Go on with what comes.
    #[arg(short, long)]
    pub(crate) follow: bool,

    /// Only the last lines.
    #[arg(short = 'n', long, value_name = "LINES")]
    pub(crate) tail: Option<usize>,

    /// The machine's console: its kernel and its agent.
    #[arg(long, conflicts_with = "shim")]
    pub(crate) console: bool,

    /// What host-shim wrote about it.
    #[arg(long)]
    pub(crate) shim: bool,

    /// The sandbox.
    #[arg(add = complete::ids())]
    pub(crate) id: String,

    #[command(flatten)]
    pub(crate) data: Data,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  host-shim ps web

What these processes have started themselves is not in the list: `host-shim exec web -- ps -ef` shows it where the image
has ps. Exit codes: 0 ok, 1 failure.")]
pub(crate) struct Ps {
    /// Print a JSON array.
    #[arg(long)]
    pub(crate) json: bool,

    /// The sandbox.
    #[arg(add = complete::ids())]
    pub(crate) id: String,

    #[command(flatten)]
    pub(crate) data: Data,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  host-shim port-forward web 8080:80           127.0.0.1:8080 here is port 80 in the sandbox
  host-shim port-forward web :80 :443          free ports here; they are printed
  host-shim port-forward web 0.0.0.0:8080:80 '[::1]:8443:443'

A line for each, `ADDRESS:PORT -> PORT`, is printed once all of them listen. It runs until Ctrl-C or SIGTERM.
Exit codes: 0 after such a signal, 1 when the sandbox ended or a port could not be opened.")]
pub(crate) struct PortForward {
    /// Print the lines as JSON.
    #[arg(long)]
    pub(crate) json: bool,

    /// The sandbox.
    #[arg(add = complete::ids())]
    pub(crate) id: String,

    /// Ports; LOCAL 0 or left out means any free one, and BIND is 127.0.0.1 when left out.
    #[arg(required = true, value_name = "[[BIND:]LOCAL:]REMOTE", value_parser = crate::verbs::port_forward::Forward::parse)]
    pub(crate) ports: Vec<crate::verbs::port_forward::Forward>,

    #[command(flatten)]
    pub(crate) data: Data,
}
