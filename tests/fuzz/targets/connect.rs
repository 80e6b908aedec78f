//! Any body, in any pieces, as a unary call and as a stream in both codecs: an answer always, and a well-formed one.
//!
//! Input: one byte that chooses shape, codec and size of the pieces, then the body.
#![no_main]

use std::cell::RefCell;

use axum::body::Body;
use bytes::Bytes;
use envd::connect::{self, Error};
use envd_channel::envelope::{self, Decoder};
use envd_proto::process::{StartRequest, StartResponse};
use futures::stream;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::BodyExt;
use libfuzzer_sys::fuzz_target;
use tokio::runtime::{Builder, Runtime};

thread_local! {
    static RUNTIME: RefCell<Runtime> = RefCell::new(Builder::new_current_thread().enable_time().build().unwrap());
}

fuzz_target!(|input: &[u8]| {
    let Some((&choice, body)) = input.split_first() else { return };
    let (streaming, json, step) = (choice & 1 != 0, choice & 2 != 0, usize::from(choice >> 2) + 1);
    envelopes(body, step);
    RUNTIME.with_borrow(|runtime| runtime.block_on(call(streaming, json, body, step)));
});

/// However the bytes are cut, the same envelopes come out.
fn envelopes(body: &[u8], step: usize) {
    let read = |step: usize| {
        let (mut decoder, mut found) = (Decoder::default(), Vec::new());
        for piece in body.chunks(step) {
            decoder.push(piece);
            loop {
                match decoder.envelope() {
                    Ok(Some(envelope)) => found.push(envelope),
                    Ok(None) => break,
                    Err(_) => return (found, true),
                }
            }
        }
        (found, false)
    };
    let whole = read(body.len().max(1));
    assert_eq!(whole, read(step));
    for envelope in whole.0 {
        let flags = if envelope.end { envelope::END_OF_STREAM } else { 0 };
        let mut decoder = Decoder::default();
        decoder.push(&envelope::encode(flags, &envelope.message));
        assert_eq!(decoder.envelope(), Ok(Some(envelope)));
        assert!(decoder.is_empty());
    }
}

async fn call(streaming: bool, json: bool, body: &[u8], step: usize) {
    let content_type = match (streaming, json) {
        (false, true) => "application/json",
        (false, false) => "application/proto",
        (true, true) => "application/connect+json",
        (true, false) => "application/connect+proto",
    };
    let pieces: Vec<_> =
        body.chunks(step).map(|piece| Ok::<_, Error>(Bytes::copy_from_slice(piece))).collect();
    let request = Request::post("/")
        .header("content-type", content_type)
        .body(Body::from_stream(stream::iter(pieces)))
        .unwrap();
    let response = if streaming {
        let handle = |request: StartRequest, _: HeaderMap| async move {
            Ok(stream::iter(
                (0..request.tag.map_or(0, |tag| tag.len() % 4)).map(|_| Ok(StartResponse::default())),
            ))
        };
        connect::server_stream(request, handle).await
    } else {
        connect::unary(request, |request: StartRequest, _| async move { Ok(request) }).await
    };
    let (parts, body) = response.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    if !streaming {
        if parts.status == StatusCode::OK {
            assert_eq!(parts.headers["content-type"], content_type);
        } else {
            let error: serde_json::Value = serde_json::from_slice(&body).unwrap();
            assert!(error["code"].is_string() && error["message"].is_string());
        }
        return;
    }
    assert_eq!(parts.status, StatusCode::OK);
    let mut decoder = Decoder::default();
    decoder.push(&body);
    let mut ended = false;
    while let Some(envelope) = decoder.envelope().unwrap() {
        assert!(!ended, "something behind the end");
        ended = envelope.end;
    }
    assert!(ended && decoder.is_empty());
}
