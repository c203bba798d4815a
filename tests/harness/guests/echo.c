// A server that sends back what it gets: `echo PORT` by TCP, `echo udp PORT` by UDP. With
// `echo lookup NAME` it says how many addresses a name has, with `echo cwd` where it begins.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define IMPORT(module, name) __attribute__((import_module(module), import_name(name)))

IMPORT("wasi:sockets/instance-network@0.2.0", "instance-network") int32_t network(void);
IMPORT("wasi:sockets/tcp-create-socket@0.2.0", "create-tcp-socket") void tcp_new(int32_t family, void *ret);
#define TCP "wasi:sockets/tcp@0.2.0"
IMPORT(TCP, "[method]tcp-socket.start-bind")
void start_bind(int32_t self, int32_t net, int32_t kind, int32_t port, int32_t a, int32_t b, int32_t c, int32_t d,
	int32_t e, int32_t f, int32_t g, int32_t h, int32_t i, int32_t j, void *ret);
IMPORT(TCP, "[method]tcp-socket.finish-bind") void finish_bind(int32_t self, void *ret);
IMPORT(TCP, "[method]tcp-socket.start-listen") void start_listen(int32_t self, void *ret);
IMPORT(TCP, "[method]tcp-socket.finish-listen") void finish_listen(int32_t self, void *ret);
IMPORT(TCP, "[method]tcp-socket.accept") void tcp_accept(int32_t self, void *ret);
IMPORT(TCP, "[method]tcp-socket.subscribe") int32_t tcp_subscribe(int32_t self);
IMPORT(TCP, "[resource-drop]tcp-socket") void tcp_drop(int32_t self);
IMPORT("wasi:io/poll@0.2.0", "[method]pollable.block") void block(int32_t self);
IMPORT("wasi:io/poll@0.2.0", "[resource-drop]pollable") void pollable_drop(int32_t self);
#define STREAMS "wasi:io/streams@0.2.0"
IMPORT(STREAMS, "[method]input-stream.blocking-read") void stream_read(int32_t self, int64_t len, void *ret);
IMPORT(STREAMS, "[method]output-stream.blocking-write-and-flush")
void stream_write(int32_t self, const void *bytes, size_t len, void *ret);
IMPORT(STREAMS, "[resource-drop]input-stream") void input_drop(int32_t self);
IMPORT(STREAMS, "[resource-drop]output-stream") void output_drop(int32_t self);
#define LOOKUP "wasi:sockets/ip-name-lookup@0.2.0"
IMPORT(LOOKUP, "resolve-addresses") void resolve(int32_t net, const char *name, size_t len, void *ret);
IMPORT(LOOKUP, "[method]resolve-address-stream.resolve-next-address") void next_address(int32_t self, void *ret);
IMPORT(LOOKUP, "[method]resolve-address-stream.subscribe") int32_t lookup_subscribe(int32_t self);

IMPORT("wasi:sockets/udp-create-socket@0.2.0", "create-udp-socket") void udp_new(int32_t family, void *ret);
#define UDP "wasi:sockets/udp@0.2.0"
IMPORT(UDP, "[method]udp-socket.start-bind")
void udp_start_bind(int32_t self, int32_t net, int32_t kind, int32_t port, int32_t a, int32_t b, int32_t c, int32_t d,
	int32_t e, int32_t f, int32_t g, int32_t h, int32_t i, int32_t j, void *ret);
IMPORT(UDP, "[method]udp-socket.finish-bind") void udp_finish_bind(int32_t self, void *ret);
IMPORT(UDP, "[method]udp-socket.stream")
void udp_stream(int32_t self, int32_t some, int32_t kind, int32_t port, int32_t a, int32_t b, int32_t c, int32_t d,
	int32_t e, int32_t f, int32_t g, int32_t h, int32_t i, int32_t j, void *ret);
IMPORT(UDP, "[method]incoming-datagram-stream.receive") void udp_receive(int32_t self, int64_t most, void *ret);
IMPORT(UDP, "[method]incoming-datagram-stream.subscribe") int32_t udp_subscribe(int32_t self);
IMPORT(UDP, "[method]outgoing-datagram-stream.check-send") void udp_check_send(int32_t self, void *ret);
IMPORT(UDP, "[method]outgoing-datagram-stream.send") void udp_send(int32_t self, void *datagrams, size_t n, void *ret);
IMPORT("wasi:cli/environment@0.2.0", "initial-cwd") void initial_cwd(void *ret);

