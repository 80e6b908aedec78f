//! What the Tab key completes: verbs and options by clap, ids and templates by a look at the data folder.
//!
//! The shell starts this program for each Tab ([`ENV`] is set then); what it registered is printed by `completions`.

use std::ffi::OsStr;

use clap::CommandFactory;
use clap_complete::CompletionCandidate;
use clap_complete::engine::ArgValueCompleter;
use clap_complete::env::{CompleteEnv, Shells};
use template::{DataDir, TemplateFolder};

use super::error::Error;
use super::output;
use super::sandboxes::Sandboxes;
use crate::cli::{Cli, Completions};

/// Set by a shell that wants candidates.
const ENV: &str = "HOST_SHIM_COMPLETE";

/// Answers a shell, and ends then; returns when none has asked.
pub(crate) fn answer_shell() {
    CompleteEnv::with_factory(Cli::command).var(ENV).complete();
}

/// Prints what a shell has to read to ask for candidates.
pub(crate) fn completions(args: &Completions) -> Result<u8, Error> {
    let shells = Shells::builtins();
    let name = match args.shell {
        crate::cli::CompletionShell::Bash => "bash",
        crate::cli::CompletionShell::Zsh => "zsh",
        crate::cli::CompletionShell::Fish => "fish",
    };
    let shell = shells.completer(name).ok_or_else(|| Error::invalid("shell", name))?;
    let program = std::env::current_exe().map_err(Error::io("find", "host-shim"))?;
    let mut script = Vec::new();
    shell
        .write_registration(ENV, "host-shim", "host-shim", &program.to_string_lossy(), &mut script)
        .map_err(Error::io("write", "the script"))?;
    output::print(&String::from_utf8_lossy(&script))?;
    Ok(0)
}

/// Ids and names of sandboxes.
pub(crate) fn ids() -> ArgValueCompleter {
    ArgValueCompleter::new(|begin: &OsStr| {
        let Some(data) = data() else { return Vec::new() };
        let all = Sandboxes(data.sandboxes()).list().unwrap_or_default();
        let known = all.iter().flat_map(|sandbox| {
            let help = format!("{} {}", sandbox.template().unwrap_or_default(), sandbox.phase());
            let candidate =
                move |value: &str| CompletionCandidate::new(value).help(Some(help.clone().into()));
            [Some(sandbox.id.as_str()), sandbox.name()].into_iter().flatten().map(candidate)
        });
        known.filter(|candidate| begins(candidate.get_value(), begin)).collect()
    })
}

/// Names of templates.
pub(crate) fn templates() -> ArgValueCompleter {
    ArgValueCompleter::new(|begin: &OsStr| {
        let Some(data) = data() else { return Vec::new() };
        let known = TemplateFolder::list(&data.templates()).unwrap_or_default();
        let known = known.iter().map(|name| CompletionCandidate::new(name.as_str()));
        known.filter(|candidate| begins(candidate.get_value(), begin)).collect()
    })
}

fn data() -> Option<DataDir> {
    DataDir::resolve(std::env::var_os("TIFFIN_DATA_DIR").as_ref().map(std::path::Path::new))
}

fn begins(value: &OsStr, begin: &OsStr) -> bool {
    value.as_encoded_bytes().starts_with(begin.as_encoded_bytes())
}
