//! The wire contract between the agent, the host shim and clients: messages, ports, names and limits. No logic.
//!
//! ```text
//!  client ──► door `client`  CLIENT_PORT   Connect protocol: process.Process, filesystem.Filesystem, /health, /files
//!  client ──► door `ports`   PORTS_PORT    CONNECT <tcp port>\n, OK\n, then bytes
//!  host   ◄── door `control` CONTROL_PORT  control::FromAgent / control::FromHost, dialled by the agent, never proxied
//! ```
//!
//! The doors are never mixed: nothing a tenant may not call is on the client door, and nothing on the control door can
//! be reached through it. How bytes get from one side to the other is the crate `envd-channel`.

pub mod boot;
pub mod build;
pub mod limits;

/// `process.Process`: E2B's names and field numbers.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    reason = "generated; the .proto files carry the documentation"
)]
pub mod process {
    include!(concat!(env!("OUT_DIR"), "/process.rs"));
    include!(concat!(env!("OUT_DIR"), "/process.serde.rs"));
}

/// `filesystem.Filesystem`: E2B's names and field numbers.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    reason = "generated; the .proto files carry the documentation"
)]
pub mod filesystem {
    include!(concat!(env!("OUT_DIR"), "/filesystem.rs"));
    include!(concat!(env!("OUT_DIR"), "/filesystem.serde.rs"));
}

/// The control door, between the agent and its host only.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    reason = "generated; the .proto files carry the documentation"
)]
pub mod control {
    include!(concat!(env!("OUT_DIR"), "/tiffin.control.v1.rs"));
    include!(concat!(env!("OUT_DIR"), "/tiffin.control.v1.serde.rs"));
}

/// The version of the control protocol that this build speaks. 2 added Freeze, Resume, Thaw, Stats, a Configure's network, and
/// log lines and events; 3 added Rehearse, a Freeze without a sync, a Configure's scratch size, and how long a Resume's parts
/// took. An older agent refuses requests that it does not know as unsupported and skips such fields; an older host skips what
/// it does not know.
pub const PROTOCOL_VERSION: u32 = 3;

/// The oldest version of the control protocol that this build accepts. A shim takes an agent one version older.
pub const OLDEST_PROTOCOL_VERSION: u32 = 1;

/// The port of the client door, on vsock and in a stream's opening.
pub const CLIENT_PORT: u32 = 49983;

/// The port of the ports door.
pub const PORTS_PORT: u32 = 49984;

/// The port on the host that the agent dials for the control door when its kernel arguments name no other.
pub const CONTROL_PORT: u32 = 1024;

/// The vsock CID of the host (`VMADDR_CID_HOST`).
pub const HOST_CID: u32 = 2;

/// The generation of a sandbox that was booted cold. Each restore raises it by one.
pub const FIRST_GENERATION: u64 = 1;

/// The .proto files as an encoded `FileDescriptorSet`, for tools that want to know every method and field.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;

    #[test]
    fn the_contract_changes_only_on_purpose() {
        // Field numbers and names are what clients and stored snapshots depend on: a change shows here as a diff.
        let set = pbjson_types_descriptor();
        insta::assert_snapshot!(set);
    }

    /// Every message field and method of our packages, a line each.
    fn pbjson_types_descriptor() -> String {
        #[derive(Clone, PartialEq, Message)]
        struct Set {
            #[prost(message, repeated, tag = "1")]
            files: Vec<File>,
        }
        #[derive(Clone, PartialEq, Message)]
        struct File {
            #[prost(string, tag = "2")]
            package: String,
            #[prost(message, repeated, tag = "4")]
            messages: Vec<MessageType>,
            #[prost(message, repeated, tag = "6")]
            services: Vec<Service>,
        }
        #[derive(Clone, PartialEq, Message)]
        struct MessageType {
            #[prost(string, tag = "1")]
            name: String,
            #[prost(message, repeated, tag = "2")]
            fields: Vec<Field>,
            #[prost(message, repeated, tag = "3")]
            nested: Vec<MessageType>,
        }
        #[derive(Clone, PartialEq, Message)]
        struct Field {
            #[prost(string, tag = "1")]
            name: String,
            #[prost(int32, tag = "3")]
            number: i32,
            #[prost(int32, tag = "5")]
            kind: i32,
        }
        #[derive(Clone, PartialEq, Message)]
        struct Service {
            #[prost(string, tag = "1")]
            name: String,
            #[prost(message, repeated, tag = "2")]
            methods: Vec<Method>,
        }
        #[derive(Clone, PartialEq, Message)]
        struct Method {
            #[prost(string, tag = "1")]
            name: String,
        }
        fn lines(prefix: &str, message: &MessageType, out: &mut String) {
            let name = format!("{prefix}.{}", message.name);
            for field in &message.fields {
                out.push_str(&format!("{name}.{} = {} (type {})\n", field.name, field.number, field.kind));
            }
            for nested in &message.nested {
                lines(&name, nested, out);
            }
        }
        let set = Set::decode(DESCRIPTORS).unwrap();
        let mut out = String::new();
        for file in set.files.iter().filter(|file| file.package != "google.protobuf") {
            for message in &file.messages {
                lines(&file.package, message, &mut out);
            }
            for service in &file.services {
                for method in &service.methods {
                    out.push_str(&format!("{}.{}/{}\n", file.package, service.name, method.name));
                }
            }
        }
        out
    }

    #[test]
    fn json_is_what_the_clients_send() {
        let start: process::StartRequest = serde_json::from_str(
            r#"{"process":{"cmd":"/bin/bash","args":["-l"],"envs":{"A":"1"},"novel":{"x":1}},"stdin":false,"later":3}"#,
        )
        .expect("unknown fields are ignored");
        assert_eq!(start.stdin, Some(false));
        assert_eq!(start.process.unwrap().cmd, "/bin/bash");

        let event = process::ProcessEvent {
            event: Some(process::process_event::Event::Data(process::process_event::DataEvent {
                output: Some(process::process_event::data_event::Output::Stdout(b"\xff\x00".to_vec().into())),
                ..Default::default()
            })),
        };
        assert_eq!(serde_json::to_string(&event).unwrap(), r#"{"data":{"stdout":"/wA="}}"#);

        let entry = filesystem::EntryInfo {
            name: "a".into(),
            r#type: filesystem::FileType::File.into(),
            size: 3,
            modified_time: Some(pbjson_types::Timestamp { seconds: 1, nanos: 0 }),
            ..Default::default()
        };
        assert_eq!(
            serde_json::to_string(&entry).unwrap(),
            r#"{"name":"a","type":"FILE_TYPE_FILE","size":"3","modifiedTime":"1970-01-01T00:00:01+00:00"}"#
        );
    }
}
