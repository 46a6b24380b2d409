/* writer DEVICE DELAY_US: prove that what was acknowledged is on the disk.
 *
 * Record n (512 bytes: magic, n, ~n) goes to slot n % 2048, with O_DIRECT and then fdatasync; only after that "ACK n" is printed.
 * On start the ring is read, and writing goes on after its highest record ("CTR RESUME n"). atoll.lab.guest.ring checks the ring.
 * A write that fails is repeated with the same number, for ever: nothing may be acknowledged that is not there. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAGIC "CTRREC01"
#define SLOTS 2048
#define RECORD 512
#define LONGEST_DELAY 10000000ul

struct record {
    char magic[8];
    uint64_t number;
    uint64_t inverse;
    char rest[RECORD - 24];
};

static int open_device(const char *path) {
    for (int attempt = 0;; attempt++) {
        int fd = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
        if (fd >= 0)
            return fd;
        if (attempt == 100) {
            printf("CTR ERR open %s: %s\n", path, strerror(errno));
            exit(1);
        }
        usleep(100000); /* the disk may be found a moment later */
    }
}

static uint64_t highest(int fd, struct record *ring) {
    uint64_t top = 0;
    for (size_t have = 0; have < SLOTS * RECORD;) {
        ssize_t got = pread(fd, (char *)ring + have, SLOTS * RECORD - have, (off_t)have);
        if (got <= 0) {
            printf("CTR ERR read: %s\n", got ? strerror(errno) : "the disk is smaller than 1 MiB");
            exit(1);
        }
        have += (size_t)got;
    }
    for (int slot = 0; slot < SLOTS; slot++)
        if (!memcmp(ring[slot].magic, MAGIC, 8) && ring[slot].inverse == ~ring[slot].number && ring[slot].number > top)
            top = ring[slot].number;
    return top;
}

int main(int argc, char **argv) {
    if (argc < 2)
        return 2;
    unsigned long delay = argc > 2 ? strtoul(argv[2], NULL, 10) : 20000;
    if (delay > LONGEST_DELAY)
        delay = LONGEST_DELAY;
    setvbuf(stdout, NULL, _IOLBF, 0);
    int fd = open_device(argv[1]);
    struct record *ring;
    if (posix_memalign((void **)&ring, 4096, SLOTS * RECORD))
        return 1;
    uint64_t number = highest(fd, ring);
    printf("CTR RESUME %llu\n", (unsigned long long)number);
    for (number++;; number++) {
        memset(ring, 0, RECORD);
        memcpy(ring->magic, MAGIC, 8);
        ring->number = number;
        ring->inverse = ~number;
        while (pwrite(fd, ring, RECORD, (off_t)(number % SLOTS) * RECORD) != RECORD || fdatasync(fd)) {
            printf("CTR ERR write %llu: %s\n", (unsigned long long)number, strerror(errno));
            sleep(1);
        }
        printf("ACK %llu\n", (unsigned long long)number);
        if (delay)
            usleep((useconds_t)delay);
    }
}
