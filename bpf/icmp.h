/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * ICMP: errors about translated packets, which quote what their receiver never sent, and errors of our
 * own, which quote the packet as it came. RFC 792, RFC 1191, RFC 4443.
 */
#ifndef POINTSMAN_ICMP_H
#define POINTSMAN_ICMP_H

/* linux/icmp.h needs the C library's headers. */
#define ICMP_DEST_UNREACH 3
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETERPROB 12
#define ICMP_PORT_UNREACH 3
#define ICMP_FRAG_NEEDED 4
#define ICMPV6_DEST_UNREACH 1
#define ICMPV6_PKT_TOOBIG 2
#define ICMPV6_PARAMPROB 4
#define ICMPV6_PORT_UNREACH 4

#define ICMP_HEADER 8
#define MAX_QUOTE 128
#define ICMP_PER_SECOND 200 /* of our own, on each CPU */

struct icmp_header {
	__u8 type;
	__u8 code;
	__be16 checksum;
	__be32 rest;
};

struct icmp_budget {
	__u64 since;
	__u64 sent;
};

BPF_PERCPU_ARRAY(icmp_budget, struct icmp_budget, 1);

static __always_inline bool may_tell(__u64 now)
{
	__u32 zero = 0;
	struct icmp_budget *budget = icmp_budget.lookup(&zero);

	if (!budget)
		return false;
	if ((__s64)(now - budget->since) > (__s64)NSEC_PER_SEC) {
		budget->since = now;
		budget->sent = 0;
	}
	return budget->sent++ < ICMP_PER_SECOND;
}

static __always_inline bool is_error(bool ipv4, __u8 type)
{
	if (ipv4)
		return type == ICMP_DEST_UNREACH || type == ICMP_TIME_EXCEEDED ||
		       type == ICMP_PARAMETERPROB;
	return type >= ICMPV6_DEST_UNREACH && type <= ICMPV6_PARAMPROB;
}

/* What an error says of the packet that it is about. Offsets from the beginning of the frame. */
struct quote {
	struct tuple tuple;
	__u32 l3;
	__u32 l4;
	__be16 ip_check;
	__be16 l4_check;
	__u32 l4_check_at; /* 0: there is none, or it was cut off */
};

/* True if the message is an error about a TCP or UDP packet. */
static __always_inline bool read_quote(void *ctx, const bool xdp, const struct packet *p,
				       struct quote *q)
{
	struct icmp_header icmp;
	__be32 ports;

