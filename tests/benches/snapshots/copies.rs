//! The yardstick of what is written: the same bytes, copied by whoever wants nothing else.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, SeekFrom, seek};

const CHUNK: usize = 1 << 20;

/// The file of a booted machine's RAM, which its VMM has open.
pub(crate) fn ram_of(vmm: u32) -> File {
    for entry in std::fs::read_dir(format!("/proc/{vmm}/fd")).unwrap() {
        let path = entry.unwrap().path();
        if std::fs::read_link(&path)
            .is_ok_and(|target| target.as_os_str().as_encoded_bytes().starts_with(b"/memfd:guest-ram"))
        {
            return File::open(path).unwrap();
        }
    }
    panic!("the VMM {vmm} has no RAM of its own");
}

/// A file in memory with that many bytes, none of them zero.
pub(crate) fn pages(bytes: u64) -> File {
    let file = File::from(rustix::fs::memfd_create("pages", MemfdFlags::CLOEXEC).unwrap());
    let chunk: Vec<u8> = (0..CHUNK).map(|n| (n % 251) as u8 + 1).collect();
    let mut at = 0;
    while at < bytes {
        let most = chunk.len().min((bytes - at) as usize);
        file.write_all_at(&chunk[..most], at).unwrap();
        at += most as u64;
    }
    file
}

/// Copies what is allocated of `from` to a new file, as `cp --sparse` does; with `sync` it is on the disk then. How long it
/// took, and how many bytes it was. Nothing of it is left.
pub(crate) fn copy(from: &File, to: &Path, sync: bool) -> (Duration, u64) {
    let begun = Instant::now();
    let bytes = write(from, to, sync).unwrap();
    let took = begun.elapsed();
    std::fs::remove_file(to).unwrap();
    (took, bytes)
}

fn write(from: &File, to: &Path, sync: bool) -> io::Result<u64> {
    let out = File::create_new(to)?;
    let length = from.metadata()?.len();
    out.set_len(length)?;
    let mut buffer = vec![0; CHUNK];
    let (mut at, mut bytes) = (0, 0);
    loop {
        let start = match seek(from, SeekFrom::Data(at)) {
            // Nothing but a hole is left.
            Err(rustix::io::Errno::NXIO) => break,
            start => start?,
        };
        let end = seek(from, SeekFrom::Hole(start))?;
        at = start;
        while at < end {
            let most = buffer.len().min((end - at) as usize);
            from.read_exact_at(&mut buffer[..most], at)?;
            out.write_all_at(&buffer[..most], at)?;
            at += most as u64;
            bytes += most as u64;
        }
    }
    if sync {
        out.sync_all()?;
    }
    Ok(bytes)
}
