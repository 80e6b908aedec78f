//! One file for each group of commands.

pub(crate) mod chunk;
