//! The log's promises, with time that only goes on when everybody waits.

use super::*;
use proptest::prelude::*;

fn paused() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap()
}

fn log(size: usize, policy: Policy) -> Arc<OutputLog> {
    OutputLog::new(size, policy, &Arc::new(Budget::default()))
}

fn attach(log: &Arc<OutputLog>) -> Reader {
    log.attach(None).unwrap().reader
}

/// Everything up to the end, with the numbers of dropped bytes beside it.
async fn drain(reader: &mut Reader) -> (Vec<u8>, u64) {
    let (mut all, mut lost) = (Vec::new(), 0);
    loop {
        match reader.next().await {
            Item::Data { bytes, dropped, .. } => {
                all.extend_from_slice(&bytes);
                lost += dropped;
            }
            Item::End(_) => return (all, lost),
        }
    }
}

fn numbered(length: usize) -> Vec<u8> {
    (0..length).map(|n| (n % 251) as u8).collect()
}

/// Writes `total` bytes in pieces, then ends.
fn writer(log: &Arc<OutputLog>, total: usize) -> tokio::task::JoinHandle<()> {
    let log = Arc::clone(log);
    tokio::spawn(async move {
        for piece in numbered(total).chunks(777) {
            log.append(Stream::Stdout, piece).await;
        }
        log.close();
        log.finish(End::Exited(0));
    })
}

#[tokio::test]
async fn output_is_kept_after_it_was_read_and_after_the_end() {
    let log = log(DEFAULT_SIZE, Policy::Paced);
    let mut reader = attach(&log);
    log.append(Stream::Stdout, b"out").await;
    log.append(Stream::Stderr, b"err").await;
    log.finish(End::Exited(3));
    let data = |stream, bytes| Item::Data { stream, bytes: Bytes::from_static(bytes), dropped: 0 };
    assert_eq!(reader.next().await, data(Stream::Stdout, b"out"));
    assert_eq!(reader.next().await, data(Stream::Stderr, b"err"));
    assert_eq!(reader.next().await, Item::End(End::Exited(3)));
    assert_eq!(attach(&log).next().await, Item::End(End::Exited(3)));
    let mut again = log.attach(Some(1)).unwrap();
    assert_eq!((again.offset, again.dropped), (1, 0));
    assert_eq!(again.reader.next().await, data(Stream::Stdout, b"ut"));
    assert_eq!(log.attach(Some(7)).unwrap_err(), AttachError::Beyond { offset: 7, end: 6 });
}

#[tokio::test]
async fn without_readers_the_newest_is_kept_and_nobody_waits() {
    let log = log(MIN_SIZE, Policy::Paced);
    let all = numbered(100_000);
    for piece in all.chunks(1000) {
        log.append(Stream::Stdout, piece).await;
    }
    log.finish(End::Exited(0));
    let mut late = log.attach(Some(10)).unwrap();
    assert_eq!(late.offset, 10 + late.dropped);
    let (kept, lost) = drain(&mut late.reader).await;
    assert!(kept.len() > MIN_SIZE - 1100 && kept.len() <= MIN_SIZE, "{}", kept.len());
    assert_eq!((kept.as_slice(), lost), (&all[late.offset as usize..], 0));
}

#[test]
fn a_dead_reader_holds_up_nobody_and_is_told_what_it_missed() {
    paused().block_on(async {
        let log = log(MIN_SIZE, Policy::Paced);
        let mut dead = attach(&log);
        let mut quick = attach(&log);
        let started = tokio::time::Instant::now();
        let writer = writer(&log, 50_000);
        assert_eq!(drain(&mut quick).await, (numbered(50_000), 0));
        writer.await.unwrap();
        assert_eq!(started.elapsed(), Duration::ZERO, "nobody waited for the dead reader");
        let (rest, lost) = drain(&mut dead).await;
        assert!(lost > 0);
        assert_eq!(rest, numbered(50_000)[lost as usize..]);
    });
}

#[test]
fn readers_of_one_speed_lose_nothing_to_each_other() {
    paused().block_on(async {
        let log = log(64 << 10, Policy::Paced);
        let readers: Vec<_> = (0..4).map(|_| attach(&log)).collect();
        let writer = writer(&log, 1_000_000);
        let readers: Vec<_> = readers
            .into_iter()
            .map(|mut reader| {
                tokio::spawn(async move {
                    let (mut all, mut lost) = (Vec::new(), 0);
                    loop {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                        match reader.next().await {
                            Item::Data { bytes, dropped, .. } => {
                                all.extend_from_slice(&bytes);
                                lost += dropped;
                            }
                            Item::End(_) => return (all, lost),
                        }
                    }
                })
            })
            .collect();
        for reader in readers {
            assert!(reader.await.unwrap() == (numbered(1_000_000), 0));
        }
        writer.await.unwrap();
    });
}

