use super::*;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

fn record(watch: i32, what: ReadFlags, cookie: u32, name: &str) -> Record {
    Record { watch, what, cookie, name: (!name.is_empty()).then(|| name.into()) }
}

fn name(name: &str, directory: bool) -> Name {
    Name { name: name.into(), directory: Some(directory) }
}

fn wish(path: &str) -> Wish {
    Wish { path: path.into(), report: true, again: false }
}

/// What a core says to records, in short: `C name`, `W name` and so on, `+name` and `-watch` for watches.
fn said(actions: Vec<Action>) -> Vec<String> {
    let letter = |kind: EventType| kind.as_str_name().trim_start_matches("EVENT_TYPE_")[..2].to_owned();
    actions
        .into_iter()
        .map(|action| match action {
            Action::Emit(Change { path, kind }) => format!("{} {}", letter(kind), path.display()),
            Action::Watch(wish) => format!("+{}", wish.path.display()),
            Action::Unwatch(watch) => format!("-{watch}"),
        })
        .collect()
}

fn core(recursive: bool) -> Core {
    let mut core = Core::new(recursive);
    assert_eq!(said(core.added(1, Wish::top(), vec![name("old", false)])), [""; 0]);
    core
}

fn say(core: &mut Core, watch: i32, what: ReadFlags, cookie: u32, name: &str) -> Vec<String> {
    said(core.record(record(watch, what, cookie, name)).unwrap())
}

const DIR: ReadFlags = ReadFlags::ISDIR;

#[test]
fn plain_changes_have_their_events() {
    let mut core = core(false);
    let mut tell = |what, name| say(&mut core, 1, what, 0, name);
    assert_eq!(tell(ReadFlags::CREATE, "a"), ["CR a"]);
    assert_eq!(tell(ReadFlags::MODIFY, "a"), ["WR a"]);
    assert_eq!(tell(ReadFlags::ATTRIB, "a"), ["CH a"]);
    assert_eq!(tell(ReadFlags::MOVED_FROM, "a"), ["RE a"]);
    assert_eq!(tell(ReadFlags::MOVED_TO, "b"), ["CR b"]);
    assert_eq!(tell(ReadFlags::DELETE, "b"), ["RE b"]);
    assert_eq!(tell(ReadFlags::CREATE | DIR, "d"), ["CR d"], "not recursive: no watch");
    assert_eq!(tell(ReadFlags::ATTRIB | DIR, ""), ["CH ."]);
    assert_eq!(tell(ReadFlags::MOVE_SELF, ""), ["RE ."]);
    assert_eq!(tell(ReadFlags::DELETE_SELF, ""), ["RE ."]);
    assert_eq!(say(&mut core, 9, ReadFlags::CREATE, 0, "stale"), [""; 0]);
    assert_eq!(core.record(record(-1, ReadFlags::QUEUE_OVERFLOW, 0, "")), Err(Lost));
}

#[test]
fn uploads_look_like_writes() {
    let mut core = core(false);
    for (temporary, expected) in [(CREATING, vec!["CR a", "WR a"]), (REPLACING, vec!["WR a"])] {
        let temporary = format!("{temporary}0123");
        for what in [ReadFlags::CREATE, ReadFlags::ATTRIB, ReadFlags::MODIFY] {
            assert_eq!(say(&mut core, 1, what, 0, &temporary), [""; 0]);
        }
        assert_eq!(say(&mut core, 1, ReadFlags::MOVED_FROM, 5, &temporary), [""; 0]);
        assert_eq!(say(&mut core, 1, ReadFlags::MOVED_TO, 5, "a"), expected);
    }
    // One that broke off.
    assert_eq!(say(&mut core, 1, ReadFlags::DELETE, 0, ".envd-upload-c0123"), [""; 0]);
}

#[test]
fn what_a_new_directory_held_already_is_told_once() {
    let mut core = core(true);
    assert_eq!(say(&mut core, 1, ReadFlags::CREATE | DIR, 0, "d"), ["CR d", "+d"]);
    let found = core.added(2, wish("d"), vec![name("f", false), name("e", true)]);
    assert_eq!(said(found), ["CR d/f", "CR d/e", "+d/e"]);
    assert_eq!(say(&mut core, 2, ReadFlags::MODIFY, 0, "f"), ["WR d/f"]);
    assert_eq!(say(&mut core, 2, ReadFlags::CREATE, 0, "f"), [""; 0], "found before");
    assert_eq!(say(&mut core, 2, ReadFlags::CREATE | DIR, 0, "e"), ["+d/e"]);
    assert_eq!(said(core.added(3, wish("d/e"), vec![name("g", false)])), ["CR d/e/g"]);
    assert_eq!(said(core.added(3, wish("d/e"), vec![name("g", false)])), [""; 0]);
    assert_eq!(say(&mut core, 2, ReadFlags::DELETE, 0, "f"), ["RE d/f"]);
    assert_eq!(say(&mut core, 2, ReadFlags::CREATE, 0, "f"), ["CR d/f"], "made again");
}

