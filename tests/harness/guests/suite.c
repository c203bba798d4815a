// What a container does, chosen by its arguments. Each test prints `ok` or says what is wrong.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static int fail(const char *what) {
	printf("%s: %s\n", what, strerror(errno));
	return 1;
}

static int cat(void) {
	char buffer[4096];
	ssize_t n;
	while ((n = read(0, buffer, sizeof buffer)) > 0)
		if (write(1, buffer, n) != n)
			return fail("write");
	return n < 0 ? fail("read") : 0;
}

static int sleep_for(double seconds) {
	struct timespec t = {(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9)};
	return nanosleep(&t, NULL) ? fail("nanosleep") : 0;
}

static char *volatile eaten;

static int eat(size_t megabytes, double hold) {
	for (size_t i = 0; i < megabytes; i++) {
		char *block = malloc(1 << 20);
		if (!block) {
			printf("refused after %zu\n", i);
			return 3;
		}
		memset(block, 1, 1 << 20);
		eaten = block;
	}
	printf("have %zu\n", megabytes);
	return hold > 0 ? sleep_for(hold) : 0;
}

// Through a pointer, so that it stays a recursion.
static int overflow(int n);
static int (*volatile deeper)(int) = overflow;
static int overflow(int n) {
	return deeper(n + 1) + 1;
}

static int put(const char *path, const char *text) {
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
	if (fd < 0)
		return fail(path);
	if (write(fd, text, strlen(text)) != (ssize_t)strlen(text))
		return fail("write");
	close(fd);
	return 0;
}

static int get(const char *path) {
	int fd = open(path, O_RDONLY);
	if (fd < 0)
		return fail(path);
	char buffer[4096];
	ssize_t n;
	while ((n = read(fd, buffer, sizeof buffer)) > 0)
		write(1, buffer, n);
	close(fd);
	return n < 0 ? fail("read") : 0;
}

static int list(const char *path) {
	DIR *dir = opendir(path);
	if (!dir)
		return fail(path);
	struct dirent *entry;
	while ((entry = readdir(dir)))
		if (entry->d_name[0] != '.')
			puts(entry->d_name);
	closedir(dir);
	return 0;
}

#define CHECK(x) do { if (!(x)) { printf("line %d: %s: %s\n", __LINE__, #x, strerror(errno)); return 1; } } while (0)

// Everything a program does with files, in the folder `top`.
static int files(const char *top) {
	char a[256], b[256], d[256];
	struct stat st;
	snprintf(a, sizeof a, "%s/a", top);
	snprintf(b, sizeof b, "%s/b", top);
	snprintf(d, sizeof d, "%s/d", top);
	CHECK(put(a, "hello") == 0);
	CHECK(stat(a, &st) == 0 && st.st_size == 5 && S_ISREG(st.st_mode));
	int fd = open(a, O_RDWR);
	CHECK(fd >= 0);
	CHECK(lseek(fd, 0, SEEK_END) == 5 && write(fd, " world", 6) == 6);
	char text[32] = "";
	CHECK(pread(fd, text, 5, 6) == 5 && strcmp(text, "world") == 0);
	CHECK(ftruncate(fd, 3) == 0 && fstat(fd, &st) == 0 && st.st_size == 3);
	CHECK(fsync(fd) == 0 && close(fd) == 0);
	fd = open(a, O_WRONLY | O_APPEND);
	CHECK(fd >= 0 && write(fd, "p!", 2) == 2 && close(fd) == 0);
	CHECK(stat(a, &st) == 0 && st.st_size == 5);
	CHECK(open(a, O_WRONLY | O_CREAT | O_EXCL, 0644) < 0 && errno == EEXIST);
	CHECK(rename(a, b) == 0 && stat(a, &st) < 0 && errno == ENOENT);
	CHECK(mkdir(d, 0755) == 0 && mkdir(d, 0755) < 0 && errno == EEXIST);
	char in[300];
	snprintf(in, sizeof in, "%s/in", d);
	CHECK(put(in, "x") == 0);
	CHECK(rmdir(d) < 0 && errno == ENOTEMPTY);
	CHECK(symlink("in", "/dev/null/x") < 0);
	CHECK(link(in, a) == 0 && unlink(in) == 0 && stat(a, &st) == 0 && st.st_size == 1);
	CHECK(symlink("b", in) == 0 && readlink(in, text, sizeof text) == 1 && text[0] == 'b');
	CHECK(unlink(in) == 0 && rmdir(d) == 0 && unlink(a) == 0 && unlink(b) == 0);
	CHECK(unlink(b) < 0 && errno == ENOENT);
	puts("ok");
	return 0;
}

