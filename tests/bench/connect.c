/*
 * Times connect(), or a UDP query, for several arms that take turns in short batches on one CPU.
 *
 *   connect_bench KIND BATCHES BATCH ARM…      KIND: tcp, tcp-rr, udp-new, udp-echo
 *   ARM: CGROUP,FILE   CGROUP "-" stays where it is; FILE has one "address port" a line
 *
 * Prints, for each arm, a line of "p50 p99 mean" in nanoseconds for each of ten consecutive parts.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PARTS 10

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static int compare(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return x < y ? -1 : x > y;
}

struct arm {
	int to_child[2], to_parent[2];
	uint32_t *times;
	struct sockaddr_in *targets;
	int count;
};

static void pin(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	sched_setaffinity(0, sizeof set, &set);
}

static void join_cgroup(const char *path)
{
	char file[512];
	FILE *f;

	if (!strcmp(path, "-"))
		return;
	snprintf(file, sizeof file, "%s/cgroup.procs", path);
	f = fopen(file, "w");
	if (!f || fprintf(f, "%d", getpid()) < 0 || fclose(f))
		die(file);
}

static uint32_t once_tcp(const struct sockaddr_in *to)
{
	struct linger reset = { 1, 0 };
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	uint64_t begin;

	setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
	begin = now();
	if (connect(fd, (void *)to, sizeof *to))
		die("connect");
	begin = now() - begin;
	close(fd);
	return begin;
}

static uint32_t once_udp_new(const struct sockaddr_in *to)
{
	uint64_t begin = now();
	char data[32] = "x";
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	if (connect(fd, (void *)to, sizeof *to) || send(fd, data, sizeof data, 0) < 0 ||
	    recv(fd, data, sizeof data, 0) < 0)
		die("udp");
	close(fd);
	return now() - begin;
}

static uint32_t once_udp_echo(int fd, const struct sockaddr_in *to)
{
	struct sockaddr_in from;
	socklen_t size = sizeof from;
	char data[32] = "x";
	uint64_t begin = now();

	if (sendto(fd, data, sizeof data, 0, (void *)to, sizeof *to) < 0 ||
	    recvfrom(fd, data, sizeof data, 0, (void *)&from, &size) < 0)
		die("udp echo");
	return now() - begin;
}

static uint32_t once_request(int fd)
{
	char data[32] = "x";
	uint64_t begin = now();

	if (send(fd, data, sizeof data, 0) < 0 || recv(fd, data, sizeof data, 0) < 0)
		die("request");
	return now() - begin;
}

static void work(struct arm *arm, const char *kind, int batches, int batch)
{
	unsigned seed = 1;
	int fd = -1, one = 1;
	char go;

	if (!strcmp(kind, "udp-echo"))
		fd = socket(AF_INET, SOCK_DGRAM, 0);
	if (!strcmp(kind, "tcp-rr")) {
		fd = socket(AF_INET, SOCK_STREAM, 0);
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
		if (connect(fd, (void *)arm->targets, sizeof *arm->targets))
			die("connect");
	}
	for (int b = 0; b < batches; b++) {
		if (read(arm->to_child[0], &go, 1) != 1)
			exit(1);
		for (int i = 0; i < batch; i++) {
			const struct sockaddr_in *to = &arm->targets[rand_r(&seed) % arm->count];
			uint32_t took;

			if (!strcmp(kind, "tcp"))
				took = once_tcp(to);
			else if (!strcmp(kind, "udp-new"))
				took = once_udp_new(to);
			else if (!strcmp(kind, "udp-echo"))
				took = once_udp_echo(fd, to);
			else
				took = once_request(fd);
			arm->times[(size_t)b * batch + i] = took;
		}
		if (write(arm->to_parent[1], "x", 1) != 1)
			exit(1);
	}
	exit(0);
}

static void read_targets(struct arm *arm, const char *file)
{
	FILE *f = fopen(file, "r");
	char address[64];
	int port, room = 0;

	if (!f)
		die(file);
	while (fscanf(f, "%63s %d", address, &port) == 2) {
		if (arm->count == room) {
			room = room ? room * 2 : 64;
			arm->targets = realloc(arm->targets, room * sizeof *arm->targets);
		}
		memset(&arm->targets[arm->count], 0, sizeof *arm->targets);
		arm->targets[arm->count].sin_family = AF_INET;
		arm->targets[arm->count].sin_port = htons(port);
		inet_pton(AF_INET, address, &arm->targets[arm->count].sin_addr);
		arm->count++;
	}
	fclose(f);
}

/* Echoes on UDP and on one port of TCP; on the other it only accepts and closes. Spinning, because
 * waking up is not what is measured. */
