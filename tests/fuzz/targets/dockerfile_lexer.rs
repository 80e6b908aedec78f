//! The lexer: line ends, a byte-order mark and empty lines at the end change nothing, and every place is in the file.
#![no_main]

use dockerfile::Dockerfile;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let parse = |bytes: &[u8]| {
        Dockerfile::parse("D", bytes)
            .map(|file| (file.directives.clone(), file.global_args.clone(), file.stages.clone()))
            .map_err(|error| (error.at, error.reason.to_string()))
    };
    let plain = parse(input);
    let lines = input.split(|byte| *byte == b'\n').count();
    if let Err((at, _)) = &plain {
        assert!((1..=lines).contains(&at.line) && at.column >= 1, "{at}");
    }
    if !input.starts_with(b"\xef\xbb\xbf") {
        let marked = [b"\xef\xbb\xbf", input].concat();
        assert_eq!(parse(&marked).is_ok(), plain.is_ok());
    }
    // In the body of a heredoc a line end is content.
    let Ok(text) = std::str::from_utf8(input) else { return };
    if !text.contains('\r') && !text.contains("<<") {
        assert_eq!(parse(text.replace('\n', "\r\n").as_bytes()), plain);
    }
});
