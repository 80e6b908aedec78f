//! The sandbox that the agent serves: where processes and paths live, and whose it is.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, PoisonError, RwLock};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use envd_proto::control::Configure;
use http::{HeaderMap, header};
use subtle::ConstantTimeEq;

use crate::connect::{Code, Error};
use crate::events::Events;
use crate::machine::{Freezer, Lifecycle, SshKeys};
use crate::metrics::Metrics;
use crate::root::{Root, Unanswered};
use crate::spawner::Spawner;
use crate::users::{User, UserDatabase};

/// Where processes and paths live, and, once configured, whose it is.
#[derive(Debug)]
pub struct Sandbox {
    root: Root,
    spawner: Spawner,
    leaves: Option<Leaves>,
    events: Events,
    lifecycle: Lifecycle,
    freezer: Option<Arc<Freezer>>,
    ssh_keys: SshKeys,
    metrics: Metrics,
    can_change_user: bool,
    session: RwLock<Option<Arc<Session>>>,
}

/// The classes of processes, each with a cgroup and limits of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaf {
    /// What clients start.
    User,
    /// What clients start on a terminal.
    Pty,
    /// What the agent itself starts inside.
    System,
}

/// The directories of the classes' cgroups.
#[derive(Debug)]
pub struct Leaves {
    /// Of [`Leaf::User`].
    pub user: OwnedFd,
    /// Of [`Leaf::Pty`].
    pub pty: OwnedFd,
    /// Of [`Leaf::System`].
    pub system: OwnedFd,
    /// The name of the one beside them that the spawner is in.
    pub spawner: &'static str,
}

/// The sandbox was configured before.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the sandbox is configured already")]
pub struct AlreadyConfigured;

impl Sandbox {
    /// A sandbox that nobody has configured: it refuses client calls.
    pub fn new(root: Root, spawner: Spawner, leaves: Option<Leaves>) -> Arc<Self> {
        let can_change_user = rustix::process::geteuid().is_root();
        let freezer = leaves.as_ref().and_then(|leaves| {
            Freezer::of_parent(leaves.user.as_fd(), leaves.spawner)
                .inspect_err(|error| crate::log::warn(format_args!("the container's cgroup: {error}")))
                .ok()
        });
        let events = Events::default();
        spawner.tell(events.clone());
        Arc::new(Self {
            root,
            spawner,
            leaves,
            events,
            lifecycle: Lifecycle::default(),
            freezer: freezer.map(Arc::new),
            ssh_keys: SshKeys::default(),
            metrics: Metrics::default(),
            can_change_user,
            session: RwLock::new(None),
        })
    }

    /// The root that paths mean.
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// What starts processes.
    pub fn spawner(&self) -> &Spawner {
        &self.spawner
    }

