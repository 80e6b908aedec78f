//! The client door's plain HTTP: what is not a call.

use bytes::Bytes;
use http::{HeaderMap, Method, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde::Deserialize;

use super::{Body, ClientError, SandboxClient, collect, empty, invalid, refusal};

/// A TCP port that a process in the sandbox listens on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct OpenPort {
    /// The address that it is bound to.
    pub address: String,
    /// Its number.
    pub port: u16,
}

impl SandboxClient {
    /// Sends a request with this client's token and user added to its headers; bodies are streamed both ways.
    pub async fn http<B>(
        &self,
        method: Method,
        target: &str,
        headers: HeaderMap,
        body: B,
    ) -> Result<Response<Incoming>, ClientError>
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let body: Body = body.map_err(std::io::Error::other).boxed_unsync();
        let mut request = self.request(method, target).body(body).map_err(invalid)?;
        let ours = request.headers().clone();
        for (name, value) in &headers {
            // Ours win: they say who the caller is.
            if !ours.contains_key(name) {
                request.headers_mut().append(name, value.clone());
            }
        }
        self.send(request).await
    }

    /// The TCP ports that processes in the sandbox listen on.
    pub async fn ports(&self) -> Result<Vec<OpenPort>, ClientError> {
        let request = self.request(Method::GET, "/ports").body(empty()).map_err(invalid)?;
        let response = self.send(request).await?;
        if response.status() != StatusCode::OK {
            return Err(refusal(response).await);
        }
        serde_json::from_slice(&collect(response).await?)
            .map_err(|error| ClientError::protocol("a list of ports", error.to_string()))
    }
}
