//! `filesystem.Filesystem` and /files over the Unix socket.

mod support_files;

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use http::{Method, StatusCode};
use serde_json::json;
use support_files::{Agent, DEADLINE, body_of, percent};

fn query(path: &Path) -> String {
    format!("path={}", percent(path.as_os_str().as_bytes()))
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn multipart(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, content) in files {
        let head =
            format!("--B\r\ncontent-disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\r\n");
        body.extend_from_slice(head.as_bytes());
        body.extend_from_slice(content);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(b"--B--\r\n");
    body
}

const MULTIPART: (&str, &str) = ("content-type", "multipart/form-data; boundary=B");
const STREAM: (&str, &str) = ("content-type", "application/octet-stream");

fn temporary_files(dir: &Path) -> usize {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter(|name| name.as_bytes().starts_with(b".envd-upload-")).count()
}

#[tokio::test]
async fn ranges_heads_and_codings_of_downloads() {
    let agent = Agent::start().await;
    let file = agent.path("file");
    let content: Vec<u8> = (0..3_000_000u32).map(|n| (n / 7) as u8).collect();
    fs::write(&file, &content).unwrap();
    let get = async |method, headers: &[(&str, &str)]| {
        let response = agent.files(method, &query(&file), headers, "").await;
        let (parts, status) = (response.headers().clone(), response.status());
        let header = |name: &str| parts.get(name).map_or("", |value| value.to_str().unwrap()).to_owned();
        let headers =
            ["content-length", "content-range", "content-encoding", "vary", "accept-ranges"].map(header);
        (status.as_u16(), headers.join("|"), body_of(response).await)
    };
    let (status, headers, body) = get(Method::GET, &[]).await;
    assert_eq!((status, headers.as_str()), (200, "3000000|||Accept-Encoding|bytes"));
    assert!(body == content);
    let (status, headers, body) = get(Method::HEAD, &[]).await;
    assert_eq!((status, headers.as_str(), body.len()), (200, "3000000|||Accept-Encoding|bytes", 0));
    for (range, first, end) in
        [("bytes=0-0", 0, 1), ("bytes=5-1000005", 5, 1_000_006), ("bytes=-7", 2_999_993, 3_000_000)]
    {
        // Whoever wants a part gets it uncompressed.
        let (status, headers, body) =
            get(Method::GET, &[("range", range), ("accept-encoding", "gzip")]).await;
        let expected = format!("{}|bytes {first}-{}/3000000||Accept-Encoding|bytes", end - first, end - 1);
        assert_eq!((status, headers), (206, expected));
        assert!(body == content[first..end]);
    }
    let (status, headers, _) = get(Method::GET, &[("range", "bytes=3000000-")]).await;
    assert_eq!((status, headers.contains("|bytes */3000000|")), (416, true), "{headers}");
    let (status, headers, body) = get(Method::GET, &[("accept-encoding", "gzip, deflate")]).await;
    assert_eq!((status, headers.as_str()), (200, "||gzip|Accept-Encoding|bytes"));
    let mut plain = Vec::new();
    GzDecoder::new(&body[..]).read_to_end(&mut plain).unwrap();
    assert!(plain == content && body.len() < content.len() / 10);
    assert_eq!(
        get(Method::GET, &[("accept-encoding", "gzip;q=0")]).await.1,
        "3000000|||Accept-Encoding|bytes"
    );
    assert_eq!(get(Method::GET, &[("accept-encoding", "br, identity;q=0")]).await.0, 406);
    assert_eq!(agent.files(Method::PUT, &query(&file), &[], "").await.status(), 405);
}

#[tokio::test]
async fn every_error_has_its_status() {
    let agent = Agent::start().await;
    let dir = agent.folder().to_owned();
    fs::write(dir.join("file"), b"x").unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, dir.join("fifo"), rustix::fs::Mode::RUSR).unwrap();
    let get = async |query: String| agent.files(Method::GET, &query, &[], "").await.status().as_u16();
    assert_eq!(get(query(&dir)).await, 400);
    assert_eq!(get(query(&dir.join("fifo"))).await, 400);
    assert_eq!(get(query(&dir.join("file/below"))).await, 400);
    assert_eq!(get(query(&dir.join("missing"))).await, 404);
    assert_eq!(get(query(&dir.join("n".repeat(300)))).await, 400);
    assert_eq!(get("path=~nobody".into()).await, 400);
    assert_eq!(get("path=%00".into()).await, 400);
    assert_eq!(get(format!("{}&username=nosuchuser", query(&dir.join("file")))).await, 401);
    let post = async |query: String, headers: &[(&str, &str)], body: Vec<u8>| {
        let response = agent.files(Method::POST, &query, headers, body).await;
        let status = response.status().as_u16();
        let answer: serde_json::Value = serde_json::from_slice(&body_of(response).await).unwrap();
        assert_eq!(answer["code"], status);
        assert!(!answer["message"].as_str().unwrap().is_empty());
        status
    };
    assert_eq!(post(query(&dir), &[STREAM], vec![]).await, 400);
    assert_eq!(post(query(&dir.join("fifo")), &[STREAM], vec![]).await, 400);
    assert_eq!(post(query(&dir.join("file/below")), &[STREAM], vec![]).await, 400);
    assert_eq!(post(String::new(), &[STREAM], vec![]).await, 400);
    assert_eq!(post(query(&dir.join("x")), &[("content-type", "text/plain")], vec![]).await, 400);
    assert_eq!(post(query(&dir.join("x")), &[STREAM, ("content-encoding", "br")], vec![]).await, 400);
    assert_eq!(post(query(&dir.join("x")), &[STREAM, ("x-metadata-", "v")], vec![]).await, 400);
    assert_eq!(post(String::new(), &[MULTIPART], multipart(&[("", b"")])).await, 400);
    let twice = [(dir.join("y").display().to_string()), format!("{}/./y", dir.display())];
    assert_eq!(
        post(String::new(), &[MULTIPART], multipart(&[(&twice[0], b"1"), (&twice[1], b"2")])).await,
        400
    );
    assert_eq!(fs::read(dir.join("y")).unwrap(), b"1");
    assert!(!dir.join("x").exists());
    assert_eq!(temporary_files(&dir), 0);
}

