//! Device rules: a program of type `BPF_PROG_TYPE_CGROUP_DEVICE`, made here and attached to a cgroup.
//!
//! ```text
//! open(2), mknod(2) and mounting of a device node by a process of the cgroup or below
//!   └► program: (type and access, major, minor) against each rule in turn; the first that fits decides
//! ```
//!
//! The container runtime's own device rules are compiled out (they would bring libbpf), so this is the whole of them.
//! The kernel's documents: `Documentation/bpf/instruction-set`, `linux/bpf.h`.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;

/// Programs of cgroups below run too, and none of them can allow what this one refuses.
const BPF_F_ALLOW_MULTI: u32 = 2;

/// `struct bpf_cgroup_dev_ctx`: three words of 32 bits.
const CTX_ACCESS_TYPE: i16 = 0;
const CTX_MAJOR: i16 = 4;
const CTX_MINOR: i16 = 8;

/// The access is in the upper half of `access_type`, the type in the lower.
const TYPE_MASK: i32 = 0xffff;

/// All bits of the access, and that of the making of a node (`BPF_DEVCG_ACC_MKNOD`).
const ACCESS_MASK: i32 = 0x7_0000;
const MAKE_ALONE: i32 = 0x1_0000;

/// Opcodes: class | operation | source.
const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const AND_CONSTANT: u8 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const JUMP_NOT_EQUAL: u8 = 0x56; // BPF_JMP32 | BPF_JNE | BPF_K
const MOVE_CONSTANT: u8 = 0xb7; // BPF_ALU64 | BPF_MOV | BPF_K
const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT

/// Registers: the result, the argument, and what the program keeps.
const R0: u8 = 0;
const R1: u8 = 1;
const TYPE: u8 = 2;
const MAJOR: u8 = 3;
const MINOR: u8 = 4;

/// The kind of a device node, as the kernel numbers it (`BPF_DEVCG_DEV_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// A block device.
    Block = 1,
    /// A character device.
    Char = 2,
}

/// Devices that a rule means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Block or character.
    pub kind: DeviceKind,
    /// The major number.
    pub major: u32,
    /// The minor number; `None` for every one.
    pub minor: Option<u32>,
}

/// What the processes of a cgroup may do with devices: open and make them, or neither.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceRules {
    /// These, and no other.
    Only(Vec<Device>),
    /// Nodes of every device are made; these are opened, and no other.
    OpenOnly(Vec<Device>),
    /// Every one but these.
    AllBut(Vec<Device>),
}

/// One instruction (`struct bpf_insn`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Instruction {
    code: u8,
    /// The destination in the lower four bits, the source in the upper.
    registers: u8,
    offset: i16,
    constant: i32,
}

impl DeviceRules {
    /// Loads them and attaches them to a cgroup2 directory. They hold as long as the cgroup.
    pub fn attach(&self, cgroup: BorrowedFd<'_>) -> io::Result<()> {
        let program = load(&self.program())?;
        let attributes = AttachAttributes {
            target_fd: cgroup.as_raw_fd() as u32,
            attach_bpf_fd: program.as_raw_fd() as u32,
            attach_type: BPF_CGROUP_DEVICE,
            attach_flags: BPF_F_ALLOW_MULTI,
        };
        bpf(BPF_PROG_ATTACH, &attributes).map(drop)
    }

    fn program(&self) -> Vec<Instruction> {
        let (devices, found) = match self {
            Self::Only(devices) | Self::OpenOnly(devices) => (devices, 1),
            Self::AllBut(devices) => (devices, 0),
        };
        let mut program = Vec::new();
        if let Self::OpenOnly(_) = self {
            program.extend([
                instruction(LOAD_WORD, TYPE, R1, CTX_ACCESS_TYPE, 0),
                instruction(AND_CONSTANT, TYPE, 0, 0, ACCESS_MASK),
                // Over the answer.
                instruction(JUMP_NOT_EQUAL, TYPE, 0, 2, MAKE_ALONE),
            ]);
            program.extend(answer(1));
        }
        program.extend([
            instruction(LOAD_WORD, TYPE, R1, CTX_ACCESS_TYPE, 0),
            instruction(AND_CONSTANT, TYPE, 0, 0, TYPE_MASK),
            instruction(LOAD_WORD, MAJOR, R1, CTX_MAJOR, 0),
            instruction(LOAD_WORD, MINOR, R1, CTX_MINOR, 0),
        ]);
        for device in devices {
            let mut tests = vec![(TYPE, device.kind as i32), (MAJOR, device.major as i32)];
            tests.extend(device.minor.map(|minor| (MINOR, minor as i32)));
            let count = tests.len();
            for (index, (register, value)) in tests.into_iter().enumerate() {
                // Over the other tests and the two instructions of the answer; a rule has three tests at most.
                let skip = (count - index - 1 + 2) as i16;
                program.push(instruction(JUMP_NOT_EQUAL, register, 0, skip, value));
            }
            program.extend(answer(found));
        }
        program.extend(answer(1 - found));
        program
    }
}

