//! The verbs that begin, end and multiply sandboxes.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;

use super::run::{Data, Environment, Host, Machine, Sandboxes};
use crate::verbs::complete;

const START_HELP: &str = "\
Examples:
  host-shim start python                              prints the id of a new sandbox
  host-shim start --name web -e PORT=80 site -- serve starts a command in it too; `host-shim logs web` shows its output
  host-shim start --rm --timeout 10m python           it ends after ten minutes, and nothing of it stays

The command is started as `docker run -d` does: ENTRYPOINT stays before it. The sandbox goes on when it ends.

Exit codes: 0 ok; 125 when host-shim or the VM failed, also for bad input behind valid usage; 126 when the command cannot be
executed; 127 when it was not found (in both cases the sandbox is gone again); 2 for wrong options.";

/// What the snapshot of a template is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Restore {
    Never,
    Always,
}

#[derive(Debug, Args)]
#[command(after_help = START_HELP)]
pub(crate) struct Start {
    /// Name of a template, or the path of a template's folder.
    #[arg(add = complete::templates())]
    pub(crate) template: String,

    /// A command to start in it, with its arguments.
    #[arg(last = true)]
    pub(crate) command: Vec<String>,

    #[command(flatten)]
    pub(crate) machine: Machine,

    /// Host name in the sandbox; its id when absent.
    #[arg(long)]
    pub(crate) hostname: Option<String>,

    /// A name that the other verbs take in place of the id.
    #[arg(long, value_parser = name)]
    pub(crate) name: Option<String>,

    /// A note about it, which `ls --filter` finds.
    #[arg(short, long = "label", value_name = "KEY=VALUE")]
    pub(crate) labels: Vec<String>,

    /// End it after this time: 90, 90s, 10m, 1h30m.
    #[arg(long, value_name = "DURATION", value_parser = seconds)]
    pub(crate) timeout: Option<u64>,

    /// Remove its folder when it ends.
    #[arg(long)]
    pub(crate) rm: bool,

    /// Boot it, also where the template has a snapshot.
    #[arg(long, conflicts_with = "restore")]
    pub(crate) cold: bool,

    /// Restore the template's snapshot, or fail.
    #[arg(long)]
    pub(crate) restore: bool,

    #[command(flatten)]
    pub(crate) host: Host,

    /// Print all that is known of the ready sandbox as JSON, in place of the id.
    #[arg(long)]
    pub(crate) json: bool,

    /// No progress on stderr.
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  host-shim stop web           its processes get SIGTERM, ten seconds later SIGKILL
  host-shim stop -t 0 4fk2a    at once; what it had not written to its disk yet is lost

The ids are printed as the sandboxes are gone. One that has ended already is no error.
Exit codes: 0 all of them have ended, 1 one of them has not or is not known.")]
pub(crate) struct Stop {
    #[command(flatten)]
    pub(crate) given: Sandboxes,

    /// Seconds that its processes have between SIGTERM and SIGKILL.
    #[arg(short, long, visible_alias = "timeout", value_name = "SECONDS", default_value_t = 10)]
    pub(crate) time: u32,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  host-shim rm web             forgets a sandbox that has ended, or is paused, with its files
  host-shim rm -f web 4fk2a    ends them first

Exit codes: 0 all of them are gone, 1 one of them is not, or was not known (with -f that is no error).")]
pub(crate) struct Remove {
    #[command(flatten)]
    pub(crate) given: Sandboxes,

    /// End a sandbox that runs, at once.
    #[arg(short, long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  host-shim pause web && host-shim resume web

The id is printed once the snapshot is whole and the memory free. Processes, open files and output that nobody has
read are there again after `resume`. Its network is made afresh then: what it has of TCP connections to the outside is reset.
Exit codes: 0 all of them are paused, 1 one of them is not.")]
pub(crate) struct Pause {
    #[command(flatten)]
    pub(crate) given: Sandboxes,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  host-shim resume web
  host-shim resume /mnt/copied/4fk2a --template /srv/templates/site    on another machine, from a copied folder

Exit codes: 0 ok, 1 it could not be brought back; it is still paused then.")]
pub(crate) struct Resume {
    /// The sandbox, or the path of its folder.
    #[arg(value_name = "ID|PATH", add = complete::ids())]
    pub(crate) id: String,

    /// The folder of the template that it was made from, where it is elsewhere now; it is noted in its spec.json.
    #[arg(long, value_name = "DIR")]
    pub(crate) template: Option<PathBuf>,

    /// Print all that is known of the sandbox as JSON, in place of the id.
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) data: Data,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  host-shim snapshot web web-warm && host-shim start web-warm

The sandbox goes on. Exit codes: 0 ok, 1 failure; there is no half template.")]
pub(crate) struct Snapshot {
    /// The sandbox.
    #[arg(add = complete::ids())]
    pub(crate) id: String,

    /// The name of the new template.
    pub(crate) name: String,

