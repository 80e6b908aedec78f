//! The server side of the Connect protocol, in both codecs, as small functions that turn a handler into a response.
//!
//! Source: connectrpc.com/docs/protocol. Unary calls are `application/json` or `application/proto`; streams are
//! `application/connect+json` or `application/connect+proto` with an envelope for each message and one at the end.

mod budget;
mod client_stream;
mod codec;
mod error;
mod keepalive;

use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use envd_channel::envelope;
use envd_proto::limits::MAX_CONNECT_MESSAGE;
use futures::{Stream, StreamExt};
use http::{HeaderMap, Request, StatusCode, header};
use http_body_util::BodyExt;
use hyper::body::{Body as _, Frame};

pub(crate) use budget::Room;
pub use client_stream::{Messages, client_stream};
pub use codec::{Codec, Message};
pub use error::{Code, Error};
pub use keepalive::keepalive;

/// How long a client may send nothing of a message that it has begun: it holds room that others wait for.
const STALL: Duration = Duration::from_secs(60);

/// The call's deadline, which a client sends in `Connect-Timeout-Ms`: at most ten digits, so always in range.
pub fn timeout(headers: &HeaderMap) -> Result<Option<Duration>, Error> {
    let Some(value) = headers.get("connect-timeout-ms") else { return Ok(None) };
    let text = value.to_str().unwrap_or_default();
    let valid = !text.is_empty() && text.len() <= 10 && text.bytes().all(|byte| byte.is_ascii_digit());
    let parsed = if valid { text.parse().ok() } else { None };
    let milliseconds = parsed.ok_or_else(|| {
        Error::new(Code::InvalidArgument, format!("Connect-Timeout-Ms {text:?}: expected 1 to 10 digits"))
    })?;
    // The SDKs leave the header out for "no timeout"; a zero means the same.
    Ok((milliseconds > 0).then(|| Duration::from_millis(milliseconds)))
}

/// Answers a unary call.
pub async fn unary<Q, S, F>(request: Request<Body>, handle: impl FnOnce(Q, HeaderMap) -> F) -> Response
where
    Q: Message,
    S: Message,
    F: Future<Output = Result<S, Error>>,
{
    let Some(codec) = Codec::of_unary(request.headers()) else {
        return unsupported_media_type();
    };
    let call = async {
        let deadline = timeout(request.headers())?;
        check_identity(request.headers(), header::CONTENT_ENCODING.as_str())?;
        let (parts, body) = request.into_parts();
        // Held until the answer: the message is as large as its body was.
        let mut room = Room::new();
        let message = codec.decode(&read_body(body, &mut room).await?)?;
        let handled = handle(message, parts.headers);
        match deadline {
            Some(deadline) => tokio::time::timeout(deadline, handled).await.map_err(|_| Error::deadline())?,
            None => handled.await,
        }
    };
    match call.await.and_then(|message| codec.encode(&message)) {
        Ok(body) => respond(StatusCode::OK, codec.unary_type(), body.into()),
        Err(error) => error.into_unary_response(),
    }
}

/// Answers a server stream: one request message, then messages until the stream ends.
pub async fn server_stream<Q, S, F, T>(
    request: Request<Body>,
    handle: impl FnOnce(Q, HeaderMap) -> F,
) -> Response
where
    Q: Message,
    S: Message + 'static,
    F: Future<Output = Result<T, Error>>,
    T: Stream<Item = Result<S, Error>> + Send + 'static,
{
    let Some(codec) = Codec::of_stream(request.headers()) else {
        return unsupported_media_type();
    };
    let call = async {
        check_identity(request.headers(), "connect-content-encoding")?;
        let (parts, body) = request.into_parts();
        let mut room = Room::new();
        let message = codec.decode(&single_message(read_body(body, &mut room).await?)?)?;
        handle(message, parts.headers).await
    };
    let body = match call.await {
        Ok(messages) => Body::from_stream(frames(codec, messages)),
        Err(error) => Body::from(end_frame(Some(&error))),
    };
    respond(StatusCode::OK, codec.stream_type(), body)
}

