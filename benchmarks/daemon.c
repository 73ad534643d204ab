/*
 * A minimal on-demand daemon: what a READ costs without Python, digests, or anything to decide.
 *
 * usage: daemon CACHE_DIRECTORY SOURCE_DIRECTORY WINDOW_BYTES
 *
 * A cookie names a file of SOURCE_DIRECTORY whose bytes are those of the cache file. A READ is
 * answered by copying the aligned windows around it. Prints its process id once it is bound.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/cachefiles.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define OBJECTS_MAX 64
#define BLOCK_BYTES 4096UL
#define READ_BYTES_MAX (128UL << 10)

static struct object {
	uint32_t id;
	int cache, source;
	uint64_t size;
} objects[OBJECTS_MAX];

static int device;
static const char *sources;
static uint64_t window;
static char *memory;

static void command(const char *text)
{
	if (write(device, text, strlen(text)) < 0)
		err(1, "%s", text);
}

static struct object *find(uint32_t id)
{
	for (struct object *object = objects; object < objects + OBJECTS_MAX; object++)
		if (object->id == id)
			return object;
	errx(1, "object %u is not known, or there are too many", id);
}

static void on_open(const struct cachefiles_msg *message)
{
	const struct cachefiles_open *opened = (const void *)message->data;
	const char *cookie = (const char *)opened->data + opened->volume_key_size;
	char path[1024], answer[64];
	struct stat status;
	struct object *object = find(0);

	snprintf(path, sizeof(path), "%s/%.*s", sources, (int)opened->cookie_key_size, cookie);
	object->cache = opened->fd;
	object->source = open(path, O_RDONLY);
	if (object->source < 0 || fstat(object->source, &status))
		err(1, "%s", path);
	object->id = message->object_id;
	object->size = status.st_size;
	snprintf(answer, sizeof(answer), "copen %u,%llu", message->msg_id,
		 (unsigned long long)object->size);
	command(answer);
}

static void on_read(const struct cachefiles_msg *message)
{
	const struct cachefiles_read *want = (const void *)message->data;
	const struct object *object = find(message->object_id);
	uint64_t start = want->off - want->off % window;
	uint64_t end = want->off + want->len + window - 1;

	end -= end % window;
	if (end > object->size)
		end = (object->size + BLOCK_BYTES - 1) & -BLOCK_BYTES;
	ssize_t got = pread(object->source, memory, end - start, start);
	if (got < 0)
		err(1, "pread");
	memset(memory + got, 0, end - start - got);
	if (pwrite(object->cache, memory, end - start, start) != (ssize_t)(end - start))
		err(1, "pwrite of %llu bytes at %llu", (unsigned long long)(end - start),
		    (unsigned long long)start);
	if (ioctl(object->cache, CACHEFILES_IOC_READ_COMPLETE, message->msg_id))
		err(1, "READ_COMPLETE");
}

static void on_close(const struct cachefiles_msg *message)
{
	struct object *object = find(message->object_id);

	close(object->cache);
	close(object->source);
	object->id = 0;
}

static void serve(void)
{
	_Alignas(8) char buffer[CACHEFILES_MSG_MAX_SIZE];
	const struct cachefiles_msg *message = (const void *)buffer;
	struct epoll_event event = { .events = EPOLLIN };
	int epoll = epoll_create1(0);

	if (epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, device, &event))
		err(1, "epoll");
	for (;;) {
		if (epoll_wait(epoll, &event, 1, -1) < 0 && errno != EINTR)
			err(1, "epoll_wait");
		while (read(device, buffer, sizeof(buffer)) > 0) {
			if (message->opcode == CACHEFILES_OP_READ)
				on_read(message);
			else if (message->opcode == CACHEFILES_OP_OPEN)
				on_open(message);
			else
				on_close(message);
		}
	}
}

int main(int argc, char **argv)
{
	char directory[1024];

	if (argc != 4)
		errx(2, "usage: daemon CACHE_DIRECTORY SOURCE_DIRECTORY WINDOW_BYTES");
	sources = argv[2];
	window = strtoull(argv[3], NULL, 10);
	if (!window || window % BLOCK_BYTES)
		errx(2, "a window is a multiple of %lu bytes", BLOCK_BYTES);
	memory = mmap(NULL, 2 * window + READ_BYTES_MAX, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (memory == MAP_FAILED)
		err(1, "mmap");
	device = open("/dev/cachefiles", O_RDWR);
	if (device < 0)
		err(1, "/dev/cachefiles");
	snprintf(directory, sizeof(directory), "dir %s", argv[1]);
	command(directory);
	command("bind ondemand");

	pid_t child = fork();
	if (child < 0)
		err(1, "fork");
	if (child) {
		printf("%d\n", child);
		return 0;
	}
	serve();
}
