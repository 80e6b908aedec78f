//! Counters and gauges, as Prometheus reads them.

/// What is counted.
#[derive(Debug, Default)]
pub struct Metrics {}
