//! What streams carry, side by side.

use std::sync::Arc;

use sha2::{Digest, Sha256};
use tiffin_gateway::tunnel::session::{MAX_STREAMS, WINDOW};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Notify, mpsc};

use crate::support::{Front, echo, serve, soon};

/// Bytes that are different for each seed, and nowhere the same.
fn content(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..length / 8).flat_map(|_| next().to_le_bytes()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn many_streams_at_once_carry_their_own_bytes_and_their_places_are_free_again() {
    // More than a window, so that credit is needed.
    const SIZE: usize = WINDOW as usize * 5 / 4;
    const STREAMS: usize = MAX_STREAMS / 2;
    let front = Front::start().await;
    let sandbox = front.sandbox([(7, echo())]).await;
    let tunnel = Arc::new(front.tunnel(&sandbox.id).await);
    for round in 0..3 {
        let mut streams = Vec::new();
        for number in 0..STREAMS as u64 {
            let stream = tunnel.connect(7).await;
            let sent = content(round * 1000 + number, SIZE);
            streams.push(tokio::spawn(async move {
                let (mut read, mut write) = tokio::io::split(stream);
                let expected = Sha256::digest(&sent);
                let writing = tokio::spawn(async move {
                    write.write_all(&sent).await.unwrap();
                    write.shutdown().await.unwrap();
                });
                let mut back = Vec::new();
                soon("all of it comes back", read.read_to_end(&mut back)).await.unwrap();
                writing.await.unwrap();
                assert_eq!(Sha256::digest(&back), expected, "stream {number}");
            }));
        }
        for stream in streams {
            stream.await.unwrap();
        }
    }
    let text = front.metrics().await;
    let bytes = 3 * STREAMS * SIZE;
    for line in [
        r#"tiffin_open_streams{kind="Tunnel"} 1"#.to_owned(),
        format!(r#"tiffin_streams_total{{kind="TunnelStream"}} {}"#, 3 * STREAMS),
        format!(r#"tiffin_proxied_bytes_total{{direction="In"}} {bytes}"#),
        format!(r#"tiffin_proxied_bytes_total{{direction="Out"}} {bytes}"#),
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
}

#[tokio::test]
async fn either_side_may_end_first_and_hear_the_other_out() {
    let front = Front::start().await;
    let (heard, mut hearing) = mpsc::channel(1);
    let listens = serve(|mut stream| async move {
        let mut said = String::new();
        stream.read_to_string(&mut said).await.unwrap();
        stream.write_all(said.to_uppercase().as_bytes()).await.unwrap();
    });
    let speaks = serve(move |stream| {
        let heard = heard.clone();
        async move {
            let (mut read, mut write) = stream.into_split();
            write.write_all(b"bye").await.unwrap();
            write.shutdown().await.unwrap();
            let mut said = String::new();
            read.read_to_string(&mut said).await.unwrap();
            heard.send(said).await.unwrap();
        }
    });
    let sandbox = front.sandbox([(1, listens), (2, speaks)]).await;
    let tunnel = front.tunnel(&sandbox.id).await;
    let mut stream = tunnel.connect(1).await;
    stream.write_all(b"half closed").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    soon("the answer", stream.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(answer, "HALF CLOSED");

    let mut stream = tunnel.connect(2).await;
    let mut answer = String::new();
    soon("the answer", stream.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(answer, "bye");
    stream.write_all(b"after your end").await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(soon("it is heard", hearing.recv()).await.unwrap(), "after your end");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_read_one_stream_holds_up_no_other() {
    let front = Front::start().await;
    let speaks = serve(|mut stream| async move {
        for number in 0..8 {
            if stream.write_all(&content(number, 1 << 20)).await.is_err() {
                return;
            }
        }
    });
    let sandbox = front.sandbox([(1, speaks), (7, echo())]).await;
    let tunnel = front.tunnel(&sandbox.id).await;
    let mut unread = tunnel.connect(1).await;
    let mut other = tunnel.connect(7).await;
    for number in 0..64 {
        let sent = content(number, 64 << 10);
        other.write_all(&sent).await.unwrap();
        let mut back = vec![0; sent.len()];
        soon("the other goes on", other.read_exact(&mut back)).await.unwrap();
        assert!(back == sent);
    }
    // What was not read has waited, all of it.
    let mut rest = Vec::new();
    soon("the rest comes", unread.read_to_end(&mut rest)).await.unwrap();
    let whole: Vec<u8> = (0..8).flat_map(|number| content(number, 1 << 20)).collect();
    assert!(rest == whole, "{} bytes", rest.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_does_not_read_holds_up_no_other_stream_and_stops_its_writer() {
    let front = Front::start().await;
    let go_on = Arc::new(Notify::new());
    let gate = Arc::clone(&go_on);
    let (heard, mut hearing) = mpsc::channel(1);
    let deaf = serve(move |mut stream| {
        let (gate, heard) = (Arc::clone(&gate), heard.clone());
        async move {
            gate.notified().await;
            let mut said = Vec::new();
            stream.read_to_end(&mut said).await.unwrap();
            heard.send(Sha256::digest(&said)).await.unwrap();
        }
    });
    let sandbox = front.sandbox([(1, deaf), (7, echo())]).await;
    let tunnel = front.tunnel(&sandbox.id).await;
    let mut unread = tunnel.connect(1).await;
    let sent = content(1, 16 << 20);
    let expected = Sha256::digest(&sent);
    let (written, mut progress) = tokio::sync::watch::channel(0);
    let writing = tokio::spawn(async move {
        for part in sent.chunks(16 << 10) {
            unread.write_all(part).await.unwrap();
            written.send_modify(|written| *written += part.len());
        }
        unread.shutdown().await.unwrap();
        unread
    });
    // A window and some: then it waits, while the other goes on.
    soon("the window fills", progress.wait_for(|written| *written >= WINDOW as usize)).await.unwrap();
    let mut other = tunnel.connect(7).await;
    for number in 0..64 {
        let sent = content(number, 64 << 10);
        other.write_all(&sent).await.unwrap();
        let mut back = vec![0; sent.len()];
        soon("the other goes on", other.read_exact(&mut back)).await.unwrap();
        assert!(back == sent);
    }
    // The window, the frames that the client's own crate holds, the socket's buffers: far from all.
    assert!(*progress.borrow() < 4 << 20, "{} bytes were taken", *progress.borrow());
    go_on.notify_one();
    assert_eq!(soon("it is heard", hearing.recv()).await.unwrap(), expected);
    writing.await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_reached_is_told_and_the_rest_goes_on() {
    let front = Front::start().await;
    let agent = serve(|mut stream| async move { stream.write_all(b"the agent").await.unwrap() });
    let sandbox = front.sandbox([(7, echo()), (49983, agent)]).await;
    let tunnel = front.tunnel(&sandbox.id).await;
    for (line, answer) in [
        ("CONNECT 8\n", "ERR 502 the sandbox is running but port is not open\n"),
        // The gateway's own, which is no port of the sandbox's; and the agent's doors by their numbers.
        ("CONNECT 49982\n", "ERR 502 the sandbox is running but port is not open\n"),
        ("CONNECT 49984\n", "ERR 502 the sandbox is running but port is not open\n"),
        ("CONNECT 1024\n", "ERR 502 the sandbox is running but port is not open\n"),
        ("CONNECT 0\n", "ERR 400 expected the line `CONNECT <port>`\n"),
        ("CONNECT 65536\n", "ERR 400 expected the line `CONNECT <port>`\n"),
        ("GET / HTTP/1.1\r\n", "ERR 400 expected the line `CONNECT <port>`\n"),
        (&"x".repeat(5000), "ERR 400 expected the line `CONNECT <port>`\n"),
    ] {
        let (mut stream, told) = tunnel.ask(line).await;
        assert_eq!(told, answer, "{line:?}");
        let mut rest = Vec::new();
        soon("its end", stream.read_to_end(&mut rest)).await.unwrap();
        assert!(rest.is_empty(), "{rest:?}");
    }
    // Half a line.
    let mut stream = tunnel.stream().await;
    stream.write_all(b"CONNECT").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    soon("its end", stream.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(answer, "ERR 400 expected the line `CONNECT <port>`\n");

    let mut agent = tunnel.connect(49983).await;
    let mut said = String::new();
    soon("its end", agent.read_to_string(&mut said)).await.unwrap();
    assert_eq!(said, "the agent");
    // What follows the line in one piece is the port's.
    let (mut stream, answer) = tunnel.ask("CONNECT 7\nhello").await;
    assert_eq!(answer, "OK\n");
    let mut back = [0; 5];
    soon("the echo", stream.read_exact(&mut back)).await.unwrap();
    assert_eq!(&back, b"hello");
}

#[tokio::test]
async fn a_stream_that_is_dropped_ends_at_the_port_and_an_answer_outlives_a_server_that_hangs_up() {
    let front = Front::start().await;
    let (heard, mut hearing) = mpsc::channel(1);
    let waits = serve(move |mut stream| {
        let heard = heard.clone();
        async move {
            let mut said = Vec::new();
            let _ = stream.read_to_end(&mut said).await;
            heard.send(said).await.unwrap();
        }
    });
    // It refuses an upload unread, as servers do.
    let refuses = serve(|mut stream| async move {
        stream.write_all(b"413 too large").await.unwrap();
    });
    let sandbox = front.sandbox([(1, waits), (2, refuses)]).await;
    let tunnel = front.tunnel(&sandbox.id).await;
    let mut stream = tunnel.connect(1).await;
    stream.write_all(b"some").await.unwrap();
    stream.flush().await.unwrap();
    drop(stream);
    assert!(b"some".starts_with(&soon("it ends", hearing.recv()).await.unwrap()));

    let stream = tunnel.connect(2).await;
    let (mut read, mut write) = tokio::io::split(stream);
    let writing = tokio::spawn(async move {
        let _ = write.write_all(&content(1, 2 << 20)).await;
        let _ = write.shutdown().await;
    });
    let mut answer = String::new();
    soon("the answer", read.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(answer, "413 too large");
    soon("the upload is let go", writing).await.unwrap();
}
