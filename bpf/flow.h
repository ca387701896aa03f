/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Flows: two entries each, one a direction, keyed by what arrives; the packets of one become the
 * mirror image of the other's key. A new flow is in flows_new, an LRU map, until both ends have
 * spoken: then it moves to flows, which no flood of new ones can empty.
 */
#ifndef POINTSMAN_FLOW_H
#define POINTSMAN_FLOW_H

#define PORT_ATTEMPTS 16
#define SECONDS(n) ((__u64)(n) * NSEC_PER_SEC)

static __always_inline struct packet_settings *get_packet_settings(void)
{
	__u32 zero = 0;

	return packet_settings.lookup(&zero);
}

static __always_inline bool same_tuple(const struct tuple *a, const struct tuple *b)
{
	return same_address(a->source, b->source) && same_address(a->destination, b->destination) &&
	       a->source_port == b->source_port && a->destination_port == b->destination_port &&
	       a->proto == b->proto;
}

static __always_inline void mirror(struct tuple *to, const struct tuple *from)
{
	copy_address(to->source, from->destination);
	copy_address(to->destination, from->source);
	to->source_port = from->destination_port;
	to->destination_port = from->source_port;
	to->proto = from->proto;
	to->pad = 0;
	to->reserved = 0;
}

/* The entry of exactly this key; *fresh says which map has it. */
static __always_inline struct flow *find_flow(struct tuple *key, bool *fresh)
{
	struct flow *flow = flows.lookup(key);

	*fresh = !flow;
	return flow ? flow : flows_new.lookup(key);
}

/* The same for what arrives. Most flows of UDP are a question and an answer, and end among the new. */
static __always_inline struct flow *find_flow_of(struct tuple *key, bool *fresh)
{
	struct flow *flow;

	if (key->proto == IPPROTO_TCP)
		return find_flow(key, fresh);
	flow = flows_new.lookup(key);
	*fresh = !!flow;
	return flow ? flow : flows.lookup(key);
}

static __always_inline void forget_flow(struct tuple *key, struct tuple *other)
{
	flows.delete(key);
	flows.delete(other);
	flows_new.delete(key);
	flows_new.delete(other);
}

/* Both ends have said FIN, or the endpoint RST; a client's proves nothing. `answers`: the other half's. */
static __always_inline bool has_ended(__u32 flags, __u32 answers)
{
	/* Without a branch, for the verifier goes through it for every port that is tried. */
	__u32 reply = -(flags & FLOW_REPLY);
	__u32 endpoint = (flags & reply) | (answers & ~reply);

	return (endpoint & FLOW_RST) / (FLOW_RST / FLOW_FIN) | (flags & answers & FLOW_FIN);
}

/* Who asks whether a flow is over. */
enum claim {
	OF_NOBODY, /* the sweep */
	OF_ITS_CLIENT, /* a new connection from the same port */
	OF_ANOTHER, /* who needs the flow's port of this node: there are few */
};

#define UNANSWERED 5 /* seconds until another may take the port of a flow that nobody answered */

/*
 * How long a flow with these two entries may be silent, ns. `back` may be NULL.
 *
 * Whoever knows a client's address and port can send an RST in its name. The endpoint ignores one whose
 * sequence number is not the right one, but that can't be told here. So it does not close the flow: it
 * cuts its patience down to that for what is not acknowledged, and any other packet of the client
 * takes it back, see touch().
 */
static __always_inline __u64 patience(const struct packet_settings *how, const struct flow *flow,
				      const struct flow *back, const enum claim claim)
{
	__u32 flags = flow->flags, answers = back ? back->flags : 0;
	/* With DSR no answer ever comes by here. */
	bool spoken = flags & (flags & FLOW_DSR ? flags : answers) & FLOW_ANSWERED;

	if (claim == OF_ANOTHER && !spoken)
		return SECONDS(UNANSWERED);
	if (flow->other.proto != IPPROTO_TCP)
		return SECONDS(spoken ? how->udp_open : how->udp_new);
	if (has_ended(flags, answers))
		return SECONDS(how->tcp_closing);
	if ((flags | answers) & FLOW_RST)
		return SECONDS(claim ? how->tcp_closing : how->tcp_new);
	return SECONDS(spoken ? how->tcp_open : how->tcp_new);
}

/* The other half; NULL if it is gone, or belongs to another flow by now. */
static __always_inline struct flow *mate_of(struct tuple *key, struct flow *flow)
{
	bool fresh;
	struct flow *back = find_flow(&flow->other, &fresh);

	return back && same_tuple(&back->other, key) ? back : NULL;
}

static __always_inline bool is_over(const struct packet_settings *how, struct tuple *key,
				    struct flow *flow, const enum claim claim, __u64 now)
{
	struct flow *back = mate_of(key, flow);
	__u64 seen = flow->seen;

	if (back && (__s64)(back->seen - seen) > 0)
		seen = back->seen;
	return (__s64)(now - seen) > (__s64)patience(how, flow, back, claim);
}

/* Another connection may take its place. One end that has said FIN still gets what the other sends. */
static __always_inline bool is_free(const struct packet_settings *how, struct tuple *key,
				    struct flow *flow, const enum claim claim, __u64 now)
{
	struct flow *back = mate_of(key, flow);
	__u32 answers = back ? back->flags : 0;

