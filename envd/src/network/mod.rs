//! The machine's network: static configuration by rtnetlink, all of it or none.
//!
//! ```text
//! control::Network ──parse──► Plan ──apply──► kernel        saved: link, addresses, routes of each interface
//!                                       │ a step fails
//!                                       └──────► restored from what was saved; the error names interface and object
//! ```
//!
//! An interface ends with exactly the addresses and routes of its plan: what it had before, by a snapshot's source or by
//! an earlier configuration, goes. Only its link-local IPv6 address and the kernel's own routes stay.

mod interface;
mod netlink;
mod plan;

use std::io;

pub(crate) use plan::Plan;

use interface::Saved;
use netlink::Netlink;

/// Gives the calling thread's network namespace the plan's network; what was there comes back by [`Undo::undo`].
pub(crate) fn apply(plan: &Plan) -> io::Result<Undo> {
    let mut netlink = Netlink::open()?;
    let mut undo = Undo { saved: Vec::new() };
    // All are found before one is changed.
    let links = plan
        .interfaces
        .iter()
        .map(|wanted| interface::find(&mut netlink, &wanted.select).map(|link| (link, wanted)))
        .collect::<io::Result<Vec<_>>>()?;
    for (link, wanted) in links {
        let before = Saved::take(&mut netlink, &link)?;
        let applied = interface::apply(&mut netlink, &before, wanted);
        undo.saved.push(before);
        if let Err(error) = applied {
            undo.undo();
            return Err(error);
        }
    }
    Ok(undo)
}

/// What a network was before.
#[derive(Debug)]
#[must_use]
pub(crate) struct Undo {
    saved: Vec<Saved>,
}

impl Undo {
    /// Restores it, as far as the kernel lets.
    pub(crate) fn undo(self) {
        let restored = Netlink::open().and_then(|mut netlink| {
            self.saved.iter().rev().try_for_each(|saved| saved.restore(&mut netlink))
        });
        if let Err(error) = restored {
            crate::log::error(format_args!("restoring the network: {error}"));
        }
    }
}

/// The text for /etc/resolv.conf, when the plan has one.
pub(crate) fn resolv_conf(plan: &Plan) -> Option<&str> {
    plan.resolv_conf.as_deref()
}

#[cfg(test)]
mod tests;
