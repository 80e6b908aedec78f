//! The program `host-shim`.

mod cli;
mod verbs;

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use host_shim::dir::{self, SandboxDir};
use host_shim::doctor::Facts;
use host_shim::run::{Interrupt, Served, StdinEnd, TerminalWatch};
use host_shim::sandbox::{Aim, GuestEnd};
use host_shim::snapshot::SnapshotFolder;
use host_shim::spec::CheckedSpec;
use host_shim::warm::Choices;
use host_shim::{Error, log, reaper, run, vmm, warm};
use sandbox_folder::spec::SandboxSpec;
use sandbox_folder::{SNAPSHOT, SPEC};

use cli::{Cli, Command, Doctor, Run, Sweep, Template, TemplateCommand, VmmExec};

/// The exit code of a shim whose sandbox is paused.
const PAUSED: u8 = 3;

/// The exit code of `template warm` where the host misses what sandboxes need.
const MISSING: u8 = 4;

fn main() -> ExitCode {
    verbs::complete::answer_shell();
    let code = match Cli::parse().command {
        // The hidden ones need no runtime.
        Command::VmmExec(VmmExec { parent, program, args }) => {
            let error = vmm::process::exec(parent, &program, &args);
            eprintln!("host-shim: cannot execute {}: {error}", program.display());
            127
        }
        Command::NetworkHelper { args } => {
            return sandbox_network::helper::main(&args, host_shim::network::helper());
        }
        Command::Reap { folder } => result(reaper::reap(std::io::stdin(), &folder).map(|()| 0)),
        Command::Spec(_) => result(print_schema().map(|()| 0)),
        Command::Sweep(sweep) => result(sweep_all(&sweep)),
        Command::Doctor(doctor) => result(on_this_thread(examine(&doctor))),
        Command::Template(command) => result(on_this_thread(template(&command))),
        Command::Run(run) if run.spec.is_some() || run.resume => result(on_this_thread(serve(&run))),
        Command::Run(run) => on_this_thread(command(&run)).unwrap_or_else(|error| {
            eprintln!("host-shim: {error}");
            run::exit_code(&error)
        }),
        verb => result(on_this_thread(async move { Ok(verbs::run(&verb).await.unwrap_or(2)) })),
    };
    // Not by returning: a thread that reads the terminal cannot be joined.
    let _ = std::io::stdout().flush();
    std::process::exit(code.into())
}

/// Runs on the main thread: children are bound to the life of the thread that started them.
fn on_this_thread<T>(work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime =
        runtime.map_err(|source| Error::Io { action: "start", path: "the async runtime".into(), source })?;
    let done = runtime.block_on(work);
    runtime.shutdown_background();
    done
}

fn result(result: Result<u8, Error>) -> u8 {
    result.unwrap_or_else(|error| {
        eprintln!("host-shim: {error}");
        if error.is_bad_input() { 2 } else { 1 }
    })
}

async fn command(args: &Run) -> Result<u8, Error> {
    let data = args.host.data.resolve()?;
    let (spec, argv) = args.template_spec(&data)?;
    let spec = CheckedSpec::new(spec)?;
    let sandboxes = data.sandboxes();
    let interrupt = listen()?;
    if let Err(error) = dir::sweep(&sandboxes) {
        // What others left must not stop this sandbox.
        eprintln!("host-shim: note: cannot sweep old sandboxes: {error}");
    }
    let dir = SandboxDir::create(&sandboxes, &spec.id)?;
    log::init(&dir.file("shim.log"))?;
    let watch = TerminalWatch::new(args.quiet);
    let input = if args.until_eof { StdinEnd::Sandbox } else { StdinEnd::Process };
    let report = run::command(dir, spec, argv, input, &data.cache(), &interrupt, &watch).await?;
    if args.timings {
        for phase in &report.phases {
            eprintln!("{:>10.1} ms  {}", phase.ms, phase.name);
        }
        eprintln!("{:>10.1} ms  to the command's start", report.ready_ms);
    }
    if args.json {
        eprintln!("{}", json(&report)?);
    }
    Ok(report.exit_code)
}

async fn serve(args: &Run) -> Result<u8, Error> {
    let Some(folder) = &args.dir else { return Ok(2) };
    if args.new_session {
        rustix::process::setsid().map_err(|source| Error::Io {
            action: "begin",
            path: "a session (the leader of a process group cannot)".into(),
            source: source.into(),
        })?;
    }
    let data = args.host.data.resolve()?;
    let interrupt = listen()?;
    let (dir, spec, aim) = match &args.spec {
        // Where there is a paused sandbox nothing else is needed to go on, neither the spec nor its template.
        Some(file) if !(args.resume && is_paused(folder)) => fresh(args, file, folder)?,
        _ => paused(args, folder)?,
    };
    log::init(&dir.file("shim.log"))?;
    let watch = TerminalWatch::new(args.quiet);
    match run::serve(dir, spec, aim, &data.cache(), &interrupt, &watch).await? {
        Served::Ended(GuestEnd::PoweredOff) => Ok(0),
        Served::Ended(GuestEnd::Crashed(message)) => {
            eprintln!("host-shim: the sandbox ended: {message}");
            Ok(1)
        }
        Served::Paused => Ok(PAUSED),
        Served::Withdrawn => {
            eprintln!("host-shim: stopped before the sandbox was ready");
            Ok(0)
        }
    }
}

fn is_paused(folder: &Path) -> bool {
    folder.join(SNAPSHOT).exists()
}

