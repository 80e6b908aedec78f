//! `debug`: what helps whoever reads a report of a fault.

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use host_shim::doctor::Facts;
use serde_json::Value;

use super::error::Error;
use super::sandboxes::{Sandbox, Sandboxes, plain};
use super::{list, output};
use crate::cli::Debug;

/// Lines of each log that are printed.
const LINES: usize = 40;

/// How much of each log's end is looked at for printing, and is put into a bundle.
const MAX_PRINTED: u64 = 64 << 10;
const MAX_BUNDLED: u64 = 4 << 20;

/// How much of a file of /proc is read.
const MAX_PROC: u64 = 64 << 10;

/// One part of the report.
struct Part {
    file: &'static str,
    text: String,
}

pub(crate) async fn debug(args: &Debug) -> Result<u8, Error> {
    let data = args.host.data.resolve()?;
    let sandbox = Sandboxes(data.sandboxes()).find(&args.id)?;
    let logs = if args.bundle.is_some() { MAX_BUNDLED } else { MAX_PRINTED };
    let doctor =
        match Facts::gather(&data, args.host.kernel.as_deref(), args.host.guest_image.as_deref()).await {
            Ok(facts) => facts.judge().table(),
            Err(error) => format!("{error}\n"),
        };
    let agent = match sandbox.client() {
        Ok(client) => match tokio::time::timeout(std::time::Duration::from_secs(10), client.health()).await {
            Ok(Ok(())) => "the agent answers\n".to_owned(),
            Ok(Err(error)) => format!("the agent does not answer: {error}\n"),
            Err(_) => "the agent did not answer within 10 s\n".to_owned(),
        },
        Err(error) => format!("{error}\n"),
    };
    let mut parts = vec![
        Part { file: "version.txt", text: version() },
        Part { file: "sandbox.json", text: pretty(&secretless(list::whole(&sandbox))) },
        Part { file: "folder.txt", text: folder(&sandbox.dir) },
        Part { file: "agent.txt", text: agent },
        Part { file: "shim-process.txt", text: process(sandbox.seen.shim_pid) },
        Part { file: "vmm-process.txt", text: process(sandbox.seen.vmm_pid) },
        Part { file: "doctor.txt", text: doctor },
    ];
    for file in
        ["console.log.1", "console.log", "vmm.log", "shim.log.1", "shim.log", super::launch::SHIM_STDERR]
    {
        match end_of(&sandbox.dir.join(file), logs) {
            Ok(text) => parts.push(Part { file, text }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => parts.push(Part { file, text: format!("cannot be read: {error}\n") }),
        }
    }
    match &args.bundle {
        Some(path) => {
            bundle(path, &sandbox, &parts)?;
            output::line(&path.display().to_string())?;
        }
        None => print(&parts)?,
    }
    Ok(0)
}

fn print(parts: &[Part]) -> Result<(), Error> {
    let mut text = String::new();
    for part in parts {
        let lines: Vec<_> = part.text.lines().collect();
        let log = part.file.contains(".log") || part.file == super::launch::SHIM_STDERR;
        let shown = if log { &lines[lines.len().saturating_sub(LINES)..] } else { &lines[..] };
        text.push_str(&format!("=== {}\n", part.file));
        for line in shown {
            text.push_str(&plain(line));
            text.push('\n');
        }
        text.push('\n');
    }
    output::print(&text)
}

/// Whole or not there.
fn bundle(path: &Path, sandbox: &Sandbox, parts: &[Part]) -> Result<(), Error> {
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(".part");
    let write = || {
        let mut archive =
            tar::Builder::new(GzEncoder::new(fs::File::create(&fresh)?, Compression::default()));
        for part in parts {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o600);
            header.set_size(part.text.len() as u64);
            let name = format!("host-shim-debug-{}/{}", sandbox.id, part.file);
            archive.append_data(&mut header, name, part.text.as_bytes())?;
        }
        archive.into_inner()?.finish()?.flush()?;
        fs::rename(&fresh, path)
    };
    write().map_err(|error| {
        let _ = fs::remove_file(&fresh);
        Error::io("write", path)(error)
    })
}

fn version() -> String {
    let uname = rustix::system::uname();
    let part = |text: &std::ffi::CStr| text.to_string_lossy().into_owned();
    format!(
        "host-shim {}\n{} {} {}\n",
        env!("CARGO_PKG_VERSION"),
        part(uname.sysname()),
        part(uname.release()),
        part(uname.machine())
    )
}

/// The sandbox without what only its owner may know: values of variables go the way of the token.
fn secretless(mut sandbox: Value) -> Value {
    if let Some(Value::Object(env)) = sandbox.pointer_mut("/spec/env") {
        for value in env.values_mut() {
            *value = "<hidden>".into();
        }
    }
    sandbox
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

fn folder(dir: &Path) -> String {
    let mut lines: Vec<_> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let metadata = entry.metadata().ok()?;
            let kind = if metadata.is_dir() { "/" } else { "" };
            Some(format!("{:>12}  {}{kind}\n", metadata.len(), entry.file_name().to_string_lossy()))
        })
        .collect();
    lines.sort_unstable();
    format!("{}\n{}", dir.display(), lines.concat())
}

/// What the kernel says of a process.
fn process(pid: Option<i32>) -> String {
    let Some(pid) = pid else { return "there is none\n".to_owned() };
    let read = |file: &str| {
        let mut text = Vec::new();
        let file = fs::File::open(format!("/proc/{pid}/{file}"))?;
        file.take(MAX_PROC).read_to_end(&mut text)?;
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&text).into_owned())
    };
    let Ok(status) = read("status") else { return format!("pid {pid} is gone\n") };
    let wanted =
        ["Name:", "State:", "Pid:", "PPid:", "Uid:", "FDSize:", "VmPeak:", "VmRSS:", "VmSwap:", "Threads:"];
    let mut text = String::new();
    for line in status.lines().filter(|line| wanted.iter().any(|name| line.starts_with(name))) {
        text.push_str(line);
        text.push('\n');
    }
    let command = read("cmdline").unwrap_or_default().replace('\0', " ");
    text.push_str(&format!("Command: {}\n", command.trim_end()));
    let open = fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
    text.push_str(&format!("Open files: {open}\n"));
    text
}

fn end_of(path: &Path, limit: u64) -> std::io::Result<String> {
    let mut file = fs::File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(limit)))?;
    let mut text = Vec::new();
    file.take(limit).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn secrets_are_not_in_it() {
        let shown = secretless(json!({"spec": {"env": {"A": "secret"}, "template": "/t"}}));
        assert_eq!(shown, json!({"spec": {"env": {"A": "<hidden>"}, "template": "/t"}}));
    }
}
