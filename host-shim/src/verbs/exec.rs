//! `exec` and `shell`.

use envd_proto::process::{ProcessConfig, Pty, StartRequest};
use host_shim::run::exit_code;
use sandbox_folder::client::{Exit, SandboxClient};
use serde_json::json;

use super::error::{Error, FAILED, OURS};
use super::sandboxes::{Sandbox, Shim};
use super::session::{End, Input};
use super::terminal::{self, Raw};
use super::{output, sandboxes, session, tell};
use crate::cli::{Exec, Process, Shell};

/// The size of a terminal that nobody sees, as docker has it.
const UNSEEN: envd_proto::process::pty::Size = envd_proto::process::pty::Size { cols: 80, rows: 24 };

/// The largest /etc/passwd that is read for a shell; the agent reads as much.
const MAX_PASSWD: u64 = 4 << 20;

/// What runs where, and with which streams.
struct Plan {
    /// The user's shell when absent.
    argv: Option<Vec<String>>,
    interactive: bool,
    tty: bool,
    detach: bool,
    json: bool,
}

pub(crate) async fn exec(args: &Exec) -> u8 {
    if args.tty && args.interactive && !Raw::is_possible() {
        // Docker's words and code.
        eprintln!("host-shim: the input device is not a TTY");
        return FAILED;
    }
    let plan = Plan {
        argv: Some(args.command.clone()),
        interactive: args.interactive,
        tty: args.tty,
        detach: args.detach,
        json: args.json,
    };
    finish(try_exec(&args.process, &args.id, plan).await)
}

pub(crate) async fn shell(args: &Shell) -> u8 {
    if !Raw::is_possible() {
        eprintln!("host-shim: the input device is not a TTY: use `exec -i` for a script");
        return FAILED;
    }
    let plan = Plan { argv: None, interactive: true, tty: true, detach: false, json: false };
    finish(try_exec(&args.process, &args.id, plan).await)
}

fn finish(done: Result<u8, Error>) -> u8 {
    match done {
        Ok(code) => code,
        // Docker's codes for what cannot be executed and what is not there; everything else is 125.
        Err(Error::Client(error)) => {
            let error = host_shim::Error::Client(error);
            let code = exit_code(&error);
            tell(&Error::Shim(error), code)
        }
        Err(error) => tell(&error, OURS),
    }
}

async fn try_exec(args: &Process, id: &str, plan: Plan) -> Result<u8, Error> {
    let sandbox = sandboxes(&args.data)?.find(id)?;
    let shim = sandbox.shim();
    let mut client = sandbox.client()?;
    if let Some(user) = &args.user {
        client = client.with_user(user);
    }
    match carry(args, &sandbox, shim.as_ref(), &client, plan).await {
        Ok(code) => Ok(code),
        Err(error) => Err(sandbox.explain(shim.as_ref(), error).await),
    }
}

async fn carry(
    args: &Process,
    sandbox: &Sandbox,
    shim: Option<&Shim>,
    client: &SandboxClient,
    plan: Plan,
) -> Result<u8, Error> {
    let argv = match plan.argv {
        Some(argv) => argv,
        None => vec![shell_of(args, sandbox, client).await],
    };
    let mut envs: std::collections::HashMap<_, _> = args.environment.read()?.into_iter().collect();
    if plan.tty && !envs.contains_key("TERM") {
        // What draws on this terminal has to know it.
        let term = std::env::var("TERM").unwrap_or_default();
        envs.insert("TERM".into(), if term.is_empty() { "xterm".into() } else { term });
    }
    let mut argv = argv.into_iter();
    let process = ProcessConfig {
        cmd: argv.next().unwrap_or_default(),
        args: argv.collect(),
        envs,
        cwd: args.workdir.clone(),
    };
    let pty = plan.tty.then(|| Pty { size: Some(terminal::size().unwrap_or(UNSEEN)) });
    let stdin = Some(plan.interactive && !plan.tty);
    let request = StartRequest { process: Some(process), pty, stdin, ..StartRequest::default() };
    let process = tokio::select! {
        process = client.start(request) => process?,
        // A machine that ends without a word closes nothing.
        () = gone(shim) => return Err(Error::Ended { how: how(sandbox) }),
    };
    let pid = process.pid();
    if plan.detach {
        if plan.json {
            output::json_line(&json!({"id": sandbox.id, "pid": pid}))?;
        }
        return Ok(0);
    }
    let input = match (plan.interactive, plan.tty) {
        (false, _) => Input::Nothing,
        (true, false) => Input::Stdin,
        (true, true) => Input::Terminal(args.detach_keys.clone()),
    };
    let end = tokio::select! {
        biased;
        end = session::run(client, process, plan.tty, input) => end?,
        () = gone(shim) => return Err(Error::Ended { how: how(sandbox) }),
    };
    if plan.json {
        eprintln!("{}", report(&sandbox.id, pid, end));
    } else if end == End::Detached {
        eprintln!("\r\nhost-shim: left it; process {pid} goes on");
    }
    Ok(end.code())
}

