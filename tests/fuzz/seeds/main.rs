//! Writes the first inputs of every target: `seeds FOLDER`. Made by the project's own writers, so that they are well
//! formed and the fuzzer begins behind the first checks.

use std::fs;
use std::io;
use std::path::PathBuf;

use envd_channel::{envelope, preamble, record};
use envd_proto::control::{Configure, FromHost, from_host};
use envd_proto::process::process_event::{DataEvent, EndEvent, Event, StartEvent, data_event};
use envd_proto::process::{
    ListResponse, ProcessConfig, ProcessEvent, ProcessInfo, Pty, StartRequest, StartResponse, pty,
};
use prost::Message;

fn main() -> io::Result<()> {
    let folder = PathBuf::from(std::env::args_os().nth(1).ok_or(io::ErrorKind::InvalidInput)?);
    let write = |target: &str, seeds: Vec<Vec<u8>>| {
        let folder = folder.join(target);
        fs::create_dir_all(&folder)?;
        seeds.iter().enumerate().try_for_each(|(n, seed)| fs::write(folder.join(format!("seed-{n}")), seed))
    };
    let start = StartRequest {
        process: Some(ProcessConfig {
            cmd: "/bin/sh".into(),
            args: vec!["-c".into(), "echo \"\u{fc}\"".into()],
            envs: [("A".into(), "1".into())].into(),
            cwd: Some("/tmp".into()),
        }),
        pty: Some(Pty { size: Some(pty::Size { cols: 80, rows: 24 }) }),
        tag: Some("tag".into()),
        stdin: Some(true),
        ..Default::default()
    };
    let json = serde_json::to_vec(&start)?;
    let binary = start.encode_to_vec();
    let with = |prefix: &[u8], body: &[u8]| [prefix, body].concat();
    write(
        "connect",
        vec![
            with(&[0b0001_0010], &json),
            with(&[0b0001_0000], &binary),
            with(&[0b0001_0011], &envelope::encode(0, &json)),
            with(&[0b1111_0001], &envelope::encode(0, &binary)),
            with(
                &[3],
                &[envelope::encode(0, b"{}"), envelope::encode(envelope::END_OF_STREAM, b"{}")].concat(),
            ),
        ],
    )?;
    let mut messages = vec![with(&[0, 0], &json), with(&[0, 1], &binary)];
    for (which, text) in [
        (1, r#"{"process":{"pid":7}}"#),
        (3, r#"{"process":{"tag":"t"},"pty":{"size":{"cols":1,"rows":2}}}"#),
        (4, r#"{"data":{"input":{"pty":"AA=="}}}"#),
        (5, r#"{"process":{"pid":7},"input":{"stdin":"-_8"}}"#),
        (6, r#"{"process":{"pid":7},"signal":15}"#),
        (10, r#"{"source":"/a","destination":"/b"}"#),
        (11, r#"{"path":"/a","depth":2}"#),
        (13, r#"{"path":"/a","recursive":true,"include_entry":true}"#),
        (15, r#"{"watcherId":"w"}"#),
    ] {
        messages.push(with(&[which, 0], text.as_bytes()));
    }
    write("json", messages)?;

    let passwd =
        "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000:,,,:/home/user:/bin/bash\nodd:x:7:7::relative:\n";
    let group = "root:x:0:\nstaff:x:50:user,root\n";
    let path =
        |user: &str, workdir: &str, path: &str| [user, workdir, path, group, passwd].join("\0").into_bytes();
    write(
        "path",
        vec![
            path("user", "/app", ""),
            path("", "app", ""),
            path("1000:staff", "", "~/a/../b"),
            path("odd", "", "~"),
            path("user", "", "../../x//y/."),
            path("7", "", "~root/x"),
        ],
    )?;

    let part = |name: &str, file: &str, content: &str| {
        format!(
            "--cut\r\nContent-Disposition: form-data; name=\"{name}\"; filename=\"{file}\"\r\n\
             Content-Type: application/octet-stream\r\n\r\n{content}\r\n"
        )
    };
    let two = format!("{}{}--cut--\r\n", part("file", "/a/b", "first"), part("file", "c", "--cu\r\n-"));
    write(
        "multipart",
        vec![
            with(&[6], two.as_bytes()),
            with(&[0], format!("preface\r\n{}--cut--", part("other", "", "")).as_bytes()),
        ],
    )?;

    let configure =
        Configure { hostname: "h".into(), env: [("A".into(), "1".into())].into(), ..Default::default() };
    let request = FromHost { id: 1, request: Some(from_host::Request::Configure(configure)) };
    let mut encoder = record::Encoder::default();
    let mut encode = |payload: &[u8]| encoder.encode(3, payload).map_err(io::Error::other);
    let (short, long) = (encode(&request.encode_to_vec())?, encode(&[7; 2500])?);
    write(
        "records",
        vec![
            with(&[1, 3], &short),
            with(&[200, 3], &[b"garbage\x89TFN".as_slice(), &long, &short].concat()),
            with(&[9, 3], &[&long[..1024], &short[..], &preamble::encode(3)].concat()),
        ],
    )?;

    // Started, Failed, Exited, as protobuf: ids and pids are small numbers.
    let datagrams = |all: &[&[u8]]| {
        all.iter().flat_map(|one| [&[one.len() as u8][..], one].concat()).collect::<Vec<u8>>()
    };
    let started: &[u8] = &[0x0a, 4, 0x08, 1, 0x10, 9];
    let failed: &[u8] = &[0x12, 6, 0x08, 2, 0x10, 3, 0x18, 2];
    let exited: &[u8] = &[0x1a, 4, 0x08, 9, 0x10, 0];
    write(
        "spawner",
        vec![
            with(&[1], &datagrams(&[started, failed, exited])),
            with(&[0], &datagrams(&[started, exited, exited, &[]])),
            with(&[2], &datagrams(&[&[0xff; 200], failed])),
        ],
    )?;

    let event = |event: Event| {
        let response = StartResponse { event: Some(ProcessEvent { event: Some(event) }) };
        envelope::encode(0, &response.encode_to_vec())
    };
    let data = |output| event(Event::Data(DataEvent { output: Some(output), ..Default::default() }));
    let ended = |exited, status: &str| {
        event(Event::End(EndEvent { exited, status: status.into(), ..Default::default() }))
    };
    let started = event(Event::Start(StartEvent { pid: 7, ..Default::default() }));
    let stdout = data(data_event::Output::Stdout("out".into()));
    let stderr = data(data_event::Output::Stderr("err".into()));
    let terminal = data(data_event::Output::Pty("pty".into()));
    let end = |json: &str| envelope::encode(envelope::END_OF_STREAM, json.as_bytes());
    let process = ProcessInfo { config: start.process, pid: 7, ..Default::default() };
    let list = ListResponse { processes: vec![process] }.encode_to_vec();
    let refusal = r#"{"code":"not_found","message":"no\u001b[2J such file"}"#;
    write(
        "client",
        vec![
            with(&[2], &[&started[..], &stdout, &stderr, &ended(true, "exit status 0"), &end("{}")].concat()),
            with(
                &[0b1010],
                &[&started[..], &terminal, &ended(false, "signal: killed (core dumped)")].concat(),
            ),
            with(&[0b10010], &[&started[..], &end(&format!(r#"{{"error":{refusal}}}"#))].concat()),
            with(&[0b110], refusal.as_bytes()),
            with(&[0b100], br#"{"code":404,"message":"no"}"#),
            with(&[0b11000], &list),
            with(&[1], br#"[{"address":"127.0.0.1","port":80}]"#),
        ],
    )?;

    // HTTP/1.0, 1.1 and 2 by the first byte.
    let heads = [
        "H3000-abc123.boxes.example",
        "H49983-abc123-6532622b.localhost.:443",
        "H3000-ABC123.eu.boxes.example\nIabc123\nP3000",
        "H127.0.0.1:3000\nIabc123\nP49983",
        "H[::1]:80\nIabc123\nP65535",
        "Thttp://3000-abc123.boxes.example/x\nH3000-abc123.boxes.example",
        "Hapi.boxes.example",
        "H3000-abc123.boxes.example\nIabc124",
        "Hlocalhost",
    ];
    let heads = heads.iter().flat_map(|head| [1, 2].map(|version| with(&[version], head.as_bytes())));
    write("route", heads.chain([with(&[0], b"T/")]).collect())?;

    // yamux: a stream that opens, asks, has credit and ends; one in a single frame; a reset; a ping; a leave.
    let frame = |kind: u8, flags: u8, stream: u8, length: u32, body: &[u8]| {
        [&[0, kind, 0, flags, 0, 0, 0, stream][..], &length.to_be_bytes(), body].concat()
    };
    let one = [
        frame(1, 1, 1, 9, b""),
        frame(0, 0, 1, 10, b"CONNECT 7\n"),
        frame(1, 0, 1, 500, b""),
        frame(0, 4, 1, 3, b"bye"),
    ];
    let more =
        [frame(0, 5, 3, 2, b"hi"), frame(1, 8, 3, 0, b""), frame(2, 1, 0, 42, b""), frame(3, 0, 0, 0, b"")];
    let opens = (0..70).map(|number| frame(1, 1, 2 * number + 1, 0, b""));
    write(
        "tunnel",
        vec![
            with(&[3, 0], &one.concat()),
            with(&[40, 0xaa], &[one.concat(), more.concat(), one.concat()].concat()),
            with(&[200, 0xff], &opens.flatten().collect::<Vec<_>>()),
        ],
    )?;

    dockerfiles(&write)?;
    write("manifest", manifests())?;

    let call = r#"{"jsonrpc":"2.0","id":"aB3","method":"process_start","params":["a",{"B":"c"},null,7]}"#;
    let told = r#"{"jsonrpc":"2.0","method":"process_stdin","params":["a","\u00e9\ud83d\ude00"]}"#;
    let answered = r#"{"jsonrpc":"2.0","id":1e2,"result":null}"#;
    let frames =
        [call, told, answered, r#" {"jsonrpc":"2.0","id":{"a":[1]},"method":"m","params":{}} "#, "[]", "[1,"];
    let batch = format!("[{call},{told} ,1,{answered}]");
    write("rpc", frames.iter().copied().chain([&batch[..]]).map(|text| text.into()).collect())?;

    let lower = layer(&[
        (b'5', "usr/lib", "", ""),
        (b'2', "lib", "usr/lib", ""),
        (b'0', "usr/lib/file", "", "data"),
        (b'1', "hard", "usr/lib/file", ""),
        (b'3', "null", "", ""),
        (b'6', "pipe", "", ""),
        (b'5', "opaque", "", ""),
        (b'0', "opaque/old", "", "old"),
    ])?;
    let upper = layer(&[
        (b'0', "usr/lib/.wh.file", "", ""),
        (b'0', "opaque/.wh..wh..opq", "", ""),
        (b'0', "lib/new", "", "through the link"),
        (b'1', "again", "hard", ""),
        (b'5', "hard", "", ""),
    ])?;
    write("tar", vec![lower.clone(), upper.clone()])?;
    // Layers with the length of each before it.
    let sized = |layer: &[u8]| [&(layer.len() as u16).to_le_bytes()[..], layer].concat();
    write("merge", vec![sized(&lower), [sized(&lower), sized(&upper)].concat()])?;

    // An image, then what is written over it: where (three bytes), how much, and the bytes. The superblock, a descriptor,
    // the root's inode, a directory.
    let patch = |at: u32, bytes: &[u8]| [&at.to_le_bytes()[..3], &[bytes.len() as u8], bytes].concat();
    write(
        "ext4",
        vec![
            vec![0],
            vec![3],
            with(&[1], &patch(1024, &[0xff; 4])),
            with(&[0], &[patch(4096, &[9, 0, 0, 0]), patch(1024 + 0x60, &[0x42, 2])].concat()),
            with(&[2], &patch(4 * 4096 + 256 + 0x28, &[0x0a, 0xf3, 1, 0, 4, 0, 1, 0])),
            with(&[2], &patch(8 * 4096, &[2, 0, 0, 0, 12, 0, 1, 2])),
        ],
    )
}

/// A tar stream of entries: type, path, link target, data. PAX records in front of each file.
fn layer(entries: &[(u8, &str, &str, &str)]) -> io::Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Vec::new());
    for &(kind, path, link, data) in entries {
        if kind == b'0' {
            let value: &[u8] = b"1";
            builder.append_pax_extensions([("SCHILY.xattr.user.a", value), ("mtime", b"1.5")])?;
        }
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_path(path)?;
        if !link.is_empty() {
            header.set_link_name(link)?;
        }
        header.set_mode(0o755);
        header.set_device_major(1)?;
        header.set_device_minor(3)?;
        header.set_size(data.len() as u64);
        header.set_cksum();
        builder.append(&header, data.as_bytes())?;
    }
    builder.into_inner()
}

/// The corpus of the crate `dockerfile` is its own first input.
fn dockerfiles(write: &impl Fn(&str, Vec<Vec<u8>>) -> io::Result<()>) -> io::Result<()> {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../image-builder/dockerfile/tests/corpus");
    let mut cases = Vec::new();
    for file in fs::read_dir(corpus)? {
        let text = fs::read_to_string(file?.path())?;
        let case = |case: &str| case.split_once('\n').map(|(_, text)| text.as_bytes().to_vec());
        cases.extend(text.split("--- ").filter_map(case));
    }
    write("dockerfile_lexer", cases.clone())?;
    write("dockerfile_parser", cases)?;
    let words = [
        "$v ${v} \"$v\" '$v' \\$v",
        "${v:-a}${v-a}${v:+a}${v+a}${v:?a}${v?a}",
        "${v#*/}${v##*/}${v%.*}${v%%.*}",
        "${v/a/b}${v//a/b}${v/\\//-}${no:-${v:-'}'}}",
    ];
    write("dockerfile_expand", words.map(|word| format!("/usr/lib/a.tar.gz\0{word}").into_bytes()).into())?;
    let ignores = ["*.log\n!keep.log\n", "**/a\nb/**\n/c/\n# no\n", "[a-z]?\\*\n!**/x\n../y\n"];
    write("dockerfile_ignore", ignores.map(|text| format!("b/keep.log\0{text}").into_bytes()).into())
}

/// Config, manifest and index, of OCI and of Docker, with names in the place of digests (see the target).
fn manifests() -> Vec<Vec<u8>> {
    let layer = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    let config = |os: &str| {
        format!(
            r#"{{"architecture":"amd64","os":"{os}","config":{{"Env":["A=b"],"Cmd":["x"]}},"rootfs":{{"type":"layers","diff_ids":["{layer}"]}},"history":[{{"created_by":"x"}}]}}"#
        )
    };
    let manifest = |prefix: &str, manifest: &str, config: &str, gzip: &str| {
        format!(
            r#"{{"schemaVersion":2,"mediaType":"{prefix}{manifest}","config":{{"mediaType":"{prefix}{config}","digest":"@0","size":#0}},"layers":[{{"mediaType":"{prefix}{gzip}","digest":"{layer}","size":0}}],"annotations":{{"a":"b"}}}}"#
        )
    };
    let index = |prefix: &str, index: &str, manifest: &str| {
        format!(
            r#"{{"schemaVersion":2,"mediaType":"{prefix}{index}","manifests":[{{"mediaType":"{prefix}{manifest}","digest":"@1","size":#1,"platform":{{"os":"linux","architecture":"arm","variant":"v7"}}}},{{"mediaType":"{prefix}{manifest}","digest":"@1","size":#1,"platform":{{"os":"linux","architecture":"amd64"}}}}]}}"#
        )
    };
    let (oci, docker) = ("application/vnd.oci.image.", "application/vnd.docker.");
    let of_oci = (
        manifest(oci, "manifest.v1+json", "config.v1+json", "layer.v1.tar+zstd"),
        index(oci, "index.v1+json", "manifest.v1+json"),
    );
    let of_docker = (
        manifest(
            docker,
            "distribution.manifest.v2+json",
            "container.image.v1+json",
            "image.rootfs.diff.tar.gzip",
        ),
        index(docker, "distribution.manifest.list.v2+json", "distribution.manifest.v2+json"),
    );
    let untyped = of_oci.0.replacen(r#""mediaType":"application/vnd.oci.image.manifest.v1+json","#, "", 1);
    [of_oci.clone(), of_docker, (untyped, of_oci.1)]
        .into_iter()
        .map(|(manifest, index)| [config("linux"), manifest, index].join("\0").into_bytes())
        .collect()
}
