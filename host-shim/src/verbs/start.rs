//! `start`: a folder, a shim of its own session, its readiness, and the command in it.

use std::path::Path;

use envd_proto::process::{OutputPolicy, ProcessConfig, StartOptions, StartRequest};
use host_shim::run::{self, TerminalWatch};
use host_shim::sandbox::Watch;
use sandbox_folder::SandboxId;
use sandbox_folder::spec::SandboxSpec;
use serde_json::{Map, Value};

use super::error::{Error, OURS};
use super::launch::{How, Launch};
use super::sandboxes::{NAME_LABEL, Sandbox, Sandboxes};
use super::{interrupts, output, tell};
use crate::cli::{self, Restore, Start};

/// The tag of the command that `start` starts, by which `logs` finds it.
pub(crate) const MAIN_TAG: &str = "tiffin.main";

/// How long the sandbox keeps the command's output after its end: as long as it may.
const KEEP_OUTPUT_S: u32 = 3600;

pub(crate) async fn start(args: &Start) -> u8 {
    match try_start(args).await {
        Ok(()) => 0,
        // A command that cannot be started has docker's codes.
        Err(Error::Client(error)) => {
            let error = host_shim::Error::Client(error);
            let code = run::exit_code(&error);
            tell(&Error::Shim(error), code)
        }
        Err(error) => tell(&error, OURS),
    }
}

async fn try_start(args: &Start) -> Result<(), Error> {
    let data = args.host.data.resolve()?;
    let sandboxes = Sandboxes(data.sandboxes());
    let interrupt = interrupts()?;
    let template = cli::find_template(&args.template, &data)?;
    let mut spec = args.machine.spec(&args.host, template)?;
    let argv = match args.command.is_empty() {
        true => None,
        false => Some(args.machine.argv(&spec, args.command.clone())?),
    };
    for path in
        [Some(&mut spec.template), spec.kernel.as_mut(), spec.guest_image.as_mut()].into_iter().flatten()
    {
        // The spec is read in another folder.
        *path = std::path::absolute(&*path).map_err(Error::io("find", &*path))?;
    }
    spec.hostname = args.hostname.clone();
    spec.labels = cli::labels(&args.labels);
    if let Some(name) = &args.name {
        spec.labels.insert(NAME_LABEL.to_owned(), name.clone());
    }
    let mut spec = object(&spec)?;
    if let Some(seconds) = args.timeout {
        spec.insert("timeout_s".into(), seconds.into());
    }
    if let Some(restore) = args.restore() {
        let word = if restore == Restore::Never { "never" } else { "always" };
        spec.insert("restore".into(), word.into());
    }
    let id = SandboxId::generate_here().map_err(Error::io("make", "an id"))?;
    let watch = TerminalWatch::new(args.quiet);
    watch.step("starting the sandbox");
    let dir = sandboxes.create(&id, spec, args.rm)?;
    let started = begin(&sandboxes, &dir, data.path(), argv, interrupt.first.cancelled()).await;
    watch.step("");
    let ready = started?;
    if args.json { output::json_line(&ready) } else { output::line(id.as_str()) }
}

/// Starts the shim of a folder that was made for it, and the command once the sandbox is ready. When that fails, or is
/// given up, nothing of it is left.
pub(crate) async fn begin(
    sandboxes: &Sandboxes,
    dir: &Path,
    data: &Path,
    argv: Option<Vec<String>>,
    give_up: impl Future<Output = ()>,
) -> Result<Value, Error> {
    let mut launch = match Launch::start(dir, data, How::Run) {
        Ok(launch) => launch,
        Err(error) => {
            sandboxes.remove(dir)?;
            return Err(error);
        }
    };
    let up = async {
        let ready = launch.ready().await?;
        if let Some(argv) = argv {
            start_command(dir, argv).await?;
        }
        Ok(ready)
    };
    let error = tokio::select! {
        ready = up => match ready {
            Ok(ready) => return Ok(ready),
            Err(error) => error,
        },
        () = give_up => Error::Interrupted,
    };
    launch.end().await;
    if let Err(error) = sandboxes.remove(dir) {
        super::complain(&error);
    }
    Err(error)
}

async fn start_command(dir: &Path, argv: Vec<String>) -> Result<(), Error> {
    let sandbox = Sandbox::open(dir).ok_or_else(|| Error::Ended { how: "its folder is gone".into() })?;
    let shim = sandbox.shim();
    match sandbox.raw_client().start(main_process(argv)).await {
        Ok(_) => Ok(()),
        Err(error) => Err(sandbox.explain(shim.as_ref(), error.into()).await),
    }
}

fn main_process(argv: Vec<String>) -> StartRequest {
    let mut argv = argv.into_iter();
    let process =
        ProcessConfig { cmd: argv.next().unwrap_or_default(), args: argv.collect(), ..Default::default() };
    let options = StartOptions {
        // Nobody reads until `logs` does: it must not wait for that.
        output_policy: OutputPolicy::Drop.into(),
        keep_ended_seconds: Some(KEEP_OUTPUT_S),
        ..StartOptions::default()
    };
    StartRequest {
        process: Some(process),
        tag: Some(MAIN_TAG.to_owned()),
        stdin: Some(false),
        options: Some(options),
        ..StartRequest::default()
    }
}

fn object(spec: &SandboxSpec) -> Result<Map<String, Value>, Error> {
    match serde_json::to_value(spec) {
        Ok(Value::Object(object)) => Ok(object),
        other => Err(Error::invalid("spec", format!("expected an object, got {other:?}"))),
    }
}
