//! A model of Firecracker's public API, for tests of what drives it: no guest runs.
//!
//! ```text
//! firecracker --api-sock api --id ID [--level L] [--log-path P]     machine.rs  states, fields, order, errors
//!                                                                   ram.rs      pages, counted and written
//!             --no-api --config-file F                              guest.rs    an agent by a script, on hybrid vsock
//!             --version
//! ```
//!
//! After Firecracker's `swagger/firecracker.yaml`, `docs/vsock.md` and `docs/snapshotting/snapshot-support.md` (v1.16).
//! `MODEL_LOG` names a file that gets a line for each request; `MODEL_FAULT` is `METHOD PATH=FAULT`, where FAULT is `die`
//! (before the answer), `refuse`, `fail` (it is done and then refused), `full` (likewise, for want of
//! space), `garbage`, `silent`, `late` (the answer comes, and then the end), or `start=deaf`, `start=die`,
//! `kvm=no`; `MODEL_VERSION` is what it says to be.

mod guest;
mod http;
mod machine;
mod ram;

use std::cell::RefCell;
use std::io::{self, Write};
use std::path::PathBuf;
use std::rc::Rc;

use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};

use machine::Machine;

/// What the command line says.
#[derive(Default)]
struct Arguments {
    api: Option<PathBuf>,
    id: Option<String>,
    log: Option<PathBuf>,
    configuration: Option<PathBuf>,
    no_api: bool,
}

fn main() {
    let mut arguments = Arguments::default();
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().unwrap_or_else(|| usage(&format!("{word} needs a value")));
        match word.as_str() {
            "--version" => {
                let version = std::env::var("MODEL_VERSION").unwrap_or_else(|_| "1.16.1".to_owned());
                println!("Firecracker v{version}\n\nSupported snapshot data format versions: v9.0.0");
                return;
            }
            "--api-sock" => arguments.api = Some(value().into()),
            "--id" => arguments.id = Some(value()),
            "--log-path" => arguments.log = Some(value().into()),
            "--level" => {
                let level = value();
                if !["Error", "Warning", "Info", "Debug", "Trace", "Off"].contains(&level.as_str()) {
                    usage(&format!("no level {level}"));
                }
            }
            "--config-file" => arguments.configuration = Some(value().into()),
            "--no-api" => arguments.no_api = true,
            other => usage(&format!("Found argument '{other}' which wasn't expected")),
        }
    }
    if let Some(id) = &arguments.id
        && (id.is_empty()
            || id.len() > 64
            || !id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'))
    {
        usage("an id of 1 to 64 of letters, digits and -");
    }
    if let Some(path) = &arguments.log {
        let log = std::fs::File::options().create(true).truncate(false).read(true).write(true).open(path);
        let mut log = log.unwrap_or_else(|error| usage(&format!("--log-path {}: {error}", path.display())));
        writeln!(log, "Running the model").unwrap();
    }
    if arguments.no_api {
        return probe(&arguments.configuration.unwrap_or_else(|| usage("--no-api needs --config-file")));
    }
    if is_fault("start", "die") {
        eprintln!("Error: RunWithApi(FailedToBindSocket)");
        std::process::exit(1);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let socket = arguments.api.unwrap_or_else(|| usage("--api-sock is needed"));
    tokio::task::LocalSet::new().block_on(&runtime, serve(socket)).unwrap();
}

fn usage(reason: &str) -> ! {
    eprintln!("Error: ParseArguments({reason:?})");
    std::process::exit(153)
}

/// Boots a configuration without disks: its kernel finds no root.
fn probe(path: &std::path::Path) {
    let text = std::fs::read(path).unwrap();
    let machine = Machine::configured(&text).unwrap_or_else(|fault| {
        eprintln!("Error: RunWithoutApi({fault:?})");
        std::process::exit(152)
    });
    if is_fault("kvm", "no") {
        eprintln!("Error: Kvm(Error opening /dev/kvm)");
        std::process::exit(148);
    }
    drop(machine);
    println!("Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)");
}

/// Whether something is to go wrong at this place, in this way.
fn is_fault(place: &str, fault: &str) -> bool {
    std::env::var("MODEL_FAULT").is_ok_and(|asked| asked == format!("{place}={fault}"))
}

fn fault(place: &str) -> Option<String> {
    Some(std::env::var("MODEL_FAULT").ok()?.strip_prefix(place)?.strip_prefix('=')?.to_owned())
}

async fn serve(socket: PathBuf) -> io::Result<()> {
    if is_fault("start", "deaf") {
        return std::future::pending().await;
    }
    let listener = UnixListener::bind(&socket)?;
    let machine = Rc::new(RefCell::new(Machine::default()));
    loop {
        let (stream, _) = listener.accept().await?;
        let machine = Rc::clone(&machine);
        tokio::task::spawn_local(async move {
            // Whoever breaks its connection off does not want to know.
            let _ = exchange(stream, &machine).await;
        });
    }
}

async fn exchange(mut stream: UnixStream, machine: &RefCell<Machine>) -> io::Result<()> {
    let Some(request) = http::read(&mut stream).await? else { return Ok(()) };
    let place = format!("{} {}", request.method, request.path);
    if let Ok(log) = std::env::var("MODEL_LOG") {
        let mut log = std::fs::File::options().create(true).append(true).open(log)?;
        writeln!(log, "{place} {}", String::from_utf8_lossy(&request.body))?;
    }
    let done = match fault(&place).as_deref() {
        Some("die") => std::process::exit(1),
        Some("silent") => return std::future::pending().await,
        Some("garbage") => return stream.write_all(b"\0I am no server\r\n\r\n").await,
        Some("fail") => machine
            .borrow_mut()
            .request(&request.method, &request.path, &request.body)
            .and(Err(machine::Fault::refused("The model was told to fail at this."))),
        Some("full") => {
            let cut = machine.borrow_mut().request(&request.method, &request.path, &request.body);
            let error = io::Error::from_raw_os_error(28);
            cut.and(Err(machine::Fault::refused(format!("Cannot write memory file: {error}"))))
        }
        Some("refuse") => Err(machine::Fault::refused("The model was told to refuse this.")),
        _ => machine.borrow_mut().request(&request.method, &request.path, &request.body),
    };
    match done {
        Ok(()) => {
            // As it is: without a length.
            stream
                .write_all(b"HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n")
                .await?;
        }
        Err(machine::Fault { message, fatal }) => {
            let body = serde_json::json!({ "fault_message": message }).to_string();
            http::answer(&mut stream, "400 ", "application/json", body.as_bytes()).await?;
            if fatal {
                eprintln!("Error: RunWithApi(MicroVMStoppedWithError(GenericError))");
                std::process::exit(1);
            }
        }
    }
    if is_fault(&place, "late") {
        std::process::exit(1);
    }
    Ok(())
}
