//! `pause`, `resume`, `snapshot`, `fork` and `configure`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::StreamExt;
use host_shim::dir::FORK_PREFIX;
use host_shim::run::TerminalWatch;
use host_shim::sandbox::Watch;
use sandbox_folder::{SPEC, SandboxId};
use serde_json::{Map, Value, json};
use template::{DataDir, TemplateName};
use tokio_util::sync::CancellationToken;

use super::end::report;
use super::error::{Error, FAILED};
use super::launch::{How, Launch};
use super::sandboxes::{NAME_LABEL, Sandbox, Sandboxes, write_private};
use super::{complain, interrupts, output, sandboxes, start};
use crate::cli::{self, Configure, Fork, Pause, Resume, Snapshot};

/// Until a shim is gone that has said that its sandbox is paused: it only frees the memory.
const PAUSED_DEADLINE: Duration = Duration::from_secs(60);

pub(crate) async fn pause(args: &Pause) -> Result<u8, Error> {
    let sandboxes = sandboxes(&args.given.data)?;
    // One after the other: each writes its memory to the same disk.
    let mut done = Vec::new();
    for given in &args.given.ids {
        done.push(pause_one(&sandboxes, given).await);
    }
    report(done)
}

async fn pause_one(sandboxes: &Sandboxes, given: &str) -> Result<(), Error> {
    let sandbox = sandboxes.find(given)?;
    let Some(shim) = sandbox.shim() else {
        let (id, phase) = (sandbox.id.clone(), sandbox.phase());
        return Err(Error::WrongPhase { id, phase, remedy: ": only one that runs can be paused" });
    };
    if sandbox.goes_with_its_shim() {
        let reason =
            format!("{given} goes when its shim does (start --rm, run): nothing would be left to resume");
        return Err(Error::invalid("sandbox", reason));
    }
    let paused = sandbox.api().pause().await;
    if let Err(error) = paused {
        return Err(sandbox.explain(Some(&shim), error.into()).await);
    }
    tokio::time::timeout(PAUSED_DEADLINE, shim.gone()).await.map_err(|_| {
        let source = std::io::Error::new(std::io::ErrorKind::TimedOut, "its host-shim does not end");
        Error::Io { action: "pause", path: sandbox.dir.clone(), source }
    })?;
    output::line(given)
}

pub(crate) async fn resume(args: &Resume) -> Result<u8, Error> {
    let data = args.data.resolve()?;
    let sandbox = Sandboxes(data.sandboxes()).find(&args.id)?;
    let phase = sandbox.phase();
    if sandbox.shim().is_some() {
        let id = sandbox.id.clone();
        return Err(Error::WrongPhase { id, phase, remedy: ": only a paused one can be resumed" });
    }
    if let Some(template) = &args.template {
        move_template(&sandbox, template)?;
    }
    let interrupt = interrupts()?;
    let watch = TerminalWatch::new(false);
    watch.step("resuming the sandbox");
    let mut launch = Launch::start(&sandbox.dir, data.path(), How::Resume)?;
    let ready = tokio::select! {
        ready = launch.ready() => ready,
        () = interrupt.first.cancelled() => Err(Error::Interrupted),
    };
    watch.step("");
    match ready {
        Ok(ready) if args.json => output::json_line(&ready).map(|()| 0),
        Ok(_) => output::line(&sandbox.id).map(|()| 0),
        Err(error) => {
            launch.end().await;
            Err(error)
        }
    }
}

/// Notes where the template of a sandbox is now.
fn move_template(sandbox: &Sandbox, template: &Path) -> Result<(), Error> {
    let template = std::path::absolute(template).map_err(Error::io("find", template))?;
    template::TemplateFolder::open(&template).map_err(host_shim::Error::from)?;
    let mut spec = sandbox.spec.clone();
    if !spec.is_object() {
        return Err(Error::invalid("sandbox", format!("{} has no {SPEC}", sandbox.dir.display())));
    }
    spec["template"] = json!(template);
    let path = sandbox.dir.join(SPEC);
    let fresh = sandbox.dir.join(".spec.json.new");
    let replace = || {
        write_private(&fresh, &serde_json::to_vec_pretty(&spec)?)?;
        std::fs::rename(&fresh, &path)
    };
    replace().map_err(Error::io("write", &path))
}

