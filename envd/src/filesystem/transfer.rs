//! /files: whole files down and up.
//!
//! An upload appears whole or not at all: it is written beside its target, synced and renamed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{DefaultBodyLimit, FromRequest, Multipart};
use axum::response::Response;
use bytes::Bytes;
use futures::{Stream, StreamExt};
use http::{HeaderMap, HeaderValue, Request, StatusCode, header};
use serde::Deserialize;

use super::operations::{self, Owner, owner};
use super::service::absolute;
use crate::connect::{Code, Error};
use crate::root::Root;
use crate::sandbox::{Sandbox, Session};
use crate::users::User;

/// How much of a file is read or written at a time.
const CHUNK: usize = 256 << 10;

/// Files in one multipart upload.
const MAX_PARTS: usize = 1024;

/// The query of /files.
#[derive(Debug, Default, Deserialize)]
pub struct FilesQuery {
    #[serde(default)]
    path: String,
    #[serde(default)]
    username: String,
}

impl FilesQuery {
    /// The user that the query names, else the one of the call's authorization, else the default one.
    async fn user(&self, sandbox: &Sandbox, session: &Session, headers: &HeaderMap) -> Result<User, Error> {
        if self.username.is_empty() {
            session.user(sandbox, headers).await
        } else {
            session.user_named(sandbox, &self.username).await
        }
    }
}

/// Answers GET /files.
pub async fn download(
    sandbox: &Arc<Sandbox>,
    session: &Session,
    query: FilesQuery,
    headers: &HeaderMap,
) -> Response {
    match open(sandbox, session, query, headers).await {
        Ok((path, file, length)) => {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            // RFC 6266: a quoted string holds neither quotes nor control characters.
            let name: String = name.chars().filter(|c| !c.is_control() && !matches!(c, '"' | '\\')).collect();
            let disposition = format!("inline; filename=\"{name}\"");
            let mut response = Response::new(Body::from_stream(chunks(sandbox.root().clone(), file, length)));
            let headers = response.headers_mut();
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
            headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
            if let Ok(disposition) = HeaderValue::from_str(&disposition) {
                headers.insert(header::CONTENT_DISPOSITION, disposition);
            }
            response
        }
        Err(error) => error_response(&error),
    }
}

async fn open(
    sandbox: &Arc<Sandbox>,
    session: &Session,
    query: FilesQuery,
    headers: &HeaderMap,
) -> Result<(PathBuf, File, u64), Error> {
    let user = query.user(sandbox, session, headers).await?;
    let path = absolute(session, &user, &query.path)?;
    let opened = path.clone();
    let (file, metadata) = sandbox
        .root()
        .run(move || {
            // A FIFO must not hold the thread until somebody writes to it.
            let nonblock = rustix::fs::OFlags::NONBLOCK.bits() as i32;
            let file = OpenOptions::new().read(true).custom_flags(nonblock).open(&opened)?;
            let metadata = file.metadata()?;
            Ok((file, metadata))
        })
        .await
        .map_err(|error| operations::io_error("cannot read", &path, &error))?;
    if !metadata.is_file() {
        let message = format!("path '{}' is not a regular file", path.display());
        return Err(Error::new(Code::InvalidArgument, message));
    }
    Ok((path, file, metadata.len()))
}

/// The first `length` bytes of a file. A file that shrinks meanwhile breaks the response off instead of lying.
fn chunks(root: Root, file: File, length: u64) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    futures::stream::try_unfold((root, file, length), |(root, mut file, left)| async move {
        if left == 0 {
            return Ok(None);
        }
        let (file, bytes) = root
            .run(move || {
                let mut bytes = vec![0; CHUNK.min(usize::try_from(left).unwrap_or(CHUNK))];
                let count = file.read(&mut bytes)?;
                bytes.truncate(count);
                Ok((file, bytes))
            })
            .await?;
        if bytes.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the file became shorter while it was read",
            ));
        }
        let left = left - bytes.len() as u64;
        Ok(Some((Bytes::from(bytes), (root, file, left))))
    })
}

