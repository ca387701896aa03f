/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Fragments, of which only the first has ports. `fragments` says what they are for the later ones. A
 * later one that comes before its first is kept by TC: its bytes in `held_frames`, for a program can't
 * queue an skb. The first one, when it comes, is given back to its device with the others behind it.
 */
#ifndef POINTSMAN_FRAGMENT_H
#define POINTSMAN_FRAGMENT_H

/* Seconds; then its ID may stand for another datagram. What is held costs nobody anything if it does. */
#define MAX_FRAGMENT_AGE 30
#define MAX_PORTS_AGE 5
#define HELD_FRAMES 512 /* of all datagrams; the oldest makes room */
#define HELD_BYTES 9216 /* of one IP packet: as a jumbo frame may have */
#define MAX_HELD 48 /* of one datagram: 64 KiB in frames of 1,500 */
#define HOLD_ATTEMPTS 4 /* against other CPUs that keep of the same datagram */

/*
 * A frame's turn is its number in the order of keeping, and its place is turn % HELD_FRAMES. Those of one
 * datagram are a list: held_fragments has a link to the latest, each frame one to that before it.
 */
#define HELD_COUNT ((1 << HELD_COUNT_BITS) - 1)
#define HELD_TAKEN (1ULL << 63) /* in turn: it is being given back */

struct held_frame {
	__u64 turn; /* 0 = being written */
	__u64 before; /* a link */
	__u64 seen; /* CLOCK_MONOTONIC, ns */
	struct fragment_key key;
	__u32 length;
	__u32 pad;
	__u8 packet[HELD_BYTES]; /* from the IP header on */
};

/* Nobody's but these programs': what they hold for a moment passes to no other generation. */
BPF_ARRAY(held_frames, struct held_frame, HELD_FRAMES);
BPF_ARRAY(held_turns, __u64, 1);

static __always_inline void name_datagram(const struct packet *p, struct fragment_key *key)
{
	copy_address(key->source, p->tuple.source);
	copy_address(key->destination, p->tuple.destination);
	key->id = p->fragment_id;
	key->proto = p->tuple.proto;
}

/* What the ports of the first fragment are. */
static __always_inline void note_ports(const struct packet *p, struct fragment_key *key, __u64 now)
{
	struct fragment noted = {
		.source_port = p->tuple.source_port,
		.destination_port = p->tuple.destination_port,
		.seen = now,
	};

	name_datagram(p, key);
	fragments.update(key, &noted);
}

/* NULL if the first fragment has not come. */
static __always_inline struct fragment *known_ports(struct fragment_key *key, __u64 now)
{
	struct fragment *known = fragments.lookup(key);

	/* Signed, as everywhere: what another CPU notes may be later than this one's now. */
	return known && (__s64)(now - known->seen) <= (__s64)SECONDS(MAX_PORTS_AGE) ? known : NULL;
}

/* The ports of a later fragment; false if its first has not come. */
static __always_inline bool recall_ports(struct packet *p, struct fragment_key *key, __u64 now)
{
	struct fragment *known;

	name_datagram(p, key);
	known = known_ports(key, now);
	if (!known)
		return false;
	p->tuple.source_port = known->source_port;
	p->tuple.destination_port = known->destination_port;
	return true;
}

/*
 * The endpoints whose answers TC egress translates, those of UDP only. Nothing else tells there of a
 * later fragment whether it is of an answer: to keep it if it is not, and its first takes another way,
 * would be to lose it.
 */
struct address {
	__be32 addr[4];
};

BPF_TABLE("lru_hash", struct address, __u64, answering, 4096);

static __always_inline void note_answers(struct flow *flow, __u64 now)
{
	struct address *endpoint = (void *)flow->other.source;

	if (flow->other.proto == IPPROTO_UDP && !(flow->flags & (FLOW_REMOTE | FLOW_DSR)) &&
	    !answering.lookup(endpoint))
		answering.update(endpoint, &now);
}

static __always_inline bool answers(struct packet *p)
{
	return p->tuple.proto == IPPROTO_UDP && answering.lookup((void *)p->tuple.source);
}

static __always_inline bool same_datagram(const struct fragment_key *a, const struct fragment_key *b)
{
	return same_address(a->source, b->source) && same_address(a->destination, b->destination) &&
	       a->id == b->id && a->proto == b->proto;
}

/* The frame that a link leads to, also if it has been taken, for the list goes on behind it; NULL if
 * another has its place, or if it is too old. */
