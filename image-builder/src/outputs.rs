//! `build --output`: what a pipeline wants of an image besides a name in the local store.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use oci::{Image, ImageName, Store, copy_image, write_archive};
use rootfs_tools::Size;
use serde::Serialize;
use serde_json::json;
use template::{DataDir, Machine, TemplateName};

use crate::builder::BuildReport;
use crate::console::Console;
use crate::durable;
use crate::error::{Error, at};
use crate::interrupt::Interrupt;
use crate::templates::{self, TemplateOptions};
use crate::warm::SnapshotChoice;

const MIB: u64 = 1 << 20;
/// As `template create` has them.
const DEFAULT_MACHINE: Machine = Machine { cpus: 1, memory_mib: 512, disk_mib: 1024 };

/// One `--output`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BuildOutput {
    /// `type=oci`: an image layout.
    Oci {
        /// The folder, or the archive.
        destination: PathBuf,
        /// Whether it is a tar file.
        tar: bool,
        /// The image's name in it.
        tag: Option<String>,
    },
    /// `type=rootfs`: an ext4 file system in a file.
    Rootfs {
        /// The file.
        destination: PathBuf,
        /// Its size; as small as the image by default.
        size_mib: Option<u64>,
    },
    /// `type=template`: a template in the data folder.
    Template(Box<TemplateOutput>),
}

/// What is asked of a template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TemplateOutput {
    name: TemplateName,
    machine: Machine,
    start_command: Option<String>,
    ready_command: Option<String>,
    rootfs_mib: Option<u64>,
    snapshot: SnapshotChoice,
}

/// What became of an `--output`.
#[derive(Clone, Debug, Serialize)]
pub struct WrittenOutput {
    /// `oci`, `rootfs` or `template`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Where it is.
    pub path: PathBuf,
}

impl FromStr for BuildOutput {
    type Err = String;

    /// `type=TYPE,KEY=VALUE,...`; a field with a comma stands in double quotes, as in docker buildx.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut values = BTreeMap::new();
        for field in fields(text)? {
            let (key, value) = field
                .split_once('=')
                .ok_or_else(|| format!("{field:?}: expected KEY=VALUE, as type=oci,dest=FILE"))?;
            if values.insert(key.trim().to_ascii_lowercase(), value.to_owned()).is_some() {
                return Err(format!("{key} is given twice"));
            }
        }
        let kind = values.remove("type").ok_or("type=oci, type=rootfs or type=template is missing")?;
        let mut take = |key: &str| values.remove(key);
        let number = |key: &str, value: Option<String>, range: std::ops::RangeInclusive<u64>| {
            let wrong = |value: &str| format!("{key}={value}: expected {} to {}", range.start(), range.end());
            let parse = |value: String| {
                value.parse().ok().filter(|number| range.contains(number)).ok_or_else(|| wrong(&value))
            };
            value.map(parse).transpose()
        };
        let output = match kind.as_str() {
            "oci" => {
                let destination = destination(take("dest"))?;
                let ends_as_tar = destination.extension().is_some_and(|extension| extension == "tar");
                let tar = match take("tar").as_deref() {
                    None => ends_as_tar,
                    Some("true" | "1") => true,
                    Some("false" | "0") => false,
                    Some(other) => return Err(format!("tar={other}: expected true or false")),
                };
                Self::Oci { destination, tar, tag: take("tag") }
            }
            "rootfs" => Self::Rootfs {
                destination: destination(take("dest"))?,
                size_mib: number("size", take("size"), 1..=16_777_216)?,
            },
            "template" => {
                if take("dest").is_some() {
                    return Err("a template goes to the data folder: name it with name=NAME".to_owned());
                }
                let name = take("name").ok_or("name=NAME is missing")?;
                let cpus = number("cpus", take("cpus"), 1..=256)?.and_then(|cpus| u32::try_from(cpus).ok());
                let machine = Machine {
                    cpus: cpus.unwrap_or(DEFAULT_MACHINE.cpus),
                    memory_mib: number("memory", take("memory"), 64..=16_777_216)?
                        .unwrap_or(DEFAULT_MACHINE.memory_mib),
                    disk_mib: number("disk", take("disk"), 1..=16_777_216)?
                        .unwrap_or(DEFAULT_MACHINE.disk_mib),
                };
                let snapshot = match take("snapshot").as_deref() {
                    None | Some("auto") => SnapshotChoice::Auto,
                    Some("always") => SnapshotChoice::Always,
                    Some("never") => SnapshotChoice::Never,
                    Some(other) => return Err(format!("snapshot={other}: expected auto, always or never")),
                };
                Self::Template(Box::new(TemplateOutput {
                    name: name.parse().map_err(|error: template::InvalidName| error.to_string())?,
                    machine,
                    start_command: take("start"),
                    ready_command: take("ready"),
                    rootfs_mib: number("rootfs-size", take("rootfs-size"), 1..=16_777_216)?,
                    snapshot,
                }))
            }
            other => return Err(format!("type={other}: expected oci, rootfs or template")),
        };
        match values.into_keys().next() {
            Some(key) => Err(format!("type={kind} has no {key}")),
            None => Ok(output),
        }
    }
}

fn destination(value: Option<String>) -> Result<PathBuf, String> {
    let value = value.filter(|value| !value.is_empty()).ok_or("dest=PATH is missing")?;
    // Builds change the working directory of threads.
    std::path::absolute(&value).map_err(|error| format!("dest={value}: {error}"))
}

/// The fields of one line of CSV.
fn fields(text: &str) -> Result<Vec<String>, String> {
    let (mut fields, mut field, mut quoted) = (Vec::new(), String::new(), false);
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '"' if quoted && characters.peek() == Some(&'"') => {
                characters.next();
                field.push('"');
            }
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(std::mem::take(&mut field)),
            other => field.push(other),
        }
    }
    fields.push(field);
    if quoted { Err(format!("{text:?}: a quote has no end")) } else { Ok(fields) }
}

