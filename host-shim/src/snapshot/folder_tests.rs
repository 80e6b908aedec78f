//! Tests of whole folders: written, opened, replaced, damaged, cut short.

use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use super::*;
use crate::snapshot::manifest::tests::description;
use crate::snapshot::test_vmm::TestVmm;
use crate::snapshot::{PAGE_SIZE, overlay};

const RAM: u64 = 4 << 20;
const DISK: u64 = 8 << 20;

/// A machine as small as the files of these tests.
fn small() -> Description {
    let mut description = description();
    description.machine.memory_mib = RAM >> 20;
    description.machine.disk_mib = DISK >> 20;
    description
}

fn file_of(size: u64, data: &[(u64, &[u8])]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    for (at, bytes) in data {
        file.write_all_at(bytes, *at).unwrap();
    }
    file
}

fn begin_base(target: &Path, state: &[u8]) -> Result<NewSnapshot, Error> {
    let mut new = NewSnapshot::begin(target)?;
    new.add_bytes(FileName::State, state)?;
    new.add_ram(&file_of(RAM, &[(0, b"kernel"), (3 * PAGE_SIZE, &[5; 300_000])]))?;
    new.add_copy(FileName::Scratch, &file_of(DISK, &[(1024, b"superblock"), (5 << 20, &[7; 300_000])]))?;
    Ok(new)
}

fn write_base(target: &Path, state: &[u8]) -> SnapshotFolder {
    begin_base(target, state).unwrap().publish(small(), Durability::Synced, None).unwrap()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_base_is_written_opened_and_verified() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("snapshots/qemu");
    let folder = write_base(&target, b"device state");
    assert_eq!(names(&dir.path().join("snapshots")), ["qemu"]);
    assert_eq!(names(&target), ["manifest.json", "ram", "scratch.ext4", "state"]);
    folder.verify().unwrap();
    assert!(!folder.has_delta());
    assert_eq!(folder.manifest().description, small());
    let mode = |path: &Path| fs::symlink_metadata(path).unwrap().mode() & 0o7777;
    assert_eq!(mode(&target), 0o700);
    for (name, expected) in
        [("manifest.json", 0o400), ("ram", 0o600), ("scratch.ext4", 0o400), ("state", 0o400)]
    {
        assert_eq!(mode(&target.join(name)), expected, "{name}");
    }
    // The files stay open when the snapshot is unlinked.
    SnapshotFolder::open(&target).unwrap().delete().unwrap();
    assert!(!target.exists());
    folder.verify().unwrap();
    assert!(matches!(SnapshotFolder::open(&target), Err(Error::Missing { .. })));
}

#[test]
fn a_snapshot_is_whole_or_absent() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("s");
    let new = begin_base(&target, b"state").unwrap();
    assert!(matches!(SnapshotFolder::open(&target), Err(Error::Missing { .. })));
    drop(new);
    assert_eq!(names(dir.path()), Vec::<String>::new());

    // What is not a snapshot is not published as one.
    let mut new = NewSnapshot::begin(&target).unwrap();
    new.add_bytes(FileName::State, b"state").unwrap();
    assert!(
        new.add_bytes(FileName::State, b"state").unwrap_err().to_string().contains("state is added twice")
    );
    let error = new.publish(small(), Durability::Synced, None).unwrap_err();
    assert!(error.to_string().contains("it names no file ram"), "{error}");
    let mut other = small();
    other.machine.memory_mib *= 2;
    let error =
        begin_base(&target, b"state").unwrap().publish(other, Durability::Volatile, None).unwrap_err();
    assert!(error.to_string().contains("ram has 4194304 bytes, the RAM has 8388608"), "{error}");
    assert_eq!(names(dir.path()), Vec::<String>::new());
}

