//! Any body as the multipart reader of /files takes it: however it is cut, the same files come out, or it is refused.
//!
//! Input: one byte for the size of the pieces, then the body, with the boundary `cut`.
#![no_main]

use std::cell::RefCell;

use axum::body::Body;
use axum::extract::{DefaultBodyLimit, FromRequest, Multipart};
use bytes::Bytes;
use futures::stream;
use http::Request;
use libfuzzer_sys::fuzz_target;
use tokio::runtime::{Builder, Runtime};

thread_local! {
    static RUNTIME: RefCell<Runtime> = RefCell::new(Builder::new_current_thread().build().unwrap());
}

type Parts = Vec<(Option<String>, Option<String>, Vec<u8>)>;

fuzz_target!(|input: &[u8]| {
    let Some((&step, body)) = input.split_first() else { return };
    RUNTIME.with_borrow(|runtime| {
        runtime.block_on(async {
            let whole = read(body, body.len().max(1)).await;
            let cut = read(body, usize::from(step) + 1).await;
            assert_eq!(whole, cut);
            if let Some(parts) = whole {
                let size: usize = parts.iter().map(|(.., content)| content.len()).sum();
                assert!(size <= body.len());
            }
        });
    });
});

async fn read(body: &[u8], step: usize) -> Option<Parts> {
    let pieces: Vec<_> =
        body.chunks(step).map(|piece| Ok::<_, std::io::Error>(Bytes::copy_from_slice(piece))).collect();
    let mut request = Request::post("/files")
        .header("content-type", "multipart/form-data; boundary=cut")
        .body(Body::from_stream(stream::iter(pieces)))
        .unwrap();
    DefaultBodyLimit::disable().apply(&mut request);
    let mut parts = Multipart::from_request(request, &()).await.ok()?;
    let mut found = Parts::new();
    while let Some(mut part) = parts.next_field().await.ok()? {
        let names = (part.name().map(str::to_owned), part.file_name().map(str::to_owned));
        let mut content = Vec::new();
        while let Some(chunk) = part.chunk().await.ok()? {
            content.extend_from_slice(&chunk);
        }
        found.push((names.0, names.1, content));
    }
    Some(found)
}