static void serve(int port)
{
	struct sockaddr_in on = { AF_INET, htons(port), { INADDR_ANY }, { 0 } };
	int one = 1, udp[10];
	int closing = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	int echoing = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	int open[64], count = 0;
	char data[64];

	setsockopt(closing, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	setsockopt(echoing, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(closing, (void *)&on, sizeof on) || listen(closing, 4096))
		die("serve");
	/* A socket for each address, so that the answer leaves from the one that was asked. */
	for (int i = 0; i < 10; i++) {
		on.sin_addr.s_addr = htonl(INADDR_LOOPBACK + i);
		udp[i] = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
		if (bind(udp[i], (void *)&on, sizeof on))
			die("serve");
	}
	on.sin_addr.s_addr = INADDR_ANY;
	on.sin_port = htons(port + 1);
	if (bind(echoing, (void *)&on, sizeof on) || listen(echoing, 64))
		die("serve");
	for (;;) {
		int fd = accept4(closing, NULL, NULL, SOCK_NONBLOCK);
		ssize_t n;

		for (int i = 0; i < 10; i++) {
			struct sockaddr_in from;
			socklen_t size = sizeof from;

			n = recvfrom(udp[i], data, sizeof data, 0, (void *)&from, &size);
			if (n > 0)
				sendto(udp[i], data, n, 0, (void *)&from, size);
		}
		if (fd >= 0)
			close(fd);
		fd = accept4(echoing, NULL, NULL, SOCK_NONBLOCK);
		if (fd >= 0 && count < 64) {
			setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
			open[count++] = fd;
		}
		for (int i = 0; i < count; i++) {
			n = recv(open[i], data, sizeof data, 0);
			if (n > 0) {
				send(open[i], data, n, 0);
			} else if (!n) {
				close(open[i]);
				open[i--] = open[--count];
			}
		}
	}
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "serve")) {
		pin(1);
		serve(atoi(argv[2]));
	}
	if (argc < 5)
		return 2;
	const char *kind = argv[1];
	int batches = atoi(argv[2]), batch = atoi(argv[3]), arms = argc - 4;
	struct arm *all = calloc(arms, sizeof *all);
	size_t bytes = (size_t)batches * batch * sizeof(uint32_t);
	char done;

	pin(0);
	for (int a = 0; a < arms; a++) {
		char *file = strchr(argv[4 + a], ',');

		*file++ = 0;
		all[a].times = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
				    MAP_SHARED | MAP_ANONYMOUS, -1, 0);
		if (pipe(all[a].to_child) || pipe(all[a].to_parent))
			die("pipe");
		read_targets(&all[a], file);
		if (!fork()) {
			join_cgroup(argv[4 + a]);
			work(&all[a], kind, batches, batch);
		}
	}
	for (int b = 0; b < batches; b++) {
		for (int a = 0; a < arms; a++) {
			struct arm *arm = &all[(a + b) % arms]; /* no arm is always first */

			if (write(arm->to_child[1], "x", 1) != 1 || read(arm->to_parent[0], &done, 1) != 1)
				die("arm");
		}
	}
	for (int a = 0; a < arms; a++) {
		size_t each = (size_t)batches * batch / PARTS;

		for (int p = 0; p < PARTS; p++) {
			uint32_t *times = all[a].times + p * each;
			uint64_t sum = 0;

			qsort(times, each, sizeof *times, compare);
			for (size_t i = 0; i < each; i++)
				sum += times[i];
			printf("%s%u %u %lu", p ? "  " : "", times[each / 2], times[each * 99 / 100],
			       (unsigned long)(sum / each));
		}
		printf("\n");
		waitpid(-1, NULL, 0);
	}
	return 0;
}
