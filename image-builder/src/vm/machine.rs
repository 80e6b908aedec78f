//! The machine of a step: `host-shim run` with its disks, and `envd build-step` in it.
//!
//! ```text
//! stdin    the step, a line; stays open: its end, also by our death, is the machine's end
//! stdout, stderr   the command's; host-shim's own words are on stderr
//! ```

use std::ffi::OsString;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::str::FromStr;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use envd_proto::build::{COMMAND, Step};
use oci::Hasher;
use rootfs_tools::{Attributes, Content, Ext4, FileData, Node, NodeId, Place, Tree, write_tree};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use template::{
    DataDir, Machine, NewTemplate, Rootfs, RuntimeConfig, SCHEMA_VERSION, SourceImage, Template,
    TemplateFolder, TemplateName,
};

use super::{VmBuild, VmOptions};
use crate::error::{Error, at};
use crate::warm::find_host_shim;

/// The agent is PID 1 of the sandbox's container; its program is in no image.
const AGENT: &str = "/proc/1/exe";

/// The folder in the cache with the template of the machines.
const FOLDER: &str = "vm";

/// Its name says what is in it: another content, another name.
const TEMPLATE: &str = "build-step-1";

/// The sandbox's own disk, on which next to nothing is written.
const SCRATCH_MIB: u64 = 64;

/// More CPUs than this make a step slower to start, and few steps faster.
const MAX_CPUS: usize = 8;

/// Bytes of the template's files.
const PASSWD: &[u8] = b"root:x:0:0:root:/:/bin/sh\n";

/// Starts machines.
#[derive(Debug)]
pub(super) struct Machines {
    data: DataDir,
    host_shim: PathBuf,
    options: VmOptions,
    /// The folder of their template, once it is known to be there.
    template: Mutex<Option<PathBuf>>,
}

/// A disk of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Disk {
    pub(super) serial: String,
    pub(super) file: PathBuf,
    pub(super) read_only: bool,
}

impl Machines {
    pub(super) fn new(data: &DataDir, options: VmOptions) -> Result<Self, Error> {
        let host_shim = find_host_shim(options.host_shim.as_deref())?.ok_or_else(|| Error::Program {
            program: "host-shim".to_owned(),
            reason:
                "it runs the machines of --isolation vm, and is neither beside image-builder nor in PATH: \
                     install it, or name it with TIFFIN_HOST_SHIM"
                    .to_owned(),
        })?;
        Ok(Self { data: data.clone(), host_shim, options, template: Mutex::default() })
    }

    /// Where caches are.
    pub(super) fn cache(&self) -> PathBuf {
        self.data.cache()
    }

    pub(super) fn options(&self) -> &VmOptions {
        &self.options
    }

    /// Runs the step in a machine. What came of it is on its upper disk.
    pub(super) fn run(
        &self,
        disks: &[Disk],
        step: &Step,
        prefix: &str,
        build: &VmBuild<'_>,
    ) -> Result<(), Error> {
        let mut line = serde_json::to_vec(step).map_err(|error| at(Path::new("step"))(error))?;
        line.push(b'\n');
        let mut command = self.command(&self.template()?, disks, step.network.is_some());
        let mut child = build.interrupt.spawn(&mut command).map_err(at(&self.host_shim))?;
        let pid = child.id();
        let ended = self.attend(&mut child, &line, prefix, build);
        build.interrupt.unwatch(pid);
        build.interrupt.check()?;
        let Ended { status, timed_out, words } = ended?;
        if timed_out {
            let seconds = self.options.timeout.unwrap_or_default().as_secs();
            return Err(Error::Command { outcome: format!("was not done in {seconds} s, and was ended") });
        }
        if status.success() {
            return Ok(());
        }
        let own = |line: &String| line.starts_with("host-shim: ") || line.starts_with("envd: ");
        let said = words.iter().rev().find(|line| own(line)).cloned();
        let reason = said.unwrap_or_else(|| format!("host-shim ended with {status}"));
        Err(Error::Program { program: "the machine of the step".to_owned(), reason })
    }

