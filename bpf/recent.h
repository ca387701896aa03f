/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * What XDP did with a flow's last packet, in one line of memory: the next ones, for as long as the way
 * out is known (WAY_LIFE), need nothing else. Of 50,000 flows each lookup in a hash waits for memory
 * several times. Only for plain packets, IPv4 without a tag, whole, no SYN, FIN or RST, that leave where
 * they came in.
 *
 * An array without locks. Whoever needs a place takes it, and a line that is read while another CPU
 * writes it is told by its check. Who makes a flow forgets what was under its tuples before; who
 * remembers looks whether it is still the flow that is found.
 */
#ifndef POINTSMAN_RECENT_H
#define POINTSMAN_RECENT_H

static __always_inline bool is_plain(const struct packet *p)
{
	return p->ipv4 && !p->vlan && p->fragment == WHOLE && p->ttl > 1 &&
	       !(p->tuple.proto == IPPROTO_TCP && p->tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST));
}

static __always_inline __u32 recent_index(const struct tuple *tuple)
{
	__u64 x = mix((__u64)tuple->source[3] << 32 | tuple->destination[3]);

	x = mix(x ^ ((__u64)tuple->source_port << 32 | (__u32)tuple->destination_port << 16 | tuple->proto));
	return x & (MAX_RECENT - 1);
}

/* Of all but itself, and of the MAC that the frame was sent to, which is the device's. */
static __always_inline __u32 recent_check(const struct recent *line, const struct ethhdr *eth)
{
	const __u64 *word = (const __u64 *)line;
	__u64 sum = *(const __u32 *)eth->h_dest * 0x9e3779b97f4a7c15ULL +
		    *(const __u16 *)(eth->h_dest + 4) * 0xd6e8feb86659fd93ULL + line->until;

#pragma unroll
	for (int i = 0; i < 6; i++)
		sum = (sum + word[i]) * 0xff51afd7ed558ccdULL;
	sum = (sum + *(const __u32 *)&line->mtu) * 0xff51afd7ed558ccdULL;
	return sum >> 32;
}

static __always_inline bool is_recent(const struct xdp_md *ctx, const struct packet *p, __u64 now,
				      const struct recent *line)
{
	const struct tuple *tuple = &p->tuple;

	return line->source == tuple->source[3] && line->destination == tuple->destination[3] &&
	       line->source_port == tuple->source_port &&
	       line->destination_port == tuple->destination_port && line->proto == tuple->proto &&
	       line->device == ctx->ingress_ifindex && p->ip_length <= line->mtu &&
	       (__s64)(line->until - now) > 0;
}

/* What is known of this packet's flow, copied; false if nothing is, or if its endpoint has left. */
static __always_inline bool recall(struct xdp_md *ctx, const struct packet *p, __u64 now,
				   struct recent *copy)
{
	struct headers h = headers_of(ctx, true);
	__u32 index = recent_index(&p->tuple);
	struct recent *line = recent.lookup(&index);
	struct load *of;

	if (!line || h.data + sizeof(struct ethhdr) > h.end)
		return false;
	if (!is_recent(ctx, p, now, line)) {
		index ^= 1;
		line = recent.lookup(&index);
		if (!line || !is_recent(ctx, p, now, line))
			return false;
	}
	*copy = *line;
	if (!is_recent(ctx, p, now, copy) || copy->check != recent_check(copy, h.data))
		return false;
	if (!copy->generation)
		return true;
	index = copy->endpoint;
	of = load.lookup(&index);
	return of && of->generation == copy->generation;
}

/* In one of two places, if there is one whose line is over: others are not driven out, for where many
 * share a place none would be met again. The line, or NULL. */
static __always_inline struct recent *remember(struct xdp_md *ctx, const struct tuple *tuple,
				     const struct tuple *to, const struct flow *flow,
				     const struct way *way, __u32 verdict, __u64 now)
{
	struct headers h = headers_of(ctx, true);
	__u32 index = recent_index(tuple), second = index ^ 1;
	struct recent *place = recent.lookup(&index), *other = recent.lookup(&second);
	struct recent made = {
		.source = tuple->source[3],
		.destination = tuple->destination[3],
		.source_port = tuple->source_port,
		.destination_port = tuple->destination_port,
		.device = way->from,
		.new_source = to->source[3],
		.new_destination = to->destination[3],
		.new_source_port = to->source_port,
		.new_destination_port = to->destination_port,
		.endpoint = flow->endpoint,
		/* As in flow_of(). */
		.generation = flow->flags & FLOW_REPLY || tuple->proto == IPPROTO_TCP ? 0 : flow->generation,
		.mtu = way->mtu,
		.proto = tuple->proto,
		.verdict = verdict,
		.until = way->until,
	};

	if (!place || !other || h.data + sizeof(struct ethhdr) > h.end)
		return NULL;
	if ((__s64)(place->until - now) > 0)
		place = other;
	if ((__s64)(place->until - now) > 0)
		return NULL;
	__builtin_memcpy(made.macs, way->macs, sizeof(made.macs));
	made.check = recent_check(&made, h.data);
	*place = made;
	return place;
}

/* Both places: the line may be in either, and in both. After all that was written before, as every
 * atomic instruction that fetches. */
static __always_inline void forget(const struct tuple *tuple)
{
	__u32 index = recent_index(tuple), second = index ^ 1;
	struct recent *place = recent.lookup(&index), *other = recent.lookup(&second);

	if (place)
		__sync_lock_test_and_set(&place->until, 0);
	if (other)
		__sync_lock_test_and_set(&other->until, 0);
}

#endif
