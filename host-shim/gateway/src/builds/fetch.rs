//! A template that is not on this machine, fetched from the registry that its build was pushed to.

use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use axum::http::StatusCode;
use tokio_util::sync::CancellationToken;

use super::limits::Folders;
use super::name::{BuildId, folder};
use super::process::{Ended, run};
use super::runner;
use crate::ApiError;
use crate::config::Config;
use crate::store::BuildRecord;

/// How long it may take; its sandbox's client waits.
const DEADLINE: Duration = Duration::from_secs(600);

/// Seconds after which a registry that did not answer may be asked again.
const RETRY_SECONDS: u32 = 10;

/// Fetches the template of a build, by the digest of what was pushed. Several at once fetch it once.
pub(crate) async fn fetch(config: &Config, build: &BuildRecord) -> Result<(), ApiError> {
    let (config, build) = (config.clone(), build.clone());
    // On a task of its own: a client that goes away leaves a fetch that others wait for.
    tokio::spawn(async move { try_fetch(&config, &build).await }).await.map_err(ApiError::internal)?
}

async fn try_fetch(config: &Config, build: &BuildRecord) -> Result<(), ApiError> {
    let name = folder(&build.template, &build.id);
    let missing = |why: String| {
        let message =
            format!("the build {} of the template {} is not on this machine{why}", build.id, build.template);
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message)
    };
    let (Some(registry), Some(digest)) = (&config.builds.registry, &build.digest) else {
        return Err(missing(": build it again".to_owned()));
    };
    let builds = Folders::of(&config.data).builds;
    let (path, target) = (builds.join(format!(".fetch-{name}")), config.data.templates().join(&name));
    let lock = move || {
        fs::create_dir_all(&builds)?;
        let file = File::options().create(true).truncate(false).write(true).mode(0o600).open(&path)?;
        file.lock()?;
        Ok::<_, std::io::Error>((file, path))
    };
    let (_lock, lock_path) =
        tokio::task::spawn_blocking(lock).await.map_err(ApiError::internal)?.map_err(ApiError::internal)?;
    if target.join(template::TEMPLATE_FILE).exists() {
        return Ok(());
    }
    let mut command = runner::command(config);
    command.args(["template", "pull", &registry.source(&build.team, &build.template, digest), &name]);
    command.args(["--progress", "quiet"]);
    let configuration = lock_path.with_extension("conf");
    if let Some(text) = registry.configuration() {
        fs::write(&configuration, text).map_err(ApiError::internal)?;
        command.arg("--registries-conf").arg(&configuration);
    }
    let stop = CancellationToken::new();
    let timer = tokio::spawn({
        let stop = stop.clone();
        async move {
            tokio::time::sleep(DEADLINE).await;
            stop.cancel();
        }
    });
    let mut words = String::new();
    let marked = BuildId::generate().map_err(ApiError::internal)?;
    let ended = run(&mut command, &marked, &stop, config.builds.grace, |line| words = line.to_owned()).await;
    timer.abort();
    let _ = fs::remove_file(configuration);
    // Whoever waits for the lock has the file open, and finds the template.
    let _ = fs::remove_file(lock_path);
    match ended.map_err(ApiError::internal)? {
        Ended::Itself(status, _) if status.success() => {
            tracing::info!(template = name, "fetched a template from the registry");
            Ok(())
        }
        ended => {
            tracing::error!(template = name, ?ended, words, "a template cannot be fetched from the registry");
            let why = match ended {
                Ended::Told => format!("it took longer than {} s", DEADLINE.as_secs()),
                Ended::Itself(..) => words.strip_prefix("image-builder: ").unwrap_or(&words).to_owned(),
            };
            Err(missing(format!(", and the registry {registry} does not give it: {why}"))
                .retry_after(RETRY_SECONDS))
        }
    }
}
