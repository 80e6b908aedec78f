//! Builds of templates: the program `tiffin-gateway`, with scripts in the places of host-shim and image-builder.

mod errors;
mod files;
mod flow;
mod host;
mod queue;
mod registry;
mod restart;
