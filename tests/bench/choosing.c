/*
 * Both ends of the bench of choosing, and a long way between them. All times are µs.
 *
 *   choosing serve                     one process is all endpoints, and does as the lines of stdin say:
 *       listen NAMESPACE ADDRESS PORT WORKERS    the next endpoint, from number 0
 *       slow NUMBER FACTOR                       takes so much longer from now on
 *       close NUMBER                             accepts no more; what it has is done
 *       reset                                    counts from 0
 *       counts                                   prints how many connections each has accepted
 *   choosing ask CGROUP ADDRESS PORT DEADLINE FILE PROCESSES HOW NAMESPACE…
 *       asks as FILE says ("when work" a line), from so many processes, dealt to the namespaces; prints
 *       "begun" (CLOCK_MONOTONIC), then "when outcome latency" for each request. HOW: open (when it is time) or
 *       closed (each process when it has its answer; stops after the last "when")
 *   choosing far DELAY NAMESPACE DEVICE NAMESPACE DEVICE      two tun devices that lead to each other
 *
 * A request is a connection: four bytes say how much work it is, one byte is the answer. An endpoint has some
 * workers, which sleep for as long as there is work; the other requests queue. Who has gone is not served.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define ENDPOINTS 64
#define EVENTS 64
#define FOREVER INT64_MAX

static int64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000ll + t.tv_nsec / 1000;
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void enter(const char *namespace)
{
	int fd = open(namespace, O_RDONLY | O_CLOEXEC);

	if (fd < 0 || setns(fd, CLONE_NEWNET))
		die(namespace);
	close(fd);
}

static int wait_until(int epoll, struct epoll_event *events, int64_t until)
{
	int64_t left = until == FOREVER ? 60000000 : until - now();
	struct timespec t = { 0, 0 };

	if (left > 0)
		t = (struct timespec){ left / 1000000, left % 1000000 * 1000 };
	return epoll_pwait2(epoll, events, EVENTS, &t, NULL);
}

static void watch(int epoll, int verb, int fd, uint32_t events, void *what)
{
	struct epoll_event event = { .events = events, .data.ptr = what };

	if (epoll_ctl(epoll, verb, fd, &event))
		die("epoll_ctl");
}

/* ---- serve */

enum { LISTENS, READS, QUEUES, WORKS, ANSWERED };

struct connection {
	int fd; /* -1: the client has gone */
	int state;
	int64_t until;
	uint32_t work;
	struct endpoint *at;
	struct connection *next;
};

static struct endpoint {
	struct connection listening;
	int workers, busy;
	double factor;
	unsigned accepted;
	struct connection *first, **last; /* of the queue */
	struct connection *working;
} endpoints[ENDPOINTS];
static int number_of;

static void begin(struct connection *c)
{
	struct endpoint *at = c->at;

	c->state = WORKS;
	c->until = now() + (int64_t)(c->work * at->factor);
	c->next = at->working;
	at->working = c;
	at->busy++;
}

static void next_in_queue(struct endpoint *at)
{
	struct connection *c;

	while (at->busy < at->workers && (c = at->first)) {
		if (!(at->first = c->next))
			at->last = &at->first;
		if (c->fd < 0)
			free(c);
		else
			begin(c);
	}
}

/* What is done by now is answered; when the next will be. */
static int64_t finish(void)
{
	int64_t soonest = FOREVER, time = now();

	for (struct endpoint *at = endpoints; at < endpoints + number_of; at++) {
		for (struct connection **link = &at->working, *c; (c = *link);) {
			if (c->until > time) {
				if (c->until < soonest)
					soonest = c->until;
				link = &c->next;
				continue;
			}
			*link = c->next;
			at->busy--;
			c->state = ANSWERED;
			if (c->fd < 0)
				free(c);
			else
				send(c->fd, "x", 1, MSG_NOSIGNAL);
		}
		next_in_queue(at);
		for (struct connection *c = at->working; c; c = c->next)
			if (c->until < soonest)
				soonest = c->until;
	}
	return soonest;
}

static void hear(struct connection *c)
{
	ssize_t got = recv(c->fd, &c->work, sizeof c->work, 0);

	if (got < 0 && errno == EAGAIN)
		return;
	if (c->state == READS && got == sizeof c->work) {
		if (c->at->busy < c->at->workers) {
			begin(c);
		} else {
			c->state = QUEUES;
			c->next = NULL;
			*c->at->last = c;
			c->at->last = &c->next;
		}
		return;
	}
	close(c->fd);
	c->fd = -1;
	if (c->state == READS || c->state == ANSWERED)
		free(c);
}

