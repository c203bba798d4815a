// Answers requests for /, computes for ever at /spin and traps at /trap.
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

static int is(const char *path, size_t len, const char *want) {
	size_t i = 0;
	while (i < len && want[i] && path[i] == want[i])
		i++;
	return i == len && !want[i];
}

EXPORT("wasi:http/incoming-handler@0.2.0#handle") void handle(int32_t request, int32_t outparam) {
	struct { int32_t is_some; const char *path; size_t len; } path;
	request_path(request, &path);
	if (is(path.path, path.len, "/spin"))
		for (volatile unsigned i = 0;; i++)
			;
	if (is(path.path, path.len, "/trap"))
		__builtin_trap();
	static const char text[] = "Hello from a component\n";
	struct { uint8_t is_err; int32_t value; } body, stream;
	uint8_t ret[64] __attribute__((aligned(8)));
	int32_t response = response_new(fields_new());
	response_body(response, &body);
	outparam_set(outparam, 0, response, 0, 0, 0, 0, 0, 0);
	body_write(body.value, &stream);
	stream_write(stream.value, text, sizeof text - 1, ret);
	output_drop(stream.value);
	body_finish(body.value, 0, 0, ret);
}
