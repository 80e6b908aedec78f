//! Progress on the standard error: a bar on a terminal, a line for each phase elsewhere.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};
use rootfs_tools::Progress;

/// What is being shown.
pub(crate) struct Shown {
    bar: Option<ProgressBar>,
    phase: Option<std::mem::Discriminant<Progress>>,
}

impl Shown {
    /// Nothing yet.
    pub(crate) fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(ProgressBar::no_length);
        Self { bar, phase: None }
    }

    /// Shows how far the build is.
    pub(crate) fn update(&mut self, progress: Progress) {
        let phase = Some(std::mem::discriminant(&progress));
        let is_new = self.phase != phase;
        self.phase = phase;
        match &self.bar {
            Some(bar) => draw(bar, progress, is_new),
            None => match progress {
                Progress::Indexing { layer, layers } => {
                    eprintln!("reading the entries of layer {layer} of {layers}")
                }
                Progress::Writing { total, .. } if is_new => {
                    eprintln!("writing {} MiB", total.div_ceil(1 << 20))
                }
                Progress::Syncing => eprintln!("syncing"),
                Progress::Writing { .. } => {}
            },
        }
    }

    /// Takes the bar away.
    pub(crate) fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

fn draw(bar: &ProgressBar, progress: Progress, is_new: bool) {
    let style = |template: &str| {
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
    };
    match progress {
        Progress::Indexing { layer, layers } => {
            bar.set_style(style("reading the entries of layer {msg} {spinner}"));
            bar.set_message(format!("{layer} of {layers}"));
            bar.tick();
        }
        Progress::Writing { done, total } => {
            if is_new {
                bar.set_style(style("writing {bar:40} {bytes} of {total_bytes}, {eta} left"));
                bar.set_length(total);
            }
            bar.set_position(done);
        }
        Progress::Syncing => {
            bar.set_style(style("syncing {spinner}"));
            bar.tick();
        }
    }
}
