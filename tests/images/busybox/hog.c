// Takes from the machine what a hostile program would take. It says how far it came and waits for the end of its input.
//   hog files N      open files, in as many processes as the limit of one needs
//   hog memory       memory, without end
//   hog processes N  N processes that are gone at once, one after the other
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

static long open_files(long wanted) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    long count = 0;
    while (count < wanted && open("/dev/null", O_RDONLY) >= 0)
        count++;
    return count;
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    long wanted = argc > 2 ? atol(argv[2]) : 0;
    if (!strcmp(what, "files")) {
        long count = open_files(wanted);
        printf("%ld files: %s\n", count, count < wanted ? strerror(errno) : "all");
    } else if (!strcmp(what, "memory")) {
        for (;;)
            memset(malloc(1 << 20), 1, 1 << 20);
    } else if (!strcmp(what, "processes")) {
        for (long n = 0; n < wanted; n++) {
            pid_t pid = fork();
            if (pid == 0)
                _exit(0);
            if (pid < 0 || waitpid(pid, NULL, 0) != pid) {
                printf("process %ld: %s\n", n, strerror(errno));
                return 1;
            }
        }
        printf("%ld processes\n", wanted);
        return 0;
    } else {
        fprintf(stderr, "hog: unknown '%s'\n", what);
        return 2;
    }
    fflush(stdout);
    while (getchar() != EOF) {
    }
    return 0;
}
