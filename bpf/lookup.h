/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* From an address to an endpoint: frontend → service → slot. Four cache lines, no writes. What is
 * no frontend itself is asked for by its address alone: a VIP's other ports, a node's NodePorts. */
#ifndef POINTSMAN_LOOKUP_H
#define POINTSMAN_LOOKUP_H

#define V4_MAPPED bpf_htonl(0xffff)

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define bpf_htonl(x) __builtin_bswap32(x)
#define bpf_htons(x) __builtin_bswap16(x)
#else
#define bpf_htonl(x) (x)
#define bpf_htons(x) (x)
#endif

/* The verdict on a destination, as an errno for the hook to hand out. */
#define TRANSLATED 0
#define NOT_A_SERVICE 1

#define SERVICE_ANY_NODE (SERVICE_NODE | SERVICE_REMOTE_NODE | SERVICE_LOOPBACK)
#define MAX_STEPS 24 /* of a binary search: sets of 2^24 endpoints */

static __always_inline void count(__u32 counter)
{
	__u64 *value = counters.lookup(&counter);

	if (value)
		*value += 1;
}

static __always_inline bool same_address(const __be32 *a, const __be32 *b)
{
	return !((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]));
}

static __always_inline void copy_address(__be32 *to, const __be32 *from)
{
	to[0] = from[0];
	to[1] = from[1];
	to[2] = from[2];
	to[3] = from[3];
}

static __always_inline bool same_frontend(const struct frontend_key *a, const struct frontend_key *b)
{
	return same_address(a->addr, b->addr) && a->port == b->port && a->proto == b->proto;
}

/*
 * The service of exactly this key. A hash may hand a reader the value of another key when an
 * element is deleted and its memory reused meanwhile, so the service's own key has the last word.
 */
static __always_inline struct service *find_service(struct frontend_key *key, __u32 *id)
{
	struct frontend *frontend = frontends.lookup(key);
	struct service *service;

	if (!frontend)
		return NULL;
	*id = frontend->service;
	service = services.lookup(id);
	if (!service || !same_frontend(&service->key, key))
		return NULL;
	return service;
}

static __always_inline bool is_v4(const __be32 *addr)
{
	return !(addr[0] | addr[1]) && addr[2] == V4_MAPPED;
}

static __always_inline struct settings *get_settings(void)
{
	__u32 zero = 0;

	return settings.lookup(&zero);
}

/* A namespace that is not known to be the host's is a pod's: its loopback is its own. */
static __always_inline bool in_host_netns(void *ctx)
{
	struct settings *how = get_settings();

	return how && how->host_netns && bpf_get_netns_cookie(ctx) == how->host_netns;
}

/* Sockets of this namespace see Services' addresses as they are: a mesh or a VM deals with them. */
static __always_inline bool is_skipped(void *ctx)
{
	struct settings *how = get_settings();
	__u64 netns;

	if (!how || !how->skipped)
		return false;
	netns = bpf_get_netns_cookie(ctx);
	return skipped_netns.lookup(&netns) != NULL;
}

/*
 * The address that stands for others: all of 127.0.0.0/8 is one, and to dial 0.0.0.0 or :: is to
 * dial the loopback.
 */
