//! Compiles the .proto files to prost types with the canonical protobuf JSON mapping.

use std::error::Error;
use std::path::PathBuf;

use prost::Message;

const FILES: [&str; 3] =
    ["process/process.proto", "filesystem/filesystem.proto", "tiffin/control/v1/control.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(FILES, ["proto"])?;
    let encoded = descriptors.encode_to_vec();

    prost_build::Config::new()
        .compile_well_known_types()
        .extern_path(".google.protobuf", "::pbjson_types")
        .bytes([".process"])
        .enable_type_names()
        .compile_fds(descriptors)?;

    // Newer clients send fields that this version does not know: they are ignored, as protobuf's JSON mapping allows.
    pbjson_build::Builder::new().register_descriptors(&encoded)?.ignore_unknown_fields().build(&[
        ".process",
        ".filesystem",
        ".tiffin.control",
    ])?;

    // A tripwire for the tests: the contract as text.
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    std::fs::write(out.join("descriptors.bin"), encoded)?;
    Ok(())
}
