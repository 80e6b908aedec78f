//! `stats`: what sandboxes use, from their agents' /metrics.

use std::collections::HashMap;
use std::io::{self, IsTerminal};
use std::time::Duration;

use http::{HeaderMap, HeaderValue, Method, header};
use http_body_util::{BodyExt, Empty, Limited};
use sandbox_folder::client::SandboxClient;
use serde::Serialize;

use super::error::{Error, FAILED};
use super::sandboxes::{Sandbox, Sandboxes};
use super::{complain, interrupts, output, sandboxes};
use crate::cli::Stats;

/// Between two looks, as `docker stats` has it.
const INTERVAL: Duration = Duration::from_secs(1);

/// Until a sandbox must have answered: one that hangs must not hide the others.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);

/// The longest answer that is read; there are some dozens of lines.
const MAX_ANSWER: usize = 1 << 20;

/// What one sandbox uses. What is not known is absent.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
struct Usage {
    id: String,
    name: Option<String>,
    /// Of one CPU.
    cpu_percent: Option<f64>,
    cpus: Option<u64>,
    memory_used: Option<u64>,
    memory_total: Option<u64>,
    disk_used: Option<u64>,
    disk_total: Option<u64>,
    pids: Option<u64>,
}

pub(crate) async fn stats(args: &Stats) -> Result<u8, Error> {
    let sandboxes = sandboxes(&args.data)?;
    let interrupt = interrupts()?;
    let redraw = !args.json && !args.no_stream && io::stdout().is_terminal();
    let mut tick = tokio::time::interval(INTERVAL);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = interrupt.first.cancelled() => return Ok(0),
        }
        let wanted = wanted(&sandboxes, &args.ids)?;
        let looked = tokio::select! {
            looked = futures::future::join_all(wanted.iter().map(look)) => looked,
            () = interrupt.first.cancelled() => return Ok(0),
        };
        let mut code = 0;
        let mut usages = Vec::new();
        for usage in looked {
            match usage {
                Ok(usage) => usages.push(usage),
                // One that nobody named may end at any time.
                Err(error) if !args.ids.is_empty() => {
                    complain(&error);
                    code = FAILED;
                }
                Err(_) => {}
            }
        }
        if args.json {
            for usage in &usages {
                output::json_line(usage)?;
            }
        } else {
            let rows: Vec<_> = usages.iter().map(row).collect();
            let heading = ["ID", "NAME", "CPU %", "MEM USAGE / LIMIT", "MEM %", "DISK USAGE / SIZE", "PIDS"];
            // Home, and clear what was there.
            let clear = if redraw { "\x1b[H\x1b[2J" } else { "" };
            output::print(&format!("{clear}{}", output::table(heading, &rows)))?;
        }
        if args.no_stream || code != 0 {
            return Ok(code);
        }
    }
}

fn wanted(sandboxes: &Sandboxes, ids: &[String]) -> Result<Vec<Sandbox>, Error> {
    if ids.is_empty() {
        return Ok(sandboxes.list()?.into_iter().filter(Sandbox::is_running).collect());
    }
    ids.iter().map(|id| sandboxes.find(id)).collect()
}

async fn look(sandbox: &Sandbox) -> Result<Usage, Error> {
    let shim = sandbox.shim();
    let client = sandbox.client()?;
    let text = match tokio::time::timeout(ANSWER_DEADLINE, metrics(&client)).await {
        Ok(Ok(text)) => text,
        Ok(Err(error)) => return Err(sandbox.explain(shim.as_ref(), error).await),
        Err(_) => return Err(Error::invalid("sandbox", format!("{} does not answer", sandbox.id))),
    };
    let mut usage = parse(&text);
    usage.id = sandbox.id.clone();
    usage.name = sandbox.name().map(str::to_owned);
    Ok(usage)
}

async fn metrics(client: &SandboxClient) -> Result<String, Error> {
    let headers = HeaderMap::from_iter([(header::ACCEPT, HeaderValue::from_static("text/plain"))]);
    let response = client.http(Method::GET, "/metrics", headers, Empty::new()).await?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
    let odd = |reason: String| Error::invalid("answer to /metrics", reason);
    let body = body.map_err(|error| odd(error.to_string()))?.to_bytes();
    if !status.is_success() {
        return Err(odd(format!("{status}: {}", String::from_utf8_lossy(&body))));
    }
    Ok(String::from_utf8_lossy(&body).into_owned())
}

/// Reads Prometheus's text format, as far as the agent writes it.
fn parse(text: &str) -> Usage {
    let mut sums: HashMap<&str, f64> = HashMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let Some((name, value)) = line.rsplit_once(' ') else { continue };
        let Ok(value) = value.parse::<f64>() else { continue };
        // Of a metric with labels: over all of them.
        *sums.entry(name.split('{').next().unwrap_or(name)).or_default() += value;
    }
    let number = |name: &str| sums.get(name).copied().filter(|value| value.is_finite() && *value >= 0.0);
    let bytes = |name: &str| number(name).map(|value| value as u64);
    let cpus = number("tiffin_cpu_count");
    let busy = number("tiffin_cpu_used_percent").zip(cpus).map(|(share, cpus)| share * cpus);
    Usage {
        // Two digits are more than the second of measuring is worth.
        cpu_percent: busy.map(|busy| (busy * 100.0).round() / 100.0),
        cpus: bytes("tiffin_cpu_count"),
        memory_used: bytes("tiffin_memory_used_bytes"),
        memory_total: bytes("tiffin_memory_total_bytes"),
        disk_used: bytes("tiffin_disk_used_bytes"),
        disk_total: bytes("tiffin_disk_total_bytes"),
        pids: bytes("tiffin_class_processes"),
        ..Usage::default()
    }
}

fn row(usage: &Usage) -> [String; 7] {
    let pair = |used: Option<u64>, total: Option<u64>| match (used, total) {
        (Some(used), Some(total)) => format!("{} / {}", output::size(used), output::size(total)),
        _ => "-".to_owned(),
    };
    let percent = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}%"));
    let memory = usage.memory_used.zip(usage.memory_total).filter(|(_, total)| *total > 0);
    [
        usage.id.clone(),
        usage.name.clone().unwrap_or_default(),
        percent(usage.cpu_percent),
        pair(usage.memory_used, usage.memory_total),
        percent(memory.map(|(used, total)| used as f64 / total as f64 * 100.0)),
        pair(usage.disk_used, usage.disk_total),
        usage.pids.map_or_else(|| "-".to_owned(), |pids| pids.to_string()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_metrics_become_a_row() {
        let usage = parse(
            "# HELP x y\ntiffin_cpu_count 2\ntiffin_cpu_used_percent 25.5\ntiffin_memory_used_bytes 1048576\n\
             tiffin_memory_total_bytes 4194304\ntiffin_class_processes{class=\"user\"} 3\n\
             tiffin_class_processes{class=\"init\"} 1\ntiffin_disk_total_bytes NaN\nnonsense\n",
        );
        let expected = Usage {
            cpu_percent: Some(51.0),
            cpus: Some(2),
            memory_used: Some(1 << 20),
            memory_total: Some(4 << 20),
            pids: Some(4),
            ..Usage::default()
        };
        assert_eq!(usage, expected);
        assert_eq!(row(&usage)[2..], ["51.00%", "1.0MiB / 4.0MiB", "25.00%", "-", "4"]);
        assert_eq!(parse(""), Usage::default());
    }
}
