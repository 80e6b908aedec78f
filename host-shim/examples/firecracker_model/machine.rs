//! What Firecracker accepts, when, and what it says otherwise.
//!
//! ```text
//! Fresh ──machine-config, boot-source, drives, vsock──► Configured ──InstanceStart──► Running ◄─Resumed─┐
//!   └────────────────────────snapshot/load──────────────────────────────────────────► Paused ──────────┤
//!                                                                                       ▲ └─snapshot/create
//!                                                                                       └────Paused──── Running
//! ```

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::guest;
use crate::ram::Ram;

/// A request that was not carried out.
#[derive(Debug)]
pub(crate) struct Fault {
    pub(crate) message: String,
    /// The process ends with it.
    pub(crate) fatal: bool,
}

impl Fault {
    pub(crate) fn refused(message: impl Into<String>) -> Self {
        Self { message: message.into(), fatal: false }
    }

    fn fatal(message: impl Into<String>) -> Self {
        Self { message: message.into(), fatal: true }
    }
}

#[derive(Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct MachineConfig {
    vcpu_count: u8,
    mem_size_mib: u64,
    #[serde(default)]
    smt: bool,
    #[serde(default)]
    track_dirty_pages: bool,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self { vcpu_count: 1, mem_size_mib: 128, smt: false, track_dirty_pages: false }
    }
}

#[derive(Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct BootSource {
    kernel_image_path: PathBuf,
    initrd_path: Option<PathBuf>,
    boot_args: Option<String>,
}

#[derive(Clone, Copy, Default, Deserialize, Serialize)]
enum CacheType {
    #[default]
    Unsafe,
    Writeback,
}

#[derive(Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Drive {
    drive_id: String,
    is_root_device: bool,
    #[serde(default)]
    cache_type: CacheType,
    is_read_only: bool,
    path_on_host: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PartialDrive {
    drive_id: String,
    path_on_host: Option<PathBuf>,
}

#[derive(Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Vsock {
    guest_cid: u32,
    uds_path: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Action {
    action_type: ActionType,
}

#[derive(Deserialize)]
enum ActionType {
    FlushMetrics,
    InstanceStart,
    SendCtrlAltDel,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VmState {
    state: Wanted,
}

#[derive(Deserialize)]
enum Wanted {
    Paused,
    Resumed,
}

#[derive(Default, Deserialize)]
enum SnapshotType {
    #[default]
    Full,
    Diff,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SnapshotCreate {
    mem_file_path: PathBuf,
    snapshot_path: PathBuf,
    #[serde(default)]
    snapshot_type: SnapshotType,
}

#[derive(Deserialize)]
enum BackendType {
    File,
    Uffd,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MemoryBackend {
    backend_type: BackendType,
    backend_path: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SnapshotLoad {
    snapshot_path: PathBuf,
    mem_backend: MemoryBackend,
    #[serde(default)]
    enable_diff_snapshots: bool,
    #[serde(default)]
    track_dirty_pages: bool,
    #[serde(default)]
    resume_vm: bool,
}

/// What the file of `--config-file` says.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Whole {
    boot_source: BootSource,
    drives: Vec<Drive>,
    machine_config: Option<MachineConfig>,
}

/// What a snapshot's state says: everything that a restored machine is not told anew.
#[derive(Deserialize, Serialize)]
struct State {
    model: String,
    machine: MachineConfig,
    drives: BTreeMap<String, Drive>,
    vsock: Option<Vsock>,
    boot_args: String,
}

/// A machine that runs, or stands still.
pub(crate) struct Vm {
    pub(crate) ram: RefCell<Ram>,
    pub(crate) drives: RefCell<BTreeMap<String, File>>,
    pub(crate) boot_args: String,
    pub(crate) uds: PathBuf,
    pub(crate) running: watch::Sender<bool>,
    /// Counts how often the guest's connections were cut.
    pub(crate) cut: watch::Sender<u64>,
}

/// The machine, from the beginning of the process.
#[derive(Default)]
pub(crate) struct Machine {
    machine: MachineConfig,
    boot: Option<BootSource>,
    drives: BTreeMap<String, Drive>,
    vsock: Option<(Vsock, UnixListener)>,
    /// Something of it was configured: it cannot be loaded any more.
    configured: bool,
    vm: Option<Rc<Vm>>,
}

impl Machine {
    /// The machine of a file.
    pub(crate) fn configured(text: &[u8]) -> Result<Self, String> {
        let whole: Whole = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        let mut this = Self::default();
        this.set_boot(whole.boot_source).map_err(|fault| fault.message)?;
        for drive in whole.drives {
            this.set_drive(&drive.drive_id.clone(), drive).map_err(|fault| fault.message)?;
        }
        if let Some(machine) = whole.machine_config {
            this.set_machine(machine).map_err(|fault| fault.message)?;
        }
        Ok(this)
    }

