/* watch: power off when the power button is pressed, and tell of disks: "SIZE vdX BYTES" when one appears or its size changes,
 * "GONE vdX" when one disappears. "watch deaf" does not hear the power button. */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <linux/input.h>
#include <linux/netlink.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <unistd.h>

#define DISKS 26
#define INPUTS 8

static unsigned long long known[DISKS]; /* sectors + 1; 0 = not there */

static void look(void) {
    for (int disk = 0; disk < DISKS; disk++) {
        char path[32];
        unsigned long long sectors, seen = 0;
        snprintf(path, sizeof path, "/sys/block/vd%c/size", 'a' + disk);
        FILE *file = fopen(path, "re");
        if (file) {
            if (fscanf(file, "%llu", &sectors) == 1)
                seen = sectors + 1;
            fclose(file);
        }
        if (seen == known[disk])
            continue;
        known[disk] = seen;
        if (seen)
            printf("SIZE vd%c %llu\n", 'a' + disk, (seen - 1) * 512);
        else
            printf("GONE vd%c\n", 'a' + disk);
    }
}

static void power_off(void) {
    printf("POWER BUTTON\n");
    kill(-1, SIGTERM);
    usleep(100000);
    kill(-1, SIGKILL);
    sync();
    reboot(RB_POWER_OFF);
}

int main(int argc, char **argv) {
    struct pollfd from[INPUTS + 1];
    int count = 1;
    setvbuf(stdout, NULL, _IOLBF, 0);
    signal(SIGTERM, SIG_IGN); /* our own, in power_off */
    struct sockaddr_nl kernel = {.nl_family = AF_NETLINK, .nl_groups = 1};
    from[0].fd = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT);
    from[0].events = POLLIN;
    if (from[0].fd >= 0 && bind(from[0].fd, (struct sockaddr *)&kernel, sizeof kernel))
        perror("watch: uevents");
    int inputs = argc > 1 && !strcmp(argv[1], "deaf") ? 0 : INPUTS;
    for (int input = 0; input < inputs; input++) {
        char path[32];
        snprintf(path, sizeof path, "/dev/input/event%d", input);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd >= 0)
            from[count++] = (struct pollfd){.fd = fd, .events = POLLIN};
    }
    printf("WATCH %d inputs\n", count - 1);
    for (;;) {
        look();
        poll(from, (nfds_t)count, 1000); /* the second is for kernels that send no uevent on a resize */
        if (from[0].revents) {
            char drop[4096];
            while (recv(from[0].fd, drop, sizeof drop, 0) > 0)
                ;
        }
        for (int i = 1; i < count; i++) {
            struct input_event event;
            if (from[i].revents & (POLLHUP | POLLERR))
                from[i].fd = -1;
            else if (from[i].revents & POLLIN && read(from[i].fd, &event, sizeof event) == sizeof event && event.type == EV_KEY &&
                     event.code == KEY_POWER && event.value == 1)
                power_off();
        }
    }
}