#[test]
fn directories_take_their_watches_with_them() {
    let mut core = core(true);
    core.added(2, wish("d"), vec![]);
    core.added(3, wish("d/e"), vec![]);
    assert_eq!(say(&mut core, 1, ReadFlags::MOVED_FROM | DIR, 7, "d"), ["RE d"]);
    assert_eq!(said(core.end_of_read()), [""; 0]);
    assert_eq!(say(&mut core, 3, ReadFlags::CREATE, 0, "early"), [""; 0], "where it is now is not known");
    assert_eq!(say(&mut core, 1, ReadFlags::MOVED_TO | DIR, 7, "n"), ["CR n", "+n", "CR n/e/early"]);
    assert_eq!(say(&mut core, 3, ReadFlags::CREATE, 0, "f"), ["CR n/e/f"]);
    // Out of the tree.
    assert_eq!(say(&mut core, 1, ReadFlags::MOVED_FROM | DIR, 8, "n"), ["RE n"]);
    assert_eq!(said(core.end_of_read()), [""; 0]);
    assert_eq!(say(&mut core, 3, ReadFlags::CREATE, 0, "outside"), [""; 0]);
    let mut ended = said(core.end_of_read());
    ended.sort();
    assert_eq!(ended, ["-2", "-3"]);
    assert_eq!(core.len(), 1);
    // Into the tree: its contents are news.
    assert_eq!(say(&mut core, 1, ReadFlags::MOVED_TO | DIR, 9, "in"), ["CR in", "+in"]);
    assert_eq!(said(core.added(4, wish("in"), vec![name("f", false)])), ["CR in/f"]);
}

#[test]
fn a_watch_that_is_another_directorys_sends_back_to_look() {
    let mut core = core(true);
    core.added(2, wish("d"), vec![]);
    assert_eq!(said(core.added(2, wish("e"), vec![])), ["+d"]);
    let again = Wish { again: true, ..wish("d") };
    assert_eq!(said(core.added(2, again, vec![])), [""; 0], "a directory that is mounted twice ends it");
}

/// A directory was made and renamed, and another one with its old name left the tree, all before the first look.
#[test]
fn what_a_later_directory_of_the_old_name_tells_is_not_the_renamed_ones() {
    let mut core = core(true);
    assert_eq!(say(&mut core, 1, ReadFlags::CREATE | DIR, 0, "c"), ["CR c", "+c"]);
    assert_eq!(said(core.added(2, wish("c"), vec![name("b", false)])), ["CR c/b"], "the later one");
    assert_eq!(say(&mut core, 1, ReadFlags::MOVED_FROM | DIR, 7, "c"), ["RE c"]);
    assert_eq!(say(&mut core, 1, ReadFlags::MOVED_TO | DIR, 7, "a"), ["CR a", "+a"]);
    assert_eq!(said(core.added(3, wish("a"), vec![name("b", true)])), ["-2", "CR a/b", "+a/b"]);
    assert_eq!(said(core.added(4, wish("a/b"), vec![])), [""; 0]);
    assert_eq!(say(&mut core, 2, ReadFlags::DELETE, 0, "b"), [""; 0]);
    assert_eq!(say(&mut core, 4, ReadFlags::CREATE, 0, "f"), ["CR a/b/f"], "it is still watched");
}

/// A file system with inotify, as far as a core can see it.
#[derive(Debug)]
struct Kernel {
    /// Inode by path; the directories' are even.
    nodes: BTreeMap<PathBuf, u32>,
    next: u32,
    /// The watch of an inode; no number is given twice.
    watches: BTreeMap<u32, i32>,
    next_watch: i32,
    queue: VecDeque<Record>,
}

#[derive(Clone, Debug)]
enum Step {
    Make { at: usize, name: u8, directory: bool },
    Rename { from: usize, to: usize, name: u8 },
    MoveOut { from: usize },
    MoveIn { at: usize, name: u8 },
    Remove { at: usize },
    Read { records: usize },
}