    /// Carries out a request.
    pub(crate) fn request(&mut self, method: &str, path: &str, body: &[u8]) -> Result<(), Fault> {
        let mut words = path.trim_start_matches('/').split_terminator('/');
        match (method, words.next().unwrap_or_default(), words.next()) {
            ("PUT" | "PATCH", _, _) if body.is_empty() => {
                Err(Fault::refused(format!("Empty {method} request.")))
            }
            ("PUT", "machine-config", None) => self.pre_boot()?.set_machine(parse(body)?),
            ("PUT", "boot-source", None) => self.pre_boot()?.set_boot(parse(body)?),
            ("PUT", "drives", Some(id)) => self.pre_boot()?.set_drive(id, parse(body)?),
            ("PUT", "vsock", None) => self.pre_boot()?.set_vsock(parse(body)?),
            ("PUT", "actions", None) => match parse::<Action>(body)?.action_type {
                ActionType::InstanceStart => self.pre_boot()?.start(),
                ActionType::FlushMetrics | ActionType::SendCtrlAltDel => self.vm().map(drop),
            },
            ("PUT", "snapshot", Some("load")) => self.pre_boot()?.load(parse(body)?),
            ("PUT", "snapshot", Some("create")) => self.create(parse(body)?),
            ("PATCH", "vm", None) => {
                let running = matches!(parse::<VmState>(body)?.state, Wanted::Resumed);
                self.vm()?.running.send_replace(running);
                Ok(())
            }
            ("PATCH", "drives", Some(id)) => self.change_drive(id, &parse(body)?),
            _ => Err(Fault::refused(format!("Invalid request method and/or path: {method} {path}."))),
        }
    }

    fn pre_boot(&mut self) -> Result<&mut Self, Fault> {
        match self.vm {
            None => Ok(self),
            Some(_) => {
                let message = "The requested operation is not supported after starting the microVM.";
                Err(Fault::refused(message))
            }
        }
    }

    fn vm(&self) -> Result<&Rc<Vm>, Fault> {
        let message = "The requested operation is not supported before starting the microVM.";
        self.vm.as_ref().ok_or_else(|| Fault::refused(message))
    }

    fn set_machine(&mut self, machine: MachineConfig) -> Result<(), Fault> {
        if !(1..=32).contains(&machine.vcpu_count)
            || machine.smt && !machine.vcpu_count.is_multiple_of(2) && machine.vcpu_count > 1
        {
            let message = "The vCPU number is invalid! The vCPU number can only be 1 or an even number when SMT is enabled.";
            return Err(Fault::refused(message));
        }
        if machine.mem_size_mib == 0 {
            return Err(Fault::refused("The memory size (MiB) is invalid."));
        }
        self.configured = true;
        self.machine = machine;
        Ok(())
    }

    fn set_boot(&mut self, boot: BootSource) -> Result<(), Fault> {
        self.configured = true;
        for (what, path) in [("kernel", Some(&boot.kernel_image_path)), ("initrd", boot.initrd_path.as_ref())]
        {
            if let Some(path) = path {
                File::open(path).map_err(|error| {
                    Fault::refused(format!("Boot source error: The {what} file cannot be opened: {error}"))
                })?;
            }
        }
        if boot.boot_args.as_ref().is_some_and(|line| line.len() > 2047) {
            return Err(Fault::refused("Boot source error: The kernel command line is invalid: too large"));
        }
        self.boot = Some(boot);
        Ok(())
    }

    fn set_drive(&mut self, id: &str, drive: Drive) -> Result<(), Fault> {
        self.configured = true;
        if !id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
            let message = "API Resource IDs can only contain alphanumeric characters and underscores.";
            return Err(Fault::refused(message));
        }
        if drive.drive_id != id {
            return Err(Fault::refused("The id from the path does not match the id from the body!"));
        }
        open_drive(&drive)?;
        self.drives.insert(id.to_owned(), drive);
        Ok(())
    }

    fn set_vsock(&mut self, vsock: Vsock) -> Result<(), Fault> {
        self.configured = true;
        if vsock.guest_cid < 3 {
            return Err(Fault::refused("Vsock config error: a CID of 3 or more"));
        }
        let listener = bind(&vsock.uds_path)?;
        self.vsock = Some((vsock, listener));
        Ok(())
    }

    fn start(&mut self) -> Result<(), Fault> {
        let Some(boot) = &self.boot else {
            let message = "Start microvm error: Cannot start microvm without kernel configuration.";
            return Err(Fault::refused(message));
        };
        let ram = Ram::empty(self.machine.mem_size_mib, self.machine.track_dirty_pages);
        let line = boot.boot_args.clone().unwrap_or_default();
        let files = self.drives.iter().map(|(id, drive)| Ok((id.clone(), open_drive(drive)?)));
        let files = files.collect::<Result<_, Fault>>()?;
        println!("Linux version 0.1 (model): {line}");
        self.begin(ram, files, line, true)
    }

