//! A template folder for this crate's tests; nothing in it boots.

use std::path::{Path, PathBuf};

use template::{Machine, NewTemplate, Rootfs, RuntimeConfig, SCHEMA_VERSION, SourceImage, Template};

/// Writes the template `demo` below `templates`.
pub(crate) fn write(templates: &Path) -> PathBuf {
    let new = NewTemplate::begin(templates, &"demo".parse().unwrap()).unwrap();
    std::fs::write(new.rootfs(), b"rootfs").unwrap();
    let digest: String = format!("sha256:{}", "a".repeat(64));
    let template = Template {
        schema_version: SCHEMA_VERSION,
        image: SourceImage { reference: "demo".into(), digest: digest.parse().unwrap() },
        kernel: None,
        guest_image: None,
        rootfs: Rootfs { digest: digest.parse().unwrap(), size: 6 },
        runtime: RuntimeConfig {
            env: [("A", "theirs"), ("PATH", "/bin")].map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
            user: "user".into(),
            workdir: "/work".into(),
            entrypoint: vec!["/entry".into()],
            cmd: vec!["arg".into()],
            ..RuntimeConfig::default()
        },
        machine: Machine::default(),
        snapshot_only: false,
    };
    new.publish(&template).unwrap().path().to_owned()
}
