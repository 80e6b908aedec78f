//! Every stage on a thread of its own.

use std::path::Path;
use std::sync::Mutex;

use super::{Build, BuildReport, Built};
use crate::error::{Error, at};
use crate::graph::Board;
use crate::plan::PlannedStage;

/// As much as the main thread has: folders in folders are walked by recursion.
const STACK: usize = 8 << 20;

impl Build<'_> {
    /// Builds every stage on a thread of its own, and the image of the last one.
    pub(super) fn all(&self, stages: &[PlannedStage], last: usize) -> Result<BuildReport, Error> {
        let first_error = Mutex::new(None);
        let fail = |error: Error| {
            // The first one is why the others were stopped.
            first_error.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get_or_insert(error);
            self.interrupt.stop();
        };
        std::thread::scope(|scope| {
            for stage in stages {
                let work = || {
                    // Also when the thread panics, those that wait for it must not do so for ever.
                    let mut post = Post { board: &self.stages, stage: stage.index, built: None };
                    own_working_directory();
                    match self.stage(stage) {
                        Ok(built) => post.built = Some(built),
                        Err(error) => fail(error),
                    }
                };
                let thread = std::thread::Builder::new().name(format!("stage {}", stage.index));
                if let Err(error) = thread.stack_size(STACK).spawn_scoped(scope, work) {
                    fail(at(Path::new("a thread"))(error));
                    self.stages.post(stage.index, None);
                    break;
                }
            }
        });
        self.interrupt.restart();
        if let Some(error) = first_error.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
            return Err(error);
        }
        let mut built = self.stages.wait(last)?;
        if self.options.e2b_user {
            self.add_user(&mut built, last)?;
        }
        self.image(built)
    }
}

/// Mounting changes the working directory for a moment; each thread that mounts must have one of its own. Where even this
/// is forbidden, as in containers with Docker's seccomp profile, nothing can be mounted either.
fn own_working_directory() {
    let _ = nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS);
}

/// Tells the others about a stage when its thread ends, however it does.
struct Post<'a> {
    board: &'a Board<Built>,
    stage: usize,
    built: Option<Built>,
}

impl Drop for Post<'_> {
    fn drop(&mut self) {
        self.board.post(self.stage, self.built.take());
    }
}
