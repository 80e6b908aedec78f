//! The one port. Only the health of the gateway is answered here so far.

use std::io;
use std::sync::Arc;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{ApiError, Gateway};

/// Serves until `shutdown`.
pub async fn serve(
    gateway: Arc<Gateway>,
    listener: TcpListener,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let router = Router::new()
        .route("/health", get(|| async { StatusCode::NO_CONTENT }))
        .fallback(|| async { ApiError::not_served("this call") })
        .with_state(gateway);
    axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned()).await
}
