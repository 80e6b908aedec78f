# UNTESTED EXAMPLE: a Nomad job whose task is one sandbox. It was parsed, and its words for host-shim were understood; no
# Nomad has run it.
#
# raw_exec, because the shim makes namespaces and opens /dev/kvm itself; `exec` would need both let through. Clients must have
# plugin "raw_exec" { config { enabled = true } }, and host-shim, kernel, guest image and the template installed.

job "sandbox" {
  datacenters = ["dc1"]
  type        = "batch"

  group "sandbox" {
    # 1 and 3 are tried again here: a sandbox that was paused goes on by that, because of --resume.
    restart {
      attempts = 3
      interval = "5m"
      delay    = "2s"
      mode     = "fail"
    }

    task "shim" {
      driver = "raw_exec"

      config {
        command = "/usr/local/bin/host-shim"
        # Not in the task's own folder: with the ids in its path those of sockets become longer than Linux takes.
        args = [
          "run",
          "--data-dir", "/var/lib/tiffin",
          "--spec", "local/spec.json",
          "--resume",
          "--dir", "/var/lib/tiffin/sandboxes/${NOMAD_SHORT_ALLOC_ID}",
        ]
      }

      template {
        destination = "local/spec.json"
        perms       = "600"
        data        = <<-SPEC
          {
            "schema_version": 1,
            "template": "/var/lib/tiffin/templates/site",
            "memory_mib": 512,
            "labels": {"nomad.job": "sandbox"}
          }
        SPEC
      }

      # 10 s for the sandbox's processes, 10 s for its machine, and some for a snapshot under way.
      kill_signal  = "SIGTERM"
      kill_timeout = "40s"

      resources {
        cpu    = 1000
        # The machine's, and what the VMM and the shim need beside it.
        memory = 768
      }
    }
  }
}