fn answer(value: i32) -> [Instruction; 2] {
    [instruction(MOVE_CONSTANT, R0, 0, 0, value), instruction(EXIT, 0, 0, 0, 0)]
}

fn instruction(code: u8, destination: u8, source: u8, offset: i16, constant: i32) -> Instruction {
    Instruction { code, registers: destination | source << 4, offset, constant }
}

/// The part of `union bpf_attr` that `BPF_PROG_LOAD` of any kernel has.
#[repr(C)]
struct LoadAttributes {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
}

/// The part of `union bpf_attr` for `BPF_PROG_ATTACH`.
#[repr(C)]
struct AttachAttributes {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let attributes = LoadAttributes {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
    };
    let fd = bpf(BPF_PROG_LOAD, &attributes)?;
    // SAFETY: the call succeeded, so the kernel gave a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<i32> {
    // SAFETY: `attributes` is one of the two structs above, initialised and of the size that is given; it and the program
    // and license that it points to outlive the call. The kernel only reads them.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NULL: Device = Device { kind: DeviceKind::Char, major: 1, minor: Some(3) };
    const PTS: Device = Device { kind: DeviceKind::Char, major: 136, minor: None };
    const DISK: Device = Device { kind: DeviceKind::Block, major: 254, minor: Some(16) };

    /// Runs a program as the kernel does: an oracle for the jumps.
    fn run(program: &[Instruction], access: u32, kind: DeviceKind, major: u32, minor: u32) -> i32 {
        let context = [kind as u32 | access << 16, major, minor];
        let mut registers = [0u32; 11];
        let mut at = 0;
        loop {
            let step = program[at];
            let destination = usize::from(step.registers & 0xf);
            at += 1;
            match step.code {
                LOAD_WORD => registers[destination] = context[step.offset as usize / 4],
                AND_CONSTANT => registers[destination] &= step.constant as u32,
                JUMP_NOT_EQUAL if registers[destination] != step.constant as u32 => {
                    at += step.offset as usize
                }
                JUMP_NOT_EQUAL => {}
                MOVE_CONSTANT => registers[destination] = step.constant as u32,
                EXIT => return registers[0] as i32,
                code => panic!("unknown opcode {code:#x}"),
            }
        }
    }

    #[test]
    fn the_first_rule_that_fits_decides() {
        let only = DeviceRules::Only(vec![NULL, PTS]).program();
        let all_but = DeviceRules::AllBut(vec![DISK]).program();
        for access in [1, 2, 4, 6] {
            for (kind, major, minor, in_only, in_all_but) in [
                (DeviceKind::Char, 1, 3, 1, 1),
                (DeviceKind::Char, 1, 1, 0, 1),
                (DeviceKind::Block, 1, 3, 0, 1),
                (DeviceKind::Char, 136, 0, 1, 1),
                (DeviceKind::Char, 136, 77, 1, 1),
                (DeviceKind::Block, 254, 16, 0, 0),
                (DeviceKind::Block, 254, 0, 0, 1),
                (DeviceKind::Char, 254, 16, 0, 1),
            ] {
                let device = format!("{kind:?} {major}:{minor}, access {access}");
                assert_eq!(run(&only, access, kind, major, minor), in_only, "{device}");
                assert_eq!(run(&all_but, access, kind, major, minor), in_all_but, "{device}");
            }
        }
    }

    #[test]
    fn nodes_can_be_made_that_are_not_opened() {
        let rules = DeviceRules::OpenOnly(vec![NULL]).program();
        for (access, major, allowed) in
            [(1, 1, 1), (1, 7, 1), (2, 1, 1), (2, 7, 0), (4, 7, 0), (6, 7, 0), (7, 7, 0)]
        {
            let found = run(&rules, access, DeviceKind::Char, major, 3);
            assert_eq!(found, allowed, "access {access} to {major}:3");
        }
    }

    #[test]
    fn no_rules_are_all_or_nothing() {
        let nothing = DeviceRules::Only(vec![]).program();
        let everything = DeviceRules::AllBut(vec![]).program();
        assert_eq!(run(&nothing, 2, DeviceKind::Char, 1, 3), 0);
        assert_eq!(run(&everything, 2, DeviceKind::Char, 1, 3), 1);
    }
}
