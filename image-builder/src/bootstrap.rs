//! A Debian base image from a Debian mirror, for machines that reach one but no registry.

use std::fs;
use std::io::{BufReader, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use oci::layer::{Change, Compression, Kind, LayerPath, LayerReader, LayerWriter, Metadata, Node, Timestamp};
use oci::{Digest, ImageName, Layer, Store};
use serde::Serialize;
use template::DataDir;

use crate::builder::write_image;
use crate::clock;
use crate::config::{HistoryEntry, ImageConfig};
use crate::console::{Console, Counted};
use crate::error::{Error, at};
use crate::interrupt::Interrupt;
use crate::plan::DEFAULT_PATH;

/// The label that tells such an image from Docker's own of the same name.
pub const LABEL: &str = "dev.tiffin.bootstrap";
/// The times of files, where `SOURCE_DATE_EPOCH` does not say: 1980-01-01, the earliest that zip files can hold, so that
/// Python's wheels still build in the image.
const DEFAULT_EPOCH: &str = "315532800";
const PROGRAM: &str = "mmdebstrap";
/// Files that Docker's own images have too: apt keeps no caches, which are larger than most of what a step installs, and
/// packages start no services while an image is built. Path, mode, contents.
const ADDED: [(&str, u32, &str); 2] = [
    (
        "etc/apt/apt.conf.d/90image",
        0o644,
        "Dir::Cache::pkgcache \"\";\nDir::Cache::srcpkgcache \"\";\nAPT::Keep-Downloaded-Packages \"false\";\n",
    ),
    ("usr/sbin/policy-rc.d", 0o755, "#!/bin/sh\nexit 101\n"),
];

/// What a bootstrap may be told.
#[derive(Clone, Debug)]
pub struct BootstrapOptions {
    /// The name that the image gets: `debian:SUITE`.
    pub name: ImageName,
    /// mmdebstrap's variant, as `minbase`.
    pub variant: String,
    /// The mirror; by default those of this machine's apt, else mmdebstrap's own choice.
    pub mirror: Option<String>,
    /// Make it anew even when the name is taken.
    pub force: bool,
}

/// What a bootstrap made.
#[derive(Clone, Debug, Serialize)]
pub struct BootstrapReport {
    /// The full name.
    pub name: String,
    /// Digest of the manifest.
    pub digest: Digest,
    /// Whether it was there already.
    pub existed: bool,
}

/// Makes the image with mmdebstrap, as one layer, and gives it its name.
pub fn bootstrap(
    data: &DataDir,
    options: &BootstrapOptions,
    console: &Console,
    interrupt: &Interrupt,
) -> Result<BootstrapReport, Error> {
    let name = &options.name;
    let suite = suite(name)?;
    let store = Store::open_or_create(&data.images())?;
    if let Some(found) = store.resolve(&name.canonical())?.filter(|_| !options.force) {
        return Ok(BootstrapReport { name: name.canonical(), digest: found.digest().clone(), existed: true });
    }
    let scratch = store.scratch()?;
    let tarball = scratch.path().join("root.tar");
    mmdebstrap(suite, options, &tarball, console, interrupt)?;

    let length = fs::metadata(&tarball).map_err(at(&tarball))?.len();
    let work = console.work("packing the layer", Some(length));
    let file = fs::File::open(&tarball).map_err(at(&tarball))?;
    let mut reader =
        LayerReader::new(Counted { inner: BufReader::with_capacity(256 << 10, file), work: &work });
    let mut writer = LayerWriter::new(&store, Compression::Zstd)?;
    // The added files get a time of the tree's own, so that the same packages make the same layer.
    let mut newest = Timestamp::default();
    while let Some(change) = reader.next_change()? {
        // A tree has no whiteouts; a file of such a name would become one in the layer.
        let Change::Node(node) = change else { continue };
        let path = node.path.as_bytes();
        let apt_cache = path.starts_with(b"var/cache/apt/") && path.ends_with(b".bin");
        if apt_cache || ADDED.iter().any(|(added, ..)| added.as_bytes() == path) {
            continue;
        }
        newest = newest.max(node.metadata.mtime);
        writer.append(&node, &mut reader)?;
    }
    for (path, mode, contents) in ADDED {
        let node = Node {
            path: LayerPath::parse(path.as_bytes())?,
            metadata: Metadata { mode, mtime: newest, ..Metadata::default() },
            kind: Kind::File { size: contents.len() as u64, offset: 0 },
        };
        writer.append(&node, contents.as_bytes())?;
    }
    let layer = writer.finish()?;
    drop(work);

    let created = clock::rfc3339(clock::now()?);
    let mut config = ImageConfig::default();
    config.cmd = Some(vec!["bash".to_owned()]);
    config.set_env("PATH", DEFAULT_PATH.to_owned());
    config.labels.insert(LABEL.to_owned(), format!("{PROGRAM} --variant={} {suite}", options.variant));
    let created_by = format!("{PROGRAM} --variant={} {suite}", options.variant);
    let history = [HistoryEntry { created: created.clone(), created_by, empty_layer: false }];
    let json = config.to_json(&created, std::slice::from_ref(&layer.diff_id), &history);
    let layer = Layer::new(&store, layer.descriptor, layer.diff_id)?;
    let descriptor = write_image(&store, &[layer], &json)?;
    store.tag(&name.canonical(), &descriptor)?;
    Ok(BootstrapReport { name: name.canonical(), digest: descriptor.digest().clone(), existed: false })
}

/// The suite that a name asks for.
fn suite(name: &ImageName) -> Result<&str, Error> {
    let wrong = |reason: &str| Error::Invalid { what: format!("image {name}"), reason: reason.to_owned() };
    if name.registry() != "docker.io" || name.repository() != "library/debian" || name.digest().is_some() {
        return Err(wrong("only Debian can be made this way: expected debian:SUITE, as debian:bookworm"));
    }
    match name.tag() {
        Some("latest") | None => Ok("stable"),
        Some(tag) => Ok(tag.strip_suffix("-slim").unwrap_or(tag)),
    }
}

fn mmdebstrap(
    suite: &str,
    options: &BootstrapOptions,
    tarball: &Path,
    console: &Console,
    interrupt: &Interrupt,
) -> Result<(), Error> {
    let mut command = Command::new(PROGRAM);
    command.arg(format!("--variant={}", options.variant)).arg("--format=tar");
    if std::env::var_os("SOURCE_DATE_EPOCH").is_none() {
        command.env("SOURCE_DATE_EPOCH", DEFAULT_EPOCH);
    }
    // By the environment: what goes through --aptopt stays in the image.
    for (variable, proxy) in apt_proxies() {
        command.env(variable, proxy);
    }
    command.arg(suite).arg(tarball);
    let mirrors = match &options.mirror {
        Some(mirror) => vec![mirror.clone()],
        None => host_mirrors(Path::new("/etc/apt"), suite),
    };
    command.args(&mirrors);
    let shown = if mirrors.is_empty() { "the default mirrors".to_owned() } else { mirrors.join(", ") };
    console.line(&format!("bootstrapping Debian {suite} ({}) from {shown}", options.variant));
    let failed = |reason: String| Error::Program { program: PROGRAM.to_owned(), reason };
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = interrupt.spawn(&mut command).map_err(|error| match error.kind() {
        ErrorKind::NotFound => failed(format!(
            "it is not installed; on Debian and Ubuntu it is in the package {PROGRAM} (apt-get install {PROGRAM})"
        )),
        _ => at(Path::new(PROGRAM))(error),
    })?;
    let last = child.stderr.take().map(|stderr| console.stream("| ", stderr)).unwrap_or_default();
    let status = child.wait();
    interrupt.unwatch(child.id());
    interrupt.check()?;
    match status.map_err(at(Path::new(PROGRAM)))? {
        status if status.success() => Ok(()),
        status => Err(failed(format!("it failed ({status}); its last words:\n  {}", last.join("\n  ")))),
    }
}

/// What this machine's apt has for the suite, its updates and its security fixes, as lines of a sources.list; nothing when
/// it has no such suite.
fn host_mirrors(apt: &Path, suite: &str) -> Vec<String> {
    let mut files = vec![apt.join("sources.list")];
    let more = fs::read_dir(apt.join("sources.list.d")).into_iter().flatten().flatten();
    let mut more: Vec<PathBuf> = more.map(|entry| entry.path()).collect();
    more.sort();
    files.extend(more);
    let wanted = [suite.to_owned(), format!("{suite}-updates"), format!("{suite}-security")];
    let mut lines = Vec::new();
    let mut has_base = false;
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        let entries = match file.extension().is_some_and(|extension| extension == "sources") {
            true => deb822_entries(&text),
            false => one_line_entries(&text),
        };
        for (uri, suites) in entries {
            // Third parties name their suites after Debian's too.
            let path = uri.trim_end_matches('/');
            if !uri.starts_with("http") || !(path.ends_with("/debian") || path.ends_with("/debian-security"))
            {
                continue;
            }
            for known in suites.iter().filter(|known| wanted.contains(known)) {
                has_base |= known == suite;
                lines.push(format!("deb {uri} {known} main"));
            }
        }
    }
    if has_base { lines } else { Vec::new() }
}

