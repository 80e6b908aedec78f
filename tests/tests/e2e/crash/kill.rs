//! The shim, its reaper or both are killed.
//!
//! strace kills the shim when it enters the N-th call of a name: before a rename, before an fsync, with a file open and
//! nothing in it. Which calls a verb makes is recorded first, by strace too. It lets go of the shim's children when they
//! execute something (`-b execve`): QEMU and the reaper live as they would.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use e2e::{TestSandbox, binary};
use serde_json::{Value, json};

use super::host::{kill, pid_of};
use super::{Case, Host, Phase, every, until};

/// Calls that change files, or tell QEMU what to do.
const CALLS: &str = "rename,renameat2,unlink,unlinkat,mkdir,linkat,fsync,fdatasync,openat,ftruncate,fchmod,bind,sendmsg,pwrite64,write";

/// Steps of each verb that are tried, where not all are.
const SAMPLE: usize = 7;

/// Kill points of one name that are tried at most: the bytes of a RAM are written by many calls like each other.
const MAX_OF_NAME: usize = 40;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verb {
    Boot,
    Create,
    Park,
    Resume,
    Configure,
    Pause,
    Snapshot,
    Fork,
    Stop,
    Warm,
}

/// The N-th call of a name in a thread.
type Step = (String, usize);

impl Verb {
    /// Whether the verb starts the shim; else it is asked of one that runs.
    fn starts(self) -> bool {
        matches!(self, Self::Boot | Self::Create | Self::Park | Self::Resume | Self::Warm)
    }
}

/// What is the same for all the cases of a verb.
struct Verbs<'a> {
    host: &'a Host,
    verb: Verb,
    /// A sandbox that is paused, for those that resume it.
    paused: Option<Case<'a>>,
}

impl<'a> Verbs<'a> {
    fn new(host: &'a Host, verb: Verb) -> Self {
        let paused = (verb == Verb::Resume).then(|| {
            let mut case = host.case();
            case.start(&[]);
            case.mark();
            assert_eq!(case.call("pause", &json!({})).expect("an answer").0, 200);
            assert_eq!(case.ended().0, Some(3));
            case
        });
        Self { host, verb, paused }
    }