/// The frames of a stream, each flushed by itself: messages, then the end, with the error if there was one.
fn frames<S: Message>(
    codec: Codec,
    messages: impl Stream<Item = Result<S, Error>> + Send + 'static,
) -> impl Stream<Item = Result<Bytes, std::convert::Infallible>> + Send {
    let ended = false;
    futures::stream::unfold((Box::pin(messages), ended), move |(mut messages, ended)| async move {
        if ended {
            return None;
        }
        let (frame, ended) = match messages.next().await {
            Some(message) => match message.and_then(|message| codec.encode_enveloped(&message)) {
                Ok(frame) => (frame, false),
                Err(error) => (end_frame(Some(&error)), true),
            },
            None => (end_frame(None), true),
        };
        Some((Ok(frame), (messages, ended)))
    })
}

fn end_frame(error: Option<&Error>) -> Bytes {
    let end = match error {
        Some(error) => serde_json::json!({ "error": error.to_json() }),
        None => serde_json::json!({}),
    };
    envelope::encode(envelope::END_OF_STREAM, end.to_string().as_bytes())
}

fn single_message(body: Vec<u8>) -> Result<Bytes, Error> {
    let mut decoder = envelope::Decoder::default();
    decoder.push(&body);
    drop(body);
    match decoder.envelope().map_err(envelope_error)? {
        Some(envelope) if !envelope.end => Ok(envelope.message),
        _ => Err(Error::new(Code::InvalidArgument, "the body has no message in an envelope")),
    }
}

fn envelope_error(error: envelope::Error) -> Error {
    let code = match error {
        envelope::Error::TooLong { .. } => Code::ResourceExhausted,
        envelope::Error::Compressed | envelope::Error::Flags { .. } => Code::InvalidArgument,
    };
    Error::new(code, error.to_string())
}

/// The whole body, counted in `room` as it comes.
async fn read_body(mut body: Body, room: &mut Room<'_>) -> Result<Vec<u8>, Error> {
    // The envelope's header is five bytes more than the message.
    const MOST: usize = MAX_CONNECT_MESSAGE + envelope::HEADER_SIZE;
    let too_long = || {
        let message = format!("the message is longer than {MAX_CONNECT_MESSAGE} bytes");
        Error::new(Code::ResourceExhausted, message)
    };
    // Where the client said how much comes, all is asked for at once: many that each got a part would stop each other.
    let announced = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
    if announced > MOST {
        return Err(too_long());
    }
    room.grow_to(announced).await?;
    let mut bytes = Vec::new();
    loop {
        match next_frame(&mut body).await? {
            Some(Ok(frame)) => {
                let data = frame.data_ref().map_or(&[][..], |data| data);
                let length = bytes.len() + data.len();
                if length > MOST {
                    return Err(too_long());
                }
                room.grow_to(length).await?;
                bytes.extend_from_slice(data);
            }
            Some(Err(error)) => {
                return Err(Error::new(Code::Canceled, format!("reading the request failed: {error}")));
            }
            None => return Ok(bytes),
        }
    }
}

/// What comes next of a message that has begun.
async fn next_frame(body: &mut Body) -> Result<Option<Result<Frame<Bytes>, axum::Error>>, Error> {
    tokio::time::timeout(STALL, body.frame()).await.map_err(|_| {
        let message = format!("nothing came of the request for {} s", STALL.as_secs());
        Error::new(Code::DeadlineExceeded, message)
    })
}

fn check_identity(headers: &HeaderMap, name: &str) -> Result<(), Error> {
    match headers.get(name) {
        Some(encoding) if encoding != "identity" => Err(Error::new(
            Code::Unimplemented,
            format!("{name} {encoding:?} is not supported: send the message with identity"),
        )),
        _ => Ok(()),
    }
}

fn unsupported_media_type() -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::UNSUPPORTED_MEDIA_TYPE;
    let accept = "application/json, application/proto, application/connect+json, application/connect+proto";
    response.headers_mut().insert("accept-post", http::HeaderValue::from_static(accept));
    response
}

