//! What the Dockerfile language does in builds and checks by the program itself, on one static busybox.
//!
//! Builds mount overlays and start containers, so they need root; `--check` needs nothing.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

const BASE: &str = "FROM scratch AS base\nCOPY busybox /bin/busybox\nRUN [\"/bin/busybox\", \"--install\", \"-s\", \"/bin\"]\n";

struct Case {
    dir: tempfile::TempDir,
}

impl Case {
    fn new() -> Self {
        // Not on /tmp, which may be a tmpfs without the attributes that overlayfs needs.
        let dir =
            tempfile::Builder::new().prefix("language-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        fs::create_dir(dir.path().join("context")).unwrap();
        Self { dir }
    }

    /// `None`, with the reason on stderr, where this machine cannot build.
    fn with_busybox() -> Option<Self> {
        let busybox = support::busybox()?;
        let case = Self::new();
        fs::copy(busybox, case.path("context/busybox")).unwrap();
        Some(case)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, contents: &str) {
        let path = self.path("context").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, contents).unwrap();
    }

    fn run(&self, options: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_image-builder"));
        command.arg("--data-dir").arg(self.path("data")).arg("build").args(options).arg(self.path("context"));
        command.output().unwrap()
    }

    /// The config of the image that the Dockerfile makes; its RUN steps are the assertions on its files.
    fn build(&self, name: &str, dockerfile: &str) -> Value {
        self.image(name, dockerfile)["config"].clone()
    }

