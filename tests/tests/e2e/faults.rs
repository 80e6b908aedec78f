//! What goes wrong gives one clear error before a deadline, never a hang.

use std::fs;
use std::path::PathBuf;

use e2e::{Channel, TestSandbox, made, template};

/// A copy of the template, to be damaged.
fn copy_of_template(folder: &tempfile::TempDir) -> PathBuf {
    let copy = folder.path().join("damaged");
    fs::create_dir(&copy).unwrap();
    for name in ["template.json", "rootfs.ext4"] {
        fs::copy(template().join(name), copy.join(name)).unwrap();
        let mut permissions = fs::metadata(copy.join(name)).unwrap().permissions();
        #[expect(clippy::permissions_set_readonly_false, reason = "the copy is the test's own")]
        permissions.set_readonly(false);
        fs::set_permissions(copy.join(name), permissions).unwrap();
    }
    copy
}

async fn failure(builder: e2e::TestSandboxBuilder) -> String {
    match builder.try_start().await {
        Ok(_) => panic!("the sandbox started"),
        Err(said) => said,
    }
}

#[tokio::test]
async fn a_missing_init_is_told_in_the_kernels_words() {
    let folder = tempfile::tempdir().unwrap();
    // A cpio archive that holds nothing but its trailer.
    let image = folder.path().join("empty.cpio");
    let trailer = "TRAILER!!!\0";
    fs::write(
        &image,
        format!("070701{}{:08x}{}{trailer}\0\0\0", "0".repeat(88), trailer.len(), "0".repeat(8)),
    )
    .unwrap();
    for channel in Channel::ALL {
        let said = failure(TestSandbox::of(channel).set("guest_image", image.to_str().unwrap())).await;
        assert!(
            said.contains("Kernel panic") || said.contains("VFS: Unable to mount root fs"),
            "{channel:?}: {said}"
        );
    }
}

#[tokio::test]
async fn a_truncated_rootfs_is_refused_before_the_boot() {
    let folder = tempfile::tempdir().unwrap();
    let copy = copy_of_template(&folder);
    let rootfs = fs::OpenOptions::new().write(true).open(copy.join("rootfs.ext4")).unwrap();
    rootfs.set_len(4096).unwrap();
    let said = failure(TestSandbox::of(Channel::Serial).set("template", copy.to_str().unwrap())).await;
    assert!(said.contains("rootfs.ext4 has 4096 bytes, expected"), "{said}");
}

#[tokio::test]
async fn a_rootfs_that_is_no_file_system_is_told_by_the_agent() {
    let folder = tempfile::tempdir().unwrap();
    for channel in Channel::ALL {
        let copy = copy_of_template(&folder);
        let length = fs::metadata(copy.join("rootfs.ext4")).unwrap().len();
        fs::write(copy.join("rootfs.ext4"), vec![0; usize::try_from(length).unwrap()]).unwrap();
        let said = failure(TestSandbox::of(channel).set("template", copy.to_str().unwrap())).await;
        assert!(said.contains("rootfs") && said.contains("mounting ext4"), "{channel:?}: {said}");
        fs::remove_dir_all(copy).unwrap();
    }
}

#[tokio::test]
async fn a_kernel_that_is_none_ends_in_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("vmlinux");
    fs::write(&kernel, "not a kernel").unwrap();
    let said = failure(TestSandbox::of(Channel::Serial).set("kernel", kernel.to_str().unwrap())).await;
    assert!(said.contains("vmlinux") || said.to_lowercase().contains("kernel"), "{said}");
}

#[tokio::test]
async fn a_panic_of_the_kernel_ends_the_sandbox_with_its_words() {
    for channel in Channel::ALL {
        let sandbox = TestSandbox::start(channel).await;
        let client = sandbox.client();
        // The answer never comes: the connection dies with the machine.
        let crash = client.output("/bin/sh", ["-c", "echo 2 > /proc/sys/vm/panic_on_oom; tail /dev/zero"]);
        let _ = tokio::time::timeout(e2e::DEADLINE, crash).await.expect("the call ends with the machine");
        let dir = sandbox.dir();
        let (status, said) = sandbox.ended().await;
        assert!(!status.success(), "{channel:?}: {said}");
        assert!(said.contains("panic"), "{channel:?}: {said}");
        assert!(TestSandbox::processes_of(&dir).is_empty());
    }
}

#[tokio::test]
async fn a_killed_vmm_ends_the_sandbox_with_an_error() {
    for channel in Channel::ALL {
        let sandbox = TestSandbox::start(channel).await;
        let client = sandbox.client();
        let waiting = tokio::spawn(async move { client.output("/bin/sleep", ["1000"]).await });
        while sandbox.client().processes().await.unwrap().is_empty() {}
        rustix::process::kill_process(sandbox.vmm(), rustix::process::Signal::KILL).unwrap();
        let call = tokio::time::timeout(e2e::DEADLINE, waiting).await.expect("the call ends with the VMM");
        assert!(call.unwrap().is_err());
        let (status, said) = sandbox.ended().await;
        assert!(!status.success(), "{channel:?}: {said}");
        assert!(said.contains("killed") || said.contains("signal"), "{channel:?}: {said}");
    }
}

#[tokio::test]
async fn an_agent_that_never_speaks_meets_the_boot_deadline() {
    let folder = tempfile::tempdir().unwrap();
    // A kernel that boots, and an init that is no agent: it waits for ever.
    let init = folder.path().join("init");
    fs::copy("/bin/busybox", &init).unwrap();
    let image = folder.path().join("silent.cpio");
    rootfs_tools::guest_image(&init, &image).unwrap();
    let builder =
        TestSandbox::of(Channel::Serial).set("guest_image", image.to_str().unwrap()).set("boot_timeout_s", 5);
    let said = failure(builder).await;
    assert!(said.contains('5') || said.contains("panic"), "{said}");
    assert!(made("TIFFIN_KERNEL").exists());
}
