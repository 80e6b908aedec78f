//! One build, from its request to a template that can be started.
//!
//! ```text
//! image-builder build      the base, and the user of sandboxes in it          base
//!      │        build      the steps                                          1, 2, …
//!      │        template create    root file system, start and ready          finalize
//!      ▼                           command, snapshot
//!      └        template push      where there is a registry                  finalize
//! ```
//!
//! Each is a process with JSON lines of progress, which become the build's log. What an error is of is its `step`.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

use super::log::{BuildLog, LogEntry, LogLevel, printable};
use super::name::{base_image, folder, image};
use super::process::{Ended, run};
use crate::base;
use crate::config::Config;
use crate::store::{BuildReason, BuildRecord};

/// The step of what comes before the steps, and of what comes after them.
pub(super) const BASE: &str = "base";
pub(super) const FINALIZE: &str = "finalize";

/// What the base is called among the steps.
pub(super) const BASE_NAME: &str = "base";

/// Files of a build's folder.
const REQUEST: &str = "request.json";
const BASE_STEPS: &str = "base.json";
const STEPS: &str = "steps.json";
const CREDENTIALS: &str = "auth.json";
const REGISTRIES: &str = "registries.conf";
pub(super) const LOG: &str = "log";

/// What is kept of a request until the build has ended: enough to begin again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Request {
    /// The image that it begins with.
    pub(super) base: String,
    /// Whether every step is run.
    pub(super) no_cache: bool,
    /// What `image-builder build --steps` reads.
    pub(super) steps: Value,
    /// What `--authfile` reads.
    pub(super) credentials: Value,
}

impl Request {
    /// Keeps it in the build's folder, which is made.
    pub(super) fn write(&self, dir: &Path) -> io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        write(&dir.join(BASE_STEPS), &serde_json::json!({ "fromImage": self.base, "steps": [] }))?;
        write(&dir.join(STEPS), &self.steps)?;
        write(&dir.join(CREDENTIALS), &self.credentials)?;
        // Last: without it there is no request.
        write(&dir.join(REQUEST), self)?;
        fs::File::open(dir)?.sync_all()
    }

    fn read(dir: &Path) -> io::Result<Self> {
        serde_json::from_slice(&fs::read(dir.join(REQUEST))?).map_err(io::Error::from)
    }

    /// Forgets what is not needed any more, passwords first.
    pub(super) fn forget(dir: &Path) {
        for file in [CREDENTIALS, REQUEST, STEPS, BASE_STEPS, REGISTRIES] {
            let _ = fs::remove_file(dir.join(file));
        }
        let _ = fs::remove_dir_all(dir.join("files"));
    }
}

fn write(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let mut file = fs::File::options().create(true).truncate(true).write(true).mode(0o600).open(path)?;
    file.write_all(&serde_json::to_vec(value)?)?;
    file.sync_all()
}

/// How a build ended.
#[derive(Debug)]
pub(super) enum Outcome {
    /// Its template is there; the digest of what the registry has of it.
    Ready(Option<String>),
    /// It failed.
    Failed(BuildReason),
    /// It was told to end.
    Stopped,
}

/// A build that runs.
pub(super) struct Runner<'a> {
    pub(super) config: &'a Config,
    pub(super) record: &'a BuildRecord,
    pub(super) dir: PathBuf,
    pub(super) log: &'a BuildLog,
    pub(super) stop: &'a CancellationToken,
}

