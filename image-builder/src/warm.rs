//! The snapshot of a new template: `host-shim template warm`, started as a program.
//!
//! ```text
//! template on disk ── host-shim template warm PATH --json ──► boots, start and ready command, snapshot
//!                         │ exit 0: a line of JSON      what was made
//!                         │ exit 4: something missing   this host has no sandboxes either: auto says so and goes on
//!                         └ else                        the template's commands or its machine failed: an error
//! ```

use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use template::DataDir;

use crate::console::Console;
use crate::error::{Error, at};
use crate::interrupt::Interrupt;

const PROGRAM: &str = "host-shim";

/// host-shim's exit code where something that a sandbox needs is not on this host.
const EXIT_MISSING: i32 = 4;

/// How much is read of its result: a line with some dozens of phases.
const MAX_RESULT: u64 = 1 << 20;

/// How much of its words is kept: an error with the end of the guest's console.
const MAX_WORDS: usize = 32 << 10;

/// Whether a template gets its snapshot when it is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SnapshotChoice {
    /// Where this host can run sandboxes.
    #[default]
    Auto,
    /// Yes, or it is an error.
    Always,
    /// No: sandboxes boot until `host-shim template warm` makes one.
    Never,
}

/// How a snapshot is made.
#[derive(Clone, Debug, Default)]
pub struct WarmOptions {
    /// Whether at all.
    pub choice: SnapshotChoice,
    /// The program host-shim; the one beside this program or in PATH by default.
    pub host_shim: Option<PathBuf>,
    /// The guest kernel; the one that host-shim finds by default.
    pub kernel: Option<PathBuf>,
    /// The guest image; the one that host-shim finds by default.
    pub guest_image: Option<PathBuf>,
}

/// A snapshot that was made, and its cost.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its folder.
    #[serde(rename(deserialize = "snapshot"))]
    pub path: PathBuf,
    /// Milliseconds for which the machine stood still.
    pub stopped_ms: f64,
    /// Bytes of RAM that were written.
    pub ram_bytes: u64,
    /// Bytes of the disk that were written; none where the file system shares blocks.
    pub disk_bytes: u64,
    /// What took how long before it, as host-shim says it.
    #[serde(default)]
    pub phases: Vec<Value>,
}

/// What came of it.
#[derive(Clone, Debug)]
pub enum Warmed {
    /// There is a snapshot.
    Made(Snapshot),
    /// There is none, and that is no error; why, in a sentence.
    None(String),
}

/// The program host-shim: the named one, else the one beside this program, else the first in PATH. What was named is used or
/// refused.
pub fn find_host_shim(named: Option<&Path>) -> Result<Option<PathBuf>, Error> {
    if let Some(named) = named {
        return match is_executable(named) {
            true => Ok(Some(named.to_owned())),
            false => Err(Error::Invalid {
                what: format!("--{PROGRAM} {}", named.display()),
                reason: "that is no executable file".to_owned(),
            }),
        };
    }
    let beside = std::env::current_exe().ok().and_then(|own| Some(own.parent()?.join(PROGRAM)));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path).map(|folder| folder.join(PROGRAM));
    Ok(beside.into_iter().chain(in_path).find(|file| file.is_absolute() && is_executable(file)))
}

/// Makes the snapshot of the template in the folder `template`. Whatever happens, the template stays.
pub fn warm(
    data: &DataDir,
    template: &Path,
    options: &WarmOptions,
    console: &Console,
    interrupt: &Interrupt,
) -> Result<Warmed, Error> {
    let none = |why: String| match options.choice {
        SnapshotChoice::Always => Err(failed(template, why)),
        SnapshotChoice::Auto | SnapshotChoice::Never => Ok(Warmed::None(why)),
    };
    if options.choice == SnapshotChoice::Never {
        return none("--snapshot never".to_owned());
    }
    let Some(program) = find_host_shim(options.host_shim.as_deref())? else {
        return none(format!(
            "{PROGRAM} is missing: looked beside image-builder and in PATH; name it with --{PROGRAM}"
        ));
    };
    let mut command = Command::new(&program);
    command.args(["template", "warm", "--json", "--data-dir"]).arg(data.path());
    for (option, file) in [("--kernel", &options.kernel), ("--guest-image", &options.guest_image)] {
        if let Some(file) = file {
            command.arg(option).arg(file);
        }
    }
    command.arg(template).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let work = console.work("starting a sandbox of the template, for its snapshot", None);
    let child = match interrupt.spawn(&mut command) {
        Ok(child) => child,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return none(format!("{} is missing", program.display()));
        }
        Err(error) => return Err(at(&program)(error)),
    };
    let pid = child.id();
    let ended = outcome(child, console);
    interrupt.unwatch(pid);
    drop(work);
    if interrupt.check().is_err() {
        console.line(&format!("interrupted; the template {} stays, without a snapshot", template.display()));
        return Err(Error::Interrupted);
    }
    let Outcome { code, said, words } = ended.map_err(at(&program))?;
    match code {
        Some(0) => match serde_json::from_slice(&said) {
            Ok(snapshot) => Ok(Warmed::Made(snapshot)),
            Err(error) => {
                let said = String::from_utf8_lossy(&said);
                Err(failed(
                    template,
                    format!("{PROGRAM} said {:?}, expected its result: {error}", said.trim()),
                ))
            }
        },
        Some(EXIT_MISSING) => none(words),
        Some(_) if !words.is_empty() => Err(failed(template, words)),
        Some(code) => Err(failed(template, format!("{PROGRAM} ended with exit code {code}"))),
        None => Err(failed(template, format!("{PROGRAM} was ended by a signal"))),
    }
}

fn failed(template: &Path, reason: String) -> Error {
    Error::Snapshot { template: template.to_owned(), reason }
}

struct Outcome {
    code: Option<i32>,
    said: Vec<u8>,
    words: String,
}

fn outcome(mut child: Child, console: &Console) -> std::io::Result<Outcome> {
    let stderr = child.stderr.take();
    let mut said = Vec::new();
    let words = thread::scope(|threads| {
        let words = threads.spawn(|| stderr.map(|stderr| listen(stderr, console)).unwrap_or_default());
        // What it says beyond that is no result of ours.
        let read = child.stdout.take().map(|stdout| stdout.take(MAX_RESULT).read_to_end(&mut said));
        let words = words.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        read.transpose().map(|_| words)
    });
    let status = child.wait()?;
    Ok(Outcome { code: status.code(), said, words: words? })
}

/// Passes its notices on at once, and gives its other words: those of an error.
fn listen(stderr: impl Read, console: &Console) -> String {
    let prefix = format!("{PROGRAM}: ");
    let note = format!("{prefix}note: ");
    let mut words = String::new();
    let mut stderr = BufReader::new(stderr);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut stderr).take(MAX_WORDS as u64).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return words.trim().to_owned(),
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&line);
        match text.strip_prefix(&note) {
            Some(_) => console.line(text.trim_end()),
            None if words.len() + text.len() <= MAX_WORDS => {
                words.push_str(text.strip_prefix(&prefix).unwrap_or(&text));
            }
            None => {}
        }
    }
}

fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}
