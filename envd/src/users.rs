//! Users and groups from the sandbox's own /etc/passwd and /etc/group.
//!
//! A static binary has no NSS, and the answer must be the container's, not the guest's. The files belong to the tenant:
//! they are read with a bound, and a line that makes no sense is passed over.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::OnceLock;

use envd_sys::Credentials;

use crate::root::Root;

/// Larger files are cut: a host that defines more users than this has them elsewhere than in /etc/passwd.
const MAX_FILE: usize = 4 << 20;

/// Groups that one process can have (`NGROUPS_MAX`).
const MAX_GROUPS: usize = 65536;

/// A user of the sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// The login name, or the number where the files know none.
    pub name: String,
    /// Ids of the user and its groups.
    pub credentials: Credentials,
    /// The home directory; `/` where the files know none.
    pub home: String,
}

/// The two files at one moment.
#[derive(Clone, Debug, Default)]
pub struct UserDatabase {
    passwd: String,
    group: String,
    /// Made at the first question: a listing asks once for each of its entries.
    names: OnceLock<Names>,
}

/// Names by id.
#[derive(Clone, Debug, Default)]
struct Names {
    users: HashMap<u32, String>,
    groups: HashMap<u32, String>,
}

impl UserDatabase {
    /// The two files' contents; public for the fuzz targets.
    pub fn new(passwd: String, group: String) -> Self {
        Self { passwd, group, names: OnceLock::new() }
    }

    /// Reads the sandbox's files.
    pub async fn read(root: &Root) -> io::Result<Self> {
        root.run(Self::load).await
    }

    /// Reads the files on a thread of the sandbox's root. A missing one is empty: an image from scratch has neither.
    pub(crate) fn load() -> io::Result<Self> {
        let read = |path| match crate::filesystem::read_bounded(path, MAX_FILE) {
            Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            Err(error) => Err(error),
        };
        Ok(Self::new(read("/etc/passwd")?, read("/etc/group")?))
    }

    /// The user that `USER` of an image or a client names: `name`, `uid`, `name:group` or `uid:gid`; empty is root.
    pub fn find(&self, text: &str) -> Option<User> {
        let (name, group) = match text.split_once(':') {
            Some((name, group)) => (name, Some(group)),
            None => (text, None),
        };
        let name = if name.is_empty() { "root" } else { name };
        let number = name.parse::<u32>().ok();
        let entry = self.passwd_entries().find(|entry| entry.name == name || number == Some(entry.uid));
        let mut user = match (entry, number) {
            (Some(entry), _) => User {
                name: entry.name.to_owned(),
                credentials: Credentials { uid: entry.uid, gid: entry.gid, groups: self.groups_of(&entry) },
                // A relative one would make every path depend on where the agent stands.
                home: if entry.home.starts_with('/') { entry.home.to_owned() } else { "/".into() },
            },
            // Docker's rule: a number needs no entry, and its group is then root's.
            (None, Some(uid)) => numeric(uid),
            (None, None) if name == "root" => numeric(0),
            (None, None) => return None,
        };
        if let Some(group) = group {
            user.credentials.gid = self.group_id(group)?;
            user.credentials.groups = vec![user.credentials.gid];
        }
        Some(user)
    }

    /// The name of a user id, or the id as text.
    pub fn user_name(&self, uid: u32) -> String {
        self.names().users.get(&uid).cloned().unwrap_or_else(|| uid.to_string())
    }

    /// The name of a group id, or the id as text.
    pub fn group_name(&self, gid: u32) -> String {
        self.names().groups.get(&gid).cloned().unwrap_or_else(|| gid.to_string())
    }

    fn names(&self) -> &Names {
        self.names.get_or_init(|| {
            let mut names = Names::default();
            // The first line of an id counts.
            for entry in self.passwd_entries() {
                names.users.entry(entry.uid).or_insert_with(|| entry.name.to_owned());
            }
            for entry in self.group_entries() {
                names.groups.entry(entry.gid).or_insert_with(|| entry.name.to_owned());
            }
            names
        })
    }