#[tokio::test]
async fn uploads_of_every_kind() {
    let agent = Agent::start().await;
    let dir = agent.folder().to_owned();
    let name = |name: &str| dir.join(name).display().to_string();
    let post = async |query: String, headers: &[(&str, &str)], body: Vec<u8>| {
        let response = agent.files(Method::POST, &query, headers, body).await;
        assert_eq!(response.status(), StatusCode::OK);
        serde_json::from_slice::<serde_json::Value>(&body_of(response).await).unwrap()
    };
    let two = multipart(&[(&name("a/b/one"), b"1"), (&name("two"), b"22")]);
    let answer = post(String::new(), &[MULTIPART], two.clone()).await;
    let expected = json!([
        {"path": name("a/b/one"), "name": "one", "type": "file"}, {"path": name("two"), "name": "two", "type": "file"},
    ]);
    assert_eq!(answer, expected);
    assert_eq!(
        (fs::read(dir.join("a/b/one")).unwrap(), fs::read(dir.join("two")).unwrap()),
        (b"1".into(), b"22".into())
    );
    fs::remove_file(dir.join("two")).unwrap();
    let answer = post(String::new(), &[MULTIPART, ("content-encoding", "gzip")], gzip(&two)).await;
    assert_eq!((answer, fs::read(dir.join("two")).unwrap()), (expected, b"22".into()));

    let big: Vec<u8> = (0..5_000_000u32).map(|n| (n >> 3) as u8).collect();
    post(query(&dir.join("big")), &[STREAM, ("content-encoding", "gzip")], gzip(&big)).await;
    assert!(fs::read(dir.join("big")).unwrap() == big);
    post(query(&dir.join("empty")), &[STREAM], vec![]).await;
    assert_eq!(fs::read(dir.join("empty")).unwrap(), b"");

    // Modes stay, but never those that give power; links lead to what is written.
    assert_eq!(fs::metadata(dir.join("two")).unwrap().mode() & 0o7777, 0o644);
    fs::set_permissions(dir.join("two"), fs::Permissions::from_mode(0o4751)).unwrap();
    symlink("two", dir.join("link")).unwrap();
    symlink("a/new", dir.join("dangling")).unwrap();
    post(query(&dir.join("link")), &[STREAM], b"through".to_vec()).await;
    post(query(&dir.join("dangling")), &[STREAM], b"made".to_vec()).await;
    assert_eq!(fs::read(dir.join("two")).unwrap(), b"through");
    assert_eq!(fs::metadata(dir.join("two")).unwrap().mode() & 0o7777, 0o751);
    assert!(fs::symlink_metadata(dir.join("link")).unwrap().is_symlink());
    assert_eq!(fs::read(dir.join("a/new")).unwrap(), b"made");
    assert_eq!(temporary_files(&dir), 0);
}