fn report(id: &str, pid: u32, end: End) -> serde_json::Value {
    let signal = match end {
        End::Exited(Exit::Signal(signal)) => Some(signal),
        _ => None,
    };
    let detached = end == End::Detached;
    json!({"id": id, "pid": pid, "exit_code": end.code(), "signal": signal, "detached": detached})
}

async fn gone(shim: Option<&Shim>) {
    match shim {
        Some(shim) => shim.gone().await,
        None => std::future::pending().await,
    }
}

fn how(sandbox: &Sandbox) -> String {
    sandbox.again().map_or_else(|| "its folder is gone".to_owned(), |now| now.end())
}

/// The shell of the user that processes run as, where the sandbox's /etc/passwd names one.
async fn shell_of(args: &Process, sandbox: &Sandbox, client: &SandboxClient) -> String {
    const FALLBACK: &str = "/bin/sh";
    let template = || {
        let template =
            template::TemplateFolder::open(std::path::Path::new(sandbox.spec["template"].as_str()?));
        Some(template.ok()?.template().runtime.user.clone())
    };
    let given = args.user.clone().or_else(|| sandbox.spec["user"].as_str().map(str::to_owned));
    let user = given.or_else(template).unwrap_or_default();
    let user = user.split(':').next().filter(|user| !user.is_empty()).unwrap_or("root");
    let Ok((length, mut passwd)) = client.open_file(b"/etc/passwd").await else { return FALLBACK.into() };
    let mut text = Vec::new();
    if length > MAX_PASSWD || tokio::io::AsyncReadExt::read_to_end(&mut passwd, &mut text).await.is_err() {
        return FALLBACK.into();
    }
    let Some(shell) = shell_in(&String::from_utf8_lossy(&text), user) else { return FALLBACK.into() };
    match client.stat(&shell).await {
        Ok(_) => shell,
        Err(_) => FALLBACK.into(),
    }
}

fn shell_in(passwd: &str, user: &str) -> Option<String> {
    let entry = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| {
        fields.first() == Some(&user) || (fields.get(2) == Some(&user) && user.parse::<u32>().is_ok())
    })?;
    let shell = entry.get(6)?.trim();
    // A user who must not log in is not shown the door here: docker would not either.
    (shell.starts_with('/') && !shell.ends_with("/nologin") && !shell.ends_with("/false"))
        .then(|| shell.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shell_is_the_users_own() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000::/home/user:/bin/ash\n\
                      daemon:x:1:1::/:/usr/sbin/nologin\nshort:x:5\nodd:x:6:6:::relative\n";
        for (user, shell) in [
            ("root", Some("/bin/bash")),
            ("0", Some("/bin/bash")),
            ("1000", Some("/bin/ash")),
            ("daemon", None),
            ("short", None),
            ("odd", None),
            ("nobody", None),
        ] {
            assert_eq!(shell_in(passwd, user).as_deref(), shell, "{user}");
        }
    }
}
