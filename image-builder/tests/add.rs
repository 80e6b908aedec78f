//! `ADD` and `COPY` in builds by the program itself, without RUN: archives, URLs, links.
//!
//! Trees of layers are mounted to be read, so they need root.

#[path = "support/trees.rs"]
mod trees;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use trees::Builder;

/// What a server answers: status, headers, body.
type Answer = (&'static str, Vec<String>, Vec<u8>);

/// A web server that tells what it was asked.
struct Server {
    address: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// `answer` gets the path and all headers, in lowercase. The server ends with the test's process.
    fn start(answer: impl Fn(&str, &str, usize) -> Answer + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&asked);
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                let mut connection = connection.unwrap();
                let (line, headers) = request(&connection);
                let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
                let count = {
                    let mut log = log.lock().unwrap();
                    log.push(format!("{path} {headers}"));
                    log.len()
                };
                let (status, headers, body) = answer(&path, &headers, count);
                let mut head = format!("HTTP/1.1 {status}\r\nConnection: close\r\n");
                headers.iter().for_each(|header| head.push_str(&format!("{header}\r\n")));
                if !head.contains("Content-Length") {
                    head.push_str(&format!("Content-Length: {}\r\n", body.len()));
                }
                head.push_str("\r\n");
                // Who asked may be gone by now.
                let _ = connection.write_all(head.as_bytes()).and_then(|()| connection.write_all(&body));
            }
        });
        Self { address, asked }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

fn request(connection: &TcpStream) -> (String, String) {
    let mut lines = BufReader::new(connection).lines().map_while(Result::ok);
    let line = lines.next().unwrap_or_default();
    let headers: Vec<_> = lines.take_while(|header| !header.is_empty()).collect();
    (line, headers.join("|").to_ascii_lowercase())
}

fn sha256(bytes: &[u8]) -> String {
    oci::Hasher::digest_of(bytes).to_string()
}

#[test]
fn archives_are_unpacked_as_they_are() {
    let Some(builder) = Builder::new("archives") else { return };
    let tree = builder.path("tree");
    fs::create_dir_all(tree.join("dir/sub")).unwrap();
    fs::write(tree.join("dir/file"), "data").unwrap();
    fs::hard_link(tree.join("dir/file"), tree.join("dir/sub/same")).unwrap();
    std::os::unix::fs::symlink("file", tree.join("dir/link")).unwrap();
    let tar = |name: &str, flag: &str| {
        let status = Command::new("tar")
            .args(["--owner=7", "--group=8", "--numeric-owner", "--mtime=@1500000000", "--sort=name", "-C"])
            .arg(&tree)
            .args([flag, "-cf"])
            .arg(builder.path("context").join(name))
            .arg("dir")
            .status()
            .unwrap();
        assert!(status.success(), "{name}");
    };
    for (name, flag) in
        [("a.tar", "--format=gnu"), ("b.tgz", "-z"), ("c", "-j"), ("d.tar.xz", "-J"), ("e.zst", "--zstd")]
    {
        tar(name, flag);
    }
    fs::write(builder.path("context/text.gz"), b"\x1f\x8b\x08 not really").unwrap();
    let image = builder.build(
        "FROM scratch\nADD a.tar /a\nADD b.tgz c d.tar.xz e.zst /many/\nADD --chown=5:6 --chmod=700 a.tar /owned/\n\
         ADD --unpack=false a.tar /\nCOPY b.tgz /\nADD text.gz /\n",
        &[],
    );
    let mut expected = vec![
        "/dir d 755 7:8".to_owned(),
        "/dir/file f 644 7:8 data".to_owned(),
        "/dir/link l 7:8 file".to_owned(),
        "/dir/sub d 755 7:8".to_owned(),
        "/dir/sub/same h /dir/file".to_owned(),
    ];
    let below = |prefix: &str| -> Vec<String> {
        let lines = image.lines().into_iter().filter_map(|line| Some(line.strip_prefix(prefix)?.to_owned()));
        lines
            .filter(|line| line.starts_with('/'))
            .map(|line| line.replace(&format!(" h {prefix}"), " h "))
            .collect()
    };
    assert_eq!(below("/a"), expected);
    assert_eq!(below("/many"), expected);
    expected.iter_mut().for_each(|line| *line = line.replace("7:8", "5:6"));
    assert_eq!(below("/owned"), expected, "modes are the archive's");
    assert_eq!(image.mtime("/a/dir/file"), 1_500_000_000);
    let raw = |name: &str| fs::read(builder.path("context").join(name)).unwrap();
    for name in ["a.tar", "b.tgz", "text.gz"] {
        assert_eq!(image.contents(&format!("/{name}")), raw(name), "{name}");
    }
}