#[tokio::test]
async fn what_does_not_arrive_whole_leaves_nothing() {
    let agent = Agent::start().await;
    let dir = agent.path("dir");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("old"), b"old").unwrap();
    let whole = gzip(&(0..400_000u32).flat_map(u32::to_le_bytes).collect::<Vec<_>>());
    let headers = [STREAM, ("content-encoding", "gzip")];
    for cut in [0, 7, whole.len() / 2, whole.len() - 1] {
        let response =
            agent.files(Method::POST, &query(&dir.join("old")), &headers, whole[..cut].to_vec()).await;
        assert_eq!(response.status(), StatusCode::BAD_REQUEST, "cut at {cut}");
    }
    let mut corrupt = whole.clone();
    corrupt[whole.len() / 2] ^= 0x55;
    let response = agent.files(Method::POST, &query(&dir.join("old")), &headers, corrupt).await;
    assert_eq!(response.status(), StatusCode::BAD_REQUEST);
    let cut = multipart(&[("unused", b"content")]);
    let response = agent
        .files(Method::POST, &query(&dir.join("old")), &[MULTIPART], cut[..cut.len() - 9].to_vec())
        .await;
    assert_eq!(response.status(), StatusCode::BAD_REQUEST);
    // A client that goes away in the middle.
    let mut stream = tokio::net::UnixStream::connect(agent.path("envd.sock")).await.unwrap();
    let head = format!(
        "POST /files?{} HTTP/1.1\r\nhost: x\r\ncontent-type: application/octet-stream\r\ncontent-length: 9999999\r\n\r\n",
        query(&dir.join("old"))
    );
    use tokio::io::AsyncWriteExt;
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(&vec![7; 2_000_000]).await.unwrap();
    let begun = async {
        while temporary_files(&dir) == 0 {
            tokio::task::yield_now().await
        }
    };
    tokio::time::timeout(DEADLINE, begun).await.expect("the upload begins");
    drop(stream);
    let gone = async {
        while temporary_files(&dir) != 0 {
            tokio::task::yield_now().await
        }
    };
    tokio::time::timeout(DEADLINE, gone).await.expect("nothing is left");
    assert_eq!(fs::read(dir.join("old")).unwrap(), b"old");
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
}

#[tokio::test]
async fn a_full_disk_is_507_and_leaves_the_old_file_whole() {
    let agent = Agent::start_after("mkdir small; mount -t tmpfs -o size=1m tmpfs small").await;
    let file = agent.path("small/file");
    assert_eq!(agent.put(&file, "old").await.0, StatusCode::OK);
    let (status, answer) = agent.put(&file, vec![1; 3 << 20]).await;
    assert_eq!((status, &answer["code"]), (StatusCode::INSUFFICIENT_STORAGE, &json!(507)));
    let headers = [STREAM, ("content-encoding", "gzip")];
    // Decompressed as far as the disk goes, and no further.
    let bomb = gzip(&vec![0; 512 << 20]);
    let response = agent.files(Method::POST, &query(&file), &headers, bomb).await;
    assert_eq!(response.status(), StatusCode::INSUFFICIENT_STORAGE);
    let listed = agent.ok("ListDir", json!({"path": agent.path("small")})).await;
    assert_eq!(listed["entries"].as_array().unwrap().len(), 1, "{listed}");
    let read = body_of(agent.files(Method::GET, &query(&file), &[], "").await).await;
    assert_eq!(read, "old");
}

