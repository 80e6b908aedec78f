//! Stats in others' words: E2B's JSON, and Prometheus's text format 0.0.4.

use std::fmt::Write;

use envd_proto::control::{ClassStats, Stats};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// What E2B's agent answers. Its keys are always there; what is not known is 0.
pub(crate) fn e2b_json(stats: &Stats) -> Value {
    json!({
        "ts": stats.unix_time_ns / 1_000_000_000,
        "cpu_count": stats.cpu_count,
        "cpu_used_pct": (stats.cpu_used_pct * 100.0).round() / 100.0,
        "mem_total": stats.memory_total,
        "mem_used": stats.memory_used,
        "mem_cache": stats.memory_cache,
        "mem_total_mib": stats.memory_total / MIB,
        "mem_used_mib": stats.memory_used / MIB,
        "disk_used": stats.disk_used.unwrap_or(0),
        "disk_total": stats.disk_total.unwrap_or(0),
    })
}

/// One metric of the exposition.
struct Family<'a> {
    name: &'a str,
    kind: &'a str,
    help: &'a str,
}

/// The text that Prometheus reads. What is not known has no sample.
pub(crate) fn prometheus(stats: &Stats) -> String {
    let mut out = String::new();
    let mut gauge = |name, help, value: Option<f64>| {
        family(&mut out, &Family { name, kind: "gauge", help }, value.map(|value| (String::new(), value)));
    };
    let bytes = |value: u64| Some(value as f64);
    gauge("tiffin_cpu_count", "CPUs of the sandbox.", Some(stats.cpu_count.into()));
    gauge("tiffin_cpu_used_percent", "Share of all CPUs that was not idle.", Some(stats.cpu_used_pct));
    gauge("tiffin_memory_total_bytes", "Memory of the sandbox.", bytes(stats.memory_total));
    gauge("tiffin_memory_used_bytes", "Memory that is not available for programs.", bytes(stats.memory_used));
    gauge("tiffin_memory_cache_bytes", "Memory that caches files.", bytes(stats.memory_cache));
    gauge("tiffin_disk_used_bytes", "Used in the root file system.", stats.disk_used.and_then(bytes));
    gauge("tiffin_disk_total_bytes", "Size of the root file system.", stats.disk_total.and_then(bytes));
    gauge("tiffin_agent_resident_bytes", "Memory of the agent itself.", stats.agent_resident.and_then(bytes));

    let mut by_class = |name, kind, help, value: fn(&ClassStats) -> Option<f64>| {
        let samples = stats.classes.iter().filter_map(|class| {
            // The names are the agent's own: nothing in them needs an escape.
            Some((format!("{{class=\"{}\"}}", class.name), value(class)?))
        });
        family(&mut out, &Family { name, kind, help }, samples);
    };
    by_class("tiffin_class_cpu_seconds_total", "counter", "CPU time of a class of processes.", |class| {
        class.cpu_usage_us.map(|us| us as f64 / 1e6)
    });
    by_class("tiffin_class_memory_bytes", "gauge", "Memory of a class of processes.", |class| {
        class.memory_current.map(|bytes| bytes as f64)
    });
    by_class("tiffin_class_processes", "gauge", "Processes and threads of a class.", |class| {
        class.pids_current.map(|count| count as f64)
    });
    by_class(
        "tiffin_class_oom_kills_total",
        "counter",
        "Processes killed because memory ran out.",
        |class| class.oom_kills.map(|count| count as f64),
    );
    out
}

fn family(out: &mut String, family: &Family<'_>, samples: impl IntoIterator<Item = (String, f64)>) {
    let Family { name, kind, help } = family;
    let mut samples = samples.into_iter().peekable();
    if samples.peek().is_none() {
        return;
    }
    // Writing to a String cannot fail.
    let _ = write!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    for (labels, value) in samples {
        let _ = writeln!(out, "{name}{labels} {value}");
    }
}

/// Whether an Accept header would rather have text than JSON (RFC 9110, 12.5.1). Whoever takes anything gets JSON.
pub(crate) fn prefers_prometheus(accept: &str) -> bool {
    let (mut text, mut json) = (0.0, None);
    let mut any: f32 = 0.0;
    for range in accept.split(',') {
        let mut parts = range.split(';').map(str::trim);
        let kind = parts.next().unwrap_or_default().to_ascii_lowercase();
        let weight = parts.find_map(|part| part.strip_prefix("q=")).map_or(Ok(1.0), str::parse::<f32>);
        let weight = weight.ok().filter(|weight| (0.0..=1.0).contains(weight)).unwrap_or(0.0);
        match kind.as_str() {
            "text/plain" | "application/openmetrics-text" => text = f32::max(text, weight),
            "application/json" => json = Some(weight),
            "*/*" | "application/*" => any = any.max(weight),
            _ => {}
        }
    }
    text > json.unwrap_or(any)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats() -> Stats {
        Stats {
            unix_time_ns: 1_700_000_000_500_000_000,
            cpu_count: 2,
            cpu_used_pct: 12.3456,
            memory_total: 256 << 20,
            memory_used: 64 << 20,
            memory_cache: 1000,
            disk_total: Some(5000),
            classes: vec![ClassStats {
                name: "user".into(),
                cpu_usage_us: Some(1_500_000),
                oom_kills: Some(2),
                ..ClassStats::default()
            }],
            ..Stats::default()
        }
    }

    #[test]
    fn the_json_has_e2bs_keys_and_no_others() {
        assert_eq!(
            e2b_json(&stats()),
            json!({"ts": 1_700_000_000, "cpu_count": 2, "cpu_used_pct": 12.35, "mem_total": 268_435_456,
                "mem_used": 67_108_864, "mem_cache": 1000, "mem_total_mib": 256, "mem_used_mib": 64,
                "disk_used": 0, "disk_total": 5000})
        );
    }

    #[test]
    fn the_text_is_prometheus_and_leaves_out_what_is_not_known() {
        let text = prometheus(&stats());
        assert!(text.starts_with("# HELP tiffin_cpu_count CPUs of the sandbox.\n# TYPE tiffin_cpu_count gauge\ntiffin_cpu_count 2\n"));
        assert!(text.contains("\ntiffin_class_cpu_seconds_total{class=\"user\"} 1.5\n"));
        assert!(text.contains(
            "# TYPE tiffin_class_oom_kills_total counter\ntiffin_class_oom_kills_total{class=\"user\"} 2\n"
        ));
        for absent in ["tiffin_disk_used_bytes", "tiffin_class_memory_bytes", "tiffin_agent_resident_bytes"] {
            assert!(!text.contains(absent), "{text}");
        }
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(name.starts_with("tiffin_") && value.parse::<f64>().is_ok(), "{line}");
        }
    }

    #[test]
    fn a_scraper_gets_text_and_everybody_else_json() {
        let scraper =
            "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1";
        for text in [scraper, "text/plain", "TEXT/PLAIN;q=0.9, application/json;q=0.8"] {
            assert!(prefers_prometheus(text), "{text}");
        }
        for json in
            ["", "*/*", "application/json, text/plain, */*", "text/html", "text/plain;q=0", "text/plain;q=x"]
        {
            assert!(!prefers_prometheus(json), "{json}");
        }
    }
}
