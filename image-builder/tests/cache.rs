//! The cache: what a key depends on, `explain`, results for other machines, `prune`, `fsck`, and what a crash leaves.

#[path = "support/project.rs"]
mod project;
mod support;

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use project::{BASE, Project, counts, failure, json};
use serde_json::Value;

/// The reasons of each step that was carried out, as `what name: change`.
fn reasons(explanation: &Value) -> Vec<(String, Vec<String>)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let reason = |reason: &Value| {
        format!("{} {}: {}", text(&reason["what"]), text(&reason["name"]), text(&reason["change"]))
    };
    let steps = explanation["steps"].as_array().unwrap().iter();
    steps
        .filter(|step| step["outcome"] == "executed")
        .map(|step| (text(&step["text"]), step["reasons"].as_array().unwrap().iter().map(reason).collect()))
        .collect()
}

fn explain(test: &Project) -> Vec<(String, Vec<String>)> {
    reasons(&json(&test.run(&["explain", "--json", test.path("context").to_str().unwrap()])))
}

#[test]
fn build_arguments_count_where_they_are_in_scope() {
    let Some(test) = Project::new() else { return };
    let dockerfile =
        format!("ARG TOP=1\n{BASE}RUN echo early > /early\nARG VERSION=1\nRUN echo v > /v\nARG LATE\n");
    assert_eq!(counts(&test.build(&dockerfile, &[])), (4, 0, 0));
    for unused in ["OTHER=1", "TOP=2", "LATE=3"] {
        assert_eq!(counts(&test.build(&dockerfile, &["--build-arg", unused])), (0, 4, 0), "{unused}");
    }
    let report = test.build(&dockerfile, &["--build-arg", "VERSION=2"]);
    assert_eq!(counts(&report), (1, 3, 0), "only the step behind the ARG");
    assert_eq!(explain(&test), [("RUN echo v > /v".to_owned(), vec!["arg VERSION: changed".to_owned()])]);
    let text = String::from_utf8(test.run(&["explain", "app"]).stdout).unwrap();
    assert!(text.contains("cached   [4/7] RUN echo early > /early"), "{text}");
    assert!(text.contains("executed [6/7] RUN echo v > /v\n           arg VERSION: changed"), "{text}");
    assert!(!text.contains("echo v > /v\n           arg VERSION: 2"), "values are not told: {text}");
}