#[tokio::test]
async fn metadata_is_kept_shown_and_replaced_as_a_whole() {
    let agent = Agent::start_after("mkdir ram; mount -t ramfs ramfs ram").await;
    let file = agent.path("file");
    let put = async |path: &Path, headers: &[(&str, &str)]| {
        let headers = [&[STREAM], headers].concat();
        let response = agent.files(Method::POST, &query(path), &headers, "x").await;
        (response.status().as_u16(), body_of(response).await)
    };
    let (status, body) = put(&file, &[("X-Metadata-Kind", "report"), ("x-metadata-b", "2")]).await;
    assert_eq!(status, 200, "{body:?}");
    let answer: serde_json::Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(answer[0]["metadata"], json!({"kind": "report", "b": "2"}));
    let stat = async || agent.ok("Stat", json!({"path": file})).await["entry"]["metadata"].clone();
    assert_eq!(stat().await, json!({"kind": "report", "b": "2"}));
    put(&file, &[("x-metadata-c", "3")]).await;
    assert_eq!(stat().await, json!({"c": "3"}));
    put(&file, &[]).await;
    assert_eq!(stat().await, json!(null));
    // ramfs has no user attributes: nothing appears.
    let (status, body) = put(&agent.path("ram/file"), &[("x-metadata-a", "1")]).await;
    assert_eq!(status, 400, "{body:?}");
    assert_eq!(agent.ok("ListDir", json!({"path": agent.path("ram")})).await, json!({}));
    assert_eq!(put(&agent.path("ram/file"), &[]).await.0, 200);
}

#[tokio::test]
async fn files_with_any_name_are_listed_and_reached() {
    let agent = Agent::start().await;
    let dir = agent.path("names");
    fs::create_dir(&dir).unwrap();
    let names: [&[u8]; 6] =
        [b"\xff", b"\xfe\xff", "\u{efff}".as_bytes(), "é".as_bytes(), b"\xe9", b"new\nline\"q\\"];
    for (n, name) in names.iter().enumerate() {
        fs::write(dir.join(OsStr::from_bytes(name)), format!("{n}")).unwrap();
    }
    let listed = agent.ok("ListDir", json!({"path": dir})).await;
    let entries = listed["entries"].as_array().unwrap();
    assert_eq!(entries.len(), names.len());
    let mut contents = Vec::new();
    for entry in entries {
        let path = entry["path"].as_str().unwrap();
        let stat = agent.ok("Stat", json!({"path": path})).await;
        assert_eq!(&stat["entry"], entry);
        let got = agent.files(Method::GET, &format!("path={}", percent(path.as_bytes())), &[], "").await;
        let disposition = got.headers()["content-disposition"].to_str().unwrap().to_owned();
        assert!(disposition.contains("filename*=UTF-8''"), "{disposition}");
        contents.push(body_of(got).await);
        assert_eq!(agent.put(Path::new(path), "written").await.0, StatusCode::OK);
        let moved = agent.ok("Move", json!({"source": path, "destination": format!("{path}.moved")})).await;
        assert_eq!(moved["entry"]["path"], format!("{path}.moved"));
    }
    contents.sort();
    assert_eq!(contents, ["0", "1", "2", "3", "4", "5"]);
    for name in names {
        let moved = [name, b".moved"].concat();
        assert_eq!(fs::read(dir.join(OsStr::from_bytes(&moved))).unwrap(), b"written");
        // The raw bytes in a query are that file, too.
        let got = agent.files(Method::GET, &query(&dir.join(OsStr::from_bytes(&moved))), &[], "").await;
        if name != "\u{efff}".as_bytes() {
            assert_eq!(body_of(got).await, "written");
        }
    }
    let part = multipart(&[(&format!("{}/\u{efc0}", dir.display()), b"part")]);
    assert_eq!(agent.files(Method::POST, "", &[MULTIPART], part).await.status(), StatusCode::OK);
    assert_eq!(fs::read(dir.join(OsStr::from_bytes(b"\xc0"))).unwrap(), b"part");
    agent.ok("Remove", json!({"path": format!("{}/\u{efc0}", dir.display())})).await;
    assert!(!dir.join(OsStr::from_bytes(b"\xc0")).exists());
}

/// Links that are swapped while trees are listed and removed never lead the agent into what they lead to.
#[tokio::test]
async fn swapped_links_lead_nowhere() {
    let agent = Agent::start().await;
    let treasure = agent.path("treasure");
    fs::create_dir(&treasure).unwrap();
    fs::write(treasure.join("gold"), b"").unwrap();
    let tree = agent.path("tree");
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let swapper = std::thread::spawn({
        let (stop, tree, treasure) = (std::sync::Arc::clone(&stop), tree.clone(), treasure.clone());
        move || {
            let mut swaps = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let _ = fs::create_dir_all(tree.join("d/inner"));
                let _ = fs::rename(tree.join("d"), tree.join("away"));
                let _ = symlink(&treasure, tree.join("d"));
                let _ = fs::remove_file(tree.join("d"));
                let _ = fs::rename(tree.join("away"), tree.join("d"));
                swaps += 1;
            }
            swaps
        }
    });
    for _ in 0..300 {
        let (_, listed) = agent.call("ListDir", json!({"path": tree, "depth": 5})).await;
        assert!(!listed.to_string().contains("gold"), "{listed}");
        agent.call("Remove", json!({"path": tree})).await;
        assert!(treasure.join("gold").exists());
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(swapper.join().unwrap() > 0);
}

