//! The parser and the lint: every word of the tree and every warning is in the file, and what an ONBUILD leaves in an
//! image can be read again.
#![no_main]

use dockerfile::expand::expand;
use dockerfile::lint::lint;
use dockerfile::{Dockerfile, Ignore, Instruction};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let lines = input.split(|byte| *byte == b'\n').count();
    let file = match Dockerfile::parse("D", input) {
        Ok(file) => file,
        Err(error) => {
            assert!(error.to_string().len() < 10_000);
            return;
        }
    };
    let variables = |name: &str| -> Option<&'static str> { (name == "v").then_some("/x,ro") };
    let ignore = Ignore::parse("I", b"*\n!a\n").unwrap();
    for warning in lint(&file, Some(&ignore)) {
        assert!((1..=lines).contains(&warning.at.line), "{warning:?}");
    }
    for stage in &file.stages {
        assert!(!stage.image.text.is_empty());
        for statement in &stage.statements {
            match &statement.instruction {
                Instruction::Run(run) => {
                    for mount in &run.mounts {
                        let _ = mount.resolve(&mut |text| expand(text, file.escape(), &variables));
                    }
                }
                Instruction::Copy(copy) => assert!(!copy.files.sources.is_empty()),
                Instruction::OnBuild(trigger) => {
                    let _ = Dockerfile::parse_trigger(&trigger.text);
                }
                _ => {}
            }
        }
    }
});
