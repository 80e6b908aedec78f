//! Applies a layer to a tree (OCI image-spec 1.1, `layer.md`, "Applying changesets").
//!
//! The tree is a plain folder, or an overlay whose lower layers are those below. Paths are resolved as in a container,
//! so a symbolic link leads nowhere but into the tree.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use oci::layer::{Change, Kind, LayerPath, LayerReader, Metadata, Node, Timestamp};
use rustix::fs::FileType;

use crate::error::{Error, at};
use crate::ids;
use crate::rooted::{Rooted, time_of};
use crate::tree::{Escape, Last};

/// What overlayfs keeps for itself. Kernels differ in whether a mounted overlay takes such attributes of a file; written
/// next to it they would be taken for its own.
const OVERLAY: [&[u8]; 2] = [b"trusted.overlay.", b"user.overlay."];

/// Applies everything in the stream and reads it to its end, so that its digests are checked. On an error the tree is
/// half-changed and must be thrown away.
pub(crate) fn apply(stream: impl Read, root: &Rooted) -> Result<(), Error> {
    let mut reader = LayerReader::new(stream);
    let mut state = State {
        root,
        ours: HashSet::new(),
        found: HashMap::new(),
        directories: Vec::new(),
        settled: HashSet::new(),
        left_out: HashSet::new(),
    };
    while let Some(change) = reader.next_change()? {
        match change {
            Change::Whiteout(path) => state.hide(&path)?,
            Change::Opaque(path) => state.hide_children(&path)?,
            Change::Node(mut node) => {
                node.metadata.xattrs.retain(|name, _| !OVERLAY.iter().any(|prefix| name.starts_with(prefix)));
                state.add(&node, &mut reader)?;
            }
        }
    }
    // Making entries in a directory changes its time, so times come last. One that the layer does not name keeps what it
    // had: a layer says all that it changes.
    let named = state.directories.iter().map(|(path, metadata)| (path, metadata.mtime));
    for (path, time) in state.found.iter().map(|(path, time)| (path, *time)).chain(named) {
        let is_directory = |mode: u32| FileType::from_raw_mode(mode) == FileType::Directory;
        if root.stat(path)?.is_some_and(|stat| is_directory(stat.st_mode)) {
            root.set_time(path, time)?;
        }
    }
    Ok(())
}

struct State<'a> {
    root: &'a Rooted,
    /// What this layer made: whiteouts hide only what lower layers have.
    ours: HashSet<LayerPath>,
    /// The times of directories that were there before something in them was changed.
    found: HashMap<LayerPath, Timestamp>,
    directories: Vec<(LayerPath, Metadata)>,
    /// Directories that are there, with no link on the way: most entries are in the directory of the one before. Whatever
    /// takes something away empties it.
    settled: HashSet<LayerPath>,
    /// Devices that could not be made; a hard link to one is left out too.
    left_out: HashSet<LayerPath>,
}

