//! Paths that sit on the scratch disk itself.

use e2e::{Channel, TestSandbox};

#[tokio::test]
async fn volumes_are_on_the_disk_and_begin_with_the_images_content() {
    for profile in ["sandbox", "restricted"] {
        let sandbox = TestSandbox::of(Channel::Serial).set("profile", profile).start().await;
        for path in ["/data", "/var/lib/docker"] {
            let kind = sandbox.stdout(&format!("awk '$2 == \"{path}\" {{print $3}}' /proc/mounts")).await;
            assert_eq!(kind, "ext4\n", "{path}");
        }
        let script =
            "cat /data/deep/file; stat -c '%a %u %g' /data /data/deep/file; stat -c '%a %u' /var/lib/docker";
        assert_eq!(sandbox.stdout(script).await, "seed\n755 1000 1000\n640 1000 1000\n755 0\n");
        sandbox.stdout("echo mine > /data/deep/file").await;
        sandbox.stop().await;
    }
}

#[tokio::test]
async fn an_overlay_can_be_mounted_in_a_container_engines_folder() {
    let sandbox = TestSandbox::start(Channel::Serial).await;
    let script = "cd /var/lib/docker && mkdir lower upper work merged && echo below > lower/file && \
                  mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged && \
                  echo above > merged/file && cat lower/file upper/file";
    assert_eq!(sandbox.stdout(script).await, "below\nabove\n");
    // The same elsewhere is what the kernel refuses, or the volume would have no reason.
    let elsewhere = script.replace("/var/lib/docker", "/root");
    assert_ne!(sandbox.sh(&elsewhere).await.exit.code(), 0);
    sandbox.stop().await;
}
