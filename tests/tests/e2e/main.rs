//! End-to-end tests: a sandbox from a template that the project's own tools made, on every channel.

mod boot;
mod cleanup;
mod command;
mod faults;
mod isolation;
mod processes;
mod transfer;
mod trees;
