/* <linux/cachefiles.h> of Linux 6.1, unchanged up to 7.2. */

#define CACHEFILES_MSG_MAX_SIZE 1024

enum cachefiles_opcode {
    CACHEFILES_OP_OPEN = 0,
    CACHEFILES_OP_CLOSE = 1,
    CACHEFILES_OP_READ = 2,
};

struct cachefiles_msg {
    uint32_t msg_id;
    uint32_t opcode;
    uint32_t len;
    uint32_t object_id;
    uint8_t data[];
};

struct cachefiles_open {
    uint32_t volume_key_size;
    uint32_t cookie_key_size;
    uint32_t fd;
    uint32_t flags;
    uint8_t data[];
};

struct cachefiles_read {
    uint64_t off;
    uint64_t len;
};

#define CACHEFILES_IOC_READ_COMPLETE 0x40049801

int sys_cachefiles_read_complete(int object_fd, unsigned long msg_id);