	if (!get_bytes(ctx, xdp, p->l4, &icmp, sizeof(icmp)) || !is_error(p->ipv4, icmp.type))
		return false;
	q->l3 = p->l4 + ICMP_HEADER;
	if (p->ipv4) {
		struct iphdr ip;

		if (!get_bytes(ctx, xdp, q->l3, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl < 5 ||
		    ip.frag_off & IP_FRAGMENT_OFFSET)
			return false;
		q->l4 = q->l3 + ip.ihl * 4;
		q->ip_check = ip.check;
		q->tuple.proto = ip.protocol;
		v4_address(q->tuple.source, ip.saddr);
		v4_address(q->tuple.destination, ip.daddr);
	} else {
		struct ipv6hdr ip;

		if (!get_bytes(ctx, xdp, q->l3, &ip, sizeof(ip)) || ip.version != 6)
			return false;
		q->l4 = q->l3 + sizeof(ip);
		q->tuple.proto = ip.nexthdr;
		copy_address(q->tuple.source, (__be32 *)&ip.saddr);
		copy_address(q->tuple.destination, (__be32 *)&ip.daddr);
		if (ip.nexthdr == IPPROTO_FRAGMENT) {
			struct fragment_header piece;

			if (!get_bytes(ctx, xdp, q->l4, &piece, sizeof(piece)) ||
			    piece.offset & bpf_htons(0xfff8))
				return false;
			q->l4 += sizeof(piece);
			q->tuple.proto = piece.next;
		}
	}
	/* What is behind the end of the packet is no part of it. */
	if (!is_transport(q->tuple.proto) || q->l4 + 8 > p->l3 + p->ip_length ||
	    !get_bytes(ctx, xdp, q->l4, &ports, sizeof(ports)))
		return false;
	*(__be32 *)&q->tuple.source_port = ports;
	q->l4_check_at = q->l4 + (q->tuple.proto == IPPROTO_TCP ? 16 : 6);
	/* What is not there is not amended: it is beyond the 8 bytes that an error must quote. */
	if (q->l4_check_at + 2 > p->l3 + p->ip_length ||
	    !get_bytes(ctx, xdp, q->l4_check_at, &q->l4_check, 2) ||
	    (!q->l4_check && q->tuple.proto == IPPROTO_UDP))
		q->l4_check_at = 0;
	return true;
}

/*
 * The quoted packet becomes `inner`, the error goes from `source` to `destination`. Everything is read
 * before anything is written.
 */
static __always_inline bool rewrite_error(void *ctx, const bool xdp, const struct packet *p,
					  const struct quote *q, const struct tuple *inner,
					  const __be32 *source, const __be32 *destination, bool hop)
{
	struct change change = change_of(&q->tuple, inner);
	__u64 outer, sum = change.addresses + change.ports;
	__be16 check, ip_check = q->ip_check, l4_check = q->l4_check;
	__u32 at = p->l4 + 2;

	outer = address_change(0, p->tuple.source, source);
	outer = address_change(outer, p->tuple.destination, destination);
	if (!get_bytes(ctx, xdp, at, &check, 2))
		return false;
	if (p->ipv4) {
		ip_check = amend(ip_check, change.addresses);
		sum = add_change(sum, q->ip_check, ip_check);
	} else {
		sum += outer; /* its pseudo-header */
	}
	if (q->l4_check_at) {
		l4_check = amend(l4_check, change.addresses + change.ports);
		if (!l4_check && q->tuple.proto == IPPROTO_UDP)
			l4_check = 0xffff;
		sum = add_change(sum, q->l4_check, l4_check);
		if (!put_bytes(ctx, xdp, q->l4_check_at, &l4_check, 2))
			return false;
	}
	check = amend(check, sum);
	if (!put_bytes(ctx, xdp, at, &check, 2) ||
	    !put_bytes(ctx, xdp, q->l4, (void *)&inner->source_port, 4))
		return false;
	if (p->ipv4) {
		__be16 life = bpf_htons((__u16)p->ttl << 8 | IPPROTO_ICMP), before = life;

		if (!get_bytes(ctx, xdp, p->l3 + 10, &check, 2))
			return false;
		if (hop) {
			life = bpf_htons((__u16)(p->ttl - 1) << 8 | IPPROTO_ICMP);
			outer = add_change(outer, before, life);
		}
		check = amend(check, outer);
		return put_bytes(ctx, xdp, q->l3 + 10, &ip_check, 2) &&
		       put_bytes(ctx, xdp, q->l3 + 12, (void *)&inner->source[3], 4) &&
		       put_bytes(ctx, xdp, q->l3 + 16, (void *)&inner->destination[3], 4) &&
		       put_bytes(ctx, xdp, p->l3 + 8, &life, 2) &&
		       put_bytes(ctx, xdp, p->l3 + 10, &check, 2) &&
		       put_bytes(ctx, xdp, p->l3 + 12, (void *)&source[3], 4) &&
		       put_bytes(ctx, xdp, p->l3 + 16, (void *)&destination[3], 4);
	}
	if (hop) {
		__u8 left = p->ttl - 1;

		if (!put_bytes(ctx, xdp, p->l3 + 7, &left, 1))
			return false;
	}
	return put_bytes(ctx, xdp, q->l3 + 8, (void *)inner->source, 16) &&
	       put_bytes(ctx, xdp, q->l3 + 24, (void *)inner->destination, 16) &&
	       put_bytes(ctx, xdp, p->l3 + 8, (void *)source, 16) &&
	       put_bytes(ctx, xdp, p->l3 + 24, (void *)destination, 16);
}

/* How much of a packet an error quotes: its headers, and of TCP's 20 bytes. */
static __always_inline __u32 quote_of(const struct packet *p)
{
	return p->l4 - p->l3 + (p->tuple.proto == IPPROTO_TCP ? sizeof(struct tcphdr) : 8);
}

/* The sum over a pseudo-header of ICMPv6 between the ends of a packet. */
static __always_inline __u64 pseudo_header(const struct packet *p, __u32 length)
{
	__u64 sum = 0;

	if (p->ipv4)
		return 0;
#pragma unroll
	for (int i = 0; i < 4; i++)
		sum += (__u64)p->tuple.source[i] + p->tuple.destination[i];
	return sum + bpf_htons((__u16)length) + bpf_htons(IPPROTO_ICMPV6);
}

/* The same number, in a way that the compiler can't take back from the verifier. */
static __always_inline __u32 from_1_to_256(__u32 number)
{
	number -= 1;
	asm volatile("%0 &= 0xff" : "+r"(number));
	return number + 1;
}

/* The sum over `length` bytes, which are a multiple of 4 and at most MAX_QUOTE and an ICMP header. */
static __always_inline __u64 sum_of(void *ctx, const bool xdp, __u32 at, __u32 length, __be32 *room)
{
	length = from_1_to_256(length);
	if (xdp ? bpf_xdp_load_bytes(ctx, at, room, length) : bpf_skb_load_bytes(ctx, at, room, length))
		return 0;
	return (__u32)bpf_csum_diff(NULL, 0, room, length, 0);
}

static __always_inline void turn(struct ethhdr *eth)
{
	__u8 mac[ETH_ALEN];

	__builtin_memcpy(mac, eth->h_dest, ETH_ALEN);
	__builtin_memcpy(eth->h_dest, eth->h_source, ETH_ALEN);
	__builtin_memcpy(eth->h_source, mac, ETH_ALEN);
}

/* An error that is to be sent, and room for it. */
struct answer {
	struct icmp_header icmp;
	struct link_header link;
	union {
		struct iphdr v4;
		struct ipv6hdr v6;
	} outer;
	__be32 summed[64]; /* what a checksum goes over */
};

/*
 * Answers the sender of a packet with an error that quotes it, from the address that it was sent to.
 * XDP_TX, or XDP_DROP.
 */
static __always_inline int answer_frame(struct xdp_md *ctx, const struct packet *p,
					struct answer *answer)
{
	__u32 ip_header = p->ipv4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
	__u32 header = ip_header + ICMP_HEADER, quoted = quote_of(p);
	struct icmp_header *icmp;
	struct headers h;
	__u64 sum;
	void *ip;

