//! The one port. Only the control API is served here so far.

use std::io;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{Gateway, control};

/// Serves until `shutdown`.
pub async fn serve(
    gateway: Arc<Gateway>,
    listener: TcpListener,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let router = control::router(gateway);
    axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned()).await
}
