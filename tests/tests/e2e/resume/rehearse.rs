//! A machine that waits as nobody's, was rehearsed, and becomes somebody's: what a pool is made of.
//!
//! ```text
//! restore ──► Resume (dummy) ──► Rehearse ──► waits, frozen ──► Resume (the owner's) ──► Thaw ──► first exec
//! ```

use std::time::{Duration, Instant};

use envd_proto::control::{Rehearse, Rehearsed, response};

use super::*;

/// Machines from one snapshot, for a median.
const MACHINES: u8 = 5;

/// Execs in one that runs, for a median.
const EXECS: usize = 15;

fn median(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort_unstable();
    times[times.len() / 2]
}

async fn rehearse(host: &mut Host) -> Rehearsed {
    match host.ask(Request::Rehearse(Rehearse {})).await.expect("a rehearsal") {
        Some(response::Result::Rehearsed(rehearsed)) => rehearsed,
        other => panic!("{other:?}"),
    }
}

/// The stream of the mux port, for a session that is not its last.
fn again(stream: tokio::net::UnixStream) -> (tokio::net::UnixStream, tokio::net::UnixStream) {
    let stream = stream.into_std().expect("a socket");
    let other = stream.try_clone().expect("a socket");
    let [one, two] =
        [stream, other].map(|stream| tokio::net::UnixStream::from_std(stream).expect("a socket"));
    (one, two)
}

fn shown(resumed: &Resumed) -> String {
    let parts = resumed.parts.iter().map(|part| format!("{} {}", part.name, part.duration_us));
    parts.collect::<Vec<_>>().join(", ")
}

async fn exec(client: &SandboxClient) -> Duration {
    let began = Instant::now();
    let done = timely("an exec", client.output("/bin/true", [""; 0])).await.expect("the command runs");
    assert_eq!(done.exit.code(), 0);
    began.elapsed()
}

/// Restores a machine, and has it wait as nobody's.
async fn park(lab: &Lab, snapshot: &Snapshot, name: &str) -> (Machine, Host, tokio::net::UnixStream) {
    let (machine, mut host, mux) = restored(lab, snapshot, name).await;
    let resumed =
        host.resume(Kind::Clone, 1, LATER, Some(Configure { network: None, ..tenant("dummy", 100) })).await;
    println!("{name}: the first Resume: {}", shown(&resumed));
    let rehearsed = rehearse(&mut host).await;
    println!("{name}: rehearsed in {} us", rehearsed.duration_us);
    assert_eq!(rehearsed.not_executed, "");
    // The port of the streams was not used since the restore.
    let (mux, other) = again(mux);
    let dummy = connect_mux(mux, 2).await;
    timely("health", client(&dummy).health()).await.expect("health is always answered");
    (machine, host, other)
}

/// Makes a machine that waits, or was just restored, somebody's; what it takes to the end of the first exec.
async fn take(
    host: &mut Host,
    mux: tokio::net::UnixStream,
    owner_of: Configure,
) -> (SandboxClient, Duration) {
    let began = Instant::now();
    let token = owner_of.access_token.clone();
    let asked = host.begin_resume(Kind::Clone, 2, LATER, Some(owner_of)).await;
    // Without a wait: it is of a generation that only an accepted Resume begins.
    let thaw = host.send(host.generation, Request::Thaw(Thaw {})).await;
    let resumed = host.resumed(asked).await;
    let answered = began.elapsed();
    let generation = host.generation;
    let (mux, thawed) = tokio::join!(connect_mux(mux, generation), host.answer(generation, thaw));
    assert!(thawed.is_ok(), "{thawed:?}");
    let client = owner(&mux, token.as_deref());
    let thawed = began.elapsed();
    let executed = exec(&client).await;
    println!("resumed at {answered:?}, thawed at {thawed:?}, exec {executed:?}: {}", shown(&resumed));
    (client, began.elapsed())
}

#[tokio::test]
async fn a_rehearsed_machine_is_nearly_as_fast_as_one_that_runs() {
    let lab = Lab::new(Vec::new());
    let source = Owned::boot(&lab, tenant("source", 1)).await;
    let (snapshot, _) = source.into_snapshot(&lab, Freeze::default(), "user").await;
    let (mut parked, mut cold, mut warm) = (Vec::new(), Vec::new(), Vec::new());
    for number in 2..2 + MACHINES {
        let (mut machine, mut host, mux) = park(&lab, &snapshot, &format!("parked{number}")).await;
        let (client, time) =
            take(&mut host, mux, Configure { network: None, ..tenant("owner", number) }).await;
        parked.push(time);
        for _ in 0..EXECS {
            warm.push(exec(&client).await);
        }
        machine.stop().await;
        let (mut machine, mut host, mux) = restored(&lab, &snapshot, &format!("cold{number}")).await;
        cold.push(take(&mut host, mux, Configure { network: None, ..tenant("owner", number) }).await.1);
        machine.stop().await;
    }
    let [parked, cold, warm] = [parked, cold, warm].map(|times| median(&times));
    println!(
        "Resume, Thaw and first exec: {parked:?} from a machine that waits, {cold:?} from a restored one"
    );
    println!("an exec in a machine that runs: {warm:?}");
    assert!(parked < cold, "the rehearsal is of no use");
}

