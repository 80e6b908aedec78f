//! What a copy of a tree needs of the agent: types, modes and times of uploads, links' own texts, directories in pages.

mod support_files;

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use http::{Method, StatusCode};
use serde_json::{Value, json};
use support_files::{Agent, body_of, percent};

fn query(path: &Path) -> String {
    format!("path={}", percent(path.as_os_str().as_bytes()))
}

const STREAM: (&str, &str) = ("content-type", "application/octet-stream");

async fn put(agent: &Agent, path: &Path, headers: &[(&str, &str)], body: &str) -> (u16, Value) {
    let headers = [&[STREAM][..], headers].concat();
    let response = agent.files(Method::POST, &query(path), &headers, body.to_owned()).await;
    let status = response.status().as_u16();
    (status, serde_json::from_slice(&body_of(response).await).unwrap())
}

#[tokio::test]
async fn an_upload_can_be_a_file_a_directory_or_a_link_with_its_mode_and_time() {
    let agent = Agent::start().await;
    let time = ("x-tiffin-mtime", "1700000000.000000007");
    let of = |path: &Path| fs::symlink_metadata(path).unwrap();

    let folder = agent.path("new/folder");
    let (status, answer) =
        put(&agent, &folder, &[("x-tiffin-type", "directory"), ("x-tiffin-mode", "1711")], "").await;
    assert_eq!((status, &answer[0]["type"], &answer[0]["mode"]), (200, &"directory".into(), &0o1711.into()));
    let file = folder.join("file");
    let attributes = [("x-tiffin-type", "file"), ("x-tiffin-mode", "4755"), time];
    let (status, answer) = put(&agent, &file, &attributes, "contents").await;
    assert_eq!((status, &answer[0]["type"], &answer[0]["mode"]), (200, &"file".into(), &0o4755.into()));
    let link = folder.join("link");
    let attributes = [("x-tiffin-type", "symlink"), ("x-tiffin-mode", "777"), time];
    let (status, answer) = put(&agent, &link, &attributes, "no where").await;
    assert_eq!((status, &answer[0]["type"]), (200, &"symlink".into()));
    // A directory again, now that everything is in it.
    put(&agent, &folder, &[("x-tiffin-type", "directory"), ("x-tiffin-mode", "711"), time], "").await;
    assert_eq!((of(&folder).mode() & 0o7777, of(&file).mode() & 0o7777), (0o711, 0o4755));
    for path in [&folder, &file, &link] {
        assert_eq!((of(path).mtime(), of(path).mtime_nsec()), (1_700_000_000, 7), "{path:?}");
    }
    assert_eq!(fs::read_link(&link).unwrap(), Path::new("no where"));
    assert_eq!(fs::read(&file).unwrap(), b"contents");

    // Each stands at the path itself: a link is replaced, and not written through.
    let (target, at) = (agent.path("target"), agent.path("at"));
    fs::write(&target, b"old").unwrap();
    symlink(&target, &at).unwrap();
    put(&agent, &at, &[("x-tiffin-type", "file")], "new").await;
    assert_eq!((fs::read(&target).unwrap(), of(&at).is_file()), (b"old".to_vec(), true));
    put(&agent, &at, &[("x-tiffin-type", "symlink")], "target").await;
    assert!(of(&at).is_symlink());
    // Without a type everything is as it was.
    let (_, answer) = put(&agent, &at, &[], "through").await;
    assert_eq!(answer[0].as_object().unwrap().keys().collect::<Vec<_>>(), ["name", "path", "type"]);
    assert_eq!(fs::read(&target).unwrap(), b"through");

    let long = "x".repeat(5000);
    for (path, headers, body, words) in [
        (&folder, &[("x-tiffin-type", "symlink")][..], "x", "is a directory"),
        (&file, &[("x-tiffin-type", "directory")], "", "not a directory"),
        (&at, &[("x-tiffin-type", "symlink")], long.as_str(), "4095"),
        (&at, &[("x-tiffin-type", "fifo")], "", "expected file, directory or symlink"),
        (&at, &[("x-tiffin-mode", "999")], "", "octal"),
    ] {
        let (status, answer) = put(&agent, path, headers, body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST.as_u16(), "{answer}");
        assert!(
            answer["message"].as_str().is_some_and(|said| said.to_lowercase().contains(words)),
            "{words}: {answer}"
        );
    }
    let left: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "nothing temporary is left: {left:?}");
}

#[tokio::test]
async fn exact_entries_have_the_links_own_text_and_others_do_not() {
    let agent = Agent::start().await;
    fs::create_dir(agent.path("d")).unwrap();
    symlink("../else where", agent.path("d/l")).unwrap();
    fs::write(agent.path("d/m"), b"").unwrap();
    let path = agent.path("d/l").to_str().unwrap().to_owned();
    let stat = agent.ok("Stat", json!({"path": path, "exact": true})).await;
    assert_eq!(stat["entry"]["linkText"], "../else where");
    let stat = agent.ok("Stat", json!({"path": path})).await;
    assert_eq!(stat["entry"]["linkText"], Value::Null);
    let folder = agent.path("d").to_str().unwrap().to_owned();
    let mut names = Vec::new();
    for after in ["", "l", "m"] {
        let listed = agent.ok("ListDir", json!({"path": folder, "after": after})).await;
        let entries = listed["entries"].as_array().cloned().unwrap_or_default();
        names.push(
            entries
                .iter()
                .map(|entry| entry["name"].as_str().unwrap().to_owned())
                .collect::<Vec<_>>()
                .join(" "),
        );
    }
    assert_eq!(names, ["l m", "m", ""]);
    assert_eq!(
        agent.code("ListDir", json!({"path": folder, "after": "", "depth": 2})).await,
        "invalid_argument"
    );
}
