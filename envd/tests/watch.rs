//! Watches, streamed and polled, over the Unix socket.

mod support_files;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::{Value, json};
use support_files::{Agent, DEADLINE, short};

#[tokio::test]
async fn a_stream_tells_what_happens_after_its_start_event() {
    let agent = Agent::start().await;
    let dir = agent.path("watched");
    fs::create_dir(&dir).unwrap();
    let mut events = agent.watch(json!({"path": dir, "includeEntry": true}), &[]).await;
    assert_eq!(events.next().await.unwrap(), json!({"start": {}}));

    fs::write(dir.join("a"), b"12345").unwrap();
    assert_eq!(events.until("WRITE a").await, ["CREATE a", "WRITE a"]);
    fs::set_permissions(dir.join("a"), fs::Permissions::from_mode(0o600)).unwrap();
    let chmod = events.next().await.unwrap();
    assert_eq!(short(&chmod["filesystem"]), "CHMOD a");
    assert_eq!(chmod["filesystem"]["entry"]["permissions"], "-rw-------");
    assert_eq!(chmod["filesystem"]["entry"]["path"], json!(dir.join("a")));
    assert_eq!(chmod["filesystem"]["entry"]["size"], "5");
    fs::rename(dir.join("a"), dir.join("b")).unwrap();
    assert_eq!(events.until("CREATE b").await, ["RENAME a", "CREATE b"]);
    fs::create_dir(dir.join("sub")).unwrap();
    fs::write(dir.join("sub/hidden"), b"").unwrap();
    fs::remove_file(dir.join("b")).unwrap();
    let removed = events.until("REMOVE b").await;
    assert_eq!(removed, ["CREATE sub", "REMOVE b"], "what is in sub-directories is not told");

    // An upload is a write, whatever the agent does underneath.
    agent.put(&dir.join("up"), "1").await;
    assert_eq!(events.until("WRITE up").await, ["CREATE up", "WRITE up"]);
    agent.put(&dir.join("up"), "2").await;
    assert_eq!(events.until("WRITE up").await, ["WRITE up"]);

    fs::remove_dir_all(&dir).unwrap();
    events.until("REMOVE .").await;
}

#[tokio::test]
async fn a_recursive_watch_covers_what_comes_later() {
    let agent = Agent::start().await;
    let dir = agent.path("watched");
    fs::create_dir_all(dir.join("old/deep")).unwrap();
    let outside = agent.path("outside");
    fs::create_dir_all(outside.join("in")).unwrap();
    fs::write(outside.join("in/file"), b"").unwrap();
    std::os::unix::fs::symlink(&outside, dir.join("link")).unwrap();
    let mut events = agent.watch(json!({"path": dir, "recursive": true}), &[]).await;
    events.next().await.unwrap();

    fs::write(dir.join("old/deep/file"), b"").unwrap();
    assert_eq!(events.until("CREATE old/deep/file").await, ["CREATE old/deep/file"]);
    fs::rename(dir.join("old"), dir.join("new")).unwrap();
    fs::write(dir.join("new/deep/file2"), b"").unwrap();
    let renamed = events.until("CREATE new/deep/file2").await;
    assert_eq!(renamed, ["RENAME old", "CREATE new", "CREATE new/deep/file2"]);
    fs::rename(dir.join("new"), outside.join("new")).unwrap();
    fs::write(outside.join("new/deep/file3"), b"").unwrap();
    fs::write(outside.join("in/file2"), b"").unwrap();
    fs::rename(outside.join("in"), dir.join("in")).unwrap();
    let mut moved = events.until("CREATE in/file2").await;
    if moved.len() < 4 {
        moved.extend(events.until("CREATE in/file").await);
    }
    moved.sort();
    assert_eq!(moved, ["CREATE in", "CREATE in/file", "CREATE in/file2", "RENAME new"]);
    fs::write(dir.join("in/file3"), b"").unwrap();
    assert_eq!(events.until("CREATE in/file3").await, ["CREATE in/file3"]);
}

