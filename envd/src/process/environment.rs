//! What a program gets from the sandbox, its user and the call.

use std::collections::BTreeMap;

use envd_proto::process::ProcessConfig;

use crate::sandbox::Session;
use crate::users::User;

/// What a program gets when neither the image nor the call says anything.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What the SDKs' clients ask for with every command and every terminal.
const BASH: &str = "/bin/bash";

/// What every image has that has a shell at all.
const SH: &str = "/bin/sh";

/// Options of bash that every sh takes too (POSIX, `sh`; and `-l`, which ash and dash have).
const SH_OPTIONS: &str = "abcefhilmnsuvxC";

/// The environment, later ones winning: the user's own, the sandbox's, the call's.
pub(super) fn environment(
    session: &Session,
    user: &User,
    config: &ProcessConfig,
    terminal: bool,
) -> Vec<(String, String)> {
    let mut env = BTreeMap::from([
        ("PATH", DEFAULT_PATH),
        ("HOME", &user.home),
        ("USER", &user.name),
        ("LOGNAME", &user.name),
    ]);
    if terminal {
        env.extend([("TERM", "xterm-256color"), ("LANG", "C.UTF-8"), ("LC_ALL", "C.UTF-8")]);
    }
    env.extend(session.env().iter().map(|(name, value)| (name.as_str(), value.as_str())));
    env.extend(config.envs.iter().map(|(name, value)| (name.as_str(), value.as_str())));
    env.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// The paths that a command can mean: itself if it has a slash, else each folder of `PATH`.
pub(super) fn programs(command: &str, env: &[(String, String)]) -> Vec<Vec<u8>> {
    if command.contains('/') {
        return vec![command.as_bytes().to_vec()];
    }
    let path = env.iter().find(|(name, _)| name == "PATH").map_or(DEFAULT_PATH, |(_, path)| path);
    // An empty element means the working directory (POSIX 8.3).
    let candidate =
        |folder: &str| if folder.is_empty() { command.to_owned() } else { format!("{folder}/{command}") };
    path.split(':').map(|folder| candidate(folder).into_bytes()).collect()
}

/// What runs in place of a command whose program the image does not have: the image's sh for a bash that it would
/// understand. No other command is ever replaced.
pub(super) fn substitute(config: &ProcessConfig) -> Option<&'static str> {
    (config.cmd == BASH && sh_understands(&config.args)).then_some(SH)
}

/// Whether all options are sh's; what follows them is a command or a script.
fn sh_understands(args: &[String]) -> bool {
    for arg in args {
        match arg.strip_prefix('-') {
            None | Some("" | "-") => return true,
            Some(letters) if letters.chars().all(|letter| SH_OPTIONS.contains(letter)) => {}
            Some(_) => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_searched_in_the_path_of_the_process() {
        let env = [("PATH".to_owned(), "/a::/b".to_owned())];
        assert_eq!(programs("ls", &env), [b"/a/ls".to_vec(), b"ls".to_vec(), b"/b/ls".to_vec()]);
        assert_eq!(programs("./ls", &env), [b"./ls".to_vec()]);
    }

    #[test]
    fn only_a_bash_that_sh_understands_is_replaced() {
        let substitute = |cmd: &str, args: &[&str]| {
            let args = args.iter().map(|&arg| arg.to_owned()).collect();
            substitute(&ProcessConfig { cmd: cmd.into(), args, ..Default::default() })
        };
        for args in [
            &["-l", "-c", "echo --norc"][..],
            &["-i", "-l"],
            &["-lc", "x", "--login"],
            &[],
            &["script.sh", "--rcfile"],
            &["--", "x"],
            &["-s"],
        ] {
            assert_eq!(substitute("/bin/bash", args), Some("/bin/sh"), "{args:?}");
        }
        for args in [
            &["--login"][..],
            &["--norc", "-c", "x"],
            &["-O", "extglob"],
            &["-l", "--posix"],
            &["-o", "pipefail"],
        ] {
            assert_eq!(substitute("/bin/bash", args), None, "{args:?}");
        }
        for cmd in ["bash", "/usr/bin/bash", "/bin/zsh", "/bin/sh"] {
            assert_eq!(substitute(cmd, &["-l", "-c", "x"]), None, "{cmd}");
        }
    }
}
