//! Templates as E2B's clients send them, and the user of its sandboxes.
//!
//! Trees of layers are mounted to be read, so they need root.

#[path = "support/trees.rs"]
mod trees;

use std::fs;
use std::process::Command;

use serde_json::json;
use trees::Builder;

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nada:x:1000:1000::/home/ada:/bin/sh\n";
const SUDOERS: &str = "/etc/sudoers.d/e2b-user f 440 0:0 user ALL=(ALL:ALL) NOPASSWD: ALL";

#[test]
fn the_user_is_added_to_any_image_once() {
    let Some(builder) = Builder::new("user") else { return };
    // Nothing at all: as in distroless images.
    let image = builder.build("FROM scratch\nCOPY <<x /x\nx\n", &["--e2b-user"]);
    let (x, rest): (Vec<_>, Vec<_>) = image.lines().into_iter().partition(|line| line.starts_with("/x "));
    assert_eq!(x.len(), 1);
    assert_eq!(
        rest,
        [
            "/etc d 755 0:0",
            "/etc/group f 644 0:0 root:x:0:\nuser:x:1000:",
            "/etc/passwd f 644 0:0 root:x:0:0:root:/root:/sbin/nologin\nuser:x:1000:1000::/home/user:/sbin/nologin",
            "/etc/sudoers.d d 755 0:0",
            SUDOERS,
            "/home d 755 0:0",
            "/home/user d 755 1000:1000",
        ]
    );
    let again = builder.build("FROM scratch\nCOPY <<x /x\nx\n", &["--e2b-user"]);
    assert_eq!((again.cached, again.layers()), (2, image.layers()));

    // A distribution, where a number is taken and the files are reached by links.
    let files = [
        ("etc/passwd", PASSWD),
        ("etc/group", "root:x:0:\nsudo:x:27:ada\nada:x:1000:"),
        ("etc/shadow", "root:*:19000:0:99999:7:::\n"),
        ("etc/sudoers", "root ALL=(ALL) ALL\n# @includedir /etc/sudoers.d\n"),
        ("etc/skel/.profile", "umask 022\n"),
        ("usr/bin/sh", ""),
    ];
    builder.write(&files);
    let context = builder.path("context");
    for (path, mode) in [("etc/shadow", 0o640), ("etc/sudoers", 0o440), ("usr/bin/sh", 0o755)] {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
        fs::set_permissions(context.join(path), mode).unwrap();
    }
    std::os::unix::fs::symlink("usr/bin", context.join("bin")).unwrap();
    let dockerfile = "FROM scratch\nCOPY --chown=0:42 etc /etc/\nCOPY usr /usr/\nCOPY --parents ./b*n /\n";
    let dockerfile = dockerfile.replace("COPY --parents ./b*n /", "COPY . /");
    let image = builder.build(&dockerfile, &["--e2b-user"]);
    let contents = |path: &str| String::from_utf8(image.contents(path)).unwrap();
    assert_eq!(contents("/etc/passwd"), format!("{PASSWD}user:x:1001:1001::/home/user:/bin/sh\n"));
    assert_eq!(contents("/etc/group"), "root:x:0:\nsudo:x:27:ada,user\nada:x:1000:\nuser:x:1001:\n");
    assert!(contents("/etc/shadow").ends_with("\nuser:*:19000:0:99999:7:::\n"));
    assert!(contents("/etc/sudoers").ends_with("\n#includedir /etc/sudoers.d\n"));
    let lines = image.lines();
    assert!(
        lines.contains(&"/home/user/.profile f 644 1001:1001 umask 022\n".trim_end().to_owned()),
        "{lines:#?}"
    );
    assert!(lines.contains(&SUDOERS.to_owned()));
    assert_eq!(image.file("/etc/shadow").node.metadata.mode, 0o640);

    // Whoever has the user already gets no second one, and no second time changes anything.
    let twice = builder.build(&format!("{dockerfile}LABEL a=b\n"), &["--e2b-user"]);
    fs::write(builder.path("from"), "").unwrap();
    let layers = twice.layers().len();
    let saved = builder.build_as(&["-t", "base", "--e2b-user", "-f", "Dockerfile", "context"]);
    assert_eq!(saved.layers().len(), layers);
    let on_top = builder.build("FROM base\n", &["--e2b-user"]);
    assert_eq!(on_top.layers(), saved.layers(), "idempotent");
}

/// A base whose bash is busybox's shell; `None` where there is no busybox.
fn base(builder: &Builder) -> Option<()> {
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].iter().find(|path| fs::exists(path).unwrap());
    let Some(busybox) = busybox else {
        eprintln!("SKIPPED: no /bin/busybox; install busybox-static");
        return None;
    };
    fs::copy(busybox, builder.path("context/busybox")).unwrap();
    let dockerfile = "FROM scratch\nCOPY busybox /bin/busybox\nRUN [\"/bin/busybox\", \"--install\", \"-s\", \"/bin\"]\n\
        COPY --chmod=755 <<end /bin/bash\n#!/bin/sh\nexec /bin/sh \"\\$@\"\nend\n";
    fs::write(builder.path("Dockerfile"), dockerfile).unwrap();
    builder.build_as(&["-t", "base", "--e2b-user", "-f", "Dockerfile", "context"]);
    Some(())
}

