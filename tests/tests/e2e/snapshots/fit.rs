//! A snapshot that does not fit, or is damaged: both values are said, and the sandbox boots where it may.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::{TestData, TestSandbox, TestSandboxBuilder};
use serde_json::{Value, json};

/// A digest that nothing has.
const NOTHING: &str = "sha256:00000000000000000000000000000000000000000000000000000000000000aa";

/// A template whose snapshot can be damaged, and be whole again.
struct Damaged {
    data: TestData,
    snapshot: PathBuf,
    whole: PathBuf,
}

impl Damaged {
    fn new() -> Self {
        let data = TestData::warmed("e2e");
        let snapshot = data.snapshot("e2e");
        let whole = data.path().join("whole");
        fs::rename(&snapshot, &whole).unwrap();
        Self { data, snapshot, whole }
    }

    /// A copy of the whole snapshot takes the place of what was there.
    fn make_whole(&self) {
        let _ = fs::remove_dir_all(&self.snapshot);
        let copy =
            Command::new("cp").args(["-a", "--sparse=always"]).arg(&self.whole).arg(&self.snapshot).status();
        assert!(copy.unwrap().success());
    }

    fn manifest(&self, change: impl FnOnce(&mut Value)) {
        TestData::edit(&self.snapshot.join("manifest.json"), change);
    }

    fn sandbox(&self) -> TestSandboxBuilder {
        TestSandbox::clone_of(&self.data, "e2e")
    }
}

/// Changes one byte of what the file holds.
fn flip(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    let file = File::options().read(true).write(true).open(path).unwrap();
    let middle =
        rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(file.metadata().unwrap().len() / 4)).unwrap() + 77;
    let mut byte = [0];
    file.read_exact_at(&mut byte, middle).unwrap();
    file.write_all_at(&[!byte[0]], middle).unwrap();
}

async fn refusal(builder: TestSandboxBuilder) -> String {
    match builder.try_start().await {
        Ok(_) => panic!("it was restored"),
        Err(said) => said,
    }
}

/// It boots although it could have been restored, and says why: here, and to whoever looks at its standard error.
async fn boots(builder: TestSandboxBuilder, why: &[&str]) {
    let sandbox = builder.set("restore", "auto").start().await;
    let state = sandbox.state();
    assert_eq!((&state["start"], &state["phase"]), (&json!("booted"), &json!("running")));
    let because = state["booted_because"].as_str().expect("the reason").to_owned();
    assert_eq!(sandbox.stdout("echo alive").await, "alive\n");
    let (status, said) = sandbox.stop().await;
    assert!(status.success(), "{said}");
    for why in why {
        assert!(because.contains(why), "{because}");
        assert!(said.contains(why), "{said}");
    }
}

#[tokio::test]
async fn a_machine_that_does_not_fit_says_both_values_and_boots() {
    let lab = Damaged::new();
    lab.make_whole();
    for (field, value, says) in [
        ("cpus", json!(2), "the snapshot was made with --cpus 1, the sandbox asks for 2"),
        (
            "memory_mib",
            json!(320),
            "the snapshot was made with --memory 256 MiB, the sandbox asks for 320 MiB",
        ),
        ("disk_mib", json!(128), "the snapshot was made with --disk 256 MiB, the sandbox asks for 128 MiB"),
        ("profile", json!("restricted"), "made with --profile sandbox, the sandbox asks for restricted"),
        ("init", json!("image"), "made with --init envd, the sandbox asks for image"),
        ("channel", json!("vhost-user-vsock"), "a sandbox with a vsock device cannot be restored"),
    ] {
        let said = refusal(lab.sandbox().set(field, value.clone())).await;
        assert!(said.contains(says) && said.contains("host-shim template warm"), "{field}: {said}");
        if ["cpus", "memory_mib", "channel"].contains(&field) {
            boots(lab.sandbox().set(field, value), &[says]).await;
        }
    }
    // A sandbox that asks for none of this is restored still.
    let sandbox = lab.sandbox().start().await;
    assert_eq!(sandbox.state()["booted_because"], Value::Null);
    sandbox.stop().await;
}

