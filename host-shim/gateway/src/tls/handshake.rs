//! From a connection to what speaks HTTP on it.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::time::Duration;

use axum::response::IntoResponse;
use http::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use rustls::server::Acceptor;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

use super::Tls;
use crate::ApiError;
use crate::proxy::discard;

/// The first byte of a ClientHello: a handshake record (RFC 8446, 5.1).
const HANDSHAKE_RECORD: u8 = 0x16;

/// How a connection began.
#[derive(Debug)]
pub(crate) enum Handshake {
    /// With TLS.
    Done(Box<TlsStream<TcpStream>>),
    /// With a request in the clear. Nothing of it was read.
    Plain(TcpStream),
}

/// Why a connection came to nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeFailure {
    /// It took too long, or there was no place.
    #[error("no handshake in time")]
    Late,
    /// It broke off, or wanted what is not offered.
    #[error(transparent)]
    Broken(#[from] io::Error),
}

impl Tls {
    /// Takes a connection to where requests begin; from its first byte on it needs one of the places.
    pub(crate) async fn accept(
        &self,
        stream: TcpStream,
        within: Duration,
        places: &Semaphore,
    ) -> Result<Handshake, HandshakeFailure> {
        let beginning = async {
            let mut first = [0];
            if stream.peek(&mut first).await? == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            if first[0].is_ascii_uppercase() {
                return Ok(Handshake::Plain(stream));
            }
            if first[0] != HANDSHAKE_RECORD {
                let what = format!("neither TLS nor HTTP: it begins with {:#04x}", first[0]);
                return Err(io::Error::new(io::ErrorKind::InvalidData, what).into());
            }
            // Not before: who says nothing takes none of them.
            let _place = places.acquire().await.map_err(io::Error::other)?;
            let hello = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
            // That of now, not that of when it connected.
            Ok(Handshake::Done(Box::new(hello.into_stream(self.config()).await?)))
        };
        tokio::time::timeout(within, beginning).await.unwrap_or(Err(HandshakeFailure::Late))
    }
}

/// Answers a request in the clear on a port for TLS: its key has been seen by everybody on the way, so it is not sent on.
pub(crate) async fn refuse_plain(stream: TcpStream, within: Duration) {
    let service = service_fn(|request: Request<Incoming>| async {
        discard(request).await;
        let why = "this port speaks HTTPS only: use https:// in the place of http://";
        Ok::<_, Infallible>(ApiError::bad_request(why).into_response())
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).keep_alive(false);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let _ = tokio::time::timeout(within, connection.as_mut()).await;
}
