//! `--e2b-user`: the user `user` that E2B's clients run as, in any image.
//!
//! It is written at the level of the tree: no program of the image runs, so it works for every distribution and where there
//! is no shell. What is there already stays, so a second time changes nothing.
//!
//! ```text
//! /etc/passwd, group, shadow   user:x:1000:1000::/home/user:SHELL   (shadow only where the image has it, without a password)
//! /etc/group                   also in sudo or wheel, whichever the image has
//! /home/user                   with what is in /etc/skel
//! /etc/sudoers.d/e2b-user      no password for sudo; and a line in /etc/sudoers where it does not read that folder
//! ```

use std::collections::BTreeSet;

use oci::layer::{Compression, LayerPath, LayerWriter, Metadata, Timestamp};
use oci::{Image, Layer, Store};
use serde_json::json;
use template::DataDir;

use crate::builder::write_image;
use crate::clock;
use crate::copy::{Contents, Inode, NewLayer};
use crate::error::Error;
use crate::tree::{Entry, EntryKind, Escape, Last, Tree, resolve};
use crate::users::read_database;
use crate::vm;

const NAME: &str = "user";
const HOME: &str = "home/user";
/// E2B's own number for it, and the first of the ordinary users everywhere.
const FIRST_ID: u32 = 1000;
/// Numbers above belong to nobody in most distributions.
const LAST_ID: u32 = 60_000;
/// The first of these that the image has is its shell. E2B's is bash.
const SHELLS: [&str; 6] = ["/bin/bash", "/usr/bin/bash", "/bin/sh", "/usr/bin/sh", "/bin/ash", "/busybox/sh"];
/// The shell where the image has none.
const NO_SHELL: &str = "/sbin/nologin";
/// The groups whose members may do what root may, by the distributions' names for them.
const ADMIN_GROUPS: [&str; 2] = ["sudo", "wheel"];
const SUDOERS: &str = "etc/sudoers.d/e2b-user";
const SUDOERS_LINE: &str = "user ALL=(ALL:ALL) NOPASSWD: ALL\n";
/// The most files of a skeleton: distributions have three to ten.
const MAX_SKELETON: usize = 1000;

/// Adds the user, and says whether anything had to change.
pub(crate) fn add(lower: &dyn Tree, now: Timestamp, writer: &mut LayerWriter) -> Result<bool, Error> {
    let mut change = Change { lower, now, new: NewLayer::new(lower, now), skeleton: 0 };
    let (uid, gid, home) = change.user()?;
    change.admin_group()?;
    change.home(&home, uid, gid)?;
    change.sudoers()?;
    change.new.write(None, writer)?;
    Ok(!change.new.is_empty())
}

/// The image with the user, in the store and without a name; the image itself where it has the user.
pub(crate) fn image_with_user(data: &DataDir, store: &Store, image: Image) -> Result<Image, Error> {
    let tree = vm::tree_of(data, &image.layers)?;
    let now = clock::now()?;
    let mut writer = LayerWriter::new(store, Compression::Zstd)?;
    if !add(&*tree, now, &mut writer)? {
        return Ok(image);
    }
    let written = writer.finish()?;
    let mut config = image.config_json;
    let entry = json!({"created": clock::rfc3339(now), "created_by": "image-builder --e2b-user"});
    for (list, item) in [("/rootfs/diff_ids", json!(written.diff_id)), ("/history", entry)] {
        // An image that was read has the first; a history is as its maker likes.
        if let Some(list) = config.pointer_mut(list).and_then(|list| list.as_array_mut()) {
            list.push(item);
        }
    }
    let mut layers = image.layers;
    layers.push(Layer::new(store, written.descriptor, written.diff_id)?);
    Ok(Image::open(store, &write_image(store, &layers, &config)?)?)
}

struct Change<'a> {
    lower: &'a dyn Tree,
    now: Timestamp,
    new: NewLayer<'a>,
    skeleton: usize,
}

