//! Files that clients send.

use std::fs;
use std::process::Command;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::host::{Answer, Host, Served};

fn hash(digit: char) -> String {
    digit.to_string().repeat(64)
}

/// Where to send files, as the client is told: the part behind the address.
fn link(gateway: &Served, template: &str, digit: char) -> (bool, String) {
    let answer = gateway.get(&format!("/templates/{template}/files/{}", hash(digit))).is(201);
    let url = answer["url"].as_str().unwrap();
    let target = url.strip_prefix(&format!("http://{}", gateway.address)).expect("an address of the gateway");
    (answer["present"].as_bool().unwrap(), target.to_owned())
}

/// As the clients do it: without a key.
fn put(gateway: &Served, target: &str, more: &str, bytes: &[u8]) -> Answer {
    let head = format!("PUT {target} HTTP/1.1\r\nContent-Length: {}{more}", bytes.len());
    gateway.raw(&head, bytes).expect("an answer")
}

#[test]
fn files_are_sent_once_and_copied_by_their_hash() {
    let host = Host::new();
    let mut gateway = host.serve(&[]);
    let build = gateway.request(json!({ "name": "box" }));
    gateway
        .get(&format!("/templates/{}/files/..%2f..%2fgateway.db", build.template))
        .refuses(400, "64 hexadecimal digits");
    let (present, target) = link(&gateway, &build.template, 'a');
    assert!(!present);
    put(&gateway, &target, "", b"an archive").is(204);
    assert!(link(&gateway, &build.template, 'a').0);
    let copy = json!({ "type": "COPY", "args": ["a", "/a", "", ""], "filesHash": hash('a') });
    gateway.start(&build, json!({ "fromImage": "debian", "steps": [copy] })).is(202);
    gateway.until(&build, "ready");

    // An address is for one file, and nobody makes one.
    let other = target.replace(&hash('a'), &hash('b'));
    put(&gateway, &other, "", b"x").refuses(403, "was not given by this gateway");
    put(&gateway, target.split("signature=").next().unwrap(), "", b"x").is(400);
    put(&gateway, &format!("{target}0"), "", b"x").refuses(403, "was not given by this gateway");
    // Bytes that are not what was said.
    let digest = |bytes: &[u8]| {
        use base64::Engine;
        let encoded = base64::engine::general_purpose::STANDARD.encode(Sha256::digest(bytes));
        format!("\r\nContent-Digest: sha-256=:{encoded}:")
    };
    let (_, target) = link(&gateway, &build.template, 'b');
    put(&gateway, &target, &digest(b"right"), b"wrong").refuses(400, "expected sha256:");
    gateway.raw(&format!("PUT {target} HTTP/1.1"), b"").unwrap().refuses(411, "Content-Length");
    assert!(!link(&gateway, &build.template, 'b').0, "a file is whole or absent");
    put(&gateway, &target, &digest(b"right"), b"right").is(204);
    // Another team has none of them.
    let theirs = gateway.theirs("POST /v3/templates", json!({ "name": "box" })).is(202);
    let path = format!("/templates/{}/files/{}", theirs["templateID"].as_str().unwrap(), hash('a'));
    assert_eq!(gateway.theirs(&format!("GET {path}"), Value::Null).is(201)["present"], false);
    gateway.theirs(&format!("GET /templates/{}/files/{}", build.template, hash('a')), Value::Null).is(404);

    // The files and the address outlive a gateway; what was on its way does not.
    gateway.kill();
    let uploads = host.path("data/uploads");
    let team = fs::read_dir(&uploads)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.is_dir())
        .unwrap();
    fs::write(team.join(".part-x"), "half").unwrap();
    let mut gateway = host.serve(&[]);
    assert!(link(&gateway, &build.template, 'a').0 && !team.join(".part-x").exists());
    put(&gateway, &target, "", b"again").is(204);
    gateway.stop();
}

#[test]
fn a_teams_uploads_have_a_limit() {
    let host = Host::new();
    host.command(&["keys", "create"]);
    host.command(&["teams", "builds", "default", "--uploads", "1"]);
    let mut gateway = host.serve(&[]);
    let build = gateway.request(json!({ "name": "box" }));
    let of = |digit: char| link(&gateway, &build.template, digit).1;
    let most = vec![0; 700 << 10];
    put(&gateway, &of('a'), "", &most).is(204);
    put(&gateway, &of('b'), "", &most).refuses(507, "1048576 bytes");
    // Refused before its bytes are read.
    let head = format!("PUT {} HTTP/1.1\r\nContent-Length: 99999999999", of('c'));
    gateway.raw(&head, b"").unwrap().refuses(413, "99999999999 bytes");
    gateway.stop();
}

#[test]
fn a_full_disk_is_told_and_nothing_is_left() {
    let host = Host::new();
    let uploads = host.path("data/uploads");
    fs::create_dir_all(&uploads).unwrap();
    // A mount of its own for the gateway, which goes with it.
    let mut command = Command::new("unshare");
    let script = "mount -t tmpfs -o size=256k tmpfs \"$0\" && exec \"$@\"";
    command.args(["-m", "sh", "-c"]);
    let tried =
        Command::new("unshare").args(["-m", "sh", "-c", script]).arg(&uploads).arg("true").output().unwrap();
    if !tried.status.success() {
        eprintln!("SKIPPED: no mounts here: {}", String::from_utf8_lossy(&tried.stderr));
        return;
    }
    command.arg(script).arg(&uploads).arg(env!("CARGO_BIN_EXE_tiffin-gateway"));
    let mut gateway = host.serve_by(command, &[]);
    let build = gateway.request(json!({ "name": "box" }));
    let of = |digit: char| link(&gateway, &build.template, digit).1;
    put(&gateway, &of('a'), "", &vec![1; 1 << 20]).refuses(507, "disk is full");
    assert!(!link(&gateway, &build.template, 'a').0);
    put(&gateway, &of('b'), "", &vec![1; 128 << 10]).is(204);
    gateway.stop();
}
