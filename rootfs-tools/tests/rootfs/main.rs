//! Images made by hand, built, and held against e2fsck, the kernel, umoci and an independent ext4 reader.

mod bake;
mod build;
mod cli;
mod empty;
mod features;
mod folder;
mod grow;
mod hostile;
mod image;
mod no_worse;
mod oracle;
mod round_trip;
mod sparse;
mod umoci;
