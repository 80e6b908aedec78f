//! Many files as few devices.
//!
//! A microvm without ACPI has eight places for devices, and a sandbox needs up to six of them for itself. So all disks of
//! the caller's that are only read are one device, and all that are written are another: the files one behind the other as
//! the extents of a VMDK, after a partition table (GPT) whose names say which is which. The kernel makes a block device of
//! each.
//!
//! ```text
//! disks-ro.vmdk   RW 2048 FLAT "disks-ro.gpt"         the table
//!                 RW 81920 FLAT "/cache/image.ext4"   partition 1, its name the disk's serial
//! ```

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use flate2::Crc;
use sandbox_folder::spec::DiskSpec;

use crate::Error;

/// Bytes of a sector.
const SECTOR: u64 = 512;

/// Sectors before the first partition, 1 MiB as every tool has it.
const FIRST: u64 = 2048;

/// Entries of a table, and the bytes of each (UEFI 2.10, 5.3.2).
const ENTRIES: usize = 128;
const ENTRY: usize = 128;

const HEADER: usize = 92;

/// "Linux filesystem data", as its bytes are on the disk.
const LINUX: [u8; 16] =
    [0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4];

/// Files as one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parts {
    /// The descriptor of a VMDK.
    pub descriptor: PathBuf,
    /// Whether the guest may only read it.
    pub read_only: bool,
}

/// Writes what makes devices of the disks into `folder`.
pub fn pack(disks: &[DiskSpec], folder: &Path) -> Result<Vec<Parts>, Error> {
    let mut packed = Vec::new();
    for (read_only, name) in [(true, "disks-ro"), (false, "disks-rw")] {
        let parts: Vec<&DiskSpec> = disks.iter().filter(|disk| disk.read_only == read_only).collect();
        if parts.is_empty() {
            continue;
        }
        let mut sizes = Vec::new();
        for disk in &parts {
            sizes.push(sectors(&disk.path)?);
        }
        let table = format!("{name}.gpt");
        let named = parts.iter().map(|disk| disk.serial.as_str()).zip(sizes.iter().copied());
        write(&folder.join(&table), &gpt(&named.collect::<Vec<_>>()))?;
        let extents = parts.iter().map(|disk| disk.path.as_path()).zip(sizes);
        let descriptor = folder.join(format!("{name}.vmdk"));
        write(&descriptor, vmdk(&table, &extents.collect::<Vec<_>>())?.as_bytes())?;
        packed.push(Parts { descriptor, read_only });
    }
    Ok(packed)
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    fs::write(path, bytes).map_err(Error::io("write", path))
}

fn sectors(path: &Path) -> Result<u64, Error> {
    let length = fs::metadata(path).map_err(Error::io("open", path))?.len();
    match length % SECTOR {
        0 if length > 0 => Ok(length / SECTOR),
        _ => {
            let reason = format!("{} has {length} bytes, expected a multiple of {SECTOR}", path.display());
            Err(Error::invalid("disk", reason))
        }
    }
}

/// The descriptor: VMware's "Virtual Disk Format 1.1", flat extents.
fn vmdk(table: &str, extents: &[(&Path, u64)]) -> Result<String, Error> {
    let mut text = "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n\
                    createType=\"twoGbMaxExtentFlat\"\n\n# Extent description\n"
        .to_owned();
    // QEMU takes no other access than RW; read-only is the device.
    let _ = writeln!(text, "RW {FIRST} FLAT \"{table}\" 0");
    for (path, sectors) in extents {
        // What QEMU reads one in (block/vmdk.c, `fname[512]`).
        let name = path.to_str().filter(|name| name.len() < 512 && !name.contains(['"', '\n', '\r']));
        let name = name.ok_or_else(|| {
            let reason = format!("{}: expected a short path without quotes and line ends", path.display());
            Error::invalid("disk", reason)
        })?;
        let _ = writeln!(text, "RW {sectors} FLAT \"{name}\" 0");
    }
    Ok(text)
}

