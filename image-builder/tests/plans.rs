//! Plans: Dockerfiles with what their steps do and the config that comes of them.
//!
//! Cases in `tests/plans/TOPIC.txt` stand between lines of `---`, with a title behind the dashes and build arguments in
//! brackets behind the title: `--- title [NAME=VALUE NAME=VALUE]`. The base images have `PATH=/bin`, a command, an
//! exposed port, and, where they are called `onbuild`, two triggers.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use dockerfile::e2b::TemplateBuild;
use dockerfile::{Dockerfile, Error};
use image_builder::ImageConfig;
use image_builder::contexts::Contexts;
use image_builder::plan::{Action, Base, BuildArgs, StageArgs, StagePlan, stages, steps};
use serde_json::json;

/// Fewer cases than this, and the corpus was not found.
const LEAST_CASES: usize = 40;

fn base_config(name: &str) -> ImageConfig {
    let triggers = ["ARG v=trigger", "COPY --chown=$v . /app"];
    ImageConfig::from_json(&json!({
        "config": {
            "Env": ["PATH=/bin"], "Cmd": ["base"], "ExposedPorts": {"80/tcp": {}}, "Labels": {"from": "base"},
            "OnBuild": if name.contains("onbuild") { json!(triggers) } else { json!(null) },
        },
    }))
}

/// As the builder does it: each stage on top of the config of the one below.
fn plan(file: &Dockerfile, args: &BuildArgs, out: &mut String) -> Result<(), Error> {
    let mut built: BTreeMap<usize, StagePlan> = BTreeMap::new();
    for stage in stages(file, args, &Contexts::default(), None)? {
        let (config, inherited) = match &stage.base {
            Base::Scratch => (ImageConfig::default(), StageArgs::default()),
            Base::Image(name) => (base_config(&name.to_string()), StageArgs::default()),
            Base::Named(name) => (base_config(name), StageArgs::default()),
            Base::Stage(below) => (built[below].config.clone(), built[below].args.clone()),
        };
        match &stage.base {
            Base::Image(name) => writeln!(out, "stage {} on image {name}", stage.index).unwrap(),
            other => writeln!(out, "stage {} on {other:?}", stage.index).unwrap(),
        }
        let planned = steps(file, stage.index, args, &Contexts::default(), &config, &inherited)?;
        for step in &planned.steps {
            match &step.action {
                Action::Config => {}
                action => writeln!(out, "  {} {action:?}", step.at).unwrap(),
            }
        }
        built.insert(stage.index, planned);
    }
    let last = built.values().last().unwrap();
    let config = last.config.to_json("2026-01-01T00:00:00Z", &[], &[]);
    writeln!(out, "config {}", config["config"]).unwrap();
    Ok(())
}

#[test]
fn every_plan_is_as_it_was() {
    let mut count = 0;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/plans");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
    files.sort();
    for path in files {
        let text = std::fs::read_to_string(&path).unwrap();
        let mut out = String::new();
        for case in text.split("--- ").filter(|case| !case.is_empty()) {
            count += 1;
            let (title, text) = case.split_once('\n').unwrap();
            let given = title.split_once('[').map(|(_, args)| args.trim_end_matches(']')).unwrap_or_default();
            let pairs = given.split_whitespace().filter_map(|pair| pair.split_once('='));
            let args = BuildArgs(pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect());
            writeln!(out, "== {title}").unwrap();
            text.lines().for_each(|line| writeln!(out, "| {line}").unwrap());
            let file = Dockerfile::parse("Dockerfile", text.as_bytes());
            if let Err(error) = file.and_then(|file| plan(&file, &args, &mut out)) {
                writeln!(out, "error {error}").unwrap();
            }
            out.push('\n');
        }
        let topic = path.file_stem().unwrap().to_str().unwrap();
        insta::with_settings!({ omit_expression => true, prepend_module_to_snapshot => false }, {
            insta::assert_snapshot!(topic, out);
        });
    }
    assert!(count >= LEAST_CASES, "{count} cases");
}

#[test]
fn template_steps_have_the_same_plan() {
    let json = json!({"fromImage": "debian:bookworm", "startCmd": "serve", "steps": [
        {"type": "COPY", "args": ["src", "/app/", "user", "0640"], "filesHash": "abc"},
        {"type": "ENV", "args": ["A", "it's $HOME"]},
        {"type": "WORKDIR", "args": ["/app"]},
        {"type": "RUN", "args": ["make \"$A\"", "ada"]},
        {"type": "USER", "args": ["ada"]},
    ]});
    let build = TemplateBuild::parse("template", json.to_string().as_bytes()).unwrap();
    let mut out = String::new();
    plan(&build.dockerfile, &BuildArgs::default(), &mut out).unwrap();
    insta::assert_snapshot!(out);
}
