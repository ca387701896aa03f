/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Records of connected sockets, in buckets of a cookie-indexed array: cookies are handed out in
 * sequence, so their low bits spread well, and a bucket costs half of what a hash would.
 *
 * Who may write a record: connect and sock_ops hold the socket's lock, and sock_release runs when
 * no call on the socket can be under way. Only sock_release and a TCP_CLOSE from softirq can meet,
 * so freeing is claimed by compare-and-swap; so is a place, against other sockets.
 */
#ifndef POINTSMAN_RECORD_H
#define POINTSMAN_RECORD_H

#define COOKIE_BUSY (1ULL << 63)
#define barrier() asm volatile("" ::: "memory")

struct place {
	struct bucket *bucket;
	struct socket *record; /* in the bucket or in the overflow map; NULL = not recorded */
	__u64 *cookie; /* the bucket's claim word; NULL = overflow */
};

static __always_inline struct bucket *bucket_of(__u64 cookie)
{
	__u32 index = cookie & (MAX_BUCKETS - 1);

	return sockets.lookup(&index);
}

/* The socket's own record, if it has one. */
static __always_inline bool find_record(__u64 cookie, struct place *place)
{
	struct bucket *bucket = bucket_of(cookie);
	struct overflow *overflow;

	place->record = NULL;
	place->cookie = NULL;
	place->bucket = bucket;
	if (!bucket)
		return false;
#pragma unroll
	for (int i = 0; i < SOCKETS_PER_BUCKET; i++) {
		if (bucket->cookie[i] == cookie) {
			place->cookie = &bucket->cookie[i];
			place->record = &bucket->record[i];
			return true;
		}
	}
	if (!bucket->overflow)
		return false;
	overflow = sockets_overflow.lookup(&cookie);
	if (!overflow)
		return false;
	place->record = &overflow->record;
	return true;
}

/* A free place of the bucket, claimed BUSY so that the agent's scan passes over it. */
static __always_inline bool claim_place(__u64 cookie, struct place *place)
{
	struct bucket *bucket = place->bucket;

	if (!bucket)
		return false;
#pragma unroll
	for (int i = 0; i < SOCKETS_PER_BUCKET; i++) {
		if (!bucket->cookie[i] &&
		    !__sync_val_compare_and_swap(&bucket->cookie[i], 0ULL, cookie | COOKIE_BUSY)) {
			place->cookie = &bucket->cookie[i];
			place->record = &bucket->record[i];
			return true;
		}
	}
	return false;
}

/* +1 for an endpoint that is still the one the record means. */
static __always_inline void count_open(struct socket *record)
{
	struct load *load_of = load.lookup(&record->endpoint);

	if (load_of && load_of->generation == record->generation) {
		__sync_fetch_and_add(&load_of->open, 1);
		record->counted = 1;
	}
}

static __always_inline void count_closed(const struct socket *record)
{
	struct load *load_of;
	__u32 endpoint = record->endpoint;

	if (!record->counted)
		return;
	load_of = load.lookup(&endpoint);
	if (load_of && load_of->generation == record->generation)
		__sync_fetch_and_add(&load_of->open, -1);
}

/* One namespace may take a quarter of the overflow map: a pod can aim at one bucket. */
static __always_inline bool enter_overflow(__u64 netns)
{
	__u32 one = 1, *taken = overflow_netns.lookup(&netns);

	if (!taken) {
		overflow_netns.update(&netns, &one);
		return true;
	}
	if (*taken >= MAX_OVERFLOW / 4)
		return false;
	__sync_fetch_and_add(taken, 1);
	return true;
}

static __always_inline void leave_overflow(__u64 netns)
{
	__u32 *taken = overflow_netns.lookup(&netns);

	if (taken && *taken)
		__sync_fetch_and_add(taken, -1);
}

static __always_inline void free_overflow(__u64 cookie, struct bucket *bucket)
{
	struct overflow *found = sockets_overflow.lookup(&cookie), copy;

	if (!found)
		return;
	copy = *found;
	if (sockets_overflow.delete(&cookie)) /* whoever deletes it counts it */
		return;
	__sync_fetch_and_add(&bucket->overflow, -1);
	leave_overflow(copy.netns);
	count_closed(&copy.record);
}

/* Ends the record of a socket that closed, or that now connects elsewhere. */
static __always_inline void free_record(__u64 cookie)
{
	struct place place;

	if (!find_record(cookie, &place))
		return;
	if (!place.cookie) {
		free_overflow(cookie, place.bucket);
		return;
	}
	if (__sync_val_compare_and_swap(place.cookie, cookie, cookie | COOKIE_BUSY) != cookie)
		return;
	count_closed(place.record);
	barrier();
	*(volatile __u64 *)place.cookie = 0;
}

static __always_inline void fill_record(struct socket *record, const struct frontend_key *vip,
					const struct slot *slot)
{
	record->endpoint = slot->endpoint;
	record->generation = slot->generation;
	copy_address(record->vip, vip->addr);
	copy_address(record->peer, slot->addr);
	record->vip_port = vip->port;
	record->peer_port = slot->port;
	record->proto = vip->proto;
	record->counted = 0;
	record->pad = 0;
	/*
	 * TCP is counted when its SYN goes out (sock_ops), so that a connect that fails on the
	 * way there never counts. UDP has no later event.
	 */
	if (vip->proto == IPPROTO_UDP)
		count_open(record);
}

static __always_inline void record_overflow(__u64 cookie, __u64 netns, struct bucket *bucket,
					    const struct frontend_key *vip, const struct slot *slot)
{
	struct overflow overflow = {};

	if (!bucket || !enter_overflow(netns)) {
		count(COUNTER_UNRECORDED);
		return;
	}
	overflow.netns = netns;
	fill_record(&overflow.record, vip, slot);
	if (sockets_overflow.insert(&cookie, &overflow)) {
		count_closed(&overflow.record);
		leave_overflow(netns);
		count(COUNTER_UNRECORDED);
		return;
	}
	__sync_fetch_and_add(&bucket->overflow, 1);
	count(COUNTER_OVERFLOWED);
}

#endif
