/*
 * The least that moves a blob from a registry to a disk: recv into aligned memory, direct pwrite, at
 * most 1 MiB at once. No digests.
 *
 * usage: fetch PORT PATH SIZE_BYTES RANGE_BYTES CONNECTIONS FILE
 *
 * The server is on the loopback. Every connection has a thread of its own, which asks for one range
 * after the other, whichever is next. Prints the seconds it took, and those of processors.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BLOCK_BYTES 4096UL
#define PIECE_BYTES (1UL << 20)
#define HEAD_BYTES_MAX 8192
#define CONNECTIONS_MAX 64

static int port, file;
static const char *path;
static size_t size, range;
static atomic_size_t next;

static int connect_to_server(void)
{
	struct sockaddr_in address = {
		.sin_family = AF_INET,
		.sin_port = htons(port),
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK),
	};
	int connection = socket(AF_INET, SOCK_STREAM, 0);

	if (connection < 0 || connect(connection, (void *)&address, sizeof(address)))
		err(1, "port %d", port);
	return connection;
}

static void request(int connection, size_t start, size_t end)
{
	char text[1024];
	int length = snprintf(text, sizeof(text),
			      "GET %s HTTP/1.1\r\nHost: 127.0.0.1\r\nRange: bytes=%zu-%zu\r\n\r\n",
			      path, start, end - 1);

	if (send(connection, text, length, 0) != length)
		err(1, "send");
}

/* Take the answer's head off the connection, not a byte more: the body goes to aligned memory. */
static void skip_head(int connection)
{
	char head[HEAD_BYTES_MAX];
	const char *end;
	ssize_t got;

	do {
		got = recv(connection, head, sizeof(head), MSG_PEEK);
		if (got <= 0)
			err(1, "recv");
		end = memmem(head, got, "\r\n\r\n", 4);
	} while (!end && got < HEAD_BYTES_MAX);
	if (!end || strncmp(head, "HTTP/1.1 206", 12))
		errx(1, "not the answer to a range: %.*s", (int)got, head);
	recv(connection, head, end + 4 - head, 0);
}

/* The body's bytes [start, end) of the blob, to the same place of the file. */
static void move(int connection, char *memory, size_t start, size_t end)
{
	for (; start < end; start += PIECE_BYTES) {
		size_t length = end - start < PIECE_BYTES ? end - start : PIECE_BYTES;
		size_t padded = (length + BLOCK_BYTES - 1) & -BLOCK_BYTES;

		if (recv(connection, memory, length, MSG_WAITALL) != (ssize_t)length)
			err(1, "recv");
		memset(memory + length, 0, padded - length);
		if (pwrite(file, memory, padded, start) != (ssize_t)padded)
			err(1, "pwrite");
	}
}

static void *fetch(void *unused)
{
	char *memory = mmap(NULL, PIECE_BYTES, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	int connection = connect_to_server();
	size_t start;

	if (memory == MAP_FAILED)
		err(1, "mmap");
	while ((start = atomic_fetch_add(&next, range)) < size) {
		size_t end = size - start < range ? size : start + range;

		request(connection, start, end);
		skip_head(connection);
		move(connection, memory, start, end);
	}
	return unused;
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

static double used(void)
{
	struct rusage usage;

	getrusage(RUSAGE_SELF, &usage);
	return usage.ru_utime.tv_sec + usage.ru_stime.tv_sec +
	       (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

int main(int argc, char **argv)
{
	pthread_t threads[CONNECTIONS_MAX];
	int connections = argc == 7 ? atoi(argv[5]) : 0;

	if (connections < 1 || connections > CONNECTIONS_MAX)
		errx(2, "usage: fetch PORT PATH SIZE_BYTES RANGE_BYTES CONNECTIONS FILE");
	port = atoi(argv[1]);
	path = argv[2];
	size = strtoull(argv[3], NULL, 10);
	range = strtoull(argv[4], NULL, 10);
	if (!range || range % BLOCK_BYTES)
		errx(2, "a range is a multiple of %lu bytes", BLOCK_BYTES);
	file = open(argv[6], O_WRONLY | O_CREAT | O_TRUNC | O_DIRECT, 0600);
	if (file < 0 || ftruncate(file, size))
		err(1, "%s", argv[6]);
	double began = now(), before = used();
	for (int i = 0; i < connections; i++)
		if (pthread_create(threads + i, NULL, fetch, NULL))
			errx(1, "no thread");
	for (int i = 0; i < connections; i++)
		pthread_join(threads[i], NULL);
	printf("%.6f %.6f\n", now() - began, used() - before);
}