pub(crate) async fn snapshot(args: &Snapshot) -> Result<u8, Error> {
    let data = args.data.resolve()?;
    let name: TemplateName = args
        .name
        .parse()
        .map_err(|error: template::InvalidName| Error::invalid("name of a template", error.to_string()))?;
    let sandbox = Sandboxes(data.sandboxes()).find(&args.id)?;
    let path = data.templates().join(name.as_str());
    if path.exists() {
        let reason = format!("{} is there already: remove it, or take another name", path.display());
        return Err(Error::invalid("name of a template", reason));
    }
    std::fs::create_dir_all(data.templates()).map_err(Error::io("make the folder", data.templates()))?;
    let shim = running(&sandbox)?;
    let watch = TerminalWatch::new(false);
    watch.step("writing the snapshot");
    let made = sandbox.api().snapshot(&path).await;
    watch.step("");
    match made {
        Ok(made) if args.json => output::json_line(&made).map(|()| 0),
        Ok(_) => output::line(name.as_str()).map(|()| 0),
        Err(error) => Err(sandbox.explain(Some(&shim), error.into()).await),
    }
}

pub(crate) async fn configure(args: &Configure) -> Result<u8, Error> {
    let sandbox = sandboxes(&args.data)?.find(&args.id)?;
    let mut wish = Map::new();
    let mut set = |field: &str, value: Option<Value>| {
        if let Some(value) = value {
            wish.insert(field.to_owned(), value);
        }
    };
    let text = |value: &Option<String>| value.clone().map(Value::from);
    set("hostname", text(&args.hostname));
    set("user", text(&args.user));
    set("workdir", text(&args.workdir));
    set("access_token", text(&args.access_token));
    set("timeout_s", args.timeout.map(Value::from));
    let env = args.environment.read()?;
    set("env", (!env.is_empty()).then(|| json!(env)));
    let labels = cli::labels(&args.labels);
    set("labels", (!labels.is_empty()).then(|| json!(labels)));
    let shim = running(&sandbox)?;
    match sandbox.api().configure(&wish.into()).await {
        Ok(state) => output::json(&state).map(|()| 0),
        Err(error) => Err(sandbox.explain(Some(&shim), error.into()).await),
    }
}

pub(crate) async fn fork(args: &Fork) -> Result<u8, Error> {
    let data = args.data.resolve()?;
    let sandboxes = Sandboxes(data.sandboxes());
    let source = sandboxes.find(&args.id)?;
    let changes =
        Changes { env: args.environment.read()?, labels: cli::labels(&args.labels), timeout: args.timeout };
    let interrupt = interrupts()?;
    let shim = running(&source)?;
    let from = ForkFolder::new(&source.dir)?;
    let watch = TerminalWatch::new(args.json);
    watch.step("writing what the forks need");
    let forked = tokio::select! {
        forked = async { source.api().fork(&from.0).await } => forked,
        () = interrupt.first.cancelled() => return Err(Error::Interrupted),
    };
    let forked = match forked {
        Ok(forked) => forked,
        Err(error) => return Err(source.explain(Some(&shim), error.into()).await),
    };
    let Ok(Value::Object(spec)) = serde_json::to_value(&forked.spec) else {
        let reason = "host-shim's answer to /fork has no spec".to_owned();
        return Err(host_shim::Error::Ended { reason }.into());
    };
    let spec = changes.apply(spec);
    watch.step(&format!("starting {}", args.count));
    let at_once = std::thread::available_parallelism().map_or(2, |cpus| cpus.get() * 2);
    let starting = futures::stream::iter(0..args.count).map(|_| {
        let (sandboxes, spec, data, give_up) = (&sandboxes, spec.clone(), &data, &interrupt.first);
        async move { fork_one(sandboxes, spec, data, give_up).await }
    });
    let mut ready = starting.buffer_unordered(at_once);
    let (mut code, mut told) = (0, Ok(()));
    while let Some(one) = ready.next().await {
        // A line on stdout and a spinner on stderr are in each other's way on a terminal.
        watch.step("");
        let tell = match one {
            Ok((id, ready)) if args.json => output::json_line(&json!({"id": id, "ready": ready})),
            Ok((id, _)) => output::line(id.as_str()),
            Err(error) => {
                code = FAILED;
                complain(&error);
                match args.json {
                    true => output::json_line(&json!({"error": error.to_string()})),
                    false => Ok(()),
                }
            }
        };
        // Nobody reads any more: those that were asked for start nevertheless.
        told = told.and(tell);
    }
    told.map(|()| code)
}

