//! What is sent with a request, so that it can be sent again.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use reqwest::header::CONTENT_LENGTH;
use reqwest::{Body, RequestBuilder};

use crate::error::{Error, at};

/// How much of a file is read at once.
const PIECE: u64 = 128 << 10;

/// The body of a request.
#[derive(Clone)]
pub(super) enum Payload {
    /// None.
    Empty,
    /// A small one.
    Bytes(Bytes),
    /// A part of a file.
    File { path: PathBuf, offset: u64, length: u64, progress: Arc<dyn Fn(u64) + Send + Sync> },
}

impl Payload {
    pub(super) fn length(&self) -> u64 {
        match self {
            Self::Empty => 0,
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File { length, .. } => *length,
        }
    }

    /// Puts the body into the request; `sent` counts what has gone.
    pub(super) fn attach(
        &self,
        builder: RequestBuilder,
        sent: &Arc<AtomicU64>,
    ) -> Result<RequestBuilder, Error> {
        match self {
            Self::Empty => Ok(builder),
            Self::Bytes(bytes) => {
                // What is so small goes at once.
                sent.store(bytes.len() as u64, Ordering::Relaxed);
                Ok(builder.body(bytes.clone()))
            }
            Self::File { path, offset, length, progress } => {
                let file = File::open(path).map_err(at(path))?;
                let state = (file, *offset, *length, sent.clone(), progress.clone());
                let pieces =
                    futures::stream::unfold(state, |(file, offset, left, sent, progress)| async move {
                        if left == 0 {
                            return None;
                        }
                        let mut piece = vec![0; left.min(PIECE) as usize];
                        let read = file.read_exact_at(&mut piece, offset).map(|()| Bytes::from(piece));
                        let count = read.as_ref().map_or(left, |piece| piece.len() as u64);
                        sent.fetch_add(count, Ordering::Relaxed);
                        progress(count);
                        Some((read, (file, offset + count, left - count, sent, progress)))
                    });
                Ok(builder.header(CONTENT_LENGTH, *length).body(Body::wrap_stream(pieces)))
            }
        }
    }
}
