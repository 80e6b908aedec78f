//! The protocol of the first SDKs, with the real agent behind it.

mod support;
mod wire;

use futures::SinkExt;
use serde_json::{Value, json};
use support::{Legacy, content, eventually, is_running};
use tokio_tungstenite::tungstenite::Message;

/// The lines that a subscription told.
fn lines(told: &[(String, Value)], subscription: &str) -> Vec<String> {
    let of = told.iter().filter(|(id, _)| id == subscription);
    of.map(|(_, result)| result["line"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_process_tells_its_lines_before_its_end() {
    let legacy = Legacy::start().await;
    let mut client = legacy.connect().await;
    let command = "printf 'a\\n\\n\\303\\251'; echo oops >&2; pwd >&2; test $PYTHONUNBUFFERED = 1 && exit 3";
    let [exit, stdout, stderr] = client.start("aB3", command).await;
    let told = client.told_until(&exit).await;
    assert_eq!(told.last().unwrap().1, 3);
    assert_eq!(lines(&told, &stdout), ["a", "", "é"]);
    // Without a directory it runs at home.
    assert_eq!(lines(&told, &stderr), ["oops".to_owned(), std::env::var("HOME").unwrap()]);
    let (_, line) = told.iter().find(|(id, _)| *id == stdout).unwrap();
    assert_eq!(line["type"], "Stdout");
    // Nanoseconds: after 2020, in a unit that has 19 digits.
    assert!(line["timestamp"].as_u64().unwrap() > 1_577_836_800_000_000_000, "{line}");
    for subscription in [&exit, &stdout, &stderr] {
        assert_eq!(client.call("process_unsubscribe", json!([subscription])).await, true);
    }
    // Its name is free again.
    let [exit, ..] = client.start("aB3", "kill -9 $$").await;
    assert_eq!(client.told_until(&exit).await.last().unwrap().1, -1);
}

#[tokio::test]
async fn input_arrives_in_order_and_a_kill_is_an_end() {
    let legacy = Legacy::start().await;
    let mut client = legacy.connect().await;
    let [exit, stdout, _] = client.start("p", "cat").await;
    let mut ids = Vec::new();
    for number in 0..200 {
        ids.push(client.send("process_stdin", json!(["p", format!("{number}\n")])).await);
    }
    for id in ids {
        assert_eq!(client.answer_to(&id).await["result"], Value::Null);
    }
    for number in 0..200 {
        let (id, line) = client.told().await;
        assert_eq!((id, &line["line"]), (stdout.clone(), &json!(number.to_string())));
    }
    // Starting it again is attaching to it.
    assert_eq!(client.call("process_start", json!(["p", "false", {}, ""])).await, "p");
    assert_eq!(client.call("process_kill", json!(["p"])).await, Value::Null);
    assert_eq!(client.told().await, (exit, json!(-1)));
    assert_eq!(client.call("process_kill", json!(["p"])).await, Value::Null);
    assert_eq!(client.call("process_kill", json!(["never"])).await, Value::Null);
    let refused = client.refused("process_stdin", json!(["p", "x"])).await;
    assert_eq!(refused, (-32000, "process 'p' not found".into()));
}

#[tokio::test]
async fn a_missing_directory_has_the_words_that_the_client_knows() {
    let legacy = Legacy::start().await;
    let mut client = legacy.connect().await;
    client.subscribe("process_subscribe", json!(["onExit", "aB3"])).await;
    let (code, message) = client.refused("process_start", json!(["aB3", "true", {}, "/no/such"])).await;
    assert_eq!(code, -32000);
    assert_eq!(message, "error starting process 'aB3': fork/exec /bin/bash: no such file or directory");
    let (code, _) = client.refused("terminal_start", json!(["t", 80, 24, {}, "true", "/no/such"])).await;
    assert_eq!(code, -32000);
}

#[tokio::test]
async fn the_last_subscriber_takes_the_process_along() {
    let legacy = Legacy::start().await;
    let command = |name: &str| format!("sleep 1000 & echo $! > {}; wait", legacy.path(name));
    let mut client = legacy.connect().await;
    let subscriptions = client.start("one", &command("one")).await;
    let pid = content(&legacy.path("one")).await;
    for subscription in &subscriptions[1..] {
        client.call("process_unsubscribe", json!([subscription])).await;
    }
    assert!(is_running(&pid), "it has a subscriber");
    client.call("process_unsubscribe", json!([subscriptions[0]])).await;
    eventually("killed", async || !is_running(&pid)).await;

    client.start("two", &command("two")).await;
    let pid = content(&legacy.path("two")).await;
    let mut other = legacy.connect().await;
    let exit = other.subscribe("process_subscribe", json!(["onExit", "two"])).await;
    drop(client);
    // Whenever the gateway notices that: the other's subscription keeps it.
    assert_eq!(other.call("process_start", json!(["two", "false", {}, ""])).await, "two");
    assert!(is_running(&pid), "another connection subscribed");
    drop(other);
    eventually("killed", async || !is_running(&pid)).await;
    let mut last = legacy.connect().await;
    assert_ne!(last.subscribe("process_subscribe", json!(["onExit", "two"])).await, exit);
}

#[tokio::test]
async fn a_slow_client_slows_the_process_and_misses_nothing() {
    const LINES: usize = 800;
    let legacy = Legacy::start().await;
    let mut client = legacy.connect().await;
    let command = format!(
        "echo $$ > {}; line=$(head -c 65536 /dev/zero | tr '\\0' x); for i in $(seq {LINES}); do echo $line; done",
        legacy.path("pid")
    );
    let [exit, stdout, _] = client.start("p", &command).await;
    let pid = content(&legacy.path("pid")).await;
    // Written so far, until it stands still: this client does not read.
    let written = || {
        let io = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
        let line = io.lines().find_map(|line| line.strip_prefix("wchar: ")).unwrap_or_default();
        line.parse::<usize>().unwrap_or(0)
    };
    let mut before = usize::MAX;
    loop {
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        let now = written();
        if now == before {
            break;
        }
        before = now;
    }
    assert!(is_running(&pid) && before < LINES * 65536, "{before} bytes were taken");
    let told = client.told_until(&exit).await;
    let lines = lines(&told, &stdout);
    assert_eq!(lines.len(), LINES);
    assert!(lines.iter().all(|line| line.len() == 65536));
}

#[tokio::test]
async fn files_are_written_read_listed_and_removed() {
    let legacy = Legacy::start().await;
    let mut client = legacy.connect().await;
    let path = |name: &str| legacy.path(name);
    assert_eq!(client.call("filesystem_makeDir", json!([path("d/e")])).await, Value::Null);
    assert_eq!(client.call("filesystem_makeDir", json!([path("d/e")])).await, Value::Null, "it may be there");
    assert_eq!(client.call("filesystem_write", json!([path("d/f"), "é\n"])).await, Value::Null);
    assert_eq!(client.call("filesystem_read", json!([path("d/f")])).await, "é\n");
    assert_eq!(client.call("filesystem_readBase64", json!([path("d/f")])).await, "w6kK");
    assert_eq!(client.call("filesystem_writeBase64", json!([path("d/g"), "/wBB"])).await, Value::Null);
    assert_eq!(std::fs::read(path("d/g")).unwrap(), b"\xff\0A");
    assert_eq!(client.call("filesystem_read", json!([path("d/g")])).await, "\u{fffd}\0A");
    std::os::unix::fs::symlink("e", path("d/link")).unwrap();
    let listed = client.call("filesystem_list", json!([path("d")])).await;
    let item = |name: &str, is_dir: bool| json!({"name": name, "isDir": is_dir});
    assert_eq!(listed, json!([item("e", true), item("f", false), item("g", false), item("link", false)]));
    assert_eq!(client.call("filesystem_remove", json!([path("d")])).await, Value::Null);
    for (method, params) in [
        ("filesystem_list", json!([path("d")])),
        ("filesystem_read", json!([path("d/f")])),
        ("filesystem_readBase64", json!([path("d/f")])),
        ("filesystem_write", json!([legacy.folder.path(), "a directory"])),
        ("filesystem_makeDir", json!(["/proc/none"])),
        ("filesystem_subscribe", json!(["watchDir", path("d")])),
    ] {
        let (code, message) = client.refused(method, params).await;
        assert!(code == -32000 && message.starts_with("error "), "{method}: {message}");
    }
    std::fs::File::create(path("big")).unwrap().set_len(1 << 30).unwrap();
    let (_, message) = client.refused("filesystem_read", json!([path("big")])).await;
    assert!(message.contains("more than 16777216 bytes"), "{message}");
}

#[tokio::test]
async fn a_directory_is_watched_until_it_is_not() {
    let legacy = Legacy::start().await;
    let mut client = legacy.connect().await;
    client.call("filesystem_makeDir", json!([legacy.path("d/sub")])).await;
    let folder = legacy.path("d");
    let watch = client.subscribe("filesystem_subscribe", json!(["watchDir", folder])).await;
    // Below it is not in it.
    client.call("filesystem_write", json!([legacy.path("d/sub/x"), ""])).await;
    client.call("filesystem_makeDir", json!([legacy.path("d/new")])).await;
    let (id, change) = client.told().await;
    assert_eq!(id, watch);
    assert_eq!(
        (&change["name"], &change["operation"], &change["isDir"], &change["path"]),
        (&json!("new"), &json!("Create"), &json!(true), &json!(format!("{folder}/new")))
    );
    assert!(change["timestamp"].is_u64());
    client.call("filesystem_remove", json!([legacy.path("d/new")])).await;
    while client.told().await.1["operation"] != "Remove" {}
    assert_eq!(client.call("filesystem_unsubscribe", json!([watch])).await, true);
    let refused = client.refused("filesystem_unsubscribe", json!([watch])).await;
    assert_eq!(refused, (-32000, "subscription not found".into()));
}

#[tokio::test]
async fn a_terminal_shows_takes_and_is_resized() {
    let legacy = Legacy::start().await;
    let mut client = legacy.connect().await;
    let data = client.subscribe("terminal_subscribe", json!(["onData", "t"])).await;
    let exit = client.subscribe("terminal_subscribe", json!(["onExit", "t"])).await;
    let refused = client.refused("terminal_data", json!(["t", "x"])).await;
    assert_eq!(refused, (-32000, "terminal 't' not found".into()));
    assert_eq!(client.call("terminal_start", json!(["t", 80, 24])).await, "t");
    assert_eq!(client.call("terminal_resize", json!(["t", 101, 33])).await, Value::Null);
    for line in ["stty size; echo $TERM\r", "printf '\\303'; printf '\\251|'; exit\r"] {
        assert_eq!(client.call("terminal_data", json!(["t", line])).await, Value::Null);
    }
    let told = client.told_until(&exit).await;
    let shown: String =
        told.iter().filter(|(id, _)| *id == data).map(|(_, text)| text.as_str().unwrap()).collect();
    assert!(shown.contains("33 101") && shown.contains("xterm") && shown.contains("é|"), "{shown:?}");

    let exit = client.subscribe("terminal_subscribe", json!(["onExit", "u"])).await;
    client.call("terminal_start", json!(["u", 80, 24, {"A": "1"}, "sleep 1000", "/"])).await;
    assert_eq!(client.call("terminal_destroy", json!(["u"])).await, Value::Null);
    client.told_until(&exit).await;
    let (code, _) = client.refused("terminal_resize", json!(["u", 1, 1])).await;
    assert_eq!(code, -32000);
}

#[tokio::test]
async fn ports_that_open_are_told() {
    let legacy = Legacy::start().await;
    let mut client = legacy.connect().await;
    let scan = client.subscribe("codeSnippet_subscribe", json!(["scanOpenedPorts"])).await;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let wanted = json!({"State": "LISTEN", "Ip": "127.0.0.1", "Port": port});
    loop {
        let (id, ports) = client.told().await;
        assert_eq!(id, scan);
        if ports.as_array().unwrap().contains(&wanted) {
            break;
        }
    }
    assert_eq!(client.call("codeSnippet_unsubscribe", json!([scan])).await, true);
}

#[tokio::test]
async fn a_sandbox_with_a_token_is_closed_to_clients_that_cannot_send_one() {
    let legacy = Legacy::with_token(Some("secret")).await;
    let error = legacy.upgrade().await.unwrap_err();
    let tokio_tungstenite::tungstenite::Error::Http(answer) = error else { panic!("{error}") };
    assert_eq!(answer.status(), 401);
    for path in ["/ping", "/file?path=/etc/passwd", "/sync"] {
        let request = http::Request::get(path).header("host", "x").body(String::new()).unwrap();
        let (status, body) = legacy.http(request).await;
        assert!(status == 401 && body.contains("access token"), "{path}: {status} {body}");
    }
}

#[tokio::test]
async fn plain_requests_are_served_beside_the_socket() {
    let legacy = Legacy::start().await;
    let get = |target: String| http::Request::get(target).header("host", "x").body(String::new()).unwrap();
    let text = |status: u16, body: &str| (http::StatusCode::from_u16(status).unwrap(), body.to_owned());
    assert_eq!(legacy.http(get("/ping".into())).await, text(200, "pong"));
    assert_eq!(legacy.http(get("/sync".into())).await.0, 200);
    assert_eq!(legacy.http(get("/nope".into())).await.0, 404);
    assert_eq!(legacy.http(get("/ws".into())).await.0, 400, "no upgrade");
    assert_eq!(legacy.http(get("/file?path=/no/such".into())).await.0, 404);
    let name = legacy.path("up");
    let body = format!(
        "--b\r\ncontent-disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\r\nh\u{e9}llo\r\n--b--\r\n"
    );
    let upload = http::Request::post("/file")
        .header("host", "x")
        .header("content-type", "multipart/form-data; boundary=b")
        .body(body)
        .unwrap();
    let (status, said) = legacy.http(upload).await;
    assert_eq!(status, 200, "{said}");
    assert_eq!(legacy.http(get(format!("/file?path={name}"))).await, text(200, "h\u{e9}llo"));
}

#[tokio::test]
async fn a_message_that_is_too_long_ends_the_connection_alone() {
    let legacy = Legacy::start().await;
    let mut client = legacy.connect().await;
    let sent = client.socket.send(Message::text("x".repeat((16 << 20) + 1))).await;
    let ended = async {
        use futures::StreamExt;
        while let Some(Ok(_)) = client.socket.next().await {}
    };
    tokio::time::timeout(support::DEADLINE, ended).await.expect("an end");
    drop(sent);
    assert_eq!(legacy.connect().await.call("filesystem_makeDir", json!(["/tmp"])).await, Value::Null);
}
