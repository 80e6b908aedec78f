//! `COPY`: which files, their digest, and writing them into the tree.

use std::collections::BTreeMap;
use std::io::{self, Read};

use dockerfile::{Chmod, Ignore};
use oci::layer::{Kind, LayerPath, LayerWriter, Metadata, Node, Timestamp};
use oci::{Digest, Hasher};

use crate::error::{Error, at};
use crate::plan::{CopyAction, CopySource};
use crate::sources::{self, Named};
use crate::tree::{self, EntryKind, Escape, Last, Tree, resolve};

/// The most files of one COPY; a context with more is most likely the wrong folder.
const MAX_FILES: usize = 1_000_000;

/// A tree that files are copied from.
pub(crate) struct SourceTree<'a> {
    pub(crate) root: &'a dyn Tree,
    /// What is left out; only a context has that.
    pub(crate) ignore: Option<&'a Ignore>,
    /// A context ends at its folder, and its owners mean nothing in the image.
    pub(crate) is_context: bool,
    /// How errors call it.
    pub(crate) shown: String,
}

/// What a COPY will write.
#[derive(Debug, Default)]
pub(crate) struct Selection {
    entries: Vec<Entry>,
    /// Whether the destination must be a directory: several files were found by a pattern.
    several: bool,
    /// `--exclude`.
    exclude: Ignore,
    /// `ADD`, for which archives are more than files.
    is_add: bool,
}

#[derive(Debug)]
struct Entry {
    data: Data,
    target: Target,
    metadata: Metadata,
}

#[derive(Debug)]
enum Data {
    Directory,
    File(LayerPath, u64),
    Inline(String),
    Symlink(Vec<u8>),
    Special(Kind),
}

/// Where an entry goes, seen from the destination.
#[derive(Debug)]
enum Target {
    /// To this path in the destination directory. Empty for the directory itself.
    Under(LayerPath),
    /// A file of this name, in the destination if that is a directory, else as the destination itself.
    FileNamed(Vec<u8>),
}

impl Selection {
    /// Finds the sources. Nothing outside of the tree is ever looked at.
    pub(crate) fn find(action: &CopyAction, tree: Option<&SourceTree<'_>>) -> Result<Self, Error> {
        // The plan has read the patterns before.
        let exclude = Ignore::of_patterns(action.exclude.iter().map(String::as_str))
            .map_err(|reason| Error::Source { what: "--exclude".to_owned(), reason })?;
        let mut selection = Self { exclude, is_add: action.is_add, ..Self::default() };
        let mut sources = 0;
        for source in &action.sources {
            match (source, tree) {
                (CopySource::Inline { name, contents }, _) => {
                    sources += 1;
                    selection.add(Entry {
                        data: Data::Inline(contents.clone()),
                        target: Target::FileNamed(name.clone().into_bytes()),
                        metadata: Metadata { mode: 0o644, ..Metadata::default() },
                    })?;
                }
                (CopySource::Path(path), Some(tree)) => {
                    for found in sources::find(tree, path, action.parents)? {
                        sources += 1;
                        selection.source(tree, path, &found)?;
                    }
                }
                (CopySource::Path(_), None) => {}
            }
        }
        selection.several = sources > 1;
        Ok(selection)
    }

    /// The digest of everything that ends in the image: names, modes, owners, contents. Times do not count, as with
    /// Docker: a fresh checkout of the same files is the same.
    pub(crate) fn digest(&self, tree: Option<&SourceTree<'_>>) -> Result<Digest, Error> {
        Ok(self.digest_of_each(tree)?.0)
    }

    /// The regular files whose contents are read.
    pub(crate) fn files(&self) -> Vec<&LayerPath> {
        let data = self.entries.iter().map(|entry| &entry.data);
        data.filter_map(|data| if let Data::File(path, _) = data { Some(path) } else { None }).collect()
    }

