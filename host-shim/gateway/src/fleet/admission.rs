//! Who may start a sandbox now: a team within its quota, while the machine has room.
//!
//! ```text
//! admit ── over the quota ──► 429 at once
//!    │
//!    ├── room, nobody waits ──► admitted
//!    └── no room ──► queue (first come, first served; bounded) ── room in time ──► admitted
//!                                                              └── else ──► 503, try again later
//! ```
//!
//! What was admitted counts until its [`Admitted`] is dropped: from before its shim starts until nothing of it is left.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::http::StatusCode;
use tokio::sync::oneshot;

use crate::ApiError;
use crate::config::Capacity;
use crate::identity::TeamId;
use crate::store::Team;

/// How long a create waits for room: less than any client's patience, long enough for a burst of kills.
const WAIT: Duration = Duration::from_secs(5);

/// Creates that wait at once; each holds a connection.
const MAX_WAITING: usize = 64;

/// Seconds after which a refused client may try again.
const RETRY_AFTER: u32 = 5;

/// Decides about creates.
#[derive(Debug)]
pub(super) struct Admission {
    machine: Capacity,
    wait: Duration,
    book: Mutex<Book>,
}

#[derive(Debug, Default)]
struct Book {
    used: Capacity,
    /// What teams have and wait for.
    teams: HashMap<TeamId, Capacity>,
    waiting: VecDeque<Waiting>,
    last_ticket: u64,
}

#[derive(Debug)]
struct Waiting {
    ticket: u64,
    need: Capacity,
    room: oneshot::Sender<()>,
}

/// A place for a sandbox, or in the queue for one; given back when it is dropped.
#[derive(Debug)]
pub(super) struct Admitted {
    admission: Arc<Admission>,
    team: TeamId,
    need: Capacity,
    /// Of one that had to wait: it has the room as soon as the ticket is not in the queue any more.
    ticket: Option<u64>,
}

impl Admission {
    /// Decides about the room `machine`.
    pub(super) fn new(machine: Capacity) -> Arc<Self> {
        Self::with_patience(machine, WAIT)
    }

    fn with_patience(machine: Capacity, wait: Duration) -> Arc<Self> {
        Arc::new(Self { machine, wait, book: Mutex::default() })
    }

    /// What is used.
    pub(super) fn used(&self) -> Capacity {
        self.book().used
    }

    /// Counts a sandbox that is there, whatever the limits say by now.
    pub(super) fn count(self: &Arc<Self>, team: &TeamId, need: Capacity) -> Admitted {
        let mut book = self.book();
        book.used = book.used.plus(need);
        self.charge(&mut book, team, need, None)
    }

