//! `oci-archive`: a tar file of an OCI image layout.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;

use oci_spec::image::{Descriptor, MediaType};
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

use crate::error::at;
use crate::layer::{Change, Kind, LayerReader};
use crate::store::copy_image;
use crate::{Error, Store};

/// The longest `index.json` and `oci-layout` of an archive.
const MAX_SMALL_FILE: u64 = 16 << 20;

/// The most files of an archive: the chunks of the largest template, several times over.
const MAX_FILES: usize = 100_000;

/// An archive that was unpacked into a temporary layout, which goes when this is dropped.
pub struct Archive {
    store: Store,
    _folder: tempfile::TempDir,
}

impl Archive {
    /// Unpacks the archive into a temporary folder under `scratch`. Only what a layout holds is taken, and each blob's
    /// bytes must be those that its name promises.
    pub fn open(file: &Path, scratch: &Path) -> Result<Self, Error> {
        let what = format!("oci-archive {}", file.display());
        let mut input = BufReader::with_capacity(256 << 10, File::open(file).map_err(at(file))?);
        let folder = tempfile::tempdir_in(scratch).map_err(at(scratch))?;
        let store = Store::temporary(folder.path())?;
        let start = io::BufRead::fill_buf(&mut input).map_err(at(file))?;
        if start.starts_with(&[0x1f, 0x8b]) || start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
            return Err(Error::unsupported(what, "the tar file is compressed; decompress it first"));
        }
        let mut reader = LayerReader::new(input);
        let (mut layout, mut docker, mut files) = (false, false, 0);
        loop {
            let change =
                reader.next_change().map_err(|error| Error::corrupt(what.clone(), error.to_string()))?;
            let Some(change) = change else { break };
            let Change::Node(node) = change else { continue };
            if matches!(node.kind, Kind::Sparse { .. }) {
                return Err(Error::unsupported(
                    format!("{what}: sparse file {}", node.path),
                    "write the archive without --sparse",
                ));
            }
            let Kind::File { size, .. } = node.kind else { continue };
            files += 1;
            if files > MAX_FILES {
                return Err(Error::corrupt(what, format!("it has more than {MAX_FILES} files")));
            }
            let name = node.path.as_bytes();
            if name == b"index.json" || name == b"oci-layout" {
                if size > MAX_SMALL_FILE {
                    return Err(Error::corrupt(
                        what,
                        format!("{} has {size} bytes, at most {MAX_SMALL_FILE} expected", node.path),
                    ));
                }
                let mut contents = Vec::new();
                reader.read_to_end(&mut contents).map_err(|error| Error::reading(&what, error))?;
                let target = folder.path().join(node.path.as_path());
                fs::write(&target, contents).map_err(at(&target))?;
                layout |= name == b"oci-layout";
            } else if let Some(hex) = name.strip_prefix(b"blobs/sha256/") {
                let blob = store.put_blob(MediaType::Other(String::new()), &mut reader)?;
                if blob.digest().digest().as_bytes() != hex {
                    return Err(Error::corrupt(
                        what,
                        format!("{} has the digest {}; the archive is damaged", node.path, blob.digest()),
                    ));
                }
            } else if name == b"manifest.json" {
                docker = true;
            }
        }
        if !layout {
            let hint = if docker { "; this is a docker-archive: name it docker-archive:FILE" } else { "" };
            return Err(Error::Invalid {
                what,
                reason: format!("no OCI image layout: oci-layout is missing{hint}"),
            });
        }
        Ok(Self { store, _folder: folder })
    }

    /// A layout that somebody filled, which goes with its folder.
    pub(crate) fn filled(store: Store, folder: tempfile::TempDir) -> Self {
        Self { store, _folder: folder }
    }

    /// The layout `layout`, which goes with `folder`.
    pub(crate) fn in_folder(layout: &Path, folder: tempfile::TempDir) -> Result<Self, Error> {
        Ok(Self { store: Store::open(layout)?, _folder: folder })
    }

    /// The layout that was in the archive.
    pub fn store(&self) -> &Store {
        &self.store
    }
}

/// Writes one image as an archive, under a temporary name that is renamed at the end.
pub fn write_archive(
    store: &Store,
    descriptor: &Descriptor,
    tag: Option<&str>,
    file: &Path,
) -> Result<(), Error> {
    // The layout is made first, so that only this image's blobs and tags are in it.
    let folder = store.scratch()?;
    let layout = Store::temporary(folder.path())?;
    let copied = copy_image(store, descriptor, &layout)?;
    layout.tag(tag.unwrap_or("latest"), &copied)?;

    replace(file, |output| write_tar(folder.path(), output))
}

