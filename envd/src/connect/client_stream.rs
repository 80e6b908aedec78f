//! Client streams: many requests in one call, one answer.

use std::marker::PhantomData;

use axum::body::Body;
use axum::response::Response;
use envd_channel::envelope;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::BodyExt;

use super::{Code, Codec, Error, Message, Room};

/// The messages of a client stream, as they arrive.
#[derive(Debug)]
pub struct Messages<Q> {
    body: Body,
    codec: Codec,
    decoder: envelope::Decoder,
    /// What the decoder holds.
    buffered: usize,
    /// For that and for the message that was given last.
    room: Room<'static>,
    ended: bool,
    kind: PhantomData<fn() -> Q>,
}

impl<Q: Message> Messages<Q> {
    /// The next message; `None` when the client has sent all. Of the body no more than one message is held.
    pub async fn next(&mut self) -> Result<Option<Q>, Error> {
        // The message before is done with.
        self.room.shrink_to(self.buffered);
        loop {
            let invalid = |error: envelope::Error| match error {
                envelope::Error::TooLong { .. } => Error::new(Code::ResourceExhausted, error.to_string()),
                _ => Error::new(Code::InvalidArgument, error.to_string()),
            };
            if let Some(envelope) = self.decoder.envelope().map_err(invalid)? {
                self.buffered -= envelope::HEADER_SIZE + envelope.message.len();
                if envelope.end {
                    self.ended = true;
                    return Ok(None);
                }
                return self.codec.decode(&envelope.message).map(Some);
            }
            if self.ended {
                return Ok(None);
            }
            // Between two messages a client may be quiet for as long as it likes; in one, it holds room.
            let frame = match self.buffered {
                0 => self.body.frame().await,
                _ => super::next_frame(&mut self.body).await?,
            };
            match frame {
                Some(Ok(frame)) => {
                    let data = frame.data_ref().map_or(&[][..], |data| data);
                    self.buffered += data.len();
                    self.room.grow_to(self.buffered).await?;
                    self.decoder.push(data);
                }
                Some(Err(error)) => {
                    return Err(Error::new(Code::Canceled, format!("reading the request failed: {error}")));
                }
                None if self.decoder.is_empty() => self.ended = true,
                None => {
                    let message = "the body ends in the middle of a message";
                    return Err(Error::new(Code::InvalidArgument, message));
                }
            }
        }
    }
}

/// Answers a client stream: messages until the client has no more, then one.
pub async fn client_stream<Q, S, F>(
    request: Request<Body>,
    handle: impl FnOnce(Messages<Q>, HeaderMap) -> F,
) -> Response
where
    Q: Message,
    S: Message,
    F: Future<Output = Result<S, Error>>,
{
    let Some(codec) = Codec::of_stream(request.headers()) else { return super::unsupported_media_type() };
    let call = async {
        let deadline = super::timeout(request.headers())?;
        super::check_identity(request.headers(), "connect-content-encoding")?;
        let (parts, body) = request.into_parts();
        let messages = Messages {
            body,
            codec,
            decoder: envelope::Decoder::default(),
            buffered: 0,
            room: Room::new(),
            ended: false,
            kind: PhantomData,
        };
        let handled = handle(messages, parts.headers);
        match deadline {
            Some(deadline) => tokio::time::timeout(deadline, handled).await.map_err(|_| Error::deadline())?,
            None => handled.await,
        }
    };
    // A client of a stream expects an envelope also around a single answer, and an end after it.
    let body = match call.await.and_then(|message| codec.encode(&message)) {
        Ok(encoded) => [envelope::encode(0, &encoded), super::end_frame(None)].concat().into(),
        Err(error) => Body::from(super::end_frame(Some(&error))),
    };
    super::respond(StatusCode::OK, codec.stream_type(), body)
}