#[test]
fn urls_are_fetched_once_and_asked_again() {
    let Some(builder) = Builder::new("urls") else { return };
    let server = Server::start(|path, headers, _| {
        let etag = || "ETag: \"one\"".to_owned();
        match path {
            "/files/a%20b.txt?x=1" if headers.contains("if-none-match: \"one\"") => {
                ("304 Not Modified", vec![etag()], Vec::new())
            }
            "/files/a%20b.txt?x=1" => {
                let date = "Last-Modified: Fri, 14 Jul 2017 02:40:00 GMT".to_owned();
                ("200 OK", vec![etag(), date], b"hello".to_vec())
            }
            _ => ("200 OK", Vec::new(), b"plain".to_vec()),
        }
    });
    let dockerfile = format!(
        "FROM scratch\nADD {0}/files/a%20b.txt?x=1 /dir/\nADD --chmod=755 {0}/ /named\n",
        server.address
    );
    let image = builder.build(&dockerfile, &[]);
    assert_eq!(image.lines(), ["/dir d 755 0:0", "/dir/a b.txt f 600 0:0 hello", "/named f 755 0:0 plain"]);
    assert_eq!(image.mtime("/dir/a b.txt"), 1_500_000_000, "Last-Modified");
    assert_eq!(image.mtime("/named"), 0);
    assert_eq!(server.asked().len(), 2);
    let again = builder.build(&dockerfile, &[]);
    assert_eq!(again.cached, 2, "the same contents are the same step");
    assert!(server.asked()[2].contains("if-none-match: \"one\""), "{:?}", server.asked());
    // A step that must run again gets the file again, though the server says that it is unchanged.
    let third = builder.build(&dockerfile, &["--no-cache"]);
    assert_eq!(third.lines(), image.lines());
}

#[test]
fn proxies_of_the_environment_are_used() {
    let Some(mut builder) = Builder::new("proxies") else { return };
    let server = Server::start(|path, _, _| ("200 OK", Vec::new(), format!("proxied {path}").into_bytes()));
    builder.env.push(("http_proxy", server.address.clone()));
    let image = builder.build("FROM scratch\nADD http://files.invalid/x /\n", &[]);
    assert_eq!(image.lines(), ["/x f 600 0:0 proxied http://files.invalid/x"]);
    builder.env.push(("no_proxy", "files.invalid".to_owned()));
    let error = builder.failure("FROM scratch\nADD http://files.invalid/y /\n", &[], 2);
    assert!(error.contains("http://files.invalid/y: "), "{error}");
    assert_eq!(server.asked().len(), 1);
}

#[test]
fn a_checksum_is_the_key_and_must_fit() {
    let Some(builder) = Builder::new("checksums") else { return };
    let server = Server::start(|_, _, _| ("200 OK", Vec::new(), b"hello".to_vec()));
    let with = |digest: &str| format!("FROM scratch\nADD --checksum={digest} {}/f /f\n", server.address);
    let image = builder.build(&with(&sha256(b"hello")), &[]);
    assert_eq!(image.lines(), ["/f f 600 0:0 hello"]);
    assert_eq!(builder.build(&with(&sha256(b"hello")), &[]).cached, 1);
    assert_eq!(server.asked().len(), 1, "what is cached by its checksum is not asked for");
    let error = builder.failure(&with(&sha256(b"other")), &[], 2);
    let got = sha256(b"hello");
    assert!(error.contains(&format!("expected {}, got {got}", sha256(b"other"))), "{error}");
    assert!(error.contains("Dockerfile:2:1: "), "{error}");
}

