//! What the agent does when nothing happens: nothing.
//!
//! A machine without a container, where /proc shows the agent itself and what it has started: how often each of its threads
//! has gone to sleep.

use super::*;

/// Host-shim's own command line, but for the container.
const NO_CONTAINER: [&str; 2] = ["-append", "console=ttyS0 quiet panic=-1 reboot=t envd.container=none"];

/// The image's busybox, which is static: the agent's own root has no programs.
const BUSYBOX: &str = "/run/envd-box/rootfs/bin/busybox";

/// Threads that were busy with the start of this script may stay for 10 s (their pools say so); then 10 s in which nothing
/// happens. Process 1 is the agent; its children but the script are the spawner.
const LOOK: &str = "b=/run/envd-box/rootfs/bin/busybox
look() {
    for status in /proc/1/task/*/status /proc/$PPID/status; do
        $b awk -v at=$status '/^Name/ {name = $2} /^voluntary/ {print name, at, $2}' $status
    done
}
$b sleep 15
before=$(look)
$b sleep 10
after=$(look)
echo \"$before\"
echo --
echo \"$after\"";

/// How often each thread of the agent and its spawner has gone to sleep while nothing happened.
async fn sleeps(client: &SandboxClient) -> Vec<(String, i64)> {
    let done = timely("a look", client.output(BUSYBOX, ["sh", "-c", LOOK])).await.expect("busybox runs");
    let text = String::from_utf8(done.stdout).expect("text");
    let (before, after) = text.split_once("--\n").expect("two looks");
    let counts = |text: &str| -> HashMap<String, i64> {
        let lines = text.lines().map(|line| line.rsplit_once(' ').expect("a count"));
        lines.map(|(thread, count)| (thread.to_owned(), count.parse().expect("a number"))).collect()
    };
    let before = counts(before);
    assert!(before.len() >= 5, "the agent's threads were found: {text}");
    counts(after).into_iter().map(|(thread, count)| (thread.clone(), count - before[&thread])).collect()
}

#[tokio::test]
async fn an_idle_agent_sleeps() {
    let lab = Lab::new(NO_CONTAINER.into());
    let source = Owned::boot(&lab, Configure { default_workdir: "/".into(), ..Configure::default() }).await;
    for (thread, count) in sleeps(&source.client).await {
        assert_eq!(count, 0, "{thread} woke up in 10 s in which nothing happened");
    }
}
