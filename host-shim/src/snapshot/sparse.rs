//! Sparse files: where their data is, and what is done with it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use super::parallel;

/// The unit of work, and of [`super::hash::Scheme::Sparse`]: it stays in the second-level cache.
pub(super) const CHUNK: u64 = 1 << 20;

/// The unit in which data and holes are told apart: the page of the guest, and the block of most file systems.
pub(super) const BLOCK: usize = 4096;

/// The part of a [`CHUNK`]-aligned chunk that may be data; the rest of the chunk is a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    /// Where the data begins; a multiple of [`BLOCK`].
    pub(super) start: u64,
    /// Where it ends; a multiple of [`BLOCK`], or the end of the file.
    pub(super) end: u64,
}

/// The chunks of the first `size` bytes of `file` that are not holes, in order.
pub(super) fn chunks(file: &File, size: u64) -> io::Result<Vec<Chunk>> {
    let block = BLOCK as u64;
    let mut chunks: Vec<Chunk> = Vec::new();
    let mut position = 0;
    while position < size {
        let (start, end) = match rustix::fs::seek(file, SeekFrom::Data(position)) {
            Ok(start) => (start, rustix::fs::seek(file, SeekFrom::Hole(start))?),
            // Holes to the end.
            Err(Errno::NXIO) => break,
            // A file system that does not know its holes.
            Err(Errno::INVAL) => (position, size),
            Err(error) => return Err(error.into()),
        };
        let (mut at, end) = (start / block * block, end.min(size).next_multiple_of(block).min(size));
        while at < end {
            let next = end.min((at / CHUNK + 1) * CHUNK);
            match chunks.last_mut() {
                Some(last) if last.start / CHUNK == at / CHUNK => last.end = next,
                _ => chunks.push(Chunk { start: at, end: next }),
            }
            at = next;
        }
        // A file that is being cut gives an end before the start; it must not keep this turning.
        position = end.max(position + 1);
    }
    Ok(chunks)
}

/// Reads the chunks of `file` and does `work` with each, on several threads. The results are in the order of the chunks.
pub(super) fn for_each<T: Send>(
    file: &File,
    chunks: &[Chunk],
    work: impl Fn(Chunk, &[u8]) -> io::Result<T> + Sync,
) -> io::Result<Vec<T>> {
    let buffer = || vec![0; CHUNK as usize];
    parallel::for_each(chunks.len(), buffer, |buffer, index| {
        let chunk = chunks[index];
        let bytes = &mut buffer[..(chunk.end - chunk.start) as usize];
        file.read_exact_at(bytes, chunk.start)?;
        work(chunk, bytes)
    })
}

/// Whether all bytes of a block (or of a part of one) are zero.
pub(super) fn is_zero(block: &[u8]) -> bool {
    // memcmp(3) is vectorised in every build of ours, and ends at the first difference.
    const ZEROS: [u8; BLOCK] = [0; BLOCK];
    *block == ZEROS[..block.len()]
}

/// The longest runs of blocks that are not zero, as byte ranges of `bytes`.
pub(super) fn data_runs(bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    for (index, block) in bytes.chunks(BLOCK).enumerate() {
        if is_zero(block) {
            continue;
        }
        let start = index * BLOCK;
        match runs.last_mut() {
            Some(last) if last.end == start => last.end += block.len(),
            _ => runs.push(start..start + block.len()),
        }
    }
    runs
}

/// Copies what is not zero of the first `size` bytes of `from` to `to`, an empty file that becomes that long.
/// Returns the bytes of data.
pub(super) fn copy(from: &File, size: u64, to: &File) -> io::Result<u64> {
    to.set_len(size)?;
    let copied = for_each(from, &chunks(from, size)?, |chunk, bytes| {
        let mut data = 0;
        for run in data_runs(bytes) {
            to.write_all_at(&bytes[run.clone()], chunk.start + run.start as u64)?;
            data += run.len() as u64;
        }
        Ok(data)
    })?;
    Ok(copied.into_iter().sum())
}

/// Makes holes of the blocks of zeros in the first `size` bytes of `file`. Returns the bytes of data that are left.
pub(super) fn punch(file: &File, size: u64) -> io::Result<u64> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let left = for_each(file, &chunks(file, size)?, |chunk, bytes| {
        let (mut data, mut at) = (0, 0);
        let whole = bytes.len()..bytes.len();
        for run in data_runs(bytes).into_iter().chain([whole]) {
            if run.start > at {
                match rustix::fs::fallocate(file, flags, chunk.start + at as u64, (run.start - at) as u64) {
                    // A file system without holes keeps its zeros.
                    Ok(()) | Err(Errno::OPNOTSUPP) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            data += run.len() as u64;
            at = run.end;
        }
        Ok(data)
    })?;
    Ok(left.into_iter().sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_aligned_and_hold_all_data() {
        let file = tempfile::tempfile().unwrap();
        let size = 5 * CHUNK + 100;
        file.set_len(size).unwrap();
        assert_eq!(chunks(&file, size).unwrap(), []);
        file.write_all_at(&[1; 2], CHUNK - 1).unwrap();
        file.write_all_at(&[1; 1], size - 1).unwrap();
        let found = chunks(&file, size).unwrap();
        // A file system may take more for data than was written, and blocks may be larger than ours.
        for at in [CHUNK - 1, CHUNK, size - 1] {
            assert!(found.iter().any(|chunk| (chunk.start..chunk.end).contains(&at)), "{at} in {found:?}");
        }
        for chunk in &found {
            assert_eq!(chunk.start % BLOCK as u64, 0);
            assert_eq!(chunk.start / CHUNK, (chunk.end - 1) / CHUNK, "{chunk:?} lies in one chunk");
        }
        assert!(found.windows(2).all(|pair| pair[0].end <= pair[1].start), "{found:?}");
    }

    #[test]
    fn runs_are_maximal() {
        let mut bytes = vec![0; 5 * BLOCK + 10];
        assert!(data_runs(&bytes).is_empty());
        bytes[BLOCK + 7] = 1;
        bytes[3 * BLOCK - 1] = 1;
        bytes[5 * BLOCK + 9] = 1;
        assert_eq!(data_runs(&bytes), [BLOCK..3 * BLOCK, 5 * BLOCK..5 * BLOCK + 10]);
    }

    #[test]
    fn a_copy_has_the_data_and_the_holes() {
        use std::os::unix::fs::MetadataExt;
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let size = 40 * CHUNK;
        from.set_len(size).unwrap();
        from.write_all_at(&[7; 3 * BLOCK], 9 * CHUNK - BLOCK as u64).unwrap();
        // Zeros that are written are no data either.
        from.write_all_at(&[0; 3 * BLOCK], 20 * CHUNK).unwrap();
        assert_eq!(copy(&from, size, &to).unwrap(), 3 * BLOCK as u64);
        assert_eq!(to.metadata().unwrap().len(), size);
        assert!(to.metadata().unwrap().blocks() * 512 < CHUNK);
        let mut read = vec![0; 4 * BLOCK];
        to.read_exact_at(&mut read, 9 * CHUNK - BLOCK as u64).unwrap();
        assert!(read[..3 * BLOCK].iter().all(|&byte| byte == 7) && is_zero(&read[3 * BLOCK..]));
    }

    #[test]
    fn a_file_that_is_cut_meanwhile_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![1; 8 * CHUNK as usize], 0).unwrap();
        let chunks = chunks(&file, 8 * CHUNK).unwrap();
        file.set_len(CHUNK).unwrap();
        let cut = for_each(&file, &chunks, |_, _| Ok(())).unwrap_err();
        assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof);
    }
}
