/*
 * A link for kernels without netem: two TUN devices, and what goes into one comes out of the other
 * after half a round trip, no faster than so many bytes per second in each direction.
 *
 * usage: link NAME NAME ROUND_TRIP_US BYTES_PER_S
 *
 * Makes both devices where it runs, prints a line, and is the link until it is killed. A queue that
 * is full drops what comes, as a router's does.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define PACKET_BYTES_MAX 1536
#define PACKETS_MAX 4096
#define SECOND_NS 1000000000ULL

struct packet {
	uint64_t due;
	int length;
	char bytes[PACKET_BYTES_MAX];
};

static struct direction {
	struct packet packets[PACKETS_MAX];
	unsigned int head, tail;
	uint64_t free_at;
} directions[2];

static uint64_t delay_ns, bytes_per_s;

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * SECOND_NS + time.tv_nsec;
}

static int device(const char *name)
{
	struct ifreq request = { .ifr_flags = IFF_TUN | IFF_NO_PI };
	int tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK);

	strncpy(request.ifr_name, name, IFNAMSIZ - 1);
	if (tun < 0 || ioctl(tun, TUNSETIFF, &request))
		err(1, "/dev/net/tun, %s", name);
	return tun;
}

static void take(struct direction *direction, int from)
{
	static char surplus[PACKET_BYTES_MAX];

	for (;;) {
		int full = direction->tail - direction->head == PACKETS_MAX;
		struct packet *packet = direction->packets + direction->tail % PACKETS_MAX;
		ssize_t length = read(from, full ? surplus : packet->bytes, PACKET_BYTES_MAX);

		if (length < 0 && (errno == EAGAIN || errno == EIO)) /* EIO: not up yet */
			return;
		if (length < 0)
			err(1, "read");
		if (full)
			continue;
		if (direction->free_at < now())
			direction->free_at = now();
		direction->free_at += length * SECOND_NS / bytes_per_s;
		packet->due = direction->free_at + delay_ns;
		packet->length = length;
		direction->tail++;
	}
}

/* Nanoseconds until there is more to give. */
static uint64_t give(struct direction *direction, int to)
{
	while (direction->head != direction->tail) {
		struct packet *packet = direction->packets + direction->head % PACKETS_MAX;
		uint64_t at = now();

		if (packet->due > at)
			return packet->due - at;
		if (write(to, packet->bytes, packet->length) < 0 && errno != EIO && errno != EINVAL)
			err(1, "write");
		direction->head++;
	}
	return SECOND_NS;
}

int main(int argc, char **argv)
{
	if (argc != 5)
		errx(2, "usage: link NAME NAME ROUND_TRIP_US BYTES_PER_S");
	delay_ns = strtoull(argv[3], NULL, 10) * 1000 / 2;
	bytes_per_s = strtoull(argv[4], NULL, 10);
	if (!bytes_per_s)
		errx(2, "a link that lets nothing through");
	struct pollfd ends[2] = {
		{ .fd = device(argv[1]), .events = POLLIN },
		{ .fd = device(argv[2]), .events = POLLIN },
	};
	puts("up");
	fflush(stdout);
	for (;;) {
		uint64_t first = give(directions, ends[1].fd);
		uint64_t second = give(directions + 1, ends[0].fd);
		uint64_t wait = first < second ? first : second;
		struct timespec timeout = { wait / SECOND_NS, wait % SECOND_NS };

		if (ppoll(ends, 2, &timeout, NULL) < 0 && errno != EINTR)
			err(1, "poll");
		for (int i = 0; i < 2; i++)
			take(directions + i, ends[i].fd);
	}
}