    fn group_id(&self, text: &str) -> Option<u32> {
        self.group_entries()
            .find(|entry| entry.name == text)
            .map(|entry| entry.gid)
            .or_else(|| text.parse().ok())
    }

    fn groups_of(&self, user: &PasswdEntry<'_>) -> Vec<u32> {
        let mut groups = vec![user.gid];
        let mut known = HashSet::from([user.gid]);
        for entry in self.group_entries() {
            let member = entry.members.split(',').any(|member| member == user.name);
            if member && groups.len() < MAX_GROUPS && known.insert(entry.gid) {
                groups.push(entry.gid);
            }
        }
        groups
    }

    fn passwd_entries(&self) -> impl Iterator<Item = PasswdEntry<'_>> {
        self.passwd.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let (name, _password) = (fields.next()?, fields.next()?);
            let (uid, gid) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
            let (_comment, home) = (fields.next()?, fields.next()?);
            Some(PasswdEntry { name, uid, gid, home })
        })
    }

    fn group_entries(&self) -> impl Iterator<Item = GroupEntry<'_>> {
        self.group.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let (name, _password) = (fields.next()?, fields.next()?);
            let gid = fields.next()?.parse().ok()?;
            Some(GroupEntry { name, gid, members: fields.next().unwrap_or("") })
        })
    }
}

struct PasswdEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

struct GroupEntry<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

fn numeric(uid: u32) -> User {
    let home = if uid == 0 { "/root" } else { "/" };
    let name = if uid == 0 { "root".to_owned() } else { uid.to_string() };
    User { name, credentials: Credentials { uid, gid: 0, groups: vec![0] }, home: home.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn database() -> UserDatabase {
        UserDatabase {
            passwd: "root:x:0:0:root:/root:/bin/bash\nbroken line\nuser:x:1000:1000::/home/user:/bin/sh\n\
                     nohome:x:5:5::\nodd:x:6:6::a/b:\nbig:x:99999999999:1::/:\n"
                .into(),
            group: "root:x:0:\nuser:x:1000:\nsudo:x:27:other,user\ndocker:x:999:user\nbad:x:x:user\n".into(),
            ..Default::default()
        }
    }

    #[test]
    fn users_are_found_as_docker_finds_them() {
        let ids = |text: &str| {
            let user = database().find(text)?;
            Some((user.name, user.credentials.uid, user.credentials.gid, user.credentials.groups, user.home))
        };
        let root = Some(("root".into(), 0, 0, vec![0], "/root".into()));
        assert_eq!(ids(""), root);
        assert_eq!(ids("0"), root);
        assert_eq!(ids("user"), Some(("user".into(), 1000, 1000, vec![1000, 27, 999], "/home/user".into())));
        assert_eq!(ids("1000:sudo"), Some(("user".into(), 1000, 27, vec![27], "/home/user".into())));
        assert_eq!(ids("4321:99"), Some(("4321".into(), 4321, 99, vec![99], "/".into())));
        assert_eq!(ids("4321"), Some(("4321".into(), 4321, 0, vec![0], "/".into())));
        assert_eq!(ids("odd"), Some(("odd".into(), 6, 6, vec![6], "/".into())), "a relative home");
        assert_eq!(ids("nobody"), None);
        assert_eq!(ids("user:nosuch"), None);
        assert_eq!(ids("big"), None);
        assert_eq!(UserDatabase::default().find("root").unwrap().home, "/root");
    }

    #[test]
    fn ids_without_a_name_are_numbers() {
        assert_eq!(database().user_name(1000), "user");
        assert_eq!(database().user_name(7), "7");
        assert_eq!(database().group_name(27), "sudo");
        assert_eq!(database().group_name(7), "7");
    }
}
