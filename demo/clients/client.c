/* C: getaddrinfo, connect, getpeername. HOST PORT PATH COUNT */
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static int dial(const char *host, const char *port)
{
	struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM}, *list;
	int error = getaddrinfo(host, port, &hints, &list);

	if (error) {
		fprintf(stderr, "%s: %s\n", host, gai_strerror(error));
		exit(1);
	}
	for (struct addrinfo *one = list; one; one = one->ai_next) {
		int fd = socket(one->ai_family, one->ai_socktype, one->ai_protocol);

		if (fd >= 0 && connect(fd, one->ai_addr, one->ai_addrlen) == 0) {
			freeaddrinfo(list);
			return fd;
		}
		close(fd);
	}
	perror(host);
	exit(1);
}

int main(int argc, char **argv)
{
	if (argc != 5)
		return 2;
	for (int i = 0; i < atoi(argv[4]); i++) {
		struct sockaddr_storage address;
		socklen_t length = sizeof(address);
		char peer[NI_MAXHOST], answer[4096];
		int fd = dial(argv[1], argv[2]);
		size_t used = 0;
		ssize_t got;

		getpeername(fd, (struct sockaddr *)&address, &length);
		getnameinfo((struct sockaddr *)&address, length, peer, sizeof(peer), NULL, 0,
			    NI_NUMERICHOST);
		dprintf(fd, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", argv[3],
			argv[1]);
		while ((got = read(fd, answer + used, sizeof(answer) - 1 - used)) > 0)
			used += got;
		answer[used] = '\0';
		close(fd);

		char *pod = strstr(answer, "X-Pod: "), *body = strstr(answer, "\r\n\r\n");

		if (!pod || !body)
			return 1;
		pod += strlen("X-Pod: ");
		printf("%.*s %s %s\n", (int)strcspn(pod, "\r"), pod, peer, body + 4);
	}
	return 0;
}
