//! One side of a copy: a path here, a path in a sandbox, or a tar stream.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use envd_channel::name;
use envd_proto::filesystem::FileType;
use sandbox_folder::client::{ClientError, Code, EntryKind, SandboxClient};

use super::archive::{self, ArchiveSink};
use super::item::split;
use super::local::{self, LocalSink};
use super::place::{Found, Shape};
use super::remote::{self, SandboxSink};
use super::{Progress, Sink, Top};
use crate::verbs::error::Error;
use crate::verbs::sandboxes::{Sandbox, Sandboxes, Shim};

pub(super) enum Side {
    Local(PathBuf),
    Sandbox { sandbox: Box<Sandbox>, shim: Option<Shim>, client: SandboxClient, path: Vec<u8> },
    Archive,
}

/// What a path leads to, once links that are to be followed were.
#[derive(Clone, Debug)]
pub(super) enum Target {
    Local(PathBuf),
    Sandbox(Vec<u8>),
    Archive,
}

impl Side {
    /// Docker's rule: what begins with `/` or `.` is here, what has a colon is in a sandbox.
    pub(super) fn parse(text: &OsStr, sandboxes: &Sandboxes, user: Option<&str>) -> Result<Self, Error> {
        let bytes = text.as_bytes();
        if bytes == b"-" {
            return Ok(Self::Archive);
        }
        if bytes.is_empty() {
            return Err(Error::invalid("path", "it is empty"));
        }
        let colon = bytes.iter().position(|byte| *byte == b':');
        let (Some(colon), false) = (colon, bytes.starts_with(b"/") || bytes.starts_with(b".")) else {
            return Ok(Self::Local(text.into()));
        };
        let sandbox = sandboxes.find(&String::from_utf8_lossy(&bytes[..colon]))?;
        let path = &bytes[colon + 1..];
        if path.is_empty() {
            return Err(Error::invalid("path", format!("{}: there is none after the colon", text.display())));
        }
        let mut client = sandbox.client()?;
        if let Some(user) = user {
            client = client.with_user(user);
        }
        let shim = sandbox.shim();
        Ok(Self::Sandbox { sandbox: Box::new(sandbox), shim, client, path: absolute(path) })
    }

    pub(super) fn is_sandbox(&self) -> bool {
        matches!(self, Self::Sandbox { .. })
    }

    /// For messages.
    pub(super) fn shown(&self) -> String {
        match self {
            Self::Local(path) => path.display().to_string(),
            Self::Sandbox { sandbox, path, .. } => {
                format!("{}:{}", sandbox.id, String::from_utf8_lossy(path))
            }
            Self::Archive => "-".to_owned(),
        }
    }

    fn failed(&self) -> impl Fn(ClientError) -> Error {
        let path = self.shown();
        move |source| Error::File { path: path.clone(), source }
    }

    /// What a copy from here begins with.
    pub(super) async fn top(&self, follow: bool) -> Result<Top, Error> {
        match self {
            Self::Archive => Ok(Top { shape: Shape::Archive, what: Target::Archive }),
            Self::Local(path) => {
                let failed = |error| Error::io("read", path)(error);
                let contents = is_contents(path.as_os_str().as_bytes());
                let mut path = path.clone();
                // A slash at the end follows too, in the kernel.
                if follow && !contents {
                    path = path.canonicalize().map_err(failed)?;
                }
                let metadata = path.symlink_metadata().map_err(failed)?;
                // `..` has a name as well.
                let name = match path.file_name() {
                    Some(name) => name.to_owned(),
                    None => path.canonicalize().map_err(failed)?.file_name().unwrap_or_default().to_owned(),
                };
                let shape = shape(metadata.is_dir(), contents || name.is_empty(), name.as_bytes());
                Ok(Top { shape, what: Target::Local(path) })
            }
            Self::Sandbox { client, path, .. } => {
                let contents = is_contents(path);
                let mut path = path.clone();
                if follow && !contents {
                    let entry =
                        client.stat(&name::encode(OsStr::from_bytes(&path))).await.map_err(self.failed())?;
                    if let Some(target) = entry.symlink_target {
                        path = absolute(name::decode(&target).as_os_str().as_bytes());
                    }
                }
                let entry = client.exact_stat(&path).await.map_err(self.failed())?;
                let clean = clean(&path);
                let name = split(&clean).1;
                let shape = shape(entry.kind == EntryKind::Directory, contents || name.is_empty(), name);
                Ok(Top { shape, what: Target::Sandbox(path) })
            }
        }
    }

