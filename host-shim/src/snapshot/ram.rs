//! `ram`: all of a guest's RAM, where the VMM maps it shared.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::{Error, PAGE_SIZE, sparse};

/// What [`save_shared`] wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamSaved {
    /// Length of the file: the RAM.
    pub size: u64,
    /// Bytes that are not zero pages.
    pub data: u64,
}

/// Copies the pages of `ram` (a memfd, or a file, of the whole RAM) that are not zero to the empty file `out`; `path`
/// names it in errors. The VMM goes on with `ram`, so a link to it would change.
pub fn save_shared(ram: &File, out: &File, path: &Path) -> Result<RamSaved, Error> {
    let metadata = ram.metadata().map_err(Error::io("read the RAM for", path))?;
    let size = metadata.len();
    if size == 0 || !size.is_multiple_of(PAGE_SIZE) {
        return Err(Error::invalid("RAM", format!("expected a multiple of {PAGE_SIZE} bytes, got {size}")));
    }
    // st_blocks is in units of 512 bytes, whatever the block size (stat(2)).
    let allocated = metadata.blocks() * 512;
    let data = sparse::copy(ram, size, out).map_err(Error::write(path, Some(allocated)))?;
    Ok(RamSaved { size, data })
}

/// Makes holes of the zero pages of `ram`, which nobody writes any more. Returns the bytes of data that are left.
pub fn thin(ram: &File, path: &Path) -> Result<u64, Error> {
    let size = ram.metadata().map_err(Error::io("read", path))?.len();
    sparse::punch(ram, size).map_err(Error::io("make holes in", path))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    #[test]
    fn a_memfd_becomes_a_sparse_file_of_the_same_contents() {
        let ram = File::from(memfd_create("ram", MemfdFlags::CLOEXEC).unwrap());
        let size = 64 << 20;
        ram.set_len(size).unwrap();
        for page in [0, 1, 255, 256, 7000, size / PAGE_SIZE - 1] {
            ram.write_all_at(&[page as u8 | 1; 4096], page * PAGE_SIZE).unwrap();
        }
        ram.write_all_at(&[0; 4096], 5000 * PAGE_SIZE).unwrap();
        let out = tempfile::NamedTempFile::new().unwrap();
        let saved = save_shared(&ram, out.as_file(), out.path()).unwrap();
        assert_eq!(saved, RamSaved { size, data: 6 * PAGE_SIZE });
        assert!(out.as_file().metadata().unwrap().blocks() * 512 < 1 << 20, "it is sparse");
        let (mut expected, mut got) = (vec![0; size as usize], vec![0; size as usize]);
        ram.read_exact_at(&mut expected, 0).unwrap();
        out.as_file().read_exact_at(&mut got, 0).unwrap();
        assert!(expected == got);
        let metadata = ram.metadata().unwrap();
        assert!(metadata.blocks() * 512 < 1 << 20, "reading allocated nothing: {}", metadata.blocks());
    }

    #[test]
    fn what_a_vmm_wrote_densely_keeps_its_contents_and_no_zero_page() {
        let ram = tempfile::NamedTempFile::new().unwrap();
        let size = 8 << 20;
        let mut contents = vec![0; size];
        for page in [0, 1, 300, 2047] {
            contents[page * 4096 + 5] = 1;
        }
        ram.as_file().write_all_at(&contents, 0).unwrap();
        assert_eq!(thin(ram.as_file(), ram.path()).unwrap(), 4 * PAGE_SIZE);
        let metadata = ram.as_file().metadata().unwrap();
        assert_eq!(metadata.len(), size as u64);
        assert!(metadata.blocks() * 512 <= 8 * PAGE_SIZE, "{}", metadata.blocks());
        assert!(std::fs::read(ram.path()).unwrap() == contents);
        assert_eq!(thin(ram.as_file(), ram.path()).unwrap(), 4 * PAGE_SIZE, "again");
    }

    #[test]
    fn a_full_disk_is_named_with_what_was_needed() {
        let ram = File::from(memfd_create("ram", MemfdFlags::CLOEXEC).unwrap());
        ram.set_len(8 * PAGE_SIZE).unwrap();
        ram.write_all_at(&[1; 4096], 0).unwrap();
        // Every write to it fails with ENOSPC. It has no length, so that part is left out.
        let full = File::options().write(true).open("/dev/full").unwrap();
        let written = full.write_all_at(&[1; 4096], 0).unwrap_err();
        let error = Error::write("/dev/full", Some(4096))(written);
        assert!(matches!(error, Error::NoSpace { needed: Some(4096), available: Some(_), .. }), "{error:?}");
        assert!(error.to_string().contains("no space for /dev/full (4096 bytes needed, "), "{error}");
        let odd = File::from(memfd_create("odd", MemfdFlags::CLOEXEC).unwrap());
        odd.set_len(100).unwrap();
        let error = save_shared(&odd, &full, Path::new("/x")).unwrap_err();
        assert!(error.to_string().contains("expected a multiple of 4096 bytes, got 100"), "{error}");
    }
}
