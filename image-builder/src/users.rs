//! Users and groups of an image, from its own `/etc/passwd` and `/etc/group`.

use std::io::Read;

use crate::error::{Error, at};
use crate::tree::{Escape, Last, Tree, resolve};

/// The longest user database that is read.
const MAX_DATABASE: u64 = 16 << 20;
/// Linux's `NGROUPS_MAX`.
const MAX_GROUPS: usize = 65_536;

/// Who runs a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Supplementary groups.
    pub(crate) groups: Vec<u32>,
    pub(crate) home: String,
}

struct Passwd {
    name: String,
    uid: u32,
    gid: u32,
    home: String,
}

struct Group {
    name: String,
    gid: u32,
    members: Vec<String>,
}

/// `USER`: `name`, `uid`, `name:group`, `uid:gid`; empty is root. As with Docker, the user's own groups count only when no
/// group is named.
pub(crate) fn user(root: &dyn Tree, text: &str) -> Result<User, Error> {
    let (name, group) = split(text);
    let name = if name.is_empty() { "0" } else { name };
    let passwd = passwd(root)?;
    let groups = groups(root)?;
    let known = passwd
        .iter()
        .find(|entry| entry.name == name)
        .or_else(|| passwd.iter().find(|entry| Some(entry.uid) == name.parse().ok()));
    let uid = match known {
        Some(entry) => entry.uid,
        None => number(name).or_else(|| root_id(name)).ok_or_else(|| unknown("user", name, "/etc/passwd"))?,
    };
    let home = known.map(|entry| entry.home.clone()).filter(|home| !home.is_empty());
    let home = home.unwrap_or_else(|| "/".to_owned());
    if let Some(group) = group {
        return Ok(User { uid, gid: group_id(&groups, group)?, groups: Vec::new(), home });
    }
    let gid = known.map_or(0, |entry| entry.gid);
    let member =
        |group: &&Group| known.is_some_and(|user| group.gid != gid && group.members.contains(&user.name));
    let supplementary = groups.iter().filter(member).map(|group| group.gid).take(MAX_GROUPS).collect();
    Ok(User { uid, gid, groups: supplementary, home })
}

/// `--chown`: a name has its own group, a number the group of that number, unless one is named.
pub(crate) fn owner(root: &dyn Tree, text: &str) -> Result<(u32, u32), Error> {
    let (name, group) = split(text);
    let name = if name.is_empty() { "0" } else { name };
    let (uid, own) = match number(name) {
        Some(uid) => (uid, uid),
        None => {
            let known = passwd(root)?.into_iter().find(|entry| entry.name == name);
            let known =
                known.map(|known| (known.uid, known.gid)).or_else(|| root_id(name).map(|id| (id, id)));
            known.ok_or_else(|| unknown("user", name, "/etc/passwd"))?
        }
    };
    let gid = match group {
        Some(group) => group_id(&groups(root)?, group)?,
        None => own,
    };
    Ok((uid, gid))
}

fn split(text: &str) -> (&str, Option<&str>) {
    match text.split_once(':') {
        Some((name, group)) if !group.is_empty() => (name, Some(group)),
        Some((name, _)) => (name, None),
        None => (text, None),
    }
}

fn group_id(groups: &[Group], name: &str) -> Result<u32, Error> {
    let known = groups.iter().find(|group| group.name == name).map(|group| group.gid);
    known
        .or_else(|| number(name))
        .or_else(|| root_id(name))
        .ok_or_else(|| unknown("group", name, "/etc/group"))
}

/// Root needs no line in a file: images from scratch have none.
fn root_id(name: &str) -> Option<u32> {
    (name == "root").then_some(0)
}

fn number(text: &str) -> Option<u32> {
    // The last number means "no change" to the kernel.
    text.parse().ok().filter(|number| *number != u32::MAX)
}

fn unknown(kind: &str, name: &str, file: &str) -> Error {
    Error::Source {
        what: format!("{kind} {name:?}"),
        reason: format!("{file} of the image has no such {kind}"),
    }
}

fn passwd(root: &dyn Tree) -> Result<Vec<Passwd>, Error> {
    let parse = |line: &str| {
        let mut fields = line.split(':');
        let name = fields.next()?.to_owned();
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1).unwrap_or_default().to_owned();
        Some(Passwd { name, uid, gid, home })
    };
    Ok(database(root, "/etc/passwd")?.lines().filter_map(parse).collect())
}

fn groups(root: &dyn Tree) -> Result<Vec<Group>, Error> {
    let parse = |line: &str| {
        let mut fields = line.split(':');
        let name = fields.next()?.to_owned();
        let gid = fields.nth(1)?.parse().ok()?;
        let members =
            fields.next().unwrap_or_default().split(',').map(|name| name.trim().to_owned()).collect();
        Some(Group { name, gid, members })
    };
    Ok(database(root, "/etc/group")?.lines().filter_map(parse).collect())
}

/// The file's text; nothing where there is none.
fn database(root: &dyn Tree, path: &str) -> Result<String, Error> {
    Ok(String::from_utf8_lossy(&read_database(root, path)?).into_owned())
}

/// The file's bytes; nothing where there is none.
pub(crate) fn read_database(root: &dyn Tree, path: &str) -> Result<Vec<u8>, Error> {
    let real = resolve(root, path.as_bytes(), Last::Follow, Escape::Clamp)?;
    if !root.entry(&real)?.is_some_and(|entry| entry.is_file()) {
        return Ok(Vec::new());
    }
    let mut text = Vec::new();
    let shown = root.shown(&real);
    root.open(&real)?.take(MAX_DATABASE).read_to_end(&mut text).map_err(at(&shown))?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rooted::Rooted;
    use std::fs;

    #[test]
    fn names_and_numbers_are_looked_up_in_the_image() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        let passwd = "root:x:0:0::/root:/bin/sh\nbroken\napp:x:1000:100:App:/home/app:/bin/sh\n";
        fs::write(dir.path().join("etc/passwd"), passwd).unwrap();
        fs::write(dir.path().join("etc/group"), "staff:x:50:app,other\nusers:x:100:app\nw:x:7:\n").unwrap();
        let root = Rooted::open(dir.path()).unwrap();
        let made = |uid, gid, groups: &[u32], home: &str| User {
            uid,
            gid,
            groups: groups.into(),
            home: home.into(),
        };
        for (text, expected) in [
            ("", made(0, 0, &[], "/root")),
            ("app", made(1000, 100, &[50], "/home/app")),
            ("1000", made(1000, 100, &[50], "/home/app")),
            ("app:w", made(1000, 7, &[], "/home/app")),
            ("app:9", made(1000, 9, &[], "/home/app")),
            ("77", made(77, 0, &[], "/")),
            ("77:staff", made(77, 50, &[], "/")),
        ] {
            assert_eq!(user(&root, text).unwrap(), expected, "{text:?}");
        }
        assert_eq!(owner(&root, "app").unwrap(), (1000, 100));
        assert_eq!(owner(&root, "1000").unwrap(), (1000, 1000));
        assert_eq!(owner(&root, "app:w").unwrap(), (1000, 7));
        for bad in ["nobody", "app:nogroup", "4294967295", "-1"] {
            assert!(matches!(user(&root, bad), Err(Error::Source { .. })), "{bad}");
        }
    }
}