static int clocks(void) {
	struct timespec before, after, real;
	CHECK(clock_gettime(CLOCK_MONOTONIC, &before) == 0);
	CHECK(sleep_for(0.05) == 0);
	CHECK(clock_gettime(CLOCK_MONOTONIC, &after) == 0);
	double slept = (after.tv_sec - before.tv_sec) + (after.tv_nsec - before.tv_nsec) / 1e9;
	CHECK(slept >= 0.05);
	CHECK(clock_gettime(CLOCK_REALTIME, &real) == 0 && real.tv_sec > 1700000000);
	unsigned char one[16], two[16];
	CHECK(getentropy(one, 16) == 0 && getentropy(two, 16) == 0 && memcmp(one, two, 16) != 0);
	puts("ok");
	return 0;
}

static int many(const char *path, int most) {
	int n = 0;
	while (n < most && open(path, O_RDONLY) >= 0)
		n++;
	printf("%d files\n", n);
	return 0;
}

int main(int argc, char **argv) {
	const char *what = argc > 1 ? argv[1] : "hello";
	const char *one = argc > 2 ? argv[2] : "";
	const char *two = argc > 3 ? argv[3] : "";
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (!strcmp(what, "hello"))
		return puts("Hello from WebAssembly") < 0;
	if (!strcmp(what, "args")) {
		for (int i = 0; i < argc; i++)
			puts(argv[i]);
		return 0;
	}
	if (!strcmp(what, "env")) {
		for (char **e = environ; *e; e++)
			puts(*e);
		return 0;
	}
	if (!strcmp(what, "exit"))
		exit(atoi(one));
	if (!strcmp(what, "abort"))
		__builtin_trap();
	if (!strcmp(what, "cat"))
		return cat();
	if (!strcmp(what, "say")) {
		puts(one);
		fprintf(stderr, "%s\n", two);
		return 0;
	}
	if (!strcmp(what, "flood")) {
		for (long i = 0; i < atol(one); i++)
			printf("line %ld of many that fill every buffer\n", i);
		return 0;
	}
	if (!strcmp(what, "spin")) {
		puts("spinning");
		for (volatile unsigned long i = 0;; i++)
			;
	}
	if (!strcmp(what, "count")) {
		// Turns until the time is over: how much CPU was had.
		struct timespec now;
		time_t end = time(NULL) + atoi(one);
		unsigned long turns = 0;
		do {
			for (volatile int i = 0; i < 100000; i++)
				;
			turns++;
			clock_gettime(CLOCK_REALTIME, &now);
		} while (now.tv_sec < end);
		printf("%lu\n", turns);
		return 0;
	}
	if (!strcmp(what, "sleep")) {
		puts("sleeping");
		return sleep_for(atof(one));
	}
	if (!strcmp(what, "eat"))
		return eat(atoi(one), atof(two));
	if (!strcmp(what, "overflow"))
		return overflow(0);
	if (!strcmp(what, "put"))
		return put(one, two);
	if (!strcmp(what, "get"))
		return get(one);
	if (!strcmp(what, "list"))
		return list(one);
	if (!strcmp(what, "files"))
		return files(one);
	if (!strcmp(what, "clocks"))
		return clocks();
	if (!strcmp(what, "many"))
		return many(one, 100000);
	if (!strcmp(what, "hold")) {
		many(one, atoi(two));
		return sleep_for(3600);
	}
	if (!strcmp(what, "tty")) {
		printf("%d%d%d\n", isatty(0), isatty(1), isatty(2));
		return 0;
	}
	if (!strcmp(what, "follow")) {
		// Makes the link `two` to `one` and reads through it.
		if (symlink(one, two) != 0)
			return fail("symlink");
		return get(two);
	}
	fprintf(stderr, "what is %s?\n", what);
	return 2;
}