    /// The digest, and for each entry what there was: to tell later what changed.
    pub(crate) fn digest_of_each(
        &self,
        tree: Option<&SourceTree<'_>>,
    ) -> Result<(Digest, BTreeMap<String, String>), Error> {
        let mut each = BTreeMap::new();
        let mut hasher = Hasher::new();
        let mut field = |tag: &str, bytes: &[u8]| {
            hasher.update(format!("{tag} {}\n", bytes.len()).as_bytes());
            hasher.update(bytes);
        };
        for entry in &self.entries {
            let name = match &entry.target {
                Target::Under(path) => {
                    field("under", path.as_bytes());
                    path.as_bytes()
                }
                Target::FileNamed(name) => {
                    field("named", name);
                    name
                }
            };
            let metadata = &entry.metadata;
            let mode = format!("{:o} {} {}", metadata.mode, metadata.uid, metadata.gid);
            field("meta", mode.as_bytes());
            let state = match &entry.data {
                Data::Directory => {
                    field("directory", b"");
                    "directory".to_owned()
                }
                Data::Inline(contents) => {
                    field("inline", contents.as_bytes());
                    Hasher::digest_of(contents.as_bytes()).to_string()
                }
                Data::Symlink(target) => {
                    field("link", target);
                    format!("link to {}", String::from_utf8_lossy(target))
                }
                Data::Special(kind) => {
                    let kind = format!("{kind:?}");
                    field("special", kind.as_bytes());
                    kind
                }
                Data::File(path, _) => {
                    let Some(tree) = tree else { continue };
                    let digest = tree.root.content_digest(path)?.to_string();
                    field("file", digest.as_bytes());
                    digest
                }
            };
            each.insert(String::from_utf8_lossy(name).into_owned(), format!("{mode} {state}"));
        }
        Ok((hasher.finish().0, each))
    }

    /// Writes the files as a layer on top of `lower`, and says whether there is anything in it. `owner` replaces what the
    /// entries have; directories that had to be made get `now` as their time, those that are there stay as they are.
    pub(crate) fn write(
        &self,
        action: &CopyAction,
        tree: Option<&SourceTree<'_>>,
        lower: &dyn Tree,
        owner: Option<(u32, u32)>,
        now: Timestamp,
        writer: &mut LayerWriter,
    ) -> Result<bool, Error> {
        let destination = resolve(lower, action.destination.as_bytes(), Last::Follow, Escape::Clamp)?;
        let exists_as_directory = lower.entry(&destination)?.is_some_and(|entry| entry.is_directory());
        let into_directory = exists_as_directory || action.destination.ends_with('/');
        if self.several && !into_directory {
            return Err(Error::Source {
                what: action.destination.clone(),
                reason: "several files are copied, so the destination must end with a slash".to_owned(),
            });
        }
        let mut new = New { lower, owner, mode: action.chmod.as_ref(), now, nodes: BTreeMap::new() };
        for entry in &self.entries {
            let path = match &entry.target {
                Target::Under(relative) => {
                    let mut raw = destination.as_bytes().to_vec();
                    raw.push(b'/');
                    raw.extend_from_slice(relative.as_bytes());
                    LayerPath::parse(&raw)?
                }
                Target::FileNamed(name) if into_directory => destination.join(name)?,
                Target::FileNamed(_) => destination.clone(),
            };
            new.entry(entry, path)?;
        }
        for (path, (metadata, data)) in &new.nodes {
            append(writer, path, metadata, data, tree)?;
        }
        Ok(!new.nodes.is_empty())
    }

    fn add(&mut self, entry: Entry) -> Result<(), Error> {
        if self.entries.len() >= MAX_FILES {
            return Err(Error::Source {
                what: "COPY".to_owned(),
                reason: format!("more than {MAX_FILES} files; name a smaller folder, or use .dockerignore"),
            });
        }
        self.entries.push(entry);
        Ok(())
    }

