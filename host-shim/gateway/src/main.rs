//! The program `tiffin-gateway`.

mod cli;
mod serve;

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Parser;
use serde_json::json;
use template::DataDir;
use tiffin_gateway::config::{Capacity, DEFAULT_PORT};
use tiffin_gateway::control;
use tiffin_gateway::host::HostError;
use tiffin_gateway::operator::{self, DEFAULT_TEAM};
use tiffin_gateway::rate::Rate;
use tiffin_gateway::store::{self, BackupError, Store, Team};
use tiffin_gateway::tls::Authority;

use cli::{Cli, Command, Env, Keys, Teams};

/// What a team may have that nobody has said anything about: E2B's free tier has as many sandboxes.
const DEFAULT_QUOTA: Capacity = Capacity { sandboxes: 20, cpus: 40, memory_mib: 20 << 10 };

/// The same for what its paused sandboxes and snapshots take of the disk, in MiB.
const DEFAULT_DISK_MIB: u64 = 50 << 10;

/// The file that says where a gateway of the data folder last served.
const URL_FILE: &str = "gateway.url";

/// The exit code of a host that cannot run sandboxes as it was asked to.
const UNFIT_HOST: u8 = 3;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("tiffin-gateway: cannot start the async runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let done = runtime.block_on(run(cli));
    // Nothing that still runs is waited for: every moment is one that the next start can go on from.
    runtime.shutdown_background();
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tiffin-gateway: {error:#}");
            exit_code(&error)
        }
    }
}

/// What cannot be what the user meant.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct BadInput(String);

fn exit_code(error: &anyhow::Error) -> ExitCode {
    match error.downcast_ref::<HostError>() {
        Some(HostError::NotExecutable { .. }) => return ExitCode::from(2),
        Some(_) => return ExitCode::from(UNFIT_HOST),
        None => {}
    }
    if error.is::<BadInput>() { ExitCode::from(2) } else { ExitCode::FAILURE }
}

async fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Serve(args) => serve::serve(&args).await,
        Command::Env(args) => env(&args).await,
        Command::Keys(command) => keys(command).await,
        Command::Teams(command) => teams(command).await,
        Command::Backup(args) => {
            let database = operator::database(&args.data.resolve()?);
            let made = tokio::task::spawn_blocking(move || store::backup(&database, &args.file, args.force));
            made.await?.map_err(|error| match error {
                BackupError::Exists(_) | BackupError::NoName(_) => BadInput(error.to_string()).into(),
                error => error.into(),
            })
        }
        Command::Ca(args) => print(&Authority::of(args.data.resolve()?.path(), &args.domain).certificate()?),
        Command::Openapi => print(&format!("{}\n", control::openapi().to_pretty_json()?)),
    }
}

async fn env(args: &Env) -> anyhow::Result<()> {
    let data = args.data.resolve()?;
    let place = match args.listen {
        Some(listen) => url_of(listen),
        None => match std::fs::read_to_string(data.path().join(URL_FILE)) {
            Ok(text) => text.trim().to_owned(),
            Err(_) => url_of(SocketAddr::from((Ipv4Addr::LOCALHOST, DEFAULT_PORT))),
        },
    };
    print(&exports(&place, &data, &operator::open_store(&data)?).await?)
}

/// The lines that point the SDKs here. `place` is the URL, and on further lines the variables that it takes to get there; they
/// are quoted where that is needed, addresses and keys never need it.
async fn exports(place: &str, data: &DataDir, store: &Store) -> anyhow::Result<String> {
    let key = operator::key(data, store).await?;
    let mut lines = place.lines();
    let url = lines.next().unwrap_or_default();
    let mut text =
        format!("export E2B_API_URL={url}\nexport E2B_SANDBOX_URL={url}\nexport E2B_API_KEY={key}\n");
    lines.for_each(|line| text.extend(["export ", line, "\n"]));
    Ok(text)
}

/// Where a client on this machine reaches a gateway that listens there.
fn url_of(listen: SocketAddr) -> String {
    format!("http://{}", loopback_of(listen))
}

/// The address that this machine reaches it at.
fn loopback_of(listen: SocketAddr) -> SocketAddr {
    let address: IpAddr = match listen.ip() {
        IpAddr::V4(any) if any.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(any) if any.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        address => address,
    };
    SocketAddr::new(address, listen.port())
}

