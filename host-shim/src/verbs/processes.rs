//! `ps`: the processes that clients have started in a sandbox.

use serde_json::json;

use super::error::Error;
use super::sandboxes::plain;
use super::{output, sandboxes};
use crate::cli::Ps;

pub(crate) async fn processes(args: &Ps) -> Result<u8, Error> {
    let sandbox = sandboxes(&args.data)?.find(&args.id)?;
    let shim = sandbox.shim();
    let client = sandbox.client()?;
    let mut found = match client.processes().await {
        Ok(found) => found,
        Err(error) => return Err(sandbox.explain(shim.as_ref(), error.into()).await),
    };
    found.sort_by_key(|process| process.pid);
    let argv = |process: &envd_proto::process::ProcessInfo| {
        let config = process.config.clone().unwrap_or_default();
        std::iter::once(config.cmd).chain(config.args).collect::<Vec<_>>()
    };
    if args.json {
        let list: Vec<_> = found
            .iter()
            .map(|process| json!({"pid": process.pid, "tag": process.tag, "command": argv(process)}))
            .collect();
        output::json(&list)?;
        return Ok(0);
    }
    let rows: Vec<_> = found
        .iter()
        .map(|process| {
            let command = argv(process).join(" ");
            let tag = process.tag.as_deref().unwrap_or("-");
            [process.pid.to_string(), plain(tag), plain(&command).replace(['\n', '\t'], " ")]
        })
        .collect();
    output::print(&output::table(["PID", "TAG", "COMMAND"], &rows))?;
    Ok(0)
}