#[test]
fn readers_that_all_stall_hold_the_process_for_the_stall_limit_only() {
    paused().block_on(async {
        let log = log(MIN_SIZE, Policy::Paced);
        let mut stalled = attach(&log);
        let started = tokio::time::Instant::now();
        writer(&log, 50_000).await.unwrap();
        let waited = started.elapsed();
        assert!(waited >= STALL_LIMIT && waited < 2 * STALL_LIMIT, "once, not for each piece: {waited:?}");
        let (rest, lost) = drain(&mut stalled).await;
        assert_eq!(rest, numbered(50_000)[lost as usize..]);
    });
}

#[test]
fn dropping_never_waits() {
    paused().block_on(async {
        let log = log(MIN_SIZE, Policy::Drop);
        let mut slow = attach(&log);
        let started = tokio::time::Instant::now();
        writer(&log, 50_000).await.unwrap();
        assert_eq!(started.elapsed(), Duration::ZERO);
        let (rest, lost) = drain(&mut slow).await;
        assert_eq!(rest, numbered(50_000)[lost as usize..]);
    });
}

#[test]
fn blocking_waits_for_a_reader_and_for_every_reader() {
    paused().block_on(async {
        let log = log(MIN_SIZE, Policy::Block);
        let writer = writer(&log, 50_000);
        tokio::time::sleep(Duration::from_secs(100_000)).await;
        assert!(!writer.is_finished(), "nobody reads");
        let mut first = log.attach(Some(0)).unwrap().reader;
        let mut second = log.attach(Some(0)).unwrap().reader;
        let first = tokio::spawn(async move { drain(&mut first).await });
        tokio::time::sleep(Duration::from_secs(100_000)).await;
        assert!(!writer.is_finished(), "the second reader has not got it");
        assert_eq!(drain(&mut second).await, (numbered(50_000), 0));
        assert_eq!(first.await.unwrap(), (numbered(50_000), 0));
        writer.await.unwrap();
    });
}

#[test]
fn the_end_does_not_wait_for_ever() {
    paused().block_on(async {
        let log = log(MIN_SIZE, Policy::Block);
        log.append(Stream::Stdout, &numbered(4000)).await;
        let writing = tokio::spawn({
            let log = Arc::clone(&log);
            async move { log.append(Stream::Stdout, &[7; 64 << 10]).await }
        });
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert!(!writing.is_finished());
        // A kill: the process is gone, and what it had written before is not lost.
        log.close();
        writing.await.unwrap();
        log.append(Stream::Stderr, &[8; 64 << 10]).await;
        log.finish(End::Signalled(9));
        let mut reader = log.attach(Some(0)).unwrap();
        assert_eq!(reader.dropped, 0);
        assert_eq!(drain(&mut reader.reader).await.0.len(), 4000 + (128 << 10));
        // What is more than a pipe can hold waits for the stall limit at the most.
        let started = tokio::time::Instant::now();
        log.append(Stream::Stdout, &vec![9; 1 << 20]).await;
        let waited = started.elapsed();
        assert!(waited >= STALL_LIMIT && waited < 2 * STALL_LIMIT, "{waited:?}");
    });
}

#[tokio::test]
async fn readers_are_counted() {
    let log = log(MIN_SIZE, Policy::Paced);
    let mut readers: Vec<_> = (0..MAX_READERS).map(|_| attach(&log)).collect();
    assert_eq!(log.attach(None).unwrap_err(), AttachError::TooMany);
    readers.pop();
    attach(&log);
}

