//! The JSON-RPC over WebSocket of the first SDKs (0.x), translated to the agent's calls.

/// Placeholder of this branch.
pub async fn serve(
    _gateway: std::sync::Arc<crate::Gateway>,
    _sandbox: std::sync::Arc<crate::fleet::Sandbox>,
    _request: axum::extract::Request,
) -> axum::response::Response {
    axum::response::IntoResponse::into_response(crate::ApiError::not_served("the protocol of the 0.x SDKs"))
}