impl Kernel {
    fn new() -> Self {
        Self {
            nodes: [(PathBuf::new(), 0)].into(),
            next: 2,
            watches: [(0, 0)].into(),
            next_watch: 1,
            queue: VecDeque::new(),
        }
    }

    fn is_directory(&self, path: &Path) -> bool {
        self.nodes.get(path).is_some_and(|inode| inode % 2 == 0)
    }

    fn directory(&self, pick: usize) -> PathBuf {
        let directories: Vec<_> = self.nodes.keys().filter(|path| self.is_directory(path)).collect();
        directories[pick % directories.len()].clone()
    }

    fn below_top(&self, pick: usize) -> Option<PathBuf> {
        let paths: Vec<_> = self.nodes.keys().skip(1).collect();
        (!paths.is_empty()).then(|| paths[pick % paths.len()].clone())
    }

    fn inode(&mut self, directory: bool) -> u32 {
        self.next += 2;
        self.next + u32::from(!directory)
    }

    fn tell(&mut self, path: &Path, what: ReadFlags, cookie: u32) {
        let parent = self.nodes[path.parent().unwrap()];
        if let Some(&watch) = self.watches.get(&parent) {
            let what = if self.is_directory(path) { what | DIR } else { what };
            let name = path.file_name().map(ToOwned::to_owned);
            self.queue.push_back(Record { watch, what, cookie, name });
        }
    }

    fn subtree(&self, path: &Path) -> Vec<PathBuf> {
        self.nodes.keys().filter(|at| at.starts_with(path)).cloned().collect()
    }

    fn step(&mut self, step: &Step, directories_move: bool) {
        let fresh = |name: &u8| format!("{}", char::from(b'a' + name % 4));
        match step {
            Step::Make { at, name, directory } => {
                let path = self.directory(*at).join(fresh(name));
                if !self.nodes.contains_key(&path) {
                    let inode = self.inode(*directory);
                    self.nodes.insert(path.clone(), inode);
                    self.tell(&path, ReadFlags::CREATE, 0);
                }
            }
            Step::MoveIn { at, name } => {
                let path = self.directory(*at).join(fresh(name));
                if !self.nodes.contains_key(&path) {
                    let (outer, inner) = (self.inode(true), self.inode(true));
                    let file = self.inode(false);
                    self.nodes.insert(path.clone(), outer);
                    self.nodes.insert(path.join("a"), inner);
                    self.nodes.insert(path.join("a/b"), file);
                    self.next += 2;
                    self.tell(&path, ReadFlags::MOVED_TO, self.next);
                }
            }
            Step::Rename { from, to, name } => {
                let Some(old) = self.below_top(*from) else { return };
                let new = self.directory(*to).join(fresh(name));
                if new.starts_with(&old) || self.nodes.contains_key(&new) {
                    return;
                }
                if self.is_directory(&old) && !directories_move {
                    return;
                }
                self.next += 2;
                let cookie = self.next;
                self.tell(&old, ReadFlags::MOVED_FROM, cookie);
                for path in self.subtree(&old) {
                    let below = path.strip_prefix(&old).unwrap();
                    let at = if below.as_os_str().is_empty() { new.clone() } else { new.join(below) };
                    let inode = self.nodes.remove(&path).unwrap();
                    self.nodes.insert(at, inode);
                }
                self.tell(&new, ReadFlags::MOVED_TO, cookie);
            }
            Step::MoveOut { from } => {
                let Some(old) = self.below_top(*from) else { return };
                self.next += 2;
                self.tell(&old, ReadFlags::MOVED_FROM, self.next);
                for path in self.subtree(&old) {
                    self.nodes.remove(&path);
                }
            }
            Step::Remove { at } => {
                let Some(path) = self.below_top(*at) else { return };
                if self.subtree(&path).len() == 1 {
                    self.tell(&path, ReadFlags::DELETE, 0);
                    let inode = self.nodes.remove(&path).unwrap();
                    if let Some(watch) = self.watches.remove(&inode) {
                        self.queue.push_back(record(watch, ReadFlags::IGNORED, 0, ""));
                    }
                }
            }
            Step::Read { .. } => {}
        }
    }