    /// A sandbox of which the verb can be asked.
    fn ready(&self) -> Case<'a> {
        let mut case = self.host.case();
        match (self.verb, &self.paused) {
            (Verb::Resume, Some(paused)) => {
                let done = Command::new("cp")
                    .arg("-alT")
                    .arg(&paused.dir)
                    .arg(&case.dir)
                    .arg("--remove-destination")
                    .status();
                assert!(done.expect("cp runs").success());
                // Of files that are replaced a link is as good as a copy; of the lock it is not.
                fs::remove_file(case.dir.join("lock")).expect("the lock");
            }
            (Verb::Configure, _) => drop(case.start(&["--park"])),
            (verb, _) if verb.starts() => {}
            _ => {
                case.start(&[]);
                case.mark();
            }
        }
        case
    }

    /// Starts the verb under strace, and gives what it said when it ended: nothing if it was killed.
    fn start(&self, case: &mut Case<'_>, strace: &[&str]) -> Result<Value, String> {
        let mut command = Command::new("strace");
        command.args(["-f", "-b", "execve", "-qqq"]).args(strace).arg(binary("host-shim"));
        match self.verb {
            Verb::Warm => command.args(["template", "warm", "--accel", "tcg", "--json", "e2e"]),
            Verb::Park => command.args(case.run(&["--park"])),
            Verb::Resume => command.args(case.run(&["--resume"])),
            Verb::Boot => {
                let spec = case.dir.join("spec.json");
                let mut asked: Value =
                    serde_json::from_slice(&fs::read(&spec).expect("a spec")).expect("JSON");
                asked["restore"] = "never".into();
                fs::write(spec, asked.to_string()).expect("the spec is written");
                command.args(case.run(&[]))
            }
            _ => command.args(case.run(&[])),
        };
        self.host.prepare(&mut command);
        case.spawn(command)
    }

    /// Asks the verb of a sandbox that runs; what was answered, or nothing if the shim was killed.
    fn ask(&self, case: &Case<'_>) -> Option<(u16, Value)> {
        let name = case.dir.file_name().expect("a name").to_str().expect("ASCII").to_owned();
        match self.verb {
            Verb::Configure => case.call("configure", &json!({ "id": name, "env": { "A": "b" } })),
            Verb::Pause => case.call("pause", &json!({})),
            Verb::Snapshot => {
                case.call("snapshot", &json!({ "path": self.host.data().join("templates").join(name) }))
            }
            Verb::Fork => case.call("fork", &json!({ "path": self.host.path("forks").join(name) })),
            _ => case.call("stop", &json!({ "grace_ms": 0 })),
        }
    }

    /// The steps of the verb.
    fn steps(&self) -> Vec<Step> {
        let mut case = self.ready();
        let trace = self.host.path("trace");
        let strace = ["-e", &format!("trace={CALLS}"), "-o", trace.to_str().expect("ASCII")];
        if self.verb.starts() {
            self.start(&mut case, &strace).expect("the verb succeeds");
            let traced = case.shim.as_ref().map(|strace| strace.id());
            if let (Some(_), Some(state)) = (traced, case.state()) {
                kill(pid_of(u32::try_from(state["shim_pid"].as_u64().expect("a shim")).expect("a pid")));
            }
        } else {
            let tracing = attach(&case, &strace);
            let (status, said) = self.ask(&case).expect("an answer");
            assert!(status < 300, "{said}");
            if matches!(self.verb, Verb::Pause | Verb::Stop) {
                case.ended();
            } else {
                kill(case.pid());
            }
            ended(tracing);
        }
        case.settle(true);
        case.remove();
        recorded(&fs::read_to_string(trace).expect("the trace"))
    }

    /// One case: the shim is killed at a step, and the reaper before it if it is to be.
    fn killed_at(&self, (name, number): &Step, reaper_too: bool) -> Phase {
        let mut case = self.ready();
        let inject = format!("inject={name}:signal=KILL:when={number}");
        let strace = ["-e", &format!("trace={name}"), "-e", &inject, "-o", "/dev/null"];
        if self.verb.starts() {
            match self.start(&mut case, &strace) {
                // This time it came to its end before the step.
                Ok(_) => case.kill_traced(),
                Err(said) => assert!(said.contains("signal: 9"), "{said}"),
            }
        } else {
            let reaper = case.reaper();
            if reaper_too {
                kill(reaper);
            }
            let tracing = attach(&case, &strace);
            let answered = self.ask(&case);
            if !matches!(self.verb, Verb::Pause | Verb::Stop) && answered.is_some() {
                kill(case.pid());
            }
            case.ended();
            ended(tracing);
        }
        let phase = case.settle(reaper_too);
        self.look(&mut case, phase, reaper_too);
        phase
    }

    fn look(&self, case: &mut Case<'_>, phase: Phase, reaper_too: bool) {
        let host = self.host;
        if self.verb == Verb::Resume {
            assert_ne!(phase, Phase::Unsaid);
        }
        if reaper_too {
            // What the next one of this kind sweeps.
            host_shim::snapshot::sweep(&host.path("forks")).expect("it can be swept");
            template::sweep(&host.data().join("templates")).expect("it can be swept");
        }
        if self.verb == Verb::Warm {
            host_shim::snapshot::sweep(&host.template().join("snapshots")).expect("it can be swept");
        } else {
            host.assert_template_unchanged();
        }
        host.assert_nothing_unfinished();
        let name = case.dir.file_name().expect("a name").to_owned();
        let fork = host.path("forks").join(&name);
        if fork.exists() {
            host_shim::snapshot::SnapshotFolder::open(&fork).expect("a whole snapshot");
            fs::remove_dir_all(fork).expect("it is removed");
        }
        let made = host.data().join("templates").join(&name);
        if made.exists() {
            let spec = case.dir.join("spec.json");
            let asked = json!({ "schema_version": 1, "template": made, "accelerator": "tcg" });
            fs::write(spec, asked.to_string()).expect("the spec is written");
            assert_eq!(case.start(&[])["start"], "cloned");
            case.assert_marked();
            case.settle(false);
            fs::remove_dir_all(made).expect("it is removed");
        } else {
            case.assert_resumes(phase);
        }
    }
}

impl Case<'_> {
    /// Kills the shim of which strace is the parent.
    fn kill_traced(&mut self) {
        if let Some(shim) = self.state().and_then(|state| state["shim_pid"].as_u64()) {
            kill(pid_of(u32::try_from(shim).expect("a pid")));
        }
        if self.shim.is_some() {
            self.ended();
        }
    }
}

/// Attaches strace to all threads of a shim.
fn attach(case: &Case<'_>, strace: &[&str]) -> Child {
    let shim = case.pid().as_raw_nonzero().to_string();
    let mut tracing = Command::new("strace")
        .args(["-f", "-b", "execve", "-p", &shim])
        .args(strace)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("strace (package strace) is installed");
    let mut said = BufReader::new(tracing.stderr.take().expect("a pipe"));
    let mut line = String::new();
    said.read_line(&mut line).expect("text");
    assert!(line.contains("attached"), "{line}");
    // It must not wait for a reader of what it says more.
    std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
    tracing
}

/// Waits for the end of strace, which comes with the shim's.
fn ended(mut tracing: Child) {
    until("strace ends", || tracing.try_wait().expect("a child").is_some());
}

