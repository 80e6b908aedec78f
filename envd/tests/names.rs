//! Names that are not UTF-8, in calls about processes.

mod support;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;

use support::{Agent, start};

#[tokio::test]
async fn a_directory_whose_name_is_not_utf8_can_be_a_cwd() {
    let agent = Agent::start().await;
    // As it is listed (U+EF00 + 0xff), and one whose name is that character itself, which is listed in three.
    for (name, shown) in [(&b"a\xff"[..], "a\u{efff}"), ("b\u{efff}".as_bytes(), "b\u{efee}\u{efbf}\u{efbf}")]
    {
        let path = agent.folder.path().join(OsStr::from_bytes(name));
        fs::create_dir(&path).unwrap();
        let mut request = start("/bin/sh", &["-c", "pwd"]);
        request.process.as_mut().unwrap().cwd = Some(agent.path(shown));
        let done = agent.start_process(request).await.finish().await;
        assert_eq!(done.stdout, [path.as_os_str().as_bytes(), b"\n"].concat(), "{shown:?}");
    }
    let mut request = start("/bin/sh", &["-c", "pwd"]);
    request.process.as_mut().unwrap().cwd = Some(agent.path("c\u{efff}"));
    let error = agent.start_process(request).await.rest().await.error.unwrap();
    assert!(error.contains("invalid_argument") && error.contains("c\u{efff}' does not exist"), "{error}");
}