    fn source(&mut self, tree: &SourceTree<'_>, written: &str, named: &Named) -> Result<(), Error> {
        let path = &named.path;
        let real = tree.resolve(path.as_bytes(), Last::Follow)?;
        let missing =
            || Error::Source { what: written.to_owned(), reason: format!("no such file in {}", tree.shown) };
        let found = tree.root.entry(&real)?.ok_or_else(missing)?;
        if found.is_directory() {
            self.parents(tree, named)?;
            let below = named.kept.clone().unwrap_or_default();
            return self.walk(tree, &real, &below, &LayerPath::default(), &found);
        }
        if tree.excludes(&real) || tree.excludes(path) {
            return Err(Error::Source {
                what: written.to_owned(),
                reason: format!("it is left out of {} by .dockerignore", tree.shown),
            });
        }
        let name = path.split().map(|(_, name)| name.to_vec()).unwrap_or_default();
        if self.exclude.excludes(&name)
            || named.kept.as_ref().is_some_and(|kept| self.exclude.excludes(kept.as_bytes()))
        {
            return Ok(());
        }
        let Some(data) = tree.data(&real, &found)? else { return Err(missing()) };
        if let Data::File(path, _) = &data
            && self.is_add
            && sources::is_archive(tree, path)?
        {
            return Err(Error::Source {
                what: written.to_owned(),
                reason: "ADD of archives is not supported yet: unpack it in a RUN step, or COPY it as it is"
                    .to_owned(),
            });
        }
        self.parents(tree, named)?;
        let target = match &named.kept {
            Some(kept) => Target::Under(kept.clone()),
            None => Target::FileNamed(name),
        };
        self.add(Entry { data, target, metadata: tree.metadata(&real, &found)? })
    }

    /// With `--parents`, the folders on the way to what is copied.
    fn parents(&mut self, tree: &SourceTree<'_>, named: &Named) -> Result<(), Error> {
        for (path, kept) in named.folders() {
            let real = tree.resolve(path.as_bytes(), Last::Follow)?;
            let Some(found) = tree.root.entry(&real)? else { continue };
            let metadata = tree.metadata(&real, &found)?;
            self.add(Entry { data: Data::Directory, target: Target::Under(kept), metadata })?;
        }
        Ok(())
    }

    fn walk(
        &mut self,
        tree: &SourceTree<'_>,
        real: &LayerPath,
        target: &LayerPath,
        relative: &LayerPath,
        found: &tree::Entry,
    ) -> Result<(), Error> {
        let ignored = !real.is_root() && tree.excludes(real);
        let left_out = !relative.is_root() && self.exclude.excludes(relative.as_bytes());
        let excluded = ignored || left_out;
        if ignored && !tree.ignore.is_some_and(Ignore::has_exceptions)
            || left_out && !self.exclude.has_exceptions()
        {
            return Ok(());
        }
        if !excluded {
            let metadata = tree.metadata(real, found)?;
            self.add(Entry { data: Data::Directory, target: Target::Under(target.clone()), metadata })?;
        }
        for name in tree.root.names(real)? {
            let (child, target, relative) = (real.join(&name)?, target.join(&name)?, relative.join(&name)?);
            let Some(found) = tree.root.entry(&child)? else { continue };
            if found.is_directory() {
                self.walk(tree, &child, &target, &relative, &found)?;
            } else if !tree.excludes(&child)
                && !self.exclude.excludes(relative.as_bytes())
                && let Some(data) = tree.data(&child, &found)?
            {
                let metadata = tree.metadata(&child, &found)?;
                self.add(Entry { data, target: Target::Under(target), metadata })?;
            }
        }
        Ok(())
    }
}

impl SourceTree<'_> {
    pub(crate) fn escape(&self) -> Escape {
        if self.is_context { Escape::Refuse } else { Escape::Clamp }
    }

    pub(crate) fn excludes(&self, path: &LayerPath) -> bool {
        self.ignore.is_some_and(|ignore| ignore.excludes(path.as_bytes()))
    }

    /// The path without links, in the tree.
    pub(crate) fn resolve(&self, path: &[u8], last: Last) -> Result<LayerPath, Error> {
        resolve(self.root, path, last, self.escape())
    }

    fn metadata(&self, path: &LayerPath, found: &tree::Entry) -> Result<Metadata, Error> {
        let mut metadata = found.metadata.clone();
        if self.is_context {
            (metadata.uid, metadata.gid) = (0, 0);
        } else if found.is_file() {
            // File capabilities are what makes ping work; other attributes are rare and stay behind, as with Docker.
            metadata.xattrs = self.root.xattrs(path)?;
            metadata.xattrs.retain(|name, _| name == b"security.capability");
        }
        Ok(metadata)
    }

    /// `None` for sockets, which no image can hold.
    fn data(&self, path: &LayerPath, found: &tree::Entry) -> Result<Option<Data>, Error> {
        Ok(Some(match found.kind {
            EntryKind::File { size } => Data::File(path.clone(), size),
            EntryKind::Directory => Data::Directory,
            EntryKind::Symlink => Data::Symlink(self.root.read_link(path)?),
            EntryKind::Fifo => Data::Special(Kind::Fifo),
            EntryKind::CharDevice { major, minor } => Data::Special(Kind::CharDevice { major, minor }),
            EntryKind::BlockDevice { major, minor } => Data::Special(Kind::BlockDevice { major, minor }),
            EntryKind::Socket => return Ok(None),
        }))
    }
}