    /// Print what was made as JSON, in place of the name.
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) data: Data,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  host-shim fork web                         prints the id of a sandbox that goes on from where `web` is
  host-shim fork web -n 10 -e WORKER=1       ten of them, an id on each line as they become ready

Each has its own identity, disk and random numbers; `web` goes on. When some do not start, the others stay. Each has a network
of its own with the rules of `web`, made afresh: what it has of TCP connections to the outside is reset, those of `web` go on.
Exit codes: 0 ok, 1 one or more did not start.")]
pub(crate) struct Fork {
    /// The sandbox.
    #[arg(add = complete::ids())]
    pub(crate) id: String,

    /// How many.
    #[arg(short = 'n', long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) count: u32,

    #[command(flatten)]
    pub(crate) environment: Environment,

    /// A note about them.
    #[arg(short, long = "label", value_name = "KEY=VALUE")]
    pub(crate) labels: Vec<String>,

    /// End them after this time: 90, 90s, 10m, 1h30m.
    #[arg(long, value_name = "DURATION", value_parser = seconds)]
    pub(crate) timeout: Option<u64>,

    /// Print a line of JSON for each: its id, or its failure.
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) data: Data,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  host-shim configure 4fk2a --hostname box -e USER_NAME=ada --timeout 1h

Prints the sandbox's new state. Exit codes: 0 ok, 1 failure: among others, it is not parked.")]
pub(crate) struct Configure {
    /// The sandbox that `run --park` keeps.
    #[arg(add = complete::ids())]
    pub(crate) id: String,

    /// Host name in the sandbox.
    #[arg(long)]
    pub(crate) hostname: Option<String>,

    #[command(flatten)]
    pub(crate) environment: Environment,

    /// User of processes that name none.
    #[arg(short, long)]
    pub(crate) user: Option<String>,

    /// Working directory of processes that name none.
    #[arg(short, long, value_name = "PATH")]
    pub(crate) workdir: Option<String>,

    /// What every call must carry from now on.
    #[arg(long, value_name = "TOKEN", env = "TIFFIN_ACCESS_TOKEN", hide_env_values = true)]
    pub(crate) access_token: Option<String>,

    /// A note about it.
    #[arg(short, long = "label", value_name = "KEY=VALUE")]
    pub(crate) labels: Vec<String>,

    /// End it after this time: 90, 90s, 10m, 1h30m.
    #[arg(long, value_name = "DURATION", value_parser = seconds)]
    pub(crate) timeout: Option<u64>,

    #[command(flatten)]
    pub(crate) data: Data,
}

impl Start {
    /// What `--cold` and `--restore` ask for.
    pub(crate) fn restore(&self) -> Option<Restore> {
        match (self.cold, self.restore) {
            (true, _) => Some(Restore::Never),
            (_, true) => Some(Restore::Always),
            _ => None,
        }
    }
}

/// The labels of `-l`; one without a value has an empty one, as in docker.
pub(crate) fn labels(given: &[String]) -> BTreeMap<String, String> {
    let split = |label: &String| match label.split_once('=') {
        Some((key, value)) => (key.to_owned(), value.to_owned()),
        None => (label.clone(), String::new()),
    };
    given.iter().map(split).collect()
}

/// Docker's rule for names.
fn name(text: &str) -> Result<String, String> {
    /// Docker has no bound; this is that of a host name.
    const MAX_NAME: usize = 253;
    let rest = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    let fits = text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.chars().all(rest);
    if fits && (2..=MAX_NAME).contains(&text.len()) {
        return Ok(text.to_owned());
    }
    Err(format!("expected 2 to {MAX_NAME} of a-z, A-Z, 0-9, `_`, `.` and `-`, the first a letter or digit"))
}

/// Seconds, or numbers with the units h, m and s.
fn seconds(text: &str) -> Result<u64, String> {
    let expected =
        || format!("expected seconds, or numbers with the units h, m and s as in 1h30m, got {text:?}");
    let (mut total, mut number) = (0_u64, String::new());
    let add = |total: u64, number: &str, factor: u64| {
        number.parse::<u64>().ok()?.checked_mul(factor)?.checked_add(total)
    };
    for c in text.chars() {
        let factor = match c {
            'h' => 3600,
            'm' => 60,
            's' => 1,
            digit => {
                number.push(digit);
                continue;
            }
        };
        total = add(total, &number, factor).ok_or_else(expected)?;
        number.clear();
    }
    if !number.is_empty() {
        total = add(total, &number, 1).ok_or_else(expected)?;
    }
    if total == 0 { Err(expected()) } else { Ok(total) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        for (text, expected) in [("90", 90), ("90s", 90), ("10m", 600), ("1h30m", 5400), ("1m30", 90)] {
            assert_eq!(seconds(text), Ok(expected), "{text}");
        }
        for text in ["", "0", "-1", "1.5h", "h", "1d", "99999999999999999999", "18446744073709551615h"] {
            assert!(seconds(text).is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn names_are_those_of_docker() {
        for text in ["web", "web-1", "A_b.c"] {
            assert_eq!(name(text).as_deref(), Ok(text));
        }
        for text in ["", "a", "-web", "a/b", "a b", "é1"] {
            assert!(name(text).is_err(), "{text:?} was accepted");
        }
    }
}
