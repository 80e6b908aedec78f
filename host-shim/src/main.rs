//! The program `host-shim`.

mod cli;
mod verbs;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use host_shim::dir::{self, SandboxDir};
use host_shim::doctor::Facts;
use host_shim::run::{Interrupt, TerminalWatch};
use host_shim::sandbox::GuestEnd;
use host_shim::spec::CheckedSpec;
use host_shim::{Error, log, reaper, run, vmm};
use sandbox_folder::spec::SandboxSpec;

use cli::{Cli, Command, Doctor, Run, Sweep, VmmExec};

fn main() -> ExitCode {
    verbs::complete::answer_shell();
    let code = match Cli::parse().command {
        // The hidden ones need no runtime.
        Command::VmmExec(VmmExec { parent, program, args }) => {
            let error = vmm::process::exec(parent, &program, &args);
            eprintln!("host-shim: cannot execute {}: {error}", program.display());
            127
        }
        Command::Reap { folder } => result(reaper::reap(std::io::stdin(), &folder).map(|()| 0)),
        Command::Spec(_) => result(print_schema().map(|()| 0)),
        Command::Sweep(sweep) => result(sweep_all(&sweep)),
        Command::Doctor(doctor) => result(on_this_thread(examine(&doctor))),
        Command::Run(run) if run.spec.is_some() => result(on_this_thread(serve(&run))),
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
    let report = run::command(dir, spec, argv, &data.cache(), &interrupt, &watch).await?;
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
    let (Some(file), Some(folder)) = (&args.spec, &args.dir) else { return Ok(2) };
    if args.new_session {
        rustix::process::setsid().map_err(|source| Error::Io {
            action: "begin",
            path: "a session (the leader of a process group cannot)".into(),
            source: source.into(),
        })?;
    }
    let mut spec = SandboxSpec::read(file)?;
    spec.kernel = spec.kernel.or_else(|| args.host.kernel.clone());
    spec.guest_image = spec.guest_image.or_else(|| args.host.guest_image.clone());
    let spec = CheckedSpec::new(spec)?;
    let data = args.host.data.resolve()?;
    let interrupt = listen()?;
    let dir = SandboxDir::adopt(folder)?;
    if !file.exists() {
        // Whoever gives up on a sandbox whose shim has no lock yet removes the folder and can be sure: nothing starts.
        dir.withdraw()?;
        let reason = format!("{} is gone: its caller has given up", file.display());
        return Err(Error::Invalid { what: "spec".to_owned(), reason });
    }
    log::init(&dir.file("shim.log"))?;
    let watch = TerminalWatch::new(args.quiet);
    match run::serve(dir, spec, &data.cache(), &interrupt, &watch).await? {
        GuestEnd::PoweredOff => Ok(0),
        GuestEnd::Crashed(message) => {
            eprintln!("host-shim: the sandbox ended: {message}");
            Ok(1)
        }
    }
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
