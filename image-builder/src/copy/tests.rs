//! Copies from folders, written as layers and unpacked.

use super::*;
use crate::plan::CopyFrom;
use crate::rooted::Rooted;
use dockerfile::Chmod;
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
            link: false,
            unpack: if options.is_add { Unpack::Local } else { Unpack::Never },
        };
        let interrupt = crate::interrupt::Interrupt::default();
        let fetcher = Arc::new(Fetcher::new(&self.dir.path().join("urls"), &interrupt).unwrap());
        let selection = Selection::find(&action, Some(&tree), &fetcher)?;
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
    let error = |source: &str, ignore: &str| case.copy_with(&[source], "/x", ignore).unwrap_err().to_string();
    assert!(error("nope", "").contains("no such file in the context"));
    case.copy(&["*.zip"], "/none/").unwrap();
    assert!(!case.has("none"), "a pattern may fit nothing");
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
    let mode = |path: &str| fs::metadata(case.dir.path().join("root").join(path)).unwrap().mode() & 0o7777;
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

/// A folder with that many files.
struct Many(usize);

impl Tree for Many {
    fn entry(&self, path: &LayerPath) -> Result<Option<tree::Entry>, Error> {
        let kind = if path.is_root() { EntryKind::Directory } else { EntryKind::File { size: 0 } };
        Ok(Some(tree::Entry { kind, metadata: Metadata::default() }))
    }

    fn read_link(&self, _path: &LayerPath) -> Result<Vec<u8>, Error> {
        Ok(Vec::new())
    }

    fn names(&self, _path: &LayerPath) -> Result<Vec<Vec<u8>>, Error> {
        Ok((0..self.0).map(|number| number.to_string().into_bytes()).collect())
    }

    fn open(&self, _path: &LayerPath) -> Result<Box<dyn std::io::Read + '_>, Error> {
        Ok(Box::new(std::io::empty()))
    }

    fn xattrs(&self, _path: &LayerPath) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, Error> {
        Ok(BTreeMap::new())
    }

    fn identity(&self, _: &LayerPath) -> Result<Option<(u64, u64)>, Error> {
        Ok(None)
    }

    fn shown(&self, path: &LayerPath) -> std::path::PathBuf {
        path.as_path().to_owned()
    }
}

#[test]
fn a_context_of_more_than_a_million_files_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let fetcher = Arc::new(Fetcher::new(dir.path(), &crate::interrupt::Interrupt::default()).unwrap());
    let find = |files: usize, source: &str| {
        let root = Many(files);
        let tree = SourceTree { root: &root, ignore: None, is_context: true, shown: "the context".into() };
        let sources = vec![CopySource::Path(source.to_owned())];
        let action = CopyAction { sources, parents: false, ..CopyAction::whole("") };
        Selection::find(&action, Some(&tree), &fetcher).map(|selection| selection.entries.len())
    };
    // The folder itself counts.
    assert_eq!(find(MAX_FILES - 1, ".").unwrap(), MAX_FILES);
    for source in [".", "*"] {
        let error = find(MAX_FILES + 1, source).unwrap_err().to_string();
        assert!(error.contains("more than 1000000"), "{error}");
    }
}
