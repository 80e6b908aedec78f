//! The config of the image being built (OCI image-spec 1.1, `config.md`).

use std::collections::{BTreeMap, BTreeSet};

use oci::{Digest, Platform};
use serde_json::{Map, Value, json};

/// What the steps of a stage change. Fields of the base image's config that are not here are kept as they were.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageConfig {
    /// Environment, in the order in which it was set.
    pub env: Vec<(String, String)>,
    /// `USER`.
    pub user: String,
    /// `WORKDIR`; empty means `/`.
    pub workdir: String,
    /// `ENTRYPOINT`.
    pub entrypoint: Option<Vec<String>>,
    /// `CMD`.
    pub cmd: Option<Vec<String>>,
    /// `EXPOSE`, as `80/tcp`.
    pub exposed_ports: BTreeSet<String>,
    /// `VOLUME`.
    pub volumes: BTreeSet<String>,
    /// `LABEL`.
    pub labels: BTreeMap<String, String>,
    /// `SHELL`; empty means `/bin/sh -c`.
    pub shell: Vec<String>,
    /// `STOPSIGNAL`.
    pub stop_signal: Option<String>,
    /// `HEALTHCHECK`, as the config has it.
    pub healthcheck: Option<Value>,
    /// `ONBUILD`: instructions for the images on top of this one.
    pub on_build: Vec<String>,
    /// `MAINTAINER`.
    pub author: Option<String>,
    base: Value,
}

/// One line of an image's history.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct HistoryEntry {
    /// When, as RFC 3339.
    pub created: String,
    /// The instruction.
    pub created_by: String,
    /// Whether the step made no layer.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub empty_layer: bool,
}

