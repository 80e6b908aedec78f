//! `image-builder explain`.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use image_builder::{BuildOf, Explanation, StepOutcome};
use template::DataDir;

use super::print;

pub(super) const HELP: &str = concat!(
    "Examples:\n",
    "  image-builder explain                    the last build of the folder that you are in\n",
    "  image-builder explain app -f app/Dockerfile.ci --target test\n",
    "  image-builder explain registry.example/app:1\n",
    "  image-builder explain sha256:... --json\n\n",
    "Steps that were carried out are compared with the nearest earlier one: files that changed, build arguments (arg),\n",
    "variables (env), the base image or the step before, the instruction itself. Values of variables are not told.\n\n",
    "Exit codes: 0 done, 1 it failed, 2 wrong usage, or no such build is remembered."
);

#[derive(Debug, Args)]
pub(super) struct ExplainCommand {
    /// The context of the build, or the image's name or digest
    #[arg(default_value = ".")]
    build: String,
    /// The Dockerfile of the build
    #[arg(long, short, value_name = "FILE")]
    file: Option<PathBuf>,
    /// The stage that was built
    #[arg(long, value_name = "STAGE")]
    target: Option<String>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Carries the command out.
pub(super) fn explain(command: ExplainCommand, data: &DataDir) -> anyhow::Result<()> {
    let ExplainCommand { build, file, target, json } = command;
    let folder = PathBuf::from(&build);
    let which = match folder.is_dir() {
        true => BuildOf::Context { context: folder, dockerfile: file, target },
        false => BuildOf::Image(build),
    };
    let explanation = image_builder::explain(data, &which)?;
    print(json, &explanation, &text(&explanation))
}

fn text(explanation: &Explanation) -> String {
    let Explanation { dockerfile, began, digest, error, steps, .. } = explanation;
    let mut text = format!("{}, built at {began}", dockerfile.display());
    if let Some(digest) = digest {
        let _ = write!(text, "\n{digest}");
    }
    for step in steps {
        let first = step.text.lines().next().unwrap_or_default();
        let outcome = match step.outcome {
            StepOutcome::Config => continue,
            StepOutcome::Cached => "cached",
            StepOutcome::Shared => "shared",
            StepOutcome::Executed => "executed",
            StepOutcome::Failed => "failed",
        };
        let _ = write!(text, "\n{outcome:8} {} {first}", step.step);
        for reason in &step.reasons {
            let _ = write!(text, "\n           {}", reason.line());
        }
    }
    if let Some(error) = error {
        let _ = write!(text, "\n{error}");
    }
    text
}