	if (has_ended(flow->flags, answers))
		return true;
	return is_over(how, key, flow, claim, now);
}

/* Whether the endpoint was in a set when it was last written. */
static __always_inline bool has_left(const struct flow *flow)
{
	__u32 endpoint = flow->endpoint;
	struct load *of;

	if (!flow->generation)
		return true; /* refused by the stack: there may be an endpoint now */
	of = load.lookup(&endpoint);
	return !of || of->generation != flow->generation;
}

/* Notes that a packet of this direction came by. Whether that was news. */
static __always_inline bool touch(struct flow *flow, __u8 tcp_flags, __u64 now)
{
	__u32 flags = flow->flags;
	bool news = false;

	if (flags & FLOW_REPLY || !(tcp_flags & TCP_SYN))
		flags |= FLOW_ANSWERED;
	if (tcp_flags & TCP_FIN)
		flags |= FLOW_FIN;
	/* Who sends on has not meant it, or somebody else has said it. */
	if (tcp_flags & TCP_RST)
		flags |= FLOW_RST;
	else
		flags &= ~FLOW_RST;
	/* Stores only where something changes: CPUs may share this cache line. Of two that store at once
	 * one may lose its bit, and the next packet brings it again; a FIN that is lost costs patience. */
	if (flags != flow->flags) {
		*(volatile __u32 *)&flow->flags = flags;
		news = true;
	}
	/* SYNs that are sent again, and their answers, keep no flow: else one that is never opened would
	 * hold its port for as long as somebody likes. */
	if (!(tcp_flags & TCP_SYN) && (__s64)(now - flow->seen) > (__s64)(NSEC_PER_SEC / 2)) {
		*(volatile __u64 *)&flow->seen = now;
		news = true;
	}
	return news;
}

/*
 * Once both ends have spoken. FLOW_PROMOTED, FLOW_UNPROMOTED, 0 if it is not yet time, or FLOW_MOVED if
 * it has to begin anew. `flow` is a copy of the entry of either direction, `back` room for one of the other.
 */
static __always_inline __u32 promote(struct tuple *key, struct flow *flow, struct flow *back)
{
	struct flow *other;

	if (!(flow->flags & FLOW_ANSWERED))
		return 0;
	/* Nobody can tell whether the endpoint answers, and the tables choose the same again. */
	if (flow->flags & FLOW_DSR)
		return 0;
	other = flows_new.lookup(&flow->other);
	if (!other || !same_tuple(&other->other, key)) {
		/* Another CPU was faster, or else the LRU map took one half: no answer would find its way back. */
		if (flow->flags & FLOW_REPLY || flows.lookup(key))
			return 0;
		flows_new.delete(key);
		return FLOW_MOVED;
	}
	if (!(other->flags & FLOW_ANSWERED))
		return 0;
	*back = *other;
	if (flows.insert(&flow->other, back))
		return FLOW_UNPROMOTED;
	if (flows.insert(key, flow)) {
		flows.delete(&flow->other);
		return FLOW_UNPROMOTED;
	}
	flows_new.delete(key);
	flows_new.delete(&flow->other);
	return FLOW_PROMOTED;
}

/*
 * Makes both entries. `flow` says all but flow->other, whose source is the endpoint, and whose
 * destination, the client as the endpoint sees it, has no port yet: the client's own, if it is free
 * towards this endpoint, or one of the node's range. `any`: the client's own need not be of that range.
 * 0, or DROP_….
 */
static __always_inline __u32 begin_flow(const struct packet_settings *how, struct tuple *key,
					struct flow *flow, struct flow *reply, bool any, __u64 now)
{
	__u32 first = how->first_port, many = how->last_port - how->first_port + 1;
	__u32 own = bpf_htons(key->source_port), random = bpf_get_prandom_u32();

	flow->seen = now;
	*reply = *flow;
	reply->flags |= FLOW_REPLY;
	reply->other = *key;
	if (how->last_port < how->first_port)
		many = 0;
	for (int i = 0; i < PORT_ATTEMPTS; i++) {
		struct flow *taken;
		__u32 port = own;
		bool fresh;
		long error;

		if (i || !(any || own - first < many)) {
			if (!many)
				continue;
			port = first + (random + i * 7919) % many;
		}
		flow->other.destination_port = bpf_htons((__u16)port);
		taken = find_flow(&flow->other, &fresh);
		if (taken) {
			struct tuple former = taken->other;

			if (!same_tuple(&former, key)) {
				if (!is_free(how, &flow->other, taken, OF_ANOTHER, now))
					continue;
				/* Its client's next packet must not come out as one of this flow; but the
				 * client may have another flow by now. */
				if (mate_of(&flow->other, taken)) {
					flows.delete(&former);
					flows_new.delete(&former);
				}
				forget(&former);
			}
			flows.delete(&flow->other);
			error = flows_new.update(&flow->other, reply);
		} else {
			error = flows_new.insert(&flow->other, reply);
			if (error == -EEXIST)
				continue;
		}
		if (error)
			return DROP_NO_ROOM;
		flows.delete(key);
		if (flows_new.update(key, flow)) {
			flows_new.delete(&flow->other);
			return DROP_NO_ROOM;
		}
		/* Only now: who remembers looks whether its entry is still the one that is found. */
		forget(key);
		forget(&flow->other);
		return 0;
	}
	return DROP_NO_PORT;
}

#endif
