//! POST of /files: one file as application/octet-stream, or several as multipart/form-data.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{DefaultBodyLimit, FromRequest, Multipart};
use axum::response::Response;
use bytes::Bytes;
use envd_channel::name;
use futures::{Stream, StreamExt};
use http::{Request, StatusCode, header};

use super::attributes::{Attributes, Kind, MAX_LINK};
use super::encoding;
use super::metadata::Metadata;
use super::operations::{self, Owner, owner};
use super::partial::Partial;
use super::query::FilesQuery;
use super::service::absolute;
use super::{error_response, json_response};
use crate::connect::{Code, Error, Room};
use crate::root::{Held, Root};
use crate::sandbox::{Sandbox, Session};
use crate::users::User;

/// How much of a file is collected before it is written, where the agent has memory for it.
const CHUNK: usize = 512 << 10;

/// Files in one multipart upload.
const MAX_PARTS: usize = 1024;

/// Answers POST of /files.
pub async fn upload(
    sandbox: &Arc<Sandbox>,
    session: &Session,
    query: FilesQuery,
    request: Request<Body>,
) -> Response {
    let user = match query.user(sandbox, session, request.headers()).await {
        Ok(user) => user,
        Err(error) => return error_response(&error),
    };
    let received = async {
        let receiver = Receiver {
            root: sandbox.root().clone(),
            owner: owner(&user, sandbox.can_change_user()),
            metadata: Metadata::of_headers(request.headers())?,
            attributes: Attributes::of_headers(request.headers())?,
        };
        let request = decoded(sandbox.root(), request)?;
        let written = receive(&receiver, session, &user, &query, request).await?;
        let metadata = receiver.metadata.entries();
        let entries = written.iter().map(|path| {
            let mut entry = serde_json::json!({
                "path": name::encode(path),
                "name": name::encode(path.file_name().unwrap_or_default()),
                "type": receiver.attributes.kind.unwrap_or(Kind::File).name(),
            });
            if let Some(mode) = receiver.attributes.mode {
                entry["mode"] = mode.into();
            }
            if !metadata.is_empty() {
                entry["metadata"] = serde_json::json!(metadata);
            }
            entry
        });
        Ok(json_response(StatusCode::OK, &entries.collect()))
    };
    received.await.unwrap_or_else(|error: Error| error_response(&error))
}

/// The request with its content coding undone, whatever the content is.
fn decoded(root: &Root, request: Request<Body>) -> Result<Request<Body>, Error> {
    let coding = request.headers().get(header::CONTENT_ENCODING);
    match coding.map(|coding| coding.to_str().unwrap_or("").to_ascii_lowercase()).as_deref() {
        None | Some("" | "identity") => Ok(request),
        Some("gzip" | "x-gzip") => Ok(request.map(|body| {
            let plain = encoding::decompress(root.clone(), body.into_data_stream());
            Body::from_stream(plain.map(|bytes| bytes.map_err(io::Error::other)))
        })),
        Some(other) => Err(Error::new(
            Code::InvalidArgument,
            format!("Content-Encoding '{other}': expected identity or gzip"),
        )),
    }
}

async fn receive(
    receiver: &Receiver,
    session: &Session,
    user: &User,
    query: &FilesQuery,
    mut request: Request<Body>,
) -> Result<Vec<PathBuf>, Error> {
    let invalid = |message: String| Error::new(Code::InvalidArgument, message);
    let content_type =
        request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    let essence = content_type.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    match essence.as_str() {
        "application/octet-stream" => {
            if query.path.is_empty() {
                return Err(invalid("application/octet-stream needs the query 'path'".into()));
            }
            let path = absolute(session, user, &query.path)?;
            match receiver.attributes.kind {
                None | Some(Kind::File) => {
                    receiver.write(&path, request.into_body().into_data_stream()).await?;
                }
                Some(kind) => receiver.make(kind, &path, request.into_body()).await?,
            }
            return Ok(vec![path]);
        }
        "multipart/form-data" if receiver.attributes == Attributes::default() => {}
        "multipart/form-data" => {
            return Err(invalid("x-tiffin-* headers need the content type application/octet-stream".into()));
        }
        _ => {
            return Err(invalid(format!(
                "content type '{content_type}': expected multipart/form-data or application/octet-stream"
            )));
        }
    }
    // A file is streamed to the disk: its size is the disk's business.
    DefaultBodyLimit::disable().apply(&mut request);
    let mut parts = Multipart::from_request(request, &())
        .await
        .map_err(|error| invalid(format!("the multipart body cannot be read: {error}")))?;
    let mut written: Vec<PathBuf> = Vec::new();
    while let Some(part) =
        parts.next_field().await.map_err(|error| invalid(format!("multipart: {}", chain(&error))))?
    {
        if part.name() != Some("file") {
            continue;
        }
        // The whole file name, with its directories, as the clients send it; the query wins.
        let name = if query.path.is_empty() { part.file_name().unwrap_or("") } else { &query.path };
        if name.is_empty() {
            return Err(invalid("a part 'file' has no file name, and there is no query 'path'".into()));
        }
        // Without the `.` and the double slashes that make one path look like two.
        let path: PathBuf = absolute(session, user, name)?.components().collect();
        if written.contains(&path) {
            return Err(invalid(format!("'{}' is in this upload twice", path.display())));
        }
        if written.len() == MAX_PARTS {
            return Err(invalid(format!("more than {MAX_PARTS} files in one upload: send several")));
        }
        receiver.write(&path, part).await?;
        written.push(path);
    }
    Ok(written)
}