#[test]
fn fetched_archives_are_unpacked_when_asked() {
    let Some(builder) = Builder::new("remote-archive") else { return };
    fs::create_dir(builder.path("x")).unwrap();
    fs::write(builder.path("x/f"), "1").unwrap();
    let tar = Command::new("tar").arg("-C").arg(builder.path("x")).args(["-cz", "f"]).output().unwrap();
    assert!(tar.status.success());
    let server = Server::start(move |path, _, _| match path {
        "/x.tgz" => ("200 OK", Vec::new(), tar.stdout.clone()),
        _ => ("200 OK", Vec::new(), b"text".to_vec()),
    });
    let image = builder
        .build(&format!("FROM scratch\nADD --unpack {0}/x.tgz /u\nADD {0}/x.tgz /\n", server.address), &[]);
    let lines = image.lines();
    assert!(lines[0].starts_with("/u d") && lines[1].starts_with("/u/f f 644"), "{lines:?}");
    assert!(lines[2].starts_with("/x.tgz f 600"), "{lines:?}");
    let error = builder.failure(&format!("FROM scratch\nADD --unpack {}/y /u\n", server.address), &[], 2);
    assert!(error.contains("it is no archive"), "{error}");
}

#[test]
fn servers_that_fail_are_asked_again_and_hostile_ones_are_not() {
    let Some(builder) = Builder::new("servers") else { return };
    let outside = builder.path("outside");
    fs::write(&outside, "outside").unwrap();
    let file_url = format!("Location: file://{}", outside.display());
    let server = Server::start(move |path, _, count| {
        let location = |target: &str| vec![format!("Location: {target}")];
        match path {
            "/busy" if count < 3 => ("503 Service Unavailable", Vec::new(), Vec::new()),
            "/busy" | "/end" => ("200 OK", Vec::new(), b"ok".to_vec()),
            "/redirect" => ("302 Found", location("/end"), Vec::new()),
            "/file" => ("302 Found", vec![file_url.clone()], Vec::new()),
            "/loop" => ("302 Found", location("/loop"), Vec::new()),
            "/half" => ("200 OK", vec!["Content-Length: 100".to_owned()], b"half".to_vec()),
            "/endless" => ("200 OK", vec![format!("Content-Length: {}", u64::MAX / 4)], Vec::new()),
            _ => ("404 Not Found", Vec::new(), b"never".to_vec()),
        }
    });
    let dockerfile = |path: &str| format!("FROM scratch\nADD {}/{path} /x\n", server.address);
    assert_eq!(builder.build(&dockerfile("busy"), &[]).lines(), ["/x f 600 0:0 ok"]);
    assert_eq!(server.asked().len(), 3);
    assert_eq!(builder.build(&dockerfile("redirect"), &[]).lines(), ["/x f 600 0:0 ok"]);
    for (path, said, tries) in [
        ("file", "expected http or https", 1),
        ("loop", "more than 10 redirects", 11),
        ("missing", "the server answers 404 Not Found", 1),
        ("endless", "bytes", 1),
        ("half", "tried 4 times", 4),
    ] {
        let before = server.asked().len();
        let error = builder.failure(&dockerfile(path), &[], 2);
        assert!(error.contains(said) && error.contains(&format!("/{path}: ")), "{path}: {error}");
        assert_eq!(server.asked().len() - before, tries, "{path}");
    }
    let error = builder.failure("FROM scratch\nADD http://127.0.0.1:1/x /x\n", &[], 2);
    assert!(error.contains("refused"), "{error}");
}

