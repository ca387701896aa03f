/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* From an address to an endpoint: frontend → service → slot. Four cache lines, no writes. */
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

static __always_inline bool is_vip(const struct frontend_key *key)
{
	struct frontend_key any = {};
	__u32 id;

	copy_address(any.addr, key->addr);
	return find_service(&any, &id) != NULL;
}

/*
 * The set of endpoints for a destination: TRANSLATED with *set and *id, NOT_A_SERVICE, or the
 * errno that the caller of connect() or sendmsg() gets.
 */
static __always_inline int find_set(struct frontend_key *key, __u64 *set, __u32 *id)
{
	struct service *service = find_service(key, id);

	if (!service) {
		if (!is_vip(key))
			return NOT_A_SERVICE;
		count(COUNTER_UNDEFINED_PORT);
		return -ECONNREFUSED;
	}
	/* One load: a reader sees the old set or the new one, never a mixture. */
	*set = *(volatile __u64 *)&service->set;
	if (*set >> 32)
		return TRANSLATED;
	if ((__u32)*set == EMPTY_UNREACHABLE) {
		count(COUNTER_UNREACHABLE);
		return -EHOSTUNREACH;
	}
	count(COUNTER_REFUSED);
	return -ECONNREFUSED;
}

/* One endpoint of a set, by a random number. NULL only if the set reaches out of the map. */
static __always_inline struct slot *pick(__u64 set, __u32 random)
{
	__u32 index = (__u32)set + (__u32)(((set >> 32) * random) >> 32);

	return slots.lookup(&index);
}

#endif
