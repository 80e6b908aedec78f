//! `cp`: docker's rules, whole trees, large files, tar streams.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use rustix::process::Signal;

use super::verbs::{Cli, Running, peak_kib, until};

/// What a copy has to keep of an entry: type, permissions, time, contents or link.
type Tree = BTreeMap<Vec<u8>, (char, u32, i64, Vec<u8>)>;

fn tree(root: &Path) -> Tree {
    fn add(tree: &mut Tree, root: &Path, path: &Path) {
        let metadata = fs::symlink_metadata(path).unwrap();
        let (kind, contents) = if metadata.is_dir() {
            ('d', Vec::new())
        } else if metadata.is_symlink() {
            ('l', fs::read_link(path).unwrap().into_os_string().into_vec())
        } else {
            ('f', fs::read(path).unwrap())
        };
        let mode = if kind == 'l' { 0 } else { metadata.mode() & 0o7777 };
        let name = path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec();
        tree.insert(name, (kind, mode, metadata.mtime(), contents));
        if kind == 'd' {
            for entry in fs::read_dir(path).unwrap() {
                add(tree, root, &entry.unwrap().path());
            }
        }
    }
    let mut found = Tree::new();
    add(&mut found, root, root);
    found
}

/// Without their contents, which are long.
#[track_caller]
fn assert_same(left: &Tree, right: &Tree) {
    let names = left.keys().chain(right.keys()).filter(|name| left.get(*name) != right.get(*name));
    let brief = |entry: Option<&(char, u32, i64, Vec<u8>)>| {
        entry.map(|(kind, mode, time, contents)| format!("{kind} {mode:o} {time} {} bytes", contents.len()))
    };
    let differ: Vec<_> = names
        .map(|name| (String::from_utf8_lossy(name), brief(left.get(name)), brief(right.get(name))))
        .collect();
    assert!(differ.is_empty(), "{differ:#?}");
}

fn sample(root: &Path) {
    fs::create_dir_all(root.join("sub/deep/er")).unwrap();
    fs::write(root.join("plain"), b"plain").unwrap();
    fs::write(root.join("empty"), b"").unwrap();
    fs::write(root.join("sub/script"), b"#!/bin/sh\n").unwrap();
    fs::write(root.join("sub/deep/large"), vec![7; 3_000_000]).unwrap();
    fs::write(root.join("with space & é"), b"x").unwrap();
    fs::write(root.join(std::ffi::OsStr::from_bytes(b"not \xff utf-8")), b"y").unwrap();
    fs::write(root.join("x".repeat(200)), b"long").unwrap();
    symlink("plain", root.join("good")).unwrap();
    symlink("/no/where", root.join("sub/dangling")).unwrap();
    symlink("deep", root.join("sub/to-directory")).unwrap();
    for n in 0..50 {
        fs::write(root.join(format!("sub/deep/er/{n}")), format!("{n}")).unwrap();
    }
    for (path, mode) in [("sub/script", 0o755), ("plain", 0o600), ("sub/deep", 0o711), ("empty", 0o444)] {
        fs::set_permissions(root.join(path), fs::Permissions::from_mode(mode)).unwrap();
    }
    for path in ["sub/deep/er", "sub/deep", "sub", "plain"] {
        let status = std::process::Command::new("touch")
            .args(["-d", "2001-02-03 04:05:06"])
            .arg(root.join(path))
            .status();
        assert!(status.unwrap().success());
    }
}

