/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Every layout that the programs and the agent share, once. ctl/pointsman/abi.py reads this file,
 * so keep to what it understands: fixed-width fields, named padding, enumerators with a value.
 *
 * Addresses are 16 bytes in network order; IPv4 is stored as ::ffff:a.b.c.d, so that one map and
 * one code path serve IPv4, IPv6 and IPv4-mapped sockets. Ports are in network order (__be16).
 */
#ifndef POINTSMAN_ABI_H
#define POINTSMAN_ABI_H

enum algorithm {
	ALGORITHM_RANDOM = 0,
};

/* What an empty set answers; it stands in the base half of service.set when the count is 0. */
enum empty {
	EMPTY_REFUSE = 0, /* no endpoints: ECONNREFUSED, as kube-proxy's REJECT */
	EMPTY_UNREACHABLE = 1, /* none under a policy: EHOSTUNREACH, where kube-proxy drops */
};

enum {
	GENERATION_RETIRED = 0x80000000, /* bit of load.generation: the endpoint has left */
	MORE_PLACES = 3,
	IN_OVERFLOW = 0x10000, /* one record of bucket.others that is in sockets_overflow */
	DATAGRAMS_PER_SOCKET = 4,
};

/* Index into `counters`. */
enum counter {
	COUNTER_REFUSED = 0, /* service without endpoints */
	COUNTER_UNREACHABLE = 1, /* no endpoint under a policy */
	COUNTER_UNDEFINED_PORT = 2, /* known VIP, port that no Service defines */
	COUNTER_UNRECORDED = 3, /* no room for the socket's record */
	COUNTER_OVERFLOWED = 4, /* bucket full, record went to sockets_overflow */
	COUNTERS = 5,
};

/* frontends: key. Port 0 with protocol 0 catches the undefined ports of a known VIP. */
struct frontend_key {
	__be32 addr[4];
	__be16 port;
	__u8 proto; /* IPPROTO_TCP, IPPROTO_UDP */
	__u8 pad;
};

/* frontends: value. Never rewritten: a hash may show a reader another key's value meanwhile. */
struct frontend {
	__u32 service; /* index into services */
};

/* services: one frontend, one cache line. */
struct service {
	__u64 set; /* count << 32 | first slot; switched by one release store */
	__u32 owner; /* the service port, index into names; 0 = this element is not in use */
	__u8 algorithm; /* enum algorithm; owner to pad are one 64-bit store */
	__u8 flags;
	__u16 pad;
	__u32 affinity; /* seconds, 0 = none */
	struct frontend_key key; /* own key: a reader compares it with what it looked up */
	__u32 reserved[6];
};

/* slots: one endpoint of a set. Never rewritten before every reader of the set has ended. */
struct slot {
	__be32 addr[4];
	__be16 port;
	__u16 flags;
	__u32 endpoint; /* index into load */
	__u32 generation; /* of that endpoint id; 0 is never valid */
	__u32 owner; /* the service port it belongs to */
};

/* load: what the programs know of one endpoint id. Written by programs only. */
struct load {
	__u32 generation;
	__u32 open; /* connections open now; signed while an upgrade merges two maps */
};

/* names: a service port in Kubernetes' words, for people who look into the maps. */
struct name {
	__u8 namespace[64];
	__u8 service[64];
	__u8 port[64];
};

/* ---- records of sockets: an ABI of their own, which changes rarely ---- */

/* One socket whose connect was translated. */
struct socket {
	__u32 endpoint;
	__u32 generation;
	__be32 vip[4];
	__be32 peer[4]; /* what the VIP was translated to */
	__be16 vip_port;
	__be16 peer_port;
	__u8 proto;
	__u8 counted; /* 1: this record stands in load.open */
	__u16 pad;
};

/* cookie: 0 = free, else the owner's; with COOKIE_BUSY while the record is being written. */
struct place {
	__u64 cookie;
	struct socket record;
};

/*
 * sockets: the sockets whose cookies share their low bits. Most often one or none: then this one
 * cache line is all that is touched, and since cookies come in sequence it is the next line of
 * memory each time.
 */
struct bucket {
	struct place first;
	__u32 others; /* records elsewhere: in sockets_more, and IN_OVERFLOW for each in overflow */
	__u32 turn; /* counts choices, so that a socket that connects again chooses anew */
};

/* sockets_more: the other places of a bucket. */
struct more {
	struct place place[3];
};

/* sockets_overflow: value */
struct overflow {
	struct socket record;
	__u64 netns; /* network namespace cookie: overflow is bounded for each */
};

/* datagrams: the endpoint that one unconnected UDP socket uses for one VIP. */
struct datagram {
	__be32 vip[4];
	__be32 peer[4];
	__be16 vip_port;
	__be16 peer_port;
	__u32 endpoint;
	__u32 generation;
	__u32 service;
	__u32 owner;
	__u32 sequence; /* of the last send; the smallest goes first */
};

struct datagrams {
	__u32 sequence;
	__u32 pad;
	struct datagram choice[4];
};

/* ---- what the agent asks of the correction programs (BPF_PROG_TEST_RUN input) ---- */

struct correction {
	__u32 endpoint;
	__u32 generation;
};

#endif
