//! Clones and forks: what they share, what they never share, and what one that does nothing costs.

mod fork;
mod idle;
mod sharing;
mod unique;

use std::future::Future;

use e2e::{TestSandbox, TestSandboxBuilder};

/// Starts in flight at once: as many as there are CPUs would do, one more hides what waits for a disk.
const AT_ONCE: usize = 3;

/// Starts many sandboxes that all live at the same time; `first` is what each is asked at once, before the others are there.
async fn many<T: Send + 'static, F>(
    count: usize,
    builder: impl Fn(usize) -> TestSandboxBuilder,
    first: impl Fn(usize, TestSandbox) -> F,
) -> Vec<(TestSandbox, T)>
where
    F: Future<Output = (TestSandbox, T)> + Send + 'static,
{
    let gate = std::sync::Arc::new(tokio::sync::Semaphore::new(AT_ONCE));
    let mut starting = Vec::new();
    for number in 0..count {
        let (gate, builder) = (std::sync::Arc::clone(&gate), builder(number));
        let permit = gate.acquire_owned().await.expect("the gate is open");
        let sandbox = builder.start().await;
        let asked = first(number, sandbox);
        starting.push(tokio::spawn(async move {
            let asked = asked.await;
            drop(permit);
            asked
        }));
    }
    let mut all = Vec::new();
    for started in starting {
        all.push(started.await.expect("it starts"));
    }
    all
}

/// A sum over mappings of /proc/PID/smaps, in KiB.
#[derive(Clone, Copy, Debug, Default)]
struct Mapped {
    rss: u64,
    pss: u64,
    shared_clean: u64,
    private_clean: u64,
    private_dirty: u64,
}

impl Mapped {
    /// Of the mappings of a process whose file's name ends like this; of all with an empty one.
    fn of(pid: i32, file: &str) -> Self {
        let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).expect("the process's mappings");
        let (mut sum, mut counts) = (Self::default(), false);
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let name = words.next().unwrap_or_default();
            let Some(name) = name.strip_suffix(':') else {
                counts = line.trim_end().ends_with(file);
                continue;
            };
            let Some(kib) = words.next().and_then(|kib| kib.parse::<u64>().ok()).filter(|_| counts) else {
                continue;
            };
            match name {
                "Rss" => sum.rss += kib,
                "Pss" => sum.pss += kib,
                "Shared_Clean" => sum.shared_clean += kib,
                "Private_Clean" => sum.private_clean += kib,
                "Private_Dirty" => sum.private_dirty += kib,
                _ => {}
            }
        }
        sum
    }
}

/// The median, and the largest.
fn spread(mut values: Vec<u64>) -> (u64, u64) {
    values.sort_unstable();
    (values[values.len() / 2], values[values.len() - 1])
}
