//! The owner's side of a network.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use crate::helper::protocol::{Answer, Channel, Request};
use crate::helper::{self, protocol};
use crate::{Error, Report, Rules, Uplink, addresses, check, host};

/// A sandbox's network. Dropped, it is gone, with every connection through it.
#[derive(Debug)]
pub struct Network {
    helper: Child,
    channel: Option<Channel>,
    rules: Rules,
}

impl Network {
    /// Makes a network and the TAP into it. `helper` is the command that calls [`helper::main`] with what comes after its
    /// arguments. The call blocks until all is there, some tens of milliseconds.
    ///
    /// Rules without resolvers get the host's.
    pub fn start(mut helper: Command, uplink: Uplink, rules: &Rules) -> Result<(Self, OwnedFd), Error> {
        check(uplink)?;
        let (near, far) = protocol::pair()?;
        let word = match uplink {
            Uplink::Veth => helper::VETH,
            Uplink::Pasta => helper::PASTA,
        };
        let child = helper
            .arg(word)
            .stdin(far)
            .stdout(Stdio::null())
            // The terminal's Ctrl-C is not for it.
            .process_group(0)
            .current_dir("/")
            .spawn()
            .map_err(Error::io("start the process that holds it"))?;
        // Else it would hold the other end of the socket too, and no end of the helper would be seen.
        drop(helper);
        let mut network = Self { helper: child, channel: Some(near), rules: Rules::default() };
        let mut rules = rules.clone();
        if rules.resolvers.is_empty() {
            rules.resolvers = host::resolvers();
        }
        let (answer, tap) = network.call(&Request::Make(rules.clone()))?;
        network.rules = rules;
        match (answer, tap) {
            (Answer::Done, Some(tap)) => Ok((network, tap)),
            (answer, _) => Err(Error::Step(format!("expected a TAP, got {answer:?}"))),
        }
    }

    /// Its rules.
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// Puts other rules in place of those that it has, at once: a packet meets the old ones or the new ones. Resolvers that are
    /// not given stay.
    pub fn change(&mut self, rules: &Rules) -> Result<(), Error> {
        let mut rules = rules.clone();
        if rules.resolvers.is_empty() {
            rules.resolvers.clone_from(&self.rules.resolvers);
        }
        match self.call(&Request::Change(rules.clone()))? {
            (Answer::Done, _) => {
                self.rules = rules;
                Ok(())
            }
            (answer, _) => Err(Error::Step(format!("expected a change, got {answer:?}"))),
        }
    }

    /// What it has done.
    pub fn report(&mut self) -> Result<Report, Error> {
        match self.call(&Request::Report)? {
            (Answer::Report(report), _) => Ok(report),
            (answer, _) => Err(Error::Step(format!("expected a report, got {answer:?}"))),
        }
    }

    /// The guest's resolvers: its gateway, in the family in which there is a resolver behind it.
    pub fn guest_resolvers(&self) -> Vec<IpAddr> {
        if self.rules.resolvers.iter().any(IpAddr::is_ipv4) {
            vec![addresses::GATEWAY4.into()]
        } else if !self.rules.resolvers.is_empty() {
            vec![addresses::GATEWAY6.into()]
        } else {
            Vec::new()
        }
    }

    fn call(&mut self, request: &Request) -> Result<(Answer, Option<OwnedFd>), Error> {
        let Some(channel) = &self.channel else { return Err(Error::Ended) };
        let answered = channel.send(request, None).and_then(|()| channel.receive::<Answer>());
        match answered? {
            Some((Answer::Failed(reason), _)) => Err(Error::Step(reason)),
            Some(answer) => Ok(answer),
            None => Err(Error::Ended),
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // The end of the socket is the end of the helper.
        self.channel = None;
        if let Err(error) = self.helper.wait() {
            // Nothing is left to do about it, and the kernel's reaping needs no word of ours.
            drop(error);
        }
    }
}

/// A namespace that a file stands for.
pub(crate) type Namespace = File;
