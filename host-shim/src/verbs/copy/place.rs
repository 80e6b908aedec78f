//! Docker's rules: what a copy is called where it goes to.
//!
//! ```text
//! SRC            DST is not there            DST is a file        DST is a directory
//! file           DST (not with a slash)      replaced             DST/file
//! directory      becomes DST                 an error             DST/directory
//! directory/.    becomes DST                 an error             its entries, in DST
//! ```
//!
//! Source: docs.docker.com, "docker container cp".

/// What SRC is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// A file or a link of this name.
    File(Vec<u8>),
    /// A directory of this name.
    Directory(Vec<u8>),
    /// What is in a directory: `/.` at its end, or the root.
    Contents,
    /// A tar stream.
    Archive,
}

/// What DST is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Directory,
    /// A file of this name.
    File(Vec<u8>),
    /// Not there; the directory above is. The name that it would have.
    Nothing(Vec<u8>),
    /// Not there, and a slash says that it should be a directory.
    NoDirectory(Vec<u8>),
    /// A tar stream.
    Archive,
}

/// Where a copy goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Into DST itself, otherwise into the directory above it.
    pub(super) inside: bool,
    /// The name there; empty for what is in a directory.
    pub(super) name: Vec<u8>,
}

pub(super) fn place(source: &Shape, target: &Found) -> Result<Place, &'static str> {
    let inside = |name: &[u8]| Ok(Place { inside: true, name: name.to_vec() });
    let above = |name: &[u8]| Ok(Place { inside: false, name: name.to_vec() });
    match (source, target) {
        (Shape::Archive, Found::Archive) => Err("both are streams"),
        (Shape::Archive, Found::Directory) => inside(b""),
        (Shape::Archive, _) => Err("a tar stream is unpacked into a directory that is there"),
        // Docker names the contents of a directory by the directory that they stay in.
        (Shape::Contents, Found::Archive) => inside(b""),
        (Shape::File(name) | Shape::Directory(name), Found::Archive) => inside(name),
        (Shape::File(name) | Shape::Directory(name), Found::Directory) => inside(name),
        (Shape::Contents, Found::Directory) => inside(b""),
        (Shape::File(_), Found::File(name) | Found::Nothing(name)) => above(name),
        (Shape::File(_), Found::NoDirectory(_)) => Err("the destination directory must exist"),
        (_, Found::File(_)) => Err("cannot copy a directory to a file"),
        (_, Found::Nothing(name) | Found::NoDirectory(name)) => above(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rules_are_those_of_docker() {
        let (file, directory) = (Shape::File(b"f".to_vec()), Shape::Directory(b"d".to_vec()));
        let (is_file, nothing) = (Found::File(b"x".to_vec()), Found::Nothing(b"x".to_vec()));
        let slash = Found::NoDirectory(b"x".to_vec());
        for (source, target, expected) in [
            (&file, &Found::Directory, Some((true, "f"))),
            (&file, &is_file, Some((false, "x"))),
            (&file, &nothing, Some((false, "x"))),
            (&file, &slash, None),
            (&directory, &Found::Directory, Some((true, "d"))),
            (&directory, &is_file, None),
            (&directory, &nothing, Some((false, "x"))),
            (&directory, &slash, Some((false, "x"))),
            (&Shape::Contents, &Found::Directory, Some((true, ""))),
            (&Shape::Contents, &is_file, None),
            (&Shape::Contents, &nothing, Some((false, "x"))),
            (&Shape::Archive, &Found::Directory, Some((true, ""))),
            (&Shape::Archive, &nothing, None),
            (&Shape::Archive, &is_file, None),
            (&Shape::Archive, &Found::Archive, None),
            (&directory, &Found::Archive, Some((true, "d"))),
        ] {
            let placed = place(source, target).ok();
            let placed = placed.map(|place| (place.inside, String::from_utf8(place.name).unwrap()));
            assert_eq!(
                placed,
                expected.map(|(inside, name)| (inside, name.to_owned())),
                "{source:?} {target:?}"
            );
        }
    }
}