impl State<'_> {
    fn hide(&mut self, path: &LayerPath) -> Result<(), Error> {
        self.settled.clear();
        let real = self.real(path)?;
        if let Some((parent, _)) = real.split() {
            self.remember(&parent)?;
        }
        match self.ours.contains(&real) {
            true => self.hide_lower_children(&real),
            false => self.root.remove(&real),
        }
    }

    fn hide_children(&mut self, path: &LayerPath) -> Result<(), Error> {
        self.settled.clear();
        let real = self.real(path)?;
        self.root.make_directories(&real)?;
        self.hide_lower_children(&real)
    }

    fn hide_lower_children(&mut self, directory: &LayerPath) -> Result<(), Error> {
        let is_directory = self
            .root
            .stat(directory)?
            .is_some_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory);
        if !is_directory {
            return Ok(());
        }
        for name in self.root.names(directory)? {
            let child = directory.join(&name)?;
            match self.ours.contains(&child) {
                true => self.hide_lower_children(&child)?,
                false => self.root.remove(&child)?,
            }
        }
        Ok(())
    }

    /// Keeps the time of the directory, or of the lowest one above it that is there.
    fn remember(&mut self, directory: &LayerPath) -> Result<(), Error> {
        let mut next = Some(directory.clone());
        while let Some(path) = next {
            if self.found.contains_key(&path) || self.ours.contains(&path) {
                return Ok(());
            }
            if let Some(stat) = self.root.stat(&path)? {
                self.found.insert(path, time_of(&stat));
                return Ok(());
            }
            next = path.split().map(|(parent, _)| parent);
        }
        Ok(())
    }

    fn add(&mut self, node: &Node, data: &mut impl Read) -> Result<(), Error> {
        let path = self.real(&node.path)?;
        if let Some((parent, _)) = path.split() {
            if !self.settled.contains(&parent) {
                self.remember(&parent)?;
                self.root.make_directories(&parent)?;
                self.settled.insert(parent.clone());
            }
            // A folder with something of ours in it stays when what lower layers have there goes.
            let mut above = Some(parent);
            while let Some(folder) = above.filter(|folder| !self.ours.contains(folder)) {
                above = folder.split().map(|(parent, _)| parent);
                self.ours.insert(folder);
            }
        }
        let existing = self.root.stat(&path)?;
        let keeps_children = node.kind == Kind::Directory
            && existing.is_some_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory);
        if existing.is_some() && !keeps_children {
            self.settled.clear();
            self.root.remove(&path)?;
        }
        self.ours.insert(path.clone());
        match &node.kind {
            Kind::File { .. } | Kind::Sparse { .. } => {
                let mut file = self.root.create(&path)?;
                copy_data(&node.kind, data, &mut file).map_err(|source| match source.kind() {
                    io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => {
                        Error::Oci(oci::Error::Corrupt {
                            what: format!("layer entry {}", node.path),
                            reason: source.to_string(),
                        })
                    }
                    _ => at(&self.root.shown(&path))(source),
                })?;
                self.root.set_file_metadata(&path, &file, &node.metadata)
            }
            Kind::HardLink(target) => {
                let target = self.real(target)?;
                if ids::are_limited() && self.left_out.contains(&target) {
                    self.left_out.insert(path);
                    return Ok(());
                }
                let directory = |mode: u32| FileType::from_raw_mode(mode) == FileType::Directory;
                if self.root.stat(&target)?.is_none_or(|stat| directory(stat.st_mode)) {
                    return Err(Error::Oci(oci::Error::Corrupt {
                        what: format!("layer entry {}", node.path),
                        reason: format!("it is a hard link to {target}, which is no file of the image"),
                    }));
                }
                // The attributes are those of the target, which has them already.
                self.root.make(&path, &Kind::HardLink(target))
            }
            Kind::Directory => {
                if !path.is_root() {
                    self.root.make(&path, &node.kind)?;
                }
                self.root.set_metadata(&path, &node.metadata, false)?;
                self.directories.push((path, node.metadata.clone()));
                Ok(())
            }
            // Only root of the machine makes devices. As elsewhere, the rest of the layer counts.
            Kind::CharDevice { .. } | Kind::BlockDevice { .. } if ids::are_limited() => {
                self.left_out.insert(path);
                Ok(())
            }
            kind => {
                self.root.make(&path, kind)?;
                self.root.set_metadata(&path, &node.metadata, matches!(kind, Kind::Symlink(_)))
            }
        }
    }

    /// Only the way to an entry is resolved: the entry itself is replaced, never followed.
    fn real(&self, path: &LayerPath) -> Result<LayerPath, Error> {
        if path.split().is_some_and(|(parent, _)| self.settled.contains(&parent)) {
            return Ok(path.clone());
        }
        self.root.resolve(path.as_bytes(), Last::Keep, Escape::Clamp)
    }
}

