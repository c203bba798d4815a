/* Reads, writes and sends inside a guest for a fixed time each, as fio and iperf3 do, in one
 * static program: those two load some seventy libraries, which takes a guest whose kernel is
 * emulated longer than the measurement.
 *
 * io SECONDS WORK...   WORK: read|write:PATH:BYTES        blocks at random places, O_DIRECT
 *                            map:PATH:BYTES               the same, read from a mapping
 *                            send|receive|ping:tcp:ADDRESS:PORT:BYTES
 *                            send|receive|ping:vsock:PORT:BYTES
 *
 * For each it prints "begin", works, and prints "end OPERATIONS NANOSECONDS P50 P99". A vsock
 * peer is told to connect by "accept". The peer's part is the first byte of a connection:
 * what it gets it drops until its end ('d'), returns ('e'), or it sends until nobody
 * listens ('s'). */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <netinet/tcp.h>
#include <time.h>
#include <unistd.h>

enum { MOST_SAMPLES = 1 << 18 };

static uint64_t samples[MOST_SAMPLES];

static void fail(const char *what) {
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t now(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static int ascending(const void *a, const void *b) {
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
	return (x > y) - (x < y);
}

/* All of it, or the number of bytes there were. */
static size_t whole(int fd, char *buffer, size_t bytes) {
	size_t done = 0;
	while (done < bytes) {
		ssize_t n = read(fd, buffer + done, bytes - done);
		if (n < 0)
			fail("read");
		if (n == 0)
			break;
		done += n;
	}
	return done;
}

static void send_all(int fd, const char *buffer, size_t bytes) {
	for (size_t done = 0; done < bytes;) {
		ssize_t n = write(fd, buffer + done, bytes - done);
		if (n < 0)
			fail("write");
		done += n;
	}
}

static int connection(char **words) {
	int fd;
	if (!strcmp(words[1], "tcp")) {
		struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(words[3]))};
		int one = 1;
		inet_pton(AF_INET, words[2], &to.sin_addr);
		fd = socket(AF_INET, SOCK_STREAM, 0);
		if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof to))
			fail("connect");
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
		return fd;
	}
	struct sockaddr_vm at = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = atoi(words[2])};
	int listener = socket(AF_VSOCK, SOCK_STREAM, 0);
	if (listener < 0 || bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 1))
		fail("vsock");
	puts("accept");
	fd = accept(listener, 0, 0);
	if (fd < 0)
		fail("accept");
	close(listener);
	return fd;
}

int main(int argc, char **argv) {
	if (argc < 3)
		return 2;
	setvbuf(stdout, 0, _IOLBF, 0);
	uint64_t limit = strtod(argv[1], 0) * 1e9;
	for (int i = 2; i < argc; i++) {
		char *words[6] = {0};
		int count = 0;
		for (char *word = strtok(argv[i], ":"); word && count < 6; word = strtok(0, ":"))
			words[count++] = word;
		if (count < 3)
			return 2;
		size_t bytes = atol(words[count - 1]);
		int reads = !strcmp(words[0], "read"), maps = !strcmp(words[0], "map");
		int is_file = reads || maps || !strcmp(words[0], "write");
		int pings = !strcmp(words[0], "ping"), receives = !strcmp(words[0], "receive");
		char *buffer;
		if (posix_memalign((void **)&buffer, 4096, bytes))
			fail("memory");
		memset(buffer, 7, bytes);
		int fd;
		off_t blocks = 0;
		char *mapped = 0;
		if (is_file) {
			fd = open(words[1], maps ? O_RDONLY : O_RDWR | O_DIRECT);
			if (fd < 0)
				fail(words[1]);
			blocks = lseek(fd, 0, SEEK_END) / bytes;
			if (blocks < 1)
				return 2;
			if (maps && (mapped = mmap(0, blocks * bytes, PROT_READ, MAP_SHARED, fd, 0)) == MAP_FAILED)
				fail("mmap");
		} else {
			fd = connection(words);
			send_all(fd, pings ? "e" : receives ? "s" : "d", 1);
		}
		puts("begin");
		uint64_t begun = now(), last = begun, operations = 0;
		while (last - begun < limit) {
			if (is_file) {
				off_t at = random() % blocks * bytes;
				ssize_t n = bytes;
				if (maps)
					memcpy(buffer, mapped + at, bytes);
				else
					n = reads ? pread(fd, buffer, bytes, at) : pwrite(fd, buffer, bytes, at);
				if (n != (ssize_t)bytes)
					fail(words[0]);
			} else {
				if (!receives)
					send_all(fd, buffer, bytes);
				if ((receives || pings) && whole(fd, buffer, bytes) != bytes)
					fail("the peer ended");
			}
			uint64_t then = now();
			if (operations < MOST_SAMPLES)
				samples[operations] = then - last;
			operations++;
			last = then;
		}
		if (!is_file && !receives && !pings) {
			/* What counts has arrived. */
			shutdown(fd, SHUT_WR);
			if (whole(fd, buffer, 1))
				fail("the peer answered");
			last = now();
		}
		if (maps)
			munmap(mapped, blocks * bytes);
		close(fd);
		free(buffer);
		size_t kept = operations < MOST_SAMPLES ? operations : MOST_SAMPLES;
		qsort(samples, kept, sizeof *samples, ascending);
		printf("end %llu %llu %llu %llu\n", (unsigned long long)operations, (unsigned long long)(last - begun),
		       (unsigned long long)samples[kept / 2], (unsigned long long)samples[kept * 99 / 100]);
	}
	return 0;
}