/// The first sectors of the device: a protective MBR, and a GPT without its copy at the end, which Linux does without.
fn gpt(parts: &[(&str, u64)]) -> Vec<u8> {
    let mut bytes = vec![0; (FIRST * SECTOR) as usize];
    let end = FIRST + parts.iter().map(|(_, sectors)| sectors).sum::<u64>();
    let entries_at = 2 * SECTOR as usize;
    let mut start = FIRST;
    for (number, (name, sectors)) in parts.iter().enumerate().take(ENTRIES) {
        let entry = &mut bytes[entries_at + number * ENTRY..][..ENTRY];
        entry[..16].copy_from_slice(&LINUX);
        entry[16..24].copy_from_slice(&(number as u64 + 1).to_le_bytes());
        entry[32..40].copy_from_slice(&start.to_le_bytes());
        entry[40..48].copy_from_slice(&(start + sectors - 1).to_le_bytes());
        for (place, unit) in entry[56..].chunks_exact_mut(2).zip(name.encode_utf16()) {
            place.copy_from_slice(&unit.to_le_bytes());
        }
        start += sectors;
    }
    let entries_crc = crc(&bytes[entries_at..][..ENTRIES * ENTRY]);
    let header = &mut bytes[SECTOR as usize..][..HEADER];
    header[..8].copy_from_slice(b"EFI PART");
    let mut put = |at: usize, value: &[u8]| header[at..at + value.len()].copy_from_slice(value);
    put(8, &0x1_0000u32.to_le_bytes());
    put(12, &(HEADER as u32).to_le_bytes());
    put(24, &1u64.to_le_bytes());
    put(32, &(end - 1).to_le_bytes());
    put(40, &FIRST.to_le_bytes());
    put(48, &(end - 1).to_le_bytes());
    put(72, &2u64.to_le_bytes());
    put(80, &(ENTRIES as u32).to_le_bytes());
    put(84, &(ENTRY as u32).to_le_bytes());
    put(88, &entries_crc.to_le_bytes());
    let header_crc = crc(header);
    header[16..20].copy_from_slice(&header_crc.to_le_bytes());
    // One partition of type 0xee from sector 1 on.
    bytes[446 + 4] = 0xee;
    bytes[446 + 8..446 + 12].copy_from_slice(&1u32.to_le_bytes());
    let length = u32::try_from(end - 1).unwrap_or(u32::MAX);
    bytes[446 + 12..446 + 16].copy_from_slice(&length.to_le_bytes());
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    bytes
}

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(path: PathBuf, serial: &str, read_only: bool) -> DiskSpec {
        DiskSpec { path, serial: serial.to_owned(), read_only }
    }

    #[test]
    fn disks_are_extents_of_two_devices() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, length: u64| {
            let path = dir.path().join(name);
            fs::File::create(&path).unwrap().set_len(length).unwrap();
            path
        };
        let disks = [
            disk(file("a", 4096), "image-0", true),
            disk(file("u", 8192), "upper", false),
            disk(file("b", 512), "image-1", true),
        ];
        let packed = pack(&disks, dir.path()).unwrap();
        assert_eq!(packed.iter().map(|parts| parts.read_only).collect::<Vec<_>>(), [true, false]);
        let text = fs::read_to_string(&packed[0].descriptor).unwrap();
        let extents: Vec<_> = text.lines().filter(|line| line.starts_with("RW")).collect();
        let path = |name: &str| dir.path().join(name).display().to_string();
        assert_eq!(
            extents,
            [
                "RW 2048 FLAT \"disks-ro.gpt\" 0".to_owned(),
                format!("RW 8 FLAT \"{}\" 0", path("a")),
                format!("RW 1 FLAT \"{}\" 0", path("b")),
            ]
        );
        for (bad, expected) in [(file("odd", 513), "513 bytes"), (file("quo\"te", 512), "without quotes")] {
            let error = pack(&[disk(bad, "x", true)], dir.path()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_table_has_the_fields_of_the_specification() {
        let table = gpt(&[("one", 8), ("two", 16)]);
        assert_eq!(table.len(), 1 << 20);
        assert_eq!((&table[510..512], &table[512..520]), (&[0x55, 0xaa][..], &b"EFI PART"[..]));
        let second = &table[1024 + 128..][..128];
        assert_eq!(second[32..40], 2056u64.to_le_bytes());
        assert_eq!(second[40..48], 2071u64.to_le_bytes());
        assert_eq!(&second[56..62], b"t\0w\0o\0");
    }
}
