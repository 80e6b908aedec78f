//! What is mounted around the command, where it cannot look: the disks, and the overlay that is its root.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::path::{Component, Path, PathBuf};

use envd_proto::build::{LOST_FOUND, Mount, Step, UPPER, What};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, mknodat, open, openat2};
use rustix::mount::{MountFlags, OpenTreeFlags, UnmountFlags, mount, open_tree, unmount};

use super::disks::mount_disk;
use super::named;
use crate::guest::volumes;

/// On the sandbox's own file system in memory.
const BASE: &str = "/run/build-step";

/// Renames and attributes stay in the upper directory itself, as `image-builder` has it for containers, so that both make
/// the same layers.
const OVERLAY: &str = "index=off,redirect_dir=off,metacopy=off,xino=off";

/// Mounted disks.
pub(super) struct Outside {
    base: PathBuf,
    /// What was mounted, the last one last.
    mounted: Vec<PathBuf>,
}

/// What the command is to see, open: its own root has no way to it.
pub(super) struct Inside {
    /// Where its root is.
    pub(super) root: PathBuf,
    /// For each mount of the step what it shows, where that is a tree: a mount that is nowhere yet.
    pub(super) sources: Vec<Option<OwnedFd>>,
}

impl Outside {
    /// Mounts the disks and the overlay.
    pub(super) fn mount(step: &Step) -> io::Result<(Self, Inside)> {
        let base = PathBuf::from(BASE);
        fs::create_dir_all(&base)?;
        mount("tmpfs", &base, "tmpfs", MountFlags::empty(), c"mode=700")
            .map_err(|error| named(BASE)(error.into()))?;
        let mut outside = Self { base: base.clone(), mounted: Vec::new() };
        let lowers = outside.lowers("image", &step.lowers)?;
        let top = lowers.first().cloned().ok_or_else(|| io::Error::other("the image has no disk"))?;
        let upper_disk = outside.upper_disk();
        mount_disk(&step.upper, &upper_disk, false)?;
        outside.mounted.push(upper_disk.clone());
        let mut sources = Vec::new();
        for (index, mount) in step.mounts.iter().enumerate() {
            let source = outside.source(index, mount);
            sources.push(source.map_err(named(format!("the mount {}", mount.target)))?);
        }
        let (upper, work) = (upper_disk.join(UPPER), upper_disk.join("work"));
        // On the disk, whose file system has every attribute that the image's has.
        let points = upper_disk.join("points");
        for folder in [&upper, &work, &points] {
            fs::create_dir(folder)?;
        }
        make_points(step, &sources, &lowers, &base.join("view"), &points)?;
        // The overlay's root is the upper directory's, which is to be the image's.
        for folder in [&points, &upper] {
            copy_directory(&top, folder)?;
        }
        let mut stack = vec![points];
        stack.extend(lowers);
        let root = base.join("root");
        overlay(&stack, Some((&upper, &work)), &root)?;
        outside.mounted.push(root.clone());
        Ok((outside, Inside { root, sources }))
    }

    /// Where the upper disk is.
    pub(super) fn upper_disk(&self) -> PathBuf {
        self.base.join("upper")
    }