    /// Waits for a place. Cancel safe.
    pub(super) async fn admit(self: &Arc<Self>, team: &Team, need: Capacity) -> Result<Admitted, ApiError> {
        let (admitted, room) = {
            let mut book = self.book();
            let used = book.teams.get(&team.id).copied().unwrap_or_default();
            if let Some(reason) = over(team, used, need) {
                return Err(ApiError::new(StatusCode::TOO_MANY_REQUESTS, reason));
            }
            if !need.fits(self.machine) {
                let reason = format!(
                    "the sandbox needs {need}, more than this machine gives to all together ({})",
                    self.machine
                );
                return Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, reason));
            }
            if book.waiting.is_empty() && book.used.plus(need).fits(self.machine) {
                book.used = book.used.plus(need);
                return Ok(self.charge(&mut book, &team.id, need, None));
            }
            if book.waiting.len() == MAX_WAITING {
                return Err(self.full(need, &book));
            }
            book.last_ticket += 1;
            let ticket = book.last_ticket;
            let (sender, room) = oneshot::channel();
            book.waiting.push_back(Waiting { ticket, need, room: sender });
            (self.charge(&mut book, &team.id, need, Some(ticket)), room)
        };
        match tokio::time::timeout(self.wait, room).await {
            Ok(Ok(())) => Ok(admitted),
            _ => Err(self.full(need, &self.book())),
        }
    }

    /// A place for a sandbox that is nobody's: only what is left, and never before who waits.
    pub(super) fn spare(self: &Arc<Self>, need: Capacity) -> Option<Admitted> {
        let mut book = self.book();
        if !book.waiting.is_empty() || !book.used.plus(need).fits(self.machine) {
            return None;
        }
        book.used = book.used.plus(need);
        Some(self.charge(&mut book, &TeamId(String::new()), need, None))
    }

    /// Refuses what a team has no quota for.
    pub(super) fn check(&self, team: &Team, need: Capacity) -> Result<(), ApiError> {
        let used = self.book().teams.get(&team.id).copied().unwrap_or_default();
        match over(team, used, need) {
            Some(reason) => Err(ApiError::new(StatusCode::TOO_MANY_REQUESTS, reason)),
            None => Ok(()),
        }
    }

    /// Whether a team may have that much, and the machine has no room for it now.
    pub(super) fn lacks(&self, team: &Team, need: Capacity) -> bool {
        let book = self.book();
        let used = book.teams.get(&team.id).copied().unwrap_or_default();
        over(team, used, need).is_none()
            && need.fits(self.machine)
            && !book.used.plus(need).fits(self.machine)
    }

    /// Whether there is room for that much once `freed` is given back, for all that wait too.
    pub(super) fn fits_without(&self, freed: Capacity, need: Capacity) -> bool {
        let book = self.book();
        let waiting = book.waiting.iter().fold(need, |sum, waiting| sum.plus(waiting.need));
        book.used.minus(freed).plus(waiting).fits(self.machine)
    }

    fn charge(
        self: &Arc<Self>,
        book: &mut Book,
        team: &TeamId,
        need: Capacity,
        ticket: Option<u64>,
    ) -> Admitted {
        let used = book.teams.entry(team.clone()).or_default();
        *used = used.plus(need);
        Admitted { admission: Arc::clone(self), team: team.clone(), need, ticket }
    }

    fn full(&self, need: Capacity, book: &Book) -> ApiError {
        let reason = format!(
            "this machine is full: {} of {} used, {need} asked; try again later",
            book.used, self.machine
        );
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, reason).retry_after(RETRY_AFTER)
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Admitted {
    /// Charges it to a team instead; back, and why, where that has no quota left.
    pub(super) fn give(mut self, team: &Team) -> Result<Self, (Self, ApiError)> {
        let admission = Arc::clone(&self.admission);
        let mut book = admission.book();
        let used = book.teams.get(&team.id).copied().unwrap_or_default();
        if let Some(reason) = over(team, used, self.need) {
            drop(book);
            return Err((self, ApiError::new(StatusCode::TOO_MANY_REQUESTS, reason)));
        }
        if let Some(before) = book.teams.get_mut(&self.team) {
            *before = before.minus(self.need);
            if *before == Capacity::default() {
                book.teams.remove(&self.team);
            }
        }
        let used = book.teams.entry(team.id.clone()).or_default();
        *used = used.plus(self.need);
        self.team = team.id.clone();
        Ok(self)
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let mut book = self.admission.book();
        if let Some(used) = book.teams.get_mut(&self.team) {
            *used = used.minus(self.need);
            if *used == Capacity::default() {
                book.teams.remove(&self.team);
            }
        }
        let queued =
            self.ticket.and_then(|ticket| book.waiting.iter().position(|waiting| waiting.ticket == ticket));
        match queued {
            Some(place) => drop(book.waiting.remove(place)),
            None => book.used = book.used.minus(self.need),
        }
        // Only the first in the queue: a large sandbox is not overtaken for ever by small ones.
        while let Some(first) = book.waiting.front()
            && book.used.plus(first.need).fits(self.admission.machine)
            && let Some(first) = book.waiting.pop_front()
        {
            book.used = book.used.plus(first.need);
            // Who does not wait any more is about to give the room back.
            let _ = first.room.send(());
        }
    }
}