/// What a copy adds to the tree below it.
struct New<'a> {
    lower: &'a dyn Tree,
    owner: Option<(u32, u32)>,
    mode: Option<&'a Chmod>,
    now: Timestamp,
    /// Sorted by path, so that folders come before what is in them; of several files for one path the last counts.
    nodes: BTreeMap<LayerPath, (Metadata, &'a Data)>,
}

impl<'a> New<'a> {
    fn entry(&mut self, entry: &'a Entry, path: LayerPath) -> Result<(), Error> {
        let mut metadata = entry.metadata.clone();
        if let Some((uid, gid)) = self.owner {
            (metadata.uid, metadata.gid) = (uid, gid);
        }
        if let Some(mode) = self.mode {
            metadata.mode = mode.apply(metadata.mode, matches!(entry.data, Data::Directory));
        }
        if let Data::Inline(_) = entry.data {
            metadata.mtime = self.now;
        }
        if let Some((parent, _)) = path.split() {
            self.directories(&parent)?;
        }
        let is_directory = matches!(entry.data, Data::Directory);
        match self.is_directory(&path)? {
            // A directory that is there keeps its attributes, as with `cp`.
            Some(true) if is_directory => return Ok(()),
            Some(there) if there != is_directory => return Err(in_the_way(&path, there)),
            _ => {}
        }
        self.nodes.insert(path, (metadata, &entry.data));
        Ok(())
    }

    /// Makes the directories on the way where they are missing.
    fn directories(&mut self, path: &LayerPath) -> Result<(), Error> {
        let mut missing = Vec::new();
        let mut next = Some(path.clone());
        while let Some(path) = next {
            match self.is_directory(&path)? {
                Some(true) => break,
                Some(false) => return Err(in_the_way(&path, false)),
                None => {}
            }
            next = path.split().map(|(parent, _)| parent);
            missing.push(path);
        }
        let (uid, gid) = self.owner.unwrap_or_default();
        for path in missing {
            let metadata = Metadata { mode: 0o755, uid, gid, mtime: self.now, ..Metadata::default() };
            self.nodes.insert(path, (metadata, &Data::Directory));
        }
        Ok(())
    }

    /// `None` when nothing is there.
    fn is_directory(&self, path: &LayerPath) -> Result<Option<bool>, Error> {
        if path.is_root() {
            return Ok(Some(true));
        }
        Ok(match self.nodes.get(path) {
            Some((_, data)) => Some(matches!(data, Data::Directory)),
            None => self.lower.entry(path)?.map(|entry| entry.is_directory()),
        })
    }
}

/// As BuildKit has it, neither replaces the other.
fn in_the_way(path: &LayerPath, is_directory: bool) -> Error {
    let reason = match is_directory {
        true => "a directory is there, and a file is to be copied to it; remove it in a RUN step before",
        false => {
            "a file or link is there, and a directory is to be copied to it; copy to the link's target, or remove it in a \
             RUN step before"
        }
    };
    Error::Source { what: path.to_string(), reason: reason.to_owned() }
}