#[test]
fn steps_are_built_as_a_dockerfile_is() {
    let Some(builder) = Builder::new("steps") else { return };
    if base(&builder).is_none() {
        return;
    }
    fs::create_dir_all(builder.path("files")).unwrap();
    fs::create_dir_all(builder.path("sent/src/sub")).unwrap();
    fs::write(builder.path("sent/src/a.txt"), "a").unwrap();
    fs::write(builder.path("sent/src/sub/b"), "b").unwrap();
    let hash = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    let archive = builder.path("files").join(format!("{hash}.tar.gz"));
    let mut tar = Command::new("tar");
    tar.args(["--owner=77", "--group=77", "--numeric-owner", "-C"]).arg(builder.path("sent"));
    assert!(tar.arg("-czf").arg(archive).arg("src").status().unwrap().success());
    let steps = |steps: serde_json::Value| {
        let request = json!({
            "fromTemplate": "base", "force": true, "startCmd": "sleep inf", "readyCmd": "true", "steps": steps,
        });
        fs::write(builder.path("steps.json"), request.to_string()).unwrap();
    };
    let copy = |dest: &str, user: &str, mode: &str| json!({"type": "COPY", "args": ["src/", dest, user, mode], "filesHash": hash, "force": false});
    steps(json!([
        copy("/srv/", "", ""),
        {"type": "COPY", "args": ["src/*.txt", "/glob/", "user:user", "0640"], "filesHash": hash},
        {"type": "ENV", "args": ["A", "it's $B"]},
        {"type": "WORKDIR", "args": ["/work"]},
        {"type": "USER", "args": ["user"]},
        {"type": "RUN", "args": ["echo \"$(id -un) $A $(pwd)\" > /tmp/said || echo \"$(id -un) $A $(pwd)\" > /home/user/said"]},
        {"type": "RUN", "args": ["id -u > /root-was-here", "root"]},
    ]));
    let options = ["--steps", "steps.json", "--files", "files", "--template-image", "base=base"];
    let image = builder.build_as(&options);
    let lines = image.lines();
    for line in [
        "/glob/a.txt f 640 1000:1000 a",
        "/srv/a.txt f 644 0:0 a",
        "/srv/sub/b f 644 0:0 b",
        "/home/user/said f 644 1000:1000 user it's $B /work\n".trim_end(),
        "/root-was-here f 644 0:0 0",
    ] {
        assert!(lines.contains(&line.to_owned()), "{line}: {lines:#?}");
    }
    let config = &image.config["config"];
    assert_eq!(config["User"], "user");
    assert_eq!(config["WorkingDir"], "/work");
    assert_eq!(config["Labels"], json!({"tiffin.start": "sleep inf", "tiffin.ready": "true"}));
    assert_eq!(builder.build_as(&options).layers(), image.layers());

    // Errors name the step.
    let fails = |value: serde_json::Value, options: &[&str], code: i32| {
        steps(value);
        let output = builder.command(options);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{stderr}");
        stderr
    };
    let user = || json!({"type": "USER", "args": ["root"]});
    for (value, options, code, said) in [
        (json!([user(), {"type": "CPOY", "args": []}]), &options[..], 2, "steps.json: step 2: "),
        (
            json!([user(), {"type": "RUN", "args": ["exit 3"]}]),
            &options,
            1,
            "steps.json: step 2: the command exited with code 3",
        ),
        (
            json!([user(), copy("/x/", "nobody-known", "")]),
            &options,
            2,
            "steps.json: step 2: user \"nobody-known\"",
        ),
        (json!([copy("/x/", "", "99999")]), &options, 2, "steps.json: step 1: "),
        (
            json!([{"type": "COPY", "args": ["a", "b"], "filesHash": "../../etc/passwd"}]),
            &options,
            2,
            "is no hash",
        ),
        (
            json!([user(), {"type": "COPY", "args": ["a", "b"], "filesHash": "abc"}]),
            &options,
            2,
            "steps.json: step 2: files abc: neither abc.tar.gz",
        ),
        (json!([copy("/x/", "", "")]), &options[..2], 2, "--template-image base=IMAGE"),
    ] {
        let stderr = fails(value, options, code);
        assert!(stderr.contains(said), "{said}: {stderr}");
    }
}

#[test]
fn a_template_is_made_with_the_user() {
    let Some(builder) = Builder::new("template-user") else { return };
    let debugfs = |question: &str| {
        let rootfs = builder.path("data/templates/box/rootfs.ext4");
        Command::new("debugfs").args(["-R", question]).arg(rootfs).output()
    };
    if debugfs("stats").is_err() {
        eprintln!("SKIPPED: no debugfs; install e2fsprogs");
        return;
    }
    builder.build("FROM scratch\nCOPY <<x /x\nx\n", &[]);
    let create = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_image-builder"));
        command
            .arg("--data-dir")
            .arg(builder.path("data"))
            .args(["template", "create", "box", "--image", "built"]);
        let output = command.args(["--e2b-user", "--snapshot", "never", "--json"]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let report = create();
    let said = |question: &str| String::from_utf8(debugfs(question).unwrap().stdout).unwrap();
    assert!(said("cat /etc/passwd").contains("user:x:1000:1000::/home/user:"), "{report}");
    assert!(said("stat /home/user").contains("User:  1000"));
    assert_eq!(said("cat /etc/sudoers.d/e2b-user"), "user ALL=(ALL:ALL) NOPASSWD: ALL\n");
}
