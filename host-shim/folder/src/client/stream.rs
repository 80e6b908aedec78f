//! Server streams of the Connect protocol.

use std::marker::PhantomData;

use bytes::Buf;
use envd_channel::envelope;
use http::{Method, StatusCode, header};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use prost::Message;

use super::{ClientError, SandboxClient, code, full, invalid, refusal};

/// The messages of a server stream. What is not asked for is not read.
pub(super) struct Messages<R> {
    body: Incoming,
    decoder: envelope::Decoder,
    message: PhantomData<fn() -> R>,
}

impl<R: Message + Default> Messages<R> {
    /// Calls `method`.
    pub(super) async fn open(
        client: &SandboxClient,
        method: &str,
        request: &impl Message,
    ) -> Result<Self, ClientError> {
        let request = client
            .request(Method::POST, &format!("/{method}"))
            .header(header::CONTENT_TYPE, "application/connect+proto")
            .body(full(envelope::encode(0, &request.encode_to_vec())))
            .map_err(invalid)?;
        let response = client.send(request).await?;
        if response.status() != StatusCode::OK {
            return Err(refusal(response).await);
        }
        let decoder = envelope::Decoder::default();
        Ok(Self { body: response.into_body(), decoder, message: PhantomData })
    }

    /// The next message; `None` at the stream's end.
    pub(super) async fn next(&mut self) -> Result<Option<R>, ClientError> {
        loop {
            let broken = |error: envelope::Error| ClientError::protocol("an envelope", error.to_string());
            if let Some(envelope) = self.decoder.envelope().map_err(broken)? {
                if envelope.end {
                    return code::end_of_stream(&envelope.message).map(|()| None);
                }
                return R::decode(envelope.message)
                    .map(Some)
                    .map_err(|error| ClientError::protocol("an event", error.to_string()));
            }
            match self.body.frame().await {
                Some(frame) => {
                    if let Ok(data) = frame?.into_data() {
                        self.decoder.push(data.chunk());
                    }
                }
                None => {
                    return Err(ClientError::protocol("the end of the stream", "the end of the connection"));
                }
            }
        }
    }
}