fn append(
    writer: &mut LayerWriter,
    path: &LayerPath,
    metadata: &Metadata,
    data: &Data,
    tree: Option<&SourceTree<'_>>,
) -> Result<(), Error> {
    let kind = match data {
        Data::Directory => Kind::Directory,
        Data::Inline(contents) => Kind::File { size: contents.len() as u64, offset: 0 },
        Data::File(_, size) => Kind::File { size: *size, offset: 0 },
        Data::Symlink(target) => Kind::Symlink(target.clone()),
        Data::Special(kind) => kind.clone(),
    };
    let node = Node { path: path.clone(), metadata: metadata.clone(), kind };
    match (data, tree) {
        (Data::Inline(contents), _) => writer.append(&node, contents.as_bytes())?,
        (Data::File(source, size), Some(tree)) => {
            let mut file = tree.root.open(source)?;
            let changed = |got: &str| Error::Source {
                what: tree.root.shown(source).display().to_string(),
                reason: format!("it had {size} bytes and now has {got}: it changed during the build"),
            };
            writer.append(&node, file.by_ref().take(*size)).map_err(|error| match &error {
                oci::Error::Io { source, .. } if source.kind() == io::ErrorKind::UnexpectedEof => {
                    changed("less")
                }
                _ => error.into(),
            })?;
            if file.read(&mut [0]).map_err(at(&tree.root.shown(source)))? != 0 {
                return Err(changed("more"));
            }
        }
        (Data::File(..), None) => {}
        _ => writer.append(&node, io::empty())?,
    }
    Ok(())
}

