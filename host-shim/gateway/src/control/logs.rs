//! A sandbox's logs: what its console printed, and what its shim had to say. Output of its processes is not among them.
//!
//! ```text
//! console.log.1, console.log   lines of the guest's kernel, and the agent's JSON lines
//! shim.log                     JSON lines
//! ```
//!
//! A line without a time of its own has that of the line before it, or of the sandbox's start.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::{IntoParams, ToSchema};

use super::Control;
use super::access::OwnAlive;
use super::body::{Params, shown};
use super::types::{ErrorBody, to_millisecond};
use crate::ApiError;

/// Of each file, the end that is read: the console's files are no longer, the shim's may be.
const MAX_READ: u64 = 1 << 20;

/// Lines of one answer, at most and by default (E2B's own limit).
const MAX_LINES: usize = 1000;

/// The longest line of an answer; the rest is cut off.
const MAX_LINE: usize = 8 << 10;

/// The files, and what they are called in an entry's fields.
const FILES: [(&str, &str); 3] =
    [("console.log.1", "console"), ("console.log", "console"), ("shim.log", "shim")];

/// How much a line matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum LogLevel {
    Debug,
    Info,
    Warn,
    Error,
}

/// A line with what is known about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(super) struct SandboxLogEntry {
    #[schema(value_type = String, format = DateTime)]
    timestamp: Timestamp,
    message: String,
    level: LogLevel,
    /// What else the line says; `source` is `console` or `shim`.
    fields: BTreeMap<String, String>,
}

/// A line.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct SandboxLog {
    #[schema(value_type = String, format = DateTime)]
    timestamp: Timestamp,
    line: String,
}

/// Lines, twice.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct SandboxLogs {
    logs: Vec<SandboxLog>,
    log_entries: Vec<SandboxLogEntry>,
}

/// Lines.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct SandboxLogsV2 {
    logs: Vec<SandboxLogEntry>,
}

/// Which lines.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct LogsQuery {
    /// Not those before (milliseconds since 1970).
    start: Option<i64>,
    /// 1 to 1000, the default.
    limit: Option<usize>,
}

/// Which lines, in which order.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct LogsV2Query {
    /// Where to begin (milliseconds since 1970).
    cursor: Option<i64>,
    /// 1 to 1000, the default.
    limit: Option<usize>,
    /// `forward` in time from the cursor (the default), or `backward`.
    direction: Option<String>,
    /// The least level: `debug`, `info`, `warn` or `error`.
    level: Option<String>,
    /// Only those that hold this text, in whatever case.
    search: Option<String>,
}

/// A sandbox's logs, oldest first.
#[utoipa::path(get, path = "/sandboxes/{sandboxID}/logs", tag = "sandboxes", params(("sandboxID" = String, Path), LogsQuery),
    responses((status = 200, body = SandboxLogs), (status = "4XX", body = ErrorBody)))]
pub(super) async fn logs_v1(
    State(control): State<Arc<Control>>,
    own: OwnAlive,
    Params(query): Params<LogsQuery>,
) -> Result<Json<SandboxLogs>, ApiError> {
    let filter = Filter { cursor: query.start, limit: limit(query.limit)?, ..Filter::default() };
    let log_entries = control.logs(own, filter).await?;
    let line =
        |entry: &SandboxLogEntry| SandboxLog { timestamp: entry.timestamp, line: entry.message.clone() };
    Ok(Json(SandboxLogs { logs: log_entries.iter().map(line).collect(), log_entries }))
}

/// A sandbox's logs, from a cursor in either direction.
#[utoipa::path(get, path = "/v2/sandboxes/{sandboxID}/logs", tag = "sandboxes",
    params(("sandboxID" = String, Path), LogsV2Query),
    responses((status = 200, body = SandboxLogsV2), (status = "4XX", body = ErrorBody)))]
pub(super) async fn logs_v2(
    State(control): State<Arc<Control>>,
    own: OwnAlive,
    Params(query): Params<LogsV2Query>,
) -> Result<Json<SandboxLogsV2>, ApiError> {
    let filter = Filter {
        cursor: query.cursor,
        limit: limit(query.limit)?,
        backward: match query.direction.as_deref() {
            None | Some("" | "forward") => false,
            Some("backward") => true,
            Some(other) => return Err(invalid("direction", other, "`forward` or `backward`")),
        },
        level: match query.level.as_deref() {
            None | Some("") => LogLevel::Debug,
            Some(text) => {
                level(text).ok_or_else(|| invalid("level", text, "`debug`, `info`, `warn` or `error`"))?
            }
        },
        search: query.search.unwrap_or_default().to_lowercase(),
    };
    Ok(Json(SandboxLogsV2 { logs: control.logs(own, filter).await? }))
}