#[test]
fn a_newer_snapshot_takes_the_place_of_an_older_one_and_of_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("s");
    let first = write_base(&target, b"first");
    write_base(&target, b"the second").verify().unwrap();
    assert_eq!(names(dir.path()), ["s"]);
    assert_eq!(SnapshotFolder::open(&target).unwrap().manifest().files[&FileName::State].size, 10);
    first.verify().unwrap();

    for (what, make) in [
        ("photos", (|path: &Path| fs::create_dir_all(path.join("photos"))) as fn(&Path) -> io::Result<()>),
        ("is no folder", |path| fs::write(path, "mine")),
        ("is no folder", |path| std::os::unix::fs::symlink("s", path)),
    ] {
        let mine = dir.path().join("mine");
        make(&mine).unwrap();
        let error = NewSnapshot::begin(&mine).unwrap_err();
        assert!(error.is_bad_input() && error.to_string().contains(what), "{error}");
        remove(&mine).or_else(|_| fs::remove_file(&mine)).unwrap();
    }
    // It came while the snapshot was written.
    let late = dir.path().join("late");
    let new = begin_base(&late, b"state").unwrap();
    fs::create_dir_all(late.join("photos")).unwrap();
    let error = new.publish(small(), Durability::Synced, None).unwrap_err();
    assert!(error.to_string().contains("photos"), "{error}");
    assert_eq!(names(dir.path()), ["late", "s"]);
    // An empty folder is nobody's.
    fs::remove_dir(late.join("photos")).unwrap();
    write_base(&late, b"state").verify().unwrap();
}

#[test]
fn a_delta_shares_its_base() {
    let dir = tempfile::tempdir().unwrap();
    let base = write_base(&dir.path().join("base"), b"state");
    let mut clone = TestVmm::start_on(base.path().join("ram"));
    clone.write_page(3, 0);
    clone.write_page(100, 8);
    let memory = GuestMemory::of(clone.pid(), base.file(FileName::Ram).unwrap()).unwrap();
    let live = dir.path().join("live.qcow2");
    overlay(&live, DISK, DISK).unwrap();

    let take = |of: &SnapshotFolder, memory: &GuestMemory, name: &str, durability| {
        let mut new = NewSnapshot::begin(&dir.path().join(name)).unwrap();
        new.create(FileName::State).unwrap().write_all(b"by the VMM").unwrap();
        assert_eq!(new.add_base(of).unwrap(), Placed::Linked);
        new.add_ram_delta(memory).unwrap();
        new.add_copy(FileName::ScratchOverlay, &File::open(&live).unwrap()).unwrap();
        new.publish(small(), durability, None).unwrap()
    };
    // As a fork's: what was written for it has no digest, the base keeps its own.
    let first = take(&base, &memory, "first", Durability::Volatile);
    for (name, entry) in &first.manifest().files {
        assert_eq!(entry.digest.is_some(), matches!(name, FileName::Ram | FileName::Scratch), "{name}");
    }
    let error = first.verify().unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains("ram.delta"), "{error}");
    first.verify_once(&dir.path().join("cache")).unwrap();
    assert!(first.has_delta());
    for name in [FileName::Ram, FileName::Scratch] {
        let inode = |folder: &SnapshotFolder| folder.file(name).unwrap().metadata().unwrap().ino();
        assert_eq!(inode(&first), inode(&base), "{name}");
    }

    // The clone of the clone: base and delta; its own delta is over the same base, not over the first one.
    let mut second = TestVmm::start_on(first.path().join("ram"));
    let seconds = GuestMemory::of(second.pid(), first.file(FileName::Ram).unwrap()).unwrap();
    assert_eq!(first.apply_delta(&seconds).unwrap(), 2);
    second.write_page(200, 9);
    let delta = take(&first, &seconds, "second", Durability::Synced);
    let mut third = TestVmm::start_on(delta.path().join("ram"));
    let thirds = GuestMemory::of(third.pid(), delta.file(FileName::Ram).unwrap()).unwrap();
    assert_eq!(delta.apply_delta(&thirds).unwrap(), 3);
    for page in [0, 3, 4, 100, 200, RAM / PAGE_SIZE - 1] {
        assert!(third.read_page(page) == second.read_page(page), "page {page}");
    }
    base.verify().unwrap();

    // Copied, it is complete without the base.
    let copy = dir.path().join("copy");
    let copied = Command::new("cp").arg("-a").arg(delta.path()).arg(&copy).status().unwrap();
    assert!(copied.success());
    base.delete().unwrap();
    first.delete().unwrap();
    delta.delete().unwrap();
    SnapshotFolder::open(&copy).unwrap().verify().unwrap();
}

