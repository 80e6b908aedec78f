//! The seccomp part of a step's OCI spec: Docker's default profile; for a namespace of one id also the calls that seem to
//! succeed there.

use rustix::io::Errno;
use seccomp_profile::{ALLOWED, ALLOWED_32_BIT, CLONE, Masked, PERSONALITIES, families};
use serde_json::{Value, json};

/// Calls for owners and users that do not exist in a namespace of one id. They change nothing and say that they did, so
/// that package managers get on: the files belong to root.
const OWNERS: [&str; 22] = [
    "chown",
    "chown32",
    "fchown",
    "fchown32",
    "fchownat",
    "lchown",
    "lchown32",
    "setgid",
    "setgid32",
    "setgroups",
    "setgroups32",
    "setregid",
    "setregid32",
    "setresgid",
    "setresgid32",
    "setresuid",
    "setresuid32",
    "setreuid",
    "setreuid32",
    "setuid",
    "setuid32",
    "setfsuid",
];

/// The profile. With `one_id` the calls of [`OWNERS`] do nothing and succeed.
pub(crate) fn profile(one_id: bool) -> Value {
    let is_faked = |name: &&str| one_id && OWNERS.contains(name);
    let allowed: Vec<_> =
        ALLOWED.iter().chain(ALLOWED_32_BIT).copied().filter(|name| !is_faked(name)).collect();
    let allow = |name: &str, args: Value| json!({"names": [name], "action": "SCMP_ACT_ALLOW", "args": args});
    // In a spec for runc the mask is `value`; libcontainer 0.7 takes them the other way round. With the wrong order no
    // program could start another, which every test of a shell would tell.
    let masked = |Masked { mask, value }| json!([{"index": 0, "value": value, "valueTwo": mask, "op": "SCMP_CMP_MASKED_EQ"}]);
    let mut calls = vec![
        json!({"names": allowed, "action": "SCMP_ACT_ALLOW"}),
        json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": Errno::NOSYS.raw_os_error()}),
        allow("clone", masked(CLONE)),
    ];
    if one_id {
        calls.push(json!({"names": OWNERS, "action": "SCMP_ACT_ERRNO", "errnoRet": 0}));
    }
    calls.extend(
        PERSONALITIES
            .map(|value| allow("personality", json!([{"index": 0, "value": value, "op": "SCMP_CMP_EQ"}]))),
    );
    calls.extend(families().map(|bits| allow("socket", masked(bits))));
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": Errno::PERM.raw_os_error(),
        "architectures": architectures(),
        "syscalls": calls,
    })
}

/// This machine's own, and those of 32-bit programs that run on it, as Docker has it.
fn architectures() -> &'static [&'static str] {
    match std::env::consts::ARCH {
        "x86_64" => &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "aarch64" => &["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
        _ => &["SCMP_ARCH_NATIVE"],
    }
}