#[test]
fn a_linked_layer_does_not_depend_on_what_is_below() {
    let Some(builder) = Builder::new("linked") else { return };
    fs::write(builder.path("context/f"), "1").unwrap();
    fs::create_dir(builder.path("context/etc")).unwrap();
    fs::write(builder.path("context/etc/passwd"), "app:x:7:8::/:/bin/sh\n").unwrap();
    let with = |first: &str| {
        format!(
            "FROM scratch\nCOPY <<x /{first}\nx\nCOPY etc /etc/\nCOPY <<x /real/y\nx\n\
             COPY --link --chmod=640 f /link/f\nCOPY --link --chown=app f /named\n"
        )
    };
    let one = builder.build(&with("one"), &[]);
    let two = builder.build(&with("two"), &[]);
    assert_eq!(two.cached, 1, "the linked step with a number for its owner");
    let (ones, twos) = (one.layers(), two.layers());
    assert_eq!(ones[3], twos[3]);
    assert!(two.lines().contains(&"/link/f f 640 0:0 1".to_owned()), "{:?}", two.lines());
    assert!(two.lines().contains(&"/named f 644 7:8 1".to_owned()), "names are looked up in the image");

    // What is a link below becomes a folder, as the layer does not know of it.
    std::os::unix::fs::symlink("real", builder.path("context/l")).unwrap();
    fs::create_dir(builder.path("context/d")).unwrap();
    std::os::unix::fs::symlink("real", builder.path("context/d/l")).unwrap();
    let linked = |flag: &str| format!("FROM scratch\nCOPY d /\nCOPY <<x /real/y\nx\nCOPY {flag} f /l/f\n");
    let lines = builder.build(&linked(""), &[]).lines();
    assert!(lines.contains(&"/real/f f 644 0:0 1".to_owned()), "{lines:?}");
    let lines = builder.build(&linked("--link"), &[]).lines();
    assert!(lines.contains(&"/l d 755 0:0".to_owned()) && lines.contains(&"/l/f f 644 0:0 1".to_owned()));
}

#[test]
fn what_a_file_is_beyond_its_data_is_kept() {
    let Some(builder) = Builder::new("attributes") else { return };
    let context = builder.path("context");
    fs::create_dir_all(context.join("d/sub")).unwrap();
    let name = std::os::unix::ffi::OsStrExt::from_bytes(b"d/new\nline \xff" as &[u8]);
    let odd: &std::ffi::OsStr = name;
    fs::write(context.join(odd), "odd").unwrap();
    fs::write(context.join("d/f"), "f").unwrap();
    fs::hard_link(context.join("d/f"), context.join("d/sub/g")).unwrap();
    let mode = |path: &Path, mode: u32| {
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
    };
    mode(&context.join("d/f"), 0o6755);
    mode(&context.join("d/sub"), 0o1777);
    rustix::fs::setxattr(context.join("d/f"), "user.note", b"kept", rustix::fs::XattrFlags::empty()).unwrap();
    let fifo = context.join("d/pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o644.into(), 0).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(context.join("d/socket")).unwrap();
    let image = builder.build("FROM scratch AS a\nCOPY d /x/\nFROM scratch\nCOPY --from=a /x /y\n", &[]);
    assert_eq!(
        image.lines(),
        [
            "/y d 755 0:0",
            "/y/f f 6755 0:0 user.note=kept f",
            "/y/new\nline \u{fffd} f 644 0:0 odd",
            "/y/pipe p 644 0:0",
            "/y/sub d 1777 0:0",
            "/y/sub/g h /y/f",
        ]
    );
}

#[test]
fn folders_of_the_source_change_those_they_fall_on() {
    let Some(builder) = Builder::new("folders") else { return };
    let context = builder.path("context");
    fs::create_dir_all(context.join("a/sub")).unwrap();
    fs::create_dir_all(context.join("b/sub")).unwrap();
    for (path, mode) in [("a", 0o700), ("a/sub", 0o711), ("b", 0o755), ("b/sub", 0o770)] {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
        fs::set_permissions(context.join(path), mode).unwrap();
    }
    let image = builder.build("FROM scratch\nCOPY a /x\nCOPY --chown=5 b /x\n", &[]);
    assert_eq!(
        image.lines(),
        ["/x d 755 0:0", "/x/sub d 770 5:5"],
        "as BuildKit: the destination itself stays"
    );
}

#[test]
fn a_pattern_may_fit_nothing() {
    let Some(builder) = Builder::new("nothing") else { return };
    fs::write(builder.path("context/package.json"), "{}").unwrap();
    let (image, stderr) =
        builder.build_and_listen("FROM scratch\nCOPY package.json yarn.lock* /app/\nCOPY *.none /no/\n", &[]);
    assert_eq!(image.lines(), ["/app d 755 0:0", "/app/package.json f 644 0:0 {}"]);
    assert!(stderr.contains("warning: 2:1: the pattern yarn.lock* fits no file"), "{stderr}");
}