/// Answers POST /files: one file as application/octet-stream, or several as multipart/form-data.
pub async fn upload(
    sandbox: &Arc<Sandbox>,
    session: &Session,
    query: FilesQuery,
    request: Request<Body>,
) -> Response {
    match receive(sandbox, session, query, request).await {
        Ok(written) => {
            let entries: Vec<_> = written
                .iter()
                .map(|path| {
                    serde_json::json!({
                        "path": path.to_string_lossy(),
                        "name": path.file_name().unwrap_or_default().to_string_lossy(),
                        "type": "file",
                    })
                })
                .collect();
            json_response(StatusCode::OK, &serde_json::Value::Array(entries))
        }
        Err(error) => error_response(&error),
    }
}

async fn receive(
    sandbox: &Arc<Sandbox>,
    session: &Session,
    query: FilesQuery,
    request: Request<Body>,
) -> Result<Vec<PathBuf>, Error> {
    let user = query.user(sandbox, session, request.headers()).await?;
    let receiver = Receiver { root: sandbox.root().clone(), owner: owner(&user, sandbox.can_change_user()) };
    // What is not served is refused, never left out in silence.
    if request.headers().get(header::CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity") {
        return Err(Error::new(
            Code::InvalidArgument,
            "Content-Encoding is not served yet: send the file as it is",
        ));
    }
    if let Some(name) = request.headers().keys().find(|name| name.as_str().starts_with("x-metadata-")) {
        return Err(Error::new(Code::InvalidArgument, format!("metadata ({name}) is not served yet")));
    }
    let content_type =
        request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    if content_type.starts_with("application/octet-stream") {
        if query.path.is_empty() {
            return Err(Error::new(Code::InvalidArgument, "application/octet-stream needs the query 'path'"));
        }
        let path = absolute(session, &user, &query.path)?;
        let body =
            request.into_body().into_data_stream().map(|chunk| chunk.map_err(|error| error.to_string()));
        receiver.write(&path, body).await?;
        return Ok(vec![path]);
    }
    if !content_type.starts_with("multipart/form-data") {
        let message = format!(
            "content type '{content_type}': expected multipart/form-data or application/octet-stream"
        );
        return Err(Error::new(Code::InvalidArgument, message));
    }
    // A file is streamed to the disk: its size is the disk's business.
    let mut request = request;
    DefaultBodyLimit::disable().apply(&mut request);
    let mut parts = Multipart::from_request(request, &()).await.map_err(|error| {
        Error::new(Code::InvalidArgument, format!("the multipart body cannot be read: {error}"))
    })?;
    let mut written: Vec<PathBuf> = Vec::new();
    loop {
        let part = parts.next_field().await;
        let part = part.map_err(|error| Error::new(Code::InvalidArgument, format!("multipart: {error}")))?;
        let Some(part) = part else { break };
        if part.name() != Some("file") {
            continue;
        }
        // The whole file name, with its directories, as the clients send it; the query wins.
        let name = if query.path.is_empty() { part.file_name().unwrap_or("") } else { &query.path };
        if name.is_empty() {
            return Err(Error::new(
                Code::InvalidArgument,
                "a part 'file' has no file name, and there is no query 'path'",
            ));
        }
        let path = absolute(session, &user, name)?;
        if written.contains(&path) {
            let message = format!("'{}' is in this upload twice", path.display());
            return Err(Error::new(Code::InvalidArgument, message));
        }
        if written.len() == MAX_PARTS {
            return Err(Error::new(
                Code::ResourceExhausted,
                format!("more than {MAX_PARTS} files in one upload"),
            ));
        }
        receiver.write(&path, part.map(|chunk| chunk.map_err(|error| error.to_string()))).await?;
        written.push(path);
    }
    Ok(written)
}