/// Why a team may not have that much more.
fn over(team: &Team, used: Capacity, need: Capacity) -> Option<String> {
    let quota = team.quota;
    let limits = [
        (
            "concurrent sandboxes",
            u64::from(used.sandboxes),
            u64::from(need.sandboxes),
            u64::from(quota.sandboxes),
        ),
        ("CPUs", u64::from(used.cpus), u64::from(need.cpus), u64::from(quota.cpus)),
        ("MiB of memory", used.memory_mib, need.memory_mib, quota.memory_mib),
    ];
    let (what, used, need, quota) =
        limits.into_iter().find(|(_, used, need, quota)| used.saturating_add(*need) > *quota)?;
    Some(format!("team {:?} may have {quota} {what}: {used} used, {need} more asked", team.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Capacity = Capacity { sandboxes: 1, cpus: 1, memory_mib: 512 };
    const PATIENCE: Duration = Duration::from_secs(60);

    fn team(name: &str, sandboxes: u32) -> Team {
        let quota = Capacity { sandboxes, ..Capacity::UNLIMITED };
        Team { id: TeamId(name.into()), name: name.into(), quota, rate: None, disk_mib: 0 }
    }

    fn machine(sandboxes: u32, wait: Duration) -> Arc<Admission> {
        Admission::with_patience(Capacity { sandboxes, ..Capacity::UNLIMITED }, wait)
    }

    #[tokio::test]
    async fn each_quota_is_named_with_what_is_used_and_asked() {
        let machine = Admission::new(Capacity::UNLIMITED);
        for (quota, expected) in [
            (
                Capacity { sandboxes: 1, ..Capacity::UNLIMITED },
                "1 concurrent sandboxes: 1 used, 1 more asked",
            ),
            (Capacity { cpus: 1, ..Capacity::UNLIMITED }, "1 CPUs: 1 used, 1 more asked"),
            (
                Capacity { memory_mib: 1000, ..Capacity::UNLIMITED },
                "1000 MiB of memory: 512 used, 512 more asked",
            ),
        ] {
            let team = Team { quota, ..team(expected, 0) };
            let first = machine.admit(&team, ONE).await.unwrap();
            let error = machine.admit(&team, ONE).await.unwrap_err();
            assert_eq!((error.status.as_u16(), error.retry_after), (429, None));
            assert!(error.message.ends_with(&format!("may have {expected}")), "{error}");
            drop(first);
            machine.admit(&team, ONE).await.unwrap();
        }
        assert_eq!(machine.used(), Capacity::default());
    }

    #[tokio::test]
    async fn a_full_machine_lets_wait_in_order_and_then_refuses() {
        let machine = machine(1, PATIENCE);
        let team = team("a", 10);
        let first = machine.admit(&team, ONE).await.unwrap();
        let waiting = |name: &'static str| {
            let (machine, team) = (Arc::clone(&machine), team.clone());
            tokio::spawn(async move { (name, machine.admit(&team, ONE).await.unwrap()) })
        };
        let second = waiting("second");
        while machine.book().waiting.is_empty() {
            tokio::task::yield_now().await;
        }
        let given_up = waiting("given up");
        while machine.book().waiting.len() < 2 {
            tokio::task::yield_now().await;
        }
        let third = waiting("third");
        while machine.book().waiting.len() < 3 {
            tokio::task::yield_now().await;
        }
        given_up.abort();
        assert!(given_up.await.unwrap_err().is_cancelled());
        assert_eq!(machine.book().teams[&team.id].sandboxes, 3, "what waits counts for the quota");
        drop(first);
        let (_, place) = second.await.unwrap();
        assert_eq!(machine.book().waiting.len(), 1, "the third waits for the second");
        drop(place);
        drop(third.await.unwrap());
        assert_eq!((machine.used(), machine.book().teams.len()), (Capacity::default(), 0));
    }

    #[tokio::test]
    async fn no_room_in_time_is_503_with_a_hint_and_never_any_room_is_503_without() {
        let machine = machine(1, Duration::ZERO);
        let first = machine.admit(&team("a", 10), ONE).await.unwrap();
        let error = machine.admit(&team("b", 10), ONE).await.unwrap_err();
        assert_eq!((error.status.as_u16(), error.retry_after), (503, Some(RETRY_AFTER)));
        assert!(error.message.contains("this machine is full: 1 sandbox"), "{error}");
        drop(first);
        drop(machine.admit(&team("b", 10), ONE).await.unwrap());
        let error = machine.admit(&team("b", 10), Capacity { sandboxes: 2, ..ONE }).await.unwrap_err();
        assert_eq!((error.status.as_u16(), error.retry_after), (503, None));
        assert!(error.message.contains("more than this machine gives"), "{error}");
        assert_eq!(machine.used(), Capacity::default());
    }

    #[tokio::test]
    async fn the_queue_is_bounded() {
        let machine = machine(1, PATIENCE);
        let team = team("a", 1000);
        let _first = machine.admit(&team, ONE).await.unwrap();
        let queue: Vec<_> = (0..MAX_WAITING)
            .map(|_| {
                let (machine, team) = (Arc::clone(&machine), team.clone());
                tokio::spawn(async move { machine.admit(&team, ONE).await.map(drop) })
            })
            .collect();
        while machine.book().waiting.len() < MAX_WAITING {
            tokio::task::yield_now().await;
        }
        assert_eq!(machine.admit(&team, ONE).await.unwrap_err().status.as_u16(), 503);
        for task in queue {
            task.abort();
        }
    }
}
