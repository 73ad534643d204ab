/*
 * The least that moves a blob from a registry to a disk: one connection, one range after the other,
 * recv into aligned memory, direct pwrite. No digests.
 *
 * usage: fetch PORT PATH SIZE_BYTES RANGE_BYTES FILE
 *
 * The server is on the loopback. Prints the seconds it took.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BLOCK_BYTES 4096UL
#define HEAD_BYTES_MAX 8192

static int connect_to(int port)
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

static void request(int connection, const char *path, size_t start, size_t end)
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

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
	if (argc != 6)
		errx(2, "usage: fetch PORT PATH SIZE_BYTES RANGE_BYTES FILE");
	size_t size = strtoull(argv[3], NULL, 10), range = strtoull(argv[4], NULL, 10);
	int file = open(argv[5], O_WRONLY | O_CREAT | O_TRUNC | O_DIRECT, 0600);
	char *memory = mmap(NULL, range + BLOCK_BYTES, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (file < 0 || memory == MAP_FAILED || ftruncate(file, size))
		err(1, "%s", argv[5]);
	double began = now();
	int connection = connect_to(atoi(argv[1]));
	for (size_t start = 0; start < size; start += range) {
		size_t length = size - start < range ? size - start : range;
		size_t padded = (length + BLOCK_BYTES - 1) & -BLOCK_BYTES;

		request(connection, argv[2], start, start + length);
		skip_head(connection);
		if (recv(connection, memory, length, MSG_WAITALL) != (ssize_t)length)
			err(1, "recv");
		memset(memory + length, 0, padded - length);
		if (pwrite(file, memory, padded, start) != (ssize_t)padded)
			err(1, "pwrite");
	}
	printf("%.6f\n", now() - began);
}
