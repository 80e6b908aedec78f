//! The verbs that people use: clients of the sandbox folder, as any other program could be one.
//!
//! ```text
//! sandboxes   which folder an ID means, and whether its shim lives
//!    ├─ launch   a shim of its own session    ─► start, resume, fork
//!    ├─ api.sock      sandbox_folder::api     ─► stop, pause, snapshot, fork, configure, network
//!    ├─ vsock.sock    sandbox_folder::client  ─► exec, shell, cp, ps, logs, stats, port-forward
//!    └─ files of the folder                   ─► ls, inspect, logs, debug, rm
//! ```
//!
//! They are part of the program and not of the library: a shim that runs a sandbox uses nothing of this.

pub(crate) mod complete;
mod copy;
mod debug;
pub(crate) mod detach;
mod end;
mod error;
mod exec;
mod launch;
pub(crate) mod list;
mod logs;
mod multiply;
mod network;
mod output;
pub(crate) mod port_forward;
mod processes;
mod sandboxes;
mod session;
mod start;
mod stats;
mod terminal;

use host_shim::run::Interrupt;

use crate::cli::{Command, Data};
use error::{Error, FAILED};
use sandboxes::Sandboxes;

/// The exit code of a program whose output nobody reads: 128 + SIGPIPE.
const BROKEN_PIPE: u8 = 141;

/// Runs a verb; gives its exit code. `None` when it is none of these.
pub(crate) async fn run(command: &Command) -> Option<u8> {
    let done = match command {
        Command::Start(args) => return Some(start::start(args).await),
        Command::Exec(args) => return Some(exec::exec(args).await),
        Command::Shell(args) => return Some(exec::shell(args).await),
        Command::Cp(args) => copy::copy(args).await,
        Command::Ls(args) => list::list(args),
        Command::Inspect(args) => list::inspect(args),
        Command::Logs(args) => logs::logs(args).await,
        Command::Ps(args) => processes::processes(args).await,
        Command::Stop(args) => end::stop(args).await,
        Command::Rm(args) => end::remove(args).await,
        Command::Pause(args) => multiply::pause(args).await,
        Command::Resume(args) => multiply::resume(args).await,
        Command::Snapshot(args) => multiply::snapshot(args).await,
        Command::Fork(args) => multiply::fork(args).await,
        Command::Configure(args) => multiply::configure(args).await,
        Command::Network(args) => network::network(args).await,
        Command::Stats(args) => stats::stats(args).await,
        Command::PortForward(args) => port_forward::port_forward(args).await,
        Command::Debug(args) => debug::debug(args).await,
        Command::Completions(args) => complete::completions(args),
        _ => return None,
    };
    Some(done.unwrap_or_else(|error| tell(&error, FAILED)))
}

/// Says what went wrong; gives `code`, or that of SIGPIPE when nobody listens.
fn tell(error: &Error, code: u8) -> u8 {
    if error.is_broken_pipe() {
        return BROKEN_PIPE;
    }
    complain(error);
    match error {
        Error::Shim(error) if code == FAILED && error.is_bad_input() => 2,
        _ => code,
    }
}

/// Says what went wrong with one of several.
fn complain(error: &Error) {
    eprintln!("host-shim: {error}");
}

fn sandboxes(data: &Data) -> Result<Sandboxes, Error> {
    Ok(Sandboxes(data.resolve()?.sandboxes()))
}

fn interrupts() -> Result<Interrupt, Error> {
    Interrupt::listen().map_err(Error::io("listen for", "signals"))
}
