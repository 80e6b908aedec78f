/* What the kernel answers to calls that no shell makes: each argument is a question, each line of output "QUESTION ERRNO". */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef AF_VSOCK
#define AF_VSOCK 40
#endif

static long ask(const char *question) {
	if (!strcmp(question, "vsock"))
		return socket(AF_VSOCK, SOCK_STREAM, 0);
	if (!strcmp(question, "vsock-high-bits")) /* the kernel takes 32 bits of the family */
		return syscall(SYS_socket, 0x100000000L | AF_VSOCK, SOCK_STREAM, 0);
	if (!strcmp(question, "inet"))
		return socket(AF_INET, SOCK_STREAM, 0);
	if (!strcmp(question, "unix"))
		return socket(AF_UNIX, SOCK_STREAM, 0);
	if (!strcmp(question, "io_uring")) {
		char params[120] = {0};
		return syscall(SYS_io_uring_setup, 1, params);
	}
	if (!strcmp(question, "bpf"))
		return syscall(SYS_bpf, 0, 0, 0);
	if (!strcmp(question, "keyctl"))
		return syscall(SYS_keyctl, 0, -1, 0);
	if (!strcmp(question, "clone-newuser")) {
		long pid = syscall(SYS_clone, 0x10000000L | SIGCHLD, 0, 0, 0, 0); /* CLONE_NEWUSER */
		if (pid == 0)
			_exit(0);
		return pid;
	}
	if (!strcmp(question, "clone3")) {
		struct clone_args args = {.exit_signal = SIGCHLD};
		long pid = syscall(SYS_clone3, &args, sizeof args);
		if (pid == 0)
			_exit(0);
		return pid;
	}
	if (!strcmp(question, "ptrace-1"))
		return ptrace(PTRACE_ATTACH, 1, 0, 0);
	if (!strcmp(question, "ptrace-child")) { /* what a debugger does */
		long pid = fork();
		if (pid == 0) {
			pause();
			_exit(0);
		}
		long result = ptrace(PTRACE_SEIZE, pid, 0, 0);
		int error = errno;
		kill(pid, SIGKILL);
		errno = error;
		return result;
	}
	if (!strcmp(question, "root")) { /* what a setuid program gives */
		errno = EACCES;
		return geteuid() == 0 ? 0 : -1;
	}
#ifdef __x86_64__
	if (!strcmp(question, "x32-getpid"))
		return syscall(0x40000000 | SYS_getpid);
#endif
	errno = EINVAL;
	return -1;
}

int main(int argc, char **argv) {
	for (int i = 1; i < argc; i++) {
		errno = 0;
		long result = ask(argv[i]);
		printf("%s %s\n", argv[i], result < 0 ? strerrorname_np(errno) : "ok");
	}
	return 0;
}
