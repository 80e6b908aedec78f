//! What the agent finds in its machine: kernel arguments, disks and serial ports.

/// Kernel argument: how the agent reaches its host. `serial`, `vsock`, or absent for the first of the two that is there.
pub const ARG_CHANNEL: &str = "envd.channel";

/// Kernel argument: the vsock port on the host for the control door. Absent means [`crate::CONTROL_PORT`].
pub const ARG_CONTROL_PORT: &str = "envd.control_port";

/// Kernel argument: `none` runs client calls in the agent's own root, without a container.
pub const ARG_CONTAINER: &str = "envd.container";

/// Kernel argument: the device of the root file system. Absent means the disk with serial [`ROOTFS_SERIAL`].
pub const ARG_ROOTFS: &str = "envd.rootfs";

/// Kernel argument: the device of the scratch file system. Absent means the disk with serial [`SCRATCH_SERIAL`].
pub const ARG_SCRATCH: &str = "envd.scratch";

/// The virtio-blk serial of the read-only root file system.
pub const ROOTFS_SERIAL: &str = "rootfs";

/// The virtio-blk serial of the writable scratch file system.
pub const SCRATCH_SERIAL: &str = "scratch";

/// The name of the virtio-serial port that carries control records.
pub const CONTROL_SERIAL_PORT: &str = "ctl";

/// The name of the virtio-serial port that carries the mux.
pub const MUX_SERIAL_PORT: &str = "mux";