/// Directories that are filled as fast as they are made: every file is told, and told once.
#[tokio::test]
async fn nothing_in_a_burst_of_new_directories_is_missed_or_told_twice() {
    let agent = Agent::start().await;
    let dir = agent.path("watched");
    fs::create_dir(&dir).unwrap();
    let mut events = agent.watch(json!({"path": dir, "recursive": true}), &[]).await;
    events.next().await.unwrap();
    let mut expected = Vec::new();
    for n in 0..300 {
        let deep = format!("d{n}/e/f");
        fs::create_dir_all(dir.join(&deep)).unwrap();
        fs::write(dir.join(&deep).join("file"), b"").unwrap();
        for name in [format!("d{n}"), format!("d{n}/e"), deep.clone(), format!("{deep}/file")] {
            expected.push(format!("CREATE {name}"));
        }
    }
    fs::write(dir.join("last"), b"").unwrap();
    // The last directories' own events may come after this one: all are waited for.
    let mut told = Vec::new();
    while told.len() < expected.len() + 1 {
        let message = events.next().await.unwrap();
        told.push(short(&message["filesystem"]));
    }
    fs::write(dir.join("end"), b"").unwrap();
    assert_eq!(events.until("CREATE end").await, ["CREATE end"]);
    expected.push("CREATE last".into());
    told.sort();
    expected.sort();
    assert_eq!(told, expected);
}

#[tokio::test]
async fn a_quiet_stream_is_kept_alive() {
    let agent = Agent::start().await;
    let headers = [("keepalive-ping-interval", "1")];
    let mut events = agent.watch(json!({"path": agent.folder()}), &headers).await;
    assert_eq!(events.next().await.unwrap(), json!({"start": {}}));
    assert_eq!(events.next().await.unwrap(), json!({"keepalive": {}}));
    assert_eq!(events.next().await.unwrap(), json!({"keepalive": {}}));
    let mut bad = agent.watch(json!({"path": "/"}), &[("keepalive-ping-interval", "0")]).await;
    assert_eq!(bad.next().await.unwrap_err()["error"]["code"], "invalid_argument");
}

async fn polled(agent: &Agent, id: &str, last: &str) -> Vec<String> {
    let mut seen = Vec::new();
    let waiting = async {
        while seen.last().map(String::as_str) != Some(last) {
            let answer = agent.ok("GetWatcherEvents", json!({"watcherId": id})).await;
            let events = answer["events"].as_array().cloned().unwrap_or_default();
            seen.extend(events.iter().map(short));
        }
    };
    tokio::time::timeout(DEADLINE, waiting).await.expect("the event comes");
    seen
}

#[tokio::test]
async fn a_polled_watcher_collects_until_it_is_asked() {
    let agent = Agent::start().await;
    let dir = agent.path("watched");
    fs::create_dir(&dir).unwrap();
    let created = agent.ok("CreateWatcher", json!({"path": dir, "recursive": true})).await;
    let id = created["watcherId"].as_str().unwrap();
    fs::create_dir(dir.join("d")).unwrap();
    fs::write(dir.join("d/f"), b"").unwrap();
    assert_eq!(polled(&agent, id, "CREATE d/f").await, ["CREATE d", "CREATE d/f"]);
    assert_eq!(agent.ok("GetWatcherEvents", json!({"watcherId": id})).await, json!({}));
    agent.ok("RemoveWatcher", json!({"watcherId": id})).await;
    assert_eq!(agent.code("GetWatcherEvents", json!({"watcherId": id})).await, "not_found");
    assert_eq!(agent.code("RemoveWatcher", json!({"watcherId": id})).await, "not_found");
}

