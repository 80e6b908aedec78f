//! Counters and gauges, as Prometheus reads them.
//!
//! No label names a team or a sandbox: the numbers are the operator's, are served without a key, and their count must not
//! grow with what clients do.

use std::fmt;
use std::sync::atomic::Ordering;
use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::fleet::Came;
use crate::store::Stage;

/// The content type of [`Metrics::encode`]: OpenMetrics text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Upper bounds of the seconds that a create takes: a restore takes tens of milliseconds, a boot under emulation a minute.
const CREATE_SECONDS: [f64; 12] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// Upper bounds of the seconds that an answer of the control API takes.
const REQUEST_SECONDS: [f64; 8] = [0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0];

/// How a create ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Outcome {
    /// The client has a sandbox.
    Created,
    /// The request was wrong.
    Refused,
    /// The team's quota or the machine was full.
    Full,
    /// It was ours to do and did not work.
    Failed,
}

/// Whose bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Direction {
    /// From the client to the sandbox.
    In,
    /// From the sandbox to the client.
    Out,
}

/// What a stream through the gateway is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum StreamKind {
    /// A request and its answer.
    Http,
    /// What came of an Upgrade.
    Upgrade,
    /// A connection of the legacy JSON-RPC.
    Legacy,
    /// A tunnel's WebSocket.
    Tunnel,
    /// A stream inside a tunnel that reached its port.
    TunnelStream,
}

/// How a handshake of TLS ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum HandshakeOutcome {
    /// Requests could begin.
    Done,
    /// It broke off.
    Broken,
    /// It took too long.
    Late,
    /// The client spoke HTTP in the clear.
    Plain,
}