#[tokio::test]
async fn a_snapshot_of_another_host_says_both_values_and_boots() {
    let lab = Damaged::new();
    let text = fs::read(lab.whole.join("manifest.json")).unwrap();
    let whole: Value = serde_json::from_slice(&text).unwrap();
    for (part, field, value, says) in [
        ("key", "vmm_version", "1.2.3", "the snapshot was made with QEMU 1.2.3, this host has"),
        ("key", "vmm", "Firecracker", "made with VMM Firecracker, this host has QEMU"),
        ("key", "accelerator", "kvm", "made with accelerator kvm, this host has tcg"),
        ("key", "cpu", NOTHING, "made with CPU sha256:0000"),
        ("guest", "kernel", NOTHING, "made with guest kernel sha256:0000"),
        ("guest", "guest_image", NOTHING, "made with guest image sha256:0000"),
        ("guest", "rootfs", NOTHING, "made with rootfs sha256:0000"),
    ] {
        lab.make_whole();
        lab.manifest(|manifest| manifest[part][field] = json!(value));
        let said = refusal(lab.sandbox()).await;
        let ours = whole[part][field].as_str().unwrap();
        assert!(said.contains(says) && said.contains(ours), "{field}: {said}");
        if field == "vmm_version" {
            boots(lab.sandbox(), &[says, ours]).await;
        }
    }
    // One that was made by another QEMU has another name, and is found all the same.
    lab.make_whole();
    lab.manifest(|manifest| manifest["key"]["vmm_version"] = json!("1.2.3"));
    fs::rename(&lab.snapshot, lab.snapshot.with_file_name("qemu-1.2.3-tcg-0")).unwrap();
    let said = refusal(lab.sandbox()).await;
    assert!(said.contains("made with QEMU 1.2.3, this host has"), "{said}");
    fs::remove_dir_all(lab.snapshot.with_file_name("qemu-1.2.3-tcg-0")).unwrap();
    let said = refusal(lab.sandbox()).await;
    assert!(said.contains("the template has no snapshot; `host-shim template warm` makes one"), "{said}");
}

#[tokio::test]
async fn a_damaged_snapshot_is_not_used() {
    let lab = Damaged::new();
    for (name, damage, says) in [
        ("ram", flip as fn(&Path), "expected"),
        ("state", flip, "expected sha256:"),
        ("scratch.ext4", flip, "expected"),
        ("ram", |path| truncate(path, 4096), "it has 4096 bytes, expected 268435456"),
        ("scratch.ext4", |path| truncate(path, 5), "it has 5 bytes, expected"),
        ("state", |path| truncate(path, 0), "it has 0 bytes, expected"),
        ("state", |path| fs::remove_file(path).unwrap(), "it is missing"),
        ("ram", |path| fs::remove_file(path).unwrap(), "it is missing"),
        ("manifest.json", |path| truncate(path, 100), "EOF while parsing"),
        ("manifest.json", |path| fs::write(path, r#"{"schema_version": 99}"#).unwrap(), "schema version 99"),
    ] {
        lab.make_whole();
        damage(&lab.snapshot.join(name));
        let said = refusal(lab.sandbox()).await;
        assert!(said.contains(says) && said.contains(&format!("/{name}")), "{name}: {said}");
        assert!(said.contains("template warm"), "{said}");
        if says == "it is missing" && name == "state" {
            boots(lab.sandbox(), &[says]).await;
        }
    }
    lab.make_whole();
    flip(&lab.snapshot.join("ram"));
    boots(lab.sandbox(), &["/ram", "make the snapshot again"]).await;
    // A new one takes its place.
    lab.data.warm("e2e");
    lab.sandbox().start().await.stop().await;
    assert_eq!(lab.data.snapshot("e2e"), lab.snapshot);
}

fn truncate(path: &Path, length: u64) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    File::options().write(true).open(path).unwrap().set_len(length).unwrap();
}
