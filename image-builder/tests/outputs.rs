//! What a build leaves besides a name: archives, file systems, templates, digests; and the example jobs that use it.

#[path = "support/project.rs"]
mod project;
mod support;

use std::fs;
use std::path::Path;
use std::process::Command;

use project::{BASE, Project, failure, json};

/// The output of a program that is an oracle; `None`, with the reason on stderr, where it is not installed.
#[track_caller]
fn tool(program: &str, arguments: &[&str]) -> Option<String> {
    match Command::new(program).args(arguments).output() {
        Ok(output) => {
            assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
            Some(String::from_utf8(output.stdout).unwrap())
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("SKIPPED: {program} is not installed");
            None
        }
        Err(error) => panic!("{program}: {error}"),
    }
}

#[test]
fn one_command_makes_every_artifact() {
    let Some(test) = Project::new() else { return };
    let path = |name: &str| test.path(name).display().to_string();
    let (layout, archive, rootfs) = (path("layout"), path("image.tar"), path("rootfs.ext4"));
    let dockerfile = format!("{BASE}RUN echo hello > /hello\nLABEL from=file kept=yes\nCMD [\"sh\"]\n");
    // Without a name.
    let report = json(&test.output(
        &dockerfile,
        &[
            "--output",
            &format!("type=oci,dest={layout},tag=v1"),
            "-o",
            &format!("type=oci,dest={archive}"),
            "-o",
            &format!("type=rootfs,dest={rootfs}"),
            "-o",
            "type=template,name=made,cpus=2,memory=256,disk=64,snapshot=never,start=sleep 1",
            "--metadata-file",
            &path("meta.json"),
            "--iidfile",
            &path("id"),
            "--label",
            "from=option",
            "--annotation",
            "org.opencontainers.image.title=an app",
        ],
    ));
    let digest = report["digest"].as_str().unwrap();
    assert_eq!(report["names"], serde_json::json!([]));
    let kinds: Vec<_> = report["outputs"].as_array().unwrap().iter().map(|output| &output["type"]).collect();
    assert_eq!(kinds, ["oci", "oci", "rootfs", "template"]);
    assert_eq!(json(&test.run(&["images", "--json"])), serde_json::json!([]));

    let manifest = test.blob_json("data", digest);
    assert_eq!(manifest["annotations"]["org.opencontainers.image.title"], "an app");
    let config_digest = manifest["config"]["digest"].as_str().unwrap();
    let labels = &test.blob_json("data", config_digest)["config"]["Labels"];
    assert_eq!(*labels, serde_json::json!({"from": "option", "kept": "yes"}));
    let metadata: serde_json::Value =
        serde_json::from_slice(&fs::read(test.path("meta.json")).unwrap()).unwrap();
    assert_eq!(metadata["containerimage.digest"], digest);
    assert_eq!(metadata["containerimage.config.digest"], config_digest);
    assert_eq!(metadata["containerimage.descriptor"]["digest"], digest);
    assert_eq!(
        metadata["containerimage.descriptor"]["size"],
        fs::metadata(test.blob("data", digest)).unwrap().len()
    );
    assert!(metadata.get("image.name").is_none());
    assert_eq!(fs::read_to_string(test.path("id")).unwrap(), config_digest);

    let template = json(&test.run(&["template", "inspect", "made"]));
    assert_eq!(template["image"]["digest"], digest);
    assert_eq!(template["machine"], serde_json::json!({"cpus": 2, "memory_mib": 256, "disk_mib": 64}));
    assert_eq!(template["runtime"]["start_command"], "sleep 1");

    if let Some(text) = tool("debugfs", &["-R", "cat /hello", &rootfs]) {
        assert_eq!(text, "hello\n");
    }
    tool("e2fsck", &["-fn", &rootfs]);
    for image in [format!("oci:{layout}:v1"), format!("oci-archive:{archive}:latest")] {
        let Some(text) = tool("skopeo", &["inspect", &image]) else { continue };
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap()["Digest"], digest, "{image}");
    }

    // With names, and from the cache.
    let options = [
        "-t",
        "a:1",
        "-t",
        "b",
        "--metadata-file",
        &path("meta.json"),
        "--output",
        &format!("type=oci,dest={archive}"),
    ];
    json(&test.output(&dockerfile, &options));
    let metadata: serde_json::Value =
        serde_json::from_slice(&fs::read(test.path("meta.json")).unwrap()).unwrap();
    assert_eq!(metadata["image.name"], "docker.io/library/a:1,docker.io/library/b:latest");
    if let Some(text) = tool("skopeo", &["inspect", &format!("oci-archive:{archive}:1")]) {
        assert!(text.contains("Digest"), "the tag is that of the first name");
    }
}

