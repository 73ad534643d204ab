/* Answers the events of a fanotify group whose bytes are all in the file, where neither the
   interpreter nor its lock is in the way; all others are left to who called. */

#include <errno.h>
#include <poll.h>
#include <sys/stat.h>
#include <time.h>
#include <linux/fiemap.h>
#include <linux/fs.h>

#define EXTENTS 8
#define FILES (sizeof ((struct attendant *)0)->files / sizeof (uint64_t))

static uint64_t clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

/* What is allocated and not written yet reads as zeros. FIEMAP and SEEK_HOLE have one source in the
   kernel (iomap_fiemap, iomap_seek_hole in fs/iomap/); the latter looks at all the rest of a file. */
static int is_data(int fd, uint64_t start, uint64_t end)
{
    struct { struct fiemap head; struct fiemap_extent extents[EXTENTS]; } map = { .head = {
        .fm_start = start, .fm_length = end - start, .fm_extent_count = EXTENTS } };
    const uint32_t not_data =
        FIEMAP_EXTENT_UNKNOWN | FIEMAP_EXTENT_DELALLOC | FIEMAP_EXTENT_UNWRITTEN;

    if (ioctl(fd, FS_IOC_FIEMAP, &map) < 0)
        return 0;
    for (uint32_t i = 0; i < map.head.fm_mapped_extents; i++) {
        const struct fiemap_extent *extent = &map.extents[i];
        if (extent->fe_logical > start || extent->fe_flags & not_data)
            return 0;
        start = extent->fe_logical + extent->fe_length;
        if (start >= end)
            return 1;
    }
    return 0;
}

/* The bytes an event asks for, within the file; 0 when that is not to be told at a glance. */
static int wanted(const struct attendant *a, const void *slot, const struct stat *file,
                  struct attended *found)
{
    const struct fanotify_event_metadata *event = slot;
    const struct fanotify_event_info_range *range = (const void *)(event + 1);

    if (event->vers != FANOTIFY_METADATA_VERSION || !(event->mask & FAN_PRE_ACCESS) ||
        event->pid == a->own_pid || event->metadata_len != sizeof *event ||
        event->event_len < sizeof *event + sizeof *range ||
        range->hdr.info_type != FAN_EVENT_INFO_TYPE_RANGE || !range->count ||
        range->offset >= (uint64_t)file->st_size)
        return 0;
    found->inode = file->st_ino;
    found->start = range->offset;
    found->end = range->count < file->st_size - range->offset ? range->offset + range->count
                                                              : (uint64_t)file->st_size;
    return a->files[file->st_ino % FILES] == file->st_ino;
}

/* Told first: what cannot be told is left to who hears of it by its event. Then, as everywhere, the
   answer, the slot, the descriptor. ENOENT: the reader has been killed. */
static int answered(const struct attendant *a, uint64_t *slot, const struct stat *file,
                    uint64_t came_ns)
{
    const struct fanotify_event_metadata *event = (const void *)slot;
    struct fanotify_response response = { .fd = event->fd, .response = FAN_ALLOW };
    struct attended found;

    if (!wanted(a, slot, file, &found) || !is_data(event->fd, found.start, found.end))
        return 0;
    found.took_ns = clock_ns() - came_ns;
    if (write(a->told_fd, &found, sizeof found) != sizeof found)
        return 0;
    if (write(a->group_fd, &response, sizeof response) < 0 && errno != ENOENT)
        return 0;
    slot[0] = 0;
    slot[SLOT_WORDS - 1] = 0;
    close(response.fd);
    return 1;
}

int attend(const struct attendant *a, uint64_t *slot)
{
    struct pollfd ends[] = { { .fd = a->group_fd, .events = POLLIN },
                             { .fd = a->end_fd, .events = POLLIN } };
    struct stat file;

    for (;;) {
        if (poll(ends, 2, -1) < 0 && errno != EINTR)
            return -errno;
        if (ends[1].revents)
            return 0;
        if (read(a->group_fd, slot, (SLOT_WORDS - 1) * sizeof *slot) < 0) {
            if (errno == EAGAIN || errno == EINTR)
                continue;
            return -errno;
        }
        uint64_t came_ns = clock_ns();
        if (fstat(((const struct fanotify_event_metadata *)slot)->fd, &file) < 0)
            file.st_ino = 0; /* no file's: it is denied */
        slot[SLOT_WORDS - 1] = file.st_ino;
        if (!file.st_ino || !answered(a, slot, &file, came_ns))
            return 1;
    }
}
