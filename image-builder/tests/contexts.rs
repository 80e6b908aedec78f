//! Contexts: those with names, and those that mean no good.
//!
//! Trees of layers are mounted to be read, so they need root.

#[path = "support/trees.rs"]
mod trees;

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use trees::Builder;

/// Longer than anything here takes on the slowest machine: there to catch what never ends.
const HANG: Duration = Duration::from_secs(120);

/// A thread that changes the context, and ends with the test.
struct Meddler {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Meddler {
    fn start(mut change: impl FnMut(usize) + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            for round in 0.. {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                change(round);
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Meddler {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[test]
fn contexts_have_names() {
    let Some(builder) = Builder::new("named") else { return };
    for (folder, text) in [("other", "other"), ("base", "base")] {
        fs::create_dir(builder.path(folder)).unwrap();
        fs::write(builder.path(folder).join("f"), text).unwrap();
        fs::write(builder.path(folder).join("left-out"), "").unwrap();
        fs::write(builder.path(folder).join(".dockerignore"), "left-out\n.dockerignore\n").unwrap();
    }
    fs::write(builder.path("context/f"), "main").unwrap();
    let option = |name: &str, folder: &str| format!("{name}={}", builder.path(folder).display());
    let other = option("other", "other");
    let image =
        builder.build("FROM scratch\nCOPY --from=other . /o/\nCOPY f /f\n", &["--build-context", &other]);
    assert_eq!(image.lines(), ["/f f 644 0:0 main", "/o d 755 0:0", "/o/f f 644 0:0 other"]);
    let again =
        builder.build("FROM scratch\nCOPY --from=other . /o/\nCOPY f /f\n", &["--build-context", &other]);
    assert_eq!(again.cached, 2);

    // They come before stages and images of their name: those are not even looked for.
    let dockerfile = "FROM no.such.registry.invalid/x AS stage\nFROM alpine:latest\nCOPY --from=stage f /s\n";
    let (stage, alpine) = (option("stage", "other"), option("alpine", "base"));
    let image = builder.build(dockerfile, &["--build-context", &stage, "--build-context", &alpine]);
    assert_eq!(image.lines(), ["/f f 644 0:0 base", "/s f 644 0:0 other"]);

    // Images and layouts, with their config.
    builder.build_as(&["-t", "mine", "-f", "labelled", "context"].map(|word| {
        fs::write(builder.path("labelled"), "FROM scratch\nCOPY f /mine\nENV A=b\n").unwrap();
        word
    }));
    let data = builder.path("data/images");
    let mine = ["--build-context", "alpine=docker-image://mine"];
    let layout = format!("alpine=oci-layout://{}:docker.io/library/mine:latest", data.display());
    for options in [&mine[..], &["--build-context", &layout]] {
        let image = builder.build("FROM alpine\nCOPY --from=alpine /mine /copy\n", options);
        assert_eq!(image.lines(), ["/copy f 644 0:0 main", "/mine f 644 0:0 main"]);
        assert_eq!(image.config["config"]["Env"], serde_json::json!(["A=b"]));
    }
    let image = builder.build(
        "FROM scratch AS real\nCOPY f /real\nFROM scratch\nCOPY --from=given /real /x\n",
        &["--build-context", "given=target:real"],
    );
    assert_eq!(image.lines(), ["/x f 644 0:0 main"]);
    let error = builder.failure("FROM given\n", &["--build-context", "given=target:none"], 2);
    assert!(error.contains("no stage has this name"), "{error}");
    let error = builder.failure("FROM given\n", &["--build-context", "given=git://x/y"], 2);
    assert!(error.contains("git:// is not supported yet"), "{error}");
    let error = builder.failure("FROM given\n", &["--build-context", "given=/no/such/folder"], 2);
    assert!(error.contains("expected a folder"), "{error}");
}

#[test]
fn nothing_of_outside_comes_in_while_folders_are_swapped() {
    let Some(builder) = Builder::new("swapped") else { return };
    let (context, outside) = (builder.path("context"), builder.path("outside"));
    for folder in [context.join("d"), outside.clone()] {
        fs::create_dir_all(folder.join("sub")).unwrap();
    }
    for index in 0..50 {
        fs::write(context.join(format!("d/sub/{index}")), "inside").unwrap();
        fs::write(outside.join(format!("sub/{index}")), "SECRET").unwrap();
    }
    let _meddler = Meddler::start(move |round| {
        let (dir, away) = (context.join("d"), context.join("away"));
        // Errors are part of it: the names move all the time.
        let _ = fs::rename(&dir, &away);
        let target = if round % 2 == 0 { outside.clone() } else { "../outside".into() };
        let _ = symlink(target, &dir);
        let _ = fs::remove_file(&dir);
        let _ = fs::rename(&away, &dir);
    });
    let mut built = 0;
    for round in 0..20 {
        let dockerfile =
            if round % 2 == 0 { "FROM scratch\nCOPY d /d/\n" } else { "FROM scratch\nCOPY . /all/\n" };
        let output = builder.run(dockerfile, &["--no-cache"]);
        if output.status.success() {
            built += 1;
            let image = builder.image(0);
            assert!(
                image.files.values().all(|file| !String::from_utf8_lossy(&file.contents).contains("SECRET"))
            );
        } else {
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(stderr.contains("Dockerfile:2:1: ") && !stderr.contains("panicked"), "{stderr}");
        }
    }
    eprintln!("{built} of 20 builds succeeded");
}

#[test]
fn files_that_change_are_told_or_whole() {
    let Some(builder) = Builder::new("changing") else { return };
    let file = builder.path("context/f");
    let sizes = [1usize, 3_000_000, 100, 2_000_000];
    fs::write(&file, "x").unwrap();
    let own = file.clone();
    let _meddler = Meddler::start(move |round| {
        let letter = b'a' + (round % 26) as u8;
        fs::write(&own, vec![letter; sizes[round % sizes.len()]]).unwrap();
    });
    for _ in 0..15 {
        let output = builder.run("FROM scratch\nCOPY f /f\n", &["--no-cache", "--compression", "none"]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            // What is in the layer is what its key says: nothing is half of one and half of another length.
            builder.image(0);
        } else {
            assert!(stderr.contains("it changed during the build"), "{stderr}");
            assert!(stderr.contains("context/f"), "{stderr}");
        }
    }
}

#[test]
fn pipes_and_devices_do_not_stop_a_build() {
    let Some(builder) = Builder::new("special") else { return };
    let context = builder.path("context");
    let make = |name: &str, kind, device| {
        rustix::fs::mknodat(rustix::fs::CWD, context.join(name), kind, 0o600.into(), device)
    };
    make("pipe", rustix::fs::FileType::Fifo, 0).unwrap();
    let device = make("zero", rustix::fs::FileType::CharacterDevice, rustix::fs::makedev(1, 5));
    fs::write(context.join("f"), "f").unwrap();
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        for dockerfile in
            ["FROM scratch\nCOPY . /\n", "FROM scratch\nADD pipe /x/\n", "FROM scratch\nCOPY pip* /y/\n"]
        {
            let image = builder.build(dockerfile, &[]);
            sender.send(image.lines()).unwrap();
        }
    });
    let lines = receiver.recv_timeout(HANG).unwrap();
    assert!(lines.contains(&"/pipe p 600 0:0".to_owned()), "{lines:?}");
    if device.is_ok() {
        assert!(lines.contains(&"/zero c 600 0:0 1:5".to_owned()), "{lines:?}");
    }
    assert_eq!(receiver.recv_timeout(HANG).unwrap(), ["/x d 755 0:0", "/x/pipe p 600 0:0"]);
    assert_eq!(receiver.recv_timeout(HANG).unwrap(), ["/y d 755 0:0", "/y/pipe p 600 0:0"]);
    // The folder goes with the thread.
    thread.join().unwrap();
}

#[test]
fn links_out_loops_and_depth_are_errors_with_their_place() {
    let Some(builder) = Builder::new("links") else { return };
    let context = builder.path("context");
    fs::write(builder.path("secret"), "SECRET").unwrap();
    symlink("../secret", context.join("out")).unwrap();
    symlink(builder.path("secret"), context.join("abs")).unwrap();
    symlink("..", context.join("up")).unwrap();
    symlink("b", context.join("a")).unwrap();
    symlink("a", context.join("b")).unwrap();
    for (source, said) in [
        ("out", "leads outside"),
        ("abs", "leads outside"),
        ("up/secret", "leads outside"),
        ("a", "too many symbolic links"),
        ("a/x", "too many symbolic links"),
        ("../secret", "leads outside"),
        ("x/../../secret", "leads outside"),
    ] {
        for keyword in ["COPY", "ADD"] {
            let error = builder.failure(&format!("FROM scratch\n{keyword} {source} /x\n"), &[], 2);
            assert!(error.contains(said) && error.contains("Dockerfile:2:1: "), "{source}: {error}");
        }
    }
    // As links they are taken, and lead to what the image has there.
    let image = builder.build("FROM scratch\nCOPY . /\n", &[]);
    assert!(image.lines().contains(&"/out l 0:0 ../secret".to_owned()), "{:?}", image.lines());

    // A path longer than the kernel takes: made piece by piece, as an attacker would.
    let mut folder = rustix::fs::open(&context, rustix::fs::OFlags::PATH, 0.into()).unwrap();
    let name = "n".repeat(200);
    for _ in 0..25 {
        rustix::fs::mkdirat(&folder, &*name, 0o755.into()).unwrap();
        folder = rustix::fs::openat(&folder, &*name, rustix::fs::OFlags::PATH, 0.into()).unwrap();
    }
    let error = builder.failure("FROM scratch\nCOPY . /\n", &[], 1);
    assert!(error.contains("at most 4095 expected"), "{error}");
}