/// `WORKDIR`: makes the directory where it is missing, and says whether it did.
pub(crate) fn make_workdir(
    lower: &dyn Tree,
    path: &str,
    now: Timestamp,
    writer: &mut LayerWriter,
) -> Result<bool, Error> {
    let real = resolve(lower, path.as_bytes(), Last::Follow, Escape::Clamp)?;
    if lower.entry(&real)?.is_some_and(|entry| !entry.is_directory()) {
        return Err(Error::Source {
            what: path.to_owned(),
            reason: "it is there, but no directory".to_owned(),
        });
    }
    let mut new = New { lower, owner: None, mode: None, now, nodes: BTreeMap::new() };
    new.directories(&real)?;
    for (path, (metadata, data)) in &new.nodes {
        append(writer, path, metadata, data, None)?;
    }
    Ok(!new.nodes.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::CopyFrom;
    use crate::rooted::Rooted;
    use oci::layer::Compression;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    #[derive(Default)]
    struct Flags {
        chmod: Option<&'static str>,
        exclude: &'static [&'static str],
        parents: bool,
        is_add: bool,
    }

    struct Case {
        dir: tempfile::TempDir,
    }

    impl Case {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            for folder in ["context/d/sub", "root/bin", "root/old"] {
                fs::create_dir_all(dir.path().join(folder)).unwrap();
            }
            let context = dir.path().join("context");
            fs::write(context.join("a.txt"), "a").unwrap();
            fs::write(context.join("b.txt"), "b").unwrap();
            fs::write(context.join("d/x"), "x").unwrap();
            fs::write(context.join("d/sub/y"), "y").unwrap();
            fs::set_permissions(context.join("d/x"), fs::Permissions::from_mode(0o750)).unwrap();
            symlink("x", context.join("d/link")).unwrap();
            symlink("../secret", context.join("out")).unwrap();
            symlink("/etc/passwd", context.join("abs")).unwrap();
            symlink("d", context.join("dirlink")).unwrap();
            symlink("bin", dir.path().join("root/sbin")).unwrap();
            fs::write(dir.path().join("secret"), "secret").unwrap();
            Self { dir }
        }

        fn copy_with(&self, sources: &[&str], destination: &str, ignore: &str) -> Result<Digest, Error> {
            self.copy_as(sources, destination, ignore, &Flags::default())
        }

        fn copy_as(
            &self,
            sources: &[&str],
            destination: &str,
            ignore: &str,
            options: &Flags,
        ) -> Result<Digest, Error> {
            let uid = rustix::process::getuid().as_raw();
            let context = Rooted::open(&self.dir.path().join("context")).unwrap();
            let ignore = Ignore::parse("x", ignore.as_bytes()).unwrap();
            let tree = SourceTree {
                root: &context,
                ignore: Some(&ignore),
                is_context: true,
                shown: "the context".into(),
            };
            let action = CopyAction {
                from: CopyFrom::Context,
                sources: sources.iter().map(|source| CopySource::Path((*source).to_owned())).collect(),
                destination: destination.to_owned(),
                chown: None,
                chmod: options.chmod.map(|mode| Chmod::parse(mode).unwrap()),
                exclude: options.exclude.iter().map(|pattern| (*pattern).to_owned()).collect(),
                parents: options.parents,
                is_add: options.is_add,
            };
            let selection = Selection::find(&action, Some(&tree))?;
            let digest = selection.digest(Some(&tree))?;
            let root = Rooted::open(&self.dir.path().join("root")).unwrap();
            let now = Timestamp { seconds: 1000, nanoseconds: 0 };
            let store = oci::Store::open_or_create(&self.dir.path().join("store")).unwrap();
            let mut writer = LayerWriter::new(&store, Compression::None).unwrap();
            let owner = Some((uid, rustix::process::getgid().as_raw()));
            selection.write(&action, Some(&tree), &root, owner, now, &mut writer)?;
            let layer = writer.finish().unwrap();
            crate::unpack::apply(store.open_blob(&layer.descriptor).unwrap(), &root)?;
            Ok(digest)
        }

        fn copy(&self, sources: &[&str], destination: &str) -> Result<Digest, Error> {
            self.copy_with(sources, destination, "")
        }

        fn read(&self, path: &str) -> String {
            fs::read_to_string(self.dir.path().join("root").join(path)).unwrap()
        }

        fn has(&self, path: &str) -> bool {
            fs::symlink_metadata(self.dir.path().join("root").join(path)).is_ok()
        }
    }

    #[test]
    fn files_and_folders_go_where_docker_puts_them() {
        let case = Case::new();
        case.copy(&["a.txt"], "/new").unwrap();
        assert_eq!(case.read("new"), "a");
        case.copy(&["a.txt"], "/old").unwrap();
        assert_eq!(case.read("old/a.txt"), "a");
        case.copy(&["a.txt", "b.txt"], "/deep/er/").unwrap();
        assert_eq!(case.read("deep/er/b.txt"), "b");
        case.copy(&["*.txt"], "/glob/").unwrap();
        assert_eq!(case.read("glob/a.txt") + &case.read("glob/b.txt"), "ab");
        case.copy(&["d"], "/sbin").unwrap();
        assert_eq!(case.read("bin/sub/y"), "y", "links in the image are followed inside it");
        assert_eq!(fs::metadata(case.dir.path().join("root/bin/x")).unwrap().mode() & 0o777, 0o750);
        assert!(fs::symlink_metadata(case.dir.path().join("root/bin/link")).unwrap().is_symlink());
        case.copy(&["dirlink"], "/via/").unwrap();
        assert_eq!(case.read("via/x"), "x");
        assert_eq!(fs::metadata(case.dir.path().join("root/deep")).unwrap().mtime(), 1000);
    }

    #[test]
    fn nothing_leaves_the_context() {
        let case = Case::new();
        for source in ["../secret", "d/../../secret", "out", "abs", "/../secret", "../*", "o*"] {
            let result = case.copy(&[source], "/taken");
            assert!(matches!(result, Err(Error::Source { .. })), "{source}: {result:?}");
            assert!(!case.has("taken"), "{source}");
        }
        case.copy(&["."], "/all/").unwrap();
        assert!(fs::symlink_metadata(case.dir.path().join("root/all/out")).unwrap().is_symlink());
    }

    #[test]
    fn what_is_missing_or_ignored_is_said() {
        let case = Case::new();
        let error =
            |source: &str, ignore: &str| case.copy_with(&[source], "/x", ignore).unwrap_err().to_string();
        assert!(error("nope", "").contains("no such file in the context"));
        assert!(error("*.zip", "").contains("fits no file"));
        assert!(error("a.txt", "*.txt").contains(".dockerignore"));
        assert!(case.copy(&["*.txt"], "/notdir").unwrap_err().to_string().contains("must end with a slash"));
        case.copy_with(&["."], "/i/", "*\n!d/x\n").unwrap();
        assert!(case.has("i/d/x") && !case.has("i/a.txt") && !case.has("i/d/sub/y"));
    }

    #[test]
    fn symbolic_modes_change_what_is_there() {
        let case = Case::new();
        let flags = Flags { chmod: Some("go=u,a-w"), ..Flags::default() };
        case.copy_as(&["d"], "/m/", "", &flags).unwrap();
        let mode =
            |path: &str| fs::metadata(case.dir.path().join("root").join(path)).unwrap().mode() & 0o7777;
        assert_eq!((mode("m/x"), mode("m/sub")), (0o555, 0o555));
    }

    #[test]
    fn excluded_files_stay_behind() {
        let case = Case::new();
        let flags = Flags { exclude: &["sub", "*.txt", "!b.txt"], ..Flags::default() };
        case.copy_as(&["."], "/e/", "", &flags).unwrap();
        assert!(case.has("e/d/x") && case.has("e/b.txt") && case.has("e/d/sub/y") && !case.has("e/a.txt"));
        case.copy_as(&["d"], "/f/", "", &flags).unwrap();
        assert!(case.has("f/x") && !case.has("f/sub"), "patterns begin at the source");
        let flags = Flags { exclude: &["a.*"], ..Flags::default() };
        case.copy_as(&["*.txt"], "/g/", "", &flags).unwrap();
        assert!(case.has("g/b.txt") && !case.has("g/a.txt"));
    }

    #[test]
    fn parents_are_kept() {
        let case = Case::new();
        let flags = Flags { parents: true, ..Flags::default() };
        case.copy_as(&["d/sub/y", "a.txt"], "/p/", "", &flags).unwrap();
        assert!(case.has("p/d/sub/y") && case.has("p/a.txt") && !case.has("p/d/x"));
        case.copy_as(&["d/./sub"], "/q", "", &flags).unwrap();
        assert!(case.has("q/sub/y") && !case.has("q/d"), "the parents begin at the pivot");
        case.copy_as(&["**/y"], "/r/", "", &flags).unwrap();
        assert!(case.has("r/d/sub/y") && !case.has("r/d/x"));
        case.copy_as(&["d/**"], "/s/", "", &flags).unwrap();
        assert!(case.has("s/d/sub/y") && case.has("s/d/x"));
        assert!(case.copy_as(&["../secret"], "/t/", "", &flags).is_err());
        // Deep folders and many `**`: each folder is searched once for each of them.
        fs::create_dir_all(case.dir.path().join("context").join("a/".repeat(60))).unwrap();
        assert!(case.copy_as(&["**/a/".repeat(30).as_str()], "/v/", "", &flags).is_ok());
    }

    #[test]
    fn add_says_that_it_unpacks_no_archives_yet() {
        let case = Case::new();
        let flags = Flags { is_add: true, ..Flags::default() };
        fs::write(case.dir.path().join("context/x.tar"), [&[0; 257][..], b"ustar\0", &[0; 249]].concat())
            .unwrap();
        fs::write(case.dir.path().join("context/x.gz"), b"\x1f\x8b\x08\0").unwrap();
        for archive in ["x.tar", "x.gz"] {
            let error = case.copy_as(&[archive], "/u/", "", &flags).unwrap_err().to_string();
            assert!(error.contains("not supported yet"), "{error}");
        }
        case.copy_as(&["a.txt"], "/u/", "", &flags).unwrap();
        assert!(case.has("u/a.txt"));
    }

    #[test]
    fn the_digest_follows_contents_and_modes_not_times() {
        let case = Case::new();
        let before = case.copy(&["d"], "/1/").unwrap();
        let file = case.dir.path().join("context/d/x");
        fs::write(&file, "x").unwrap();
        assert_eq!(case.copy(&["d"], "/2/").unwrap(), before);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o700)).unwrap();
        let mode = case.copy(&["d"], "/3/").unwrap();
        assert_ne!(mode, before);
        fs::write(&file, "z").unwrap();
        assert_ne!(case.copy(&["d"], "/4/").unwrap(), mode);
    }
}
