//! `pull`, `push`, `tag`, `rm`, `inspect`, `login` and `logout`.

use std::io::{BufRead, Read};
use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Subcommand};
use image_builder::{
    Console, CredentialFiles, Error, Inspected, Interrupt, Platforms, Registries, RegistryOptions, Saved,
};
use oci::{ImageName, ImageReference, Store, parse_platform};

use super::{line, print};

/// The longest password that is read from stdin; the tokens of some registries have kilobytes.
const MAX_PASSWORD: u64 = 64 << 10;

/// Where registries and what we are to them are configured.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct RegistryArgs {
    /// The configuration of registries: mirrors, insecure ones [default: $CONTAINERS_REGISTRIES_CONF, else
    /// ~/.config/containers/registries.conf, else /etc/containers/registries.conf]
    #[arg(long, value_name = "FILE")]
    registries_conf: Option<PathBuf>,
    /// The file of credentials [default: $REGISTRY_AUTH_FILE, else $DOCKER_CONFIG/config.json or ~/.docker/config.json, else
    /// containers/auth.json in $XDG_RUNTIME_DIR or ~/.config]
    #[arg(long, value_name = "FILE")]
    authfile: Option<PathBuf>,
}

impl RegistryArgs {
    pub(super) fn options(&self) -> RegistryOptions {
        RegistryOptions { registries_conf: self.registries_conf.clone(), auth_file: self.authfile.clone() }
    }
}

/// `--platform`.
fn platforms(text: &str) -> Result<Platforms, oci::InvalidReference> {
    match text {
        "all" => Ok(Platforms::All),
        text => parse_platform(text).map(Platforms::One),
    }
}

#[derive(Debug, Subcommand)]
pub(super) enum RegistryCommand {
    /// Fetch an image from its registry into the local store
    #[command(after_help = concat!(
        "Examples:\n",
        "  image-builder pull debian:bookworm\n",
        "  image-builder pull ghcr.io/org/app:1 --platform linux/arm64\n",
        "  image-builder pull registry.example/app@sha256:...\n",
        "  image-builder pull debian --platform all       the index and every image of it, to push it elsewhere\n\n",
        "Blobs that the store has are not fetched again; what broke off goes on where it ended. Registries on this machine\n",
        "may be without TLS; others where registries.conf says insecure = true. HTTPS_PROXY, HTTP_PROXY, NO_PROXY,\n",
        "SSL_CERT_FILE and SSL_CERT_DIR are honoured.\n\n",
        "Exit codes: 0 done, 1 it failed, 2 wrong usage or bad input, 130 interrupted."
    ))]
    Pull {
        /// The image: NAME[:TAG][@DIGEST], or docker:// and that
        image: ImageReference,
        /// OS/ARCHITECTURE[/VARIANT], or `all` [default: this machine's]
        #[arg(long, value_parser = platforms, value_name = "PLATFORM")]
        platform: Option<Platforms>,
        /// Print the result as JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        registry: RegistryArgs,
    },
    /// Bring an image to a registry, or to another place
    #[command(after_help = concat!(
        "Examples:\n",
        "  image-builder push registry.example/team/app:1\n",
        "  image-builder push app:1 docker://registry.example/team/app:1\n",
        "  image-builder push oci-archive:app.tar docker://localhost:5000/app\n",
        "  image-builder push app:1 docker-archive:app.tar     for docker load\n\n",
        "The manifest goes as it is, so its digest stays. Blobs that the registry has are not sent, those of its other\n",
        "repositories are mounted where the local store knows of them.\n\n",
        "Exit codes: 0 done, 1 it failed, 2 wrong usage or bad input, 130 interrupted."
    ))]
    Push {
        /// A name in the local store, docker://NAME, oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:NAME],
        /// or what skopeo reads: dir:DIR, docker-daemon:NAME, containers-storage:NAME
        image: ImageReference,
        /// Where to, in the same words [default: where the image's name says]
        destination: Option<ImageReference>,
        /// Print the result as JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        registry: RegistryArgs,
    },
    /// Give an image of the local store further names
    #[command(after_help = concat!(
        "Examples:\n",
        "  image-builder tag app:1 registry.example/team/app:1 registry.example/team/app:latest\n\n",
        "Exit codes: 0 done, 1 there is no such image, 2 wrong usage or bad input."
    ))]
    Tag {
        /// The image's name
        image: ImageName,
        /// The names that it gets
        #[arg(required = true)]
        names: Vec<ImageName>,
        /// Print the result as JSON
        #[arg(long)]
        json: bool,
    },
    /// Take names of images away from the local store
    #[command(after_help = concat!(
        "Examples:\n",
        "  image-builder rm app:1\n",
        "  image-builder rm --force app:1 app:2      no error when they are not there\n\n",
        "An image without a name stays in the store until it is pruned. Nothing is removed when one of the names is missing.\n\n",
        "Exit codes: 0 done, 1 there is no such image, 2 wrong usage or bad input."
    ))]
    Rm {
        /// The names
        #[arg(required = true)]
        names: Vec<ImageName>,
        /// A name that is not there is no error
        #[arg(long, short)]
        force: bool,
        /// Print the removed names as JSON
        #[arg(long)]
        json: bool,
    },
    /// Show what an image is: platforms, layers, config, history
    #[command(after_help = concat!(
        "Examples:\n",
        "  image-builder inspect app:1\n",
        "  image-builder inspect docker://debian:bookworm --platform linux/arm64      its layers are not fetched\n",
        "  image-builder inspect oci-archive:app.tar --json | jq .config.config.Env\n",
        "  image-builder inspect docker://debian:bookworm --raw      the bytes of the index\n\n",
        "Exit codes: 0 done, 1 it failed, 2 wrong usage or bad input, 130 interrupted."
    ))]
    Inspect {
        /// As for push
        image: ImageReference,
        /// The image of an index that is shown [default: this machine's]
        #[arg(long, value_name = "PLATFORM", value_parser = platforms)]
        platform: Option<Platforms>,
        /// Print the manifest or index as it is, byte for byte
        #[arg(long, conflicts_with = "json")]
        raw: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        registry: RegistryArgs,
    },
    /// Check a name and a password with a registry, and keep them
    #[command(after_help = concat!(
        "Examples:\n",
        "  image-builder login registry.example --username me --password-stdin < token\n",
        "  echo $TOKEN | image-builder login ghcr.io -u me --password-stdin\n\n",
        "They are kept as Docker keeps them: by the program docker-credential-NAME that the file names (credsStore,\n",
        "credHelpers), else in the file, which only its owner can read.\n\n",
        "Exit codes: 0 done, 1 the registry does not take them or is not there, 2 wrong usage or bad input, 130 interrupted."
    ))]
    Login {
        /// The registry: HOST[:PORT]
        #[arg(default_value = "docker.io")]
        registry_host: String,
        /// The name
        #[arg(long, short, value_name = "NAME")]
        username: String,
        /// Read the password from stdin, to the end of its first line
        #[arg(long, required = true)]
        password_stdin: bool,
        #[command(flatten)]
        registry: RegistryArgs,
    },
    /// Forget the name and the password for a registry
    #[command(after_help = concat!(
        "Examples:\n",
        "  image-builder logout registry.example\n\n",
        "Exit codes: 0 done, also when nothing was known, 1 it failed, 2 wrong usage or bad input."
    ))]
    Logout {
        /// The registry: HOST[:PORT]
        #[arg(default_value = "docker.io")]
        registry_host: String,
        #[command(flatten)]
        registry: RegistryArgs,
    },
}