fn invalid(what: &str, value: &str, expected: &str) -> ApiError {
    ApiError::bad_request(format!("invalid {what} {:?}: expected {expected}", shown(value)))
}

fn limit(limit: Option<usize>) -> Result<usize, ApiError> {
    let limit = limit.unwrap_or(MAX_LINES);
    if (1..=MAX_LINES).contains(&limit) {
        return Ok(limit);
    }
    Err(invalid("limit", &limit.to_string(), &format!("1 to {MAX_LINES}")))
}

impl Control {
    async fn logs(
        &self,
        OwnAlive(sandbox): OwnAlive,
        filter: Filter,
    ) -> Result<Vec<SandboxLogEntry>, ApiError> {
        let _turn = self.log_reads.acquire().await.map_err(ApiError::internal)?;
        let read = move || read(&sandbox.dir, sandbox.record().started_at, &filter);
        tokio::task::spawn_blocking(read).await.map_err(ApiError::internal)?.map_err(ApiError::internal)
    }
}

#[derive(Debug)]
struct Filter {
    cursor: Option<i64>,
    limit: usize,
    backward: bool,
    level: LogLevel,
    search: String,
}

impl Default for Filter {
    fn default() -> Self {
        Self {
            cursor: None,
            limit: MAX_LINES,
            backward: false,
            level: LogLevel::Debug,
            search: String::new(),
        }
    }
}

fn read(dir: &Path, started_at: Timestamp, filter: &Filter) -> io::Result<Vec<SandboxLogEntry>> {
    let mut entries = Vec::new();
    let mut console = started_at;
    for (file, source) in FILES {
        let mut time = if source == "console" { console } else { started_at };
        for line in tail(&dir.join(file))?.lines().filter(|line| !line.trim().is_empty()) {
            let entry = entry(line, source, time);
            time = entry.timestamp;
            entries.push(entry);
        }
        // The older console file runs into the newer one.
        console = time;
    }
    // Stable: lines of one file that have no time of their own stay in their order.
    entries.sort_by_key(|entry| entry.timestamp);
    if filter.backward {
        entries.reverse();
    }
    entries.retain(|entry| filter.wants(entry));
    entries.truncate(filter.limit);
    Ok(entries)
}

impl Filter {
    fn wants(&self, entry: &SandboxLogEntry) -> bool {
        let time = entry.timestamp.as_millisecond();
        let reached =
            self.cursor.is_none_or(|cursor| if self.backward { time <= cursor } else { time >= cursor });
        reached
            && entry.level >= self.level
            && (self.search.is_empty() || entry.message.to_lowercase().contains(&self.search))
    }
}

/// The end of a file, from the beginning of a line on. A file that is not there is empty.
fn tail(path: &Path) -> io::Result<String> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
        Err(error) => return Err(error),
    };
    let skipped = file.metadata()?.len().saturating_sub(MAX_READ);
    file.seek(SeekFrom::Start(skipped))?;
    let mut bytes = Vec::new();
    file.take(MAX_READ).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    match text.split_once('\n') {
        Some((_, whole)) if skipped > 0 => Ok(whole.to_owned()),
        _ => Ok(text.into_owned()),
    }
}

/// A line, read as the JSON of the agent or the shim where it is that, else as it is.
fn entry(line: &str, source: &str, time: Timestamp) -> SandboxLogEntry {
    let mut fields = BTreeMap::from([("source".to_owned(), source.to_owned())]);
    let parsed = match serde_json::from_str(line.trim()) {
        Ok(Value::Object(object)) => structured(object, &mut fields),
        _ => None,
    };
    let (timestamp, level, message) = parsed.unwrap_or((None, LogLevel::Info, printable(line)));
    SandboxLogEntry { timestamp: to_millisecond(timestamp.unwrap_or(time)), message, level, fields }
}

type Parsed = (Option<Timestamp>, LogLevel, String);

