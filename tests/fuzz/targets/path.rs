//! Any path of any user of any /etc/passwd: absolute, not longer than its parts, or an error.
//!
//! Input: the user, the default directory, the path, /etc/group and /etc/passwd, a NUL between each two.
#![no_main]

use envd::sandbox::Session;
use envd::users::UserDatabase;
use envd_proto::control::Configure;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let mut parts = text.splitn(5, '\0');
    let mut part = || parts.next().unwrap_or_default();
    let (name, workdir, path, group, passwd) = (part(), part(), part(), part(), part());
    let Some(user) = UserDatabase::new(passwd.into(), group.into()).find(name) else { return };
    assert!(user.home.starts_with('/'), "{user:?}");
    let session = Session::new(Configure { default_workdir: workdir.into(), ..Configure::default() });
    match session.path(&user, path) {
        Ok(resolved) => {
            assert!(resolved.starts_with('/'), "{resolved:?}");
            assert!(resolved.len() <= user.home.len() + workdir.len() + path.len() + 1, "{resolved:?}");
        }
        Err(_) => assert!(path.starts_with('~'), "{path:?}"),
    }
    // Where a process starts: never an error, since it is then told as a directory that is not there.
    let _ = session.working_directory(&user, path);
});
