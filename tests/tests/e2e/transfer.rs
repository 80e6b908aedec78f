//! Files in and out.

use e2e::{Channel, DEADLINE, TestSandbox};
use sha2::{Digest, Sha256};

const SIZE: usize = 64 << 20;

/// Bytes that no compression, text decoding or shifted chunk leaves as they are.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

#[tokio::test]
async fn a_64_mib_binary_file_goes_up_and_comes_down_the_same() {
    let content = noise(SIZE);
    let digest = Sha256::digest(&content);
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    for channel in Channel::ALL {
        let sandbox = TestSandbox::start(channel).await;
        let client = sandbox.client();
        let path = "/root/some folder/näme";
        tokio::time::timeout(DEADLINE, client.write_file(path, content.clone())).await.unwrap().unwrap();
        let inside = sandbox.stdout(&format!("sha256sum < '{path}'")).await;
        assert!(inside.starts_with(&hex), "{channel:?}: {inside} instead of {hex}");
        let back = tokio::time::timeout(DEADLINE, client.read_file(path)).await.unwrap().unwrap();
        assert!(Sha256::digest(&back) == digest, "{channel:?}: what came down differs");
        sandbox.stop().await;
    }
}

#[tokio::test]
async fn the_filesystem_calls_see_what_processes_see() {
    let sandbox = TestSandbox::start(Channel::Serial).await;
    let client = sandbox.client().with_user("user");
    client.make_dir("/home/user/a/b").await.unwrap();
    client.write_file("a/b/file", "hello").await.unwrap();
    assert_eq!(
        sandbox.stdout("cat /home/user/a/b/file; stat -c %U:%a /home/user/a/b/file").await,
        "hellouser:644\n"
    );
    sandbox.stdout("ln -s /proc/1/root /home/user/out; ln -s ../../../../etc/hostname /home/user/up").await;
    let listed = client.list_dir("/home/user", 3).await.unwrap();
    let names: Vec<_> = listed.iter().map(|entry| entry.path.trim_start_matches("/home/user/")).collect();
    assert_eq!(names, ["a", "a/b", "a/b/file", "out", "up"]);
    // A link leads to what the container means by it, never to the guest below.
    assert_eq!(
        client.read_file("/home/user/up").await.unwrap(),
        client.read_file("/etc/hostname").await.unwrap()
    );
    assert!(client.read_file("/home/user/out/run/envd-box/scratch/upper/etc/hostname").await.is_err());
    client.rename("a/b/file", "moved/here").await.unwrap();
    assert_eq!(client.stat("moved/here").await.unwrap().size, 5);
    client.remove("/home/user/moved").await.unwrap();
    assert!(client.stat("moved/here").await.unwrap_err().to_string().contains("not_found"));
    sandbox.stop().await;
}
