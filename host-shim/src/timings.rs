//! What took how long on the way to a running sandbox.

use std::time::{Duration, Instant};

use envd_proto::control::Hello;
use sandbox_folder::Phase;

/// Phases that an agent may report; more are a broken or hostile one's.
const MAX_AGENT_PHASES: usize = 32;

/// The longest name of an agent's phase that is kept.
const MAX_NAME: usize = 32;

/// Measures phases one after the other.
#[derive(Debug)]
pub struct Timings {
    begin: Instant,
    last: Instant,
    phases: Vec<Phase>,
}

impl Default for Timings {
    fn default() -> Self {
        let now = Instant::now();
        Self { begin: now, last: now, phases: Vec::new() }
    }
}

impl Timings {
    /// The phase `name` ends now; it began when the one before ended.
    pub fn end(&mut self, name: &str) {
        let now = Instant::now();
        self.push(name, now - self.last);
        self.last = now;
    }

    /// The wait for the Hello ends now: told apart by what the agent says about its own boot.
    pub fn end_boot(&mut self, hello: &Hello) {
        let now = Instant::now();
        let waited = now - self.last;
        self.last = now;
        let agent = &hello.phases[..hello.phases.len().min(MAX_AGENT_PHASES)];
        let kernel = agent.first().map(|phase| Duration::from_micros(phase.start_us));
        let guest = agent.iter().map(|phase| phase.end_us).max().map(Duration::from_micros);
        let (Some(kernel), Some(guest)) = (kernel, guest) else { return self.push("boot", waited) };
        // The guest's clock starts with its kernel: what is left of the wait is the VMM's start and the firmware.
        self.push("vmm", waited.saturating_sub(guest));
        self.push("kernel", kernel);
        for phase in agent {
            let name: String = phase.name.chars().filter(|c| c.is_ascii_graphic()).take(MAX_NAME).collect();
            let took = Duration::from_micros(phase.end_us.saturating_sub(phase.start_us));
            self.push(&format!("agent.{name}"), took);
        }
    }

    /// The phases so far.
    pub fn phases(&self) -> &[Phase] {
        &self.phases
    }

    /// Milliseconds since the beginning.
    pub fn total_ms(&self) -> f64 {
        milliseconds(self.begin.elapsed())
    }

    /// The phases as a table.
    pub fn table(&self) -> String {
        let mut out = String::new();
        for phase in &self.phases {
            out.push_str(&format!("{:>10.1} ms  {}\n", phase.ms, phase.name));
        }
        out.push_str(&format!("{:>10.1} ms  total\n", self.total_ms()));
        out
    }

    fn push(&mut self, name: &str, took: Duration) {
        self.phases.push(Phase { name: name.to_owned(), ms: milliseconds(took) });
    }
}

fn milliseconds(duration: Duration) -> f64 {
    // Microseconds are the agent's unit; more digits would be noise.
    duration.as_micros() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use envd_proto::control::BootPhase;

    #[test]
    fn a_hostile_hello_gives_bounded_phases() {
        let phase = BootPhase { name: "x\n".repeat(1000), start_us: 9, end_us: 3 };
        let hello = Hello { phases: vec![phase; 1000], ..Hello::default() };
        let mut timings = Timings::default();
        timings.end_boot(&hello);
        assert_eq!(timings.phases().len(), 2 + MAX_AGENT_PHASES);
        assert_eq!(timings.phases()[2], Phase { name: format!("agent.{}", "x".repeat(MAX_NAME)), ms: 0.0 });
        assert_eq!(timings.table().lines().count(), 3 + MAX_AGENT_PHASES);
    }
}
