//! `host-shim run TEMPLATE -- CMD`: the command line as a person uses it.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use e2e::{binary, made, template};

fn host_shim() -> Command {
    let mut command = Command::new(binary("host-shim"));
    command.arg("run").arg("--data-dir").arg(made("TIFFIN_E2E_DATA"));
    command.stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> Output {
    host_shim().args(arguments).output().unwrap()
}

fn sandboxes_left() -> Vec<String> {
    let folder = made("TIFFIN_E2E_DATA").join("sandboxes");
    std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into())
        .collect()
}

#[test]
fn output_errors_input_and_exit_code_are_carried_through() {
    let mut child = host_shim()
        .args(["e2e", "--", "sh", "-c", "cat; echo error >&2; exit 9"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let id = child.id();
    let input: Vec<u8> = (0..500_000u32).map(|n| (n % 256) as u8).collect();
    let mut stdin = child.stdin.take().unwrap();
    let sent = input.clone();
    let writing = std::thread::spawn(move || stdin.write_all(&sent).unwrap());
    let output = child.wait_with_output().unwrap();
    writing.join().unwrap();
    assert!(output.stdout == input, "{} bytes came back of {}", output.stdout.len(), input.len());
    assert!(String::from_utf8_lossy(&output.stderr).contains("error\n"), "{output:?}");
    assert_eq!(output.status.code(), Some(9), "shim {id}");
}

#[test]
fn the_exit_codes_are_those_of_docker() {
    for (arguments, code) in [
        (&["e2e", "--", "/no/such/program"][..], 127),
        (&["e2e", "--", "/etc/passwd"], 126),
        (&["e2e", "--", "sh", "-c", "kill -9 $$"], 137),
        (&["no-such-template", "--", "true"], 125),
        (&["--no-such-option"], 2),
    ] {
        let output = run(arguments);
        assert_eq!(
            output.status.code(),
            Some(code),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

#[test]
fn options_reach_the_command_and_a_folder_is_a_template_too() {
    let folder = template();
    let script = "echo $A; pwd; id -u; hostname; nproc";
    let options = ["-e", "A=b c", "-w", "/tmp", "-u", "user", "--hostname", "box", "--cpus", "2"];
    let mut arguments = options.to_vec();
    arguments.extend([folder.to_str().unwrap(), "--", "sh", "-c", script]);
    let output = run(&arguments);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "b c\n/tmp\n1000\nbox\n2\n", "{output:?}");
}

#[test]
fn a_large_output_arrives_whole() {
    let output = run(&["e2e", "--", "sh", "-c", "head -c 30000000 /dev/zero; echo end"]);
    assert_eq!(output.stdout.len(), 30_000_004);
    assert!(output.stdout.ends_with(b"end\n"));
}

#[test]
fn sigterm_stops_the_sandbox_and_nothing_is_left() {
    use std::io::{BufRead, BufReader};
    let mut child = host_shim()
        .args(["e2e", "--", "sh", "-c", "echo ready; exec sleep 1000"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(143), "128 + SIGTERM");
    let mine = child.id().to_string();
    let left: Vec<_> = sandboxes_left().into_iter().filter(|name| name.contains(&mine)).collect();
    assert!(left.is_empty(), "{left:?}");
}