#[test]
fn files_count_by_content_mode_and_name_not_by_time() {
    let Some(test) = Project::new() else { return };
    test.write("src/one", "1");
    test.write("src/two", "2");
    test.write("src/three", "3");
    let dockerfile = format!("{BASE}COPY src /src/\nRUN cat /src/* > /all\n");
    assert_eq!(counts(&test.build(&dockerfile, &[])), (4, 0, 0));
    let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let file = |name: &str| File::options().write(true).open(test.path("context/src").join(name)).unwrap();
    file("one").set_modified(old).unwrap();
    // The same bytes again, as a fresh checkout has them.
    test.write("src/two", "2");
    test.write("unrelated", "x");
    assert_eq!(counts(&test.build(&dockerfile, &[])), (0, 4, 0));
    // The same size and time of change: only the content tells.
    let before = file("two").metadata().unwrap().modified().unwrap();
    test.write("src/two", "x");
    file("two").set_modified(before).unwrap();
    test.write("src/new", "n");
    fs::remove_file(test.path("context/src/three")).unwrap();
    fs::set_permissions(test.path("context/src/one"), fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(counts(&test.build(&dockerfile, &[])), (2, 2, 0));
    assert_eq!(
        explain(&test),
        [
            (
                "COPY src /src/".to_owned(),
                vec![
                    "file new: added".to_owned(),
                    "file one: mode or owner changed".to_owned(),
                    "file three: removed".to_owned(),
                    "file two: content changed".to_owned(),
                ],
            ),
            (
                "RUN cat /src/* > /all".to_owned(),
                vec!["below [4/5]: a step before it was carried out, and made another layer".to_owned()],
            ),
        ]
    );
}

#[test]
fn a_new_base_a_changed_instruction_and_no_cache_are_told() {
    let Some(test) = Project::new() else { return };
    let build = |name: &str, dockerfile: &str, options: &[&str]| {
        json(&test.output(dockerfile, &[&["-t", name], options].concat()))
    };
    build("base", BASE, &[]);
    let dockerfile = "FROM base AS main\nRUN echo x > /x\nENV A=b\nRUN echo y > /y\n";
    build("app", dockerfile, &[]);
    assert_eq!(explain(&test)[0].1, ["new : no earlier step is like it"]);
    build("base", &format!("{BASE}RUN echo new > /new\n"), &[]);
    build("app", dockerfile, &[]);
    let told = explain(&test);
    assert_eq!(told[0].1, ["base : the base image, or the stage that it begins with, has other layers"]);
    build("app", &dockerfile.replace("echo y", "echo z").replace("A=b", "A=c"), &[]);
    assert_eq!(
        explain(&test),
        [(
            "RUN echo z > /y".to_owned(),
            vec![
                "env A: changed".to_owned(),
                "instruction : the instruction was: RUN echo y > /y".to_owned()
            ]
        )]
    );
    let report = build("app", dockerfile, &["--no-cache"]);
    assert_eq!(counts(&report), (2, 0, 0));
    assert_eq!(explain(&test)[1].1, ["no-cache : the build was told not to use the cache for it"]);
    let staged =
        "FROM base AS first\nRUN echo 1 > /1\nFROM base AS second\nRUN echo 2 > /2\nCOPY --from=first /1 /\n";
    build("staged", staged, &[]);
    let report = build("staged", staged, &["--no-cache-filter", "FIRST"]);
    assert_eq!(counts(&report), (1, 2, 0));
    let digest = report["digest"].as_str().unwrap();
    assert_eq!(reasons(&json(&test.run(&["explain", digest, "--json"]))).len(), 1);
    // A failed build is remembered too.
    failure(&test.output("FROM base\nRUN exit 1\n", &["-t", "app"]), 1);
    let failed = json(&test.run(&["explain", "--json", test.path("context").to_str().unwrap()]));
    assert_eq!((&failed["steps"][0]["outcome"], failed["digest"].is_null()), (&"failed".into(), true));
    failure(&test.run(&["explain", "no-such-image"]), 2);
}

#[test]
fn results_travel_in_a_folder_and_are_checked() {
    let Some(test) = Project::new() else { return };
    test.write("file", "1");
    let dockerfile = format!("{BASE}COPY file /file\nRUN head -c 100000 /dev/urandom > /random\n");
    let folder = test.path("ci-cache");
    let cache = folder.to_str().unwrap();
    // There is none yet, as in the first run of a pipeline.
    let first = test.build(&dockerfile, &["--cache-from", cache, "--cache-to", cache]);
    assert_eq!(counts(&first), (4, 0, 0));
    let build_on = |data: &str, options: &[&str]| {
        test.build_on(data, &dockerfile, &[&["-t", "app", "--cache-from", cache], options].concat())
            .output()
            .unwrap()
    };
    let second = json(&build_on("elsewhere", &[]));
    assert_eq!(counts(&second), (0, 4, 0));
    assert_eq!(first["digest"], second["digest"], "random data would differ");
    assert!(test.program_on("elsewhere").arg("fsck").status().unwrap().success());
    // What the last build did not use is not in the folder any more.
    let blobs = || fs::read_dir(folder.join("blobs/sha256")).unwrap().count();
    let before = blobs();
    test.write("file", "2");
    assert_eq!(counts(&json(&build_on("data", &["--cache-to", cache]))), (2, 2, 0));
    assert_eq!(blobs(), before);
    // A flipped bit, in the layer of the last step.
    let mut layers = fs::read_dir(folder.join("blobs/sha256")).unwrap().map(|entry| entry.unwrap().path());
    let layer = layers.find(|path| (90_000..200_000).contains(&fs::metadata(path).unwrap().len())).unwrap();
    let mut bytes = fs::read(&layer).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&layer, bytes).unwrap();
    let output = build_on("third", &[]);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(stderr.contains("has a damaged result, which is not used"), "{stderr}");
    assert_eq!(json(&output)["executed"], 1, "{stderr}");
    assert!(test.program_on("third").arg("fsck").status().unwrap().success());
    // An artifact that other tools carry.
    match Command::new("skopeo").args(["inspect", "--raw", &format!("oci:{cache}:tiffin-cache")]).output() {
        Ok(output) => assert_eq!(json(&output)["artifactType"], "application/vnd.tiffin.cache.v1+json"),
        Err(_) => eprintln!("SKIPPED: skopeo is not installed"),
    }
    fs::write(folder.join("index.json"), "{").unwrap();
    failure(&build_on("fourth", &[]), 1);
}