impl Change<'_> {
    /// The user's number, its group's, and its home.
    fn user(&mut self) -> Result<(u32, u32, LayerPath), Error> {
        let passwd = self.read("/etc/passwd")?;
        let groups = self.read("/etc/group")?;
        if let Some(fields) = line_of(&passwd, NAME) {
            let number = |index: usize| fields.get(index).and_then(|field| field.parse().ok());
            if let (Some(uid), Some(gid)) = (number(2), number(3)) {
                let home = fields.get(5).filter(|home| home.starts_with('/')).map_or(HOME, String::as_str);
                return Ok((uid, gid, resolve(self.lower, home.as_bytes(), Last::Follow, Escape::Clamp)?));
            }
            return Err(Error::Source {
                what: "/etc/passwd of the image".to_owned(),
                reason: format!("the line of {NAME:?} has no numbers"),
            });
        }
        let numbers = |text: &[u8], index: usize| -> BTreeSet<u32> {
            let lines = text.split(|byte| *byte == b'\n').map(fields);
            lines.filter_map(|fields| fields.get(index)?.parse().ok()).collect()
        };
        let taken = &numbers(&passwd, 2) | &numbers(&groups, 2);
        let free = (FIRST_ID..LAST_ID).find(|id| !taken.contains(id)).ok_or_else(|| Error::Source {
            what: "/etc/passwd of the image".to_owned(),
            reason: format!("no number from {FIRST_ID} to {LAST_ID} is free"),
        })?;
        let own_group = line_of(&groups, NAME).and_then(|fields| fields.get(2)?.parse().ok());
        let gid = own_group.unwrap_or(free);
        let shell = self.shell()?;
        // Sudo asks for root by its number.
        let root = format!("root:x:0:0:root:/root:{shell}\n");
        let root = if passwd.is_empty() { root } else { String::new() };
        self.append(
            "/etc/passwd",
            &passwd,
            &format!("{root}{NAME}:x:{free}:{gid}::/{HOME}:{shell}\n"),
            0o644,
        )?;
        if own_group.is_none() {
            let root = if groups.is_empty() { "root:x:0:\n" } else { "" };
            self.append("/etc/group", &groups, &format!("{root}{NAME}:x:{gid}:\n"), 0o644)?;
        }
        let shadow = self.read("/etc/shadow")?;
        if !shadow.is_empty() && line_of(&shadow, NAME).is_none() {
            self.append("/etc/shadow", &shadow, &format!("{NAME}:*:19000:0:99999:7:::\n"), 0o640)?;
        }
        Ok((free, gid, resolve(self.lower, HOME.as_bytes(), Last::Follow, Escape::Clamp)?))
    }

    fn shell(&self) -> Result<&'static str, Error> {
        for shell in SHELLS {
            let real = resolve(self.lower, shell.as_bytes(), Last::Follow, Escape::Clamp)?;
            if self
                .lower
                .entry(&real)?
                .is_some_and(|entry| entry.is_file() && entry.metadata.mode & 0o111 != 0)
            {
                return Ok(shell);
            }
        }
        Ok(NO_SHELL)
    }

    /// Puts the user into the group whose members may use sudo, where there is one.
    fn admin_group(&mut self) -> Result<(), Error> {
        let groups = self.current("/etc/group")?;
        let Some(group) = ADMIN_GROUPS.into_iter().find(|group| line_of(&groups, group).is_some()) else {
            return Ok(());
        };
        let mut changed = false;
        let lines = groups.split_inclusive(|byte| *byte == b'\n').map(|line| {
            let text = line.strip_suffix(b"\n").unwrap_or(line);
            let fields = fields(text);
            let members: Vec<&str> = fields.get(3).map(|text| text.split(',').collect()).unwrap_or_default();
            if fields.first().map(String::as_str) != Some(group)
                || fields.len() < 4
                || members.contains(&NAME)
            {
                return line.to_vec();
            }
            changed = true;
            let comma = if members.iter().all(|member| member.is_empty()) { "" } else { "," };
            [text, comma.as_bytes(), NAME.as_bytes(), b"\n"].concat()
        });
        let text = lines.collect::<Vec<_>>().concat();
        if changed { self.put("/etc/group", text, 0o644) } else { Ok(()) }
    }

    fn home(&mut self, home: &LayerPath, uid: u32, gid: u32) -> Result<(), Error> {
        if home.is_root() || self.lower.entry(home)?.is_some() {
            return Ok(());
        }
        if let Some((parent, _)) = home.split() {
            self.new.directories(&parent, (0, 0))?;
        }
        let metadata = Metadata { mode: 0o755, uid, gid, mtime: self.now, ..Metadata::default() };
        self.new.put(home.clone(), Inode { metadata, contents: Contents::Directory })?;
        let skeleton = resolve(self.lower, b"/etc/skel", Last::Follow, Escape::Clamp)?;
        match self.lower.entry(&skeleton)? {
            Some(entry) if entry.is_directory() => self.copy(&skeleton, home, uid, gid),
            _ => Ok(()),
        }
    }

    fn copy(&mut self, from: &LayerPath, to: &LayerPath, uid: u32, gid: u32) -> Result<(), Error> {
        for name in self.lower.names(from)? {
            self.skeleton += 1;
            if self.skeleton > MAX_SKELETON {
                return Err(Error::Source {
                    what: "/etc/skel of the image".to_owned(),
                    reason: format!("it has more than {MAX_SKELETON} files"),
                });
            }
            let (source, target) = (from.join(&name)?, to.join(&name)?);
            let Some(Entry { kind, metadata }) = self.lower.entry(&source)? else { continue };
            let contents = match kind {
                EntryKind::Directory => Contents::Directory,
                EntryKind::File { size } => Contents::Lower(source.clone(), size),
                EntryKind::Symlink => Contents::Symlink(self.lower.read_link(&source)?),
                _ => continue,
            };
            let metadata = Metadata { uid, gid, ..metadata };
            self.new.put(target.clone(), Inode { metadata, contents })?;
            if kind == EntryKind::Directory {
                self.copy(&source, &target, uid, gid)?;
            }
        }
        Ok(())
    }

    fn sudoers(&mut self) -> Result<(), Error> {
        if self.read(SUDOERS)? != SUDOERS_LINE.as_bytes() {
            self.put(SUDOERS, SUDOERS_LINE.as_bytes().to_vec(), 0o440)?;
        }
        let main = self.read("/etc/sudoers")?;
        let text = String::from_utf8_lossy(&main).into_owned();
        let mut words = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let includes = |words: &[&str]| matches!(words, ["@includedir" | "#includedir", folder] if folder.trim_end_matches('/') == "/etc/sudoers.d");
        if !main.is_empty() && !words.any(|words| includes(&words)) {
            // Sudo before 1.9.1 knows only this way to write it.
            self.append("/etc/sudoers", &main, "#includedir /etc/sudoers.d\n", 0o440)?;
        }
        Ok(())
    }

    fn read(&self, path: &str) -> Result<Vec<u8>, Error> {
        read_database(self.lower, path)
    }

    /// The file as it will be.
    fn current(&self, path: &str) -> Result<Vec<u8>, Error> {
        let real = resolve(self.lower, path.as_bytes(), Last::Follow, Escape::Clamp)?;
        match self.new.bytes(&real) {
            Some(bytes) => Ok(bytes.to_vec()),
            None => self.read(path),
        }
    }

    /// Adds a line; `mode` is for a file that is not there yet.
    fn append(&mut self, path: &str, text: &[u8], line: &str, mode: u32) -> Result<(), Error> {
        let end: &[u8] = if text.is_empty() || text.ends_with(b"\n") { b"" } else { b"\n" };
        self.put(path, [text, end, line.as_bytes()].concat(), mode)
    }

    fn put(&mut self, path: &str, text: Vec<u8>, mode: u32) -> Result<(), Error> {
        let real = resolve(self.lower, path.as_bytes(), Last::Follow, Escape::Clamp)?;
        if let Some((parent, _)) = real.split() {
            self.new.directories(&parent, (0, 0))?;
        }
        let there = self.lower.entry(&real)?.filter(Entry::is_file).map(|entry| entry.metadata);
        let fresh = Metadata { mode, ..Metadata::default() };
        let metadata = Metadata { mtime: self.now, ..there.unwrap_or(fresh) };
        self.new.put(real, Inode { metadata, contents: Contents::Bytes(text) })
    }
}

/// The fields of the line that begins with that name.
fn line_of(text: &[u8], name: &str) -> Option<Vec<String>> {
    text.split(|byte| *byte == b'\n')
        .map(fields)
        .find(|fields| fields.first().is_some_and(|first| first == name))
}

fn fields(line: &[u8]) -> Vec<String> {
    String::from_utf8_lossy(line).split(':').map(str::to_owned).collect()
}
