//! What a Resume did, part by part, and how long each took.

use std::io;
use std::time::{Duration, Instant};

use envd_proto::control::resumed::Part;

/// The parts so far, in the order in which they began.
#[derive(Debug, Default)]
pub(super) struct Parts(Vec<Part>);

impl Parts {
    /// Does a part, or more of one that was begun. How it went is the caller's to judge.
    pub(super) async fn time<T>(&mut self, name: &str, work: impl Future<Output = T>) -> T {
        let began = Instant::now();
        let done = work.await;
        self.took(name, began.elapsed());
        done
    }

    /// Does a part whose failure stops nothing, and is told.
    pub(super) async fn attempt(&mut self, name: &str, work: impl Future<Output = io::Result<()>>) {
        if let Err(error) = self.time(name, work).await {
            crate::log::warn(format_args!("resume: {name}: {error}"));
            self.part(name).error = error.to_string();
        }
    }

    /// A part has taken so long, or so much longer.
    pub(super) fn took(&mut self, name: &str, time: Duration) {
        let part = self.part(name);
        part.duration_us =
            part.duration_us.saturating_add(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }

    pub(super) fn into_wire(self) -> Vec<Part> {
        self.0
    }

    fn part(&mut self, name: &str) -> &mut Part {
        let index = self.0.iter().position(|part| part.name == name).unwrap_or_else(|| {
            self.0.push(Part { name: name.to_owned(), ..Part::default() });
            self.0.len() - 1
        });
        &mut self.0[index]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_part_is_told_once_with_all_its_time_and_its_error() {
        let mut parts = Parts::default();
        parts.took("network", Duration::from_micros(5));
        parts.attempt("clock", async { Err(io::Error::other("no clock")) }).await;
        parts.took("network", Duration::from_micros(2));
        parts.attempt("session", async { Ok(()) }).await;
        let told = parts.into_wire();
        let names: Vec<_> = told.iter().map(|part| (part.name.as_str(), part.error.as_str())).collect();
        assert_eq!(names, [("network", ""), ("clock", "no clock"), ("session", "")]);
        assert_eq!(told[0].duration_us, 7);
    }
}