#[test]
fn prune_removes_what_nothing_needs_and_keeps_images_whole() {
    let Some(test) = Project::new() else { return };
    let dockerfile = format!("{BASE}RUN head -c 3000000 /dev/urandom > /random\n");
    let kept = test.build(&dockerfile, &[]);
    let prune = |options: &[&str]| json(&test.run(&[&["prune", "--json"], options].concat()));
    assert_eq!(prune(&[])["removed"].as_array().unwrap().len(), 0, "everything is of use");
    // The same again: the image and the layer of before are nobody's.
    let second = test.build(&dockerfile, &["--no-cache"]);
    assert_ne!(kept["digest"], second["digest"]);
    let dry = prune(&["--dry-run"]);
    let report = prune(&[]);
    assert_eq!(dry["removed"], report["removed"]);
    assert!(report["freed"].as_u64().unwrap() > 1_000_000, "{report}");
    let kinds = |report: &Value| {
        let mut kinds: Vec<_> =
            report["removed"].as_array().unwrap().iter().map(|gone| gone["kind"].to_string()).collect();
        kinds.sort();
        kinds.dedup();
        kinds
    };
    assert_eq!(kinds(&report), ["\"blob\""]);
    assert_eq!(prune(&["--max-age", "1h"])["removed"].as_array().unwrap().len(), 0);
    // By size, the oldest first: the layer of busybox's links goes before the large one.
    let half = prune(&["--max-size", "4MB", "--dry-run"]);
    assert!(half["left"].as_u64().unwrap() <= 8_000_000, "{half}");
    let all = prune(&["--all"]);
    assert_eq!(
        kinds(&all),
        ["\"blob\"", "\"layer\"", "\"step\""],
        "with the results go the first image's blobs"
    );
    assert_eq!(fs::read_dir(test.path("data/cache/steps")).unwrap().count(), 0);
    assert!(test.run(&["fsck"]).status.success());
    assert_eq!(test.file("app", "/random").len(), 3_000_000);
    // And everything can be made again.
    assert_eq!(counts(&test.build("FROM app\nRUN test -s /random\n", &[])), (1, 0, 0));
    assert!(test.leftovers().is_empty());
    failure(&test.run(&["prune", "--max-age", "soon"]), 2);
}