/// Who sent more requests than it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Limited {
    /// A team.
    Team,
    /// An address, without a team's key.
    Address,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HandshakeLabels {
    outcome: HandshakeOutcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LimitedLabels {
    who: Limited,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CreateLabels {
    outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    method: &'static str,
    route: String,
    status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DirectionLabels {
    direction: Direction,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabels {
    kind: StreamKind,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StageLabels {
    stage: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StartLabels {
    path: &'static str,
}

/// What is counted.
pub struct Metrics {
    registry: Registry,
    sandboxes: Family<StageLabels, Gauge>,
    creates: Family<CreateLabels, Counter>,
    create_seconds: Histogram,
    starts: Family<StartLabels, Counter>,
    parked: Gauge,
    requests: Family<RequestLabels, Counter>,
    request_seconds: Histogram,
    bytes_in: Counter,
    bytes_out: Counter,
    streams: Family<KindLabels, Counter>,
    open_streams: Family<KindLabels, Gauge>,
    handshakes: Family<HandshakeLabels, Counter>,
    certificate_ends: Gauge,
    limited: Family<LimitedLabels, Counter>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics(..)")
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("tiffin");
        let bytes = Family::<DirectionLabels, Counter>::default();
        // Kept apart, so that a byte counted costs one atomic addition.
        let bytes_of = |direction| bytes.get_or_create_owned(&DirectionLabels { direction });
        let (bytes_in, bytes_out) = (bytes_of(Direction::In), bytes_of(Direction::Out));
        registry.register_with_unit("proxied", "Bytes between clients and sandboxes", Unit::Bytes, bytes);
        let sandboxes = Family::default();
        registry.register("sandboxes", "Sandboxes by stage of their life", sandboxes.clone());
        let creates = Family::default();
        registry.register("creates", "Creates by outcome", creates.clone());
        let create_seconds = Histogram::new(CREATE_SECONDS);
        registry.register_with_unit(
            "create",
            "How long the creates took that gave a sandbox",
            Unit::Seconds,
            create_seconds.clone(),
        );
        let starts = Family::default();
        registry.register("starts", "Sandboxes that came to run, by how they did", starts.clone());
        let parked = Gauge::default();
        registry.register("parked", "Sandboxes that wait in pools", parked.clone());
        let requests = Family::default();
        registry.register("requests", "Answered requests by route and status", requests.clone());
        let request_seconds = Histogram::new(REQUEST_SECONDS);
        registry.register_with_unit(
            "request",
            "How long answers of the control API took",
            Unit::Seconds,
            request_seconds.clone(),
        );
        let streams = Family::default();
        registry.register("streams", "Streams between clients and sandboxes", streams.clone());
        let open_streams = Family::default();
        registry.register(
            "open_streams",
            "Streams between clients and sandboxes that are open now",
            open_streams.clone(),
        );
        let handshakes = Family::default();
        registry.register("tls_handshakes", "Handshakes of TLS by outcome", handshakes.clone());
        let certificate_ends = Gauge::default();
        registry.register(
            "tls_certificate_end_timestamp_seconds",
            "When the TLS certificate ends, in seconds since 1970; 0 without one",
            certificate_ends.clone(),
        );
        let limited = Family::default();
        registry.register("rate_limited", "Requests of the control API that came too fast", limited.clone());
        Self {
            registry,
            sandboxes,
            creates,
            create_seconds,
            starts,
            parked,
            requests,
            request_seconds,
            bytes_in,
            bytes_out,
            streams,
            open_streams,
            handshakes,
            certificate_ends,
            limited,
        }
    }
}

impl Metrics {
    /// A create ended; `took` counts where it gave a sandbox.
    pub fn create_ended(&self, outcome: Outcome, took: Duration) {
        self.creates.get_or_create(&CreateLabels { outcome }).inc();
        if outcome == Outcome::Created {
            self.create_seconds.observe(took.as_secs_f64());
        }
    }

    /// How many sandboxes came to run in each way so far, and how many wait in pools.
    pub fn starts_are(&self, starts: impl IntoIterator<Item = (Came, u64)>, parked: usize) {
        for (how, count) in starts {
            let path = match how {
                Came::FromPool => "pool",
                Came::Restored => "restore",
                Came::Booted => "boot",
                Came::Forked => "fork",
                Came::Resumed => "resume",
            };
            // The fleet counts; this shows.
            self.starts.get_or_create(&StartLabels { path }).inner().store(count, Ordering::Relaxed);
        }
        self.parked.set(i64::try_from(parked).unwrap_or(i64::MAX));
    }

    /// A request of the control API was answered. `route` is the route's pattern, never the path.
    pub fn request_answered(
        &self,
        method: &http::Method,
        route: &str,
        status: http::StatusCode,
        took: Duration,
    ) {
        self.request_counted(method, route, status);
        self.request_seconds.observe(took.as_secs_f64());
    }

    /// A request was answered that may take as long as it likes (`route` is a fixed word: `proxy`, `legacy`).
    pub fn request_counted(&self, method: &http::Method, route: &str, status: http::StatusCode) {
        let labels =
            RequestLabels { method: method_label(method), route: route.to_owned(), status: status.as_u16() };
        self.requests.get_or_create(&labels).inc();
    }

    /// Bytes passed between a client and a sandbox.
    pub fn proxied(&self, direction: Direction, bytes: u64) {
        match direction {
            Direction::In => self.bytes_in.inc_by(bytes),
            Direction::Out => self.bytes_out.inc_by(bytes),
        };
    }

    /// A stream between a client and a sandbox begins; it ends when what is returned is dropped.
    #[must_use]
    pub fn stream_opened(&self, kind: StreamKind) -> OpenStream {
        let labels = KindLabels { kind };
        self.streams.get_or_create(&labels).inc();
        let open = self.open_streams.get_or_create_owned(&labels);
        open.inc();
        OpenStream(open)
    }

    /// A handshake of TLS ended.
    pub fn handshake_ended(&self, outcome: HandshakeOutcome) {
        self.handshakes.get_or_create(&HandshakeLabels { outcome }).inc();
    }

    /// From now on the certificate is one that ends then.
    pub fn certificate_ends(&self, ends: Option<jiff::Timestamp>) {
        self.certificate_ends.set(ends.map_or(0, jiff::Timestamp::as_second));
    }

    /// A request came too fast.
    pub fn rate_limited(&self, who: Limited) {
        self.limited.get_or_create(&LimitedLabels { who }).inc();
    }

    /// The text that Prometheus reads, with the stages of all sandboxes as they are now.
    pub fn encode(&self, stages: impl IntoIterator<Item = Stage>) -> Result<String, fmt::Error> {
        let stages_of_life = ["starting", "running", "pausing", "paused", "resuming", "ending"];
        let mut counts = stages_of_life.map(|stage| (stage, 0));
        for stage in stages {
            let index = match stage {
                Stage::Starting => 0,
                Stage::Running => 1,
                Stage::Pausing => 2,
                Stage::Paused => 3,
                Stage::Resuming => 4,
                Stage::Ending => 5,
            };
            counts[index].1 += 1;
        }
        for (stage, count) in counts {
            self.sandboxes.get_or_create(&StageLabels { stage }).set(count);
        }
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// A stream that is open.
#[derive(Debug)]
pub struct OpenStream(Gauge);

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// A client may make up methods: they are one label.
fn method_label(method: &http::Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "PUT" => "PUT",
        "PATCH" => "PATCH",
        "DELETE" => "DELETE",
        "OPTIONS" => "OPTIONS",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{Method, StatusCode};

    #[test]
    fn what_happened_is_in_the_text() {
        let metrics = Metrics::default();
        metrics.create_ended(Outcome::Created, Duration::from_millis(30));
        metrics.create_ended(Outcome::Full, Duration::from_secs(9));
        metrics.request_answered(&Method::GET, "/sandboxes/{sandboxID}", StatusCode::OK, Duration::ZERO);
        metrics.request_counted(&Method::from_bytes(b"BREW").unwrap(), "proxy", StatusCode::BAD_GATEWAY);
        metrics.proxied(Direction::In, 7);
        metrics.proxied(Direction::Out, 9);
        let open = metrics.stream_opened(StreamKind::Upgrade);
        drop(metrics.stream_opened(StreamKind::Upgrade));
        metrics.starts_are([(Came::FromPool, 3), (Came::Booted, 1)], 2);
        let text = metrics.encode([Stage::Running, Stage::Running]).unwrap();
        for line in [
            r#"tiffin_sandboxes{stage="running"} 2"#,
            r#"tiffin_sandboxes{stage="starting"} 0"#,
            r#"tiffin_starts_total{path="pool"} 3"#,
            "tiffin_parked 2",
            r#"tiffin_creates_total{outcome="Created"} 1"#,
            r#"tiffin_creates_total{outcome="Full"} 1"#,
            r#"tiffin_create_seconds_bucket{le="0.05"} 1"#,
            "tiffin_create_seconds_count 1",
            r#"tiffin_requests_total{method="GET",route="/sandboxes/{sandboxID}",status="200"} 1"#,
            r#"tiffin_requests_total{method="other",route="proxy",status="502"} 1"#,
            "tiffin_request_seconds_count 1",
            r#"tiffin_proxied_bytes_total{direction="In"} 7"#,
            r#"tiffin_proxied_bytes_total{direction="Out"} 9"#,
            r#"tiffin_streams_total{kind="Upgrade"} 2"#,
            r#"tiffin_open_streams{kind="Upgrade"} 1"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        drop(open);
        let text = metrics.encode([]).unwrap();
        assert!(text.contains(r#"tiffin_open_streams{kind="Upgrade"} 0"#), "{text}");
        assert!(text.contains(r#"tiffin_sandboxes{stage="running"} 0"#), "{text}");
    }
}