#[tokio::test]
async fn mounts_and_moves_between_file_systems() {
    let agent = Agent::start_after(
        "mkdir -p tree/mnt other; mount -t tmpfs tmpfs tree/mnt; mount -t tmpfs tmpfs other; echo keep >tree/mnt/file",
    )
    .await;
    let path = |name: &str| json!({"path": agent.path(name)});
    for name in ["tree", "tree/mnt"] {
        let (_, refused) = agent.call("Remove", path(name)).await;
        assert_eq!(refused["code"], "failed_precondition", "{refused}");
        assert!(refused["message"].as_str().unwrap().contains("mounted"), "{refused}");
    }
    agent.ok("Stat", path("tree/mnt/file")).await;
    let rename = |from: &str, to: &str| json!({"source": agent.path(from), "destination": agent.path(to)});
    let (_, busy) = agent.call("Move", rename("tree/mnt", "elsewhere")).await;
    assert_eq!(busy["code"], "internal", "{busy}");
    assert!(busy["message"].as_str().unwrap().contains("mounted"), "{busy}");

    let headers = [STREAM, ("x-metadata-a", "1")];
    let target = query(&agent.path("tree/mnt/meta"));
    let with_metadata = agent.files(Method::POST, &target, &headers, "content").await.status().is_success();
    agent.ok("Move", rename("tree/mnt/file", "other/new/file")).await;
    assert_eq!(agent.code("Stat", path("tree/mnt/file")).await, "not_found");
    let read = body_of(agent.files(Method::GET, &query(&agent.path("other/new/file")), &[], "").await).await;
    assert_eq!(read, "keep\n");
    if with_metadata {
        let moved = agent.ok("Move", rename("tree/mnt/meta", "other/meta")).await;
        assert_eq!(moved["entry"]["metadata"], json!({"a": "1"}));
    }
    agent.ok("MakeDir", path("tree/mnt/dir")).await;
    let (_, refused) = agent.call("Move", rename("tree/mnt/dir", "other/dir")).await;
    assert_eq!(refused["code"], "internal");
    assert!(refused["message"].as_str().unwrap().contains("cp -a"), "{refused}");
}

/// A hundred calls hang in a mount whose server never answers; the others do not notice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_hung_calls_stall_nobody_else() {
    if !Path::new("/dev/fuse").exists() {
        eprintln!("skipped: no /dev/fuse");
        return;
    }
    let fuse = "mkdir hung; exec 3<>/dev/fuse; \
                mount -i -t fuse -o fd=3,rootmode=40000,user_id=0,group_id=0 hang hung";
    let agent = std::sync::Arc::new(Agent::start_after(fuse).await);
    fs::write(agent.path("file"), b"x").unwrap();
    let hung: Vec<_> = (0..100)
        .map(|n| {
            let agent = std::sync::Arc::clone(&agent);
            let headers = [("connect-timeout-ms", "20000")];
            tokio::spawn(async move {
                let message = json!({"path": agent.path("hung/x")});
                let method = if n % 2 == 0 { "Stat" } else { "ListDir" };
                agent.call_with(method, message, &headers).await
            })
        })
        .collect();
    for _ in 0..50 {
        let health = http::Request::get("/health").header("host", "x").body(Default::default()).unwrap();
        assert_eq!(agent.send(health).await.status(), StatusCode::NO_CONTENT);
        agent.ok("Stat", json!({"path": agent.path("file")})).await;
        agent.ok("ListDir", json!({"path": "/"})).await;
        assert_eq!(agent.put(&agent.path("up"), "x").await.0, StatusCode::OK);
    }
    for call in hung {
        assert_eq!(call.await.unwrap().1["code"], "deadline_exceeded");
    }
    agent.ok("Stat", json!({"path": agent.path("file")})).await;
}