#[test]
fn outputs_that_make_no_sense_are_refused_before_anything_is_built() {
    let Some(test) = Project::new() else { return };
    for (options, reason) in [
        (&[][..], "--tag"),
        (&["--output", "type=docker,dest=x"][..], "type=docker: expected oci, rootfs or template"),
        (&["--output", "type=oci"][..], "dest=PATH is missing"),
        (&["-t", "x", "--label", "novalue"][..], "expected NAME=VALUE"),
        (&["-t", "x", "--jobs", "0"][..], "0 is not in"),
    ] {
        let stderr = failure(&test.output(BASE, options), 2);
        assert!(stderr.contains(reason), "{options:?}: {stderr}");
    }
    assert!(!test.path("data/images").exists());
    let nowhere = format!("type=oci,dest={}/no/such/folder/x.tar", test.path("").display());
    let stderr = failure(&test.output(BASE, &["--output", &nowhere]), 1);
    assert!(stderr.contains("no/such/folder"), "{stderr}");
}

/// The shell commands of an example job: what stands behind `run: |`, and in the list of `script:`.
fn commands(yaml: &str) -> String {
    let indent = |line: &str| line.len() - line.trim_start().len();
    let mut commands = String::new();
    let mut lines = yaml.lines().peekable();
    while let Some(line) = lines.next() {
        let trimmed = line.trim();
        if trimmed == "run: |" || trimmed == "- |" {
            while let Some(next) = lines.next_if(|next| next.trim().is_empty() || indent(next) > indent(line))
            {
                commands.push_str(next.trim_start());
                commands.push('\n');
            }
        } else if trimmed == "script:" {
            while let Some(next) = lines.next_if(|next| next.trim().starts_with("- ") && next.trim() != "- |")
            {
                commands.push_str(next.trim().trim_start_matches("- "));
                commands.push('\n');
            }
            continue;
        } else if let Some(command) =
            trimmed.strip_prefix("- ").filter(|text| text.starts_with("image-builder "))
        {
            // Behind a block of the same list.
            commands.push_str(command);
            commands.push('\n');
        }
    }
    commands
}

#[test]
fn the_example_jobs_run() {
    let Some(test) = Project::new() else { return };
    test.write("Dockerfile", &format!("{BASE}COPY Dockerfile /d\nCMD [\"sh\"]\n"));
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/ci");
    // What the job has besides: sudo, a repository, and a registry that takes everything.
    let bin = test.path("bin");
    fs::create_dir(&bin).unwrap();
    let script = |name: &str, text: &str| {
        use std::os::unix::fs::PermissionsExt;
        fs::write(bin.join(name), format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(bin.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    };
    script("sudo", "[ \"$1\" = -E ] && shift; exec \"$@\"");
    script("git", "echo 1700000000");
    script(
        "skopeo",
        "echo \"$@\" >> \"$PUSHED\"; for image; do case $image in oci-archive:*) test -s \"${image#oci-archive:}\";; esac; done",
    );
    script("image-builder", &format!("exec {} \"$@\"", env!("CARGO_BIN_EXE_image-builder")));
    for name in ["github.yml", "gitlab.yml"] {
        let yaml = fs::read_to_string(examples.join(name)).unwrap();
        // What the CI system puts in its place before a shell sees it.
        let text = commands(&yaml)
            .replace("${{ github.actor }}", "ada")
            .replace("${{ secrets.GITHUB_TOKEN }}", "token");
        assert!(!text.contains("${{"), "{text}");
        assert!(
            text.matches("image-builder ").count() >= 3 && text.contains("skopeo copy"),
            "{name}: {text}"
        );
        let work = test.path(name);
        fs::create_dir(&work).unwrap();
        for file in ["Dockerfile", "busybox"] {
            fs::copy(test.path("context").join(file), work.join(file)).unwrap();
        }
        for round in ["first", "second"] {
            let output = Command::new("bash")
                .args(["-euo", "pipefail", "-c", &text])
                .current_dir(&work)
                .env("PATH", format!("{}:{}", bin.display(), std::env::var("PATH").unwrap()))
                .env("XDG_DATA_HOME", test.path(&format!("{name}-{round}")))
                .env("PUSHED", work.join("pushed"))
                .env("IMAGE", "registry.example/team/app:abc")
                .env("GITHUB_SHA", "abc")
                .env("CI_COMMIT_SHA", "abc")
                .env("CI_REGISTRY_USER", "ada")
                .env("CI_REGISTRY_PASSWORD", "token")
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{name}: {said}{}", String::from_utf8_lossy(&output.stdout));
            // Another machine, with what the first one kept.
            assert_eq!(said.contains("(cached)"), round == "second", "{name}: {said}");
        }
        let pushed = fs::read_to_string(work.join("pushed")).unwrap();
        assert!(pushed.contains("oci-archive:image.tar docker://registry.example/team/app:abc"), "{pushed}");
        let metadata: serde_json::Value =
            serde_json::from_slice(&fs::read(work.join("image.json")).unwrap()).unwrap();
        assert_eq!(metadata["image.name"], "registry.example/team/app:abc");
    }
}