/// The steps in a trace: for each call that changes something, its number among those of its name in its thread.
fn recorded(trace: &str) -> Vec<Step> {
    let mut counts: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    let mut steps = BTreeSet::new();
    for line in trace.lines() {
        let Some((thread, call)) = line.split_once(' ') else { continue };
        let call = call.trim_start();
        let Some((name, rest)) = call.split_once('(') else { continue };
        if call.starts_with("<...") || call.starts_with("+++") || call.starts_with("---") {
            continue;
        }
        let count = counts.entry((thread, name)).or_default();
        *count += 1;
        let changes = match name {
            "openat" => rest.contains("O_CREAT"),
            // What wakes a thread, and what is said on a standard stream.
            "write" => {
                !rest.contains("\\1\\0\\0\\0\\0\\0\\0\\0\"")
                    && !rest.starts_with("1,")
                    && !rest.starts_with("2,")
            }
            _ => !rest.contains("ENOENT"),
        };
        if changes && *count <= MAX_OF_NAME {
            steps.insert((name.to_owned(), *count));
        }
    }
    steps.into_iter().collect()
}

/// Some of the steps, spread over all of them.
fn sample(steps: Vec<Step>) -> Vec<Step> {
    if every() || steps.len() <= SAMPLE {
        return steps;
    }
    (0..SAMPLE).map(|index| steps[(2 * index + 1) * steps.len() / (2 * SAMPLE)].clone()).collect()
}

fn can_trace() -> bool {
    let can = Command::new("strace").args(["-qqq", "-o", "/dev/null", "true"]).status();
    let can = can.is_ok_and(|status| status.success()) && rustix::process::geteuid().is_root();
    if !can {
        eprintln!("skipped: strace (package strace) cannot attach to a process here, which takes root");
    }
    can
}

fn kill_at_every_step_of(verb: Verb) {
    if !can_trace() {
        return;
    }
    let host = Host::warm();
    let verbs = Verbs::new(&host, verb);
    let steps = verbs.steps();
    assert!(steps.len() > 3, "{verb:?}: {steps:?}");
    let all = steps.len();
    let mut seen = BTreeMap::new();
    let steps = sample(steps);
    for (index, step) in steps.iter().enumerate() {
        // With the reaper and without, in turns.
        let ways = if every() && !verb.starts() {
            vec![false, true]
        } else {
            vec![index % 2 == 1 && !verb.starts()]
        };
        for reaper_too in ways {
            let phase = verbs.killed_at(step, reaper_too);
            seen.entry(format!("{phase:?}")).or_insert_with(Vec::new).push(format!("{}:{}", step.0, step.1));
        }
    }
    println!("{verb:?}: {} of {all} steps: {seen:?}", steps.len());
    if let Some(paused) = verbs.paused {
        paused.remove();
    }
    host.assert_template_whole();
}

#[test]
fn a_shim_that_is_killed_while_it_boots_leaves_nothing() {
    kill_at_every_step_of(Verb::Boot);
}

#[test]
fn a_shim_that_is_killed_while_it_restores_leaves_nothing() {
    kill_at_every_step_of(Verb::Create);
}

#[test]
fn a_shim_that_is_killed_while_it_parks_leaves_nothing() {
    kill_at_every_step_of(Verb::Park);
}

#[test]
fn a_paused_sandbox_stays_paused_when_its_resume_is_killed() {
    kill_at_every_step_of(Verb::Resume);
}

#[test]
fn a_shim_that_is_killed_while_it_is_configured_leaves_nothing() {
    kill_at_every_step_of(Verb::Configure);
}

#[test]
fn a_shim_that_is_killed_while_it_pauses_leaves_a_whole_snapshot_or_none() {
    kill_at_every_step_of(Verb::Pause);
}

#[test]
fn a_shim_that_is_killed_while_it_makes_a_template_leaves_a_whole_one_or_none() {
    kill_at_every_step_of(Verb::Snapshot);
}

#[test]
fn a_shim_that_is_killed_while_it_forks_leaves_a_whole_snapshot_or_none() {
    kill_at_every_step_of(Verb::Fork);
}

#[test]
fn a_shim_that_is_killed_while_it_stops_leaves_nothing() {
    kill_at_every_step_of(Verb::Stop);
}

#[test]
fn a_template_is_warm_also_when_its_next_warming_is_killed() {
    kill_at_every_step_of(Verb::Warm);
}

#[test]
fn a_sandbox_whose_reaper_was_killed_ends_as_well_as_any_other() {
    let host = Host::warm();
    let mut case = host.case();
    case.start(&[]);
    case.mark();
    kill(case.reaper());
    assert_eq!(case.call("pause", &json!({})).expect("an answer").0, 200);
    let (code, said) = case.ended();
    assert_eq!(code, Some(3), "{said}");
    assert_eq!(case.settle(false), Phase::Paused);
    case.start(&["--resume"]);
    case.assert_marked();
    kill(case.reaper());
    assert_eq!(case.call("stop", &json!({ "grace_ms": 0 })).expect("an answer").0, 202);
    let (code, said) = case.ended();
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(case.settle(false), Phase::Ended);
    assert!(!Path::new(&case.dir.join("snapshot")).exists());
    assert!(TestSandbox::processes_of(&case.dir).is_empty());
}
