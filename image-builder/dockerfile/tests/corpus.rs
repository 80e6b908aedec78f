//! A corpus of Dockerfiles, one file of cases for each topic: what is written, and its syntax tree, warnings or error.
//!
//! Cases in `tests/corpus/TOPIC.txt` stand between lines of `---`, with a title behind the dashes. `\r` and `\t` at
//! places where an editor would lose them are written `<CR>` and `<TAB>`, a byte-order mark `<BOM>`.

use std::fmt::Write as _;
use std::path::Path;

use dockerfile::{Dockerfile, Ignore, Instruction, Statement, lint};

/// Fewer cases than this, and the corpus was not found.
const LEAST_CASES: usize = 150;

fn topics() -> Vec<(String, Vec<(String, String)>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
    files.sort();
    let topic = |path: &Path| {
        let text = std::fs::read_to_string(path).unwrap();
        let mut cases: Vec<(String, String)> = Vec::new();
        for line in text.split_inclusive('\n') {
            match line.strip_prefix("--- ") {
                Some(title) => cases.push((title.trim().to_owned(), String::new())),
                None => cases.last_mut().unwrap().1.push_str(line),
            }
        }
        (path.file_stem().unwrap().to_str().unwrap().to_owned(), cases)
    };
    files.iter().map(|path| topic(path)).collect()
}

fn raw(text: &str) -> Vec<u8> {
    text.replace("<CR>", "\r").replace("<TAB>", "\t").replace("<BOM>", "\u{feff}").into_bytes()
}

fn statement(out: &mut String, statement: &Statement) {
    writeln!(out, "  {} {:?}", statement.at, statement.instruction).unwrap();
}

fn tree(file: &Dockerfile) -> String {
    let mut out = String::new();
    let directives = &file.directives;
    if let Some(syntax) = &directives.syntax {
        writeln!(out, "syntax {syntax:?}").unwrap();
    }
    if directives.escape != '\\' {
        writeln!(out, "escape {:?}", directives.escape).unwrap();
    }
    for arg in &file.global_args {
        statement(&mut out, arg);
    }
    for stage in &file.stages {
        write!(out, "stage {:?}", stage.image).unwrap();
        if let Some(platform) = &stage.platform {
            write!(out, " platform {platform:?}").unwrap();
        }
        if let Some(name) = &stage.name {
            write!(out, " as {}", name.name).unwrap();
        }
        out.push('\n');
        assert_eq!(stage.from.instruction, Instruction::From);
        stage.statements.iter().for_each(|one| statement(&mut out, one));
    }
    let ignore = Ignore::parse(".dockerignore", b"secret\n*.log\n").unwrap();
    for warning in lint::lint(file, Some(&ignore)) {
        writeln!(out, "warning {} {}: {}", warning.at, warning.rule.name(), warning.message).unwrap();
    }
    if directives.check.error {
        out.push_str("warnings are errors\n");
    }
    out
}

#[test]
fn every_case_is_as_it_was() {
    let mut count = 0;
    for (topic, cases) in topics() {
        let mut out = String::new();
        for (title, text) in cases {
            count += 1;
            let shown: String = text.lines().map(|line| format!("| {line}\n")).collect();
            let result = match Dockerfile::parse("Dockerfile", &raw(&text)) {
                Ok(file) => tree(&file),
                Err(error) => format!("error {error}\n"),
            };
            writeln!(out, "== {title}\n{shown}{result}").unwrap();
        }
        insta::with_settings!({ omit_expression => true, prepend_module_to_snapshot => false }, {
            insta::assert_snapshot!(topic, out);
        });
    }
    assert!(count >= LEAST_CASES, "{count} cases");
}
