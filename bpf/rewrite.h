/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * New addresses and ports in a packet, and the checksums that go with them (RFC 1624). XDP writes
 * into the frame. TC goes through the kernel's helpers, which know of checksums that a device is
 * still to compute.
 */
#ifndef POINTSMAN_REWRITE_H
#define POINTSMAN_REWRITE_H

#ifndef BPF_F_IPV6
#define BPF_F_IPV6 (1ULL << 7) /* of bpf_l4_csum_replace(), Linux 6.16 */
#endif

/* What is to be added to the complement of a checksum. */
static __always_inline __u64 add_change(__u64 sum, __u32 from, __u32 to)
{
	return sum + (__u32)~from + to;
}

static __always_inline __u64 address_change(__u64 sum, const __be32 *from, const __be32 *to)
{
#pragma unroll
	for (int i = 0; i < 4; i++)
		sum = add_change(sum, from[i], to[i]);
	return sum;
}

static __always_inline __u16 fold_sum(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

static __always_inline __u16 amend(__u16 check, __u64 change)
{
	return ~fold_sum((__u16)~check + change);
}

/* A UDP checksum of 0 means that there is none. */
static __always_inline __u16 amend_udp(__u16 check, __u64 change)
{
	__u16 sum = amend(check, change);

	return sum ? sum : 0xffff;
}

/* How the addresses change, for a pseudo-header, and the ports. */
struct change {
	__u64 addresses;
	__u64 ports;
};

static __always_inline __u32 ports_of(const struct tuple *tuple)
{
	/* In the order of the header, as memory has it. */
	return *(const __u32 *)&tuple->source_port;
}

static __always_inline struct change change_of(const struct tuple *from, const struct tuple *to)
{
	struct change change = {};

	change.addresses = address_change(0, from->source, to->source);
	change.addresses = address_change(change.addresses, from->destination, to->destination);
	change.ports = add_change(0, ports_of(from), ports_of(to));
	return change;
}

/* XDP: true if the frame was rewritten. `hop`: one off the TTL. */
static __always_inline bool rewrite_frame(struct xdp_md *ctx, const struct packet *p,
					  const struct tuple *to, bool hop)
{
	struct headers h = headers_of(ctx, true);
	struct change change = change_of(&p->tuple, to);
	void *l4;

	if (p->l3 > sizeof(struct ethhdr) + sizeof(struct vlan_header))
		return false;
	l4 = h.data + bound(p->l4, MASK_L4);
	/* Both headers must be there before either is written. */
	if (p->fragment != LATER_FRAGMENT) {
		if (p->tuple.proto == IPPROTO_TCP && l4 + sizeof(struct tcphdr) > h.end)
			return false;
		if (l4 + sizeof(struct udphdr) > h.end)
			return false;
	}
	if (p->ipv4) {
		struct iphdr *ip = h.data + bound(p->l3, MASK_L3);
		__u64 sum = change.addresses;

		if ((void *)(ip + 1) > h.end)
			return false;
		ip->saddr = to->source[3];
		ip->daddr = to->destination[3];
		if (hop) {
			__u16 *word = (__u16 *)&ip->ttl, before = *word;

			ip->ttl--;
			sum = add_change(sum, before, *word);
			/* Of 32 bits the upper half came in as 0xffff: add_change complements all of them. */
		}
		ip->check = amend(ip->check, sum);
	} else {
		struct ipv6hdr *ip = h.data + bound(p->l3, MASK_L3);

		if ((void *)(ip + 1) > h.end)
			return false;
		copy_address((__be32 *)&ip->saddr, to->source);
		copy_address((__be32 *)&ip->daddr, to->destination);
		if (hop)
			ip->hop_limit--;
	}
	if (p->fragment == LATER_FRAGMENT)
		return true;
	if (p->tuple.proto == IPPROTO_TCP) {
		struct tcphdr *tcp = l4;

		if ((void *)(tcp + 1) > h.end)
			return false;
		tcp->source = to->source_port;
		tcp->dest = to->destination_port;
		tcp->check = amend(tcp->check, change.addresses + change.ports);
	} else {
		struct udphdr *udp = l4;

		if ((void *)(udp + 1) > h.end)
			return false;
		udp->source = to->source_port;
		udp->dest = to->destination_port;
		if (udp->check)
			udp->check = amend_udp(udp->check, change.addresses + change.ports);
	}
	return true;
}

/* TC: the same. The helpers count what changes by itself, and know that a checksum may be to come. */
static __always_inline bool rewrite_skb(struct __sk_buff *ctx, const struct packet *p,
					const struct tuple *to, bool hop)
{
	struct change change = change_of(&p->tuple, to);
	__u32 addresses = fold_sum(change.addresses), ports = fold_sum(change.ports);
	__u64 flags = p->tuple.proto == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
	__u32 check = p->l4 + (p->tuple.proto == IPPROTO_TCP ? 16 : 6);

	if (p->ipv4) {
		__u32 at = p->l3;

		if (hop) {
			__be16 before = bpf_htons((__u16)p->ttl << 8 | p->tuple.proto);
			__be16 after = bpf_htons((__u16)(p->ttl - 1) << 8 | p->tuple.proto);

			if (bpf_l3_csum_replace(ctx, at + 10, before, after, 2) ||
			    bpf_skb_store_bytes(ctx, at + 8, &after, 2, 0))
				return false;
		}
		if (bpf_l3_csum_replace(ctx, at + 10, 0, addresses, 0) ||
		    bpf_skb_store_bytes(ctx, at + 12, (void *)&to->source[3], 4, 0) ||
		    bpf_skb_store_bytes(ctx, at + 16, (void *)&to->destination[3], 4, 0))
			return false;
	} else {
		/* The sum that a device made of the whole packet: no checksum here makes up for addresses. */
		__u64 whole = p->fragment == LATER_FRAGMENT ? BPF_F_RECOMPUTE_CSUM : 0;
		__u8 left = p->ttl - 1;

		if (hop && bpf_skb_store_bytes(ctx, p->l3 + 7, &left, 1, BPF_F_RECOMPUTE_CSUM))
			return false;
		if (bpf_skb_store_bytes(ctx, p->l3 + 8, (void *)to->source, 16, whole) ||
		    bpf_skb_store_bytes(ctx, p->l3 + 24, (void *)to->destination, 16, whole))
			return false;
	}
	if (p->fragment == LATER_FRAGMENT)
		return true;
	if (bpf_l4_csum_replace(ctx, check, 0, addresses,
				flags | BPF_F_PSEUDO_HDR | (p->ipv4 ? 0 : BPF_F_IPV6)) &&
	    bpf_l4_csum_replace(ctx, check, 0, addresses, flags | BPF_F_PSEUDO_HDR))
		return false;
	if (bpf_l4_csum_replace(ctx, check, 0, ports, flags))
		return false;
	return !bpf_skb_store_bytes(ctx, p->l4, (void *)&to->source_port, 4, 0);
}

static __always_inline bool rewrite(void *ctx, const bool xdp, const struct packet *p,
				    const struct tuple *to, bool hop)
{
	return xdp ? rewrite_frame(ctx, p, to, hop) : rewrite_skb(ctx, p, to, hop);
}

/* Bytes at any place, for the slow paths. True if they were there. */
static __always_inline bool get_bytes(void *ctx, const bool xdp, __u32 at, void *to, __u32 size)
{
	return !(xdp ? bpf_xdp_load_bytes(ctx, at, to, size) :
		       bpf_skb_load_bytes(ctx, at, to, size));
}

static __always_inline bool put_bytes(void *ctx, const bool xdp, __u32 at, void *from, __u32 size)
{
	return !(xdp ? bpf_xdp_store_bytes(ctx, at, from, size) :
		       bpf_skb_store_bytes(ctx, at, from, size, BPF_F_RECOMPUTE_CSUM));
}

#endif
