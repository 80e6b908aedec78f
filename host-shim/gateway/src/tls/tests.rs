//! Certificates, their files and their authority. Handshakes are tested on a real port (tests/tls).

use std::fs;
use std::os::unix::fs::PermissionsExt;

use rcgen::{CertificateParams, KeyPair};

use super::*;

struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        let files = Self { dir: tempfile::tempdir().unwrap() };
        files.write("a");
        files
    }

    fn pair(&self) -> PairFiles {
        PairFiles { cert: self.dir.path().join("cert.pem"), key: self.dir.path().join("key.pem") }
    }

    /// Gives the certificate's DER.
    fn write(&self, name: &str) -> Vec<u8> {
        let key = KeyPair::generate().unwrap();
        let cert = CertificateParams::new([format!("{name}.example")]).unwrap().self_signed(&key).unwrap();
        fs::write(self.pair().cert, authority::pem("CERTIFICATE", cert.der())).unwrap();
        fs::write(self.pair().key, authority::pem("PRIVATE KEY", key.serialized_der())).unwrap();
        fs::set_permissions(self.pair().key, fs::Permissions::from_mode(0o600)).unwrap();
        cert.der().to_vec()
    }
}

fn day(days: i32) -> Timestamp {
    let first: Timestamp = "2030-01-01T12:00:00Z".parse().unwrap();
    first + jiff::SignedDuration::from_hours(24) * days
}

#[test]
fn what_the_files_become_counts_and_what_is_broken_does_not() {
    let files = Files::new();
    let tls = Tls::open(Source::Files(files.pair())).unwrap();
    let now = Timestamp::now();
    let first = tls.config();
    assert!(!tls.refresh(false, now).unwrap(), "nothing has changed");
    assert!(Arc::ptr_eq(&first, &tls.config()));
    assert!(tls.refresh(true, now).unwrap(), "it was asked for");

    let before = tls.config();
    // As a renewal is seen half-way: the new certificate, the old key.
    let old_key = fs::read(files.pair().key).unwrap();
    files.write("b");
    let new_key = fs::read(files.pair().key).unwrap();
    fs::write(files.pair().key, old_key).unwrap();
    let error = tls.refresh(false, now).unwrap_err().to_string();
    assert!(error.contains("cert.pem") && error.contains("key.pem"), "{error}");
    assert!(Arc::ptr_eq(&before, &tls.config()));
    assert!(!tls.refresh(false, now).unwrap(), "not again until something changes");
    fs::write(files.pair().key, new_key).unwrap();
    assert!(tls.refresh(false, now).unwrap());
    assert!(!Arc::ptr_eq(&before, &tls.config()));

    let before = tls.config();
    for broken in ["", "-----BEGIN CERTIFICATE-----\n", "noise", &"-".repeat(2 << 20)] {
        fs::write(files.pair().cert, broken).unwrap();
        let error = tls.refresh(false, now).unwrap_err().to_string();
        assert!(error.contains("cert.pem: expected"), "{error}");
    }
    fs::remove_file(files.pair().cert).unwrap();
    assert!(tls.refresh(false, now).is_err());
    assert!(Arc::ptr_eq(&before, &tls.config()));
    files.write("c");
    assert!(tls.refresh(false, now).unwrap());
}

#[test]
fn links_that_are_swapped_above_the_files_are_a_change() {
    let files = Files::new();
    let (one, two, now) = ("one", "two", files.dir.path().join("now"));
    for folder in [one, two] {
        fs::create_dir(files.dir.path().join(folder)).unwrap();
        files.write(folder);
        for name in ["cert.pem", "key.pem"] {
            fs::rename(files.dir.path().join(name), files.dir.path().join(folder).join(name)).unwrap();
        }
    }
    std::os::unix::fs::symlink(one, &now).unwrap();
    let tls =
        Tls::open(Source::Files(PairFiles { cert: now.join("cert.pem"), key: now.join("key.pem") })).unwrap();
    assert!(!tls.refresh(false, Timestamp::now()).unwrap());
    fs::remove_file(&now).unwrap();
    std::os::unix::fs::symlink(two, &now).unwrap();
    assert!(tls.refresh(false, Timestamp::now()).unwrap());
}

#[test]
fn files_that_cannot_serve_say_why() {
    let files = Files::new();
    let read = |pair: &PairFiles| pair.read().unwrap_err().to_string();
    let swapped = PairFiles { cert: files.pair().key, key: files.pair().cert };
    assert!(read(&swapped).contains("expected certificates in PEM, got none"), "{}", read(&swapped));
    let folder = PairFiles { cert: files.dir.path().to_owned(), ..files.pair() };
    assert!(read(&folder).contains("expected a PEM file"), "{}", read(&folder));
    let no_key = PairFiles { key: "/nonexistent/key".into(), ..files.pair() };
    assert!(read(&no_key).starts_with("/nonexistent/key: "), "{}", read(&no_key));
    let other = Files::new();
    let mixed = PairFiles { key: other.pair().key, ..files.pair() };
    assert!(read(&mixed).contains("KeyMismatch"), "{}", read(&mixed));
    assert!(files.pair().read().is_ok());
}

