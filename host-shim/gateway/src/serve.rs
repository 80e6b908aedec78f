//! `tiffin-gateway serve`: from the options to a gateway that serves, and to its end.

use std::sync::Arc;

use std::net::SocketAddr;

use anyhow::Context;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tiffin_gateway::base::{self, BaseError};
use tiffin_gateway::builds::Builds;
use tiffin_gateway::fleet::Fleet;
use tiffin_gateway::metrics::Metrics;
use tiffin_gateway::tls::{Source, Tls};
use tiffin_gateway::{Gateway, host, operator, server};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing_subscriber::EnvFilter;

use crate::cli::{LogFormat, Serve};
use crate::{BadInput, URL_FILE, exports, loopback_of, print, url_of};

/// Environment variable with the log's filter, the same as host-shim's.
const LOG_ENV: &str = "TIFFIN_LOG";

/// Serves until a signal says to stop.
pub(crate) async fn serve(args: &Serve) -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_env(LOG_ENV).unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match args.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    let mut config = args.config().map_err(|error| match error.is::<host::HostError>() {
        true => error,
        false => BadInput(format!("{error:#}")).into(),
    })?;
    let source = args.front.tls(config.data.path(), &config.domain, config.listen)?;
    let tls = source.map(Tls::open).transpose()?.map(Arc::new);
    let stop = stop_on_signal(tls.clone()).context("cannot listen for signals")?;
    if let Some(reason) = host::check(&config).await? {
        tracing::warn!(
            reason,
            "no hardware virtualization: sandboxes run emulated, slowly and behind no boundary"
        );
    }
    raise_open_files();
    // Before anything that takes long, so that a port that is taken is told at once.
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("cannot listen on {} (--listen names another address)", config.listen))?;
    let address = listener.local_addr().context("the listener has no address")?;

    config.domain = args.domain.shown(tls.is_some(), address.port());
    let data = config.data.clone();
    let store = operator::open_store(&data)?;
    let fleet = Fleet::open(config.clone(), store.clone()).await?;
    if args.makes_base() {
        let say = |what: &str| tracing::info!("{what}");
        match base::ensure(&config, &stop, say).await {
            Ok(_) => {}
            Err(BaseError::Interrupted) => return Ok(()),
            // Other templates serve without it.
            Err(error) => tracing::error!(%error, "there is no template `base`; the next start tries again"),
        }
    }
    fleet.start_pools(&args.pool);
    let builds = Builds::open(config.clone(), store.clone()).await?;
    let place = match &tls {
        None => url_of(address),
        Some(tls) => https_place(tls.source(), &config.domain, address),
    };
    std::fs::write(data.path().join(URL_FILE), format!("{place}\n"))
        .context("cannot write where it serves")?;
    print(&exports(&place, &data, &store).await?)?;

    let gateway = Arc::new(Gateway { config, store, fleet, builds, metrics: Metrics::default() });
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        tracing::warn!(%error, "cannot tell readiness to the service manager");
    }
    tracing::info!(%address, tls = tls.is_some(), sandboxes = gateway.fleet.all().len(), "serving");
    let limits = server::Limits { rates: args.front.rates(), ..server::Limits::default() };
    let kept = tls.clone().map(|tls| AbortOnDropHandle::new(tokio::spawn(tls.keep(Arc::clone(&gateway)))));
    server::serve_with(Arc::clone(&gateway), listener, tls, stop, limits)
        .await
        .context("the server failed")?;
    drop(kept);
    gateway.builds.close().await;
    tracing::info!(sandboxes = gateway.fleet.all().len(), "stopped; the sandboxes go on");
    Ok(())
}

/// What points clients at HTTPS: the URL, and below it further variables. The older SDKs build host names of the domain.
fn https_place(source: &Source, domain: &str, address: SocketAddr) -> String {
    match source {
        Source::Files(_) => format!("https://api.{domain}\nE2B_DOMAIN={domain}"),
        // Its certificates are for loopback too, so nothing needs DNS on this machine.
        Source::SelfSigned(authority) => {
            let (host, ca) = (loopback_of(address), authority.ca_file());
            let ca = std::path::absolute(&ca).unwrap_or(ca).display().to_string().replace('\'', r"'\''");
            format!("https://{host}\nE2B_DOMAIN={domain}\nNODE_EXTRA_CA_CERTS='{ca}'")
        }
    }
}

/// The usual soft limit of 1024 is for programs that call select(2).
fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.map_or(server::OPEN_FILES, |maximum| maximum.min(server::OPEN_FILES));
    if limit.current.is_some_and(|current| current < wanted)
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), ..limit })
    {
        tracing::warn!(%error, wanted, "cannot raise the limit of open files");
    }
}

/// Cancelled by SIGTERM, SIGINT or SIGHUP; a second one ends the process at once. With TLS, SIGHUP reads the certificate again
/// instead.
fn stop_on_signal(tls: Option<Arc<Tls>>) -> std::io::Result<CancellationToken> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let stop = CancellationToken::new();
    let token = stop.clone();
    tokio::spawn(async move {
        for again in [false, true] {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => break,
                    _ = terminate.recv() => break,
                    _ = hangup.recv() => match &tls {
                        Some(tls) => tls.reload(),
                        None => break,
                    }
                }
            }
            if again {
                // As good as kill -9, which loses nothing.
                std::process::exit(1);
            }
            tracing::info!("stopping; a second signal does not wait for calls in flight");
            if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Stopping]) {
                tracing::warn!(%error, "cannot tell the service manager");
            }
            token.cancel();
        }
    });
    Ok(stop)
}
