//! Images that lie: damaged blobs, and layers that want to write outside.

use std::fs;

use rootfs_tools::{BuildOptions, Error, build};

use crate::image::{Entry, TestImage, layer};
use crate::oracle::{assert_clean, view};

fn refuse(image: &TestImage) -> Error {
    let dir = tempfile::tempdir().unwrap();
    let error = build(&image.open(), &BuildOptions::default(), &dir.path().join("rootfs.ext4"), &mut |_| {})
        .unwrap_err();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left after {error}");
    assert!(error.is_bad_input(), "{error:?}");
    error
}

#[test]
fn a_corrupt_blob_is_refused_by_its_digest() {
    let layers = [layer(&[Entry::file("a", vec![b'a'; 100_000])]), layer(&[Entry::file("b", "b")])];
    for image in [TestImage::new(&layers), TestImage::plain(&layers)] {
        let blob = image.blob(0);
        let good = fs::read(&blob).unwrap();
        // A byte of data, a byte of the first header, half of the blob, and bytes behind its end.
        let flipped = |at: usize| {
            let mut bytes = good.clone();
            bytes[at] ^= 1;
            bytes
        };
        let longer = [&good[..], &[0; 512]].concat();
        for bad in [flipped(good.len() / 2), flipped(10), good[..good.len() / 2].to_vec(), longer] {
            fs::write(&blob, bad).unwrap();
            let text = refuse(&image).to_string();
            let digest = blob.file_name().unwrap().to_str().unwrap();
            assert!(text.contains(digest), "{text}");
        }
        fs::remove_file(&blob).unwrap();
        assert!(refuse(&image).to_string().contains("not found"));
    }
}

/// The damage sits in a layer of which nothing survives, so that no data of it is copied.
#[test]
fn a_corrupt_blob_is_refused_when_it_is_hidden() {
    let image =
        TestImage::plain(&[layer(&[Entry::file("a", vec![b'a'; 9000])]), layer(&[Entry::file(".wh.a", "")])]);
    let blob = image.blob(0);
    let mut bytes = fs::read(&blob).unwrap();
    let at = bytes.iter().rposition(|&byte| byte == b'a').unwrap();
    bytes[at] = b'x';
    fs::write(&blob, bytes).unwrap();
    assert!(refuse(&image).to_string().contains("expected sha256:"));
}

#[test]
fn paths_that_lead_out_are_refused() {
    for entry in [
        Entry::file("../outside", "x"),
        Entry::file("a/../../outside", "x"),
        Entry::hard_link("inside", "../../../../etc/passwd"),
        Entry::hard_link("inside", "/etc/passwd"),
        Entry::hard_link("inside", "missing"),
        Entry::hard_link("inside", "directory"),
        Entry::file("file/below", "a parent that is a file"),
        Entry::file("loop/below", "a parent that leads nowhere"),
    ] {
        let shown = format!("{entry:?}");
        let image = TestImage::new(&[layer(&[
            Entry::directory("directory"),
            Entry::file("file", ""),
            Entry::symlink("loop", "loop"),
            entry,
        ])]);
        let error = refuse(&image);
        assert!(
            matches!(error, Error::Corrupt { .. } | Error::Image(oci::Error::Corrupt { .. })),
            "{shown}: {error:?}"
        );
    }
}

#[test]
fn absolute_names_and_links_stay_inside() {
    let outside = tempfile::tempdir().unwrap();
    let escape = outside.path().to_str().unwrap();
    let lower = layer(&[
        Entry::symlink("absolute", escape),
        Entry::symlink("relative", format!("../../../../../..{escape}")),
        Entry::file("/rooted", "at our root"),
    ]);
    let upper = layer(&[
        Entry::file("absolute/one", "1"),
        Entry::file("relative/two", "2"),
        Entry::file("absolute/.wh.three", ""),
        Entry::file("absolute/.wh..wh..opq", ""),
    ]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rootfs.ext4");
    build(&TestImage::new(&[lower, upper]).open(), &BuildOptions::default(), &path, &mut |_| {}).unwrap();
    assert_clean(&path);
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0, "the host's folder is untouched");
    let seen = view(&path);
    let inside = escape.trim_start_matches('/');
    assert_eq!(seen[format!("{inside}/one").as_bytes()].contents, b"1");
    assert_eq!(seen[format!("{inside}/two").as_bytes()].contents, b"2");
    assert_eq!(seen[&b"rooted"[..]].contents, b"at our root");
}

#[test]
fn whiteouts_of_nothing_do_nothing() {
    let image = TestImage::new(&[
        layer(&[Entry::file("file", "kept"), Entry::directory("same")]),
        layer(&[
            Entry::file(".wh.missing", ""),
            Entry::file("file/.wh.below-a-file", ""),
            // Of its own layer, before and behind the entry that it must spare.
            Entry::file(".wh.late", ""),
            Entry::file("late", "kept"),
            Entry::file("soon", "kept"),
            Entry::file(".wh.soon", ""),
            Entry::file("same/new", "kept"),
            Entry::file(".wh.same", ""),
        ]),
    ]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rootfs.ext4");
    build(&image.open(), &BuildOptions::default(), &path, &mut |_| {}).unwrap();
    assert_clean(&path);
    let seen = view(&path);
    for name in ["file", "late", "soon", "same/new"] {
        assert_eq!(seen[name.as_bytes()].contents, b"kept", "{name}");
    }
}
