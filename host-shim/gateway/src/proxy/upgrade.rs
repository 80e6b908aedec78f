//! A connection that became something else, a WebSocket mostly: bytes both ways until either side ends.

use std::sync::Arc;

use axum::body::Body;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio_util::io::InspectReader;

use super::Client;
use crate::Gateway;
use crate::fleet::Sandbox;
use crate::metrics::{Direction, StreamKind};

/// What a request's connection may become; to be taken before the request is sent.
pub(super) fn of_request(request: &mut Request<Incoming>) -> OnUpgrade {
    hyper::upgrade::on(request)
}

/// Joins the two sides of a `101 Switching Protocols`, once its head has been written to the client.
pub(super) fn join(
    gateway: &Arc<Gateway>,
    client: &Client,
    sandbox: &Arc<Sandbox>,
    near: OnUpgrade,
    response: Response<Body>,
) -> Response<Body> {
    let (mut head, body) = response.into_parts();
    let far = head.extensions.remove::<OnUpgrade>();
    let (client_place, sandbox, gateway) = (client.clone(), Arc::clone(sandbox), Arc::clone(gateway));
    client.connections.spawn(async move {
        // It holds the connection to the sandbox, and the client its place among the connections.
        let _body = body;
        let Some(far) = far else { return };
        let metrics = &gateway.metrics;
        let _open = metrics.stream_opened(StreamKind::Upgrade);
        let pipe = async {
            let (near, far) = tokio::try_join!(near, far)?;
            let counted = |direction| move |bytes: &[u8]| metrics.proxied(direction, bytes.len() as u64);
            let mut near = InspectReader::new(TokioIo::new(near), counted(Direction::In));
            let mut far = InspectReader::new(TokioIo::new(far), counted(Direction::Out));
            // One direction may end before the other.
            tokio::io::copy_bidirectional(&mut near, &mut far).await?;
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
        };
        tokio::select! {
            // Whatever broke, both sides see their connection end.
            _ = pipe => {}
            () = sandbox.gone() => {}
            () = client_place.cut.cancelled() => {}
        }
    });
    Response::from_parts(head, Body::empty())
}
