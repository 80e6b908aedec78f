//! Commands in a sandbox: output, input, exit codes, users.

use e2e::{Channel, DEADLINE, TestSandbox};
use envd_proto::process::{ProcessConfig, Signal, StartRequest};
use sandbox_folder::client::{Exit, Output};

#[tokio::test]
async fn output_errors_and_exit_codes_are_carried_on_every_channel() {
    for channel in Channel::ALL {
        let sandbox = TestSandbox::start(channel).await;
        let done = sandbox.sh("echo out; echo err >&2; exit 7").await;
        assert_eq!((done.stdout.as_slice(), done.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
        assert_eq!(done.exit, Exit::Code(7));
        assert_eq!(sandbox.sh("kill -9 $$").await.exit, Exit::Signal(9));
        sandbox.stop().await;
    }
}

#[tokio::test]
async fn input_reaches_the_process_and_its_end_too() {
    for channel in Channel::ALL {
        let sandbox = TestSandbox::start(channel).await;
        let config = ProcessConfig { cmd: "cat".into(), ..Default::default() };
        let request = StartRequest { process: Some(config), ..Default::default() };
        let mut process = sandbox.client().start(request).await.unwrap();
        let mut stdin = process.stdin();
        stdin.write("first\n".into()).await.unwrap();
        assert_eq!(process.next().await.unwrap(), Output::Stdout("first\n".into()));
        stdin.write(vec![b'x'; 1_000_000].into()).await.unwrap();
        stdin.close().await.unwrap();
        let done = tokio::time::timeout(DEADLINE, process.output()).await.unwrap().unwrap();
        assert_eq!((done.stdout.len(), done.exit), (1_000_000, Exit::Code(0)));
        sandbox.stop().await;
    }
}

#[tokio::test]
async fn a_process_is_listed_signalled_and_gone() {
    let sandbox = TestSandbox::start(Channel::Serial).await;
    let client = sandbox.client();
    let config = ProcessConfig { cmd: "sleep".into(), args: vec!["1000".into()], ..Default::default() };
    let request = StartRequest { process: Some(config), tag: Some("nap".into()), ..Default::default() };
    let process = client.start(request).await.unwrap();
    let listed = client.processes().await.unwrap();
    assert_eq!((listed[0].pid, listed[0].tag.as_deref()), (process.pid(), Some("nap")));
    process.signal(Signal::Sigterm).await.unwrap();
    assert_eq!(process.output().await.unwrap().exit, Exit::Signal(15));
    assert!(client.processes().await.unwrap().is_empty());
    sandbox.stop().await;
}

#[tokio::test]
async fn a_user_of_the_image_is_who_the_process_runs_as() {
    let sandbox = TestSandbox::start(Channel::Serial).await;
    let user = sandbox.client().with_user("user");
    let done =
        user.output("/bin/sh", ["-c", "id -u; id -G; echo $HOME $USER; pwd; touch /etc/x"]).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&done.stdout), "1000\n1000 27\n/home/user user\n/home/user\n");
    assert_ne!(done.exit.code(), 0, "an ordinary user does not write to /etc");
    let nobody = sandbox.client().with_user("nosuch").output("/bin/true", [""; 0]).await;
    assert!(nobody.unwrap_err().to_string().contains("invalid username: 'nosuch'"));
    sandbox.stop().await;
}

#[tokio::test]
async fn a_hundred_processes_at_once() {
    let sandbox = TestSandbox::start(Channel::Serial).await;
    let client = sandbox.client();
    let running: Vec<_> = (0..100)
        .map(|n| {
            let client = client.clone();
            tokio::spawn(async move {
                client.output("/bin/sh", ["-c".to_owned(), format!("echo {n}; exit {n}")]).await
            })
        })
        .collect();
    for (n, process) in running.into_iter().enumerate() {
        let done = tokio::time::timeout(DEADLINE, process).await.unwrap().unwrap().unwrap();
        assert_eq!(String::from_utf8_lossy(&done.stdout), format!("{n}\n"));
        assert_eq!(usize::from(done.exit.code()), n);
    }
    // Nothing is left unreaped: what is visible is init, this shell and what it runs.
    assert_eq!(sandbox.stdout("grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l").await, "0\n");
    sandbox.stop().await;
}
