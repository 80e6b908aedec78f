//! Files of the sandbox: `filesystem.Filesystem` and /files.
//!
//! Every call runs on a thread of the sandbox's [`Root`](crate::root::Root), as root, and gives what it makes to the
//! calling user. A path is looked up by the kernel inside that root and nowhere else. Names that are not UTF-8 are
//! escaped at the edge (module `name`), so that every file can be shown and named.

mod attributes;
mod download;
mod encoding;
mod entry;
mod list;
mod metadata;
mod operations;
mod partial;
mod query;
mod range;
mod relocate;
mod remove;
mod service;
mod signature;
mod upload;
mod walk;
mod watch;

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use axum::body::Body;
use axum::response::Response;
use http::{HeaderMap, HeaderValue, StatusCode, header};

pub use download::download;
pub(crate) use envd_channel::name::decode as path_of;
pub use query::FilesQuery;
pub use service::FilesystemService;
pub use signature::Operation;
pub use upload::upload;

use crate::connect::{Code, Error};
use crate::sandbox::{Sandbox, Session};
use crate::users::User;

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

/// The error in the form of the agent's plain HTTP endpoints: a number and a message.
pub fn error_response(error: &Error) -> Response {
    let status = match error.code() {
        Code::ResourceExhausted => StatusCode::INSUFFICIENT_STORAGE,
        Code::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        Code::AlreadyExists => StatusCode::BAD_REQUEST,
        code => code.status(),
    };
    json_error(status, error.message())
}

fn json_error(status: StatusCode, message: &str) -> Response {
    json_response(status, &serde_json::json!({ "code": status.as_u16(), "message": message }))
}

fn json_response(status: StatusCode, body: &serde_json::Value) -> Response {
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Reads a regular file up to `limit` bytes. Never waits for the other end of a FIFO that stands in its place.
pub(crate) fn read_bounded(path: impl AsRef<Path>, limit: usize) -> io::Result<Vec<u8>> {
    let nonblock = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let file = OpenOptions::new().read(true).custom_flags(nonblock).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(limit as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}