#[tokio::test]
async fn a_rehearsed_machine_is_as_fast_as_one_that_runs_and_nobody_saw_it() {
    let lab = Lab::new(Vec::new());
    let source = Owned::boot(&lab, tenant("source", 1)).await;
    write_file(&source.client, "/etc/tiffin/resume.d/look", HOOK).await;
    sh(&source.client, "chmod 755 /etc/tiffin/resume.d/look; mkdir -p /etc/ssh").await;
    let (counter, _) = start_printing(&source.client, COUNTER).await;
    let counter_pid = counter.pid();
    let (snapshot, cpu) = source.into_snapshot(&lab, Freeze::default(), "user").await;
    drop(counter);

    let (mut first, mut unrehearsed, mut warm) = (Vec::new(), Vec::new(), Vec::new());
    for number in 2..2 + MACHINES {
        let (mut machine, mut host, mux) = restored(&lab, &snapshot, &format!("parked{number}")).await;
        let resumed = host.resume(Kind::Clone, number, LATER, Some(tenant("dummy", 100))).await;
        println!("first resume: {}", shown(&resumed));
        let (mux, other) = again(mux);
        let dummy = connect_mux(mux, 2).await;
        let rehearsed = rehearse(&mut host).await;
        let once_more = rehearse(&mut host).await;
        println!("rehearsed in {} us, then {} us", rehearsed.duration_us, once_more.duration_us);
        assert_eq!((&*rehearsed.not_executed, &*once_more.not_executed), ("", ""));
        // Neither the tenant's processes nor its clients have a part in it.
        let nobody = owner(&dummy, Some("token-of-dummy"));
        assert_eq!(is_frozen(&mut host, &nobody, "user").await, cpu, "a rehearsal let it go on");
        drop((nobody, dummy));

        let name = format!("owner{number}");
        let began = Instant::now();
        let resumed = host.resume(Kind::Clone, number, LATER, Some(tenant(&name, number))).await;
        let answered = began.elapsed();
        let mux = connect_mux(other, 3).await;
        let client = owner(&mux, Some(&format!("token-of-{name}")));
        host.tell(Request::Thaw(Thaw {})).await;
        let thawed = began.elapsed();
        let executed = exec(&client).await;
        println!("second resume {answered:?}, thawed at {thawed:?}, exec {executed:?}: {}", shown(&resumed));
        first.push(began.elapsed());

        assert_all_done(&resumed, &PARTS);
        assert_eq!(pids(&client).await, [counter_pid], "nothing but the tenant's own is listed");
        for stranger in ["token-of-source", "token-of-dummy", ""] {
            let answer = timely("a list", owner(&mux, Some(stranger)).processes()).await;
            assert_eq!(refused(answer), Some(Code::Unauthenticated));
        }
        // Of the one before nothing is left.
        assert_eq!(
            sh(&client, "hostname; cat /etc/hostname; echo $TENANT").await,
            format!("{name}\n").repeat(3)
        );
        let addresses =
            sh(&client, "ip -o -4 address show eth0 | awk '{print $4}'; cat /etc/resolv.conf").await;
        assert_eq!(addresses, format!("10.0.{number}.2/24\nnameserver 10.0.{number}.53\n"));
        let ids = sh(&client, "cat /etc/machine-id /proc/sys/kernel/random/boot_id").await;
        assert_eq!(sh(&client, "cat /root/hook").await, format!("{name} 3 clone\n{name}\n{ids}frozen 1\n"));
        sh(&client, "touch /tmp/stop").await;
        for _ in 0..EXECS {
            warm.push(exec(&client).await);
        }
        refuses(
            &mut host,
            3,
            Request::Rehearse(Rehearse {}),
            error::Code::FailedPrecondition,
            "Freeze comes first",
        )
        .await;
        machine.stop().await;
    }
    for number in 20..22 {
        let (mut machine, mut host, mux) = restored(&lab, &snapshot, &format!("cold{number}")).await;
        let began = Instant::now();
        let resumed = host.resume(Kind::Clone, number, LATER, Some(tenant("cold", number))).await;
        let mux = connect_mux(mux, 2).await;
        host.tell(Request::Thaw(Thaw {})).await;
        let executed = exec(&owner(&mux, Some("token-of-cold"))).await;
        println!("without a rehearsal: {:?}, exec {executed:?}: {}", began.elapsed(), shown(&resumed));
        unrehearsed.push(began.elapsed());
        machine.stop().await;
    }
    println!(
        "Resume, Thaw and the first exec: {:?} rehearsed, {:?} not; an exec in a machine that runs: {:?}",
        median(&first),
        median(&unrehearsed),
        median(&warm)
    );
    assert!(median(&first) < median(&unrehearsed), "the rehearsal is of no use");
}

/// The spawner is then a process beside the init, or under a filter: it still has a name for its own executable.
#[tokio::test]
async fn every_kind_of_container_can_be_rehearsed() {
    for lab in [Lab::new(Vec::new()).with_init("/bin/init"), Lab::new(Vec::new()).restricted()] {
        let Owned { machine: _machine, mut host, mux: _mux, client } =
            Owned::boot(&lab, Configure::default()).await;
        let before = sh(&client, "ls /root /tmp; mount").await;
        host.tell(Request::Freeze(Freeze { skip_sync: true, ..Freeze::default() })).await;
        for _ in 0..2 {
            assert_eq!(rehearse(&mut host).await.not_executed, "");
        }
        host.tell(Request::Thaw(Thaw {})).await;
        assert_eq!(sh(&client, "ls /root /tmp; mount").await, before);
        assert!(pids(&client).await.is_empty());
    }
}