    fn command(&self, template: &Path, disks: &[Disk], network: bool) -> Command {
        let options = &self.options;
        let mut command = Command::new(&self.host_shim);
        command.arg("run").arg(template).args(["--quiet", "--until-eof", "--user", "0", "--data-dir"]);
        command.arg(self.data.path());
        for (option, file) in [("--kernel", &options.kernel), ("--guest-image", &options.guest_image)] {
            if let Some(file) = file {
                command.arg(option).arg(file);
            }
        }
        let here = std::thread::available_parallelism().map_or(1, |cpus| cpus.get().min(MAX_CPUS) as u32);
        command.arg("--cpus").arg(options.cpus.unwrap_or(here).to_string());
        command.arg("--memory").arg(options.memory_mib.to_string());
        command.args(["--network", if network { "slirp" } else { "none" }]);
        for disk in disks {
            let mut value = OsString::from(&disk.serial);
            value.push(if disk.read_only { ":ro=" } else { "=" });
            value.push(&disk.file);
            command.arg("--attach").arg(value);
        }
        command.args(["--", AGENT, COMMAND]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // The terminal's Ctrl-C is for us; we end the machine.
        command.process_group(0);
        command
    }

    fn attend(
        &self,
        child: &mut Child,
        line: &[u8],
        prefix: &str,
        build: &VmBuild<'_>,
    ) -> Result<Ended, Error> {
        let raw = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let raw = raw.ok_or_else(|| at(&self.host_shim)(std::io::ErrorKind::InvalidData))?;
        let pidfd = pidfd_open(raw, PidfdFlags::empty()).map_err(at(&self.host_shim))?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (done, waits) = channel::<()>();
        std::thread::scope(|threads| {
            if let Some(stdout) = stdout {
                threads.spawn(|| drop(build.console.stream(prefix, stdout)));
            }
            let words = threads
                .spawn(|| stderr.map(|stderr| build.console.stream(prefix, stderr)).unwrap_or_default());
            let limit = threads.spawn(|| watch_time(self.options.timeout, waits, pidfd));
            // It is kept open until the end. Who does not read it has ended, and says why.
            let kept = stdin.map(|mut stdin| {
                let _ = stdin.write_all(line).and_then(|()| stdin.flush());
                stdin
            });
            let status = child.wait().map_err(at(&self.host_shim));
            drop((kept, done));
            let timed_out = limit.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            let words = words.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            Ok(Ended { status: status?, timed_out, words })
        })
    }

    /// The template of the machines: next to nothing, since the image of the step is a disk beside it.
    fn template(&self) -> Result<PathBuf, Error> {
        let mut known = self.template.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(path) = &*known {
            return Ok(path.clone());
        }
        let templates = self.data.cache().join(FOLDER);
        let path = templates.join(TEMPLATE);
        if TemplateFolder::open(&path).is_err() {
            make_template(&templates)?;
        }
        Ok(known.insert(path).clone())
    }
}

struct Ended {
    status: ExitStatus,
    timed_out: bool,
    /// The end of what was on stderr.
    words: Vec<String>,
}

/// Ends the process when the time is over; says whether it was. With host-shim its machine ends.
fn watch_time(limit: Option<Duration>, done: Receiver<()>, process: OwnedFd) -> bool {
    let Some(limit) = limit else { return false };
    match done.recv_timeout(limit) {
        Err(RecvTimeoutError::Timeout) => pidfd_send_signal(&process, Signal::KILL).is_ok(),
        Ok(()) | Err(RecvTimeoutError::Disconnected) => false,
    }
}

fn make_template(templates: &Path) -> Result<(), Error> {
    let name = TemplateName::from_str(TEMPLATE)?;
    let new = NewTemplate::begin(templates, &name)?;
    let mut tree = Tree::new();
    let mut add = |at: NodeId, name: &str, mode: u16, content: Content| {
        let node = tree.add(Node { attributes: Attributes { mode, ..Attributes::default() }, content });
        tree.link(at, name.as_bytes(), node, 0);
        node
    };
    let folder = || Content::Directory(Default::default());
    for name in ["dev", "proc", "run", "sys"] {
        add(NodeId::ROOT, name, 0o755, folder());
    }
    let etc = add(NodeId::ROOT, "etc", 0o755, folder());
    let data = FileData::Whole(Place { source: 0, offset: 0 });
    add(etc, "passwd", 0o644, Content::File { size: PASSWD.len() as u64, data });
    let mut source: &[&[u8]] = &[PASSWD];
    let report = write_tree(&mut tree, &Ext4::new(TEMPLATE.as_bytes()), &mut source, &new.rootfs())?;
    new.publish(&Template {
        schema_version: SCHEMA_VERSION,
        image: SourceImage { reference: TEMPLATE.to_owned(), digest: Hasher::digest_of(PASSWD) },
        kernel: None,
        guest_image: None,
        rootfs: Rootfs { digest: report.digest, size: report.size },
        runtime: RuntimeConfig::default(),
        machine: Machine { disk_mib: SCRATCH_MIB, ..Machine::default() },
        snapshot_only: false,
    })?;
    Ok(())
}
