//! The control API: create, list, end sandboxes.

/// Placeholder of this branch.
pub fn router(_gateway: std::sync::Arc<crate::Gateway>) -> axum::Router {
    axum::Router::new()
}