impl Runner<'_> {
    /// Builds.
    pub(super) async fn run(&self) -> Outcome {
        match self.try_run().await {
            Ok(digest) => Outcome::Ready(digest),
            Err(outcome) => outcome,
        }
    }

    async fn try_run(&self) -> Result<Option<String>, Outcome> {
        let BuildRecord { id, template, team, .. } = self.record;
        let request = Request::read(&self.dir)
            .map_err(|error| failed(BASE, format!("its request cannot be read: {error}")))?;
        let (base, image, folder) = (base_image(template, id), image(template, id), folder(template, id));
        let builds = &self.config.builds;

        let mut command = self.builder("build");
        command.arg("--steps").arg(self.dir.join(BASE_STEPS)).args([
            "--e2b-user",
            "-t",
            &base,
            "--isolation",
            builds.isolation.word(),
        ]);
        command.arg("--authfile").arg(self.dir.join(CREDENTIALS)).args(["--progress", "json", "--json"]);
        self.step(BASE, command).await?;

        let mut command = self.builder("build");
        command.arg("--steps").arg(self.dir.join(STEPS)).arg("--files").arg(self.dir.join("files"));
        command.args(["--template-image", &format!("{BASE_NAME}={base}"), "-t", &image]);
        command.args(["--isolation", builds.isolation.word(), "--jobs", "1", "--progress", "json", "--json"]);
        if request.no_cache {
            command.arg("--no-cache");
        }
        if !builds.network {
            command.args(["--network", "none"]);
        }
        if base::lends_certificates() {
            command.arg("--host-ca");
        }
        self.step("", command).await?;

        let mut command = self.builder("template");
        command.args(["create", &folder, "--image", &image]);
        command.args([
            "--cpus",
            &self.record.cpus.to_string(),
            "--memory",
            &self.record.memory_mib.to_string(),
        ]);
        command.args(["--disk", &self.record.disk_mib.to_string(), "--progress", "json", "--json"]);
        self.step(FINALIZE, command).await?;

        let Some(registry) = &builds.registry else { return Ok(None) };
        let mut command = self.builder("template");
        command.args([
            "push",
            &folder,
            &registry.destination(team, template, id),
            "--progress",
            "json",
            "--json",
        ]);
        if let Some(text) = registry.configuration() {
            let path = self.dir.join(REGISTRIES);
            fs::write(&path, text)
                .map_err(|error| failed(FINALIZE, format!("{}: {error}", path.display())))?;
            command.arg("--registries-conf").arg(path);
        }
        let report = self.step(FINALIZE, command).await?;
        let digest = serde_json::from_slice::<Value>(&report).ok();
        let digest = digest.as_ref().and_then(|report| report["digest"].as_str()).map(str::to_owned);
        digest.map(Some).ok_or_else(|| failed(FINALIZE, "the push gave no digest".to_owned()))
    }

    fn builder(&self, verb: &str) -> Command {
        let mut command = command(self.config);
        // Nothing that a request names as a relative path is there.
        command.current_dir(&self.dir).arg(verb);
        command
    }

    /// Runs one program; `step` is what an error is of that names none.
    async fn step(&self, step: &str, mut command: Command) -> Result<Vec<u8>, Outcome> {
        let mut reader = Reader {
            dir: self.dir.display().to_string(),
            data: self.config.data.path().display().to_string(),
            default: step,
            error: None,
        };
        let each = |line: &str| {
            if let Some(entry) = reader.entry(line) {
                self.log.add(&entry);
            }
        };
        let ended = run(&mut command, &self.record.id, self.stop, self.config.builds.grace, each).await;
        let ended = ended.map_err(|error| {
            tracing::error!(%error, program = %self.config.image_builder.display(), "a build's program cannot be started");
            failed(step, "image-builder cannot be started; the gateway's log says why".to_owned())
        })?;
        let (status, result) = match ended {
            Ended::Told => return Err(Outcome::Stopped),
            Ended::Itself(status, result) => (status, result),
        };
        if status.success() {
            return Ok(result);
        }
        Err(Outcome::Failed(reader.error.unwrap_or_else(|| BuildReason {
            message: match status.signal() {
                Some(signal) => format!("image-builder was ended by signal {signal}: build again"),
                None => format!("image-builder failed without a word ({status})"),
            },
            step: (!step.is_empty()).then(|| step.to_owned()),
        })))
    }
}

/// `image-builder` on the gateway's data folder, with the programs and files that the gateway uses itself.
pub(super) fn command(config: &Config) -> Command {
    let mut command = Command::new(&config.image_builder);
    command.arg("--data-dir").arg(config.data.path()).env("TIFFIN_HOST_SHIM", &config.host_shim);
    for (name, file) in [("TIFFIN_KERNEL", &config.kernel), ("TIFFIN_GUEST_IMAGE", &config.guest_image)] {
        if let Some(file) = file {
            command.env(name, file);
        }
    }
    command
}

fn failed(step: &str, message: String) -> Outcome {
    let step = (!step.is_empty()).then(|| step.to_owned());
    Outcome::Failed(BuildReason { message, step })
}

/// A line of `--progress json` (image-builder/src/console.rs).
#[derive(Debug, Deserialize)]
struct Progress {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    message: String,
    #[serde(default)]
    status: String,
    #[serde(default)]
    step: String,
}

/// Makes entries of the log of lines of progress.
struct Reader<'a> {
    /// The build's folder, and the data folder.
    dir: String,
    data: String,
    default: &'a str,
    error: Option<BuildReason>,
}