#[test]
fn trees_are_the_same_on_the_other_side_and_back() {
    let cli = Cli::new();
    let (one, other) = (cli.start(&["e2e"]), cli.start(&["e2e"]));
    let source = cli.path("source");
    sample(&source);
    let before = tree(&source);
    cli.ok(&["cp", source.to_str().unwrap(), &format!("{one}:/srv-new")]);
    // What the sandbox's own programs see.
    let seen = cli.ok(&[
        "exec",
        &one,
        "sh",
        "-c",
        "cd /srv-new && cat sub/deep/er/49 && readlink sub/dangling && readlink good",
    ]);
    assert_eq!(seen, "49/no/where\nplain\n");
    let stat = "cd /srv-new && stat -c '%a %Y %u' sub/script sub/deep plain";
    assert_eq!(
        cli.ok(&["exec", &one, "sh", "-c", stat])
            .lines()
            .map(|line| line.split(' ').next().unwrap())
            .collect::<Vec<_>>(),
        ["755", "711", "600"]
    );
    let back = cli.path("back");
    cli.ok(&["cp", &format!("{one}:/srv-new"), back.to_str().unwrap()]);
    assert_same(&tree(&back), &before);
    // From one sandbox to another, and as a tar stream that any tar reads.
    cli.ok(&["cp", &format!("{one}:/srv-new"), &format!("{other}:/copy")]);
    let mut stream = cli.spawn(&["cp", &format!("{other}:/copy/."), "-"]);
    let mut bytes = Vec::new();
    stream.out().read_to_end(&mut bytes).unwrap();
    assert_eq!(stream.wait(), 0);
    let unpacked = cli.path("unpacked");
    fs::create_dir(&unpacked).unwrap();
    fs::write(cli.path("stream.tar"), &bytes).unwrap();
    let tar = std::process::Command::new("tar")
        .arg("xpf")
        .arg(cli.path("stream.tar"))
        .current_dir(&unpacked)
        .status();
    assert!(tar.unwrap().success());
    assert_same(&tree(&unpacked), &before);
    // And a stream that a tar has made.
    let made = std::process::Command::new("tar").args(["c", "-C"]).arg(&source).arg(".").output().unwrap();
    cli.ok(&["exec", &other, "mkdir", "/from-tar"]);
    let said = cli.feed(&["cp", "-", &format!("{other}:/from-tar")], &made.stdout);
    assert_eq!(said.code, 0, "{said:?}");
    let again = cli.path("again");
    cli.ok(&["cp", &format!("{other}:/from-tar"), again.to_str().unwrap()]);
    let (mut again, mut before) = (tree(&again), before);
    // The top is the directory that was there.
    for tree in [&mut again, &mut before] {
        tree.remove(&b""[..]);
    }
    assert_same(&again, &before);

    // As another user; what is no file is left out and told.
    cli.ok(&["cp", "-u", "user", source.join("plain").to_str().unwrap(), &format!("{one}:/tmp/mine")]);
    assert_eq!(cli.ok(&["exec", &one, "stat", "-c", "%u", "/tmp/mine"]), "1000\n");
    cli.ok(&[
        "exec",
        &one,
        "sh",
        "-c",
        "mkdir /odd && mkfifo /odd/fifo && touch /odd/file && chmod 4755 /odd/file",
    ]);
    let odd = cli.path("odd");
    let said = cli.run(&["cp", &format!("{one}:/odd"), odd.to_str().unwrap()]);
    assert!(said.code == 1 && said.err.contains("/odd/fifo is left out"), "{said:?}");
    assert_eq!(tree(&odd)[&b"file"[..]].1, 0o755, "no setuid of a sandbox's here");
}

