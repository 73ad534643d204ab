/* <linux/fanotify.h> of Linux 6.18. */

#define FAN_CLOEXEC 0x00000001
#define FAN_NONBLOCK 0x00000002
#define FAN_UNLIMITED_QUEUE 0x00000010
#define FAN_CLASS_PRE_CONTENT 0x00000008

#define FAN_MARK_ADD 0x00000001
#define FAN_MARK_REMOVE 0x00000002

#define FAN_PRE_ACCESS 0x00100000

#define FANOTIFY_METADATA_VERSION 3
#define FAN_EVENT_INFO_TYPE_RANGE 6

#define FAN_ALLOW 0x01
#define FAN_DENY 0x02
#define FAN_ERRNO_SHIFT 24

struct fanotify_event_metadata {
    uint32_t event_len;
    uint8_t vers;
    uint8_t reserved;
    uint16_t metadata_len;
    uint64_t mask;
    int32_t fd;
    int32_t pid;
};

struct fanotify_event_info_header {
    uint8_t info_type;
    uint8_t pad;
    uint16_t len;
};

struct fanotify_event_info_range {
    struct fanotify_event_info_header hdr;
    uint32_t pad;
    uint64_t offset;
    uint64_t count;
};

struct fanotify_response {
    int32_t fd;
    uint32_t response;
};

int sys_fanotify_init(unsigned int flags, unsigned int event_flags);
int sys_fanotify_mark(int group_fd, unsigned int flags, uint64_t mask, int file_fd);
