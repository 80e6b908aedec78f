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

/// A domain as clients reach it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DomainAt {
    /// The host name.
    pub(crate) name: String,
    port: Option<u16>,
}

impl DomainAt {
    /// As clients are to write it. They speak HTTPS to whatever has no port; the port of plain HTTP is not said unasked, because
    /// clients that are told of a domain do not use it in the clear.
    pub(crate) fn shown(&self, tls: bool, listens: u16) -> String {
        match self.port.or(tls.then_some(listens)) {
            None | Some(HTTPS_PORT) => self.name.clone(),
            Some(port) => format!("{}:{port}", self.name),
        }
    }
}

/// What URLs of HTTPS leave out.
const HTTPS_PORT: u16 = 443;

/// `DOMAIN[:PORT]`.
pub(crate) fn domain_at(text: &str) -> Result<DomainAt, String> {
    let (name, port) = match text.split_once(':') {
        None => (text, None),
        Some((name, port)) => {
            let parsed = port.parse().ok().filter(|port| *port != 0);
            (name, Some(parsed.ok_or_else(|| format!("expected a port after the colon, got {port:?}"))?))
        }
    };
    Ok(DomainAt { name: domain(name)?, port })
}

/// The name alone, of a domain as `serve` has it.
fn domain_name(text: &str) -> Result<String, String> {
    domain_at(text).map(|domain| domain.name)
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
    #[arg(long, value_name = "DOMAIN", env = "TIFFIN_DOMAIN", default_value = "localhost", value_parser = domain_name)]
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_are_told_the_port_that_they_reach() {
        for (given, tls, listens, shown) in [
            ("A.example", false, 3000, "a.example"),
            ("a.example", true, 443, "a.example"),
            ("a.example", true, 8443, "a.example:8443"),
            ("a.example:443", true, 8443, "a.example"),
            ("a.example:7000", false, 3000, "a.example:7000"),
        ] {
            assert_eq!(domain_at(given).unwrap().shown(tls, listens), shown, "{given}");
        }
        for bad in
            ["", "a..b", "-a.example", "a.example:", "a.example:0", "a.example:65536", "a:b:1", "[::1]:3"]
        {
            assert!(domain_at(bad).is_err(), "{bad}");
        }
        assert!(domain_at(&format!("{}example", "a.".repeat(100))).is_err());
    }
}
