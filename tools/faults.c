/* Fault injection for files and the clock, for chaos.py: a library for LD_PRELOAD.

   It counts, from 1, the operations of a process that modify files below CHAOS_FOLDER. At operation CHAOS_AT it injects
   CHAOS_FAULT:

     signal N    the process sends itself signal N before the operation
     once N      the operation fails with errno N
     always N    this operation and all later ones fail with errno N; with ENOSPC the first write is truncated
     clock N     the wall clock is N seconds ahead from now on

   Without CHAOS_AT nothing happens. CHAOS_COUNT names a file for the number of operations, written at the end; CHAOS_CAME
   names a file that is created when the fault is injected. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static atomic_ulong operations;
static atomic_long clock_offset;

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static int is_below(const char *path)
{
    const char *folder = getenv("CHAOS_FOLDER");
    size_t length = folder ? strlen(folder) : 0;
    return length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static int counts(int at, const char *path)
{
    char full[8192], link[64];
    if (path[0] == '/' || !getenv("CHAOS_FOLDER"))
        return is_below(path);
    if (at == AT_FDCWD) {
        if (!getcwd(full, 4096))
            return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        ssize_t size = readlink(link, full, 4096);
        if (size < 0)
            return 0;
        full[size] = 0;
    }
    strcat(full, "/");
    strncat(full, path, 4000);
    return is_below(full);
}

static int counts_open(int descriptor)
{
    char link[64], path[4097];
    if (!getenv("CHAOS_FOLDER"))
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, path, 4096);
    if (size < 0)
        return 0;
    path[size] = 0;
    return is_below(path);
}

/* Return the errno with which an operation must fail, or 0, and whether it is the first such operation. */
static int disturb(int *is_first)
{
    unsigned long number = atomic_fetch_add(&operations, 1) + 1;
    const char *at = getenv("CHAOS_AT"), *fault = getenv("CHAOS_FAULT");
    unsigned long first = at ? strtoul(at, NULL, 10) : 0;
    char kind[16];
    long value;
    const char *came = getenv("CHAOS_CAME");
    *is_first = number == first;
    if (*is_first && came)
        close((int)syscall(SYS_openat, AT_FDCWD, came, O_CREAT | O_WRONLY, 0600)); /* not by the functions below */
    if (!first || number < first || !fault || sscanf(fault, "%15s %ld", kind, &value) != 2)
        return 0;
    if (!strcmp(kind, "always"))
        return (int)value;
    if (number > first)
        return 0;
    if (!strcmp(kind, "once"))
        return (int)value;
    if (!strcmp(kind, "clock"))
        atomic_store(&clock_offset, value);
    if (!strcmp(kind, "signal"))
        kill(getpid(), (int)value);
    return 0;
}

#define FAIL_IF(condition) \
    do { \
        int is_first, saved = errno, number = (condition) ? disturb(&is_first) : 0; \
        errno = saved; \
        if (number) { \
            errno = number; \
            return -1; \
        } \
    } while (0)

ssize_t write(int descriptor, const void *bytes, size_t size)
{
    REAL(write);
    int is_first, saved = errno, number = counts_open(descriptor) ? disturb(&is_first) : 0;
    errno = saved;
    if (number == ENOSPC && is_first && size > 1)
        return real(descriptor, bytes, size / 2);
    if (number) {
        errno = number;
        return -1;
    }
    return real(descriptor, bytes, size);
}

ssize_t writev(int descriptor, const struct iovec *parts, int count)
{
    REAL(writev);
    FAIL_IF(counts_open(descriptor));
    return real(descriptor, parts, count);
}

ssize_t pwrite(int descriptor, const void *bytes, size_t size, off_t offset)
{
    REAL(pwrite);
    FAIL_IF(counts_open(descriptor));
    return real(descriptor, bytes, size, offset);
}

ssize_t pwrite64(int descriptor, const void *bytes, size_t size, off64_t offset)
{
    REAL(pwrite64);
    FAIL_IF(counts_open(descriptor));
    return real(descriptor, bytes, size, offset);
}

ssize_t sendfile(int out, int in, off_t *offset, size_t size)
{
    REAL(sendfile);
    FAIL_IF(counts_open(out));
    return real(out, in, offset, size);
}