/// Carries the command out.
pub(super) fn registry(
    command: RegistryCommand,
    store: impl Fn() -> Result<Store, Error>,
    console: &Console,
) -> anyhow::Result<()> {
    let _interrupt = Interrupt::install()?;
    match command {
        RegistryCommand::Pull { image, platform, json, registry } => {
            let (ImageReference::Name(name) | ImageReference::Registry(name)) = image else {
                return Err(invalid(
                    image.to_string(),
                    "that is no registry; bring it in with image-builder load",
                ));
            };
            let platforms = platform.unwrap_or_default();
            let report = image_builder::pull(&store()?, &name, &platforms, &registry.options(), console)?;
            print(json, &report, &format!("{} {}", report.name, report.digest))
        }
        RegistryCommand::Push { image, destination, json, registry } => {
            let options = registry.options();
            let saved = image_builder::push(&store()?, &image, destination.as_ref(), &options, console)?;
            print(json, &saved, &told(&saved))
        }
        RegistryCommand::Tag { image, names, json } => {
            let digest = image_builder::tag(&store()?, &image, &names)?;
            let names: Vec<_> = names.iter().map(ImageName::canonical).collect();
            let text = names.iter().map(|name| format!("{name} {digest}")).collect::<Vec<_>>().join("\n");
            print(json, &serde_json::json!({"names": names, "digest": digest}), &text)
        }
        RegistryCommand::Rm { names, force, json } => {
            let removed = image_builder::remove(&store()?, &names, force)?;
            if removed.is_empty() && !json { Ok(()) } else { print(json, &removed, &removed.join("\n")) }
        }
        RegistryCommand::Inspect { image, platform, raw, json, registry } => {
            let options = registry.options();
            if raw {
                let bytes = image_builder::raw_manifest(&store()?, &image, &options, console)?;
                return super::bytes(&bytes);
            }
            let platforms = platform.unwrap_or_default();
            let inspected = image_builder::inspect(&store()?, &image, &platforms, &options, console)?;
            print(json, &inspected, &description(&inspected))
        }
        RegistryCommand::Login { registry_host, username, password_stdin: _, registry } => {
            let host = checked(&registry_host)?;
            if username.is_empty() || username.contains(':') {
                return Err(invalid(format!("--username {username}"), "expected a name without a colon"));
            }
            let password = password()?;
            let options = registry.options();
            Registries::open(&options)?.check_login(&host, &username, &password, console)?;
            let place =
                CredentialFiles::find(options.auth_file.as_deref()).store(&host, &username, &password)?;
            line(&format!("logged in to {host} as {username}; kept by {place}"))
        }
        RegistryCommand::Logout { registry_host, registry } => {
            let host = checked(&registry_host)?;
            match CredentialFiles::find(registry.options().auth_file.as_deref()).erase(&host)? {
                true => line(&format!("logged out of {host}")),
                false => line(&format!("nothing was known for {host}")),
            }
        }
    }
}