/// Writes one output of an image that is in the store.
pub(crate) fn write(
    data: &DataDir,
    store: &Store,
    report: &BuildReport,
    output: &BuildOutput,
    console: &Console,
    interrupt: &Interrupt,
) -> Result<WrittenOutput, Error> {
    let descriptor = report.descriptor();
    let image = Image::open(store, &descriptor)?;
    let tag_of_name = || {
        let name = report.names.first()?.parse::<ImageName>().ok()?;
        name.tag().map(str::to_owned)
    };
    match output {
        BuildOutput::Oci { destination, tar, tag } => {
            let tag = tag.clone().or_else(tag_of_name).unwrap_or_else(|| "latest".to_owned());
            let _work = console.work(&format!("writing {}", destination.display()), None);
            if *tar {
                write_archive(store, &descriptor, Some(&tag), destination)?;
            } else {
                let layout = Store::open_or_create(destination)?;
                layout.tag(&tag, &copy_image(store, &descriptor, &layout)?)?;
            }
            Ok(WrittenOutput { kind: "oci", path: destination.clone() })
        }
        BuildOutput::Rootfs { destination, size_mib } => {
            let size = match size_mib {
                None => Size::Minimal,
                Some(mib) => Size::Exact(mib * MIB),
            };
            templates::write_rootfs(&image, size, destination, console)?;
            Ok(WrittenOutput { kind: "rootfs", path: destination.clone() })
        }
        BuildOutput::Template(template) => {
            let TemplateOutput { name, machine, start_command, ready_command, rootfs_mib, snapshot } =
                *template.clone();
            let name_of_image = match report.names.first() {
                Some(name) => name.clone(),
                None => format!("localhost/{name}@{}", report.digest),
            };
            let options = TemplateOptions {
                pull: Default::default(),
                e2b_user: false,
                name,
                image: name_of_image.parse()?,
                machine,
                start_command,
                ready_command,
                rootfs_mib,
                kernel: templates::installed("vmlinux"),
                guest_image: templates::installed("guest-image.cpio"),
                snapshot,
                host_shim: None,
            };
            let made = templates::create_from(data, &image, &options, console, interrupt)?;
            if let Some(why) = made.no_snapshot.filter(|_| snapshot != SnapshotChoice::Never) {
                console.line(&format!("note: the template has no snapshot, its sandboxes will boot: {why}"));
            }
            Ok(WrittenOutput { kind: "template", path: made.path })
        }
    }
}

/// `--metadata-file`, with the keys of docker buildx.
pub(crate) fn write_metadata(file: &Path, report: &BuildReport) -> Result<(), Error> {
    let mut metadata = json!({
        "containerimage.config.digest": report.config_digest,
        "containerimage.descriptor": report.descriptor(),
        "containerimage.digest": report.digest,
    });
    if !report.names.is_empty() {
        metadata["image.name"] = json!(report.names.join(","));
    }
    let text =
        serde_json::to_string_pretty(&metadata).map_err(|error| at(file)(std::io::Error::from(error)))?;
    durable::write(file, format!("{text}\n").as_bytes())
}

/// `--iidfile`: what Docker calls the image's id.
pub(crate) fn write_id(file: &Path, report: &BuildReport) -> Result<(), Error> {
    durable::write(file, report.config_digest.to_string().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_are_read_as_buildx_reads_them() {
        let parse = |text: &str| text.parse::<BuildOutput>();
        let oci = |destination: &str, tar, tag: Option<&str>| BuildOutput::Oci {
            destination: destination.into(),
            tar,
            tag: tag.map(str::to_owned),
        };
        assert_eq!(parse("type=oci,dest=/a/b.tar").unwrap(), oci("/a/b.tar", true, None));
        assert_eq!(parse("type=oci,dest=/a/b.tar,tar=false").unwrap(), oci("/a/b.tar", false, None));
        assert_eq!(parse("type=oci,dest=/a,tar=true,tag=v1").unwrap(), oci("/a", true, Some("v1")));
        assert_eq!(parse("type=oci,\"dest=/a,b\"").unwrap(), oci("/a,b", false, None));
        let rootfs = BuildOutput::Rootfs { destination: "/r".into(), size_mib: Some(64) };
        assert_eq!(parse("type=rootfs,dest=/r,size=64").unwrap(), rootfs);
        let Ok(BuildOutput::Template(template)) = parse("type=template,name=web,cpus=2,\"start=a, b\"")
        else {
            panic!("no template")
        };
        assert_eq!((template.machine.cpus, template.machine.memory_mib), (2, 512));
        assert_eq!(template.start_command.as_deref(), Some("a, b"));
        for (text, reason) in [
            ("out", "expected KEY=VALUE"),
            ("dest=x", "type=oci, type=rootfs or type=template is missing"),
            ("type=local,dest=x", "type=local: expected oci, rootfs or template"),
            ("type=oci", "dest=PATH is missing"),
            ("type=oci,dest=x,dest=y", "dest is given twice"),
            ("type=oci,dest=x,size=1", "type=oci has no size"),
            ("type=oci,dest=x,tar=maybe", "expected true or false"),
            ("type=rootfs,dest=x,size=0", "size=0: expected 1 to"),
            ("type=template", "name=NAME is missing"),
            ("type=template,name=a,dest=x", "name it with name=NAME"),
            ("type=template,name=../a", "../a"),
            ("type=template,name=a,memory=1", "memory=1: expected 64 to"),
            ("type=oci,\"dest=x", "a quote has no end"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
