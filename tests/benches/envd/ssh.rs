//! ssh and sftp to this machine without a network: `sshd -i` at the other end of a pipe, one master connection, keys and
//! configuration in a folder of its own.

use std::fs;
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A master connection; ends with the bench.
pub(crate) struct Ssh {
    config: PathBuf,
}

impl Drop for Ssh {
    fn drop(&mut self) {
        let _ = self.command("ssh").args(["-O", "exit", "bench"]).stderr(Stdio::null()).status();
    }
}

impl Ssh {
    pub(crate) fn start(folder: &Path) -> Self {
        // Debian's sshd wants it, and a machine without a service manager has not made it.
        fs::DirBuilder::new().recursive(true).mode(0o755).create("/run/sshd").unwrap();
        let folder = folder.join("ssh");
        fs::DirBuilder::new().mode(0o700).create(&folder).unwrap();
        let path = |name: &str| folder.join(name).display().to_string();
        for key in ["host", "user"] {
            let made = Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-f", &path(key)])
                .status()
                .expect("ssh-keygen of Debian's openssh-client");
            assert!(made.success());
        }
        let server = format!(
            "HostKey {}\nAuthorizedKeysFile {}\nStrictModes no\nUsePAM no\nPidFile none\nLogLevel QUIET\n\
             PermitRootLogin yes\nSubsystem sftp internal-sftp\n",
            path("host"),
            path("user.pub"),
        );
        fs::write(path("sshd_config"), server).unwrap();
        let client = format!(
            "Host bench\n  ProxyCommand /usr/sbin/sshd -i -f {}\n  IdentityFile {}\n  IdentitiesOnly yes\n  \
             StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n  ControlMaster auto\n  \
             ControlPath {}\n  ControlPersist 600\n",
            path("sshd_config"),
            path("user"),
            path("master"),
        );
        fs::write(path("config"), client).unwrap();
        let ssh = Self { config: folder.join("config") };
        ssh.run("/bin/true");
        ssh
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-F").arg(&self.config);
        command
    }

    /// Runs a command over the master connection.
    pub(crate) fn run(&self, command: &str) {
        let status = self.command("ssh").args(["bench", command]).stdin(Stdio::null()).status().unwrap();
        assert!(status.success(), "ssh {command}: {status}");
    }

    /// Carries out a line of sftp over the master connection.
    pub(crate) fn sftp(&self, line: &str) {
        let mut sftp = self
            .command("sftp")
            .args(["-q", "-b", "-", "bench"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        writeln!(sftp.stdin.take().unwrap(), "{line}").unwrap();
        let status = sftp.wait().unwrap();
        assert!(status.success(), "sftp {line}: {status}");
    }
}
