//! The agent's memory: idle, and with a thousand processes whose streams are open.

use envd_proto::process::process_event::Event;

use crate::wire::{Agent, Wire, rss};
use crate::{Bound, Row};

const IDLE_LIMIT_KIB: f64 = 6.0 * 1024.0;
const PROCESS_LIMIT_KIB: f64 = 64.0;
const PROCESSES: usize = 1000;

/// Streams on one connection would be HTTP/2's business; each connection holds one, and the door takes this many.
const STREAMS: usize = 500;

pub(crate) fn measure() -> Vec<Row> {
    let agent = Agent::start();
    // One call of each kind, so that what a first call loads is counted.
    let mut wire = agent.wire();
    wire.run("/bin/true", &[]).unwrap();
    let stat = wire.request("POST", "/filesystem.Filesystem/Stat", "application/json", br#"{"path":"/"}"#);
    assert_eq!(stat.unwrap(), 200);
    wire.rest().unwrap();
    let idle = rss(agent.pid());

    let mut streams: Vec<Wire> = Vec::new();
    for n in 0..PROCESSES {
        let mut wire = agent.wire();
        wire.start(None, "/bin/sleep", &["1000"]).unwrap();
        assert!(matches!(wire.event().unwrap(), Event::Start(_)));
        if n < STREAMS {
            streams.push(wire);
        }
    }
    let with_streams = rss(agent.pid());
    let half = streams.len();
    drop(streams);
    let each = (with_streams.saturating_sub(idle)) as f64 / PROCESSES as f64;
    vec![
        Row {
            what: "agent, idle, resident; against 6 MiB".into(),
            value: format!("{idle} KiB"),
            ratio: Some((idle as f64 / IDLE_LIMIT_KIB, Bound::AtMost(1.0))),
        },
        Row {
            what: format!("each of {PROCESSES} sleeping processes, {half} streams open; against 64 KiB"),
            value: format!("{each:.1} KiB"),
            ratio: Some((each / PROCESS_LIMIT_KIB, Bound::AtMost(1.0))),
        },
    ]
}
