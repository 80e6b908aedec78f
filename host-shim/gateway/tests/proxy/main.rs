//! The gateway's port, from outside: what is routed where, what streams, what is refused.

mod bad_input;
mod ends;
mod load;
mod rates;
mod requests;
mod streams;
mod support;
mod tls;
mod upgrades;
