//! What the gateway costs, beside the same calls straight to the agent's socket: `cargo bench -p tiffin-gateway`.
//!
//! ```text
//!   this process ──┬── agent's socket ───────────────────────────► envd, a process of its own
//!                  ├── vsock.sock ──────────────► relay ──────────► (what a shim costs)
//!                  └── TCP ──► gateway ── vsock.sock ──► relay ───► (what the gateway costs, with the shim)
//! ```
//!
//! Gateway and relay are processes of their own too: this program, started again. The ways take turns; figures are medians.

mod client;
mod processes;

use std::path::Path;
use std::time::{Duration, Instant};

use client::Way;
use processes::{Agent, Gateway, Relay};

/// Rounds of each measurement, beside one that warms up.
const ROUNDS: usize = 7;

/// Small calls of a round.
const CALLS: usize = 500;

/// Bytes of a stream.
const STREAM: u64 = 256 << 20;

/// Sandboxes that the gateway knows.
const SANDBOXES: usize = 100;

/// WebSockets that do nothing.
const WEBSOCKETS: usize = 500;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.get(1).map(String::as_str) {
        Some("relay") => return processes::relay(Path::new(&arguments[2])),
        Some("gateway") => return processes::gateway(Path::new(&arguments[2])),
        _ => {}
    }
    // `cargo test` and `cargo nextest` run benches too, once each and to see that they build: only `--bench` measures.
    if !arguments.iter().any(|argument| argument == "--bench") {
        println!("proxy: not measured without --bench");
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(measure());
}

async fn measure() {
    // In memory: a disk's noise is nobody's here.
    let shared_memory = Path::new("/dev/shm");
    let folder = match shared_memory.is_dir() {
        true => tempfile::tempdir_in(shared_memory),
        false => tempfile::tempdir(),
    }
    .unwrap();
    let folder = folder.path();
    let agent = Agent::start(folder).await;
    let relay = Relay::start(folder, SANDBOXES).await;
    let gateway = Gateway::start(folder).await;

    let idle = gateway.resident();
    for number in 0..SANDBOXES {
        let mut way = Way::gateway(gateway.address, &processes::id(number)).await;
        way.unary().await;
    }
    let registered = gateway.resident();

    let id = processes::id(0);
    let mut ways = [
        Way::agent(&agent.socket).await,
        Way::relay(&relay.socket(0)).await,
        Way::gateway(gateway.address, &id).await,
    ];
    println!("{:<44} {:>12} {:>12} {:>12}", "medians", "agent", "shim", "gateway");

    let mut samples = [const { Vec::new() }; 3];
    for round in 0..=ROUNDS {
        for turn in 0..ways.len() {
            let place = (round + turn) % ways.len();
            for _ in 0..CALLS {
                let begin = Instant::now();
                ways[place].unary().await;
                if round > 0 {
                    samples[place].push(begin.elapsed());
                }
            }
        }
    }
    let [agent_time, shim_time, gateway_time] = samples.map(median);
    let micro = |time: Duration| format!("{:.0} us", time.as_secs_f64() * 1e6);
    print_row("a small call", [micro(agent_time), micro(shim_time), micro(gateway_time)]);
    let more = gateway_time.saturating_sub(agent_time);
    verdict(
        "the gateway's and shim's part of it",
        &micro(more),
        more <= Duration::from_millis(1),
        "at most 1 ms",
    );

    let file = folder.join("stream");
    let file = file.to_str().unwrap();
    for (what, stream) in
        [("standard output", Stream::Output), ("upload", Stream::Upload), ("download", Stream::Download)]
    {
        let mut samples = [const { Vec::new() }; 3];
        let used = gateway.processor_time();
        for round in 0..=ROUNDS {
            for turn in 0..ways.len() {
                let place = (round + turn) % ways.len();
                let way = &mut ways[place];
                let begin = Instant::now();
                match stream {
                    Stream::Output => way.output(STREAM).await,
                    Stream::Upload => way.upload(file, STREAM).await,
                    Stream::Download => way.download(file, STREAM).await,
                }
                if round > 0 {
                    samples[place].push(begin.elapsed());
                }
            }
        }
        let times = samples.map(median);
        let rates = times.map(|time| STREAM as f64 / time.as_secs_f64() / f64::from(1 << 20));
        print_row(what, rates.map(|rate| format!("{rate:.0} MiB/s")));
        let (ratio, of_shim) = (rates[2] / rates[0], rates[2] / rates[1]);
        // A sandbox is reached by its `vsock.sock` and no other way: that is the direct one.
        let value = format!("{of_shim:.2} ({ratio:.2} of the agent's)");
        verdict("  ratio of the gateway's to the shim's", &value, of_shim >= 0.8, "at least 0.8");
        let used = (gateway.processor_time() - used).as_secs_f64() / (ROUNDS + 1) as f64;
        let each = used * 1e3 * f64::from(1 << 30) / STREAM as f64;
        println!("{:<44} {:>38}", "  processor time of the gateway", format!("{each:.0} ms for each GiB"));
    }
    drop(ways);

    let before = gateway.resident();
    let port = processes::websocket_server().await;
    let mut sockets = Vec::new();
    for _ in 0..WEBSOCKETS {
        sockets.push(client::WebSocket::open(gateway.address, &id, port).await);
    }
    let open = gateway.resident();
    let mut lost = 0;
    for socket in &mut sockets {
        lost += usize::from(!socket.echoes().await);
    }
    verdict(&format!("{WEBSOCKETS} idle WebSockets, lost"), &lost.to_string(), lost == 0, "0");

    let mebi = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let fits = registered <= 40 << 20;
    verdict(
        &format!("resident with {SANDBOXES} sandboxes, each called"),
        &mebi(registered),
        fits,
        "at most 40 MiB",
    );
    println!(
        "  just started {}, after the streams {}, with the WebSockets {}",
        mebi(idle),
        mebi(before),
        mebi(open)
    );
}

#[derive(Clone, Copy)]
enum Stream {
    Output,
    Upload,
    Download,
}

fn median(mut samples: Vec<Duration>) -> Duration {
    samples.sort_unstable();
    samples[samples.len() / 2]
}

fn print_row(what: &str, values: [String; 3]) {
    println!("{what:<44} {:>12} {:>12} {:>12}", values[0], values[1], values[2]);
}

fn verdict(what: &str, value: &str, kept: bool, bound: &str) {
    println!("{what:<44} {value:>38}  {bound}: {}", if kept { "kept" } else { "MISSED" });
}