struct Receiver {
    root: Root,
    owner: Owner,
}

impl Receiver {
    async fn write(
        &self,
        path: &Path,
        mut body: impl Stream<Item = Result<Bytes, String>> + Unpin,
    ) -> Result<(), Error> {
        let failed = |error: io::Error| operations::io_error("cannot write", path, &error);
        let (target, owner) = (path.to_owned(), self.owner);
        let mut partial = self.root.run(move || Partial::begin(target, owner)).await.map_err(failed)?;
        let mut pending = Vec::new();
        while let Some(chunk) = body.next().await {
            let chunk = match chunk {
                Ok(chunk) => chunk,
                Err(error) => {
                    // The removal is a file system call, so it has its place on a thread of the root.
                    let removed = self.root.run(move || {
                        drop(partial);
                        Ok(())
                    });
                    let _ = removed.await;
                    return Err(Error::new(Code::Canceled, format!("the upload broke off: {error}")));
                }
            };
            pending.extend_from_slice(&chunk);
            if pending.len() >= CHUNK {
                let bytes = std::mem::take(&mut pending);
                partial = self.root.run(move || partial.append(&bytes)).await.map_err(failed)?;
            }
        }
        self.root.run(move || partial.append(&pending)?.publish()).await.map_err(failed)
    }
}

/// A file being written beside its target; dropped without [`Partial::publish`] it leaves nothing.
struct Partial {
    file: File,
    temporary: PathBuf,
    target: PathBuf,
    published: bool,
}

impl Partial {
    fn begin(target: PathBuf, owner: Owner) -> io::Result<Self> {
        // A link at the end of the path means what it leads to, as for a program that writes to it.
        let target = fs::canonicalize(&target).unwrap_or(target);
        let mode = match fs::metadata(&target) {
            Ok(metadata) if metadata.is_dir() => return Err(io::Error::from(io::ErrorKind::IsADirectory)),
            // A rename would replace a device or a FIFO, which is never what a client means.
            Ok(metadata) if !metadata.is_file() => {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
            }
            Ok(metadata) => std::os::unix::fs::MetadataExt::mode(&metadata) & 0o7777,
            Err(_) => 0o644,
        };
        let parent = target.parent().ok_or(io::ErrorKind::IsADirectory)?;
        operations::make_directories(parent, owner)?;
        let (file, temporary) = loop {
            let temporary = parent.join(format!(".envd-upload-{:016x}", random()?));
            match OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary) {
                Ok(file) => break (file, temporary),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        };
        let partial = Self { file, temporary, target, published: false };
        if let Some((uid, gid)) = owner {
            fchown(&partial.file, Some(uid), Some(gid))?;
        }
        // What open made was cut by the umask.
        partial.file.set_permissions(fs::Permissions::from_mode(mode))?;
        Ok(partial)
    }

    fn append(mut self, bytes: &[u8]) -> io::Result<Self> {
        self.file.write_all(bytes)?;
        Ok(self)
    }

    fn publish(mut self) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.temporary, &self.target)?;
        self.published = true;
        let parent = self.target.parent().ok_or(io::ErrorKind::IsADirectory)?;
        File::open(parent)?.sync_all()
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.published {
            // Nothing more can be done about a temporary file that does not go.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

fn random() -> io::Result<u64> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(u64::from_ne_bytes(bytes))
}

/// The error in the form of the agent's plain HTTP endpoints: a number and a message.
pub fn error_response(error: &Error) -> Response {
    let status = match error.code() {
        Code::ResourceExhausted => StatusCode::INSUFFICIENT_STORAGE,
        Code::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        Code::AlreadyExists => StatusCode::BAD_REQUEST,
        code => code.status(),
    };
    json_response(status, &serde_json::json!({ "code": status.as_u16(), "message": error.message() }))
}

fn json_response(status: StatusCode, body: &serde_json::Value) -> Response {
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
