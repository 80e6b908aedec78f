//! An authority of the gateway's own, for names that nobody else vouches for.
//!
//! Clients are told to trust it, so it is as little as can be: its constraints let it vouch for `DOMAIN`, what is below it,
//! and this machine's loopback names, and for nothing else. Its key is the one secret that is kept (0600); the server's own
//! certificate and key are made at each start, last 90 days, and never leave memory.
//!
//! ```text
//!   DATA/tls/DOMAIN/
//!     authority.pem   0600   key and certificate, written whole or not at all
//!     ca.pem          0644   the certificate alone, for clients
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use rcgen::{
    BasicConstraints, CertificateParams, CidrSubnet, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    GeneralSubtree, IsCa, Issuer, KeyPair, KeyUsagePurpose, NameConstraints, SanType, date_time_ymd,
};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;

use super::{TlsError, validity};

const DAY: SignedDuration = SignedDuration::from_hours(24);

/// As long as an installation lasts: another authority is one that each client must be told of.
const AUTHORITY_DAYS: i32 = 3650;

/// No longer than public authorities' certificates are by habit.
const LEAF_DAYS: i32 = 90;

/// When this is left of it, the server's certificate is made anew.
const LEAF_LEFT_DAYS: i32 = 30;

/// How far clients' clocks may be behind.
const SKEW_DAYS: i32 = 1;

/// The longest `authority.pem`; ours has less than 2 KiB.
const MAX_PEM: u64 = 64 << 10;

/// Served besides the domain, so that this machine's own clients need no DNS.
const LOOPBACK_NAME: &str = "localhost";
const LOOPBACK: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// An authority for a domain, in a folder.
#[derive(Clone, Debug)]
pub struct Authority {
    domain: String,
    folder: PathBuf,
}

/// A server's certificate.
pub(super) struct Issued {
    pub(super) pair: CertifiedKey,
    pub(super) ends: Timestamp,
    pub(super) renew_at: Timestamp,
}

/// The authority as it is kept.
struct Kept {
    key: KeyPair,
    /// What `authority.pem` says is its certificate.
    cert: CertificateDer<'static>,
    ends: Timestamp,
}

impl Authority {
    /// The authority of a gateway's data folder for that domain, which is a valid host name in lower case.
    pub fn of(data: &Path, domain: &str) -> Self {
        Self { domain: domain.to_owned(), folder: data.join("tls").join(domain) }
    }

    /// The file with its certificate, which is there once a gateway has served or [`Self::certificate`] was called.
    pub fn ca_file(&self) -> PathBuf {
        self.folder.join("ca.pem")
    }

    /// Its certificate in PEM; made where there is none.
    pub fn certificate(&self) -> Result<String, TlsError> {
        self.kept(Timestamp::now())?;
        fs::read_to_string(self.ca_file()).map_err(|source| self.io("ca.pem", source))
    }

    /// Makes a certificate for the domain, everything one label below it, and loopback.
    pub(super) fn issue(&self, now: Timestamp) -> Result<Issued, TlsError> {
        let kept = self.kept(now)?;
        let mut params = CertificateParams::new(Vec::new())?;
        for name in [self.domain.as_str(), &format!("*.{}", self.domain), LOOPBACK_NAME] {
            let name = SanType::DnsName(name.try_into()?);
            if !params.subject_alt_names.contains(&name) {
                params.subject_alt_names.push(name);
            }
        }
        params.subject_alt_names.extend(LOOPBACK.map(SanType::IpAddress));
        params.distinguished_name = named("Tiffin gateway");
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let ends = lasting(&mut params, now, LEAF_DAYS)?;
        let key = KeyPair::generate()?;
        let authority = authority_params(&self.domain, &kept.key)?;
        let cert = params.signed_by(&key, &Issuer::new(authority, kept.key))?;
        let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let pair = CertifiedKey::from_der(vec![cert.into()], private, &ring::default_provider())?;
        let renew_at = ends.checked_sub(DAY * LEAF_LEFT_DAYS).map_err(|_| TlsError::Clock(now))?;
        Ok(Issued { pair, ends, renew_at })
    }

    /// The authority, made where it is not there or would end before what it vouches for.
    fn kept(&self, now: Timestamp) -> Result<Kept, TlsError> {
        fs::create_dir_all(&self.folder).map_err(|source| self.io("", source))?;
        // Two programs at once make one authority: the second one reads what the first has written.
        let lock = File::options().create(true).append(true).mode(0o600).open(self.folder.join("lock"));
        let _lock =
            lock.and_then(|file| file.lock().map(|()| file)).map_err(|source| self.io("lock", source))?;
        let found = self.read()?;
        let kept = match found {
            Some(kept) if kept.ends.duration_since(now) > DAY * LEAF_DAYS => kept,
            other => {
                let made = self.make(now)?;
                if let Some(Kept { ends, .. }) = other {
                    let ca = self.ca_file();
                    tracing::warn!(%ends, ca = %ca.display(), "the TLS authority ends: there is another one, tell the clients");
                }
                made
            }
        };
        let pem = pem("CERTIFICATE", &kept.cert);
        // It may have been cut between the two files.
        if fs::read(self.ca_file()).ok().as_deref() != Some(pem.as_bytes()) {
            self.write("ca.pem", 0o644, &pem)?;
        }
        Ok(kept)
    }