/// `deb [options] URI SUITE COMPONENT...`
fn one_line_entries(text: &str) -> Vec<(String, Vec<String>)> {
    let entry = |line: &str| {
        let rest = line.trim().strip_prefix("deb ")?.trim_start();
        let rest = match rest.strip_prefix('[') {
            Some(options) => options.split_once(']')?.1,
            None => rest,
        };
        let mut words = rest.split_whitespace();
        Some((words.next()?.to_owned(), vec![words.next()?.to_owned()]))
    };
    text.lines().filter_map(entry).collect()
}

/// Stanzas of `Types:`, `URIs:`, `Suites:`.
fn deb822_entries(text: &str) -> Vec<(String, Vec<String>)> {
    let mut entries = Vec::new();
    for stanza in text.split("\n\n") {
        let field = |name: &str| {
            let value = stanza.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            value.unwrap_or_default().split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        if field("Types").iter().any(|kind| kind == "deb") && field("Enabled") != ["no"] {
            entries.extend(field("URIs").into_iter().map(|uri| (uri, field("Suites"))));
        }
    }
    entries
}

/// This machine's proxies for apt, as variables; nothing where apt is not there.
fn apt_proxies() -> Vec<(&'static str, String)> {
    let output = Command::new("apt-config").arg("dump").stdin(Stdio::null()).output();
    let Ok(output) = output else { return Vec::new() };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let proxy = |line: &str| {
        let known = [("Acquire::http::Proxy ", "http_proxy"), ("Acquire::https::Proxy ", "https_proxy")];
        let (value, variable) =
            known.iter().find_map(|(option, variable)| Some((line.strip_prefix(option)?, *variable)))?;
        let value = value.trim().trim_end_matches(';').trim_matches('"');
        (!value.is_empty()).then(|| (variable, value.to_owned()))
    };
    text.lines().filter_map(proxy).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_suite_is_the_tag() {
        let suite_of = |name: &str| suite(&name.parse().unwrap()).map(str::to_owned);
        assert_eq!(suite_of("debian:bookworm").unwrap(), "bookworm");
        assert_eq!(suite_of("docker.io/library/debian:trixie-slim").unwrap(), "trixie");
        assert_eq!(suite_of("debian").unwrap(), "stable");
        for other in ["alpine:3", "ghcr.io/library/debian:bookworm", "user/debian:bookworm"] {
            assert!(suite_of(other).unwrap_err().is_bad_input(), "{other}");
        }
    }

    #[test]
    fn the_hosts_mirrors_are_used() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("sources.list.d");
        fs::create_dir(&folder).unwrap();
        assert!(host_mirrors(dir.path(), "bookworm").is_empty());
        fs::write(
            folder.join("z.list"),
            "# x\ndeb [a=b c=d] http://m/debian bookworm main contrib\ndeb https://other.example/apt bookworm x\n",
        )
        .unwrap();
        assert_eq!(host_mirrors(dir.path(), "bookworm"), ["deb http://m/debian bookworm main"]);
        fs::write(
            folder.join("a.sources"),
            "Types: deb\nURIs: https://n/debian/\nSuites: trixie trixie-updates\n\n\
             Types: deb\nURIs: http://s/debian-security\nSuites: bookworm-security\n",
        )
        .unwrap();
        let trixie = ["deb https://n/debian/ trixie main", "deb https://n/debian/ trixie-updates main"];
        assert_eq!(host_mirrors(dir.path(), "trixie"), trixie);
        let bookworm =
            ["deb http://s/debian-security bookworm-security main", "deb http://m/debian bookworm main"];
        assert_eq!(host_mirrors(dir.path(), "bookworm"), bookworm);
        assert!(host_mirrors(dir.path(), "sid").is_empty());
    }
}
