//! Files of a sandbox, through its agent.

use sandbox_folder::client::{Attributes, ClientError, Entry, EntryKind, SandboxClient};
use tokio::task::JoinSet;

use super::item::{Item, MAX_PATH, What, is_name, join};
use super::{Progress, Sink};
use crate::verbs::error::Error;

/// Uploads at once: what one waits for, the others use.
const AT_ONCE: usize = 8;

/// Gives a file or a tree to `sink`; links are not followed.
pub(super) async fn pour(
    client: &SandboxClient,
    top: &[u8],
    name: Vec<u8>,
    sink: &mut Sink,
    progress: &mut Progress,
) -> Result<(), Error> {
    let failed = |path: &[u8]| {
        let path = shown(path);
        move |source| Error::File { path, source }
    };
    let entry = client.exact_stat(top).await.map_err(failed(top))?;
    put(client, top, name.clone(), &entry.kind, entry.attributes, sink, progress).await?;
    let mut open = Vec::new();
    if entry.kind == EntryKind::Directory {
        open.push(Open::new(top.to_vec(), name));
    }
    // A directory is followed by all that is in it: whoever unpacks a tar stream gives it its time after that.
    while let Some(here) = open.last_mut() {
        let Some(entry) = here.page.next() else {
            let page = client.list_after(&here.from, &here.after).await.map_err(failed(&here.from))?;
            if page.is_empty() {
                open.pop();
            } else {
                here.page = page.into_iter();
            }
            continue;
        };
        // The order is what ends the pages, and a name is what keeps a copy in its folder.
        if !is_name(&entry.name) || entry.name <= here.after {
            let expected = "names of a directory in their order";
            return Err(failed(&here.from)(ClientError::Protocol { expected, got: shown(&entry.name) }));
        }
        let (from, path) = (join(&here.from, &entry.name), join(&here.path, &entry.name));
        if from.len() > MAX_PATH {
            let reason = format!("{}: its path has more than {MAX_PATH} bytes", shown(&from));
            return Err(Error::invalid("path", reason));
        }
        here.after = entry.name;
        put(client, &from, path.clone(), &entry.kind, entry.attributes, sink, progress).await?;
        if entry.kind == EntryKind::Directory {
            open.push(Open::new(from, path));
        }
    }
    Ok(())
}

/// A directory that is being copied.
struct Open {
    from: Vec<u8>,
    path: Vec<u8>,
    /// The name that was copied last.
    after: Vec<u8>,
    page: std::vec::IntoIter<Entry>,
}

impl Open {
    fn new(from: Vec<u8>, path: Vec<u8>) -> Self {
        Self { from, path, after: Vec::new(), page: Vec::new().into_iter() }
    }
}

async fn put(
    client: &SandboxClient,
    from: &[u8],
    path: Vec<u8>,
    kind: &EntryKind,
    attributes: Attributes,
    sink: &mut Sink,
    progress: &mut Progress,
) -> Result<(), Error> {
    let what = match kind {
        EntryKind::Directory => What::Directory,
        EntryKind::Symlink(text) => What::Symlink(text.clone()),
        // Nothing to ask for.
        EntryKind::File(0) => What::File { length: 0, contents: Box::new(tokio::io::empty()) },
        EntryKind::File(_) => {
            let opened = client.open_file(from).await;
            let (length, contents) = opened.map_err(|source| Error::File { path: shown(from), source })?;
            What::File { length, contents: Box::new(contents) }
        }
        EntryKind::Special => {
            progress.leave_out(from, "it is no file, directory or link");
            return Ok(());
        }
    };
    sink.put(Item { path, what, attributes }, progress).await
}

/// A directory of a sandbox that items are put into.
pub(super) struct SandboxSink {
    client: SandboxClient,
    folder: Vec<u8>,
    uploads: JoinSet<Result<(), Error>>,
    /// They get their times when everything is in them.
    directories: Vec<(Vec<u8>, Attributes)>,
}

impl SandboxSink {
    pub(super) fn new(client: SandboxClient, folder: Vec<u8>) -> Self {
        Self { client, folder, uploads: JoinSet::new(), directories: Vec::new() }
    }

    pub(super) async fn put(&mut self, Item { path, what, attributes }: Item) -> Result<(), Error> {
        if path.is_empty() {
            // The place itself is there, and stays as it is.
            return Ok(());
        }
        let to = [&self.folder[..], b"/", &path].concat();
        let client = self.client.clone();
        let failed = |source| Error::File { path: shown(&to), source };
        match what {
            What::Directory => {
                client.put_directory(&to, attributes).await.map_err(failed)?;
                self.directories.push((to, attributes));
            }
            What::Symlink(text) => client.put_symlink(&to, attributes, &text).await.map_err(failed)?,
            What::File { contents, .. } => {
                while self.uploads.len() >= AT_ONCE {
                    self.settle_one().await?;
                }
                self.uploads.spawn(async move {
                    let done = client.put_file(&to, attributes, contents).await;
                    done.map_err(|source| Error::File { path: shown(&to), source })
                });
            }
            What::Link(of) => {
                // The sandbox's agent makes no hard links: a copy of the file is what remains.
                while !self.uploads.is_empty() {
                    self.settle_one().await?;
                }
                let of = [&self.folder[..], b"/", &of].concat();
                let (_, contents) = client.open_file(&of).await.map_err(failed)?;
                client.put_file(&to, attributes, contents).await.map_err(failed)?;
            }
        }
        Ok(())
    }

    pub(super) async fn failure(&mut self) -> Error {
        while !self.uploads.is_empty() {
            if let Err(error) = self.settle_one().await {
                return error;
            }
        }
        std::future::pending().await
    }

    pub(super) async fn finish(mut self) -> Result<(), Error> {
        while !self.uploads.is_empty() {
            self.settle_one().await?;
        }
        for (path, attributes) in self.directories.iter().rev() {
            let again = self.client.put_directory(path, *attributes).await;
            again.map_err(|source| Error::File { path: shown(path), source })?;
        }
        Ok(())
    }

    async fn settle_one(&mut self) -> Result<(), Error> {
        match self.uploads.join_next().await {
            Some(Ok(done)) => done,
            Some(Err(lost)) => Err(Error::io("write to", "the sandbox")(std::io::Error::other(lost))),
            None => Ok(()),
        }
    }
}

fn shown(path: &[u8]) -> String {
    crate::verbs::sandboxes::plain(&String::from_utf8_lossy(path))
}
