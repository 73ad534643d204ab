/* <linux/mount.h> of Linux 6.1, and umount2(2)'s flags of the kernel's include/linux/fs.h. */

#define FSOPEN_CLOEXEC 0x00000001
#define FSMOUNT_CLOEXEC 0x00000001
#define OPEN_TREE_CLONE 1
#define OPEN_TREE_CLOEXEC 0x80000
#define MOVE_MOUNT_F_EMPTY_PATH 0x00000004
#define MOUNT_ATTR_RDONLY 0x00000001
#define MNT_DETACH 0x00000002
#define UMOUNT_NOFOLLOW 0x00000008

enum fsconfig_command {
    FSCONFIG_SET_FLAG = 0,
    FSCONFIG_SET_STRING = 1,
    FSCONFIG_CMD_CREATE = 6,
    ...
};

int sys_fsopen(const char *fs_name, unsigned int flags);
int sys_fsconfig(int fs_fd, unsigned int command, const char *key, const char *value, int aux);
int sys_fsmount(int fs_fd, unsigned int flags, unsigned int attributes);
int sys_open_tree(int directory_fd, const char *path, unsigned int flags);
int sys_move_mount(int from_fd, const char *from_path, int to_fd, const char *to_path,
                   unsigned int flags);
int sys_umount2(const char *target, int flags);
