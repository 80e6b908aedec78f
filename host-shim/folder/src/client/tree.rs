//! Trees of files: exact entries, directories of any size, and uploads that keep modes, times and links.

use std::ffi::OsStr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use envd_channel::name;
use envd_proto::filesystem::{EntryInfo, ListDirRequest, ListDirResponse, StatRequest, StatResponse};
use futures::TryStreamExt;
use http::{Method, Response, StatusCode, header};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Incoming;
use serde::Deserialize;
use tokio::io::AsyncRead;
use tokio_util::io::{ReaderStream, StreamReader};

use super::file::target;
use super::{Body, ClientError, SandboxClient, empty, entry, full, invalid, refusal};

/// How much of a file is read from its source at a time.
const CHUNK: usize = 64 << 10;

/// What stands at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A file of this length.
    File(u64),
    /// A directory.
    Directory,
    /// A symbolic link with this text.
    Symlink(Vec<u8>),
    /// A device, a FIFO or a socket.
    Special,
}

/// What a copy keeps of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Permissions with setuid, setgid and sticky.
    pub mode: u32,
    /// Seconds since the epoch, and nanoseconds; `None` means now.
    pub mtime: Option<(i64, u32)>,
}

/// An entry as `lstat` sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its last name, the bytes of it.
    pub name: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// What a copy keeps.
    pub attributes: Attributes,
}

impl Entry {
    /// The entry of an exact answer.
    fn of(info: EntryInfo) -> Result<Self, ClientError> {
        let odd = |got: &str| ClientError::protocol("the permissions of an exact entry", got);
        // Go's words for modes: letters for the type and the special bits, then nine for the permissions.
        let Some((letters, bits)) = info.permissions.split_at_checked(info.permissions.len().wrapping_sub(9))
        else {
            return Err(odd(&info.permissions));
        };
        let mut mode = bits.bytes().fold(0, |mode, bit| mode << 1 | u32::from(bit != b'-'));
        for (letter, bit) in [('u', 0o4000), ('g', 0o2000), ('t', 0o1000)] {
            mode |= if letters.contains(letter) { bit } else { 0 };
        }
        let kind = match info.link_text {
            Some(text) => EntryKind::Symlink(name::decode(&text).into_os_string().into_vec()),
            None if letters.contains('L') => {
                return Err(ClientError::protocol("the text of a link", "none (an older agent?)"));
            }
            None if letters.contains('d') => EntryKind::Directory,
            None if letters.contains(['D', 'p', 'S', 'c']) => EntryKind::Special,
            None => EntryKind::File(u64::try_from(info.size).unwrap_or(0)),
        };
        let mtime = info.modified_time.map(|time| (time.seconds, time.nanos.cast_unsigned()));
        let name = name::decode(&info.name).into_os_string().into_vec();
        Ok(Self { name, kind, attributes: Attributes { mode, mtime } })
    }
}

/// What the agent says about what an upload made; it is told only by agents that know of attributes.
#[derive(Deserialize)]
struct Made {
    #[serde(default)]
    mode: Option<u32>,
    #[serde(rename = "type")]
    kind: String,
}

impl SandboxClient {
    /// The entry at a path, not following a link at its end.
    pub async fn exact_stat(&self, path: &[u8]) -> Result<Entry, ClientError> {
        let request = StatRequest { path: name::encode(OsStr::from_bytes(path)), exact: true };
        let response: StatResponse = self.unary("filesystem.Filesystem/Stat", &request).await?;
        Entry::of(entry(response.entry)?)
    }

    /// The entries of a directory whose names come after this one, some thousands of them; none at the end.
    pub async fn list_after(&self, path: &[u8], after: &[u8]) -> Result<Vec<Entry>, ClientError> {
        let request = ListDirRequest {
            path: name::encode(OsStr::from_bytes(path)),
            depth: 1,
            exact: true,
            after: Some(name::encode(OsStr::from_bytes(after))),
        };
        let response: ListDirResponse = self.unary("filesystem.Filesystem/ListDir", &request).await?;
        response.entries.into_iter().map(Entry::of).collect()
    }

    /// A file's contents as a stream, with their length.
    pub async fn open_file(
        &self,
        path: &[u8],
    ) -> Result<(u64, impl AsyncRead + Send + Unpin + use<>), ClientError> {
        let request = self.request(Method::GET, &target(path)).body(empty()).map_err(invalid)?;
        let response = self.send(request).await?;
        if response.status() != StatusCode::OK {
            return Err(refusal(response).await);
        }
        let length = response.headers().get(header::CONTENT_LENGTH);
        let length = length.and_then(|length| length.to_str().ok()?.parse().ok());
        let length = length.ok_or_else(|| ClientError::protocol("a file's length", "none"))?;
        let body = response.into_body().into_data_stream().map_err(std::io::Error::other);
        Ok((length, StreamReader::new(body)))
    }

    /// Puts a file at a path itself, with its attributes; it appears whole.
    pub async fn put_file(
        &self,
        path: &[u8],
        attributes: Attributes,
        contents: impl AsyncRead + Send + 'static,
    ) -> Result<(), ClientError> {
        let frames = ReaderStream::with_capacity(contents, CHUNK).map_ok(Frame::data);
        self.put(path, "file", attributes, StreamBody::new(frames).boxed_unsync()).await
    }

    /// Makes a directory, unless it is there, and gives it its attributes.
    pub async fn put_directory(&self, path: &[u8], attributes: Attributes) -> Result<(), ClientError> {
        self.put(path, "directory", attributes, empty()).await
    }

    /// Puts a symbolic link at a path itself.
    pub async fn put_symlink(
        &self,
        path: &[u8],
        attributes: Attributes,
        text: &[u8],
    ) -> Result<(), ClientError> {
        self.put(path, "symlink", attributes, full(text.to_vec())).await
    }

    async fn put(
        &self,
        path: &[u8],
        kind: &str,
        Attributes { mode, mtime }: Attributes,
        body: Body,
    ) -> Result<(), ClientError> {
        let mut request = self
            .request(Method::POST, &target(path))
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .header("x-tiffin-type", kind)
            .header("x-tiffin-mode", format!("{mode:o}"));
        if let Some((seconds, nanos)) = mtime {
            request = request.header("x-tiffin-mtime", format!("{seconds}.{nanos:09}"));
        }
        let response: Response<Incoming> = self.send(request.body(body).map_err(invalid)?).await?;
        if !response.status().is_success() {
            return Err(refusal(response).await);
        }
        // Read to its end: it is there only when the sandbox has said so.
        let answer = super::collect(response).await?;
        match serde_json::from_slice::<Vec<Made>>(&answer).as_deref() {
            Ok([made]) if made.kind == kind && made.mode == Some(mode) => Ok(()),
            _ => Err(ClientError::protocol(
                "an upload with its attributes",
                "one without them: the agent in the sandbox is older than this program",
            )),
        }
    }
}
