//! The control API: create, list, end sandboxes.
