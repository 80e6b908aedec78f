//! tests/sdk-methods.txt: what the published clients can do, and what is known of it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

const LIST: &str = include_str!("../../sdk-methods.txt");

/// What the list says of a method for one client, by the order of its columns.
type Row = [String; 3];

fn list() -> BTreeMap<String, Row> {
    let mut rows = BTreeMap::new();
    for line in LIST.lines() {
        let (row, reason) = line.split_once('#').unwrap_or((line, ""));
        let words: Vec<&str> = row.split_whitespace().collect();
        let [method, python, asyncio, javascript] = words[..] else {
            assert!(words.is_empty(), "expected a method and three columns: {line}");
            continue;
        };
        let row = [python, asyncio, javascript].map(str::to_owned);
        let is_whole = row.iter().all(|cases| ["normal+error", "501", "-"].contains(&cases.as_str()));
        assert!(is_whole || !reason.trim().is_empty(), "a reason is missing: {line}");
        assert!(rows.insert(method.to_owned(), row).is_none(), "twice: {method}");
    }
    rows
}

/// `Sandbox.getHost` is `Sandbox.get_host` in the list.
fn python_name(name: &str) -> String {
    let characters: Vec<char> = name.chars().collect();
    let mut spelled = String::new();
    let begin = name.find('.').map_or(0, |dot| dot + 1);
    for (at, character) in characters.iter().enumerate() {
        let before = at.checked_sub(1).and_then(|at| characters.get(at));
        let is_lower = |character: Option<&char>| {
            character.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
        };
        let is_new_word = character.is_ascii_uppercase()
            && at > begin
            && (is_lower(before) || is_lower(characters.get(at + 1)));
        if is_new_word {
            spelled.push('_');
        }
        spelled.push(if at < begin { *character } else { character.to_ascii_lowercase() });
    }
    spelled
}

fn javascript() -> Command {
    let mut command = Command::new(e2e::made("TIFFIN_NODE"));
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("javascript/gateway.mjs"));
    command
}

fn lines(mut command: Command, option: &str) -> Vec<String> {
    let done = command.arg(option).output().unwrap();
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn every_method_of_the_sdks_is_accounted_for() {
    let list = list();
    let python = |mode: &str| {
        let mut command = crate::python("gateway.py");
        command.arg(mode);
        command
    };
    let clients: [&dyn Fn() -> Command; 3] = [&|| python("sync"), &|| python("async"), &javascript];
    for (column, client) in clients.into_iter().enumerate() {
        let spelled = |name: &str| if column == 2 { python_name(name) } else { name.to_owned() };
        let methods: BTreeSet<String> =
            lines(client(), "--methods").iter().map(|name| spelled(name)).collect();
        assert!(methods.len() > 100, "the client's methods were not found: {methods:?}");
        let listed = list.iter().filter(|(_, row)| row[column] != "-").map(|(method, _)| method.clone());
        let listed: BTreeSet<String> = listed.collect();
        let differences: Vec<&String> = methods.symmetric_difference(&listed).collect();
        assert!(differences.is_empty(), "column {column} of tests/sdk-methods.txt: {differences:?}");

        let mut checked: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for line in lines(client(), "--checks") {
            let (method, case) = line.rsplit_once(' ').expect("METHOD CASE");
            checked.entry(spelled(method)).or_default().insert(case.to_owned());
        }
        for (method, row) in &list {
            let is_case = |word: &&str| ["normal", "error", "501"].contains(word);
            let claimed: BTreeSet<String> =
                row[column].split('+').filter(is_case).map(str::to_owned).collect();
            let checks = checked.remove(method).unwrap_or_default();
            assert_eq!(checks, claimed, "{method} in column {column} of tests/sdk-methods.txt");
        }
        assert!(checked.is_empty(), "checks of what is no method: {checked:?}");
    }
}

#[test]
fn names_are_spelled_as_in_python() {
    for (name, expected) in [
        ("Sandbox.getHost", "Sandbox.get_host"),
        ("Template.fromAWSRegistry", "Template.from_aws_registry"),
        ("Template.toJSON", "Template.to_json"),
        ("Commands.run", "Commands.run"),
    ] {
        assert_eq!(python_name(name), expected);
    }
}
