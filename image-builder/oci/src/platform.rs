//! `linux/arm64/v8`: what an image runs on.

use oci_spec::image::{Arch, Os, Platform};

use crate::InvalidReference;

/// Reads `OS/ARCHITECTURE[/VARIANT]`, or an architecture alone, with the names that `uname -m` has for some.
pub fn parse_platform(text: &str) -> Result<Platform, InvalidReference> {
    let parts: Vec<_> = text.split('/').collect();
    let plain = |part: &&str| {
        !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
    };
    let (os, architecture, variant) = match parts.as_slice() {
        all if !all.iter().all(plain) => return Err(invalid(text)),
        [architecture] if *architecture != "linux" => ("linux", *architecture, None),
        [os, architecture] => (*os, *architecture, None),
        [os, architecture, variant] => (*os, *architecture, Some(*variant)),
        _ => return Err(invalid(text)),
    };
    let (architecture, variant) = match (architecture, variant) {
        ("x86_64" | "x86-64", variant) => ("amd64", variant),
        ("aarch64", variant) => ("arm64", variant),
        ("armhf", None) => ("arm", Some("v7")),
        other => other,
    };
    let mut platform = Platform::default();
    platform.set_os(Os::from(os));
    platform.set_architecture(Arch::from(architecture));
    platform.set_variant(variant.map(str::to_owned));
    Ok(platform)
}

fn invalid(text: &str) -> InvalidReference {
    InvalidReference {
        text: text.to_owned(),
        reason: "expected a platform as OS/ARCHITECTURE[/VARIANT], for example linux/amd64 or linux/arm/v7"
            .to_owned(),
    }
}

/// The platform as [`parse_platform`] reads it.
pub fn platform_text(platform: &Platform) -> String {
    let variant = platform.variant().as_ref().map(|variant| format!("/{variant}")).unwrap_or_default();
    format!("{}/{}{variant}", platform.os(), platform.architecture())
}

/// Whether an image for `platform` is one for `wanted`.
pub fn platform_fits(platform: &Platform, wanted: &Platform) -> bool {
    // The eighth version is the first of arm64, and goes without saying (containerd's platforms).
    let variant = |platform: &Platform| match (platform.architecture(), platform.variant().as_deref()) {
        (Arch::ARM64, Some("v8")) => None,
        (_, variant) => variant.map(str::to_owned),
    };
    let of_wanted = variant(wanted);
    platform.os() == wanted.os()
        && platform.architecture() == wanted.architecture()
        && (of_wanted.is_none() || variant(platform) == of_wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms_are_read_written_and_compared() {
        for (text, whole) in [
            ("linux/amd64", "linux/amd64"),
            ("amd64", "linux/amd64"),
            ("x86_64", "linux/amd64"),
            ("linux/aarch64", "linux/arm64"),
            ("linux/arm/v7", "linux/arm/v7"),
            ("armhf", "linux/arm/v7"),
            ("windows/amd64", "windows/amd64"),
        ] {
            assert_eq!(platform_text(&parse_platform(text).unwrap()), whole, "{text}");
        }
        for bad in ["", "/", "linux", "linux/", "a/b/c/d", "linux/am d64", "/amd64"] {
            assert!(parse_platform(bad).is_err(), "{bad:?}");
        }
        let fits = |platform: &str, wanted: &str| {
            platform_fits(&parse_platform(platform).unwrap(), &parse_platform(wanted).unwrap())
        };
        assert!(fits("linux/arm64/v8", "linux/arm64") && fits("linux/arm64", "linux/arm64/v8"));
        assert!(fits("linux/arm/v6", "linux/arm") && !fits("linux/arm/v6", "linux/arm/v7"));
        assert!(!fits("linux/arm", "linux/arm/v7") && !fits("linux/amd64", "windows/amd64"));
    }
}