fn respond(status: StatusCode, content_type: &'static str, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use envd_proto::process::{ListRequest, ListResponse, ProcessInfo};

    fn request(content_type: &str, body: &'static [u8]) -> Request<Body> {
        Request::builder().header(header::CONTENT_TYPE, content_type).body(Body::from(body)).unwrap()
    }

    async fn list(_: ListRequest, _: HeaderMap) -> Result<ListResponse, Error> {
        Ok(ListResponse { processes: vec![ProcessInfo { pid: 7, ..Default::default() }] })
    }

    async fn text(response: Response) -> (StatusCode, String) {
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8_lossy(&body).into_owned())
    }

    #[tokio::test]
    async fn unary_calls_answer_in_the_codec_that_they_came_in() {
        let json = unary(request("application/json", b"{\"novel\":1}"), list).await;
        assert_eq!(json.headers()[header::CONTENT_TYPE], "application/json");
        assert_eq!(text(json).await, (StatusCode::OK, r#"{"processes":[{"pid":7}]}"#.into()));

        let proto = unary(request("application/proto", b""), list).await;
        assert_eq!(proto.headers()[header::CONTENT_TYPE], "application/proto");
        assert_eq!(text(proto).await.1, "\u{a}\u{2}\u{10}\u{7}");
    }

    #[tokio::test]
    async fn errors_carry_the_code_as_a_string_and_as_a_status() {
        let fail = |_: ListRequest, _| async { Err::<ListResponse, _>(Error::new(Code::NotFound, "gone")) };
        let response = unary(request("application/json", b"{}"), fail).await;
        assert_eq!(
            text(response).await,
            (StatusCode::NOT_FOUND, r#"{"code":"not_found","message":"gone"}"#.into())
        );

        let broken = unary(request("application/json", b"{"), list).await;
        assert_eq!(broken.status(), StatusCode::BAD_REQUEST);
        let other = unary(request("text/plain", b"{}"), list).await;
        assert_eq!(other.status(), StatusCode::UNSUPPORTED_MEDIA_TYPE);
    }

    #[tokio::test]
    async fn streams_end_with_a_frame_that_says_how() {
        let handle = |_: ListRequest, _| async {
            let message = Ok(ListResponse::default());
            let error = Err(Error::new(Code::Internal, "broke"));
            Ok(futures::stream::iter([message, error]))
        };
        let response = server_stream(request("application/connect+json", b"\0\0\0\0\x02{}"), handle).await;
        let (status, body) = text(response).await;
        assert_eq!(status, StatusCode::OK);
        assert_eq!(
            body,
            "\0\0\0\0\u{2}{}\u{2}\0\0\0\u{2f}{\"error\":{\"code\":\"internal\",\"message\":\"broke\"}}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_that_stops_in_the_middle_is_given_up() {
        let begun = || {
            let pieces =
                futures::stream::iter([Ok::<_, std::io::Error>(Bytes::from_static(b"\0\0\0\0\x09{"))]);
            Body::from_stream(pieces.chain(futures::stream::pending()))
        };
        let request = |kind| Request::builder().header(header::CONTENT_TYPE, kind).body(begun()).unwrap();
        let unary = unary(request("application/json"), list).await;
        assert_eq!(unary.status(), StatusCode::GATEWAY_TIMEOUT);
        let next = |mut messages: Messages<ListRequest>, _| async move {
            messages.next().await?;
            Ok(ListResponse::default())
        };
        let (_, stream) = text(client_stream(request("application/connect+json"), next).await).await;
        assert!(stream.contains("deadline_exceeded"), "{stream}");
    }

    #[test]
    fn deadlines_are_whole_milliseconds() {
        let parse = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("connect-timeout-ms", text.parse().unwrap());
            timeout(&headers).map_err(|error| error.code())
        };
        assert_eq!(parse("1500"), Ok(Some(Duration::from_millis(1500))));
        assert_eq!(parse("0"), Ok(None));
        for bad in ["", "-1", "1.5", "12345678901", "x"] {
            assert_eq!(parse(bad), Err(Code::InvalidArgument), "{bad:?}");
        }
    }
}
