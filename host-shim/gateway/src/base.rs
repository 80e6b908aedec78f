//! The template `base`, which the SDKs ask for when they name none: made on first use, by `image-builder`.
//!
//! ```text
//! debian:bookworm   from the local store, else from its registry, else made from a Debian mirror
//!    │ image-builder build    base/Dockerfile, which this program carries
//! image `tiffin/base`
//!    │ image-builder template create, which has host-shim make a snapshot of it
//! template `base`
//! ```

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use template::TEMPLATE_FILE;
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

use crate::config::Config;

/// The template's name.
pub const NAME: &str = "base";

const DOCKERFILE: &str = include_str!("../base/Dockerfile");
/// The image that the Dockerfile is FROM.
const FROM: &str = "debian:bookworm";
const FROM_CANONICAL: &str = "docker.io/library/debian:bookworm";
const IMAGE: &str = "tiffin/base";

/// Size of its sandboxes: those of E2B's own `base`, with less disk.
const CPUS: &str = "2";
const MEMORY_MIB: &str = "512";
const DISK_MIB: &str = "4096";

/// Where distributions keep the bundle of certificates that `image-builder build --host-ca` lends to RUN steps.
const CA_BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Until an interrupted build has cleaned up.
const INTERRUPT_DEADLINE: Duration = Duration::from_secs(30);

/// The template could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// A step failed; what it printed went to the operator.
    #[error("`{command}` failed ({status})")]
    Step {
        /// What was run.
        command: String,
        /// How it ended.
        status: ExitStatus,
    },
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file in question.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The gateway is to stop.
    #[error("interrupted")]
    Interrupted,
}

/// Makes the template unless it is there; `say` tells the operator what happens. Whether it was made.
///
/// Several at once make it once: the others wait. What `image-builder` prints goes to standard error.
pub async fn ensure(
    config: &Config,
    stop: &CancellationToken,
    say: impl Fn(&str),
) -> Result<bool, BaseError> {
    let template = config.data.templates().join(NAME).join(TEMPLATE_FILE);
    if template.exists() {
        return Ok(false);
    }
    let path = config.data.path().join("base.lock");
    let _lock = tokio::select! {
        lock = lock(path.clone()) => lock.map_err(|source| BaseError::Io { path, source })?,
        () = stop.cancelled() => return Err(BaseError::Interrupted),
    };
    if template.exists() {
        return Ok(false);
    }
    say("making the template `base` (first use; this takes some minutes and needs the network)");
    let builder = Builder { config, stop };
    if builder.has_from().await? {
        say(&format!("{FROM} is in the local store"));
    } else if builder.run(["load", FROM, "-t", FROM]).await?.success() {
        say(&format!("{FROM} came from its registry"));
    } else {
        say(&format!("no registry gives {FROM}: making it from a Debian mirror"));
        builder.must(["bootstrap", FROM]).await?;
    }
    let context = Context::new(config.data.path().join(format!(".base-{}", std::process::id())))?;
    let folder = context.0.as_os_str();
    let mut build = ["build", "-t", IMAGE].map(OsStr::new).to_vec();
    if lends_certificates() {
        build.push("--host-ca".as_ref());
    }
    build.push(folder);
    builder.must(build).await?;
    let mut create = [
        "template", "create", NAME, "--image", IMAGE, "--cpus", CPUS, "--memory", MEMORY_MIB, "--disk",
        DISK_MIB,
    ]
    .map(OsStr::new)
    .to_vec();
    create.extend([OsStr::new("--host-shim"), config.host_shim.as_os_str()]);
    for (option, file) in [("--kernel", &config.kernel), ("--guest-image", &config.guest_image)] {
        if let Some(file) = file {
            create.extend([OsStr::new(option), file.as_os_str()]);
        }
    }
    builder.must(create).await?;
    say("the template `base` is there");
    Ok(true)
}

/// Whether this machine has a bundle of certificates that RUN steps can be lent.
pub(crate) fn lends_certificates() -> bool {
    std::env::var_os("SSL_CERT_FILE").is_some() || CA_BUNDLES.iter().any(|file| Path::new(file).is_file())
}

/// Waits its turn; the kernel gives the lock back with the process.
async fn lock(path: PathBuf) -> io::Result<File> {
    let wait = move || {
        path.parent().map_or(Ok(()), std::fs::create_dir_all)?;
        let file = File::options().create(true).truncate(false).write(true).mode(0o600).open(path)?;
        file.lock()?;
        Ok(file)
    };
    tokio::task::spawn_blocking(wait).await.map_err(io::Error::other)?
}

/// The folder of the Dockerfile, for as long as it is needed.
struct Context(PathBuf);

impl Context {
    fn new(path: PathBuf) -> Result<Self, BaseError> {
        let made = Self(path.clone());
        std::fs::create_dir_all(&path)
            .and_then(|()| std::fs::write(path.join("Dockerfile"), DOCKERFILE))
            .map_err(|source| BaseError::Io { path, source })?;
        Ok(made)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // Left behind it is 1 KiB, and the next first use writes over it.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

struct Builder<'a> {
    config: &'a Config,
    stop: &'a CancellationToken,
}

impl Builder<'_> {
    fn command(&self) -> Command {
        let mut command = Command::new(&self.config.image_builder);
        command.arg("--data-dir").arg(self.config.data.path()).stdin(Stdio::null());
        command
    }

    async fn has_from(&self) -> Result<bool, BaseError> {
        let output = self.command().args(["images", "--json"]).stderr(Stdio::inherit()).output().await;
        let output = output.map_err(|source| self.spawn_failed(source))?;
        Ok(String::from_utf8_lossy(&output.stdout).contains(&format!("{FROM_CANONICAL:?}")))
    }

    async fn run(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<ExitStatus, BaseError> {
        // Standard output is for what programs read.
        let stderr = io::stderr().as_fd().try_clone_to_owned().map_err(|source| self.spawn_failed(source))?;
        let mut child =
            self.command().args(args).stdout(stderr).spawn().map_err(|source| self.spawn_failed(source))?;
        tokio::select! {
            status = child.wait() => return status.map_err(|source| self.spawn_failed(source)),
            () = self.stop.cancelled() => {}
        }
        // It cleans up after its RUN steps.
        if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id.cast_signed())) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let _ = tokio::time::timeout(INTERRUPT_DEADLINE, child.wait()).await;
        Err(BaseError::Interrupted)
    }

    async fn must<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Result<(), BaseError> {
        let args: Vec<A> = args.into_iter().collect();
        let status = self.run(args.iter()).await?;
        if status.success() {
            return Ok(());
        }
        let words: Vec<_> = args.iter().map(|word| word.as_ref().to_string_lossy()).collect();
        Err(BaseError::Step { command: format!("image-builder {}", words.join(" ")), status })
    }

    fn spawn_failed(&self, source: io::Error) -> BaseError {
        BaseError::Io { path: self.config.image_builder.clone(), source }
    }
}