__attribute__((export_name("cabi_realloc"))) void *cabi_realloc(void *old, size_t old_size, size_t align, size_t size) {
	(void)old_size;
	(void)align;
	return realloc(old, size);
}

// A result: 0 or 1, then the value or the error.
struct result {
	uint8_t is_err;
	union {
		uint8_t code;
		int32_t value[3];
	} __attribute__((aligned(4)));
};

static int check(const char *what, uint8_t ret[2]) {
	if (ret[0]) {
		printf("%s: error %d\n", what, ret[1]);
		exit(1);
	}
	return 0;
}

static void wait_for(int32_t pollable) {
	block(pollable);
	pollable_drop(pollable);
}

static void serve(int32_t input, int32_t output) {
	for (;;) {
		struct result got;
		stream_read(input, 4096, &got);
		if (got.is_err)
			return;
		struct result put;
		stream_write(output, (void *)got.value[0], got.value[1], &put);
		free((void *)got.value[0]);
		if (put.is_err)
			return;
	}
}

struct address {
	int32_t words[8];
};

static int udp(int32_t net, int port) {
	struct result made, streams;
	udp_new(0, &made);
	if (made.is_err) {
		printf("no socket: error %d\n", made.code);
		return 1;
	}
	uint8_t ret[2];
	udp_start_bind(made.value[0], net, 0, port, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ret);
	check("bind", ret);
	udp_finish_bind(made.value[0], ret);
	check("bind", ret);
	udp_stream(made.value[0], 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, &streams);
	if (streams.is_err) {
		printf("stream: error %d\n", streams.code);
		return 1;
	}
	int32_t input = streams.value[0], output = streams.value[1];
	puts("listening");
	for (;;) {
		struct result got;
		wait_for(udp_subscribe(input));
		udp_receive(input, 1, &got);
		if (got.is_err || !got.value[1])
			continue;
		struct { void *data; size_t len; struct address from; } *in = (void *)got.value[0];
		struct { void *data; size_t len; int32_t some; struct address to; } out = {in->data, in->len, 1, in->from};
		uint64_t counted[2];
		udp_check_send(output, counted);
		udp_send(output, &out, 1, counted);
		free(in->data);
		free(in);
	}
}

int main(int argc, char **argv) {
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (argc > 1 && !strcmp(argv[1], "cwd")) {
		struct { uint8_t is_some; const char *text; size_t len; } cwd;
		initial_cwd(&cwd);
		return printf("%.*s\n", cwd.is_some ? (int)cwd.len : 0, cwd.text) < 0;
	}
	int32_t net = network();
	uint8_t ret[2];
	if (argc > 2 && !strcmp(argv[1], "lookup")) {
		struct result found;
		resolve(net, argv[2], strlen(argv[2]), &found);
		if (found.is_err) {
			printf("lookup: error %d\n", found.code);
			return 1;
		}
		wait_for(lookup_subscribe(found.value[0]));
		int n = 0;
		// result<option<ip-address>, error-code>: the option is at 2.
		for (;;) {
			uint8_t address[32] __attribute__((aligned(8)));
			next_address(found.value[0], address);
			if (address[0]) {
				printf("lookup: error %d\n", address[2]);
				return 1;
			}
			if (!address[2])
				break;
			n++;
		}
		printf("%d addresses\n", n);
		return 0;
	}
	if (argc > 2 && !strcmp(argv[1], "udp"))
		return udp(net, atoi(argv[2]));
	struct result made;
	tcp_new(0, &made);
	if (made.is_err) {
		printf("no socket: error %d\n", made.code);
		return 1;
	}
	int32_t listener = made.value[0];
	start_bind(listener, net, 0, atoi(argc > 1 ? argv[1] : "7"), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ret);
	check("bind", ret);
	finish_bind(listener, ret);
	check("bind", ret);
	start_listen(listener, ret);
	check("listen", ret);
	finish_listen(listener, ret);
	check("listen", ret);
	puts("listening");
	for (;;) {
		struct result accepted;
		wait_for(tcp_subscribe(listener));
		tcp_accept(listener, &accepted);
		if (accepted.is_err) {
			if (accepted.code == 8) // would-block
				continue;
			printf("accept: error %d\n", accepted.code);
			return 1;
		}
		serve(accepted.value[1], accepted.value[2]);
		input_drop(accepted.value[1]);
		output_drop(accepted.value[2]);
		tcp_drop(accepted.value[0]);
	}
}