#[tokio::test]
async fn logs_share_a_budget_and_ended_ones_give_back_first() {
    let pool = 256 << 10;
    let budget = Arc::new(Budget::new(pool));
    let ended: Vec<_> = (0..4)
        .map(|_| {
            let log = OutputLog::new(1 << 20, Policy::Paced, &budget);
            log.try_append(Stream::Stdout, &numbered(60 << 10));
            log
        })
        .collect();
    for log in &ended {
        log.finish(End::Exited(0));
    }
    let live = OutputLog::new(1 << 20, Policy::Paced, &budget);
    live.append(Stream::Stdout, &numbered(100 << 10)).await;
    let kept = |log: &Arc<OutputLog>| log.lock().ring.size();
    assert!(kept(&live) >= 100 << 10, "{}", kept(&live));
    assert!(kept(&ended[0]) <= MIN_SHARE, "the first that ended gave back");
    assert!(kept(&ended[3]) > MIN_SHARE, "the last that ended did not have to");

    // Nobody reads, so nobody waits, and the pool bounds them all.
    let others: Vec<_> = (0..20).map(|_| OutputLog::new(1 << 20, Policy::Paced, &budget)).collect();
    for log in &others {
        log.append(Stream::Stdout, &numbered(100 << 10)).await;
        assert!(kept(log) > MIN_SHARE - 2 * 1024);
    }
    let total: usize = others.iter().chain(&ended).chain([&live]).map(kept).sum();
    assert!(total <= pool + 25 * MIN_SHARE, "{total}");
    drop((others, ended, live));
    assert!(budget.take(pool, u64::MAX, &Weak::new()), "everything came back");
}

proptest! {
    #[test]
    fn a_slow_sole_reader_holds_the_writer_and_loses_nothing(
        sizes in prop::collection::vec((any::<bool>(), 1usize..3000), 1..60),
        pauses in prop::collection::vec(0u64..9, 1..20),
        block in any::<bool>(),
    ) {
        paused().block_on(async {
            let log = log(MIN_SIZE, if block { Policy::Block } else { Policy::Paced });
            let mut reader = attach(&log);
            let mut expected: Vec<(Stream, u8)> = Vec::new();
            let mut pieces = Vec::new();
            for (n, (out, size)) in sizes.into_iter().enumerate() {
                let stream = if out { Stream::Stdout } else { Stream::Stderr };
                pieces.push((stream, vec![n as u8; size]));
                expected.extend(std::iter::repeat_n((stream, n as u8), size));
            }
            let writer = tokio::spawn({
                let log = Arc::clone(&log);
                async move {
                    for (stream, piece) in pieces {
                        log.append(stream, &piece).await;
                        assert!(log.lock().ring.size() <= MIN_SIZE);
                    }
                    log.finish(End::Exited(0));
                }
            });
            let mut got = Vec::new();
            for pause in pauses.iter().cycle() {
                tokio::time::sleep(Duration::from_secs(*pause)).await;
                match reader.next().await {
                    Item::Data { stream, bytes, dropped } => {
                        assert_eq!(dropped, 0);
                        got.extend(bytes.iter().map(|byte| (stream, *byte)));
                    }
                    Item::End(end) => {
                        assert_eq!(end, End::Exited(0));
                        break;
                    }
                }
            }
            assert!(got == expected);
            writer.await.unwrap();
        });
    }

    /// However readers come, go and dawdle: each gets the true bytes at their true offsets, and knows what it missed.
    #[test]
    fn offsets_add_up_for_every_reader(
        total in 1usize..60_000,
        readers in prop::collection::vec((0u64..60_000, prop::collection::vec(0u64..30, 1..6)), 1..5),
        policy in prop_oneof![Just(Policy::Paced), Just(Policy::Drop)],
    ) {
        paused().block_on(async {
            let log = log(MIN_SIZE, policy);
            let writer = writer(&log, total);
            let all = numbered(total);
            let tasks: Vec<_> = readers.into_iter().map(|(from, pauses)| {
                let (log, all) = (Arc::clone(&log), all.clone());
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_secs(from % 7)).await;
                    let from = from.min(log.lock().ring.end());
                    let Attached { mut reader, offset, dropped, end } = log.attach(Some(from)).unwrap();
                    assert!(end >= offset);
                    assert_eq!(offset, from + dropped);
                    let mut at = offset as usize;
                    for pause in pauses.iter().cycle() {
                        tokio::time::sleep(Duration::from_secs(*pause)).await;
                        match reader.next().await {
                            Item::Data { bytes, dropped, .. } => {
                                at += dropped as usize;
                                assert!(bytes == all[at..at + bytes.len()]);
                                at += bytes.len();
                            }
                            Item::End(_) => break,
                        }
                    }
                    assert_eq!(at, all.len());
                })
            }).collect();
            for task in tasks {
                task.await.unwrap();
            }
            writer.await.unwrap();
        });
    }
}
