//! Images from where only skopeo can read: it copies them into a temporary layout.

use std::fmt;
use std::io::{self, Read};
use std::path::Path;
use std::process::{Command, Stdio};

use oci_spec::image::Descriptor;

use crate::error::at;
use crate::{Archive, Error, ImageName, InvalidReference, Store, copy_image};

/// The transports that are left to skopeo. Registries, `oci:`, `oci-archive:` and `docker-archive:` do without it.
const TRANSPORTS: [&str; 3] = ["docker-daemon:", "dir:", "containers-storage:"];

/// How much of what skopeo says is kept: its last line is the reason, and before it there are retries.
const MAX_MESSAGE: u64 = 16 << 10;

/// `docker-daemon:`, `dir:` or `containers-storage:`, and what skopeo knows behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SkopeoReference(String);

impl SkopeoReference {
    /// The reference, if `text` begins with one of skopeo's transports.
    pub(crate) fn parse(text: &str) -> Option<Result<Self, InvalidReference>> {
        let rest = TRANSPORTS.iter().find_map(|transport| text.strip_prefix(transport))?;
        let valid = !rest.is_empty() && !text.contains('\0');
        Some(valid.then(|| Self(text.to_owned())).ok_or_else(|| InvalidReference {
            text: text.to_owned(),
            reason: "expected an image behind the transport, as skopeo takes it".to_owned(),
        }))
    }

    /// A name in its registry, for programs that have no client of their own.
    pub fn of_registry(name: &ImageName) -> Self {
        Self(format!("docker://{name}"))
    }

    /// As Docker has it, a registry on this machine may be without TLS.
    fn is_loopback(&self) -> bool {
        let host =
            self.0.strip_prefix("docker://").and_then(|rest| rest.split('/').next()).unwrap_or_default();
        let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
        name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
    }

    /// Copies the image into a temporary layout under `scratch`, which goes with the answer. Of a list of images, the one
    /// for this machine is taken. Signatures are checked by skopeo's own policy.
    pub fn fetch(&self, scratch: &Path) -> Result<Archive, Error> {
        let folder = tempfile::tempdir_in(scratch).map_err(at(scratch))?;
        let layout = folder.path().join("layout");
        let destination = match layout.to_str() {
            // skopeo ends the path at the first colon.
            Some(path) if !path.contains(':') => format!("oci:{path}:image"),
            _ => {
                return Err(Error::Invalid {
                    what: scratch.display().to_string(),
                    reason: "skopeo cannot write to a path with a colon, or that is not UTF-8".to_owned(),
                });
            }
        };
        let mut skopeo = Command::new("skopeo");
        skopeo.args(["copy", "--quiet"]);
        if self.is_loopback() {
            skopeo.arg("--src-tls-verify=false");
        }
        skopeo.args([&self.0, &destination]);
        run(skopeo)?;
        Archive::in_folder(&layout, folder)
    }

    /// Writes an image of the store to where the reference says.
    pub fn send(&self, store: &Store, descriptor: &Descriptor) -> Result<(), Error> {
        let scratch = store.scratch()?;
        let layout = Store::temporary(scratch.path())?;
        let copied = copy_image(store, descriptor, &layout)?;
        layout.tag("image", &copied)?;
        let source = match scratch.path().to_str() {
            Some(path) if !path.contains(':') => format!("oci:{path}:image"),
            _ => {
                return Err(Error::Invalid {
                    what: scratch.path().display().to_string(),
                    reason: "skopeo cannot read from a path with a colon, or that is not UTF-8".to_owned(),
                });
            }
        };
        let mut skopeo = Command::new("skopeo");
        skopeo.args(["copy", "--quiet", &source, &self.0]);
        run(skopeo)
    }
}

impl fmt::Display for SkopeoReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn run(mut skopeo: Command) -> Result<(), Error> {
    let failed = |reason: String| Error::Program { program: "skopeo".to_owned(), reason };
    skopeo.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = skopeo.spawn().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => failed(
            "it is not installed, and only it knows this transport: install the package skopeo, or use an image of \
             the local store, oci:DIR, oci-archive:FILE or docker-archive:FILE"
                .to_owned(),
        ),
        _ => failed(error.to_string()),
    })?;
    let mut message = Vec::new();
    if let Some(mut stderr) = child.stderr.take() {
        // Read to its end, so that skopeo never waits for a reader.
        let read = stderr.by_ref().take(MAX_MESSAGE).read_to_end(&mut message);
        read.and_then(|_| io::copy(&mut stderr, &mut io::sink()))
            .map_err(|error| failed(error.to_string()))?;
    }
    let status = child.wait().map_err(|error| failed(error.to_string()))?;
    if !status.success() {
        return Err(failed(format!("{status}: {}", String::from_utf8_lossy(&message).trim())));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ImageReference;

    #[test]
    fn transports_are_told_from_names() {
        for text in ["docker-daemon:x:1", "dir:/a", "containers-storage:x"] {
            let reference: ImageReference = text.parse().unwrap();
            assert!(matches!(reference, ImageReference::Skopeo(_)), "{text}");
            assert_eq!(reference.to_string(), text);
        }
        for (name, loopback) in [
            ("localhost:5000/x", true),
            ("127.0.0.1/x", true),
            ("localhost.example.com/x", false),
            ("debian:12", false),
        ] {
            let reference = SkopeoReference::of_registry(&name.parse().unwrap());
            assert_eq!(reference.is_loopback(), loopback, "{reference}");
        }
        for bad in ["dir:", "docker-daemon:", "dir:a\0"] {
            assert!(bad.parse::<ImageReference>().is_err(), "{bad:?}");
        }
    }

    /// Both ends of a program that is not there, or that fails, are named; nothing is left behind.
    #[test]
    fn a_program_that_fails_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let missing = run(Command::new(dir.path().join("skopeo"))).unwrap_err().to_string();
        assert!(missing.contains("install the package skopeo"), "{missing}");
        let mut failing = Command::new("sh");
        failing.args(["-c", "head -c 1000000 /dev/zero >&2; exit 3"]);
        let failed = run(failing).unwrap_err().to_string();
        assert!(failed.starts_with("skopeo: exit status: 3"), "{}", &failed[..40]);
        assert!(failed.len() as u64 <= MAX_MESSAGE + 40);
    }
}
