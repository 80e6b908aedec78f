//! Files of a sandbox: calls, and the plain HTTP of /file.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use envd_proto::filesystem::FileType;
use http::{HeaderMap, HeaderName, StatusCode, header};
use sandbox_folder::client::{ClientError, Code, SandboxClient};
use serde_json::{Value, json};
use tokio::io::AsyncWrite;

use super::call::Form;
use super::rpc::RpcError;
use super::text::into_text;
use crate::ApiError;

/// The longest file that goes into one message; GET /file has no limit.
const MAX_READ: usize = 16 << 20;

/// A call that failed, in words that say at what.
pub(super) fn failed<'a>(doing: &'a str, path: &'a str) -> impl Fn(ClientError) -> RpcError + 'a {
    move |error| RpcError::failed(format!("error {doing} '{path}': {error}"))
}

/// The entries of a directory; a link is no directory, wherever it leads.
pub(super) async fn list(client: &SandboxClient, path: &str) -> Result<Value, RpcError> {
    let entries = client.list_dir(path, 1).await.map_err(failed("listing files in", path))?;
    let item = |entry: &envd_proto::filesystem::EntryInfo| {
        let is_dir = entry.r#type() == FileType::Directory && entry.symlink_target.is_none();
        json!({ "name": entry.name, "isDir": is_dir })
    };
    Ok(entries.iter().map(item).collect())
}

/// A file's contents.
pub(super) async fn read(client: &SandboxClient, path: &str, form: Form) -> Result<Value, RpcError> {
    let mut contents = Bounded(Vec::new());
    client.download(path, &mut contents).await.map_err(failed("reading file", path))?;
    Ok(Value::String(match form {
        Form::Text => into_text(contents.0),
        Form::Base64 => BASE64.encode(contents.0),
    }))
}

/// New contents of a file.
pub(super) async fn write(client: &SandboxClient, path: &str, contents: Vec<u8>) -> Result<Value, RpcError> {
    client.write_file(path, contents).await.map_err(failed("writing file", path))?;
    Ok(Value::Null)
}

/// Removes a file or directory; one that is not there is removed already.
pub(super) async fn remove(client: &SandboxClient, path: &str) -> Result<Value, RpcError> {
    client.remove(path).await.map_err(failed("removing file or dir", path))?;
    Ok(Value::Null)
}

/// Makes a directory; one that is there is made already.
pub(super) async fn make_dir(client: &SandboxClient, path: &str) -> Result<Value, RpcError> {
    match client.make_dir(path).await {
        Err(error) if error.code() != Some(Code::AlreadyExists) => Err(failed("creating dir", path)(error)),
        _ => Ok(Value::Null),
    }
}

/// A file in memory, up to a limit.
struct Bounded(Vec<u8>);

impl AsyncWrite for Bounded {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.0.len() + bytes.len() > MAX_READ {
            let reason = format!("more than {MAX_READ} bytes: use downloadFile (GET /file)");
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::FileTooLarge, reason)));
        }
        self.0.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// What of a request to /file means something to the agent's /files.
const REQUEST_HEADERS: [HeaderName; 12] = [
    header::ACCEPT_ENCODING,
    header::ACCESS_CONTROL_REQUEST_HEADERS,
    header::ACCESS_CONTROL_REQUEST_METHOD,
    header::CONTENT_ENCODING,
    header::CONTENT_LENGTH,
    header::CONTENT_TYPE,
    header::IF_MODIFIED_SINCE,
    header::IF_NONE_MATCH,
    header::IF_RANGE,
    header::ORIGIN,
    header::RANGE,
    header::EXPECT,
];

/// What of an answer is about a connection, and not about the file.
const HOP_BY_HOP: [HeaderName; 3] =
    [header::CONNECTION, header::TRANSFER_ENCODING, HeaderName::from_static("keep-alive")];

/// Passes a request to /file on, as one to /files: an upload's `file` goes to the user's home under its own name.
pub(super) async fn forward(client: &SandboxClient, request: Request) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let query = parts.uri.query().unwrap_or_default();
    // The path alone: who the caller is, is not for the caller to say.
    let path = query.split('&').find(|pair| pair.starts_with("path="));
    let target = path.map_or_else(|| "/files".to_owned(), |path| format!("/files?{path}"));
    let mut headers = HeaderMap::new();
    for name in REQUEST_HEADERS {
        if let Some(value) = parts.headers.get(&name) {
            headers.insert(name, value.clone());
        }
    }
    let answer = client.http(parts.method, &target, headers, body).await.map_err(|error| {
        tracing::debug!(%error, "a transfer failed");
        ApiError::new(StatusCode::BAD_GATEWAY, "the sandbox does not answer")
    })?;
    let mut answer = answer.map(Body::new);
    for name in HOP_BY_HOP {
        answer.headers_mut().remove(name);
    }
    Ok(answer)
}