    /// The cgroup that a process of this class is born in; `None` where the agent has no cgroups.
    pub fn cgroup(&self, leaf: Leaf) -> Option<BorrowedFd<'_>> {
        let leaves = self.leaves.as_ref()?;
        Some(match leaf {
            Leaf::User => leaves.user.as_fd(),
            Leaf::Pty => leaves.pty.as_fd(),
            Leaf::System => leaves.system.as_fd(),
        })
    }

    /// What happens in it.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// Which life of the machine this is, and whether its processes are held.
    pub fn lifecycle(&self) -> &Lifecycle {
        &self.lifecycle
    }

    /// What holds its processes; `None` where the agent has no cgroups.
    pub(crate) fn freezer(&self) -> Option<&Arc<Freezer>> {
        self.freezer.as_ref()
    }

    /// What makes SSH host keys.
    pub(crate) fn ssh_keys(&self) -> &SshKeys {
        &self.ssh_keys
    }

    /// What it uses.
    pub(crate) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Whether processes and files can belong to another user than the agent's: not when it runs as an ordinary user.
    pub fn can_change_user(&self) -> bool {
        self.can_change_user
    }

    /// Makes it somebody's. Accepted once.
    pub fn configure(&self, configure: Configure) -> Result<(), AlreadyConfigured> {
        let mut session = self.session.write().unwrap_or_else(PoisonError::into_inner);
        if session.is_some() {
            return Err(AlreadyConfigured);
        }
        *session = Some(Arc::new(Session::new(configure)));
        Ok(())
    }

    /// Makes it somebody else's: a clone of what it was. Its old token opens nothing from now on.
    pub(crate) fn replace_session(&self, configure: Configure) {
        let session = Arc::new(Session::new(configure));
        *self.session.write().unwrap_or_else(PoisonError::into_inner) = Some(session);
    }

    /// What Configure said, once it did.
    pub fn session(&self) -> Option<Arc<Session>> {
        self.session.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What Configure said.
#[derive(Debug)]
pub struct Session {
    env: BTreeMap<String, String>,
    default_user: String,
    default_workdir: String,
    access_token: Option<String>,
    report_ports: bool,
}

impl Session {
    /// What a Configure says; public for the fuzz targets.
    pub fn new(configure: Configure) -> Self {
        Self {
            env: configure.env.into_iter().collect(),
            default_user: configure.default_user,
            default_workdir: configure.default_workdir,
            access_token: configure.access_token,
            report_ports: configure.report_ports,
        }
    }

    /// Environment of every process.
    pub fn env(&self) -> &BTreeMap<String, String> {
        &self.env
    }

    /// Whether the host wants to know the ports where programs listen.
    pub(crate) fn reports_ports(&self) -> bool {
        self.report_ports
    }

    /// Whether a call carries the token that Configure set. Takes the same time for every wrong token of one length.
    pub fn allows(&self, headers: &HeaderMap) -> bool {
        let Some(expected) = &self.access_token else { return true };
        let given = headers.get("x-access-token").map_or(&[][..], |value| value.as_bytes());
        expected.as_bytes().ct_eq(given).into()
    }

    /// The token that Configure set; a signature is made with it.
    pub fn access_token(&self) -> Option<&str> {
        self.access_token.as_deref()
    }

    /// The user of a call: the one of its Basic authorization, else the default one.
    pub async fn user(&self, sandbox: &Sandbox, headers: &HeaderMap) -> Result<User, Error> {
        match basic_user(headers)? {
            Some(name) => self.user_named(sandbox, &name).await,
            None => self.user_named(sandbox, &self.default_user).await,
        }
    }

    /// The user of this name, or the default one when it is empty.
    pub async fn user_named(&self, sandbox: &Sandbox, name: &str) -> Result<User, Error> {
        Ok(self.user_and_names(sandbox, name).await?.0)
    }

    /// The user of a call, and the names of all the others.
    pub async fn caller(
        &self,
        sandbox: &Sandbox,
        headers: &HeaderMap,
    ) -> Result<(User, UserDatabase), Error> {
        self.user_and_names(sandbox, &basic_user(headers)?.unwrap_or_default()).await
    }

    async fn user_and_names(&self, sandbox: &Sandbox, name: &str) -> Result<(User, UserDatabase), Error> {
        let name = if name.is_empty() { &self.default_user } else { name };
        let wanted = name.to_owned();
        // The files are the tenant's and can be large: they are searched where a delay holds up nobody else.
        let load = sandbox.root().run(move || {
            let users = UserDatabase::load()?;
            Ok(users.find(&wanted).map(|user| (user, users)))
        });
        let found = load.await.map_err(|error| {
            let code = Unanswered::of(&error).map_or(Code::Internal, Unanswered::code);
            Error::new(code, format!("reading the sandbox's users: {error}"))
        })?;
        found.ok_or_else(|| Error::new(Code::Unauthenticated, format!("invalid username: '{name}'")))
    }

    /// The directory that a process starts in: a relative one is the user's home's.
    pub fn working_directory(&self, user: &User, cwd: &str) -> String {
        // The only failure is `~user`, which is then no directory and is told as such.
        self.path(user, cwd).unwrap_or_else(|_| cwd.to_owned())
    }

    /// The absolute path that a client means. Empty is the default working directory, else the user's home; `~` and
    /// relative paths begin at the home.
    pub fn path(&self, user: &User, path: &str) -> Result<String, Error> {
        let home = &user.home;
        if path.is_empty() {
            let workdir = &self.default_workdir;
            return Ok(if workdir.is_empty() { home.clone() } else { join(home, workdir) });
        }
        match path.strip_prefix('~') {
            Some("") => Ok(home.clone()),
            Some(rest) => match rest.strip_prefix('/') {
                Some(rest) => Ok(join(home, rest)),
                None => Err(Error::new(
                    Code::InvalidArgument,
                    format!("cannot resolve '{path}': only '~' alone is known"),
                )),
            },
            None => Ok(join(home, path)),
        }
    }
}

fn join(base: &str, path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("{}/{path}", base.trim_end_matches('/')) }
}