#[test]
fn the_destination_is_what_docker_makes_of_it() {
    let cli = Cli::new();
    let id = cli.start(&["e2e"]);
    let here = cli.path("here");
    fs::create_dir_all(here.join("dir/inner")).unwrap();
    fs::write(here.join("file"), b"f").unwrap();
    symlink("file", here.join("link")).unwrap();
    // In the sandbox /w has a directory `d`, a file `f`, and links to both.
    let reset = "rm -rf /w; mkdir -p /w/d; echo old > /w/f; ln -s d /w/ld; ln -s f /w/lf";
    let show = "cd /w && find . | sort | tr '\\n' ' '; test -L lf && cat f";
    for (source, target, expected) in [
        ("file", "/w/d", Ok("./d/file")),
        ("file", "/w/d/", Ok("./d/file")),
        ("file", "/w/f", Ok("./f")),
        ("file", "/w/lf", Ok("./lf")),
        ("file", "/w/ld", Ok("./d/file")),
        ("file", "/w/new", Ok("./new")),
        ("file", "w/relative", Ok("./relative")),
        ("file", "/w/new/", Err("the destination directory must exist")),
        ("file", "/w/no/new", Err("is no directory in the sandbox")),
        ("dir", "/w/d", Ok("./d/dir/inner")),
        ("dir", "/w/new", Ok("./new/inner")),
        ("dir/.", "/w/d", Ok("./d/inner")),
        ("dir/", "/w/d", Ok("./d/dir/inner")),
        ("dir", "/w/f", Err("cannot copy a directory to a file")),
        ("link", "/w/d", Ok("./d/link")),
    ] {
        cli.ok(&["exec", &id, "sh", "-c", reset]);
        let from = format!("{}/{source}", here.display());
        let said = cli.run(&["cp", &from, &format!("{id}:{target}")]);
        match expected {
            Ok(path) => {
                assert_eq!(said.code, 0, "{source} {target}: {said:?}");
                let found = cli.ok(&["exec", &id, "sh", "-c", show]);
                assert!(found.split(' ').any(|found| found == path), "{source} {target}: {found}");
                if target == "/w/lf" || target == "/w/f" {
                    assert!(found.ends_with('f') && !found.contains("old"), "{found}");
                }
            }
            Err(words) => assert!(said.code == 1 && said.err.contains(words), "{source} {target}: {said:?}"),
        }
    }
    cli.ok(&["exec", &id, "sh", "-c", reset]);
    cli.ok(&["cp", "-L", &format!("{}/link", here.display()), &format!("{id}:/w/d")]);
    assert_eq!(cli.ok(&["exec", &id, "sh", "-c", "cat /w/d/file"]), "f");
    // The same rules on this side.
    let target = |name: &str| here.join(name).to_str().unwrap().to_owned();
    cli.ok(&["cp", &format!("{id}:/w/f"), &target("dir")]);
    assert_eq!(fs::read(here.join("dir/f")).unwrap(), b"old\n");
    cli.ok(&["cp", &format!("{id}:/w/lf"), &target("copied-link")]);
    assert_eq!(fs::read_link(here.join("copied-link")).unwrap(), Path::new("f"));
    cli.ok(&["cp", "-L", &format!("{id}:/w/lf"), &target("followed")]);
    assert_eq!(fs::read(here.join("followed")).unwrap(), b"old\n");
    cli.ok(&["cp", &format!("{id}:/w/f"), &target("link")]);
    assert_eq!(fs::read(here.join("file")).unwrap(), b"old\n", "through the link");
    for (from, to, words) in [
        ("/w/f", target("no/where"), "is no directory"),
        ("/w/f", target("nope/"), "the destination directory must exist"),
        ("/w", target("file"), "cannot copy a directory to a file"),
        ("/nope", target("x"), "No such file"),
    ] {
        let said = cli.run(&["cp", &format!("{id}:{from}"), &to]);
        assert!(said.code == 1 && said.err.contains(words), "{from} {to}: {said:?}");
    }
    for bad in ["../out", "a/../../out"] {
        let mut header = tar::Header::new_gnu();
        header.as_mut_bytes()[..bad.len()].copy_from_slice(bad.as_bytes());
        header.set_size(0);
        header.set_mode(0o644);
        header.set_cksum();
        let said = cli.feed(&["cp", "-", &format!("{id}:/w/d")], header.as_bytes());
        assert!(said.code == 1 && said.err.contains("leads out"), "{said:?}");
    }
}

const LARGE: usize = 300_000_000;

/// What a copy may take, whatever the file's size: a debug build with its threads takes about 20 MiB.
const MAX_PEAK_KIB: u64 = 64 << 10;