#[test]
fn builds_beside_a_prune_lose_nothing() {
    let Some(test) = Project::new() else { return };
    test.write(
        "Dockerfile",
        &format!("{BASE}ARG n\nRUN echo $n > /n && sleep 0.1\nCOPY busybox /again\nRUN cat /n\n"),
    );
    let builders: Vec<_> = (0..2)
        .map(|builder| {
            let commands: Vec<_> = (0..6)
                .map(|round| {
                    let mut command = test.program_on("data");
                    let (name, arg) = (format!("b{builder}:{round}"), format!("n={}", round % 3));
                    command
                        .args(["--quiet", "build", "-t", &name, "--build-arg", &arg])
                        .arg(test.path("context"));
                    command.stdout(Stdio::null());
                    command
                })
                .collect();
            std::thread::spawn(move || {
                for mut command in commands {
                    let output = command.output().unwrap();
                    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
                }
            })
        })
        .collect();
    let mut rounds = 0;
    while !builders.iter().all(std::thread::JoinHandle::is_finished) {
        let output = test.run(&["--quiet", "prune", "--all", "--json"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        rounds += 1;
    }
    builders.into_iter().for_each(|builder| builder.join().unwrap());
    assert!(rounds > 1);
    let report = json(&test.run(&["fsck", "--json"]));
    assert_eq!(report["images"], 12, "{report}");
    assert_eq!(test.file("b1:5", "/n"), b"2\n");
}

#[test]
fn fsck_finds_and_removes_damage() {
    let Some(test) = Project::new() else { return };
    let dockerfile = format!("{BASE}RUN echo x > /x\n");
    let report = test.build(&dockerfile, &[]);
    let other = json(&test.output("FROM scratch\nCOPY busybox /other\n", &["-t", "other"]));
    let fsck = |options: &[&str]| test.run(&[&["fsck", "--json"], options].concat());
    assert_eq!(json(&fsck(&[]))["findings"], serde_json::json!([]));

    // Damage of each kind.
    let layers = |report: &Value| {
        let manifest = test.blob_json("data", report["digest"].as_str().unwrap());
        let layers = manifest["layers"].as_array().unwrap().iter();
        layers.map(|layer| test.blob("data", layer["digest"].as_str().unwrap())).collect::<Vec<_>>()
    };
    let (rotten, gone) = (layers(&report)[1].clone(), layers(&other)[0].clone());
    let mut bytes = fs::read(&rotten).unwrap();
    bytes[10] ^= 1;
    fs::write(&rotten, bytes).unwrap();
    fs::remove_file(&gone).unwrap();
    fs::write(test.path("data/images/blobs/sha256/stray"), "x").unwrap();
    fs::write(test.path("data/cache/steps/stray"), "x").unwrap();
    let record = fs::read_dir(test.path("data/cache/steps")).unwrap().map(|entry| entry.unwrap().path());
    let is_record = |path: &std::path::PathBuf| path.extension().is_some_and(|extension| extension == "json");
    let record = record.filter(is_record).max().unwrap();
    fs::write(&record, "{}").unwrap();
    fs::write(test.path("data/images/.incoming/half"), "x").unwrap();

    let found = fsck(&[]);
    assert_eq!(found.status.code(), Some(3), "{}", String::from_utf8_lossy(&found.stderr));
    let found: Value = serde_json::from_slice(&found.stdout).unwrap();
    let places = |report: &Value, kind: &str| {
        let mine = report["findings"].as_array().unwrap().iter().filter(|finding| finding["kind"] == kind);
        mine.map(|finding| finding["place"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(places(&found, "blob"), [rotten.to_str().unwrap()]);
    assert_eq!(places(&found, "image"), ["docker.io/library/app:latest", "docker.io/library/other:latest"]);
    assert_eq!(places(&found, "stray").len(), 2);
    assert!(places(&found, "step").contains(&record.display().to_string()), "{found}");
    assert_eq!(places(&found, "half_made").len(), 1);
    let repaired = json(&fsck(&["--repair"]));
    assert_eq!(places(&repaired, "image").len(), 2);
    assert_eq!(json(&fsck(&[]))["findings"], serde_json::json!([]));
    assert_eq!(json(&test.run(&["images", "--json"])), serde_json::json!([]));
    let again = test.build(&dockerfile, &[]);
    assert!(again["executed"].as_u64().unwrap() >= 1, "{again}");
    assert_eq!(test.file("app", "/x"), b"x\n");

    // A list of images that nobody can read.
    fs::write(test.path("data/images/index.json"), "{\"half").unwrap();
    assert_eq!(fsck(&[]).status.code(), Some(3));
    json(&fsck(&["--repair"]));
    assert_eq!(fs::read_to_string(test.path("data/images/index.json.damaged")).unwrap(), "{\"half");
    assert_eq!(counts(&test.build(&dockerfile, &[])), (0, 3, 0), "blobs and results are still there");
    assert!(fsck(&[]).status.success());
}

/// A generator of times: the same in each run of the test, all over the range.
fn fraction(round: u32) -> f64 {
    f64::from(round) * 0.618_033_988_75 % 1.0
}

#[test]
fn a_build_that_is_killed_at_any_time_loses_nothing_that_was_finished() {
    let Some(test) = Project::new() else { return };
    test.write("file", "x");
    let dockerfile = |round: u32| {
        format!(
            "{}RUN echo {round} > /a && head -c 200000 /dev/urandom > /r\nCOPY file /f\n\
             {}COPY --from=a /a /r /\nWORKDIR /w{round}\nRUN echo $(cat /a) > /b\n",
            BASE.replace("FROM scratch", "FROM scratch AS a"),
            BASE.replace("FROM scratch", "FROM scratch AS b")
        )
    };
    let folder = test.path("ci-cache");
    let options = ["--quiet", "-t", "app", "--cache-to", folder.to_str().unwrap()];
    let begun = Instant::now();
    json(&test.build_on("data", &dockerfile(0), &options).output().unwrap());
    let whole = begun.elapsed();
    for round in 1..=30 {
        let mut build = test.build_on("data", &dockerfile(round), &options);
        let mut child = build.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // A point in the build, not a time that anything waits for.
        std::thread::sleep(whole.mul_f64(fraction(round)));
        let _ = child.kill();
        child.wait().unwrap();
        let fsck = test.run(&["fsck", "--json"]);
        assert!(fsck.status.success(), "round {round}: {}", String::from_utf8_lossy(&fsck.stdout));
    }
    let report = test.build(&dockerfile(99), &["--cache-to", folder.to_str().unwrap()]);
    assert_eq!(test.file("app", "/b"), b"99\n");
    assert!(
        report["cached"].as_u64().unwrap() >= 2,
        "what the first build finished is still there: {report}"
    );
    assert!(test.leftovers().is_empty());
    let elsewhere =
        test.build_on("elsewhere", &dockerfile(99), &["-t", "app", "--cache-from", folder.to_str().unwrap()]);
    let elsewhere = { elsewhere }.output().unwrap();
    assert_eq!(json(&elsewhere)["executed"], 0, "{}", String::from_utf8_lossy(&elsewhere.stderr));
    // Of the killed builds' blobs only whole ones are left, which nobody names.
    json(&test.run(&["prune", "--json"]));
    assert!(test.run(&["fsck"]).status.success());
}

#[test]
fn a_full_disk_is_an_error_and_no_damage() {
    let Some(test) = Project::new() else { return };
    test.write(
        "Dockerfile",
        &format!("{BASE}RUN head -c 3000000 /dev/urandom > /one\nRUN head -c 60000000 /dev/urandom > /two\n"),
    );
    test.write("copied/Dockerfile", "FROM scratch\nCOPY large /large\n");
    let random: Vec<u8> = (0..5_000_000_u64)
        .flat_map(|number| number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
        .collect();
    fs::write(test.path("context/copied/large"), random).unwrap();
    test.write("small/Dockerfile", &format!("{BASE}RUN echo small > /small\n"));
    fs::copy(test.path("context/busybox"), test.path("context/small/busybox")).unwrap();
    // In a mount namespace of its own, which ends with the shell.
    let script = "set -eu; mkdir -p \"$DATA\"; mount -t tmpfs -o size=24m tmpfs \"$DATA\"; \
                  ib() { \"$BUILDER\" --data-dir \"$DATA\" --progress plain \"$@\"; }; \
                  if ib build -t big \"$CONTEXT\"; then echo 'it was not full' >&2; exit 9; fi; \
                  ib fsck; if ib build -t big --compression none \"$CONTEXT/copied\"; then exit 9; fi; ib fsck; ib build -t small \"$CONTEXT/small\"; ib fsck; ib images; ib prune --all; ib fsck; df \"$DATA\" >&2";
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", script])
        .env("DATA", test.path("full"))
        .env("BUILDER", env!("CARGO_BIN_EXE_image-builder"))
        .env("CONTEXT", test.path("context"))
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}{}", String::from_utf8_lossy(&output.stdout));
    assert!(stderr.contains("No space left on device"), "{stderr}");
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(
        stdout.contains("docker.io/library/small:latest") && !stdout.contains("docker.io/library/big"),
        "{stdout}"
    );
}

#[test]
fn the_same_steps_give_the_same_digests_in_two_fresh_folders() {
    let Some(test) = Project::new() else { return };
    test.write("src/file", "content");
    let dockerfile = format!(
        "{BASE}COPY src /src/\nCOPY <<EOF /inline\nhello\nEOF\nWORKDIR /deep/er\n\
         RUN echo x > /x && mkdir -p /d && ln -s x /d/l && touch -d '2001-01-01 00:00:00' /old && ln /x /hard && rm /bin/vi\nENV A=b\n"
    );
    let epoch = "SOURCE_DATE_EPOCH=1700000000";
    for compression in ["gzip", "zstd"] {
        let build = |data: &str, by_variable: bool| {
            let mut options = vec!["-t", "app", "--rewrite-timestamp", "--compression", compression];
            if !by_variable {
                options.extend(["--build-arg", epoch]);
            }
            let data = format!("{data}-{compression}");
            let mut command = test.build_on(&data, &dockerfile, &options);
            if by_variable {
                command.env("SOURCE_DATE_EPOCH", "1700000000");
            }
            let output = command.output().unwrap();
            assert!(
                !String::from_utf8_lossy(&output.stderr).contains("no ARG"),
                "it is no argument that is misspelt"
            );
            (json(&output), data)
        };
        let (one, data) = build("one", true);
        // Another second, and other times of the files.
        let now = File::options().write(true).open(test.path("context/src/file")).unwrap();
        now.set_modified(SystemTime::now() + Duration::from_secs(60)).unwrap();
        let (two, _) = build("two", false);
        assert_eq!(one["digest"], two["digest"], "{compression}");
        let (cached, _) = build("one", false);
        assert_eq!((&cached["digest"], counts(&cached).0), (&one["digest"], 0));

        let manifest = test.blob_json(&data, one["digest"].as_str().unwrap());
        let config = test.blob_json(&data, manifest["config"]["digest"].as_str().unwrap());
        assert_eq!(config["created"], "2023-11-14T22:13:20Z");
        for entry in config["history"].as_array().unwrap() {
            assert_eq!(entry["created"], "2023-11-14T22:13:20Z");
        }
        let store = oci::Store::open(&test.path(&data).join("images")).unwrap();
        let image = store.image("docker.io/library/app:latest").unwrap();
        let (mut oldest, mut count) = (i64::MAX, 0);
        for layer in &image.layers {
            let mut reader = oci::layer::LayerReader::new(layer.open().unwrap());
            while let Some(change) = reader.next_change().unwrap() {
                let oci::layer::Change::Node(node) = change else { continue };
                assert!(node.metadata.mtime.seconds <= 1_700_000_000, "{}", node.path);
                oldest = oldest.min(node.metadata.mtime.seconds);
                count += 1;
            }
        }
        assert!(oldest < 1_000_000_000 && count > 10, "older times stay as they are");
    }
    let without = test.output(&dockerfile, &["-t", "app", "--rewrite-timestamp"]);
    assert!(failure(&without, 2).contains("SOURCE_DATE_EPOCH"));
    let wrong = test.output(&dockerfile, &["-t", "app", "--build-arg", "SOURCE_DATE_EPOCH=yesterday"]);
    assert!(failure(&wrong, 2).contains("seconds since 1970"));
}