static void welcome(int epoll, struct endpoint *at)
{
	struct connection *c;
	int fd;

	while ((fd = accept4(at->listening.fd, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
		at->accepted++;
		c = calloc(1, sizeof *c);
		c->fd = fd;
		c->state = READS;
		c->at = at;
		watch(epoll, EPOLL_CTL_ADD, fd, EPOLLIN, c);
	}
}

static void add_endpoint(int epoll, const char *namespace, const char *address, int port, int workers)
{
	struct sockaddr_in on = { AF_INET, htons(port), { inet_addr(address) }, { 0 } };
	struct endpoint *at = &endpoints[number_of++];
	int fd, one = 1;

	enter(namespace);
	fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(fd, (void *)&on, sizeof on) || listen(fd, 4096))
		die(address);
	*at = (struct endpoint){ .workers = workers, .factor = 1 };
	at->last = &at->first;
	at->listening = (struct connection){ .fd = fd, .state = LISTENS, .at = at };
	watch(epoll, EPOLL_CTL_ADD, fd, EPOLLIN, &at->listening);
}

static void obey(int epoll, const char *line)
{
	char namespace[256], address[64];
	int number, port, workers;
	double factor;

	if (sscanf(line, "listen %255s %63s %d %d", namespace, address, &port, &workers) == 4) {
		add_endpoint(epoll, namespace, address, port, workers);
	} else if (sscanf(line, "slow %d %lf", &number, &factor) == 2) {
		endpoints[number].factor = factor;
	} else if (sscanf(line, "close %d", &number) == 1) {
		close(endpoints[number].listening.fd);
	} else if (!strncmp(line, "reset", 5)) {
		for (int i = 0; i < number_of; i++)
			endpoints[i].accepted = 0;
	} else {
		for (int i = 0; i < number_of; i++)
			printf("%u%c", endpoints[i].accepted, i + 1 < number_of ? ' ' : '\n');
		fflush(stdout);
	}
}

static int serve(void)
{
	struct connection commands = { 0 };
	struct epoll_event events[EVENTS];
	int epoll = epoll_create1(0), got;
	char line[512];

	setvbuf(stdin, NULL, _IONBF, 0); /* or lines would wait where epoll does not see them */
	watch(epoll, EPOLL_CTL_ADD, 0, EPOLLIN, &commands);
	for (;;) {
		got = wait_until(epoll, events, finish());
		for (int i = 0; i < got; i++) {
			struct connection *c = events[i].data.ptr;

			if (c == &commands) {
				if (!fgets(line, sizeof line, stdin))
					return 0;
				obey(epoll, line);
			} else if (c->state == LISTENS) {
				welcome(epoll, c->at);
			} else {
				hear(c);
			}
		}
	}
}

/* ---- ask */

enum { NOT_ASKED, ANSWER, REFUSED, NO_CONNECTION, NO_ANSWER, CUT_OFF };

struct request {
	int64_t when; /* since the beginning */
	uint32_t work;
	int outcome;
	int64_t latency;
	/* while it is under way */
	int64_t asked;
	int fd;
	int connected;
	struct request *next;
};

static struct sockaddr_in to;
static int64_t began, deadline;

static void end(struct request *r, int outcome)
{
	r->outcome = outcome;
	r->when = r->asked - began;
	r->latency = now() - r->asked;
	close(r->fd);
	r->fd = -1;
}

static int dial(void)
{
	struct linger reset = { 1, 0 }; /* no port stays in TIME_WAIT, whatever the rate */
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	if (fd < 0)
		die("socket");
	setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
	return fd;
}

static void ask_now(int epoll, struct request *r)
{
	r->fd = dial();
	if (connect(r->fd, (void *)&to, sizeof to) && errno != EINPROGRESS)
		return end(r, REFUSED);
	watch(epoll, EPOLL_CTL_ADD, r->fd, EPOLLOUT, r);
}

static void go_on(int epoll, struct request *r)
{
	socklen_t size = sizeof(int);
	int error = 0;
	char answer;

	if (r->connected)
		return end(r, recv(r->fd, &answer, 1, 0) == 1 ? ANSWER : CUT_OFF);
	getsockopt(r->fd, SOL_SOCKET, SO_ERROR, &error, &size);
	if (error)
		return end(r, REFUSED);
	r->connected = 1;
	if (send(r->fd, &r->work, sizeof r->work, MSG_NOSIGNAL) != sizeof r->work)
		return end(r, CUT_OFF);
	watch(epoll, EPOLL_CTL_MOD, r->fd, EPOLLIN, r);
}

/* One process: every `step`th request. */
static void ask_mine(struct request *r, struct request *last, int step, int closed)
{
	struct request *under_way = NULL, **link, *a;
	struct epoll_event events[EVENTS];
	int64_t until, stops = began + last[-1].when;
	int epoll = epoll_create1(0), got;

	for (;;) {
		for (; r < last && (closed ? !under_way && now() < stops : now() >= began + r->when); r += step) {
			r->asked = closed ? now() : began + r->when;
			ask_now(epoll, r);
			if (r->fd >= 0) {
				r->next = under_way;
				under_way = r;
			}
		}
		until = FOREVER;
		for (link = &under_way; (a = *link);) {
			if (a->fd >= 0 && now() >= a->asked + deadline)
				end(a, a->connected ? NO_ANSWER : NO_CONNECTION);
			if (a->fd < 0) {
				*link = a->next;
				continue;
			}
			if (a->asked + deadline < until)
				until = a->asked + deadline;
			link = &a->next;
		}
		if (!under_way && (closed ? now() >= stops || r >= last : r >= last))
			exit(0);
		if (closed && !under_way)
			continue;
		if (!closed && r < last && began + r->when < until)
			until = began + r->when;
		got = wait_until(epoll, events, until);
		for (int i = 0; i < got; i++)
			go_on(epoll, events[i].data.ptr);
	}
}

/* The Service is in force once a connect succeeds. */
static void wait_for_service(void)
{
	int64_t until = now() + 60000000;
	struct timeval patience = { 0, 200000 };

	while (now() < until) {
		int fd = dial(), failed;

		fcntl(fd, F_SETFL, 0);
		setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
		failed = connect(fd, (void *)&to, sizeof to);
		close(fd);
		if (!failed)
			return;
		usleep(5000);
	}
	die("no endpoint answers");
}

static void join_cgroup(const char *path)
{
	char file[512];
	FILE *f;

	snprintf(file, sizeof file, "%s/cgroup.procs", path);
	f = fopen(file, "w");
	if (!f || fprintf(f, "%d", getpid()) < 0 || fclose(f))
		die(file);
}

static int ask(int argc, char **argv)
{
	int processes = atoi(argv[7]), closed = !strcmp(argv[8], "closed"), namespaces = argc - 9;
	size_t count = 0, room = 1 << 20;
	struct request *all = mmap(NULL, room * sizeof *all, PROT_READ | PROT_WRITE,
				   MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	long when, work;
	FILE *file = fopen(argv[6], "r");

	to = (struct sockaddr_in){ AF_INET, htons(atoi(argv[4])), { inet_addr(argv[3]) }, { 0 } };
	deadline = atol(argv[5]);
	if (!file || all == MAP_FAILED)
		die(argv[6]);
	while (count < room && fscanf(file, "%ld %ld", &when, &work) == 2)
		all[count++] = (struct request){ .when = when, .work = work, .fd = -1 };
	join_cgroup(argv[2]);
	enter(argv[9]);
	wait_for_service();
	began = now() + 200000;
	printf("begun %lld\n", (long long)began);
	fflush(stdout);
	for (int i = 0; i < processes; i++)
		if (!fork()) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			prctl(PR_SET_TIMERSLACK, 1);
			enter(argv[9 + i % namespaces]);
			ask_mine(all + i, all + count, processes, closed);
		}
	while (wait(NULL) > 0)
		;
	for (size_t i = 0; i < count; i++)
		printf("%lld %d %lld\n", (long long)all[i].when, all[i].outcome, (long long)all[i].latency);
	return 0;
}

/* ---- far */

#define RING 4096
#define FRAME 2048

struct lane {
	int from, to;
	unsigned first, count;
	int64_t due[RING];
	int length[RING];
	char data[RING][FRAME];
};

static int tun(const char *namespace, const char *device)
{
	struct ifreq wanted = { .ifr_flags = IFF_TUN | IFF_NO_PI };
	int fd;

	enter(namespace);
	fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
	snprintf(wanted.ifr_name, sizeof wanted.ifr_name, "%s", device);
	if (fd < 0 || ioctl(fd, TUNSETIFF, &wanted))
		die(device);
	return fd;
}

static int far(char **argv)
{
	int64_t delay = atol(argv[2]), soonest;
	int here = tun(argv[3], argv[4]), there = tun(argv[5], argv[6]), epoll = epoll_create1(0);
	struct lane *lanes = calloc(2, sizeof *lanes);
	struct epoll_event events[EVENTS];

	lanes[0].from = lanes[1].to = here;
	lanes[0].to = lanes[1].from = there;
	watch(epoll, EPOLL_CTL_ADD, here, EPOLLIN, NULL);
	watch(epoll, EPOLL_CTL_ADD, there, EPOLLIN, NULL);
	puts("ready");
	fflush(stdout);
	do {
		soonest = FOREVER;
		for (struct lane *l = lanes; l < lanes + 2; l++) {
			while (l->count < RING) {
				unsigned place = (l->first + l->count) % RING;

				l->length[place] = read(l->from, l->data[place], FRAME);
				if (l->length[place] <= 0)
					break;
				l->due[place] = now() + delay;
				l->count++;
			}
			while (l->count && l->due[l->first] <= now()) {
				/* What does not go is lost, as on a real way. */
				if (write(l->to, l->data[l->first], l->length[l->first]) < 0)
					perror("far");
				l->first = (l->first + 1) % RING;
				l->count--;
			}
			if (l->count && l->due[l->first] < soonest)
				soonest = l->due[l->first];
		}
	} while (wait_until(epoll, events, soonest) >= 0);
	return 1;
}

int main(int argc, char **argv)
{
	struct rlimit many = { 65536, 65536 };

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	prctl(PR_SET_TIMERSLACK, 1);
	setpriority(PRIO_PROCESS, 0, -20); /* endpoints are to be measured, not who else uses the machine */
	setrlimit(RLIMIT_NOFILE, &many);
	if (argc == 2 && !strcmp(argv[1], "serve"))
		return serve();
	if (argc >= 10 && !strcmp(argv[1], "ask"))
		return ask(argc, argv);
	if (argc == 7 && !strcmp(argv[1], "far"))
		return far(argv);
	return 2;
}