async fn fork_one(
    sandboxes: &Sandboxes,
    spec: Map<String, Value>,
    data: &DataDir,
    give_up: &CancellationToken,
) -> Result<(SandboxId, Value), Error> {
    if give_up.is_cancelled() {
        return Err(Error::Interrupted);
    }
    let id = SandboxId::generate_here().map_err(Error::io("make", "an id"))?;
    let dir = sandboxes.create(&id, spec, false)?;
    let ready = start::begin(sandboxes, &dir, data.path(), None, give_up.cancelled()).await?;
    Ok((id, ready))
}

/// What the forks have otherwise than their source.
struct Changes {
    env: std::collections::BTreeMap<String, String>,
    labels: std::collections::BTreeMap<String, String>,
    timeout: Option<u64>,
}

impl Changes {
    fn apply(self, mut spec: Map<String, Value>) -> Map<String, Value> {
        // A name is one sandbox's.
        if let Some(Value::Object(labels)) = spec.get_mut("labels") {
            labels.remove(NAME_LABEL);
        }
        for (field, added) in [("env", self.env), ("labels", self.labels)] {
            let values = spec.entry(field).or_insert_with(|| json!({}));
            for (key, value) in added {
                if let Some(values) = values.as_object_mut() {
                    values.insert(key, value.into());
                }
            }
        }
        if let Some(seconds) = self.timeout {
            spec.insert("timeout_s".into(), seconds.into());
        }
        spec
    }
}

/// What the source writes for its forks; gone when they have started, or it was given up.
struct ForkFolder(PathBuf);

impl ForkFolder {
    /// In the source's own folder: where this process is killed it goes with the source.
    fn new(source: &Path) -> Result<Self, Error> {
        let random = SandboxId::generate("").map_err(Error::io("make", "a name"))?;
        Ok(Self(source.join(format!("{FORK_PREFIX}{random}"))))
    }
}

impl Drop for ForkFolder {
    fn drop(&mut self) {
        match std::fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                complain(&Error::io("remove", &self.0)(error));
            }
            _ => {}
        }
    }
}

/// The shim of a sandbox that somebody can ask for something.
fn running(sandbox: &Sandbox) -> Result<super::sandboxes::Shim, Error> {
    sandbox.shim().ok_or_else(|| {
        let (id, phase) = (sandbox.id.clone(), sandbox.phase());
        Error::WrongPhase { id, phase, remedy: ", not running" }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fork_has_its_sources_spec_with_the_changes_and_without_its_name() {
        let Value::Object(spec) = json!({
            "schema_version": 1, "template": "/t", "snapshot": "/s", "env": {"A": "1", "B": "2"},
            "labels": {"tiffin.name": "web", "job": "7"},
        }) else {
            unreachable!()
        };
        let changes = Changes {
            env: [("B".into(), "3".into())].into(),
            labels: [("n".into(), "1".into())].into(),
            timeout: Some(60),
        };
        let expected = json!({
            "schema_version": 1, "template": "/t", "snapshot": "/s", "env": {"A": "1", "B": "3"},
            "labels": {"job": "7", "n": "1"}, "timeout_s": 60,
        });
        assert_eq!(Value::Object(changes.apply(spec)), expected);
    }
}