struct Receiver {
    root: Root,
    owner: Owner,
    metadata: Metadata,
    attributes: Attributes,
}

impl Receiver {
    /// A directory or a link.
    async fn make(&self, kind: Kind, path: &Path, body: Body) -> Result<(), Error> {
        let text = axum::body::to_bytes(body, MAX_LINK).await.map_err(|_| {
            let message = format!("a link's text has 1 to {MAX_LINK} bytes, and a directory has none");
            Error::new(Code::InvalidArgument, message)
        })?;
        let (attributes, owner, target) = (self.attributes, self.owner, path.to_owned());
        let made = self.root.run(move || match kind {
            Kind::Symlink => attributes.symlink(&target, &text, owner),
            _ => attributes.directory(&target, owner),
        });
        made.await.map_err(|error| operations::io_error("cannot make", path, &error))
    }

    async fn write<E: std::error::Error>(
        &self,
        path: &Path,
        mut body: impl Stream<Item = Result<Bytes, E>> + Unpin,
    ) -> Result<(), Error> {
        let failed = |error: io::Error| operations::io_error("cannot write", path, &error);
        let (target, owner, metadata) = (path.to_owned(), self.owner, self.metadata.clone());
        let attributes = self.attributes;
        let itself = attributes.kind.is_some();
        let begin = Held::make(&self.root, move || Partial::upload(&target, itself, owner, &metadata));
        let mut partial = begin.await.map_err(failed)?;
        let mut pending: Vec<Bytes> = Vec::new();
        let mut length = 0;
        let mut room = Room::new();
        while let Some(chunk) = body.next().await {
            // What is dropped without its end leaves nothing.
            let chunk = chunk.map_err(|error| {
                Error::new(Code::InvalidArgument, format!("the upload broke off: {}", chain(&error)))
            })?;
            length += chunk.len();
            pending.push(chunk);
            // Without room there is no waiting for more: the disk takes what is there.
            if length >= CHUNK || !room.try_grow_to(length) {
                length = 0;
                let pieces = std::mem::take(&mut pending);
                let written = partial.with(move |partial| append(partial, &pieces));
                partial = written.await.map_err(failed)?.0;
                room.shrink_to(0);
            }
        }
        let end = partial.finish(move |mut partial| {
            append(&mut partial, &pending)?;
            // After the owner, whose change takes setuid away, and after the last byte, which changes the time.
            attributes.apply(partial.file())?;
            partial.publish()
        });
        end.await.map_err(failed)
    }
}

fn append(partial: &mut Partial, pieces: &[Bytes]) -> io::Result<()> {
    let mut slices: Vec<_> = pieces.iter().map(|piece| io::IoSlice::new(piece)).collect();
    let mut rest = slices.as_mut_slice();
    while !rest.is_empty() {
        match partial.file().write_vectored(rest)? {
            0 if rest.iter().all(|slice| slice.is_empty()) => break,
            0 => return Err(io::ErrorKind::WriteZero.into()),
            written => io::IoSlice::advance_slices(&mut rest, written),
        }
    }
    Ok(())
}

/// An error with its causes: the libraries keep the useful part for the last one.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        cause = error.source();
    }
    text
}
