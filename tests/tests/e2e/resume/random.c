/* Draws random numbers until there is /tmp/stop: lines of the second and 32 bytes in hexadecimal, by turns from getrandom(2)
 * and from /dev/urandom. */
#include <stdio.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

int main(void) {
	FILE *urandom = fopen("/dev/urandom", "r");
	if (!urandom)
		return 1;
	setvbuf(urandom, NULL, _IONBF, 0);
	for (int turn = 0; access("/tmp/stop", F_OK); turn = !turn) {
		unsigned char bytes[32];
		/* Before the number: one that was drawn, and then held with the process, is of the second before. */
		long long second = time(NULL);
		size_t got = turn ? fread(bytes, 1, sizeof bytes, urandom) : (size_t)getrandom(bytes, sizeof bytes, 0);
		if (got != sizeof bytes)
			return 1;
		printf("%lld ", second);
		for (unsigned i = 0; i < sizeof bytes; i++)
			printf("%02x", bytes[i]);
		puts("");
		fflush(stdout);
	}
	return 0;
}
