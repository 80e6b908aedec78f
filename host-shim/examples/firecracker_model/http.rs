//! As much of HTTP/1.1 as one request on a connection needs, so that an answer can also be what no server would say.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Firecracker's own limit for a request (`--http-api-max-payload-size`).
const MAX_BODY: usize = 51_200;
const MAX_HEAD: usize = 8 << 10;

/// A request.
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) body: Vec<u8>,
}

/// Reads the request of a connection; `None` where its end comes first.
pub(crate) async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Request>> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) if head.len() < MAX_HEAD => head.push(byte),
            Ok(_) => return Err(io::Error::other("a head without end")),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    let head = String::from_utf8(head).map_err(io::Error::other)?;
    let mut lines = head.lines();
    let mut first = lines.next().unwrap_or_default().split(' ').map(str::to_owned);
    let (method, path) = (first.next().unwrap_or_default(), first.next().unwrap_or_default());
    let header = |name: &str| {
        head.lines().find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
        })
    };
    let body = match header("content-length") {
        Some(length) => {
            let length = length.parse().ok().filter(|length| *length <= MAX_BODY);
            let mut body = vec![0; length.ok_or_else(|| io::Error::other("no length of a request"))?];
            stream.read_exact(&mut body).await?;
            body
        }
        None if header("transfer-encoding").is_some_and(|how| how == "chunked") => chunks(stream).await?,
        None => Vec::new(),
    };
    Ok(Some(Request { method, path, body }))
}

async fn chunks(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            line.push(stream.read_u8().await?);
        }
        let length = String::from_utf8_lossy(&line).trim().to_owned();
        let length = usize::from_str_radix(&length, 16).map_err(io::Error::other)?;
        let mut chunk = vec![0; length + 2];
        stream.read_exact(&mut chunk).await?;
        if length == 0 {
            return Ok(body);
        }
        body.extend_from_slice(&chunk[..length]);
        if body.len() > MAX_BODY {
            return Err(io::Error::other("a body without end"));
        }
    }
}

/// Answers, and ends the connection with it.
pub(crate) async fn answer(
    stream: &mut (impl AsyncWrite + Unpin),
    status: &str,
    kind: &str,
    body: &[u8],
) -> io::Result<()> {
    let head = format!(
        "HTTP/1.1 {status}\r\nServer: Firecracker API\r\nConnection: close\r\nContent-Type: {kind}\r\n\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(&[head.as_bytes(), body].concat()).await?;
    stream.flush().await
}