#[test]
fn damage_is_named_with_file_expected_and_got() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("s");
    for (name, at) in [("ram", 0), ("ram", RAM - 1), ("scratch.ext4", 1024), ("state", 3)] {
        write_base(&target, b"state");
        let file = File::options().write(true).open(target.join(name));
        let file = file.or_else(|_| {
            fs::set_permissions(target.join(name), Permissions::from_mode(0o600))?;
            File::options().write(true).open(target.join(name))
        });
        file.unwrap().write_all_at(b"!", at).unwrap();
        let folder = SnapshotFolder::open(&target).unwrap();
        let expected = &folder
            .manifest()
            .files
            .iter()
            .find(|(file, _)| file.as_str() == name)
            .unwrap()
            .1
            .digest
            .as_ref()
            .unwrap();
        let error = folder.verify().unwrap_err().to_string();
        let begin =
            format!("corrupt snapshot file {}: expected {expected}, got sha256", target.join(name).display());
        assert!(error.starts_with(&begin), "{error}");
        assert!(folder.verify_once(&dir.path().join("cache")).is_err());
    }
    let refused = |expected: &str| {
        let error = SnapshotFolder::open(&target).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert!(error.contains(target.to_str().unwrap()), "{error}");
    };
    write_base(&target, b"state");
    fs::set_permissions(target.join("scratch.ext4"), Permissions::from_mode(0o600)).unwrap();
    File::options().write(true).open(target.join("scratch.ext4")).unwrap().set_len(100).unwrap();
    refused("it has 100 bytes, expected 8388608");
    fs::remove_file(target.join("scratch.ext4")).unwrap();
    refused("scratch.ext4: it is missing");
    std::os::unix::fs::symlink("/etc/passwd", target.join("scratch.ext4")).unwrap();
    refused("cannot open");
    fs::remove_file(target.join("scratch.ext4")).unwrap();
    assert!(Command::new("mkfifo").arg(target.join("scratch.ext4")).status().unwrap().success());
    refused("expected a regular file");
    fs::remove_file(target.join("manifest.json")).unwrap();
    refused("manifest.json is missing");
    assert!(matches!(SnapshotFolder::open(&dir.path().join("none")), Err(Error::Missing { .. })));
}

#[test]
fn large_files_are_hashed_once() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    let target = dir.path().join("s");
    let new = begin_base(&target, b"state").unwrap();
    let folder = new.publish(small(), Durability::Synced, Some(&cache)).unwrap();
    folder.verify_once(&cache).unwrap();

    // Not read again: damage that sets the time back is not seen by this, only by `verify`.
    let damage = |path: &Path| {
        let file = File::options().write(true).open(path).unwrap();
        let before = file.metadata().unwrap().modified().unwrap();
        file.write_all_at(b"!", 0).unwrap();
        file.set_modified(before).unwrap();
    };
    damage(&target.join("ram"));
    folder.verify_once(&cache).unwrap();
    folder.verify().unwrap_err();
    let elsewhere = dir.path().join("another host's cache");
    folder.verify_once(&elsewhere).unwrap_err();

    // Links are the same file, whatever happens to the other names of it; a copy is another.
    let folder =
        begin_base(&target, b"state").unwrap().publish(small(), Durability::Synced, Some(&cache)).unwrap();
    let linked = dir.path().join("linked");
    let mut new = NewSnapshot::begin(&linked).unwrap();
    new.add_bytes(FileName::State, b"state").unwrap();
    new.add_base(&folder).unwrap();
    let linked = new.publish(small(), Durability::Synced, None).unwrap();
    folder.delete().unwrap();
    let copy = dir.path().join("copy");
    assert!(Command::new("cp").arg("-a").arg(linked.path()).arg(&copy).status().unwrap().success());
    damage(&linked.path().join("ram"));
    linked.verify_once(&cache).unwrap();
    damage(&copy.join("ram"));
    SnapshotFolder::open(&copy).unwrap().verify_once(&cache).unwrap_err();

    // A sound copy is hashed the first time and then known.
    let sound = dir.path().join("sound");
    write_base(&sound, b"state");
    let old = SystemTime::now() - Duration::from_secs(3600);
    for name in ["ram", "scratch.ext4"] {
        File::open(sound.join(name)).unwrap().set_modified(old).unwrap();
    }
    let sound = SnapshotFolder::open(&sound).unwrap();
    sound.verify_once(&cache).unwrap();
    damage(&sound.path().join("ram"));
    sound.verify_once(&cache).unwrap();
    // What is small is read each time.
    fs::set_permissions(sound.path().join("state"), Permissions::from_mode(0o600)).unwrap();
    damage(&sound.path().join("state"));
    sound.verify_once(&cache).unwrap_err();
}

