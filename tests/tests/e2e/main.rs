//! End-to-end tests: a sandbox from a template that the project's own tools made, on every channel.

mod boot;
mod cleanup;
mod clones;
mod command;
mod faults;
mod files;
mod fleet;
mod init;
mod isolation;
mod own_image;
mod processes;
mod profile;
mod resume;
mod snapshots;
mod survival;
mod transfer;
mod trees;
mod verbs;
mod verbs_copy;
mod verbs_exec;
mod verbs_faults;
mod verbs_fork;
mod verbs_ports;
mod verbs_terminal;
mod volumes;
mod warm_template;
