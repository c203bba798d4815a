// Answers requests for /, computes for ever at /spin and traps at /trap. For /http?HOST:PORT and
// /https?HOST:PORT it asks that server for its / and answers with what it says.
#include <stdint.h>
#include <stddef.h>

#define IMPORT(module, name) __attribute__((import_module(module), import_name(name)))
#define EXPORT(name) __attribute__((export_name(name)))
#define TYPES "wasi:http/types@0.2.0"

IMPORT(TYPES, "[constructor]fields") int32_t fields_new(void);
IMPORT(TYPES, "[constructor]outgoing-response") int32_t response_new(int32_t fields);
IMPORT(TYPES, "[method]incoming-request.path-with-query") void request_path(int32_t self, void *ret);
IMPORT(TYPES, "[method]outgoing-response.body") void response_body(int32_t self, void *ret);
IMPORT(TYPES, "[method]outgoing-body.write") void body_write(int32_t self, void *ret);
IMPORT(TYPES, "[static]outgoing-body.finish") void body_finish(int32_t self, int32_t some, int32_t trailers, void *ret);
IMPORT(TYPES, "[static]response-outparam.set")
void outparam_set(int32_t self, int32_t is_err, int32_t value, int32_t a, int64_t b, int32_t c, int32_t d, int32_t e, int32_t f);
IMPORT("wasi:io/streams@0.2.0", "[method]output-stream.blocking-write-and-flush")
void stream_write(int32_t self, const void *bytes, size_t len, void *ret);
IMPORT("wasi:io/streams@0.2.0", "[resource-drop]output-stream") void output_drop(int32_t self);
IMPORT("wasi:io/streams@0.2.0", "[method]input-stream.blocking-read") void stream_read(int32_t self, int64_t len, void *ret);
IMPORT("wasi:io/poll@0.2.0", "[method]pollable.block") void block(int32_t self);
IMPORT(TYPES, "[constructor]outgoing-request") int32_t request_new(int32_t fields);
IMPORT(TYPES, "[method]outgoing-request.set-scheme")
int32_t set_scheme(int32_t self, int32_t some, int32_t scheme, const char *other, size_t len);
IMPORT(TYPES, "[method]outgoing-request.set-authority")
int32_t set_authority(int32_t self, int32_t some, const char *text, size_t len);
IMPORT(TYPES, "[method]outgoing-request.set-path-with-query")
int32_t set_path(int32_t self, int32_t some, const char *text, size_t len);
IMPORT("wasi:http/outgoing-handler@0.2.0", "handle")
void send(int32_t request, int32_t some, int32_t options, void *ret);
IMPORT(TYPES, "[method]future-incoming-response.subscribe") int32_t future_subscribe(int32_t self);
IMPORT(TYPES, "[method]future-incoming-response.get") void future_get(int32_t self, void *ret);
IMPORT(TYPES, "[method]incoming-response.consume") void response_consume(int32_t self, void *ret);
IMPORT(TYPES, "[method]incoming-body.stream") void body_stream(int32_t self, void *ret);

static char heap[65536] __attribute__((aligned(16)));
static size_t used;

EXPORT("cabi_realloc") void *cabi_realloc(void *old, size_t old_size, size_t align, size_t size) {
	(void)old;
	(void)old_size;
	used = (used + align - 1) & ~(align - 1);
	void *block = heap + used;
	used += size;
	return used <= sizeof heap ? block : 0;
}

// Whether `path` is `want`, or begins with it where that ends in "?".
static int is(const char *path, size_t len, const char *want) {
	size_t i = 0;
	while (i < len && want[i] && path[i] == want[i])
		i++;
	return !want[i] && (i == len || want[i - 1] == '?');
}

struct text {
	const char *at;
	size_t len;
};

#define TEXT(words) (struct text) {words, sizeof words - 1}

// What a server answers to a request for /.
static struct text ask(int https, const char *authority, size_t len) {
	int32_t request = request_new(fields_new());
	if (set_scheme(request, 1, https, 0, 0) || set_authority(request, 1, authority, len) || set_path(request, 1, "/", 1))
		return TEXT("no such address\n");
	// Results with an error code in them are aligned to 8 bytes.
	struct { uint8_t is_err; int32_t value __attribute__((aligned(8))); uint8_t more[64]; } sent;
	send(request, 0, 0, &sent);
	if (sent.is_err)
		return TEXT("not sent\n");
	block(future_subscribe(sent.value));
	struct {
		uint8_t is_some;
		uint8_t is_taken __attribute__((aligned(8)));
		uint8_t is_err __attribute__((aligned(8)));
		int32_t value __attribute__((aligned(8)));
		uint8_t more[64];
	} got;
	future_get(sent.value, &got);
	if (!got.is_some || got.is_taken || got.is_err)
		return TEXT("no answer\n");
	struct { uint8_t is_err; int32_t value; } body, stream;
	response_consume(got.value, &body);
	body_stream(body.value, &stream);
	struct { uint8_t is_err; const char *at; size_t len; } read;
	stream_read(stream.value, 4096, &read);
	return read.is_err ? TEXT("nothing\n") : (struct text) {read.at, read.len};
}

EXPORT("wasi:http/incoming-handler@0.2.0#handle") void handle(int32_t request, int32_t outparam) {
	struct { int32_t is_some; const char *path; size_t len; } path;
	request_path(request, &path);
	if (is(path.path, path.len, "/spin"))
		for (volatile unsigned i = 0;; i++)
			;
	if (is(path.path, path.len, "/trap"))
		__builtin_trap();
	struct text text = TEXT("Hello from a component\n");
	if (is(path.path, path.len, "/http?"))
		text = ask(0, path.path + 6, path.len - 6);
	if (is(path.path, path.len, "/https?"))
		text = ask(1, path.path + 7, path.len - 7);
	struct { uint8_t is_err; int32_t value; } body, stream;
	uint8_t ret[64] __attribute__((aligned(8)));
	int32_t response = response_new(fields_new());
	response_body(response, &body);
	outparam_set(outparam, 0, response, 0, 0, 0, 0, 0, 0);
	body_write(body.value, &stream);
	stream_write(stream.value, text.at, text.len, ret);
	output_drop(stream.value);
	body_finish(body.value, 0, 0, ret);
}