    /// Adds a watch and reads the names, as the tree does.
    fn watch(&mut self, wish: &Wish) -> Option<(i32, Vec<Name>)> {
        if !self.is_directory(&wish.path) {
            return None;
        }
        let inode = self.nodes[&wish.path];
        let next = &mut self.next_watch;
        let watch = *self.watches.entry(inode).or_insert_with(|| {
            *next += 1;
            *next
        });
        let inside = self.nodes.keys().filter(|path| path.parent() == Some(&wish.path));
        let names =
            inside.map(|path| name(path.file_name().unwrap().to_str().unwrap(), self.is_directory(path)));
        Some((watch, names.collect()))
    }
}

struct Run {
    kernel: Kernel,
    core: Core,
    /// What a client knows that follows the events.
    known: BTreeSet<PathBuf>,
    told_twice: Vec<PathBuf>,
}

impl Run {
    fn new() -> Self {
        let mut core = Core::new(true);
        core.added(0, Wish::top(), Vec::new());
        Self { kernel: Kernel::new(), core, known: BTreeSet::new(), told_twice: Vec::new() }
    }

    fn perform(&mut self, actions: Vec<Action>) {
        let mut pending: VecDeque<_> = actions.into();
        while let Some(action) = pending.pop_front() {
            match action {
                Action::Emit(Change { path, kind: EventType::Create }) => {
                    if !self.known.insert(path.clone()) {
                        self.told_twice.push(path);
                    }
                }
                Action::Emit(Change { path, .. }) => self.known.retain(|known| !known.starts_with(&path)),
                Action::Unwatch(watch) => {
                    self.kernel.watches.retain(|_, other| *other != watch);
                    self.kernel.queue.push_back(record(watch, ReadFlags::IGNORED, 0, ""));
                }
                Action::Watch(wish) => {
                    let Some((watch, names)) = self.kernel.watch(&wish) else {
                        self.core.missed(wish).unwrap();
                        continue;
                    };
                    for action in self.core.added(watch, wish, names).into_iter().rev() {
                        pending.push_front(action);
                    }
                }
            }
        }
    }

    fn read(&mut self, records: usize) {
        if self.kernel.queue.is_empty() {
            return self.core.drained();
        }
        for _ in 0..records {
            let Some(record) = self.kernel.queue.pop_front() else { break };
            let actions = self.core.record(record).unwrap();
            self.perform(actions);
        }
        let actions = self.core.end_of_read();
        self.perform(actions);
    }

    fn all(steps: &[Step], directories_move: bool) -> Self {
        let mut run = Self::new();
        for step in steps {
            run.kernel.step(step, directories_move);
            if let Step::Read { records } = step {
                run.read(*records);
            }
        }
        while !run.kernel.queue.is_empty() {
            run.read(5);
        }
        run
    }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (any::<usize>(), any::<u8>(), any::<bool>()).prop_map(|(at, name, directory)| Step::Make { at, name, directory }),
        3 => (any::<usize>(), any::<usize>(), any::<u8>()).prop_map(|(from, to, name)| Step::Rename { from, to, name }),
        1 => any::<usize>().prop_map(|from| Step::MoveOut { from }),
        1 => (any::<usize>(), any::<u8>()).prop_map(|(at, name)| Step::MoveIn { at, name }),
        2 => any::<usize>().prop_map(|at| Step::Remove { at }),
        4 => (1..6usize).prop_map(|records| Step::Read { records }),
    ];
    proptest::collection::vec(step, 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// However reads and changes interleave, in the end every directory has its watch under its own path.
    #[test]
    fn every_directory_is_watched_where_it_is(steps in steps()) {
        let mut run = Run::all(&steps, true);
        // Records that tell of what went out of the tree.
        let ended = run.core.end_of_read();
        run.perform(ended);
        run.read(100);
        let expected: BTreeMap<_, _> = run.kernel.nodes.iter()
            .filter(|(_, inode)| *inode % 2 == 0)
            .map(|(path, inode)| (*inode, path.clone()))
            .collect();
        let watched: BTreeMap<_, _> = run.kernel.watches.iter()
            .filter(|(inode, _)| expected.contains_key(inode))
            .filter_map(|(inode, watch)| Some((*inode, run.core.directories.get(watch)?.clone())))
            .collect();
        prop_assert_eq!(watched, expected);
    }

    /// A client that follows the events knows every path, and none is told twice.
    #[test]
    fn every_path_is_told_once(steps in steps()) {
        let run = Run::all(&steps, false);
        let expected: BTreeSet<_> = run.kernel.nodes.keys().skip(1).cloned().collect();
        prop_assert_eq!(&run.known, &expected);
        prop_assert_eq!(run.told_twice, Vec::<PathBuf>::new());
    }
}