/// The sandbox that a spec describes.
fn fresh(args: &Run, file: &Path, folder: &Path) -> Result<(SandboxDir, CheckedSpec, Aim), Error> {
    let mut spec = SandboxSpec::read(file)?;
    spec.kernel = spec.kernel.or_else(|| args.host.kernel.clone());
    spec.guest_image = spec.guest_image.or_else(|| args.host.guest_image.clone());
    let spec = CheckedSpec::new(spec)?;
    let dir = SandboxDir::adopt(folder)?;
    if is_paused(folder) {
        if args.resume {
            // The shim that has paused it had the folder until now.
            return go_on(args, dir, SandboxSpec::read(&folder.join(SPEC))?);
        }
        let reason = format!("{} has a paused sandbox: resume it, or remove the folder", folder.display());
        return Err(Error::Invalid { what: "sandbox folder".to_owned(), reason });
    }
    if !file.exists() {
        // Whoever gives up on a sandbox whose shim has no lock yet removes the folder and can be sure: nothing starts.
        dir.withdraw()?;
        let reason = format!("{} is gone: its caller has given up", file.display());
        return Err(Error::Invalid { what: "spec".to_owned(), reason });
    }
    Ok((dir, spec, if args.park { Aim::Park } else { Aim::Run }))
}

/// The sandbox that is paused in a folder.
fn paused(args: &Run, folder: &Path) -> Result<(SandboxDir, CheckedSpec, Aim), Error> {
    // Before the folder is taken, which would make one that is not there.
    let spec = SandboxSpec::read(&folder.join(SPEC))?;
    go_on(args, SandboxDir::adopt(folder)?, spec)
}

fn go_on(
    args: &Run,
    dir: SandboxDir,
    mut spec: SandboxSpec,
) -> Result<(SandboxDir, CheckedSpec, Aim), Error> {
    if let Some(template) = &args.template {
        spec.template = args.template_path(template)?;
    }
    spec.kernel = args.host.kernel.clone().or(spec.kernel);
    let snapshot = SnapshotFolder::open(&dir.snapshot())?;
    let spec = CheckedSpec::of_paused(spec, &snapshot)?;
    Ok((dir, spec, Aim::Resume(Arc::new(snapshot))))
}

async fn template(command: &Template) -> Result<u8, Error> {
    let TemplateCommand::Warm(args) = &command.command;
    let data = args.host.data.resolve()?;
    let interrupt = listen()?;
    let watch = TerminalWatch::new(args.quiet);
    let choices = Choices {
        kernel: args.host.kernel.clone(),
        guest_image: args.host.guest_image.clone(),
        vmm: args.vmm,
        accelerator: args.accel,
        boot_timeout_s: Some(args.boot_timeout),
    };
    if let Err(error) = dir::sweep(&data.sandboxes()) {
        // What others left must not stop this one.
        eprintln!("host-shim: note: cannot sweep old sandboxes: {error}");
    }
    let mut failed = false;
    for template in args.templates(&data)? {
        let done =
            warm::warm(&template, &choices, &data.sandboxes(), &data.cache(), &interrupt, &watch).await;
        match done {
            Ok(warmed) if args.json => print(&format!("{}\n", json(&warmed)?))?,
            Ok(warmed) => print(&format!("{}\n", warmed.snapshot.display()))?,
            // The others are warmed, whatever one's commands do.
            Err(error) if args.all && !interrupt.first.is_cancelled() => {
                eprintln!("host-shim: {}: {error}", template.path().display());
                failed = true;
            }
            Err(error @ Error::Missing { .. }) => {
                eprintln!("host-shim: {error}");
                return Ok(MISSING);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(u8::from(failed))
}

fn listen() -> Result<Interrupt, Error> {
    Interrupt::listen().map_err(|source| Error::Io { action: "listen for", path: "signals".into(), source })
}

async fn examine(args: &Doctor) -> Result<u8, Error> {
    let host = &args.host;
    let data = host.data.resolve()?;
    let report = Facts::gather(&data, host.kernel.as_deref(), host.guest_image.as_deref()).await?.judge();
    if args.json {
        print(&format!("{}\n", json(&report)?))?;
    } else {
        print(&report.table())?;
    }
    Ok(if report.ready { 0 } else { 1 })
}

fn sweep_all(args: &Sweep) -> Result<u8, Error> {
    let swept = dir::sweep(&args.data.resolve()?.sandboxes())?;
    if args.json {
        let list: Vec<_> =
            swept.iter().map(|(path, done)| serde_json::json!({ "path": path, "done": done })).collect();
        print(&format!("{}\n", json(&list)?))?;
    } else {
        for (path, done) in &swept {
            let done = if *done == dir::Swept::Removed { "removed" } else { "cleaned" };
            print(&format!("{done}  {}\n", path.display()))?;
        }
    }
    Ok(0)
}

fn print_schema() -> Result<(), Error> {
    let text = serde_json::to_string_pretty(&SandboxSpec::schema()).map_err(encoding)?;
    print(&format!("{text}\n"))
}

fn print(text: &str) -> Result<(), Error> {
    let written = std::io::stdout().lock().write_all(text.as_bytes());
    written.map_err(|source| Error::Io { action: "write", path: "stdout".into(), source })
}

fn json(value: &impl serde::Serialize) -> Result<String, Error> {
    serde_json::to_string(value).map_err(encoding)
}

fn encoding(error: serde_json::Error) -> Error {
    Error::Io { action: "write", path: "JSON".into(), source: error.into() }
}
