//! Servers that are slow, endless or gone.

use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream};

use super::*;

/// Answers each request with what `answer` writes. Ends with the test's process.
fn serve(answer: impl Fn(TcpStream) + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let connection = connection.unwrap();
            let lines = BufReader::new(connection.try_clone().unwrap()).lines().map_while(Result::ok);
            lines.take_while(|line| !line.is_empty()).for_each(drop);
            answer(connection);
        }
    });
    format!("http://{address}/f")
}

/// Small limits; whether a machine is slow changes nothing, as nothing here ever comes.
fn fetcher(folder: &Path) -> Arc<Fetcher> {
    let mut fetcher = Fetcher::new(folder, &Interrupt::default()).unwrap();
    fetcher.limits = Limits {
        bytes: 100_000,
        answer: Duration::from_secs(60),
        window: Duration::from_secs(60),
        progress: 1000,
        total: Duration::from_secs(60),
        tries: 2,
        pause: Duration::from_millis(1),
    };
    Arc::new(fetcher)
}

#[test]
fn servers_that_give_too_much_or_nothing_are_left() {
    let dir = tempfile::tempdir().unwrap();
    let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let endless = serve(move |mut connection| {
        let _ = connection.write_all(head.as_bytes());
        let chunk = format!("1000\r\n{}\r\n", "x".repeat(4096));
        // Until the other side has enough.
        while connection.write_all(chunk.as_bytes()).is_ok() {}
    });
    let error = fetcher(dir.path()).remote(&endless, None).unwrap_err().to_string();
    assert!(error.contains("it has more than 100000 bytes"), "{error}");

    // These hold the connection open and say nothing more; they end when the other side goes.
    let hold =
        |connection: TcpStream| BufReader::new(connection).lines().map_while(Result::ok).for_each(drop);
    let silent = serve(hold);
    let mut slow = Arc::into_inner(fetcher(dir.path())).unwrap();
    slow.limits.answer = Duration::from_millis(50);
    let error = Arc::new(slow).remote(&silent, None).unwrap_err().to_string();
    assert!(error.contains("no answer within 0 s (tried 2 times)"), "{error}");

    let stalled = serve(move |mut connection| {
        let _ = connection.write_all(format!("{head}3\r\nabc\r\n").as_bytes());
        hold(connection);
    });
    let mut slow = Arc::into_inner(fetcher(dir.path())).unwrap();
    slow.limits.window = Duration::from_millis(50);
    let error = Arc::new(slow).remote(&stalled, None).unwrap_err().to_string();
    assert!(error.contains("bytes came in 0 s (tried 2 times)"), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left, and nothing is remembered");
}

#[test]
fn a_wish_to_stop_ends_the_wait() {
    let dir = tempfile::tempdir().unwrap();
    let interrupt = Interrupt::default();
    let asking = interrupt.clone();
    // Whoever is asked is the signal that the wait has begun.
    let url = serve(move |connection| {
        asking.ask();
        BufReader::new(connection).lines().map_while(Result::ok).for_each(drop);
    });
    let fetcher = Arc::new(Fetcher::new(dir.path(), &interrupt).unwrap());
    assert!(matches!(fetcher.remote(&url, None), Err(Error::Interrupted)));
}

#[test]
fn names_are_the_end_of_the_path() {
    for (url, name) in [
        ("http://h/a/b.txt?x=/y#z", "b.txt"),
        ("http://h/a/b/", "b"),
        ("http://h", UNNAMED),
        ("http://h/", UNNAMED),
        ("http://h/a%2Fb", "b"),
        ("http://h/a/%2e%2e", UNNAMED),
        ("http://h/caf%C3%A9", "caf\u{e9}"),
    ] {
        assert_eq!(file_name(&Url::parse(url).unwrap()), name, "{url}");
    }
    assert_eq!(shown(&Url::parse("http://me:secret@h/x").unwrap()), "http://me:...@h/x");
    assert_eq!(time(Some("Fri, 14 Jul 2017 02:40:00 GMT")).seconds, 1_500_000_000);
    assert_eq!((time(Some("yesterday")).seconds, time(None).seconds), (0, 0));
}
