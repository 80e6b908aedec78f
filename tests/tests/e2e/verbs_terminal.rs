//! `exec -it` and `shell` on a real terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::mpsc;

use e2e::{DEADLINE, binary};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use super::verbs::{Cli, Running, until};

/// A terminal with a verb on it.
struct Terminal {
    running: Running,
    master: File,
    /// Kept open: so the mode that it is left in can be seen.
    slave: OwnedFd,
    shown: mpsc::Receiver<Vec<u8>>,
    seen: String,
}

impl Terminal {
    fn new(cli: &Cli, args: &[&str]) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
        let slave = rustix::fs::open(&*name, flags, rustix::fs::Mode::empty()).unwrap();
        resize(&master, 24, 80);
        let stdio = || Stdio::from(slave.try_clone().unwrap());
        // A session of its own, whose terminal it is: signals of the terminal reach it.
        let mut command = Command::new("setsid");
        command.arg("--ctty").arg(binary("host-shim")).args(args).env("TIFFIN_DATA_DIR", cli.path(""));
        command.env("TERM", "xterm-256color");
        let child = command.stdin(stdio()).stdout(stdio()).stderr(stdio()).spawn().unwrap();
        let (sender, shown) = mpsc::channel();
        let mut reader = File::from(master.try_clone().unwrap());
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = reader.read(&mut buffer) {
                if sender.send(buffer[..read].to_vec()).is_err() {
                    break;
                }
            }
        });
        let master = File::from(master);
        Self { running: Running(child), master, slave, shown, seen: String::new() }
    }

    fn keys(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until this is shown; what came before it is forgotten.
    #[track_caller]
    fn wait_for(&mut self, text: &str) -> String {
        loop {
            if let Some(at) = self.seen.find(text) {
                let before = self.seen[..at].to_owned();
                self.seen.drain(..at + text.len());
                return before;
            }
            match self.shown.recv_timeout(DEADLINE) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(error) => panic!("{text:?} was not shown ({error}), but {:?}", self.seen),
            }
        }
    }

    /// Whether keys are echoed and lines collected, as a shell leaves it.
    fn is_raw(&self) -> bool {
        let modes = tcgetattr(&self.slave).unwrap().local_modes;
        let cooked = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        assert!(modes.contains(cooked) || !modes.intersects(cooked), "neither raw nor as it was: {modes:?}");
        !modes.contains(cooked)
    }

    fn pid(&self) -> Pid {
        self.running.pid()
    }
}

fn resize(terminal: impl AsFd, rows: u16, cols: u16) {
    tcsetwinsize(terminal, Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
}

#[test]
fn a_shell_has_this_terminal() {
    let cli = Cli::new();
    let id = cli.start(&["e2e"]);
    let mut terminal = Terminal::new(&cli, &["shell", "-e", "PS1=@@ ", &id]);
    terminal.wait_for("@@ ");
    assert!(terminal.is_raw());
    terminal.keys("stty size; echo T=$TERM; tty\r");
    terminal.wait_for("24 80\r\nT=xterm-256color\r\n/dev/pts/");
    terminal.wait_for("@@ ");
    // The size follows.
    resize(&terminal.master, 40, 133);
    terminal.keys("until stty size | grep -q '40 133'; do :; done; echo resized-$((6*7))\r");
    terminal.wait_for("resized-42");
    terminal.wait_for("@@ ");
    // Ctrl-C is the command's, and neither the shell's end nor ours.
    // Told by the command itself: before it is there the key would be its shell's, who waits for it.
    terminal.keys("sh -c 'echo begin-$((1+1)); exec sleep 1000'\r");
    terminal.wait_for("begin-2");
    terminal.keys("\x03");
    terminal.wait_for("@@ ");
    terminal.keys("echo $?\r");
    terminal.wait_for("130");
    terminal.keys("exit 7\r");
    assert_eq!(terminal.running.wait(), 7);
    assert!(!terminal.is_raw(), "the terminal is as it was");
}

#[test]
fn the_keys_leave_it_and_it_goes_on() {
    let cli = Cli::new();
    let id = cli.start(&["e2e"]);
    let mut terminal = Terminal::new(&cli, &["exec", "-it", &id, "sh", "-c", "echo up; cat"]);
    terminal.wait_for("up");
    terminal.keys("\x10x\r");
    terminal.wait_for("x\r\n");
    terminal.keys("\x10\x11");
    assert_eq!(terminal.running.wait(), 0);
    assert!(!terminal.is_raw());
    assert!(cli.ok(&["ps", &id]).contains("echo up; cat"));
    let mut terminal =
        Terminal::new(&cli, &["exec", "-it", "--detach-keys", "a,ctrl-x", &id, "sh", "-c", "echo up; cat"]);
    terminal.wait_for("up");
    terminal.keys("\x10\x11ab\ra\x18");
    assert_eq!(terminal.running.wait(), 0);
}

#[test]
fn whatever_ends_it_the_terminal_is_as_it_was() {
    let cli = Cli::new();
    let id = cli.start(&["e2e"]);
    for (signal, code) in [(Signal::TERM, 143), (Signal::HUP, 129), (Signal::INT, 130), (Signal::QUIT, 131)] {
        let mut terminal = Terminal::new(&cli, &["exec", "-it", &id, "sh", "-c", "echo up; sleep 1000"]);
        terminal.wait_for("up");
        assert!(terminal.is_raw());
        kill_process(terminal.pid(), signal).unwrap();
        assert_eq!(terminal.running.wait(), code, "{signal:?}");
        assert!(!terminal.is_raw(), "{signal:?}");
    }
    // Stopped, the shell has its terminal; continued, it is ours again.
    let mut terminal = Terminal::new(&cli, &["exec", "-it", &id, "sh", "-c", "echo up; cat"]);
    terminal.wait_for("up");
    kill_process(terminal.pid(), Signal::TSTP).unwrap();
    until("the terminal is as it was", || !terminal.is_raw());
    kill_process(terminal.pid(), Signal::CONT).unwrap();
    until("the terminal is raw again", || terminal.is_raw());
    terminal.keys("again\r");
    terminal.wait_for("again\r\nagain\r\n");
    // The sandbox ends under it.
    cli.kill_shim(&id);
    assert_eq!(terminal.running.wait(), 125);
    assert!(!terminal.is_raw());
    terminal.wait_for("the sandbox ended");
}
