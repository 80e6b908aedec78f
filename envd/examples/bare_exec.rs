//! The least agent that runs a command: the yardstick for the first command of a restored sandbox. It opens the control port of a
//! virtio-serial channel, makes the machine's first disk its root, says that it is there, and for each byte that comes runs
//! `/bin/echo` and sends back what that printed. Only the bench of snapshots uses it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::process::{Command, Stdio};

use envd_proto::boot;
use rustix::mount::{MountFlags, mount};

const ROOT: &str = "/root";

fn main() -> io::Result<()> {
    for (kind, at) in [("devtmpfs", "/dev"), ("sysfs", "/sys")] {
        match mount(kind, at, kind, MountFlags::empty(), None) {
            // The kernel may have mounted /dev itself.
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let mut port = port()?;
    match fs::create_dir(ROOT) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    mount("/dev/vda", ROOT, "ext4", MountFlags::RDONLY, None)?;
    rustix::process::chroot(ROOT)?;
    std::env::set_current_dir("/")?;
    port.write_all(b"!")?;
    let mut byte = [0];
    loop {
        // None while no host is at the other end.
        if port.read(&mut byte)? == 0 {
            std::thread::yield_now();
            continue;
        }
        let echo = Command::new("/bin/echo").arg("hello").stdin(Stdio::inherit()).output()?;
        port.write_all(&echo.stdout)?;
    }
}

fn port() -> io::Result<File> {
    for entry in fs::read_dir("/sys/class/virtio-ports")? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name"))?.trim_end() == boot::CONTROL_SERIAL_PORT {
            let device = format!("/dev/{}", entry.file_name().to_string_lossy());
            return OpenOptions::new().read(true).write(true).open(device);
        }
    }
    Err(io::Error::other("the machine has no control port"))
}
