//! Images made by hand, built, and held against e2fsck, the kernel, umoci and an independent ext4 reader.

mod bake;
mod build;
mod chunk;
mod chunk_cli;
mod cli;
mod corrupt;
mod empty;
mod features;
mod folder;
mod grow;
mod guest_image;
mod hostile;
mod hostile_layers;
mod image;
mod nasty;
mod no_worse;
mod oracle;
mod read;
mod round_trip;
mod skopeo;
mod sparse;
mod umoci;
