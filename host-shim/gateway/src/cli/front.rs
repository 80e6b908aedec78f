//! Options about who reaches the gateway, how, and how often.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::Args;
use tiffin_gateway::rate::{Rate, Rates};
use tiffin_gateway::tls::{Authority, PairFiles, Source};

use super::{Data, domain, limit};
use crate::BadInput;

/// How connections are made.
#[derive(Debug, Args)]
pub(crate) struct Front {
    /// Serve HTTPS with this certificate (PEM, with its chain); read again when it changes, and on SIGHUP
    #[arg(long, value_name = "FILE", env = "TIFFIN_TLS_CERT", requires = "tls_key")]
    tls_cert: Option<PathBuf>,

    /// The certificate's private key (PEM)
    #[arg(long, value_name = "FILE", env = "TIFFIN_TLS_KEY", requires = "tls_cert")]
    tls_key: Option<PathBuf>,

    /// Serve HTTPS with certificates of an authority of its own for --domain; `tiffin-gateway ca` prints it for clients
    #[arg(long, conflicts_with_all = ["tls_cert", "tls_key"])]
    tls_self_signed: bool,

    /// Serve HTTP in the clear for other machines too: keys and everything else can be read on the way
    #[arg(long, conflicts_with_all = ["tls_cert", "tls_self_signed"])]
    allow_plain_http: bool,

    /// Requests a second to the control API of each team, or `unlimited`; ten times as many at once
    #[arg(long, value_name = "N", value_parser = rate, default_value_t = Rates::default().team.requests())]
    team_requests: u32,

    /// The same of each address, for requests without a valid key
    #[arg(long, value_name = "N", value_parser = rate, default_value_t = Rates::default().keyless.requests())]
    keyless_requests: u32,
}

impl Front {
    /// Where certificates come from; `None` is plain HTTP, which only loopback may have.
    pub(crate) fn tls(
        &self,
        data: &Path,
        domain: &str,
        listen: SocketAddr,
    ) -> Result<Option<Source>, BadInput> {
        if let (Some(cert), Some(key)) = (&self.tls_cert, &self.tls_key) {
            return Ok(Some(Source::Files(PairFiles { cert: cert.clone(), key: key.clone() })));
        }
        if self.tls_self_signed {
            return Ok(Some(Source::SelfSigned(Authority::of(data, domain))));
        }
        match listen.ip().to_canonical().is_loopback() || self.allow_plain_http {
            true => Ok(None),
            false => Err(BadInput(format!(
                "--listen {listen} is for other machines, and plain HTTP shows them everybody's keys: say --tls-cert and \
                 --tls-key, or --tls-self-signed, or --allow-plain-http where something in front of it does TLS"
            ))),
        }
    }

    /// How often it may be asked.
    pub(crate) fn rates(&self) -> Rates {
        Rates { team: Rate::per_second(self.team_requests), keyless: Rate::per_second(self.keyless_requests) }
    }
}

/// Requests a second; none at all would be another thing to ask for.
pub(crate) fn rate(text: &str) -> Result<u32, String> {
    match limit(text)? {
        0 => Err("expected at least 1, or `unlimited`".to_owned()),
        rate => Ok(rate),
    }
}

/// A team's rate as an operator writes it: `None` is the default.
pub(crate) fn team_rate(text: &str) -> Result<TeamRate, String> {
    match text {
        "default" => Ok(TeamRate(None)),
        text => rate(text).map(|rate| TeamRate(Some(Rate::per_second(rate)))),
    }
}

/// What [`team_rate`] reads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TeamRate(pub(crate) Option<Rate>);

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tiffin-gateway ca --domain sandboxes.example.com >ca.pem
  NODE_EXTRA_CA_CERTS=ca.pem node client.mjs          the JavaScript SDKs
  SSL_CERT_FILE=ca.pem python3 client.py              the Python SDKs, and curl

The authority is made where it is not there, so this may come before the first `serve --tls-self-signed`. It can vouch for
the domain, what is below it, localhost, 127.0.0.1 and ::1, and for nothing else. It lasts ten years; its key is kept in the
data folder (0600). Exit codes: 0 done, 1 failure, 2 wrong usage.")]
pub(crate) struct Ca {
    /// Domain of sandboxes' host names, as `serve` has it
    #[arg(long, value_name = "DOMAIN", env = "TIFFIN_DOMAIN", default_value = "localhost", value_parser = domain)]
    pub(crate) domain: String,

    #[command(flatten)]
    pub(crate) data: Data,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  tiffin-gateway backup /var/backups/tiffin.db

The gateway goes on meanwhile. The copy is of one moment, is checked, and appears whole or not at all (0600: it holds
sandboxes' tokens). To use it, put it as gateway.db into a data folder that no gateway serves, without gateway.db-wal and
gateway.db-shm. Sandboxes that ended since then are taken out by the next `serve`. Exit codes: 0 done, 1 failure, 2 wrong
usage, or the file is there.")]
pub(crate) struct Backup {
    /// The file to make
    pub(crate) file: PathBuf,

    /// Replace the file if it is there
    #[arg(long)]
    pub(crate) force: bool,

    #[command(flatten)]
    pub(crate) data: Data,
}
