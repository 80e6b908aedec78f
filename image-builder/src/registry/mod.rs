//! Registries: the client of the OCI distribution-spec 1.1.
//!
//! ```text
//! ImageName ──Configuration──► Endpoint: mirrors first, TLS or not     registries.conf
//!                 │
//!                 ▼            ┌ Authority: challenge ─► token         CredentialFiles, docker-credential-*
//!              Session ────────┤
//!                 │            └ attempts, redirects, bounds on time and size
//!     ┌───────────┼───────────────────┐
//!   manifests   fetch_blob          push_blob
//!   (digest     (Range from where   (there? mount? else sent,
//!    checked)    it broke off)       from where it broke off)
//!     └──── Registries::pull, Registries::push: several blobs at once ────┘
//! ```
//!
//! A registry is not trusted: every byte that is kept has the digest that was asked for, every answer a bound on its
//! length and its time, and what is printed of it is text. It is a client of our own on reqwest, because a redirect, a
//! password and an endless answer are where registries do harm, and there the caller must decide.

mod artifact;
mod authority;
mod challenge;
mod configuration;
mod credentials;
mod describe;
mod download;
mod failure;
mod helper;
mod limits;
mod manifests;
mod parallel;
mod payload;
mod pull;
mod push;
mod session;
#[cfg(test)]
mod tests;
mod text;
mod upload;

use std::path::PathBuf;

use oci::{ImageName, Platform};
use tokio::runtime::Runtime;

pub(crate) use artifact::{ArtifactBlob, ArtifactSource};
pub use credentials::{Credential, CredentialFiles};
pub use limits::CONNECT_TIMEOUT;
pub use pull::PullReport;
pub use push::PushReport;

use authority::Authority;
use configuration::{Configuration, Endpoint, Transport};
use failure::Failure;
use limits::Limits;
use session::{Http, Session};

use crate::console::Console;
use crate::error::{Error, at};

/// Where to look for what is known of registries.
#[derive(Clone, Debug, Default)]
pub struct RegistryOptions {
    /// The `registries.conf`, where not the usual one.
    pub registries_conf: Option<PathBuf>,
    /// The file of credentials, where not the usual ones.
    pub auth_file: Option<PathBuf>,
}

/// Which images of an index are wanted.
#[derive(Clone, Debug, Default)]
pub enum Platforms {
    /// The one that runs on this machine.
    #[default]
    Host,
    /// The one for that platform.
    One(Platform),
    /// All, and the index itself.
    All,
}

/// The way to all registries.
pub struct Registries {
    runtime: Runtime,
    http: Http,
    configuration: Configuration,
    credentials: CredentialFiles,
}

impl Registries {
    /// Reads the configuration. Credentials are read when a registry is asked.
    pub fn open(options: &RegistryOptions) -> Result<Self, Error> {
        let configuration = Configuration::load(options.registries_conf.as_deref())?;
        let credentials = CredentialFiles::find(options.auth_file.as_deref());
        Self::with(configuration, credentials, Limits::default())
    }

    fn with(
        configuration: Configuration,
        credentials: CredentialFiles,
        limits: Limits,
    ) -> Result<Self, Error> {
        // Sockets are driven by a thread of their own; the transfers run on those that wait for them.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .map_err(at(std::path::Path::new("async runtime")))?;
        Ok(Self { runtime, http: Http::new(limits)?, configuration, credentials })
    }

    /// Asks the registry whether it knows that name and password.
    pub fn check_login(
        &self,
        registry: &str,
        username: &str,
        password: &str,
        console: &Console,
    ) -> Result<(), Error> {
        let name: ImageName = format!("{registry}/x").parse()?;
        let endpoint = self.configuration.push_to(&name)?;
        let credential =
            Credential::Password { username: username.to_owned(), password: password.to_owned() };
        let authority = Authority::new(Some(credential), Vec::new());
        let session = self.session(endpoint, authority, console)?;
        self.runtime.block_on(session.ping()).map_err(|failure| match failure {
            Failure::Final(reason) => Error::Registry {
                registry: registry.to_owned(),
                reason: format!("it does not take this name and password: {reason}"),
            },
            failure => error(registry, failure),
        })
    }

    /// A session with what is known of us there. `others` are repositories that blobs may be taken from.
    fn open_session<'a>(
        &'a self,
        name: &ImageName,
        endpoint: Endpoint,
        actions: &str,
        others: &[String],
        console: &'a Console,
    ) -> Result<Session<'a>, Error> {
        let mut credential = self.credentials.look_up(endpoint.known_as(), &endpoint.repository)?;
        // Somebody may have logged in to the name; the place that it was moved to by hand is meant too. A mirror is not.
        if credential.is_none() && self.configuration.push_to(name)? == endpoint {
            credential = self.credentials.look_up(name.registry(), name.repository())?;
        }
        let mut scopes = vec![format!("repository:{}:{actions}", endpoint.repository)];
        scopes.extend(others.iter().map(|other| format!("repository:{other}:pull")));
        self.session(endpoint, Authority::new(credential, scopes), console)
    }

    fn session<'a>(
        &'a self,
        mut endpoint: Endpoint,
        authority: Authority,
        console: &'a Console,
    ) -> Result<Session<'a>, Error> {
        if endpoint.transport == Transport::Insecure {
            let probe = Session::new(&self.http, console, &endpoint, Authority::new(None, Vec::new()))?;
            if !self.runtime.block_on(probe.answers()) {
                endpoint.transport = Transport::Http;
            }
        }
        Session::new(&self.http, console, &endpoint, authority)
    }
}

/// The failure as this crate's error.
fn error(registry: &str, failure: Failure) -> Error {
    match failure {
        Failure::Local(error) => error,
        failure => Error::Registry { registry: registry.to_owned(), reason: failure.reason(registry) },
    }
}