    /// What a copy to here finds, and where: a link to a file means that file, as for a program that writes to it.
    pub(super) async fn look(&self) -> Result<(Found, Target), Error> {
        match self {
            Self::Archive => Ok((Found::Archive, Target::Archive)),
            Self::Local(path) => {
                let slash = path.as_os_str().as_bytes().ends_with(b"/");
                let failed = |error| Error::io("read", path)(error);
                match path.metadata() {
                    Ok(metadata) if metadata.is_dir() => Ok((Found::Directory, Target::Local(path.clone()))),
                    Ok(_) => {
                        let path = path.canonicalize().map_err(failed)?;
                        Ok((Found::File(name_of(&path)), Target::Local(path)))
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                        let above = parent(path);
                        if !above.is_dir() {
                            let reason = format!("{} is no directory", above.display());
                            return Err(Error::invalid("destination", reason));
                        }
                        Ok((nothing(slash, &name_of(path)), Target::Local(path.clone())))
                    }
                    Err(error) => Err(failed(error)),
                }
            }
            Self::Sandbox { client, path, .. } => {
                let slash = path.ends_with(b"/");
                let clean = clean(path);
                match kind(client, path).await.map_err(self.failed())? {
                    Some((true, _)) => Ok((Found::Directory, Target::Sandbox(clean))),
                    Some((false, resolved)) => {
                        let path = resolved.unwrap_or(clean);
                        Ok((Found::File(split(&path).1.to_vec()), Target::Sandbox(path)))
                    }
                    None => {
                        let (above, name) = split(&clean);
                        let above = if above.is_empty() { b"/" } else { above };
                        if kind(client, above)
                            .await
                            .map_err(self.failed())?
                            .is_none_or(|(directory, _)| !directory)
                        {
                            let above = String::from_utf8_lossy(above);
                            let reason = format!("{above} is no directory in the sandbox");
                            return Err(Error::invalid("destination", reason));
                        }
                        Ok((nothing(slash, name), Target::Sandbox(clean.clone())))
                    }
                }
            }
        }
    }

    /// What takes the items of a copy to what was found: inside it, or in its place.
    pub(super) fn sink(&self, found: &Target, inside: bool) -> Result<Sink, Error> {
        match (self, found) {
            (Self::Sandbox { client, .. }, Target::Sandbox(path)) => {
                let folder = if inside { path } else { split(path).0 };
                Ok(Sink::Sandbox(SandboxSink::new(client.clone(), folder.to_vec())))
            }
            (_, Target::Local(path)) => {
                Ok(Sink::Local(LocalSink::open(&if inside { path.clone() } else { parent(path) })?))
            }
            _ => Ok(Sink::Archive(ArchiveSink::new())),
        }
    }

    /// Gives everything to `sink`, under this name.
    pub(super) async fn pour(
        &self,
        top: &Top,
        name: Vec<u8>,
        sink: &mut Sink,
        progress: &mut Progress,
    ) -> Result<(), Error> {
        match (self, &top.what) {
            (Self::Sandbox { client, .. }, Target::Sandbox(path)) => {
                remote::pour(client, path, name, sink, progress).await
            }
            (_, Target::Local(path)) => local::pour(path, name, sink, progress).await,
            _ => archive::pour(sink, progress).await,
        }
    }
}

/// What is at a path in a sandbox, links followed: whether it is a directory, and where a link leads.
async fn kind(client: &SandboxClient, path: &[u8]) -> Result<Option<(bool, Option<Vec<u8>>)>, ClientError> {
    // A link reports what it leads to.
    match client.stat(&name::encode(OsStr::from_bytes(path))).await {
        Ok(entry) => {
            let directory = entry.r#type() == FileType::Directory;
            let target = entry
                .symlink_target
                .map(|target| clean(&absolute(name::decode(&target).as_os_str().as_bytes())));
            Ok(Some((directory, target)))
        }
        Err(error) if error.code() == Some(Code::NotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

fn nothing(slash: bool, name: &[u8]) -> Found {
    if slash { Found::NoDirectory(name.to_vec()) } else { Found::Nothing(name.to_vec()) }
}

fn shape(directory: bool, contents: bool, name: &[u8]) -> Shape {
    match (directory, contents) {
        (true, true) => Shape::Contents,
        (true, false) => Shape::Directory(name.to_vec()),
        (false, _) => Shape::File(name.to_vec()),
    }
}

/// Whether a path means what is in a directory.
fn is_contents(path: &[u8]) -> bool {
    path == b"." || path.ends_with(b"/.")
}

/// Docker's rule for paths in a container: they count from the root.
fn absolute(path: &[u8]) -> Vec<u8> {
    if path.starts_with(b"/") { path.to_vec() } else { [b"/", path].concat() }
}

/// Without `.`, `..` and slashes that are too many; by the letters of the path alone.
fn clean(path: &[u8]) -> Vec<u8> {
    let mut names: Vec<&[u8]> = Vec::new();
    for name in path.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => drop(names.pop()),
            name => names.push(name),
        }
    }
    let mut clean = Vec::new();
    for name in names {
        clean.push(b'/');
        clean.extend_from_slice(name);
    }
    clean
}

fn name_of(path: &Path) -> Vec<u8> {
    path.file_name().unwrap_or_default().as_bytes().to_vec()
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_in_a_sandbox_count_from_its_root() {
        for (path, expected) in
            [("srv", "/srv"), ("/a//b/./c/", "/a/b/c"), ("../../x", "/x"), ("/", ""), (".", "")]
        {
            assert_eq!(clean(&absolute(path.as_bytes())), expected.as_bytes(), "{path}");
        }
        assert!(is_contents(b".") && is_contents(b"a/.") && !is_contents(b"a.") && !is_contents(b"a/"));
    }
}
