/* <linux/falloc.h> and <linux/sched.h> of Linux 6.1. */

#define FALLOC_FL_KEEP_SIZE 0x01
#define FALLOC_FL_PUNCH_HOLE 0x02
#define CLONE_FS 0x00000200

int sys_fallocate(int fd, int mode, int64_t offset, int64_t length);
int sys_unshare(int flags);
