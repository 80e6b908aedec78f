//! A process that maps a base as a VMM does, and writes pages of it when it is told to.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};

use super::PAGE_SIZE;

/// Each line is a command; each answer begins with a line `ok`.
const PROGRAM: &str = r"
import ctypes, mmap, sys
file = open(sys.argv[1], 'r+b')
ram = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
file.close()
base = ctypes.addressof(ctypes.c_char.from_buffer(ram))
out = sys.stdout.buffer
out.write(b'ok\n'); out.flush()
for line in sys.stdin:
    verb, page, value = line.split()
    at = int(page) * 4096
    if verb == 'write': ram[at:at + 4096] = bytes([int(value)]) * 4096
    elif verb == 'touch': ram[at]
    elif verb == 'split':
        # MADV_DONTFORK of the second part: another flag, so another mapping.
        libc = ctypes.CDLL(None)
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        assert libc.madvise(base + at, len(ram) - at, 10) == 0
    out.write(b'ok\n')
    if verb == 'read': out.write(ram[at:at + 4096])
    out.flush()
";

/// The process, and the base that it maps. Ends with this value.
pub(super) struct TestVmm {
    child: Child,
    answers: BufReader<ChildStdout>,
    file: File,
    temporary: Option<tempfile::TempPath>,
}

impl TestVmm {
    /// Maps a base of `pages` pages; those that are named are filled with a byte, the others are holes.
    pub(super) fn start(pages: u64, filled: &[(u64, u8)]) -> Self {
        let base = tempfile::NamedTempFile::new().unwrap();
        base.as_file().set_len(pages * PAGE_SIZE).unwrap();
        for (page, byte) in filled {
            base.as_file().write_all_at(&[*byte; PAGE_SIZE as usize], page * PAGE_SIZE).unwrap();
        }
        let mut vmm = Self::start_on(base.path().to_owned());
        vmm.temporary = Some(base.into_temp_path());
        vmm
    }

    /// Maps the base at `path`.
    pub(super) fn start_on(path: PathBuf) -> Self {
        let file = File::open(&path).unwrap();
        let python = std::env::var_os("TIFFIN_PYTHON").unwrap_or_else(|| "python3".into());
        let mut child = Command::new(python)
            .args(["-c", PROGRAM])
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 (package python3-venv) runs");
        let answers = BufReader::new(child.stdout.take().unwrap());
        let mut vmm = Self { child, answers, file, temporary: None };
        vmm.answer();
        vmm
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn base(&self) -> &File {
        &self.file
    }

    pub(super) fn unlink_base(&mut self) {
        drop(self.temporary.take());
    }

    pub(super) fn write_page(&mut self, page: u64, byte: u8) {
        self.ask("write", page, byte);
    }

    pub(super) fn touch_page(&mut self, page: u64) {
        self.ask("touch", page, 0);
    }

    pub(super) fn split_at(&mut self, page: u64) {
        self.ask("split", page, 0);
    }

    pub(super) fn read_page(&mut self, page: u64) -> Vec<u8> {
        self.ask("read", page, 0);
        let mut bytes = vec![0; PAGE_SIZE as usize];
        self.answers.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub(super) fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn ask(&mut self, verb: &str, page: u64, byte: u8) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{verb} {page} {byte}").unwrap();
        self.answer();
    }

    fn answer(&mut self) {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        assert_eq!(line, "ok\n");
    }
}

impl Drop for TestVmm {
    fn drop(&mut self) {
        self.end();
    }
}