	if (quoted > MAX_QUOTE || p->l3 + quoted > p->length || !take_link(ctx, &answer->link))
		return XDP_DROP;
	if (p->length > p->l3 + quoted &&
	    bpf_xdp_adjust_tail(ctx, (int)(p->l3 + quoted) - (int)p->length))
		return XDP_DROP;
	if (bpf_xdp_adjust_head(ctx, -(int)header))
		return XDP_DROP;
	turn(&answer->link.eth);
	if (!put_link(ctx, &answer->link, is_tagged(p)))
		return XDP_DROP;
	h = headers_of(ctx, true);
	ip = h.data + bound(p->l3, MASK_L3);
	if (ip + sizeof(struct ipv6hdr) + ICMP_HEADER > h.end)
		return XDP_DROP;
	if (p->ipv4)
		outer_v4(ip, p->tuple.destination, p->tuple.source, quoted + ICMP_HEADER, IPPROTO_ICMP, 0);
	else
		outer_v6(ip, p->tuple.destination, p->tuple.source, quoted + ICMP_HEADER,
			 IPPROTO_ICMPV6);
	icmp = ip + ip_header;
	*icmp = answer->icmp;
	sum = pseudo_header(p, quoted + ICMP_HEADER);
	sum += sum_of(ctx, true, p->l3 + ip_header, quoted + ICMP_HEADER, answer->summed);
	answer->icmp.checksum = ~fold_sum(sum);
	if (bpf_xdp_store_bytes(ctx, p->l3 + ip_header, &answer->icmp, ICMP_HEADER))
		return XDP_DROP;
	return XDP_TX;
}

/*
 * The same at TC, where the packet may be one of GRO's: its checksum is still to be computed, and would
 * be, in the quote. The kernel gives that up when the place where the sum begins is cut off, so all
 * the headers are cut off, and stored again.
 */
static __always_inline int answer_skb(struct __sk_buff *ctx, const struct packet *p,
				      struct answer *answer)
{
	__u32 ip_header = p->ipv4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
	__u32 header = ip_header + ICMP_HEADER, quoted = quote_of(p), cut = p->l4 + 2;
	__u64 sum = pseudo_header(p, quoted + ICMP_HEADER);
	struct ethhdr *eth = &answer->link.eth;
	__u32 *word = (__u32 *)&answer->icmp;