    fn read(&self) -> Result<Option<Kept>, TlsError> {
        const NAME: &str = "authority.pem";
        let mut bytes = Vec::new();
        match File::open(self.folder.join(NAME)) {
            Ok(file) => file.take(MAX_PEM).read_to_end(&mut bytes).map_err(|source| self.io(NAME, source))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(self.io(NAME, source)),
        };
        // Not replaced by a fresh one without asking: clients trust the one that was there.
        let invalid = |got: String| TlsError::Invalid {
            path: self.folder.join(NAME),
            expected: "a key and its certificate (remove the file to have another authority)",
            got,
        };
        let key = PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| invalid(error.to_string()))?;
        let cert = CertificateDer::from_pem_slice(&bytes).map_err(|error| invalid(error.to_string()))?;
        let pair = CertifiedKey::from_der(vec![cert.clone()], key.clone_key(), &ring::default_provider());
        pair.map_err(|error| invalid(error.to_string()))?;
        let key = KeyPair::try_from(&key).map_err(|error| invalid(error.to_string()))?;
        let ends =
            validity::not_after(&cert).ok_or_else(|| invalid("a certificate without an end".into()))?;
        Ok(Some(Kept { key, cert, ends }))
    }

    fn make(&self, now: Timestamp) -> Result<Kept, TlsError> {
        let key = KeyPair::generate()?;
        let mut params = authority_params(&self.domain, &key)?;
        let ends = lasting(&mut params, now, AUTHORITY_DAYS)?;
        let cert = CertificateDer::from(params.self_signed(&key)?);
        let both = pem("PRIVATE KEY", key.serialized_der()) + &pem("CERTIFICATE", &cert);
        self.write("authority.pem", 0o600, &both)?;
        Ok(Kept { key, cert, ends })
    }

    /// Whole or not at all. The lock is held, so the temporary name is ours.
    fn write(&self, name: &str, mode: u32, text: &str) -> Result<(), TlsError> {
        let (path, new) = (self.folder.join(name), self.folder.join(format!(".{name}.new")));
        let write = || {
            match fs::remove_file(&new) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&new)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            File::open(&self.folder)?.sync_all()
        };
        write().map_err(|source| self.io(name, source))
    }

    fn io(&self, name: &str, source: io::Error) -> TlsError {
        TlsError::Io { path: self.folder.join(name), source }
    }
}

/// What the certificate of an authority for `domain` says, but for its time. The same key has the same name, so that what it
/// issues later names it rightly.
fn authority_params(domain: &str, key: &KeyPair) -> Result<CertificateParams, TlsError> {
    let mut params = CertificateParams::new(Vec::new())?;
    // Names have 64 characters at most (RFC 5280, A.1: ub-common-name), a domain more; keys tell authorities apart.
    let id = crate::identity::hex(&params.key_identifier(key)[..4]);
    params.distinguished_name = named(&format!("Tiffin gateway authority {id}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let mut permitted_subtrees = vec![GeneralSubtree::DnsName(domain.to_owned())];
    if domain != LOOPBACK_NAME {
        permitted_subtrees.push(GeneralSubtree::DnsName(LOOPBACK_NAME.to_owned()));
    }
    permitted_subtrees.extend(LOOPBACK.map(|address| {
        let bits = if address.is_ipv4() { 32 } else { 128 };
        GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(address, bits))
    }));
    params.name_constraints = Some(NameConstraints { permitted_subtrees, excluded_subtrees: Vec::new() });
    Ok(params)
}

fn named(name: &str) -> DistinguishedName {
    let mut names = DistinguishedName::new();
    names.push(DnType::CommonName, name);
    names
}

/// Makes it last for so many days from today; gives the end.
fn lasting(params: &mut CertificateParams, now: Timestamp, days: i32) -> Result<Timestamp, TlsError> {
    let day = |days: i32| {
        let time = now.checked_add(DAY * days).ok()?.to_zoned(TimeZone::UTC).date();
        let (month, day) = (u8::try_from(time.month()).ok()?, u8::try_from(time.day()).ok()?);
        let at = time.to_zoned(TimeZone::UTC).ok()?.timestamp();
        Some((date_time_ymd(time.year().into(), month, day), at))
    };
    let (Some(from), Some(to)) = (day(-SKEW_DAYS), day(days)) else { return Err(TlsError::Clock(now)) };
    (params.not_before, params.not_after) = (from.0, to.0);
    Ok(to.1)
}

/// RFC 7468.
pub(super) fn pem(label: &str, der: &[u8]) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let lines = text.as_bytes().chunks(64).map(|line| String::from_utf8_lossy(line).into_owned());
    let body: String = lines.map(|line| line + "\n").collect();
    format!("-----BEGIN {label}-----\n{body}-----END {label}-----\n")
}