#[test]
fn only_what_dead_writers_left_is_swept() {
    let dir = tempfile::tempdir().unwrap();
    let live = begin_base(&dir.path().join("live"), b"state").unwrap();
    write_base(&dir.path().join("done"), b"state");
    let dead = dir.path().join("dead.new-0123456789abcdef");
    fs::create_dir(&dead).unwrap();
    fs::write(dead.join("ram"), "half").unwrap();
    // A user's own, however they are called.
    for name in ["my.new-photos", "x.new-0123456789ABCDEF", ".new-0123456789abcde"] {
        fs::create_dir(dir.path().join(name)).unwrap();
    }
    fs::write(dir.path().join("file.new-0123456789abcdef"), "mine").unwrap();
    std::os::unix::fs::symlink("done", dir.path().join("link.new-0123456789abcdef")).unwrap();
    let before = names(dir.path()).len();
    assert_eq!(sweep(dir.path()).unwrap(), [dead]);
    assert_eq!(names(dir.path()).len(), before - 1);
    live.publish(small(), Durability::Synced, None).unwrap().verify().unwrap();
    assert_eq!(sweep(dir.path()).unwrap(), [] as [PathBuf; 0]);
    assert_eq!(sweep(&dir.path().join("none")).unwrap(), [] as [PathBuf; 0]);
}

const VICTIM: &str = "TIFFIN_TEST_SNAPSHOT_VICTIM";

/// Writes snapshots until it is killed; only ever run by the next test.
#[test]
fn victim() {
    let Some(target) = std::env::var_os(VICTIM) else { return };
    println!("ready");
    for turn in 0_u64.. {
        let new = begin_base(Path::new(&target), &turn.to_le_bytes()).unwrap();
        new.publish(small(), Durability::Synced, None).unwrap();
    }
}

#[test]
fn a_killed_writer_leaves_a_whole_snapshot_and_what_a_sweep_removes() {
    use std::io::Read;
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("s");
    write_base(&target, &u64::MAX.to_le_bytes()).verify().unwrap();
    let mut leftovers = 0;
    for turn in 0..40_u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "snapshot::folder::tests::victim", "--nocapture"])
            .env(VICTIM, &target)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = child.stdout.take().unwrap();
        let (mut said, mut byte) = (Vec::new(), [0]);
        while !said.ends_with(b"ready") {
            assert_eq!(out.read(&mut byte).unwrap(), 1, "{}", String::from_utf8_lossy(&said));
            said.push(byte[0]);
        }
        // Any moment is a right one; different ones are better.
        std::thread::sleep(Duration::from_micros(turn * 597));
        child.kill().unwrap();
        child.wait().unwrap();
        SnapshotFolder::open(&target).unwrap().verify().unwrap();
        leftovers += sweep(dir.path()).unwrap().len();
        assert_eq!(names(dir.path()), ["s"]);
    }
    println!("{leftovers} of 40 kills left something");
}

/// A mounted tmpfs; unmounted with this value.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(kib: u64) -> io::Result<Self> {
        let dir = tempfile::tempdir()?;
        let options = std::ffi::CString::new(format!("size={kib}k,mode=700"))?;
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("tmpfs", dir.path(), "tmpfs", flags, Some(options.as_c_str()))?;
        Ok(Self(dir))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0.path(), rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn a_full_disk_at_any_step_leaves_nothing() {
    let (mut failed, mut done) = (0, 0);
    for kib in [4, 8, 16, 64, 300, 330, 620, 640, 656, 700, 1500] {
        let disk = match SmallDisk::mount(kib) {
            Ok(disk) => disk,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                eprintln!("SKIPPED: only root may mount a small file system ({error})");
                return;
            }
            Err(error) => panic!("{error}"),
        };
        let root = disk.0.path();
        let written = begin_base(&root.join("s"), b"state")
            .and_then(|new| new.publish(small(), Durability::Synced, Some(&root.join("cache"))));
        match written {
            Ok(folder) => {
                folder.verify().unwrap();
                done += 1;
            }
            Err(error) => {
                assert!(matches!(error, Error::NoSpace { .. }), "{kib} KiB: {error:?}");
                assert!(error.to_string().contains("no space for /"), "{error}");
                let left: Vec<_> = names(root).into_iter().filter(|name| name != "cache").collect();
                assert_eq!(left, Vec::<String>::new(), "{kib} KiB: {error}");
                failed += 1;
            }
        }
    }
    assert!(failed >= 5 && done >= 1, "{failed} failed, {done} did not");
}
