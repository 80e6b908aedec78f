//! The host's side of a veth uplink: a table that an `nft` process owns, so that the kernel removes it when that ends.

use std::io::{BufRead, BufReader, PipeReader, Write};
use std::process::{Child, ChildStdin, Stdio};

use super::command::command;
use crate::Error;

/// Lines that are read of one answer, which has three for each error.
const MAX_LINES: usize = 20_000;

/// What of them goes into an error.
const MAX_COMPLAINT: usize = 2000;

/// `nft` that waits for commands.
#[derive(Debug)]
pub(super) struct HostRules {
    process: Child,
    commands: ChildStdin,
    words: BufReader<PipeReader>,
}

impl HostRules {
    /// Makes the table; `transaction` is one line.
    pub(super) fn new(transaction: &str) -> Result<Self, Error> {
        let (words, out) = std::io::pipe().map_err(Error::io("make a pipe"))?;
        let mut command = command("nft")?;
        let errors = out.try_clone().map_err(Error::io("share a pipe"))?;
        command.arg("--interactive").stdin(Stdio::piped()).stdout(out).stderr(errors);
        let mut process = command.spawn().map_err(Error::io("start nft"))?;
        // The writing end of the pipe is the process's alone: its end is seen.
        drop(command);
        let Some(commands) = process.stdin.take() else { return Err(Error::Ended) };
        let mut rules = Self { process, commands, words: BufReader::new(words) };
        rules.change(transaction)?;
        Ok(rules)
    }

    /// Carries out one transaction in one line.
    pub(super) fn change(&mut self, transaction: &str) -> Result<(), Error> {
        // It says nothing when all is well: what it says to this question is the sign that it got there.
        let lines = format!("{transaction}\ndescribe meta length\n");
        self.commands.write_all(lines.as_bytes()).map_err(Error::io("tell nft"))?;
        let mut complaint = String::new();
        for _ in 0..MAX_LINES {
            let mut line = String::new();
            if self.words.read_line(&mut line).map_err(Error::io("hear nft"))? == 0 {
                let status = self.process.wait().map_err(Error::io("wait for nft"))?;
                return Err(Error::Step(format!("nft ended ({status}): {complaint}")));
            }
            if line.starts_with("meta expression") {
                return if complaint.is_empty() {
                    Ok(())
                } else {
                    Err(Error::Step(format!("the host's table: {}", complaint.trim())))
                };
            }
            if complaint.len() < MAX_COMPLAINT {
                complaint.push_str(&line);
            }
        }
        Err(Error::Step(format!("nft does not answer: {complaint}")))
    }
}