/// Writes a file's data; the holes of a sparse one stay holes.
fn copy_data(kind: &Kind, data: &mut impl Read, file: &mut File) -> io::Result<()> {
    let Kind::Sparse { size, runs } = kind else { return io::copy(data, file).map(drop) };
    for run in runs {
        file.seek(SeekFrom::Start(run.start))?;
        if io::copy(&mut data.take(run.length), file)? != run.length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    file.set_len(*size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci::layer::{Compression, LayerWriter};
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};
    use std::path::Path;

    fn path(text: &str) -> LayerPath {
        LayerPath::parse(text.as_bytes()).unwrap()
    }

    fn node(at: &str, kind: Kind) -> Change {
        let uid = rustix::process::getuid().as_raw();
        let gid = rustix::process::getgid().as_raw();
        Change::Node(Node {
            path: path(at),
            metadata: Metadata { mode: 0o755, uid, gid, ..Default::default() },
            kind,
        })
    }

    fn file(at: &str) -> Change {
        node(at, Kind::File { size: 3, offset: 0 })
    }

    /// Packs the changes and applies them to `root`.
    fn apply_all(root: &Path, changes: &[Change]) -> Result<(), Error> {
        let store = tempfile::tempdir().unwrap();
        let store = oci::Store::open_or_create(store.path()).unwrap();
        let mut writer = LayerWriter::new(&store, Compression::None).unwrap();
        for change in changes {
            match change {
                Change::Node(node) => writer.append(node, &b"new"[..]).unwrap(),
                Change::Whiteout(path) => writer.append_whiteout(path).unwrap(),
                Change::Opaque(path) => writer.append_opaque(path).unwrap(),
            }
        }
        let layer = writer.finish().unwrap();
        apply(store.open_blob(&layer.descriptor).unwrap(), &Rooted::open(root).unwrap())
    }

    fn with_canary() -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        fs::write(dir.path().join("outside/canary"), "alive").unwrap();
        let root = dir.path().join("root");
        fs::create_dir(&root).unwrap();
        (dir, root)
    }

    #[test]
    fn hostile_layers_stay_inside() {
        let outside =
            |dir: &tempfile::TempDir| dir.path().join("outside").into_os_string().into_encoded_bytes();
        for case in 0..6 {
            let (dir, root) = with_canary();
            let target = outside(&dir);
            let link = |at: &str, target: &[u8]| node(at, Kind::Symlink(target.to_vec()));
            let changes = match case {
                // Through an absolute link, a relative one, two of them, and by whiteouts behind them.
                0 => vec![link("l", &target), file("l/canary")],
                1 => vec![link("l", b"../outside"), file("l/canary")],
                2 => vec![link("a", b".."), link("b", b"a/outside"), file("b/canary")],
                3 => vec![link("l", &target), Change::Whiteout(path("l/canary"))],
                4 => vec![link("l", b"../outside"), Change::Opaque(path("l"))],
                _ => vec![link("l", &target), node("l/new", Kind::Directory), link("l/canary", b"x")],
            };
            let _ = apply_all(&root, &changes);
            assert_eq!(fs::read(dir.path().join("outside/canary")).unwrap(), b"alive", "case {case}");
            assert_eq!(fs::read_dir(dir.path().join("outside")).unwrap().count(), 1, "case {case}");
        }
    }

    #[test]
    fn what_overlayfs_keeps_for_itself_is_no_content() {
        let (_dir, root) = with_canary();
        let Change::Node(mut directory) = node("d", Kind::Directory) else { unreachable!() };
        for name in ["user.overlay.opaque", "trusted.overlay.redirect", "user.kept"] {
            directory.metadata.xattrs.insert(name.into(), b"y".to_vec());
        }
        apply_all(&root, &[Change::Node(directory)]).unwrap();
        let has = |name: &str| rustix::fs::lgetxattr(root.join("d"), name, &mut [0u8; 8][..]);
        if has("user.kept") == Err(rustix::io::Errno::NOTSUP) {
            eprintln!("SKIPPED: no user attributes on this file system");
            return;
        }
        assert_eq!(has("user.kept"), Ok(1));
        assert_eq!(has("user.overlay.opaque"), Err(rustix::io::Errno::NODATA));
        assert_eq!(has("trusted.overlay.redirect"), Err(rustix::io::Errno::NODATA));
    }

    #[test]
    fn hard_links_to_outside_are_refused() {
        let (dir, root) = with_canary();
        symlink(dir.path().join("outside"), root.join("l")).unwrap();
        for target in ["l/canary", "missing", "."] {
            let link = node("h", Kind::HardLink(path(target)));
            let result = apply_all(&root, &[link]);
            assert!(matches!(result, Err(Error::Oci(oci::Error::Corrupt { .. }))), "{target}: {result:?}");
        }
        assert_eq!(fs::metadata(dir.path().join("outside/canary")).unwrap().nlink(), 1);
    }

    #[test]
    fn layers_change_what_is_there() {
        let (_dir, root) = with_canary();
        for name in ["d/old", "d/keep", "e/x", "f"] {
            fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
            fs::write(root.join(name), "old").unwrap();
        }
        symlink("e", root.join("link")).unwrap();
        let changes = [
            node("d", Kind::Directory),
            Change::Whiteout(path("d/old")),
            Change::Whiteout(path("never/was")),
            file("g/h/i"),
            node("g/h/j", Kind::HardLink(path("g/h/i"))),
            file("link"),
            node("f", Kind::Directory),
            file("o/mine"),
        ];
        apply_all(&root, &changes).unwrap();
        assert!(!root.join("d/old").exists() && root.join("d/keep").exists());
        assert_eq!(fs::read(root.join("g/h/j")).unwrap(), b"new");
        assert_eq!(fs::metadata(root.join("g/h/i")).unwrap().nlink(), 2);
        assert!(
            fs::symlink_metadata(root.join("link")).unwrap().is_file(),
            "a link is replaced, not followed"
        );
        assert!(root.join("e/x").exists());
        assert!(root.join("f").is_dir());
        let time = fs::metadata(root.join("d")).unwrap().mtime();
        assert_eq!(time, 0, "a directory has the time of its entry, not of its last change");
    }

    #[test]
    fn an_opaque_directory_hides_lower_layers_only() {
        let (_dir, root) = with_canary();
        fs::create_dir_all(root.join("d/sub")).unwrap();
        fs::write(root.join("d/lower"), "").unwrap();
        fs::write(root.join("d/sub/lower"), "").unwrap();
        apply_all(&root, &[node("d", Kind::Directory), file("d/sub/ours"), Change::Opaque(path("d"))])
            .unwrap();
        assert!(!root.join("d/lower").exists() && !root.join("d/sub/lower").exists());
        assert!(root.join("d/sub/ours").exists(), "the marker may stand after the layer's own entries");
    }

    #[test]
    fn holes_stay_holes() {
        let dir = tempfile::tempdir().unwrap();
        let root = Rooted::open(dir.path()).unwrap();
        // GNU tar's old form: one run of 4096 bytes in a file of 1 MiB.
        let mut stream = vec![0; 512];
        let mut field = |at: usize, text: &[u8]| stream[at..at + text.len()].copy_from_slice(text);
        field(0, b"sparse");
        field(100, b"0000644");
        field(124, b"00000010000");
        field(156, b"S");
        field(257, b"ustar  ");
        field(386, b"00001000000");
        field(398, b"00000010000");
        field(483, b"00004000000");
        field(148, b"        ");
        let sum: u32 = stream.iter().map(|byte| u32::from(*byte)).sum();
        stream[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        stream.extend([7; 4096]);
        apply(&stream[..], &root).unwrap();
        let sparse = dir.path().join("sparse");
        let contents = fs::read(&sparse).unwrap();
        let mut expected = vec![0; 1 << 20];
        expected[1 << 18..][..4096].fill(7);
        assert!(contents == expected);
        assert!(fs::metadata(&sparse).unwrap().blocks() <= 16);
        assert!(apply(&stream[..4000], &root).is_err(), "cut off");
    }
}