#[tokio::test]
async fn lost_events_are_told_once_and_the_watcher_goes_on() {
    let agent = Agent::start().await;
    let dir = agent.path("watched");
    fs::create_dir_all(dir.join("sub")).unwrap();
    let created = agent.ok("CreateWatcher", json!({"path": dir, "recursive": true})).await;
    let id = created["watcherId"].as_str().unwrap();
    let mut stream = agent.watch(json!({"path": dir}), &[]).await;
    stream.next().await.unwrap();
    // More than any queue keeps, the kernel's of the unread stream included. Alternating, so that none are merged.
    for n in 0..60_000 {
        fs::write(dir.join(format!("file-{n:0>180}", n = n % 2)), b"x").unwrap();
        if n % 1000 == 0 {
            fs::remove_file(dir.join(format!("file-{n:0>180}", n = 0))).unwrap();
        }
    }
    let lost = async {
        loop {
            let (status, answer) = agent.call("GetWatcherEvents", json!({"watcherId": id})).await;
            if !status.is_success() {
                return answer["code"].clone();
            }
        }
    };
    assert_eq!(tokio::time::timeout(DEADLINE, lost).await.expect("a loss"), "resource_exhausted");
    let mut n = 0;
    let goes_on = async {
        loop {
            n += 1;
            fs::write(dir.join(format!("sub/after-{n}")), b"").unwrap();
            let (status, answer) = agent.call("GetWatcherEvents", json!({"watcherId": id})).await;
            if status.is_success() && answer.to_string().contains("sub/after-") {
                return;
            }
        }
    };
    tokio::time::timeout(DEADLINE, goes_on).await.expect("it goes on");
    let ended = async { while stream.next().await.is_ok() {} };
    if tokio::time::timeout(DEADLINE, ended).await.is_err() {
        panic!("the stream neither ended nor fell behind");
    }
}

#[tokio::test]
async fn what_cannot_be_watched_is_refused() {
    // A network file system, as far as its type says.
    let fuse = "mkdir fuse; exec 3<>/dev/fuse; \
                mount -i -t fuse -o fd=3,rootmode=40000,user_id=0,group_id=0 hang fuse";
    if !Path::new("/dev/fuse").exists() {
        eprintln!("skipped: no /dev/fuse");
        return;
    }
    let agent = Agent::start_after(fuse).await;
    fs::write(agent.path("file"), b"").unwrap();
    let code = async |message: Value| {
        let created = agent.code("CreateWatcher", message.clone()).await;
        let mut stream = agent.watch(message, &[]).await;
        assert_eq!(stream.next().await.unwrap_err()["error"]["code"], created.as_str());
        created
    };
    assert_eq!(code(json!({"path": agent.path("missing")})).await, "not_found");
    assert_eq!(code(json!({"path": agent.path("file")})).await, "invalid_argument");
    assert_eq!(code(json!({"path": "~nobody"})).await, "invalid_argument");
    // It hangs: the call's own deadline ends it.
    let message = json!({"path": agent.path("fuse")});
    let (_, hung) = agent.call_with("CreateWatcher", message, &[("connect-timeout-ms", "300")]).await;
    assert_eq!(hung["code"], "deadline_exceeded");
}

#[tokio::test]
async fn watchers_are_bounded_and_given_back() {
    let agent = Agent::start().await;
    let message = json!({"path": agent.folder()});
    let mut ids = Vec::new();
    let refused = loop {
        let (status, answer) = agent.call("CreateWatcher", message.clone()).await;
        if !status.is_success() {
            break answer;
        }
        ids.push(answer["watcherId"].clone());
        assert!(ids.len() <= 64);
    };
    assert_eq!(refused["code"], "resource_exhausted", "{refused}");
    for id in &ids {
        agent.ok("RemoveWatcher", json!({"watcherId": id})).await;
    }
    let again = async {
        while !agent.call("CreateWatcher", message.clone()).await.0.is_success() {}
        // A stream that its client leaves gives its place back, too.
        for _ in 0..100 {
            let mut stream = agent.watch(message.clone(), &[]).await;
            while stream.next().await.is_err() {
                stream = agent.watch(message.clone(), &[]).await;
            }
        }
    };
    tokio::time::timeout(DEADLINE, again).await.expect("places are given back");
}

#[tokio::test]
async fn names_that_are_not_utf8_are_told_in_their_escape() {
    let agent = Agent::start().await;
    let mut events = agent.watch(json!({"path": agent.folder()}), &[]).await;
    events.next().await.unwrap();
    fs::write(agent.folder().join(OsStr::from_bytes(b"a\xff")), b"").unwrap();
    assert_eq!(events.until("CREATE a\u{efff}").await, ["CREATE a\u{efff}"]);
}