	if (quoted > MAX_QUOTE || p->l3 + quoted > p->length)
		return TC_ACT_SHOT;
	sum += sum_of(ctx, false, p->l3, quoted, answer->summed);
	sum += (__u64)word[0] + word[1];
	answer->icmp.checksum = ~fold_sum(sum);
	if (p->ipv4)
		outer_v4(&answer->outer.v4, p->tuple.destination, p->tuple.source,
			 quoted + ICMP_HEADER, IPPROTO_ICMP, 0);
	else
		outer_v6(&answer->outer.v6, p->tuple.destination, p->tuple.source,
			 quoted + ICMP_HEADER, IPPROTO_ICMPV6);
	if (bpf_skb_change_tail(ctx, p->l3 + header + quoted + cut, 0) ||
	    bpf_skb_adjust_room(ctx, -(int)cut, BPF_ADJ_ROOM_MAC, 0))
		return TC_ACT_SHOT;
	if (p->l3 >= sizeof(*eth)) {
		if (bpf_skb_load_bytes(ctx, 0, eth, sizeof(*eth)))
			return TC_ACT_SHOT;
		turn(eth);
		if (bpf_skb_store_bytes(ctx, 0, eth, sizeof(*eth), 0))
			return TC_ACT_SHOT;
	}
	if ((p->ipv4 ? bpf_skb_store_bytes(ctx, p->l3, &answer->outer.v4, sizeof(struct iphdr), 0) :
		       bpf_skb_store_bytes(ctx, p->l3, &answer->outer.v6, sizeof(struct ipv6hdr), 0)) ||
	    bpf_skb_store_bytes(ctx, p->l3 + ip_header, &answer->icmp, ICMP_HEADER, 0) ||
	    bpf_skb_store_bytes(ctx, p->l3 + header, answer->summed, from_1_to_256(quoted), 0))
		return TC_ACT_SHOT;
	return bpf_redirect(ctx->ifindex, 0);
}

static __always_inline int refuse(struct xdp_md *ctx, const struct packet *p, struct answer *answer)
{
	answer->icmp.type = p->ipv4 ? ICMP_DEST_UNREACH : ICMPV6_DEST_UNREACH;
	answer->icmp.code = p->ipv4 ? ICMP_PORT_UNREACH : ICMPV6_PORT_UNREACH;
	answer->icmp.checksum = 0;
	answer->icmp.rest = 0;
	return answer_frame(ctx, p, answer);
}

static __always_inline int tell_mtu(void *ctx, const bool xdp, const struct packet *p, __u32 mtu,
				    struct answer *answer)
{
	if (!p->ipv4 && mtu < 1280)
		mtu = 1280;
	answer->icmp.type = p->ipv4 ? ICMP_DEST_UNREACH : ICMPV6_PKT_TOOBIG;
	answer->icmp.code = p->ipv4 ? ICMP_FRAG_NEEDED : 0;
	answer->icmp.checksum = 0;
	answer->icmp.rest = bpf_htonl(mtu & 0xffff);
	return xdp ? answer_frame(ctx, p, answer) : answer_skb(ctx, p, answer);
}

#endif