#[test]
fn an_authority_stays_and_its_key_is_its_owners() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::of(dir.path(), "boxes.example");
    let first = authority.certificate().unwrap();
    assert_eq!(authority.certificate().unwrap(), first);
    assert_eq!(fs::read_to_string(authority.ca_file()).unwrap(), first);
    assert_ne!(Authority::of(dir.path(), "other.example").certificate().unwrap(), first);
    let mode = |name: &str| {
        fs::metadata(authority.ca_file().with_file_name(name)).unwrap().permissions().mode() & 0o777
    };
    assert_eq!((mode("authority.pem"), mode("ca.pem")), (0o600, 0o644));
    assert!(!first.contains("PRIVATE"));
    // A crash between the two files.
    fs::remove_file(authority.ca_file()).unwrap();
    assert_eq!(authority.certificate().unwrap(), first);
    // What is broken is not replaced by another authority in silence.
    let kept = authority.ca_file().with_file_name("authority.pem");
    let whole = fs::read(&kept).unwrap();
    for broken in [&whole[..whole.len() / 2], &whole[whole.len() / 2..], b""] {
        fs::write(&kept, broken).unwrap();
        let error = authority.certificate().unwrap_err().to_string();
        assert!(error.contains("authority.pem: expected") && error.contains("remove the file"), "{error}");
    }
    fs::remove_file(&kept).unwrap();
    assert_ne!(authority.certificate().unwrap(), first);
}

#[test]
fn two_at_once_have_one_authority() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::of(dir.path(), "boxes.example");
    let had: Vec<String> = std::thread::scope(|threads| {
        let both = [(); 4].map(|()| threads.spawn(|| authority.certificate().unwrap()));
        both.map(|thread| thread.join().unwrap()).into()
    });
    assert!(had.iter().all(|one| *one == had[0]));
}

#[test]
fn certificates_are_renewed_before_they_end() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::of(dir.path(), "boxes.example");
    let tls = Tls::open(Source::SelfSigned(authority.clone())).unwrap();
    let (first, ends) = (tls.config(), tls.ends().unwrap());
    let hours = |hours: i64| jiff::SignedDuration::from_hours(hours);
    assert!(!tls.refresh(false, ends - hours(31 * 24)).unwrap());
    assert!(tls.refresh(false, ends - hours(29 * 24)).unwrap());
    assert!(!Arc::ptr_eq(&first, &tls.config()) && tls.ends().unwrap() > ends);

    // The authority itself, ten years on: never does it end before what it vouches for.
    let ca = |now| {
        let issued = authority.issue(now).unwrap();
        let pem = fs::read(authority.ca_file()).unwrap();
        let ca =
            <rustls::pki_types::CertificateDer as rustls::pki_types::pem::PemObject>::from_pem_slice(&pem);
        assert!(validity::not_after(&ca.unwrap()).unwrap() >= issued.ends);
        assert_eq!(validity::not_after(&issued.pair.cert[0]), Some(issued.ends));
        pem
    };
    fs::remove_dir_all(dir.path().join("tls")).unwrap();
    let made = ca(day(0));
    assert_eq!(ca(day(3500)), made);
    assert_ne!(ca(day(3600)), made);
}

#[test]
fn clients_trust_it_for_the_domain_and_for_nothing_else() {
    use rustls::client::WebPkiServerVerifier;
    use rustls::client::danger::ServerCertVerifier;
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, UnixTime};

    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::of(dir.path(), "boxes.example");
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.certificate().unwrap().as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(ring::default_provider());
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
    let trusts = |authority: &Authority, name: &'static str| {
        let issued = authority.issue(Timestamp::now()).unwrap();
        let name = name.try_into().unwrap();
        verifier.verify_server_cert(&issued.pair.cert[0], &[], &name, &[], UnixTime::now()).is_ok()
    };
    for name in
        ["boxes.example", "api.boxes.example", "49983-abc.boxes.example", "localhost", "127.0.0.1", "::1"]
    {
        assert!(trusts(&authority, name), "{name}");
    }
    for name in ["a.b.boxes.example", "boxes.example.org", "example", "127.0.0.2"] {
        assert!(!trusts(&authority, name), "{name}");
    }
    // Whoever has its key gains nothing elsewhere.
    let folder = authority.ca_file().parent().unwrap().to_owned();
    let other = folder.with_file_name("other.example");
    std::os::unix::fs::symlink(folder, other).unwrap();
    assert!(!trusts(&Authority::of(dir.path(), "other.example"), "other.example"));
    assert!(trusts(&authority, "boxes.example"), "it is still the same authority");
}