/// The user that `Authorization: Basic` names; the password says nothing.
fn basic_user(headers: &HeaderMap) -> Result<Option<String>, Error> {
    let Some(value) = headers.get(header::AUTHORIZATION) else { return Ok(None) };
    let encoded = value.to_str().ok().and_then(|text| text.strip_prefix("Basic "));
    let decoded = encoded.and_then(|encoded| BASE64_STANDARD.decode(encoded.trim()).ok());
    let text = decoded.and_then(|bytes| String::from_utf8(bytes).ok());
    match text {
        Some(text) => Ok(Some(text.split_once(':').map_or(text.as_str(), |(user, _)| user).to_owned())),
        None => {
            Err(Error::new(Code::Unauthenticated, "Authorization: expected Basic with base64 of 'user:'"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use envd_sys::Credentials;

    fn session(workdir: &str, token: Option<&str>) -> Session {
        Session::new(Configure {
            default_workdir: workdir.into(),
            access_token: token.map(str::to_owned),
            ..Configure::default()
        })
    }

    fn user() -> User {
        let credentials = Credentials { uid: 1, gid: 1, groups: vec![] };
        User { name: "user".into(), credentials, home: "/home/user".into() }
    }

    #[test]
    fn paths_begin_at_the_home() {
        let path =
            |workdir: &str, path: &str| session(workdir, None).path(&user(), path).map_err(|e| e.code());
        assert_eq!(path("", ""), Ok("/home/user".into()));
        assert_eq!(path("/app", ""), Ok("/app".into()));
        assert_eq!(path("/app", "a/b"), Ok("/home/user/a/b".into()));
        assert_eq!(path("/app", "~"), Ok("/home/user".into()));
        assert_eq!(path("/app", "~/x"), Ok("/home/user/x".into()));
        assert_eq!(path("/app", "/etc"), Ok("/etc".into()));
        assert_eq!(path("/app", "~root"), Err(Code::InvalidArgument));
    }

    #[test]
    fn a_token_is_asked_for_once_it_is_set() {
        let mut headers = HeaderMap::new();
        assert!(session("", None).allows(&headers));
        assert!(!session("", Some("secret")).allows(&headers));
        headers.insert("x-access-token", "secreT".parse().unwrap());
        assert!(!session("", Some("secret")).allows(&headers));
        headers.insert("x-access-token", "secret".parse().unwrap());
        assert!(session("", Some("secret")).allows(&headers));
    }

    #[test]
    fn the_user_is_what_stands_before_the_colon() {
        let user = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, text.parse().unwrap());
            basic_user(&headers).map_err(|error| error.code())
        };
        assert_eq!(user("Basic dXNlcjo="), Ok(Some("user".into())));
        assert_eq!(user("Basic cm9vdDpzZWNyZXQ="), Ok(Some("root".into())));
        assert_eq!(user("Bearer x"), Err(Code::Unauthenticated));
        assert_eq!(user("Basic ***"), Err(Code::Unauthenticated));
        assert_eq!(basic_user(&HeaderMap::new()), Ok(None));
    }
}
