/*
 * A minimal daemon for fanotify: what a read costs that somebody has to be asked for, without
 * Python, digests, or anything to decide.
 *
 * usage: fanotify CACHE_FILE SOURCE_FILE
 *
 * Makes CACHE_FILE, all of it a hole, and marks it; prints a line once it may be mounted. Every read
 * of it is answered by copying its blocks from SOURCE_FILE, unless they are there.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/fanotify.h>
#include <sys/stat.h>
#include <unistd.h>

/* Linux 6.14; Debian 12's headers are older. */
#ifndef FAN_PRE_ACCESS
#define FAN_PRE_ACCESS 0x00100000
#define FAN_EVENT_INFO_TYPE_RANGE 6
#endif

#define BLOCK_BYTES 4096ULL
#define READ_BYTES_MAX (1UL << 20)

struct event {
	struct fanotify_event_metadata metadata;
	struct {
		uint8_t type, pad;
		uint16_t length;
		uint32_t pad2;
		uint64_t offset, count;
	} range;
};

static int source;
static _Alignas(BLOCK_BYTES) char memory[READ_BYTES_MAX];

static void fill(int cache, uint64_t start, uint64_t end)
{
	if (lseek(cache, start, SEEK_HOLE) >= (off_t)end)
		return;
	for (; start < end; start += READ_BYTES_MAX) {
		size_t length = end - start < READ_BYTES_MAX ? end - start : READ_BYTES_MAX;

		if (pread(source, memory, length, start) != (ssize_t)length)
			err(1, "pread");
		if (pwrite(cache, memory, length, start) != (ssize_t)length)
			err(1, "pwrite of %zu bytes at %llu", length, (unsigned long long)start);
	}
}

static int cache_file(const char *path, int group)
{
	struct stat status;
	int cache = open(path, O_RDWR | O_CREAT | O_EXCL, 0600);

	if (cache < 0 || fstat(source, &status) || ftruncate(cache, status.st_size))
		err(1, "%s", path);
	if (fanotify_mark(group, FAN_MARK_ADD, FAN_PRE_ACCESS, cache, NULL))
		err(1, "fanotify_mark");
	return cache;
}

int main(int argc, char **argv)
{
	struct event event;

	if (argc != 3)
		errx(2, "usage: fanotify CACHE_FILE SOURCE_FILE");
	source = open(argv[2], O_RDONLY);
	if (source < 0)
		err(1, "%s", argv[2]);
	int group = fanotify_init(FAN_CLASS_PRE_CONTENT | FAN_UNLIMITED_QUEUE, O_RDWR);
	if (group < 0)
		err(1, "fanotify_init");
	/* From before the mark: filling through it raises no events. */
	int cache = cache_file(argv[1], group);
	puts("marked");
	fflush(stdout);
	while (read(group, &event, sizeof(event)) > 0) {
		struct fanotify_response answer = { event.metadata.fd, FAN_ALLOW };
		uint64_t start = event.range.offset & -BLOCK_BYTES;

		if (event.range.type != FAN_EVENT_INFO_TYPE_RANGE || !event.range.count)
			errx(1, "an event without a range");
		fill(cache, start, (event.range.offset + event.range.count + BLOCK_BYTES - 1) & -BLOCK_BYTES);
		if (write(group, &answer, sizeof(answer)) != sizeof(answer))
			err(1, "answer");
		close(event.metadata.fd);
	}
	err(1, "read");
}