impl Reader<'_> {
    fn entry(&mut self, line: &str) -> Option<LogEntry> {
        if line.trim().is_empty() {
            return None;
        }
        // What is no JSON was not written for us, but may be the only thing that explains an end.
        let progress = serde_json::from_str(line).unwrap_or_else(|_| Progress {
            kind: "message".to_owned(),
            message: line.to_owned(),
            status: String::new(),
            step: String::new(),
        });
        let message = progress.message;
        let entry = match (progress.kind.as_str(), progress.status.as_str()) {
            ("step", "started") => LogEntry::new(LogLevel::Info, &format!("{} {message}", progress.step)),
            ("step", "cached") => {
                LogEntry::new(LogLevel::Info, &format!("{} {message} (cached)", progress.step))
            }
            ("output", _) => LogEntry::new(LogLevel::Info, &message),
            ("work", "started") => LogEntry::new(LogLevel::Debug, &message),
            ("error", _) => {
                // The log's last entry.
                self.error = Some(self.reason(&message));
                return None;
            }
            ("message", _) if message.starts_with("warning:") => {
                LogEntry::new(LogLevel::Warn, &self.shown(&message))
            }
            ("message", _) => LogEntry::new(LogLevel::Debug, &self.shown(&message)),
            _ => return None,
        };
        let step = (!self.default.is_empty()).then(|| self.default.to_owned());
        Some(LogEntry { step, ..entry })
    }

    /// Reads `image-builder: FILE: step 2: REASON`.
    fn reason(&self, message: &str) -> BuildReason {
        let message = message.strip_prefix("image-builder: ").unwrap_or(message);
        let message = self.shown(message);
        let of_step =
            message.strip_prefix(STEPS).and_then(|rest| rest.strip_prefix(": step ")).and_then(|rest| {
                let (number, words) = rest.split_once(": ")?;
                number
                    .bytes()
                    .all(|byte| byte.is_ascii_digit())
                    .then(|| (number.to_owned(), words.to_owned()))
            });
        match of_step {
            Some((step, words)) => BuildReason { message: format!("step {step}: {words}"), step: Some(step) },
            None => {
                let step = (!self.default.is_empty()).then(|| self.default.to_owned());
                BuildReason { message, step }
            }
        }
    }

    /// Without the folders of this machine in which the build is.
    fn shown(&self, message: &str) -> String {
        let message = message.replace(&format!("{}/", self.dir), "");
        printable(&message.replace(&format!("{}/", self.data), ""))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_becomes_entries_and_errors_point_at_their_step() {
        let mut reader =
            Reader { dir: "/data/builds/x".into(), data: "/data".into(), default: "", error: None };
        let mut said = |line: &str| {
            let entry = reader.entry(line);
            (entry.map(|entry| (entry.level, entry.message, entry.step)), reader.error.take())
        };
        let info = |text: &str| (Some((LogLevel::Info, text.to_owned(), None)), None);
        for (line, expected) in [
            (r#"{"type":"step","step":"[2/5]","status":"started","message":"RUN x"}"#, info("[2/5] RUN x")),
            (
                r#"{"type":"step","step":"[2/5]","status":"cached","message":"RUN x"}"#,
                info("[2/5] RUN x (cached)"),
            ),
            (r#"{"type":"step","step":"[2/5]","status":"done","message":"RUN x"}"#, (None, None)),
            (r#"{"type":"output","step":"[2/5]","message":"\u001b[0mhi"}"#, info("hi")),
            (r#"{"type":"novel","message":"x"}"#, (None, None)),
            ("", (None, None)),
        ] {
            assert_eq!(said(line), expected, "{line}");
        }
        let (entry, reason) = said(
            r#"{"type":"error","message":"image-builder: /data/builds/x/steps.json: step 2: the command exited with code 3\n    RUN x"}"#,
        );
        let words = "step 2: the command exited with code 3\n    RUN x".to_owned();
        assert_eq!(entry, None, "it is the log's last entry");
        assert_eq!(reason, Some(BuildReason { message: words, step: Some("2".into()) }));

        let mut reader =
            Reader { dir: "/data/builds/x".into(), data: "/data".into(), default: FINALIZE, error: None };
        reader.entry(r#"{"type":"error","message":"image-builder: the start command failed"}"#);
        let reason = reader.error.unwrap();
        assert_eq!(
            (reason.message.as_str(), reason.step.as_deref()),
            ("the start command failed", Some(FINALIZE))
        );
        let noise = Reader { dir: String::new(), data: "/data".into(), default: BASE, error: None }
            .entry("Killed")
            .unwrap();
        assert_eq!((noise.level, noise.message.as_str()), (LogLevel::Debug, "Killed"));
    }
}