    fn source(&mut self, index: usize, wanted: &Mount) -> io::Result<Option<OwnedFd>> {
        let name = format!("mount{index}");
        match &wanted.what {
            What::File { .. } | What::Tmpfs { .. } => Ok(None),
            What::Tree { lowers, hide_lost_found, path } => {
                let scratch = self.upper_disk().join(&name);
                let (upper, work, hidden) =
                    (scratch.join("upper"), scratch.join("work"), scratch.join("hidden"));
                for folder in [&upper, &work, &hidden] {
                    fs::create_dir_all(folder)?;
                }
                let mut shown = self.lowers(&name, lowers)?;
                let top = shown.first().ok_or_else(|| io::Error::other("it has no disk"))?;
                copy_directory(top, &upper)?;
                copy_directory(top, &hidden)?;
                if *hide_lost_found {
                    whiteout(&hidden.join(LOST_FOUND))?;
                }
                shown.insert(0, hidden);
                let at = self.base.join(format!("{name}-root"));
                overlay(&shown, (!wanted.read_only).then_some((&upper, &work)), &at)?;
                self.mounted.push(at.clone());
                let root = open(&at, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
                let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
                let path = if path.is_empty() { "." } else { path };
                openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
                    .and_then(detached)
                    .map(Some)
                    .map_err(|error| named(format!("its source {path}"))(error.into()))
            }
            What::Kept { serial, mode, uid, gid } => {
                let at = self.base.join(&name);
                mount_disk(serial, &at, false)?;
                self.mounted.push(at.clone());
                let kept = at.join(UPPER);
                if !kept.exists() {
                    DirBuilder::new().mode(0o700).create(&kept)?;
                    chown(&kept, Some(*uid), Some(*gid))?;
                    fs::set_permissions(&kept, fs::Permissions::from_mode(*mode))?;
                }
                Ok(Some(detached(open(&kept, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)?))
            }
        }
    }

    fn lowers(&mut self, name: &str, serials: &[String]) -> io::Result<Vec<PathBuf>> {
        let mut lowers = Vec::new();
        for (number, serial) in serials.iter().enumerate() {
            let at = self.base.join(format!("{name}-{number}"));
            mount_disk(serial, &at, true)?;
            self.mounted.push(at.clone());
            lowers.push(at);
        }
        Ok(lowers)
    }

    /// Unmounts all, so that the disks are whole. The command's namespaces are gone with their mounts: nothing is busy.
    pub(super) fn unmount(mut self) -> io::Result<()> {
        while let Some(at) = self.mounted.pop() {
            unmount(&at, UnmountFlags::empty())
                .map_err(|error| named(format!("unmounting {}", at.display()))(error.into()))?;
        }
        Ok(())
    }
}

/// A mount of what is open, which is nowhere yet: one that is somewhere belongs to this mount namespace, and the command has
/// another.
fn detached(open: OwnedFd) -> rustix::io::Result<OwnedFd> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    open_tree(open, "", flags)
}

/// An overlay of directories, the highest first.
fn overlay(lowers: &[PathBuf], upper: Option<(&PathBuf, &PathBuf)>, at: &Path) -> io::Result<()> {
    fs::create_dir_all(at)?;
    // None of the names has a colon or comma.
    let names: Vec<_> = lowers.iter().map(|lower| lower.display().to_string()).collect();
    let mut options = format!("{OVERLAY},lowerdir={}", names.join(":"));
    if let Some((upper, work)) = upper {
        // Volatile: syncs of single files do nothing, since the disk is synced as a whole.
        options.push_str(&format!(",upperdir={},workdir={},volatile", upper.display(), work.display()));
    }
    let options = std::ffi::CString::new(options).map_err(io::Error::other)?;
    mount("overlay", at, "overlay", MountFlags::empty(), options.as_c_str())
        .map_err(|error| named("the overlay of the step")(error.into()))
}

/// Mount points that the image does not have, with the directories on the way to them as they are in the image.
fn make_points(
    step: &Step,
    sources: &[Option<OwnedFd>],
    lowers: &[PathBuf],
    view: &Path,
    points: &Path,
) -> io::Result<()> {
    if step.hide_lost_found {
        whiteout(&points.join(LOST_FOUND))?;
    }
    overlay_view(lowers, view)?;
    let mut copied: Vec<(PathBuf, PathBuf)> = Vec::new();
    let own = ["/proc", "/dev", "/sys"].map(|path| (path, true));
    let mut wanted = Vec::new();
    for (mount, source) in step.mounts.iter().zip(sources) {
        let is_directory = match (source, &mount.what) {
            (Some(source), _) => is_directory(source)?,
            (None, What::File { .. }) => false,
            (None, _) => true,
        };
        wanted.push((mount.target.as_str(), is_directory));
    }
    for (target, is_directory) in own.into_iter().chain(wanted) {
        let relative = relative(target)?;
        // Below a file system of the kernel's the point is made there.
        if target != "/dev" && relative.starts_with("dev")
            || fs::symlink_metadata(view.join(&relative)).is_ok()
        {
            continue;
        }
        let mut reached = PathBuf::new();
        for name in relative.components() {
            reached.push(name);
            let (seen, point) = (view.join(&reached), points.join(&reached));
            if point.exists() {
                continue;
            }
            if !is_directory && reached == relative {
                fs::write(&point, "")?;
                break;
            }
            fs::create_dir(&point)?;
            fs::set_permissions(&point, fs::Permissions::from_mode(0o755))?;
            if seen.exists() {
                copied.push((seen, point));
            }
        }
    }
    // Their times change with what comes into them.
    for (seen, point) in copied {
        copy_directory(&seen, &point)?;
    }
    Ok(unmount(view, UnmountFlags::empty())?)
}

/// Says that what the layers below have there is gone.
fn whiteout(path: &Path) -> io::Result<()> {
    Ok(mknodat(CWD, path, FileType::CharacterDevice, Mode::empty(), 0)?)
}

/// Whether what is open is a directory.
pub(super) fn is_directory(open: &OwnedFd) -> io::Result<bool> {
    Ok(FileType::from_raw_mode(rustix::fs::fstat(open)?.st_mode) == FileType::Directory)
}

/// The image to look at: one directory as it is, more of them as an overlay.
fn overlay_view(lowers: &[PathBuf], at: &Path) -> io::Result<()> {
    if lowers.len() > 1 {
        return overlay(lowers, None, at);
    }
    fs::create_dir_all(at)?;
    Ok(mount(&lowers[0], at, "", MountFlags::BIND, None::<&std::ffi::CStr>)?)
}

/// An absolute path without tricks, as one below a folder.
pub(super) fn relative(path: &str) -> io::Result<PathBuf> {
    let relative = Path::new(path).strip_prefix("/").ok().filter(|relative| {
        relative.components().all(|component| matches!(component, Component::Normal(_)))
            && relative.components().next().is_some()
    });
    relative.map(Path::to_owned).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidInput, format!("{path:?} is no absolute path below /"))
    })
}

/// Owner, mode, extended attributes and times of a directory.
fn copy_directory(from: &Path, to: &Path) -> io::Result<()> {
    volumes::copy_attributes(from, to, &fs::symlink_metadata(from)?)
}
