//! The spawner's messages.

use envd_proto::limits::MAX_CONNECT_MESSAGE;

/// The largest start request: what one RPC can carry, with room for the environment that the agent adds.
pub(super) const MAX_START: usize = MAX_CONNECT_MESSAGE + (1 << 20);

/// The largest message from the spawner.
pub(super) const MAX_EVENT: usize = 128;

/// Descriptors of a start: the memfd with a [`Start`], stdin, stdout, stderr, and the cgroup when there is one.
pub(super) const MAX_FDS: usize = 5;

/// A program to start. Sent in a memfd, since arguments and environment are longer than a datagram may be; the datagram
/// itself is the request's id.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Start {
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub(super) programs: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "3")]
    pub(super) argv: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "4")]
    pub(super) env: Vec<Vec<u8>>,
    #[prost(bytes = "vec", tag = "5")]
    pub(super) cwd: Vec<u8>,
    #[prost(message, optional, tag = "6")]
    pub(super) credentials: Option<WireCredentials>,
    #[prost(int32, optional, tag = "7")]
    pub(super) oom_score_adj: Option<i32>,
    #[prost(bool, tag = "8")]
    pub(super) terminal: bool,
    #[prost(message, repeated, tag = "9")]
    pub(super) rlimits: Vec<WireRlimit>,
    #[prost(sint32, optional, tag = "10")]
    pub(super) nice: Option<i32>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct WireRlimit {
    #[prost(uint32, tag = "1")]
    pub(super) resource: u32,
    #[prost(uint64, tag = "2")]
    pub(super) soft: u64,
    #[prost(uint64, tag = "3")]
    pub(super) hard: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct WireCredentials {
    #[prost(uint32, tag = "1")]
    pub(super) uid: u32,
    #[prost(uint32, tag = "2")]
    pub(super) gid: u32,
    #[prost(uint32, repeated, tag = "3")]
    pub(super) groups: Vec<u32>,
}

/// A message from the spawner.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Event {
    #[prost(oneof = "EventKind", tags = "1, 2, 3")]
    pub(super) kind: Option<EventKind>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(super) enum EventKind {
    #[prost(message, tag = "1")]
    Started(Started),
    #[prost(message, tag = "2")]
    Failed(Failed),
    #[prost(message, tag = "3")]
    Exited(Exited),
}

/// The program runs. The process's pidfd comes with it.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct Started {
    #[prost(uint64, tag = "1")]
    pub(super) id: u64,
    #[prost(uint32, tag = "2")]
    pub(super) pid: u32,
}

/// The program could not be started.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct Failed {
    #[prost(uint64, tag = "1")]
    pub(super) id: u64,
    #[prost(enumeration = "FailedStage", tag = "2")]
    pub(super) stage: i32,
    #[prost(int32, tag = "3")]
    pub(super) errno: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
pub(super) enum FailedStage {
    Prepare = 0,
    Credentials = 1,
    Cwd = 2,
    Exec = 3,
    /// The clone itself: limits of processes or memory.
    Clone = 4,
    /// The request could not be read.
    Request = 5,
    /// The seccomp filter could not be applied.
    Filter = 6,
    /// A limit, the nice value or the oom score was refused.
    Limits = 7,
}

/// A program that was started has ended.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct Exited {
    #[prost(uint32, tag = "1")]
    pub(super) pid: u32,
    /// As wait(2) gives it.
    #[prost(int32, tag = "2")]
    pub(super) status: i32,
}
