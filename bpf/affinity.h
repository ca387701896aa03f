/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Session affinity: a client keeps the endpoint that it got from a service port until it made no
 * new connection for the service's time, or until the endpoint is no longer in the set.
 */
#ifndef POINTSMAN_AFFINITY_H
#define POINTSMAN_AFFINITY_H


/* So that a value read while the map used its memory again for another client is not believed. */
static __always_inline __u32 check_of(const struct affinity_key *key, const __be32 *addr, __be16 port)
{
	__u64 sum = key->netns ^ (__u64)key->owner << 32 ^ (__u64)port << 8 ^ key->family;

	sum = mix(sum) ^ (__u64)addr[0] << 32 ^ addr[1];
	sum = mix(sum) ^ (__u64)addr[2] << 32 ^ addr[3];
	return mix(sum);
}

/*
 * The endpoint of this client, if it may still have it: the entry is refreshed. *stale is when an
 * entry that no longer holds was last used, 0 without one.
 */
static __always_inline struct slot *known_endpoint(struct affinity_key *key,
						   const struct destination *to, __u64 now,
						   __u64 *stale)
{
	struct affinity *entry = affinity.lookup(key), copy;
	struct slot *slot;

	*stale = 0;
	if (!entry)
		return NULL;
	copy = *entry;
	*stale = copy.seen;
	if (copy.check != check_of(key, copy.addr, copy.port))
		return NULL;
	/* Signed: another CPU may have refreshed it since `now` was read. */
	if ((__s64)(now - copy.seen) > (__s64)(to->service->affinity * NSEC_PER_SEC))
		return NULL;
	slot = find_member(to->set, copy.addr, copy.port);
	if (slot)
		*(volatile __u64 *)&entry->seen = now;
	return slot;
}

static __always_inline struct affinity_key client_of(void *ctx, const struct destination *to,
						     const __be32 *vip)
{
	struct affinity_key key = {};

	key.netns = bpf_get_netns_cookie(ctx);
	key.owner = to->service->owner;
	key.family = is_v4(vip) ? 4 : 6;
	return key;
}

/*
 * Keeps what was chosen for a client. Two CPUs that ask for one client at once agree: of two new entries the
 * first stays, and a replacement follows from the entry it replaces. By chance, that is, or by a table: by
 * turns or by load both may choose, and the later one counts from then on. Key and time are made anew: kept
 * through a choice, they would have the verifier go through it four times.
 */
static __always_inline struct slot *keep_endpoint(void *ctx, const struct destination *to,
						  const __be32 *vip, struct slot *slot)
{
	struct affinity_key key = client_of(ctx, to, vip);
	struct affinity value = {};
	struct slot *other;
	__u64 stale;

	value.seen = bpf_ktime_get_ns();
	copy_address(value.addr, slot->addr);
	value.port = slot->port;
	value.check = check_of(&key, value.addr, value.port);
	if (!affinity.insert(&key, &value))
		return slot;
	other = known_endpoint(&key, to, value.seen, &stale);
	if (other)
		return other;
	if (stale)
		affinity.update(&key, &value);
	else
		count(COUNTER_AFFINITY_FULL);
	return slot;
}

/* One endpoint of the set that find_destination() found, by 64 random bits. NULL if all are full. */
static __always_inline struct slot *choose(void *ctx, const struct destination *to,
					   const __be32 *vip, __u64 random)
{
	struct affinity_key key;
	__u64 stale, client = 0;
	struct slot *slot;

	if (to->service->affinity) {
		key = client_of(ctx, to, vip);
		slot = known_endpoint(&key, to, bpf_ktime_get_ns(), &stale);
		if (slot)
			return slot;
		if (stale)
			random = mix(stale ^ key.netns);
	} else {
		slot = choose_at_once(to, random);
		if (slot)
			return slot;
		random = mix(random); /* two others */
	}
	/* Of others nobody asks who they are. */
	if ((to->service->algorithm & ALGORITHM_MASK) == ALGORITHM_MAGLEV)
		client = bpf_get_netns_cookie(ctx);
	slot = choose_slot(to, random, client);
	if (slot && to->service->affinity)
		return keep_endpoint(ctx, to, vip, slot);
	return slot;
}

#endif