/// Where an image went, for people.
pub(super) fn told(saved: &Saved) -> String {
    match saved {
        Saved::Pushed(report) => format!("{} {}", report.name, report.digest),
        Saved::Written { destination, digest } => format!("{destination} {digest}"),
    }
}

fn invalid(what: impl Into<String>, reason: &str) -> anyhow::Error {
    Error::Invalid { what: what.into(), reason: reason.to_owned() }.into()
}

/// A registry's host, as names of images have it.
fn checked(host: &str) -> anyhow::Result<String> {
    let bare = host.strip_prefix("https://").or_else(|| host.strip_prefix("http://")).unwrap_or(host);
    let bare = bare.trim_end_matches('/');
    // Behind its host, any name tells whether it is one.
    let name: Result<ImageName, _> = format!("{bare}/x/x").parse();
    match name {
        Ok(name) if name.registry() == bare || bare == "index.docker.io" => Ok(name.registry().to_owned()),
        _ => Err(invalid(host, "expected a registry's HOST[:PORT], for example ghcr.io or localhost:5000")),
    }
}

fn password() -> anyhow::Result<String> {
    let mut password = String::new();
    let stdin = std::io::stdin().lock().take(MAX_PASSWORD + 1);
    std::io::BufReader::new(stdin).read_line(&mut password).context("cannot read the password from stdin")?;
    let password = password.trim_end_matches(['\r', '\n']);
    if password.is_empty() || password.len() as u64 > MAX_PASSWORD {
        return Err(invalid("--password-stdin", "expected a password on stdin, of 1 to 65536 bytes"));
    }
    Ok(password.to_owned())
}

/// An image for people.
fn description(image: &Inspected) -> String {
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / 1_048_576.0);
    let mut lines = vec![
        format!("image      {}", image.reference),
        format!("digest     {}", image.digest),
        format!("type       {}", image.media_type),
        format!("platforms  {}", image.platforms.join(", ")),
    ];
    if image.manifest != image.digest {
        lines.push(format!("manifest   {}", image.manifest));
    }
    lines.extend(image.created.iter().map(|created| format!("created    {created}")));
    lines.push(format!("size       {} compressed, in {} layers", mib(image.size), image.layers.len()));
    for (name, value) in &image.annotations {
        lines.push(format!("annotation {name}={value}"));
    }
    let config = &image.config["config"];
    for name in
        ["Entrypoint", "Cmd", "WorkingDir", "User", "ExposedPorts", "Volumes", "Env", "Labels", "StopSignal"]
    {
        match &config[name] {
            serde_json::Value::Null => {}
            serde_json::Value::String(text) if text.is_empty() => {}
            serde_json::Value::String(text) => lines.push(format!("{:10} {text}", name.to_lowercase())),
            value => lines.push(format!("{:10} {value}", name.to_lowercase())),
        }
    }
    lines.push("layers".to_owned());
    lines.extend(
        image
            .layers
            .iter()
            .map(|layer| format!("  {} {:>11}  {}", layer.digest, mib(layer.size), layer.media_type)),
    );
    lines.push("history".to_owned());
    for step in image.config["history"].as_array().into_iter().flatten() {
        let text = |name: &str| step[name].as_str().unwrap_or_default();
        let empty = if step["empty_layer"] == true { " (no layer)" } else { "" };
        lines.push(format!("  {} {}{empty}", text("created"), text("created_by").replace('\n', " ")));
    }
    // What strangers wrote is text, and no command for the terminal.
    let plain = |line: String| {
        line.chars().map(|character| if character.is_control() { ' ' } else { character }).collect()
    };
    lines.into_iter().map(plain).collect::<Vec<String>>().join("\n")
}