/// Writes a file that appears in its place when it is whole and on disk. Until then it has no name, so that nothing is left
/// however this ends; where the file system cannot do that, it has a temporary one.
pub(crate) fn replace(
    file: &Path,
    write: impl FnOnce(BufWriter<&mut File>) -> io::Result<()>,
) -> Result<(), Error> {
    let parent = match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let named = || tempfile::Builder::new().prefix(".new-").tempfile_in(parent);
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let (mut output, name) = match rustix::fs::open(parent, flags, Mode::from_raw_mode(0o644)) {
        Ok(unnamed) => (File::from(unnamed), None),
        Err(Errno::OPNOTSUPP | Errno::ISDIR) => {
            let (output, name) = named().map_err(at(file))?.into_parts();
            (output, Some(name))
        }
        Err(error) => return Err(at(file)(error.into())),
    };
    write(BufWriter::with_capacity(256 << 10, &mut output)).map_err(at(file))?;
    use std::os::unix::fs::PermissionsExt;
    output.set_permissions(fs::Permissions::from_mode(0o644)).map_err(at(file))?;
    output.sync_all().map_err(at(file))?;
    let name = match name {
        Some(name) => name,
        None => {
            // A name that nobody has, for the moment before the last one: a link replaces nothing, a rename does.
            let name = named().map_err(at(file))?.into_temp_path();
            fs::remove_file(&name).map_err(at(file))?;
            let unnamed = format!("/proc/self/fd/{}", output.as_raw_fd());
            let linked = rustix::fs::linkat(CWD, unnamed.as_str(), CWD, &*name, AtFlags::SYMLINK_FOLLOW);
            linked.map_err(|error| at(file)(error.into()))?;
            name
        }
    };
    name.persist(file).map_err(|error| at(file)(error.error))?;
    File::open(parent).and_then(|parent| parent.sync_all()).map_err(at(parent))
}

fn write_tar(folder: &Path, out: impl Write) -> io::Result<()> {
    let mut names = vec!["oci-layout".to_owned(), "index.json".to_owned()];
    let mut blobs = Vec::new();
    for entry in fs::read_dir(folder.join("blobs/sha256"))? {
        blobs.push(format!("blobs/sha256/{}", entry?.file_name().to_string_lossy()));
    }
    blobs.sort();
    names.append(&mut blobs);
    let mut builder = tar::Builder::new(out);
    for name in names {
        let file = File::open(folder.join(&name))?;
        append(&mut builder, &name, file.metadata()?.len(), file)?;
    }
    builder.into_inner()?.flush()
}

/// Adds a file of that length.
pub(crate) fn append(
    builder: &mut tar::Builder<impl Write>,
    name: &str,
    size: u64,
    contents: impl Read,
) -> io::Result<()> {
    // Not POSIX's old form, which ends at 8 GiB.
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(size);
    builder.append_data(&mut header, name, contents)
}

/// Writes a layout that holds one manifest and `blobs`, as an archive. Each blob is opened when its turn comes, and must have
/// the length that its descriptor says.
pub fn write_layout_archive<'a, R: Read>(
    file: &Path,
    manifest: &Descriptor,
    tag: &str,
    blobs: impl Iterator<Item = &'a Descriptor>,
    mut open: impl FnMut(&Descriptor) -> io::Result<R>,
) -> Result<(), Error> {
    let index = crate::store::index_of(manifest, tag).map_err(|error| at(file)(error.into()))?;
    replace(file, |output| {
        let mut builder = tar::Builder::new(output);
        let layout = crate::store::LAYOUT.as_bytes();
        append(&mut builder, "oci-layout", layout.len() as u64, layout)?;
        append(&mut builder, "index.json", index.len() as u64, &index[..])?;
        for blob in blobs {
            let name = format!("blobs/sha256/{}", blob.digest().digest());
            let mut contents = open(blob)?.take(blob.size());
            append(&mut builder, &name, blob.size(), &mut contents)?;
            if contents.limit() > 0 {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    format!("blob {} is too short", blob.digest()),
                ));
            }
        }
        builder.into_inner()?.flush()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_no_name_until_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("archive.tar");
        let names = || fs::read_dir(dir.path()).unwrap().count();
        for contents in ["first", "second"] {
            let before = names();
            replace(&file, |mut output| {
                assert_eq!(names(), before, "a writer that is killed here leaves something");
                output.write_all(contents.as_bytes())?;
                output.flush()
            })
            .unwrap();
            assert_eq!((fs::read_to_string(&file).unwrap().as_str(), names()), (contents, 1));
        }
        let failed = replace(&file, |_| Err(io::Error::other("no"))).unwrap_err().to_string();
        assert!(failed.contains("archive.tar"), "{failed}");
        assert_eq!((fs::read_to_string(&file).unwrap().as_str(), names()), ("second", 1));
    }
}
