//! GET and HEAD of /files.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use envd_channel::name;
use futures::{Stream, StreamExt};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};

use super::encoding::{self, Coding};
use super::query::FilesQuery;
use super::range::{self, Wanted};
use super::service::absolute;
use super::{error_response, json_error, operations};
use crate::connect::Error;
use crate::root::{Held, Root};
use crate::sandbox::{Sandbox, Session};

/// How much of a file is read at a time.
const CHUNK: u64 = 256 << 10;

/// Chunks that are read before the client has taken the one before them.
const READ_AHEAD: usize = 2;

/// Answers GET and HEAD of /files.
pub async fn download(
    sandbox: &Arc<Sandbox>,
    session: &Session,
    query: FilesQuery,
    method: &Method,
    headers: &HeaderMap,
) -> Response {
    let (path, file, length) = match open(sandbox, session, query, headers).await {
        Ok(opened) => opened,
        Err(error) => return error_response(&error),
    };
    let mut response = match range::wanted(headers, length) {
        Wanted::Unsatisfiable => {
            let message =
                format!("the file has {length} bytes: {:?} is beyond its end", headers.get(header::RANGE));
            let mut response = json_error(StatusCode::RANGE_NOT_SATISFIABLE, &message);
            set(&mut response, header::CONTENT_RANGE, &format!("bytes */{length}"));
            response
        }
        // A part of a compressed file would be of no use: it is sent as it is.
        Wanted::Part(range) => {
            let content_range = format!("bytes {}-{}/{length}", range.start, range.end - 1);
            let mut response = plain(sandbox.root(), file, range, method);
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            set(&mut response, header::CONTENT_RANGE, &content_range);
            response
        }
        Wanted::All => match encoding::accepted(headers) {
            Some(Coding::Identity) => plain(sandbox.root(), file, 0..length, method),
            Some(Coding::Gzip) => {
                let root = sandbox.root();
                let mut response = Response::new(if method == Method::HEAD {
                    Body::empty()
                } else {
                    Body::from_stream(encoding::compress(root.clone(), chunks(root, file, 0..length)))
                });
                set(&mut response, header::CONTENT_ENCODING, "gzip");
                response
            }
            None => json_error(
                StatusCode::NOT_ACCEPTABLE,
                "Accept-Encoding leaves nothing: files are sent as they are (identity) or as gzip",
            ),
        },
    };
    set(&mut response, header::VARY, "Accept-Encoding");
    if response.status().is_success() {
        set(&mut response, header::ACCEPT_RANGES, "bytes");
        set(&mut response, header::CONTENT_TYPE, "application/octet-stream");
        set(&mut response, header::CONTENT_DISPOSITION, &disposition(&path));
    }
    response
}

async fn open(
    sandbox: &Arc<Sandbox>,
    session: &Session,
    query: FilesQuery,
    headers: &HeaderMap,
) -> Result<(PathBuf, Held<File>, u64), Error> {
    let user = query.user(sandbox, session, headers).await?;
    let path = absolute(session, &user, &query.path)?;
    let opened = path.clone();
    let open = Held::make(sandbox.root(), move || {
        // A FIFO must not hold the thread until somebody writes to it.
        let nonblock = rustix::fs::OFlags::NONBLOCK.bits() as i32;
        let file = OpenOptions::new().read(true).custom_flags(nonblock).open(opened)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        Ok((file, metadata.len()))
    });
    let failed = |error: io::Error| operations::io_error("cannot read", &path, &error);
    let (file, length) =
        open.await.map_err(failed)?.split().ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
    Ok((path, file, length))
}

fn plain(root: &Root, file: Held<File>, range: Range<u64>, method: &Method) -> Response {
    let length = range.end - range.start;
    let body = match *method {
        Method::HEAD => Body::empty(),
        _ => Body::from_stream(chunks(root, file, range)),
    };
    let mut response = Response::new(body);
    response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    response
}

/// These bytes of a file. A file that shrinks meanwhile breaks the response off instead of lying.
fn chunks(
    root: &Root,
    file: Held<File>,
    range: Range<u64>,
) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    let file = Arc::new(file);
    let root = root.clone();
    let starts = (range.start..range.end).step_by(CHUNK as usize);
    let reads = futures::stream::iter(starts).map(move |start| {
        let (file, length) = (Arc::clone(&file), CHUNK.min(range.end - start) as usize);
        let root = root.clone();
        async move {
            let read = root.run(move || {
                let mut bytes = vec![0; length];
                file.get()?.read_exact_at(&mut bytes, start)?;
                Ok(Bytes::from(bytes))
            });
            read.await
        }
    });
    reads.buffered(READ_AHEAD)
}

/// RFC 6266: for names that a quoted string cannot hold, `filename*` has all of it in UTF-8, percent-encoded; the other
/// is for clients that know no better.
fn disposition(path: &Path) -> String {
    let name = name::encode(path.file_name().unwrap_or_default());
    let safe = |c: char| matches!(c, ' '..='~') && !matches!(c, '"' | '\\' | '%');
    let plain: String = name.chars().map(|c| if safe(c) { c } else { '_' }).collect();
    if plain == name {
        return format!("inline; filename=\"{name}\"");
    }
    let mut encoded = String::new();
    for byte in name.bytes() {
        // `attr-char` of RFC 8187.
        if byte.is_ascii_alphanumeric() || b"!#$&+-.^_`|~".contains(&byte) {
            encoded.push(byte.into());
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    format!("inline; filename=\"{plain}\"; filename*=UTF-8''{encoded}")
}

fn set(response: &mut Response, name: header::HeaderName, value: &str) {
    // All that is set here is printable ASCII.
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_gets_through() {
        let of = |name: &str| disposition(&Path::new("/tmp").join(name::decode(name)));
        assert_eq!(of("report 1.txt"), "inline; filename=\"report 1.txt\"");
        assert_eq!(
            of("a\"b\\c\nd%.txt"),
            "inline; filename=\"a_b_c_d_.txt\"; filename*=UTF-8''a%22b%5Cc%0Ad%25.txt"
        );
        assert_eq!(of("é"), "inline; filename=\"_\"; filename*=UTF-8''%C3%A9");
        assert_eq!(of("\u{efff}"), "inline; filename=\"_\"; filename*=UTF-8''%EE%BF%BF");
    }
}
