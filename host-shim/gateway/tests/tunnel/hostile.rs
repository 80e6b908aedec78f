//! Clients that break rules: each costs itself its tunnel, and no more.

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use tiffin_gateway::tunnel::frame::{ACK, FIN, Header, Kind, RST, SYN};
use tiffin_gateway::tunnel::session::{MAX_STREAMS, WINDOW};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{CloseCode, Data, OpCode};

use crate::support::{Frames, Front, drain, echo, serve, soon};

fn update(stream: u32, flags: u16, credit: u32) -> Vec<u8> {
    Header::window_update(stream, flags, credit).encode().to_vec()
}

fn data(stream: u32, flags: u16, body: &[u8]) -> Vec<u8> {
    let header = Header { kind: Kind::Data, flags, stream, length: u32::try_from(body.len()).unwrap() };
    [&header.encode()[..], body].concat()
}

fn binary(bytes: impl Into<Bytes>) -> Message {
    Message::Binary(bytes.into())
}

#[tokio::test]
async fn what_is_no_yamux_ends_the_tunnel_with_the_reason_and_others_go_on() {
    let front = Front::start().await;
    let sandbox = front.sandbox([(7, echo())]).await;
    let good = front.tunnel(&sandbox.id).await;
    let mut stream = good.connect(7).await;
    let longest = vec![0; 2 * WINDOW as usize + 1];
    let too_much = [update(1, SYN, 0), data(1, 0, &vec![0; WINDOW as usize]), data(1, 0, b"x")].concat();
    let huge = Header { kind: Kind::Data, flags: SYN, stream: 1, length: u32::MAX };
    for (message, code, words) in [
        (binary(b"GET / HTTP/1.1\r\n".to_vec()), 1002, "yamux version 71"),
        (binary(vec![0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), 1002, "kind 9"),
        (binary(update(1, 0x100, 0)), 1002, "flags 0x0100"),
        (binary(update(2, SYN, 0)), 1002, "stream 2: a client's streams have odd ids"),
        (binary(update(0, SYN, 0)), 1002, "stream 0"),
        (binary([update(1, SYN, 0), update(1, SYN, 0)].concat()), 1002, "opened twice"),
        (binary(huge.encode().to_vec()), 1002, "4294967295 bytes, 262144 are left"),
        (binary([update(1, SYN, 0), data(1, 0, b"CON")].concat()), 0, ""),
        (binary([update(1, SYN, 9), update(1, 0, u32::MAX)].concat()), 1002, "more than 4 GiB"),
        (binary([data(1, SYN | FIN, b""), data(1, 0, b"x")].concat()), 1002, "after its end"),
        (Message::text("hello"), 1003, "binary"),
        (binary(longest.clone()), 1009, "longer than 524288 bytes"),
    ] {
        let mut socket = front.websocket(&sandbox.id).await;
        let shown = format!("{message:?}").chars().take(80).collect::<String>();
        socket.send(message).await.unwrap();
        if code == 0 {
            // Begun and left: the client's own end is enough.
            let frame = CloseFrame { code: CloseCode::Normal, reason: "".into() };
            socket.close(Some(frame)).await.unwrap();
            assert_eq!(drain(&mut socket).await.1.unwrap().0, 1000);
            continue;
        }
        let (told, reason) = drain(&mut socket).await.1.unwrap_or_else(|| panic!("no close frame: {shown}"));
        assert!(told == code && reason.contains(words), "{shown}: {told} {reason}");
    }
    // A window and a byte, in messages that are short enough.
    let mut socket = front.websocket(&sandbox.id).await;
    socket.send(binary(too_much)).await.unwrap();
    let (code, reason) = drain(&mut socket).await.1.unwrap();
    assert!(code == 1002 && reason.contains("a frame of 1 bytes"), "{code} {reason}");

    stream.write_all(b"still here").await.unwrap();
    let mut back = [0; 10];
    soon("the echo", stream.read_exact(&mut back)).await.unwrap();
    assert_eq!(&back, b"still here");
}

#[tokio::test]
async fn what_is_no_websocket_ends_the_tunnel() {
    let front = Front::start().await;
    let sandbox = front.sandbox([(7, echo())]).await;
    // RFC 6455: a reserved opcode; a client's frame without a mask; a ping that is too long.
    let long_ping = [&[0x89, 0xfe, 0, 126][..], &[0; 130]].concat();
    for bytes in [&[0x83, 0x80, 0, 0, 0, 0][..], &[0x82, 0x01, 0], &long_ping] {
        let mut socket = front.websocket(&sandbox.id).await;
        socket.get_mut().write_all(bytes).await.unwrap();
        let (told, code) = drain(&mut socket).await;
        assert!(told.is_empty());
        assert_eq!(code.expect("a close frame").0, 1002, "{bytes:?}");
    }
}

#[tokio::test]
async fn frames_may_be_cut_anywhere_by_messages_and_by_fragments() {
    let front = Front::start().await;
    let sandbox = front.sandbox([(7, echo())]).await;
    let bytes = [update(1, SYN, 0), data(1, 0, b"CONNECT 7\n"), data(1, FIN, b"cut to pieces")].concat();
    let read = async |socket: &mut _| {
        let (mut frames, mut said) = (Frames::new(), Vec::new());
        loop {
            let (header, body) = frames.next(socket).await;
            said.extend_from_slice(&body);
            assert_eq!(header.flags & RST, 0, "{header:?}");
            if header.flags & FIN != 0 {
                return String::from_utf8(said).unwrap();
            }
        }
    };
    let mut socket = front.websocket(&sandbox.id).await;
    for byte in &bytes {
        socket.send(binary(vec![*byte])).await.unwrap();
        socket.send(binary(Vec::new())).await.unwrap();
    }
    assert_eq!(read(&mut socket).await, "OK\ncut to pieces");

    let mut socket = front.websocket(&sandbox.id).await;
    let last = bytes.len() - 1;
    for (at, byte) in bytes.iter().enumerate() {
        let opcode = OpCode::Data(if at == 0 { Data::Binary } else { Data::Continue });
        let fragment = Frame::message(vec![*byte], opcode, at == last);
        socket.send(Message::Frame(fragment)).await.unwrap();
        if at % 7 == 3 {
            socket.send(Message::Ping(Bytes::from_static(b"between fragments"))).await.unwrap();
        }
    }
    let mut pongs = 0;
    while pongs < (0..=last).filter(|at| at % 7 == 3).count() {
        match soon("a pong", socket.next()).await.unwrap().unwrap() {
            Message::Pong(_) => pongs += 1,
            Message::Ping(_) | Message::Binary(_) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn opens_beyond_the_limit_are_refused_one_by_one() {
    let front = Front::start().await;
    let sandbox = front.sandbox([(7, echo())]).await;
    let mut socket = front.websocket(&sandbox.id).await;
    let opens = 1000;
    let flood: Vec<u8> = (0..opens).flat_map(|number| update(2 * number + 1, SYN, 0)).collect();
    socket.send(binary(flood)).await.unwrap();
    let mut frames = Frames::new();
    for number in 0..opens {
        let (header, _) = frames.next(&mut socket).await;
        let flags = if (number as usize) < MAX_STREAMS { ACK } else { RST };
        assert_eq!(header, Header::window_update(2 * number + 1, flags, 0));
    }
    // Opened and dropped, over and over: nothing of it stays.
    let churn: Vec<u8> = (0..opens)
        .flat_map(|number| {
            [update(1, RST, 0), update(1, SYN, 0), data(1, 0, b"CONNECT 7\n"), update(3 + 2 * number, RST, 0)]
        })
        .flatten()
        .collect();
    socket.send(binary(churn)).await.unwrap();
    let ping = Header { kind: Kind::Ping, flags: SYN, stream: 0, length: 42 };
    socket.send(binary(ping.encode().to_vec())).await.unwrap();
    loop {
        let (header, _) = frames.next(&mut socket).await;
        if header.kind == Kind::Ping {
            assert_eq!(header, Header { flags: ACK, ..ping });
            break;
        }
    }
    socket.send(binary([update(9001, SYN, 0), data(9001, 0, b"CONNECT 7\nhello")].concat())).await.unwrap();
    let mut said = Vec::new();
    while said != b"OK\nhello" {
        let (header, body) = frames.next(&mut socket).await;
        if header.stream == 9001 {
            said.extend_from_slice(&body);
        }
    }
}

#[tokio::test]
async fn who_causes_answers_and_reads_none_is_cut_off() {
    let front = Front::start().await;
    let speaks = serve(|mut stream| async move { while stream.write_all(&[7; 4096]).await.is_ok() {} });
    let sandbox = front.sandbox([(1, speaks), (7, echo())]).await;
    let mut socket = front.websocket(&sandbox.id).await;
    // So much data on its way that no answer can get out any more.
    let unread: Vec<u8> = (0..8u32)
        .flat_map(|number| [update(2 * number + 1, SYN, 1 << 30), data(2 * number + 1, 0, b"CONNECT 1\n")])
        .flatten()
        .collect();
    socket.send(binary(unread)).await.unwrap();
    let ping = Header { kind: Kind::Ping, flags: SYN, stream: 0, length: 1 };
    let pings: Vec<u8> = std::iter::repeat_n(ping.encode(), 1000).flatten().collect();
    let flooding = async { while socket.send(binary(pings.clone())).await.is_ok() {} };
    soon("it is cut off", flooding).await;
    // The place is free again, and the gateway goes on.
    let tunnel = front.tunnel(&sandbox.id).await;
    let mut stream = tunnel.connect(7).await;
    stream.write_all(b"hello").await.unwrap();
    let mut back = [0; 5];
    soon("the echo", stream.read_exact(&mut back)).await.unwrap();
    let closed = async {
        while !front.metrics().await.contains(r#"tiffin_open_streams{kind="Tunnel"} 1"#) {
            tokio::task::yield_now().await;
        }
    };
    soon("nothing of it is left", closed).await;
}
