//! The control API over a real socket, with a script in host-shim's place and sockets in the agents' places.
//!
//! Every answer of every test is held against the OpenAPI document ([`gateway::TestGateway::call`]).

mod access;
mod agent;
mod bad_input;
mod document;
mod gateway;
mod life;
mod listing;
mod matrix;
mod sleep;
mod snapshots_and_forks;
mod trace;