static __always_inline struct held_frame *held_frame_of(__u64 link, const struct fragment_key *key,
							__u64 now)
{
	__u32 place = (link >> HELD_COUNT_BITS) % HELD_FRAMES;
	struct held_frame *frame;

	if (!link)
		return NULL;
	frame = held_frames.lookup(&place);
	if (!frame || (frame->turn & ~HELD_TAKEN) != link >> HELD_COUNT_BITS ||
	    !same_datagram(&frame->key, key) ||
	    (__s64)(now - frame->seen) > (__s64)SECONDS(MAX_FRAGMENT_AGE))
		return NULL;
	return frame;
}

/* Whether anything is held of the datagram. */
static __always_inline bool is_held(struct fragment_key *key)
{
	__u64 *last = held_fragments.lookup(key);

	return last && *last;
}

/* Asked where the length is used, in two comparisons that the compiler may not make one of: of that one
 * the verifier before Linux 6.10 learns nothing. */
#define is_holdable(length) \
	({ \
		bool fits; \
		asm volatile("" : "+r"(length)); \
		fits = (__s64)(length) > 0; \
		if (fits) { \
			asm volatile("" : "+r"(length)); \
			fits = (length) <= HELD_BYTES; \
		} \
		fits; \
	})

/* Keeps a later fragment. False if it can't be, or need not, because the first came meanwhile. */
static __always_inline bool hold(struct __sk_buff *ctx, __u32 l3, __u64 length,
				 struct fragment_key *key, __u64 now)
{
	__u64 none = 0, link, before, next, turn, *last, *turns;
	__u32 zero = 0, place;
	struct held_frame *frame;

	last = held_fragments.lookup(key);
	if (!last) {
		held_fragments.insert(key, &none);
		last = held_fragments.lookup(key);
	}
	turns = held_turns.lookup(&zero);
	if (!last || !turns || !is_holdable(length))
		return false;
	turn = __sync_fetch_and_add(turns, 1) + 1;
	place = turn % HELD_FRAMES;
	frame = held_frames.lookup(&place);
	if (!frame)
		return false;
	frame->turn = 0;
	frame->seen = now;
	frame->key = *key;
	frame->length = length;
	if (!is_holdable(length) || bpf_skb_load_bytes(ctx, l3, frame->packet, length))
		return false;
	frame->turn = turn;
	for (int i = 0; i < HOLD_ATTEMPTS; i++) {
		link = *last;
		before = held_frame_of(link, key, now) ? link : 0;
		if ((before & HELD_COUNT) >= MAX_HELD)
			break;
		frame->before = before;
		next = turn << HELD_COUNT_BITS | ((before & HELD_COUNT) + 1);
		if (__sync_val_compare_and_swap(last, link, next) != link)
			continue;
		if (!known_ports(key, now))
			return true;
		break;
	}
	/* Too many, or the first came and may not have seen this one. Who changes the turn has it. */
	return __sync_val_compare_and_swap(&frame->turn, turn, turn | HELD_TAKEN) != turn;
}

/*
 * The packet goes back to its device, then, in its place, each fragment that was held of its datagram.
 * Their ports have been noted, so this time they all pass. They can't go round more than once: what
 * was taken out is held no more. On egress the program runs for each of them inside of this run, which
 * has nothing in `scratch` but `key`: and that is theirs, too.
 */
static __always_inline void release(struct __sk_buff *ctx, __u32 l3, struct fragment_key *key,
				    const bool ingress, __u64 now)
{
	__u64 *last = held_fragments.lookup(key), link, turn, length;
	__u64 way = ingress ? BPF_F_INGRESS : 0;
	__u32 ifindex = ctx->ifindex;
	struct device *device = devices.lookup(&ifindex);
	struct held_frame *frame;

	if (!last)
		return;
	link = __sync_lock_test_and_set(last, 0);
	/* Coming again it is judged by the device's own MAC; the port of a bridge may have been sent another's. */
	if (ingress && l3 >= sizeof(struct ethhdr) && device && has_mac(device))
		bpf_skb_store_bytes(ctx, 0, device->mac, ETH_ALEN, 0);
	bpf_clone_redirect(ctx, ctx->ifindex, way);
	for (int i = 0; i < MAX_HELD; i++) {
		frame = held_frame_of(link, key, now);
		if (!frame)
			break;
		turn = link >> HELD_COUNT_BITS;
		link = frame->before;
		length = frame->length;
		if (__sync_val_compare_and_swap(&frame->turn, turn, turn | HELD_TAKEN) != turn)
			continue;
		if (!is_holdable(length) || bpf_skb_change_tail(ctx, l3 + length, 0) ||
		    bpf_skb_store_bytes(ctx, l3, frame->packet, length, BPF_F_RECOMPUTE_CSUM))
			continue;
		if (frame->turn == (turn | HELD_TAKEN))
			bpf_clone_redirect(ctx, ctx->ifindex, way);
	}
}

#endif
