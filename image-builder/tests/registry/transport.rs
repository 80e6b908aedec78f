//! TLS and proxies, as the configuration and the environment say.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

use crate::host::Host;
use crate::servers::Registry;

#[test]
fn a_certificate_is_checked_unless_the_configuration_says_otherwise() {
    let host = Host::new();
    let Some(registry) = Registry::with_tls(&host.path("registry")) else { return };
    host.image("app:1", "amd64");
    let there = registry.name("app:1");
    let conf = host.path("registries.conf");
    let configure = |insecure: bool| {
        let text = format!("[[registry]]\nlocation = \"{}\"\ninsecure = {insecure}\n", registry.host());
        std::fs::write(&conf, text).unwrap();
    };
    let push = |certificates: Option<&str>| {
        let mut command = host.command(&["push", "app:1", &there]);
        command
            .env("CONTAINERS_REGISTRIES_CONF", &conf)
            .env_remove("SSL_CERT_FILE")
            .env_remove("SSL_CERT_DIR");
        if let Some(certificates) = certificates {
            command.env("SSL_CERT_FILE", host.path(certificates));
        }
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    // Without a word about it, a registry on this machine is without TLS.
    assert!(host.fails(1, &["push", "app:1", &there]).contains("if it has TLS, name it in registries.conf"));
    configure(false);
    let (code, stderr) = push(None);
    assert!(code == Some(1) && stderr.contains("certificate"), "{stderr}");
    let (code, stderr) = push(Some("registry/tls.crt"));
    assert_eq!(code, Some(0), "{stderr}");
    configure(true);
    let (code, stderr) = push(None);
    assert_eq!(code, Some(0), "{stderr}");
    // What is insecure may be without TLS too.
    let Some(plain) = Registry::start(&host.path("plain"), false) else { return };
    std::fs::write(&conf, format!("[[registry]]\nlocation = \"{}\"\ninsecure = true\n", plain.host()))
        .unwrap();
    let conf = conf.display().to_string();
    host.json(&["push", "app:1", &plain.name("app:1"), "--registries-conf", &conf]);
}

#[test]
fn a_proxy_is_used_for_others_and_not_for_this_machine() {
    let host = Host::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy = format!("http://{}", listener.local_addr().unwrap());
    let asked = Arc::new(Mutex::new(Vec::new()));
    let log = asked.clone();
    // Ends with the test's process.
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let mut connection = connection.unwrap();
            let mut lines = BufReader::new(connection.try_clone().unwrap()).lines().map_while(Result::ok);
            log.lock().unwrap().push(lines.next().unwrap_or_default());
            while lines.next().is_some_and(|header| !header.is_empty()) {}
            let _ = connection
                .write_all(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
    });
    let pull = |name: &str| {
        let mut command = host.command(&["pull", name]);
        for variable in ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"] {
            command.env(variable, &proxy);
        }
        command.env_remove("no_proxy").env_remove("NO_PROXY");
        assert_eq!(command.output().unwrap().status.code(), Some(1));
    };
    pull("registry.invalid/x:1");
    {
        let asked = asked.lock().unwrap();
        assert!(
            !asked.is_empty() && asked.iter().all(|line| line.starts_with("CONNECT registry.invalid:443 ")),
            "{asked:?}"
        );
    }
    asked.lock().unwrap().clear();
    pull("localhost:1/x:1");
    assert_eq!(*asked.lock().unwrap(), Vec::<String>::new());
}