async fn keys(command: Keys) -> anyhow::Result<()> {
    match command {
        Keys::Create { team, name, data } => {
            let store = operator::open_store(&data.resolve()?)?;
            let team = match team.as_str() {
                DEFAULT_TEAM => operator::default_team(&store).await?,
                team => find_team(&store, team).await?,
            };
            let key = operator::create_key(&store, &team, &name).await?;
            print(&format!("{}\n", key.as_str()))
        }
        Keys::List { json, data } => {
            let store = operator::open_store(&data.resolve()?)?;
            let keys = store.keys().await?;
            if json {
                return print(&format!("{}\n", serde_json::to_string(&keys)?));
            }
            let teams = store.teams().await?;
            let mut text = String::new();
            for key in keys {
                let team = teams.iter().find(|team| team.id == key.team).map_or("?", |team| &team.name);
                let made = key.created_at.strftime("%Y-%m-%d %H:%M UTC");
                writeln!(text, "{:>4}  …{}  {team:<16} {made}  {}", key.id, key.hint, key.name)?;
            }
            print(&text)
        }
        Keys::Revoke { id, data } => match operator::open_store(&data.resolve()?)?.revoke_key(id).await? {
            true => Ok(()),
            false => bail!(BadInput(format!("no key {id}: see `tiffin-gateway keys list`"))),
        },
    }
}

async fn teams(command: Teams) -> anyhow::Result<()> {
    match command {
        Teams::Create { name, limits, data } => {
            let store = operator::open_store(&data.resolve()?)?;
            if store.team_by_name(&name).await?.is_some() {
                bail!(BadInput(format!("there is a team {name:?} already")));
            }
            let team = store.create_team(&name, limits.over(DEFAULT_QUOTA)).await?;
            if let Some(rate) = limits.requests {
                store.set_rate(&team.id, rate.0).await?;
            }
            store.set_disk_quota(&team.id, limits.disk.map_or(DEFAULT_DISK_MIB, u64::from)).await?;
            print(&format!("{}\n", team.id))
        }
        Teams::List { json, data } => {
            let teams = operator::open_store(&data.resolve()?)?.teams().await?;
            if json {
                let list: Vec<_> = teams
                    .iter()
                    .map(|team| {
                        let rate = team.rate.map(Rate::requests);
                        json!({
                            "id": team.id, "name": team.name, "quota": team.quota, "disk_mib": team.disk_mib, "requests": rate,
                        })
                    })
                    .collect();
                return print(&format!("{}\n", serde_json::to_string(&list)?));
            }
            let shown = |limit: u64| match limit == u64::from(u32::MAX) {
                true => "unlimited".to_owned(),
                false => limit.to_string(),
            };
            let heads = ["SANDBOXES", "CPUS", "MiB", "DISK MiB", "REQUESTS/s"].map(str::to_owned);
            let line = |name: &str, rest: [String; 5]| {
                rest.into_iter().fold(format!("{name:<16}"), |line, cell| format!("{line} {cell:>10}")) + "\n"
            };
            let mut text = line("TEAM", heads);
            for Team { name, quota, rate, disk_mib, .. } in teams {
                let [sandboxes, cpus, memory, disk] =
                    [quota.sandboxes.into(), quota.cpus.into(), quota.memory_mib, disk_mib].map(shown);
                let rate = rate.map_or_else(|| "default".to_owned(), |rate| shown(rate.requests().into()));
                text += &line(&name, [sandboxes, cpus, memory, disk, rate]);
            }
            print(&text)
        }
        Teams::Builds { name, limits, data } => {
            let store = operator::open_store(&data.resolve()?)?;
            let team = find_team(&store, &name).await?;
            let changed = limits.over(store.build_limits(&team.id).await?);
            store.set_build_limits(&team.id, changed).await?;
            print(&format!("{}\n", serde_json::to_string(&changed)?))
        }
        Teams::Quota { name, limits, data } => {
            let store = operator::open_store(&data.resolve()?)?;
            let team = find_team(&store, &name).await?;
            store.set_quota(&team.id, limits.over(team.quota)).await?;
            if let Some(rate) = limits.requests {
                store.set_rate(&team.id, rate.0).await?;
            }
            store.set_disk_quota(&team.id, limits.disk.map_or(team.disk_mib, u64::from)).await?;
            Ok(())
        }
    }
}

async fn find_team(store: &Store, name: &str) -> anyhow::Result<Team> {
    match store.team_by_name(name).await? {
        Some(team) => Ok(team),
        None => bail!(BadInput(format!("no team {name:?}: see `tiffin-gateway teams list`"))),
    }
}

fn print(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        // `tiffin-gateway keys list | head` is no failure.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write to stdout"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_reaches_what_listens_everywhere() {
        for (listen, url) in [
            ("127.0.0.1:3000", "http://127.0.0.1:3000"),
            ("0.0.0.0:80", "http://127.0.0.1:80"),
            ("[::]:3000", "http://[::1]:3000"),
            ("192.0.2.1:3000", "http://192.0.2.1:3000"),
        ] {
            assert_eq!(url_of(listen.parse().unwrap()), url);
        }
    }
}