    fn begin(
        &mut self,
        ram: Ram,
        drives: BTreeMap<String, File>,
        boot_args: String,
        running: bool,
    ) -> Result<(), Fault> {
        let (uds, listener) = match self.vsock.take() {
            Some((vsock, listener)) => {
                let other = listener.try_clone().map_err(|error| Fault::refused(error.to_string()))?;
                let uds = vsock.uds_path.clone();
                self.vsock = Some((vsock, listener));
                (uds, Some(other))
            }
            None => (PathBuf::new(), None),
        };
        let vm = Rc::new(Vm {
            ram: RefCell::new(ram),
            drives: RefCell::new(drives),
            boot_args,
            uds,
            running: watch::Sender::new(running),
            cut: watch::Sender::new(0),
        });
        self.vm = Some(Rc::clone(&vm));
        if let Some(listener) = listener {
            guest::begin(vm, listener);
        }
        Ok(())
    }

    fn load(&mut self, load: SnapshotLoad) -> Result<(), Fault> {
        if self.configured {
            let message = "Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources.";
            return Err(Fault::refused(message));
        }
        let failed = |reason: String| {
            Fault::fatal(format!("Load snapshot error: Failed to restore from snapshot: {reason}"))
        };
        if load.enable_diff_snapshots && load.track_dirty_pages {
            return Err(Fault::refused("Both the old and the new name of one field"));
        }
        if matches!(load.mem_backend.backend_type, BackendType::Uffd) {
            return Err(Fault::refused("The model has no handler of page faults"));
        }
        let text = std::fs::read(&load.snapshot_path).map_err(|error| failed(error.to_string()))?;
        let state: State = serde_json::from_slice(&text).map_err(|error| failed(error.to_string()))?;
        let counts = load.enable_diff_snapshots || load.track_dirty_pages;
        let ram =
            Ram::map(&load.mem_backend.backend_path, state.machine.mem_size_mib, counts).map_err(failed)?;
        let mut files = BTreeMap::new();
        for (id, drive) in &state.drives {
            files.insert(id.clone(), open_drive(drive).map_err(|fault| failed(fault.message))?);
        }
        if let Some(vsock) = state.vsock {
            let listener = bind(&vsock.uds_path).map_err(|fault| failed(fault.message))?;
            self.vsock = Some((vsock, listener));
        }
        self.machine = state.machine;
        self.drives = state.drives;
        self.begin(ram, files, state.boot_args, load.resume_vm)
    }

    fn create(&mut self, create: SnapshotCreate) -> Result<(), Fault> {
        let vm = Rc::clone(self.vm()?);
        let failed = |error: std::io::Error| Fault::refused(format!("Create snapshot error: {error}"));
        if *vm.running.borrow() {
            return Err(Fault::refused("Create snapshot error: Cannot save the microVM state: vCPUs run"));
        }
        // Before anything is written: a failure after this has cut the connections too.
        vm.cut.send_modify(|cut| *cut += 1);
        let state = State {
            model: "firecracker".to_owned(),
            machine: self.machine.clone(),
            drives: self.drives.clone(),
            vsock: self.vsock.as_ref().map(|(vsock, _)| vsock.clone()),
            boot_args: vm.boot_args.clone(),
        };
        let text = serde_json::to_vec(&state).map_err(|error| failed(error.into()))?;
        std::fs::write(&create.snapshot_path, text).map_err(failed)?;
        let mut ram = vm.ram.borrow_mut();
        match create.snapshot_type {
            SnapshotType::Full => ram.save_full(&create.mem_file_path),
            SnapshotType::Diff => ram.save_diff(&create.mem_file_path),
        }
        .map_err(failed)
    }

    fn change_drive(&mut self, id: &str, change: &PartialDrive) -> Result<(), Fault> {
        let vm = Rc::clone(self.vm()?);
        if change.drive_id != id {
            return Err(Fault::refused("The id from the path does not match the id from the body!"));
        }
        let Some(drive) = self.drives.get_mut(id) else {
            return Err(Fault::refused("Drive config error: Unable to patch the block device: not found"));
        };
        if let Some(path) = &change.path_on_host {
            drive.path_on_host.clone_from(path);
            vm.drives.borrow_mut().insert(id.to_owned(), open_drive(drive)?);
        }
        Ok(())
    }
}

fn parse<T: for<'de> Deserialize<'de>>(body: &[u8]) -> Result<T, Fault> {
    serde_json::from_slice(body).map_err(|error| {
        Fault::refused(format!("An error occurred when deserializing the json body of a request: {error}."))
    })
}

fn open_drive(drive: &Drive) -> Result<File, Fault> {
    let opened = File::options().read(true).write(!drive.is_read_only).open(&drive.path_on_host);
    opened.map_err(|error| {
        let path = drive.path_on_host.display();
        Fault::refused(format!("Drive config error: Unable to open the block device: {error} {path}"))
    })
}

fn bind(path: &Path) -> Result<UnixListener, Fault> {
    let bound = UnixListener::bind(path).and_then(|listener| {
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    bound
        .map_err(|error| Fault::refused(format!("Vsock config error: Cannot bind the vsock socket: {error}")))
}
