/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Records of connected sockets, in buckets of a cookie-indexed array: cookies are handed out in
 * sequence, so their low bits spread well, and an array is quicker than any hash.
 *
 * Who may write a record: connect and sock_ops hold the socket's lock, and sock_release runs when
 * no call on the socket can be under way. Only sock_release and a TCP_CLOSE from softirq can meet,
 * so freeing is claimed by compare-and-swap; so is a place, against other sockets.
 */
#ifndef POINTSMAN_RECORD_H
#define POINTSMAN_RECORD_H

#define COOKIE_BUSY (1ULL << 63)

/* Where a record is. In the overflow map it has no claim word. */
struct found {
	struct bucket *bucket;
	struct socket *record;
	__u64 *cookie; /* the claim word; NULL = overflow */
};

static __always_inline struct bucket *bucket_of(__u64 cookie)
{
	__u32 index = cookie & (MAX_BUCKETS - 1);

	return sockets.lookup(&index);
}

static __always_inline __u64 first_of(const struct bucket *bucket)
{
	return *(volatile __u64 *)&bucket->first.cookie;
}

static __always_inline void set_found(struct found *found, struct place *place)
{
	found->cookie = &place->cookie;
	found->record = &place->record;
}

/*
 * The record of a socket in its bucket, or in the overflow map. `first` is whose the first place
 * is: a hook that has other things to look up reads it early, so that memory answers meanwhile.
 */
static __always_inline bool find_record(__u64 cookie, struct bucket *bucket, __u64 first,
					struct found *found)
{
	__u32 index = cookie & (MAX_BUCKETS - 1);
	struct overflow *overflow;
	struct more *more;

	found->bucket = bucket;
	found->record = NULL;
	found->cookie = NULL;
	if (first == cookie) {
		set_found(found, &bucket->first);
		return true;
	}
	if (!bucket->others)
		return false;
	more = sockets_more.lookup(&index);
	if (!more)
		return false;
#pragma unroll
	for (int i = 0; i < MORE_PLACES; i++) {
		if (more->place[i].cookie == cookie) {
			set_found(found, &more->place[i]);
			return true;
		}
	}
	if (bucket->others < IN_OVERFLOW)
		return false;
	overflow = sockets_overflow.lookup(&cookie);
	if (!overflow)
		return false;
	found->record = &overflow->record;
	return true;
}

static __always_inline bool claim(struct place *place, __u64 cookie)
{
	return !place->cookie && swap(&place->cookie, 0, cookie | COOKIE_BUSY);
}

/* A free place of the bucket, claimed BUSY so that whoever scans passes over it. */
static __always_inline bool claim_place(__u64 cookie, struct found *found)
{
	__u32 index = cookie & (MAX_BUCKETS - 1);
	struct bucket *bucket = found->bucket;
	struct more *more;

	if (claim(&bucket->first, cookie)) {
		set_found(found, &bucket->first);
		return true;
	}
	more = sockets_more.lookup(&index);
	if (!more)
		return false;
#pragma unroll
	for (int i = 0; i < MORE_PLACES; i++) {
		if (claim(&more->place[i], cookie)) {
			__sync_fetch_and_add(&bucket->others, 1);
			set_found(found, &more->place[i]);
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
		record->counted |= COUNTED_OPEN;
	}
}

static __always_inline void count_closed(const struct socket *record)
{
	struct load *load_of;
	__u32 endpoint = record->endpoint;

	if (!(record->counted & COUNTED_OPEN))
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
		if (!overflow_netns.insert(&netns, &one))
			return true;
		taken = overflow_netns.lookup(&netns); /* another CPU was first */
		if (!taken)
			return false;
	}
	/* Signed: an entry that the LRU dropped and that came anew may count below zero. */
	if ((__s32)*taken >= MAX_OVERFLOW / 4)
		return false;
	__sync_fetch_and_add(taken, 1);
	return true;
}

static __always_inline void leave_overflow(__u64 netns)
{
	__u32 *taken = overflow_netns.lookup(&netns);

	if (taken && (__s32)*taken > 0)
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
	__sync_fetch_and_add(&bucket->others, -IN_OVERFLOW);
	leave_overflow(copy.netns);
	count_closed(&copy.record);
}

/* Ends the record of a socket that closed, or that now connects elsewhere. */
static __always_inline void free_record(__u64 cookie, struct bucket *bucket)
{
	struct found found;

	if (!bucket || !find_record(cookie, bucket, first_of(bucket), &found))
		return;
	if (!found.cookie) {
		free_overflow(cookie, bucket);
		return;
	}
	if (!swap(found.cookie, cookie, cookie | COOKIE_BUSY))
		return;
	count_closed(found.record);
	barrier();
	*(volatile __u64 *)found.cookie = 0;
	if (found.cookie != &bucket->first.cookie)
		__sync_fetch_and_add(&bucket->others, -1);
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

	if (!enter_overflow(netns)) {
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
	__sync_fetch_and_add(&bucket->others, IN_OVERFLOW);
	count(COUNTER_OVERFLOWED);
}

#endif
