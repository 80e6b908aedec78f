//! login and logout against a registry that wants a password.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::process::{Output, Stdio};

use crate::host::{Host, tool};
use crate::servers::Registry;

fn log_in(host: &Host, registry: &str, password: &str, path: Option<&str>) -> Output {
    let mut command = host.command(&["login", registry, "--username", "me", "--password-stdin"]);
    if let Some(path) = path {
        command.env("PATH", path);
    }
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(format!("{password}\n").as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn a_password_is_checked_kept_used_and_forgotten() {
    let host = Host::new();
    let Some(registry) = Registry::start(&host.path("registry"), true) else { return };
    host.image("app:1", "amd64");
    let there = registry.name("app:1");
    let refused = host.fails(1, &["push", "app:1", &there]);
    assert!(refused.contains(&format!("image-builder login {}", registry.host())), "{refused}");

    let wrong = log_in(&host, registry.host(), "guess", None);
    let stderr = String::from_utf8_lossy(&wrong.stderr).into_owned();
    assert!(wrong.status.code() == Some(1) && stderr.contains("does not take"), "{stderr}");
    assert!(!host.path("docker/config.json").exists(), "what is wrong is not kept");
    assert_eq!(log_in(&host, registry.host(), "", None).status.code(), Some(2));

    let right = log_in(&host, registry.host(), "secret", None);
    assert!(right.status.success(), "{}", String::from_utf8_lossy(&right.stderr));
    let file = host.path("docker/config.json");
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    host.json(&["push", "app:1", &there]);
    // The file is one that others read.
    let authfile = format!("--authfile={}", file.display());
    tool("skopeo", &["inspect", "--tls-verify=false", "--raw", &authfile, &format!("docker://{there}")]);
    let machine = Host::new();
    machine.fails(1, &["pull", &there]);
    assert_eq!(machine.json(&["pull", &there, "--authfile", file.to_str().unwrap()])["fetched"], 4);

    assert!(host.run(&["logout", registry.host()]).status.success());
    host.fails(1, &["push", "app:1", &registry.name("app:2")]);
    let again = host.run(&["logout", registry.host()]);
    assert!(String::from_utf8_lossy(&again.stdout).contains("nothing was known"));
}

#[test]
fn a_helper_keeps_what_the_file_gives_it_to_keep() {
    let host = Host::new();
    let Some(registry) = Registry::start(&host.path("registry"), true) else { return };
    host.image("app:1", "amd64");
    let helper = host.path("bin/docker-credential-box");
    std::fs::create_dir_all(host.path("bin")).unwrap();
    std::fs::create_dir_all(host.path("docker")).unwrap();
    let script = format!(
        "#!/bin/sh\ncd {}\ncase $1 in\n store) cat > kept;;\n erase) rm kept;;\n \
         get) cat kept 2>/dev/null || {{ echo credentials not found in native keychain; exit 1; }};;\nesac\n",
        host.path("bin").display()
    );
    std::fs::write(&helper, script).unwrap();
    std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755)).unwrap();
    let config = serde_json::json!({"credHelpers": {registry.host(): "box"}}).to_string();
    std::fs::write(host.path("docker/config.json"), &config).unwrap();
    let path = format!("{}:{}", host.path("bin").display(), std::env::var("PATH").unwrap());

    let kept = log_in(&host, registry.host(), "secret", Some(&path));
    assert!(kept.status.success(), "{}", String::from_utf8_lossy(&kept.stderr));
    assert!(host.path("bin/kept").exists());
    assert_eq!(
        std::fs::read_to_string(host.path("docker/config.json")).unwrap(),
        config,
        "no secret is in the file"
    );
    let there = registry.name("app:1");
    let pushed = host.command(&["push", "app:1", &there]).env("PATH", &path).output().unwrap();
    assert!(pushed.status.success(), "{}", String::from_utf8_lossy(&pushed.stderr));
    let without = host.fails(1, &["push", "app:1", &there]);
    assert!(without.contains("docker-credential-box") && without.contains("not in PATH"), "{without}");
    assert!(host.command(&["logout", registry.host()]).env("PATH", &path).status().unwrap().success());
    assert!(!host.path("bin/kept").exists());
}