/// `{"ts","level","message",..}` of the agent, `{"timestamp","level","fields":{"message",..},"target",..}` of the shim.
fn structured(mut object: Map<String, Value>, fields: &mut BTreeMap<String, String>) -> Option<Parsed> {
    if let Some(Value::Object(inner)) = object.remove("fields") {
        object.extend(inner);
    }
    let Some(Value::String(message)) = object.remove("message") else { return None };
    let time = object.remove("ts").or(object.remove("timestamp"));
    let time = time.as_ref().and_then(Value::as_str).and_then(|text| text.parse().ok());
    let named = object.remove("level").as_ref().and_then(Value::as_str).and_then(level);
    for (name, value) in object {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        fields.entry(printable(&name)).or_insert(printable(&text));
    }
    Some((time, named.unwrap_or(LogLevel::Info), printable(&message)))
}

fn level(text: &str) -> Option<LogLevel> {
    match text.to_ascii_lowercase().as_str() {
        "trace" | "debug" => Some(LogLevel::Debug),
        "info" => Some(LogLevel::Info),
        "warn" => Some(LogLevel::Warn),
        "error" => Some(LogLevel::Error),
        _ => None,
    }
}

/// A guest's text, without what acts on a terminal, and cut.
fn printable(text: &str) -> String {
    let mut out = String::new();
    for character in text.chars().filter(|&c| c == '\t' || !c.is_control()) {
        if out.len() + character.len_utf8() > MAX_LINE {
            break;
        }
        out.push(character);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn lines_of_all_files_come_by_their_time() {
        let dir = tempfile::tempdir().unwrap();
        let started: Timestamp = "2026-01-02T03:04:05Z".parse().unwrap();
        fs::write(dir.path().join("console.log.1"), "kernel says \x1b[31mhello\x1b[0m\r\n\n").unwrap();
        let console = "{\"ts\":\"2026-01-02T03:04:07.000Z\",\"level\":\"warn\",\"message\":\"agent\",\"name\":\"x\"}\nlater\n";
        fs::write(dir.path().join("console.log"), console).unwrap();
        let shim = r#"{"timestamp":"2026-01-02T03:04:06.5Z","level":"ERROR","fields":{"message":"shim","n":3},"target":"t"}"#;
        fs::write(dir.path().join("shim.log"), format!("{shim}\n{{\"broken")).unwrap();

        let all = read(dir.path(), started, &Filter::default()).unwrap();
        let seen: Vec<_> = all.iter().map(|entry| (entry.message.as_str(), entry.level)).collect();
        let expected = [
            ("kernel says [31mhello[0m", LogLevel::Info),
            ("shim", LogLevel::Error),
            ("{\"broken", LogLevel::Info),
            ("agent", LogLevel::Warn),
            ("later", LogLevel::Info),
        ];
        assert_eq!(seen, expected);
        assert_eq!(all[4].timestamp, all[3].timestamp);
        assert_eq!((all[1].fields["source"].as_str(), all[1].fields["n"].as_str()), ("shim", "3"));
        assert_eq!(all[3].fields["name"], "x");

        let messages = |filter: Filter| -> Vec<String> {
            read(dir.path(), started, &filter).unwrap().into_iter().map(|entry| entry.message).collect()
        };
        let backward = Filter { backward: true, limit: 2, ..Filter::default() };
        assert_eq!(messages(backward), ["later", "agent"]);
        let cursor = Some(started.as_millisecond() + 2000);
        assert_eq!(messages(Filter { cursor, ..Filter::default() }), ["agent", "later"]);
        assert_eq!(messages(Filter { cursor, backward: true, limit: 9, ..Filter::default() }).len(), 5);
        assert_eq!(messages(Filter { level: LogLevel::Error, ..Filter::default() }), ["shim"]);
        assert_eq!(messages(Filter { search: "hello".into(), ..Filter::default() }).len(), 1);
    }

    #[test]
    fn a_flood_is_read_from_its_end_and_from_a_lines_beginning() {
        let dir = tempfile::tempdir().unwrap();
        let line = format!("{}\n", "x".repeat(99));
        fs::write(dir.path().join("console.log"), line.repeat(20_000)).unwrap();
        let text = tail(&dir.path().join("console.log")).unwrap();
        assert!(text.len() as u64 <= MAX_READ && text.len() > 1_000_000);
        assert!(text.lines().all(|found| found.len() == 99));
        fs::write(dir.path().join("console.log"), "y".repeat(MAX_LINE * 2)).unwrap();
        let entries = read(dir.path(), Timestamp::UNIX_EPOCH, &Filter::default()).unwrap();
        assert_eq!(entries[0].message.len(), MAX_LINE);
    }
}
