//! What a sandbox must not see, and what a client must not reach.

use e2e::{Channel, DEADLINE, TestSandbox};
use sandbox_folder::client::SandboxClient;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

#[tokio::test]
async fn two_sandboxes_of_one_template_do_not_see_each_others_files() {
    let (first, second) =
        tokio::join!(TestSandbox::start(Channel::Serial), TestSandbox::start(Channel::Vsock));
    first.stdout("echo secret > /root/secret; rm /etc/group").await;
    assert_eq!(first.stdout("cat /root/secret").await, "secret\n");
    assert_ne!(second.sh("cat /root/secret").await.exit.code(), 0);
    assert_eq!(second.stdout("ls /etc/group").await, "/etc/group\n");
    first.stop().await;
    let third = TestSandbox::start(Channel::Serial).await;
    assert_eq!(third.stdout("ls /root; ls /etc/group").await, "/etc/group\n");
    third.stop().await;
    second.stop().await;
}

/// What a client gets that asks the public socket for `port` and then says something.
async fn ask(sandbox: &TestSandbox, port: u32, say: &[u8]) -> Vec<u8> {
    let mut stream = UnixStream::connect(sandbox.dir().join("vsock.sock")).await.unwrap();
    let mut request = format!("CONNECT {port}\n").into_bytes();
    request.extend_from_slice(say);
    // A refused client may find the stream closed already.
    let _ = stream.write_all(&request).await;
    let mut answer = Vec::new();
    let _ =
        tokio::time::timeout(DEADLINE, stream.read_to_end(&mut answer)).await.expect("an answer or an end");
    answer
}

#[tokio::test]
async fn a_client_cannot_reach_a_control_call() {
    use envd_channel::record::Encoder;
    use envd_proto::control::{FromHost, Shutdown, from_host};
    use envd_proto::{CLIENT_PORT, CONTROL_PORT, FIRST_GENERATION, PORTS_PORT};
    use prost::Message;

    let shutdown = FromHost { id: 1, request: Some(from_host::Request::Shutdown(Shutdown { grace_ms: 0 })) };
    let record = Encoder::default().encode(FIRST_GENERATION, &shutdown.encode_to_vec()).unwrap();
    for channel in Channel::ALL {
        let sandbox = TestSandbox::start(channel).await;
        // Another port than the two doors is refused by the shim, whatever the agent would say.
        for port in [CONTROL_PORT, 0, 1, CLIENT_PORT + 2, u32::MAX] {
            let answer = ask(&sandbox, port, &record).await;
            assert!(!answer.starts_with(b"OK"), "port {port} was opened: {answer:?}");
        }
        // On the two doors a control message is nonsense.
        let answer = ask(&sandbox, CLIENT_PORT, &[&record[..], b"\r\n\r\n"].concat()).await;
        assert!(!String::from_utf8_lossy(&answer).contains("200 OK"), "{answer:?}");
        ask(&sandbox, PORTS_PORT, &record).await;
        for path in ["/init", "/freeze", "/shutdown", "/tiffin.control.v1.Control/Shutdown"] {
            let request =
                format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            let answer = String::from_utf8(ask(&sandbox, CLIENT_PORT, request.as_bytes()).await).unwrap();
            assert!(answer.contains("HTTP/1.1 404"), "{path}: {answer}");
        }
        assert_eq!(sandbox.stdout("echo alive").await, "alive\n");
        sandbox.stop().await;
    }
}

#[tokio::test]
async fn every_call_but_health_needs_the_token_once_one_is_set() {
    let sandbox = TestSandbox::of(Channel::Serial).set("access_token", "let-me-in").start().await;
    let stranger = SandboxClient::unix(sandbox.dir().join("vsock.sock"));
    stranger.health().await.unwrap();
    for refused in [
        stranger.output("/bin/true", [""; 0]).await.map(drop),
        stranger.stat("/").await.map(drop),
        stranger.read_file("/etc/passwd").await.map(drop),
        stranger.write_file("/tmp/x", "x").await,
        sandbox.client().with_token("let-me-iN").processes().await.map(drop),
    ] {
        let error = refused.unwrap_err().to_string();
        assert!(error.contains("X-Access-Token") || error.contains("unauthenticated"), "{error}");
    }
    let owner = sandbox.client().with_token("let-me-in");
    assert_eq!(owner.output("/bin/echo", ["hello"]).await.unwrap().stdout, b"hello\n");
    sandbox.stop().await;
}