ssize_t sendfile64(int out, int in, off64_t *offset, size_t size)
{
    REAL(sendfile64);
    FAIL_IF(counts_open(out));
    return real(out, in, offset, size);
}

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags)
{
    REAL(copy_file_range);
    FAIL_IF(counts_open(out));
    return real(in, from, out, to, size, flags);
}

int fsync(int descriptor)
{
    REAL(fsync);
    FAIL_IF(counts_open(descriptor));
    return real(descriptor);
}

int fdatasync(int descriptor)
{
    REAL(fdatasync);
    FAIL_IF(counts_open(descriptor));
    return real(descriptor);
}

int ftruncate(int descriptor, off_t size)
{
    REAL(ftruncate);
    FAIL_IF(counts_open(descriptor));
    return real(descriptor, size);
}

int ftruncate64(int descriptor, off64_t size)
{
    REAL(ftruncate64);
    FAIL_IF(counts_open(descriptor));
    return real(descriptor, size);
}

int rename(const char *from, const char *to)
{
    REAL(rename);
    FAIL_IF(counts(AT_FDCWD, to));
    return real(from, to);
}

int renameat(int from_at, const char *from, int to_at, const char *to)
{
    REAL(renameat);
    FAIL_IF(counts(to_at, to));
    return real(from_at, from, to_at, to);
}

/* Files can be deleted on a full disk. */
#define FAIL_DELETE_IF(condition) \
    do { \
        int is_first, saved = errno, number = (condition) ? disturb(&is_first) : 0; \
        errno = saved; \
        if (number && number != ENOSPC) { \
            errno = number; \
            return -1; \
        } \
    } while (0)

int unlink(const char *path)
{
    REAL(unlink);
    FAIL_DELETE_IF(counts(AT_FDCWD, path));
    return real(path);
}

int unlinkat(int at, const char *path, int flags)
{
    REAL(unlinkat);
    FAIL_DELETE_IF(counts(at, path));
    return real(at, path, flags);
}

int rmdir(const char *path)
{
    REAL(rmdir);
    FAIL_DELETE_IF(counts(AT_FDCWD, path));
    return real(path);
}

int mkdir(const char *path, mode_t mode)
{
    REAL(mkdir);
    FAIL_IF(counts(AT_FDCWD, path));
    return real(path, mode);
}

int symlink(const char *target, const char *path)
{
    REAL(symlink);
    FAIL_IF(counts(AT_FDCWD, path));
    return real(target, path);
}

int link(const char *from, const char *to)
{
    REAL(link);
    FAIL_IF(counts(AT_FDCWD, to));
    return real(from, to);
}

#define IS_CHANGE(flags) ((flags) & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR))

#define OPEN(name) \
    int name(const char *path, int flags, ...) \
    { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        FAIL_IF(IS_CHANGE(flags) && counts(AT_FDCWD, path)); \
        return real(path, flags, mode); \
    }

#define OPENAT(name) \
    int name(int at, const char *path, int flags, ...) \
    { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        FAIL_IF(IS_CHANGE(flags) && counts(at, path)); \
        return real(at, path, flags, mode); \
    }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) \
    { \
        REAL(name); \
        int is_first, number = strpbrk(mode, "wa+") && counts(AT_FDCWD, path) ? disturb(&is_first) : 0; \
        if (number) { \
            errno = number; \
            return NULL; \
        } \
        return real(path, mode); \
    }

FOPEN(fopen)
FOPEN(fopen64)

int clock_gettime(clockid_t kind, struct timespec *now)
{
    REAL(clock_gettime);
    int result = real(kind, now);
    if (!result && kind == CLOCK_REALTIME)
        now->tv_sec += atomic_load(&clock_offset);
    return result;
}

time_t time(time_t *now)
{
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (now)
        *now = found.tv_sec;
    return found.tv_sec;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    REAL(gettimeofday);
    int result = real(now, zone);
    if (!result)
        now->tv_sec += atomic_load(&clock_offset);
    return result;
}

__attribute__((destructor)) static void write_count(void)
{
    const char *path = getenv("CHAOS_COUNT");
    FILE *file = path && atomic_load(&operations) ? fopen(path, "w") : NULL;
    if (file) {
        fprintf(file, "%lu\n", atomic_load(&operations));
        fclose(file);
    }
}
