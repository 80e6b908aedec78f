//! Files where it takes a real container: its root is the only one, and a mount that hangs.

use e2e::{Channel, DEADLINE, TestSandbox};
use envd_proto::filesystem::{StatRequest, StatResponse};

/// Every way out that a path could have ends in the container.
#[tokio::test]
async fn no_path_leads_to_the_guest_below() {
    let sandbox = TestSandbox::start(Channel::Serial).await;
    let client = sandbox.client();
    sandbox
        .stdout(
            "echo container >/etc/mark; mkdir -p /root/in /root/bound; \
             ln -s /proc/1/root /root/init; ln -s /proc/self/root /root/self; ln -s ../../../../.. /root/up; \
             mount --bind / /root/bound",
        )
        .await;
    let roots = ["", "/..", "/root/init", "/root/up", "/root/bound", "/proc/1/root", "/proc/1/cwd/../../.."];
    for root in roots {
        let mark = client.read_file(&format!("{root}/etc/mark")).await;
        assert_eq!(mark.as_deref().ok(), Some(&b"container\n"[..]), "{root}");
        // What the guest has at its root, and a container has not.
        for below in ["disk", "disk/scratch", "box", "run/containers", "init"] {
            assert!(client.stat(&format!("{root}/{below}")).await.is_err(), "{root}/{below}");
        }
    }
    // No thread of the agent is a process of the container, so that none has a /proc/self there.
    for magic in ["/proc/self/root", "/root/self", "/proc/thread-self/root"] {
        for below in ["disk", "box"] {
            assert!(client.stat(&format!("{magic}/{below}")).await.is_err(), "{magic}/{below}");
        }
    }
    // A write through such a path lands in the container, too.
    client.write_file("/root/init/root/in/file", "x").await.unwrap();
    assert_eq!(sandbox.stdout("cat /root/in/file").await, "x");
    assert!(client.remove("/root/bound").await.unwrap_err().to_string().contains("mounted"));
    assert_eq!(sandbox.stdout("cat /etc/mark").await, "container\n");
    sandbox.stop().await;
}

/// A FUSE mount whose server never answers: calls into it end by their own deadline, the others do not notice.
#[tokio::test]
async fn a_mount_that_hangs_stalls_nothing_else() {
    let sandbox = TestSandbox::start(Channel::Serial).await;
    let made = sandbox
        .sh("mkdir -p /root/hung && [ -e /dev/fuse ] || mknod /dev/fuse c 10 229; \
             (exec 3<>/dev/fuse && mount -i -t fuse -o fd=3,rootmode=40000,user_id=0,group_id=0 hang /root/hung && \
              exec sleep 1000) >/dev/null 2>&1 & while kill -0 $! && ! grep -q hung /proc/mounts; do sleep 0.1; done; grep -q hung /proc/mounts")
        .await;
    if made.exit.code() != 0 {
        eprintln!(
            "skipped: this kernel or image cannot mount FUSE: {}",
            String::from_utf8_lossy(&made.stderr)
        );
        return;
    }
    let client = sandbox.client();
    let calls: Vec<_> = (0..100)
        .map(|_| {
            let client = sandbox.client();
            tokio::spawn(async move {
                let stat = StatRequest { path: "/root/hung/x".into(), ..StatRequest::default() };
                client.unary::<_, StatResponse>("filesystem.Filesystem/Stat", &stat).await
            })
        })
        .collect();
    for _ in 0..20 {
        let answered = async {
            client.health().await.unwrap();
            client.stat("/etc/hostname").await.unwrap();
            client.list_dir("/", 1).await.unwrap();
        };
        tokio::time::timeout(DEADLINE, answered).await.expect("the others are answered");
    }
    calls.iter().for_each(tokio::task::JoinHandle::abort);
    sandbox.stop().await;
}
