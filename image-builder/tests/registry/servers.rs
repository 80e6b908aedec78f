//! Servers of others, each from a folder of its own.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// A server that does not come up within this time does not come at all.
const DEADLINE: Duration = Duration::from_secs(120);

/// A process that ends with this value.
pub(crate) struct Server(Child);

impl Server {
    /// Starts the program and waits until `ready` finds what it looks for in a line of its stderr.
    pub(crate) fn start<T: Send + 'static>(
        mut command: Command,
        ready: impl Fn(&str) -> Option<T> + Send + 'static,
    ) -> Option<(Self, T)> {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let program = command.get_program().to_string_lossy().into_owned();
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                eprintln!("SKIPPED: no {program}; install Debian's package");
                return None;
            }
            Err(error) => panic!("{program}: {error}"),
        };
        let stderr = child.stderr.take().unwrap();
        let server = Self(child);
        let (found, finding) = mpsc::channel();
        std::thread::spawn(move || {
            // To its end: a server never waits for somebody to read its log.
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let _ = ready(&line).map(|value| found.send(Ok(value)));
                let _ = found.send(Err(line));
            }
        });
        let mut log = String::new();
        loop {
            match finding.recv_timeout(DEADLINE) {
                Ok(Ok(value)) => return Some((server, value)),
                Ok(Err(line)) => log.push_str(&format!("{line}\n")),
                Err(error) => panic!("{program} did not start: {error}\n{log}"),
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Debian's `docker-registry` on a port that the kernel chose.
pub(crate) struct Registry {
    _server: Server,
    host: String,
}

/// bcrypt of "secret".
const ME: &str = "me:$2y$05$WCEsWNBRL7dpXOsf7.PXGOLy1PFJOGsxVuBQRKLssr/e0p5TDxCrm\n";

impl Registry {
    /// `None`, with the reason on stderr, where it is not installed.
    pub(crate) fn start(folder: &Path, auth: bool) -> Option<Self> {
        let passwords = folder.join("htpasswd");
        let auth =
            auth.then(|| format!("auth: {{htpasswd: {{realm: test, path: '{}'}}}}\n", passwords.display()));
        Self::configured(folder, &auth.unwrap_or_default(), "")
    }

    /// With TLS, by a certificate that nobody signed, which is `tls.crt` in the folder.
    pub(crate) fn with_tls(folder: &Path) -> Option<Self> {
        std::fs::create_dir_all(folder).unwrap();
        let file = |name: &str| folder.join(name).display().to_string();
        let made = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", "/CN=registry"])
            .args(["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"])
            .args(["-keyout", &file("tls.key"), "-out", &file("tls.crt")])
            .stderr(Stdio::null())
            .status();
        match made {
            Ok(status) => assert!(status.success()),
            Err(error) => {
                eprintln!("SKIPPED: openssl: {error}");
                return None;
            }
        }
        let tls = format!(", tls: {{certificate: '{}', key: '{}'}}", file("tls.crt"), file("tls.key"));
        Self::configured(folder, "", &tls)
    }

    fn configured(folder: &Path, auth: &str, tls: &str) -> Option<Self> {
        std::fs::create_dir_all(folder).unwrap();
        std::fs::write(folder.join("htpasswd"), ME).unwrap();
        let config = format!(
            "version: 0.1\nlog: {{level: info}}\nhttp: {{addr: '127.0.0.1:0'{tls}}}\n{auth}\
             storage: {{filesystem: {{rootdirectory: '{}'}}}}\n",
            folder.join("storage").display()
        );
        let file = folder.join("config.yml");
        std::fs::write(&file, config).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&file).env_clear();
        let listening = |line: &str| {
            let (_, rest) = line.split_once("listening on ")?;
            Some(rest.split(['"', ' ', ',']).next()?.to_owned())
        };
        let (server, host) = Server::start(command, listening)?;
        Some(Self { _server: server, host })
    }

    /// Host and port.
    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    /// A name there.
    pub(crate) fn name(&self, rest: &str) -> String {
        format!("{}/{rest}", self.host)
    }
}