static __always_inline void fold(__be32 *addr)
{
	if (is_v4(addr)) {
		if ((addr[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000) || !addr[3])
			addr[3] = bpf_htonl(0x7f000001);
	} else if (!(addr[0] | addr[1] | addr[2] | addr[3])) {
		addr[3] = bpf_htonl(1);
	}
}

/* The bit of a folded address, as bit_of() in ctl/pointsman/marks.py. */
static __always_inline __u64 mark_of(const __be32 *addr)
{
	__u64 x = ((__u64)addr[0] << 32 | addr[1]) * 0x9e3779b97f4a7c15ULL;

	x = (x ^ x >> 32) + ((__u64)addr[2] << 32 | addr[3]);
	x *= 0xc2b2ae3d27d4eb4fULL;
	return x ^ x >> 32;
}

/* False for an address that has no frontend. */
static __always_inline bool is_marked(const __be32 *addr)
{
	__be32 folded[4];
	__u64 bit, *word;
	__u32 index;

	copy_address(folded, addr);
	fold(folded);
	bit = mark_of(folded);
	index = bit >> 6 & (MAX_MARKS - 1);
	word = marks.lookup(&index);
	return word && *(volatile __u64 *)word >> (bit & 63) & 1;
}

static __always_inline bool in_cidr(const struct cidr *cidr, const __be32 *addr)
{
	return !(((addr[0] & cidr->mask[0]) ^ cidr->addr[0]) |
		 ((addr[1] & cidr->mask[1]) ^ cidr->addr[1]) |
		 ((addr[2] & cidr->mask[2]) ^ cidr->addr[2]) |
		 ((addr[3] & cidr->mask[3]) ^ cidr->addr[3]));
}

/* An address that no Service has, of a range that only Services have. */
static __always_inline bool is_unused(const __be32 *addr)
{
	struct settings *how = get_settings();

	if (!how || !how->cidrs)
		return false;
#pragma unroll
	for (int i = 0; i < MAX_CIDRS; i++) {
		if (i < how->cidrs && in_cidr(&how->cidr[i], addr))
			return true;
	}
	return false;
}

/* Whether there is anything to look for. Nearly all connections that are none of ours end here: one
 * bit is read instead of two keys sought in a hash. */
static __always_inline bool concerns_us(const __be32 *addr)
{
	return is_marked(addr) || is_unused(addr);
}

/* What an address is to us as a whole. */
static __always_inline struct service *find_wildcard(const __be32 *addr, __u32 *id)
{
	struct frontend_key key = {};

	copy_address(key.addr, addr);
	fold(key.addr);
	return find_service(&key, id);
}

/* The key of a NodePort: 0.0.0.0 or ::, whatever address of a node was meant. */
static __always_inline void any_address(__be32 *addr)
{
	addr[3] = 0;
	if (is_v4(addr))
		return;
	addr[0] = addr[1] = addr[2] = 0;
}

/* Whether an address with these flags leads to this NodePort. */
static __always_inline bool reaches_node_port(__u8 node, const struct service *service)
{
	if (!(node & SERVICE_ANY_NODE))
		return false;
	return !(node & SERVICE_REMOTE_NODE && service->flags & SERVICE_THIS_NODE);
}

/*
 * The NodePort at an address that belongs to a node. Anything else there is none of our business:
 * nodes have ports of their own.
 */
static __always_inline struct service *find_node_port(void *ctx, const struct frontend_key *key,
						      __u8 node, __u32 *id)
{
	struct frontend_key any = *key;
	struct service *service;

	if (node & SERVICE_LOOPBACK && !in_host_netns(ctx))
		return NULL;
	any_address(any.addr);
	service = find_service(&any, id);
	return service && reaches_node_port(node, service) ? service : NULL;
}

/*
 * What is no frontend itself: TRANSLATED with a NodePort's service, NOT_A_SERVICE, or
 * -ECONNREFUSED for what a VIP or a range of VIPs does not have. *counter says which.
 */
static __always_inline int find_by_address(void *ctx, const struct frontend_key *key,
					   struct service **service, __u32 *id, __u32 *counter)
{
	struct service *wildcard = find_wildcard(key->addr, id);

	*service = NULL;
	if (!wildcard) {
		*counter = COUNTER_UNUSED_ADDRESS;
		return is_unused(key->addr) ? -ECONNREFUSED : NOT_A_SERVICE;
	}
	*counter = COUNTER_UNDEFINED_PORT;
	if (!wildcard->flags)
		return -ECONNREFUSED;
	if (!(wildcard->flags & SERVICE_ANY_NODE))
		return NOT_A_SERVICE;
	*service = find_node_port(ctx, key, wildcard->flags, id);
	return *service ? TRANSLATED : NOT_A_SERVICE;
}

/* The service that a destination belongs to, with the set that it has now. */
struct destination {
	struct service *service;
	__u64 set;
	__u32 id;
};

/*
 * The service and set for a destination whose address concerns us: TRANSLATED, NOT_A_SERVICE, or the
 * errno that the caller of connect() or sendmsg() gets.
 */
static __always_inline int find_destination(void *ctx, struct frontend_key *key,
					    struct destination *to)
{
	__u32 counter = COUNTER_REFUSED;
	int error = TRANSLATED;

	to->service = find_service(key, &to->id);
	if (!to->service || to->service->flags & SERVICE_NODE_PORT)
		error = find_by_address(ctx, key, &to->service, &to->id, &counter);
	else if (to->service->flags & SERVICE_HOST_NETNS && !in_host_netns(ctx))
		error = NOT_A_SERVICE;
	if (error == NOT_A_SERVICE || is_skipped(ctx))
		return NOT_A_SERVICE;
	if (!error && to->service) {
		/* One load: a reader sees the old set or the new one, never a mixture. */
		to->set = *(volatile __u64 *)&to->service->set;
		if (to->set >> 32)
			return TRANSLATED;
		if ((__u32)to->set == EMPTY_UNREACHABLE) {
			count(COUNTER_UNREACHABLE);
			return -EHOSTUNREACH;
		}
	}
	count(counter);
	return -ECONNREFUSED;
}

/* As numbers, address before port: -1, 0 or 1. */
static __always_inline int compare(const struct slot *slot, const __be32 *addr, __be16 port)
{
#pragma unroll
	for (int i = 0; i < 4; i++) {
		__u32 a = bpf_htonl(slot->addr[i]), b = bpf_htonl(addr[i]);

		if (a != b)
			return a < b ? -1 : 1;
	}
	if (slot->port != port)
		return bpf_htons(slot->port) < bpf_htons(port) ? -1 : 1;
	return 0;
}

/* The last slot of the set that is not behind this endpoint: a set is sorted. NULL if it is out of
 * the map. */
static __always_inline struct slot *find_last(__u64 set, const __be32 *addr, __be16 port)
{
	__u32 first = (__u32)set, length = set >> 32;
	struct slot *slot;

	for (int i = 0; i < MAX_STEPS; i++) {
		__u32 half = length >> 1, index = first + half;

		if (length < 2)
			break;
		slot = slots.lookup(&index);
		if (!slot)
			return NULL;
		if (compare(slot, addr, port) <= 0)
			first = index;
		length -= half;
	}
	return slots.lookup(&first);
}

/* The slot of this endpoint in the set, NULL if it is no member. */
static __always_inline struct slot *find_member(__u64 set, const __be32 *addr, __be16 port)
{
	struct slot *slot = find_last(set, addr, port);

	return slot && !compare(slot, addr, port) ? slot : NULL;
}

#endif
