//! An init that only dials out: the yardstick for the agent's boot. It opens the control port of a virtio-serial channel,
//! sends a hello, and does nothing else. Only the boot bench uses it.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};

use envd_channel::record::Encoder;
use envd_proto::control::{BootPhase, FromAgent, Hello, from_agent};
use envd_proto::{FIRST_GENERATION, OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION, boot};
use prost::Message;
use rustix::mount::{MountFlags, mount};

fn main() -> io::Result<()> {
    let start_us = microseconds_since_boot();
    for (kind, at) in [("devtmpfs", "/dev"), ("sysfs", "/sys")] {
        match mount(kind, at, kind, MountFlags::empty(), None) {
            // The kernel may have mounted /dev itself.
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            Err(error) => return Err(error.into()),
        }
    }
    for entry in fs::read_dir("/sys/class/virtio-ports")? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name"))?.trim_end() != boot::CONTROL_SERIAL_PORT {
            continue;
        }
        let mut port =
            OpenOptions::new().write(true).open(format!("/dev/{}", entry.file_name().to_string_lossy()))?;
        let hello = Hello {
            protocol_version: PROTOCOL_VERSION,
            oldest_protocol_version: OLDEST_PROTOCOL_VERSION,
            generation: FIRST_GENERATION,
            phases: vec![BootPhase { name: "init".to_owned(), start_us, end_us: microseconds_since_boot() }],
            ..Hello::default()
        };
        let message = FromAgent { message: Some(from_agent::Message::Hello(hello)) };
        let records = Encoder::default()
            .encode(FIRST_GENERATION, &message.encode_to_vec())
            .map_err(io::Error::other)?;
        port.write_all(&records)?;
        loop {
            std::thread::park();
        }
    }
    Err(io::Error::other("the machine has no control port"))
}

fn microseconds_since_boot() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    // Neither is negative on this clock.
    now.tv_sec.unsigned_abs() * 1_000_000 + now.tv_nsec.unsigned_abs() / 1000
}