impl ImageConfig {
    /// Reads the config of a base image. Its types were checked when the image was opened.
    pub fn from_json(base: &Value) -> Self {
        let config = &base["config"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let list = |value: &Value| value.as_array().map(|items| items.iter().map(text).collect::<Vec<_>>());
        let keys =
            |value: &Value| value.as_object().map(|map| map.keys().cloned().collect()).unwrap_or_default();
        let env = list(&config["Env"]).unwrap_or_default();
        let split = |entry: String| match entry.split_once('=') {
            Some((name, value)) => (name.to_owned(), value.to_owned()),
            None => (entry, String::new()),
        };
        let labels = config["Labels"].as_object().cloned().unwrap_or_default();
        Self {
            env: env.into_iter().map(split).collect(),
            user: text(&config["User"]),
            workdir: text(&config["WorkingDir"]),
            entrypoint: list(&config["Entrypoint"]),
            cmd: list(&config["Cmd"]),
            exposed_ports: keys(&config["ExposedPorts"]),
            volumes: keys(&config["Volumes"]),
            labels: labels.into_iter().map(|(name, value)| (name, text(&value))).collect(),
            shell: list(&config["Shell"]).unwrap_or_default(),
            stop_signal: config["StopSignal"].as_str().map(str::to_owned),
            healthcheck: config.get("Healthcheck").filter(|check| !check.is_null()).cloned(),
            on_build: list(&config["OnBuild"]).unwrap_or_default(),
            author: base["author"].as_str().map(str::to_owned),
            base: base.clone(),
        }
    }

    /// The config of an image that begins with nothing.
    pub fn for_platform(platform: &Platform) -> Self {
        let mut base = json!({"architecture": platform.architecture(), "os": platform.os()});
        if let Some(variant) = platform.variant() {
            base["variant"] = json!(variant);
        }
        Self { base, ..Self::default() }
    }

    /// Sets a variable; one that is there keeps its place.
    pub fn set_env(&mut self, name: &str, value: String) {
        match self.env.iter_mut().find(|(known, _)| known == name) {
            Some(entry) => entry.1 = value,
            None => self.env.push((name.to_owned(), value)),
        }
    }

    /// The value of a variable.
    pub fn env_value(&self, name: &str) -> Option<&str> {
        self.env.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// The history that the base image brought, as it is.
    pub fn base_history(&self) -> Vec<Value> {
        self.base["history"].as_array().cloned().unwrap_or_default()
    }

    /// When the base image was made, where it says so.
    pub fn base_created(&self) -> Option<&str> {
        self.base["created"].as_str()
    }

    /// The whole config of the finished image. `history` follows the base image's own.
    pub fn to_json(&self, created: &str, diff_ids: &[Digest], history: &[HistoryEntry]) -> Value {
        let mut config = self.base["config"].as_object().cloned().unwrap_or_default();
        let strings = |items: &[String]| (!items.is_empty()).then(|| json!(items));
        let set_of = |items: &BTreeSet<String>| {
            (!items.is_empty()).then(|| {
                Value::Object(items.iter().map(|item| (item.clone(), json!({}))).collect::<Map<_, _>>())
            })
        };
        let env: Vec<_> = self.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let text = |value: &str| (!value.is_empty()).then(|| json!(value));
        for (name, value) in [
            ("Env", strings(&env)),
            ("User", text(&self.user)),
            ("WorkingDir", text(&self.workdir)),
            ("Entrypoint", self.entrypoint.as_deref().and_then(strings)),
            ("Cmd", self.cmd.as_deref().and_then(strings)),
            ("ExposedPorts", set_of(&self.exposed_ports)),
            ("Volumes", set_of(&self.volumes)),
            ("Labels", (!self.labels.is_empty()).then(|| json!(self.labels))),
            ("Shell", strings(&self.shell)),
            ("Healthcheck", self.healthcheck.clone()),
            ("OnBuild", strings(&self.on_build)),
            ("StopSignal", self.stop_signal.as_deref().and_then(text)),
        ] {
            match value {
                Some(value) => config.insert(name.to_owned(), value),
                None => config.remove(name),
            };
        }
        let mut image = self.base.as_object().cloned().unwrap_or_default();
        // What Docker keeps of the container that it committed says nothing about this image.
        for stale in ["container", "container_config", "id", "parent", "throwaway"] {
            image.remove(stale);
        }
        let platform = oci::host_platform();
        image.entry("architecture").or_insert_with(|| json!(platform.architecture()));
        image.entry("os").or_insert_with(|| json!(platform.os()));
        if let Some(author) = &self.author {
            image.insert("author".to_owned(), json!(author));
        }
        let mut lines = self.base_history();
        lines.extend(history.iter().map(|entry| json!(entry)));
        image.insert("created".to_owned(), json!(created));
        image.insert("config".to_owned(), Value::Object(config));
        image.insert("rootfs".to_owned(), json!({"type": "layers", "diff_ids": diff_ids}));
        image.insert("history".to_owned(), json!(lines));
        Value::Object(image)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_touched_is_kept() {
        let base = json!({
            "architecture": "amd64", "os": "linux", "container": "x", "docker_version": "20",
            "config": {
                "Env": ["PATH=/bin", "A=b=c"], "Cmd": ["sh"], "Healthcheck": {"Test": ["NONE"]},
                "ExposedPorts": {"80/tcp": {}}, "Labels": {"a": "b"}, "WorkingDir": "/w",
            },
            "rootfs": {"type": "layers", "diff_ids": []},
            "history": [{"created_by": "base"}],
        });
        let mut config = ImageConfig::from_json(&base);
        assert_eq!(config.env_value("A"), Some("b=c"));
        config.set_env("PATH", "/usr/bin".into());
        config.exposed_ports.insert("81/udp".into());
        config.cmd = None;
        let entry = HistoryEntry {
            created: "2026-01-01T00:00:00Z".into(),
            created_by: "ENV".into(),
            empty_layer: true,
        };
        let json = config.to_json("2026-01-01T00:00:00Z", &[], &[entry]);
        insta::assert_json_snapshot!(json);
        let parsed: oci::ImageConfiguration = serde_json::from_value(json.clone()).unwrap();
        assert_eq!(parsed.rootfs().diff_ids().len(), 0);
        assert_eq!(ImageConfig::from_json(&json).env, config.env);
    }

    #[test]
    fn an_empty_config_is_valid() {
        let json = ImageConfig::default().to_json("2026-01-01T00:00:00Z", &[], &[]);
        assert!(serde_json::from_value::<oci::ImageConfiguration>(json).is_ok());
    }
}