    /// The same with what it runs on.
    fn image(&self, name: &str, dockerfile: &str) -> Value {
        self.write("Dockerfile", dockerfile);
        let output = self.run(&["--json", "-t", name]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let blob = |descriptor: &Value| -> Value {
            let digest = descriptor.as_str().unwrap().strip_prefix("sha256:").unwrap().to_owned();
            let path = self.path("data/images/blobs/sha256").join(digest);
            serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
        };
        blob(&blob(&report["digest"])["config"]["digest"])
    }
}

#[test]
fn heredocs_are_scripts_and_files() {
    let Some(case) = Case::with_busybox() else { return };
    case.build(
        "heredocs",
        &format!(
            r#"{BASE}ARG v=value
RUN <<EOF
set -e
echo "one $v" > /one
test ! -e /dev/pipes
EOF
RUN <<EOF
#!/bin/awk -f
BEGIN {{ print "two" > "/two" }}
EOF
RUN cat > /three <<-EOF
	three
	EOF
COPY <<expanded.txt <<'literal.txt' /files/
$v
expanded.txt
$v
literal.txt
RUN test "$(cat /one)" = "one value" && test "$(cat /two)" = two && test "$(cat /three)" = three
RUN test "$(cat /files/expanded.txt)" = value && test "$(cat /files/literal.txt)" = '$v' && test ! -e /dev/pipes
"#
        ),
    );
}

#[test]
fn copies_keep_parents_leave_out_and_change_modes() {
    let Some(case) = Case::with_busybox() else { return };
    for file in ["src/a.c", "src/a.md", "src/deep/b.c", "docs/c.md"] {
        case.write(file, file);
    }
    case.build(
        "copies",
        &format!(
            "{BASE}COPY --from=later --chmod=u=rwx,go= /made /made\n\
             COPY --parents **/*.c docs/c.md /parents/\n\
             COPY --exclude=*.md --exclude=deep src /exclude/\n\
             ADD --chmod=a=r,u+w src/a.c /added\n\
             RUN test -f /parents/src/deep/b.c && test -f /parents/src/a.c && test -f /parents/docs/c.md\n\
             RUN test ! -e /parents/src/a.md && test -f /exclude/a.c && test ! -e /exclude/a.md && test ! -e /exclude/deep\n\
             RUN test \"$(stat -c %a /made /added | tr '\\n' ' ')\" = '700 644 '\n\
             FROM scratch AS later\nCOPY src/a.c /made\nFROM base\n"
        ),
    );
}

#[test]
fn settings_and_triggers_end_in_the_config() {
    let Some(case) = Case::with_busybox() else { return };
    let parent = case.build(
        "parent",
        &format!(
            "{BASE}ARG v=inherited\nHEALTHCHECK --interval=5s CMD [\"true\"]\nSTOPSIGNAL SIGINT\n\
             ONBUILD ARG who=nobody\nONBUILD RUN echo \"$who\" > /built-for\n\
             FROM base AS child\nLABEL v=$v\n"
        ),
    );
    // The child's stage carries the triggers out, and does not hand them on.
    assert_eq!(parent["Labels"], json!({"v": "inherited"}));
    assert_eq!(parent["Healthcheck"], json!({"Test": ["CMD", "true"], "Interval": 5_000_000_000u64}));
    assert_eq!((&parent["StopSignal"], &parent["OnBuild"]), (&json!("SIGINT"), &Value::Null));
    let triggers = case.build("triggers", &format!("{BASE}ONBUILD RUN echo me > /built-for\n"));
    assert_eq!(triggers["OnBuild"], json!(["RUN echo me > /built-for"]));
    let child = case.build("child", "FROM triggers\nRUN test \"$(cat /built-for)\" = me\n");
    assert_eq!(child["OnBuild"], Value::Null);
}

#[test]
fn what_is_not_carried_out_yet_is_named_with_its_place() {
    let Some(case) = Case::with_busybox() else { return };
    for (instruction, said) in [
        ("RUN --mount=type=ssh true", "Dockerfile:4:13: RUN --mount=type=ssh is not supported yet"),
        ("RUN --security=insecure true", "Dockerfile:4:1: RUN --security=insecure is not supported yet"),
        ("ADD git@example.com:a/b.git /x", "Dockerfile:4:5: ADD of a git repository is not supported yet"),
    ] {
        case.write("Dockerfile", &format!("{BASE}{instruction}\n"));
        let output = case.run(&["-t", "x"]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains(said), "{stderr}");
    }
}

#[test]
fn a_check_builds_nothing_and_tells_rules_and_places() {
    let case = Case::new();
    let check = |dockerfile: &str, options: &[&str]| {
        case.write("Dockerfile", dockerfile);
        let output = case.run(&[&["--check"], options].concat());
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
    };
    let (code, stdout, stderr) = check("FROM debian AS build\nCMD [\"a\"]\n", &[]);
    assert_eq!((code, stderr.as_str()), (0, ""));
    assert!(stdout.ends_with("Dockerfile: 0 warnings\n"), "{stdout}");

    let doubtful = "FROM debian AS Build\nWORKDIR src\nCOPY left-out /x\nCMD a\n";
    case.write(".dockerignore", "left-*\n");
    let (code, stdout, _) = check(doubtful, &[]);
    assert_eq!(code, 0);
    for line in
        ["Dockerfile:1:16: StageNameCasing:", "Dockerfile:2:1: WorkdirRelativePath:", "    WORKDIR src\n"]
    {
        assert!(stdout.contains(line), "{stdout}");
    }
    let (code, stdout, _) = check(doubtful, &["--json"]);
    let report: Value = serde_json::from_str(&stdout).unwrap();
    let rules: Vec<_> = report["warnings"]
        .as_array()
        .unwrap()
        .iter()
        .map(|warning| warning["rule"].as_str().unwrap())
        .collect();
    let expected = ["StageNameCasing", "WorkdirRelativePath", "CopyIgnoredFile", "JSONArgsRecommended"];
    assert_eq!((code, rules.as_slice()), (0, expected.as_slice()));
    assert_eq!(report["warnings"][1]["line"], json!(2));

    let strict = format!("# check=skip=StageNameCasing,CopyIgnoredFile;error=true\n{doubtful}");
    let (code, stdout, stderr) = check(&strict, &[]);
    assert_eq!(code, 2);
    assert!(
        stdout.contains("Dockerfile: 2 warnings") && stderr.contains("check=error=true"),
        "{stdout}{stderr}"
    );
    let (code, stdout, stderr) = check("FROM debian\nRUNN x\n", &[]);
    assert_eq!((code, stdout.as_str()), (2, ""));
    assert!(stderr.contains("Dockerfile:2:1: unknown instruction \"RUNN\"; did you mean RUN?"), "{stderr}");
    let (code, _, stderr) = check("FROM debian AS build\n", &["--target", "biuld"]);
    assert_eq!(code, 2);
    assert!(stderr.contains("did you mean build?"), "{stderr}");
    assert!(!case.path("data").exists(), "a check leaves no store behind");
}

#[test]
fn e2b_dockerfile_is_found_by_itself() {
    let case = Case::new();
    case.write("e2b.Dockerfile", "FROM debian\nWORKDIR src\n");
    let output = case.run(&["--check"]);
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(stdout.contains("e2b.Dockerfile:2:1: WorkdirRelativePath"), "{stdout}");
    case.write("Dockerfile", "FROM debian\n");
    let output = case.run(&["--check"]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("Dockerfile: 0 warnings"));
}

#[test]
fn a_stage_is_built_for_the_platform_that_it_names() {
    let Some(case) = Case::with_busybox() else { return };
    case.write("only-arm", "arm\n");
    case.write("only-amd", "amd\n");
    let dockerfile =
        |platform: &str, file: &str| format!("FROM --platform={platform} scratch\nCOPY {file} /here\n");
    case.build("arm", &dockerfile("linux/arm64/v8", "only-arm"));
    let amd = case.image("amd", &dockerfile("linux/amd64", "only-amd"));
    assert_eq!((&amd["architecture"], &amd["variant"]), (&json!("amd64"), &Value::Null));
    let arm = case.image("onarm", "FROM --platform=linux/arm64 arm\nLABEL a=b\n");
    assert_eq!((&arm["architecture"], &arm["variant"]), (&json!("arm64"), &json!("v8")));
    assert_eq!(arm["config"]["Labels"], json!({"a": "b"}));

    // A layout with an index of both, as registries have them.
    let layout = case.path("both");
    for name in ["arm", "amd"] {
        let mut save = Command::new(env!("CARGO_BIN_EXE_image-builder"));
        save.arg("--data-dir").arg(case.path("data")).args(["save", name, "-o"]);
        let output = save.arg(format!("oci:{}:{name}", layout.display())).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let read = |path: &Path| -> Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
    let mut index = read(&layout.join("index.json"));
    for manifest in index["manifests"].as_array_mut().unwrap() {
        let architecture =
            if manifest["annotations"].to_string().contains("arm") { "arm64" } else { "amd64" };
        manifest["platform"] = json!({"os": "linux", "architecture": architecture});
        manifest.as_object_mut().unwrap().remove("annotations");
    }
    index["mediaType"] = json!("application/vnd.oci.image.index.v1+json");
    let text = serde_json::to_vec(&index).unwrap();
    let digest = oci::Hasher::digest_of(&text);
    fs::write(layout.join("blobs/sha256").join(digest.digest()), &text).unwrap();
    let top = json!({"schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.index.v1+json", "digest": digest, "size": text.len(),
        "annotations": {"org.opencontainers.image.ref.name": "both"},
    }]});
    fs::write(layout.join("index.json"), serde_json::to_vec(&top).unwrap()).unwrap();
    for (platform, expected) in [("linux/arm64", "arm64"), ("$BUILDPLATFORM", "amd64")] {
        let image =
            case.image("chosen", &format!("FROM --platform={platform} oci:{}:both\n", layout.display()));
        assert_eq!(image["architecture"], expected);
    }

    for (platform, image, said) in [
        ("linux/riscv64", format!("oci:{}:both", layout.display()), "an image for linux/riscv64"),
        (
            "windows/amd64",
            "scratch".to_owned(),
            "Dockerfile:1:17: FROM --platform=windows/amd64 is not supported yet",
        ),
        ("a/b/c/d", "scratch".to_owned(), "Dockerfile:1:17: FROM --platform"),
    ] {
        case.write("Dockerfile", &format!("FROM --platform={platform} {image}\n"));
        let output = case.run(&["-t", "x"]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && stderr.contains(said), "{stderr}");
    }
}