#[test]
fn a_large_file_is_streamed_and_an_interrupted_one_is_not_there() {
    let cli = Cli::new();
    let id = cli.start(&["--disk", "800", "e2e"]);
    let mut header = tar::Header::new_gnu();
    header.set_path("big").unwrap();
    header.set_size(LARGE as u64);
    header.set_mode(0o600);
    header.set_cksum();
    let chunk: Vec<u8> = (0..1_000_000u32).map(|n| (n / 3) as u8).collect();
    let begin = |chunks: usize| {
        let running = cli.spawn(&["cp", "-", &format!("{id}:/tmp")]);
        let mut stdin = running.0.stdin.as_ref().unwrap();
        stdin.write_all(header.as_bytes()).unwrap();
        (0..chunks).for_each(|_| stdin.write_all(&chunk).unwrap());
        running
    };
    // Broken off in the middle.
    let mut running = begin(100);
    running.signal(Signal::INT);
    assert_eq!(running.wait(), 130);
    until("nothing of it is left", || cli.ok(&["exec", &id, "sh", "-c", "ls -A /tmp"]).is_empty());
    // Its input ends in the middle: no half file either.
    let mut running = begin(1);
    drop(running.0.stdin.take());
    let said = running.said();
    assert_eq!(said.code, 1, "{said:?}");
    until("nothing of it is left", || cli.ok(&["exec", &id, "sh", "-c", "ls -A /tmp"]).is_empty());

    let mut running = begin(LARGE / chunk.len());
    let peak = peak_kib(running.pid());
    assert!(peak < MAX_PEAK_KIB, "{peak} KiB for an upload");
    // To the end of its block, and two empty ones.
    let end = vec![0; (512 - LARGE % 512) % 512 + 1024];
    running.0.stdin.take().unwrap().write_all(&end).unwrap();
    let said = running.said();
    assert_eq!(said.code, 0, "{said:?}");

    let mut running = cli.spawn(&["cp", &format!("{id}:/tmp/big"), "-"]);
    let mut out = running.out();
    let mut head = [0; 512];
    out.read_exact(&mut head).unwrap();
    let mut got = vec![0; chunk.len()];
    for n in 0..LARGE / chunk.len() {
        out.read_exact(&mut got).unwrap();
        assert!(got == chunk, "million {n}");
        if n + 1 == LARGE / chunk.len() {
            let peak = peak_kib(running.pid());
            assert!(peak < MAX_PEAK_KIB, "{peak} KiB for a download");
        }
    }
    let mut rest = Vec::new();
    out.read_to_end(&mut rest).unwrap();
    assert!(rest.iter().all(|byte| *byte == 0));
    assert_eq!(running.wait(), 0);

    let target = cli.path("big");
    let mut running = cli.spawn(&["cp", &format!("{id}:/tmp/big"), target.to_str().unwrap()]);
    let temporary = || {
        let mut names = fs::read_dir(cli.path("")).unwrap().map(|entry| entry.unwrap().file_name());
        names.any(|name| name.to_string_lossy().starts_with(".host-shim-cp-"))
    };
    until("it has begun", temporary);
    running.signal(Signal::INT);
    assert_eq!(Running::wait(&mut running), 130);
    assert!(!target.exists() && !temporary());
}

#[test]
fn a_directory_of_more_entries_than_an_answer_holds_is_copied() {
    let cli = Cli::new();
    let id = cli.start(&["e2e"]);
    cli.ok(&["exec", &id, "sh", "-c", "mkdir /tmp/many && cd /tmp/many && seq 1 10050 | xargs touch"]);
    let mut running = cli.spawn(&["cp", &format!("{id}:/tmp/many"), "-"]);
    let mut bytes = Vec::new();
    running.out().read_to_end(&mut bytes).unwrap();
    assert_eq!(running.wait(), 0);
    assert_eq!(tar::Archive::new(&bytes[..]).entries().unwrap().count(), 10_051);
}
