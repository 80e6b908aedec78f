//! `network`: the rules of a sandbox's network and its counters, and a change of them.

use sandbox_folder::network::{NetworkReport, NetworkSpec};

use super::error::Error;
use super::{output, sandboxes};
use crate::cli::NetworkVerb;

pub(crate) async fn network(args: &NetworkVerb) -> Result<u8, Error> {
    let sandbox = sandboxes(&args.data)?.find(&args.id)?;
    let Some(shim) = sandbox.shim() else {
        let (id, phase) = (sandbox.id.clone(), sandbox.phase());
        return Err(Error::WrongPhase { id, phase, remedy: ": only one that runs has a network" });
    };
    let report = match sandbox.api().network(args.request().as_ref()).await {
        Ok(report) => report,
        Err(error) => return Err(sandbox.explain(Some(&shim), error.into()).await),
    };
    if args.json {
        output::json_line(&report)?;
    } else {
        output::print(&table(&report))?;
    }
    Ok(0)
}

fn table(NetworkReport { network, uplink_up, counters }: &NetworkReport) -> String {
    let NetworkSpec { mode, allow, deny, egress_bytes_per_s, ingress_bytes_per_s, dns } = network;
    let list = |list: &[String], none: &str| if list.is_empty() { none.to_owned() } else { list.join(" ") };
    let rate = |rate: &Option<u64>| rate.map_or("no limit".to_owned(), |rate| format!("{rate} bytes/s"));
    let mode =
        serde_json::to_value(mode).ok().and_then(|mode| mode.as_str().map(str::to_owned)).unwrap_or_default();
    let state = if *uplink_up { "" } else { " (its way out is gone)" };
    let mut out = format!("mode   {mode}{state}\n");
    out.push_str(&format!("allow  {}\ndeny   {}\n", list(allow, "-"), list(deny, "-")));
    out.push_str(&format!("in     {}\nout    {}\n", rate(ingress_bytes_per_s), rate(egress_bytes_per_s)));
    out.push_str(&format!("dns    {}\n\n", list(dns, "the host's")));
    let rows: Vec<_> = counters
        .iter()
        .map(|counter| [counter.name.clone(), counter.packets.to_string(), counter.bytes.to_string()])
        .collect();
    out.push_str(&output::table(["COUNTER", "PACKETS", "BYTES"], &rows));
    out
}
