//! Subscriptions that a connection has for itself: changes in a directory, ports that open.

use std::time::Duration;

use envd_proto::filesystem::{EventType, FileType, FilesystemEvent, WatchDirRequest};
use sandbox_folder::client::{ClientError, OpenPort, SandboxClient, Watch};
use serde_json::{Value, json};

use super::run::timestamp;
use super::session::Subscriber;

/// Time between two looks at the ports, as the old server had it: the kernel has no event for them.
const PORTS_INTERVAL: Duration = Duration::from_secs(1);

/// Begins to watch a directory, without those in it.
pub(super) async fn watch(client: &SandboxClient, path: &str) -> Result<Watch, ClientError> {
    let request = WatchDirRequest { path: path.to_owned(), include_entry: true, ..Default::default() };
    client.watch_dir(request).await
}

/// Tells every change until the agent ends the watch.
pub(super) async fn tell_changes(mut watch: Watch, path: String, subscriber: Subscriber) {
    loop {
        match watch.next().await {
            Ok(Some(event)) => {
                if let Some(change) = change(&path, &event) {
                    subscriber.tell("filesystem", &change).await;
                }
            }
            Ok(None) => return,
            Err(error) => return tracing::debug!(%error, "a watch ended"),
        }
    }
}

fn change(folder: &str, event: &FilesystemEvent) -> Option<Value> {
    let operation = match event.r#type() {
        EventType::Create => "Create",
        EventType::Write => "Write",
        EventType::Remove => "Remove",
        EventType::Rename => "Rename",
        EventType::Chmod => "Chmod",
        EventType::Unspecified => return None,
    };
    let is_dir = event.entry.as_ref().is_some_and(|entry| entry.r#type() == FileType::Directory);
    Some(json!({
        "path": format!("{}/{}", folder.trim_end_matches('/'), event.name),
        "name": event.name,
        "operation": operation,
        "timestamp": timestamp(),
        "isDir": is_dir,
    }))
}

/// Tells the open ports, at first and whenever they have changed.
pub(super) async fn tell_ports(client: SandboxClient, subscriber: Subscriber) {
    let mut told = None;
    let mut interval = tokio::time::interval(PORTS_INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        match client.ports().await {
            Ok(ports) if told.as_ref() != Some(&ports) => {
                subscriber.tell("codeSnippet", &list(&ports)).await;
                told = Some(ports);
            }
            Ok(_) => {}
            Err(error) => return tracing::debug!(%error, "cannot list ports any more"),
        }
    }
}

fn list(ports: &[OpenPort]) -> Value {
    let item = |port: &OpenPort| json!({ "State": "LISTEN", "Ip": port.address, "Port": port.port });
    ports.iter().map(item).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_and_ports_have_the_old_names() {
        let event = FilesystemEvent { name: "a b".into(), r#type: EventType::Chmod.into(), entry: None };
        for folder in ["/x/", "/x"] {
            let change = change(folder, &event).unwrap();
            assert_eq!(change["path"], "/x/a b");
            assert_eq!(
                (&change["operation"], &change["isDir"], &change["name"]),
                (&json!("Chmod"), &json!(false), &json!("a b"))
            );
        }
        assert_eq!(change("/", &event).unwrap()["path"], "/a b");
        let ports = [OpenPort { address: "127.0.0.1".into(), port: 80 }];
        assert_eq!(list(&ports), json!([{ "State": "LISTEN", "Ip": "127.0.0.1", "Port": 80 }]));
    }
}
