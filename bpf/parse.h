/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * From a frame to a tuple. What is not understood is OTHER and passes untouched: no header is ever
 * guessed at. Every function takes the context of XDP or of TC and says which by a constant, so that
 * the compiler keeps one of both.
 */
#ifndef POINTSMAN_PARSE_H
#define POINTSMAN_PARSE_H

#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>

#define MAX_EXTENSIONS 6 /* headers between an IPv6 header and its payload */
#define MAX_L4 192 /* where the payload of IP begins, at most */
/* Offsets that are kept in a map: for the verifier they could be anything. */
#define MASK_L3 127
#define MASK_L4 255
#define MAX_PULL 256 /* of a packet that TC has: this much is read directly */

/* An offset that is kept in a map. The compiler must not leave the mask out where it knows better: the verifier before Linux
 * 6.10 does not. */
static __always_inline __u64 bound(__u64 offset, const __u32 mask)
{
	asm volatile("" : "+r"(offset));
	return offset & mask;
}

#define ETHERTYPE_VLAN bpf_htons(0x8100)
#define ETHERTYPE_IPV4 bpf_htons(0x0800)
#define ETHERTYPE_IPV6 bpf_htons(0x86dd)
#define VLAN_ID bpf_htons(0x0fff)

#define IP_MORE_FRAGMENTS bpf_htons(0x2000)
#define IP_DONT_FRAGMENT bpf_htons(0x4000)
#define IP_FRAGMENT_OFFSET bpf_htons(0x1fff)

#define TCP_FIN 1
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_ACK 16

enum kind {
	OTHER,
	TRANSPORT, /* TCP or UDP, with ports unless it is a later fragment */
	ICMP_MESSAGE,
	TUNNEL, /* IP in IP */
};

enum fragment_state {
	WHOLE,
	FIRST_FRAGMENT,
	LATER_FRAGMENT,
};

#define ETH_ALEN 6

struct ethhdr {
	__u8 h_dest[ETH_ALEN];
	__u8 h_source[ETH_ALEN];
	__be16 h_proto;
} __attribute__((packed));

struct vlan_header {
	__be16 tag;
	__be16 ethertype;
};

struct fragment_header {
	__u8 next;
	__u8 reserved;
	__be16 offset;
	__be32 id;
};

struct extension_header {
	__u8 next;
	__u8 length;
	__u8 type;
	__u8 left; /* of a routing header: segments to come */
};

/* Offsets are from the beginning of the frame, in bytes. */
struct packet {
	struct tuple tuple;
	__u32 l3;
	__u32 l4;
	__u32 length; /* of the frame */
	__u32 ip_length; /* of the IP packet, as it says itself */
	__u32 segment; /* payload of each of several packets that TC has as one; 0: it is one packet */
	__u32 fragment_id;
	__u16 vlan; /* 0 = no tag */
	__u8 ipv4;
	__u8 fragment; /* enum fragment_state */
	__u8 ttl;
	__u8 tcp_flags;
	__u8 dont_fragment;
	__u8 inner; /* TUNNEL: IPPROTO_IPIP or IPPROTO_IPV6 */
	__u8 jumbo; /* IPv6, BIG TCP */
	__u8 l4_header; /* bytes of it, TCP's options counted */
};

struct headers {
	void *data;
	void *end;
};

static __always_inline struct headers headers_of(void *ctx, const bool xdp)
{
	struct headers h;

	if (xdp) {
		h.data = (void *)(long)((struct xdp_md *)ctx)->data;
		h.end = (void *)(long)((struct xdp_md *)ctx)->data_end;
	} else {
		h.data = (void *)(long)((struct __sk_buff *)ctx)->data;
		h.end = (void *)(long)((struct __sk_buff *)ctx)->data_end;
	}
	return h;
}

static __always_inline __u32 length_of(void *ctx, const bool xdp)
{
	struct xdp_md *frame = ctx;

	return xdp ? frame->data_end - frame->data : ((struct __sk_buff *)ctx)->len;
}

static __always_inline bool has_mac(const struct device *device)
{
	const __u16 *mac = (const __u16 *)device->mac;

	return mac[0] | mac[1] | mac[2];
}

static __always_inline void v4_address(__be32 *to, __be32 addr)
{
	to[0] = to[1] = 0;
	to[2] = V4_MAPPED;
	to[3] = addr;
}

static __always_inline bool is_nothing(const __be32 *addr)
{
	return !(addr[0] | addr[1] | addr[2] | addr[3]);
}

static __always_inline bool is_transport(__u8 proto)
{
	return proto == IPPROTO_TCP || proto == IPPROTO_UDP;
}

static __always_inline enum kind parse_ipv4(struct headers h, struct packet *p)
{
	struct iphdr *ip = h.data + bound(p->l3, MASK_L3);
	__u32 header;
	__be16 offset;

	if ((void *)(ip + 1) > h.end || ip->version != 4 || ip->ihl < 5)
		return OTHER;
	header = ip->ihl * 4;
	p->ip_length = bpf_htons(ip->tot_len);
	if (!p->ip_length && p->segment)
		p->ip_length = p->length - p->l3; /* BIG TCP: the field has no room for it */
	if (p->ip_length < header || p->l3 + p->ip_length > p->length)
		return OTHER;
	p->l4 = p->l3 + header;
	p->ttl = ip->ttl;
	p->tuple.proto = ip->protocol;
	v4_address(p->tuple.source, ip->saddr);
	v4_address(p->tuple.destination, ip->daddr);
	offset = ip->frag_off;
	p->dont_fragment = !!(offset & IP_DONT_FRAGMENT);
	if (offset & (IP_MORE_FRAGMENTS | IP_FRAGMENT_OFFSET)) {
		p->fragment = offset & IP_FRAGMENT_OFFSET ? LATER_FRAGMENT : FIRST_FRAGMENT;
		p->fragment_id = ip->id;
	}
	return TRANSPORT;
}

static __always_inline enum kind parse_ipv6(struct headers h, struct packet *p)
{
	struct ipv6hdr *ip = h.data + bound(p->l3, MASK_L3);
	__u32 at = bound(p->l3, MASK_L3) + sizeof(*ip);
	__u8 next;

	if ((void *)(ip + 1) > h.end || ip->version != 6)
		return OTHER;
	p->ip_length = bpf_htons(ip->payload_len) + sizeof(*ip);
	if (!ip->payload_len && p->segment) {
		p->ip_length = p->length - p->l3;
		p->jumbo = 1;
	}
	if (p->l3 + p->ip_length > p->length)
		return OTHER;
	p->ttl = ip->hop_limit;
	p->dont_fragment = 1;
	if (is_v4((__be32 *)&ip->saddr) || is_v4((__be32 *)&ip->daddr))
		return OTHER; /* it would be taken for IPv4 */
	copy_address(p->tuple.source, (__be32 *)&ip->saddr);
	copy_address(p->tuple.destination, (__be32 *)&ip->daddr);
	next = ip->nexthdr;
#pragma unroll
	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		struct extension_header *ext;

		/* Not AH: it signs the addresses, so who translates it breaks it. */
		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS &&
		    next != IPPROTO_FRAGMENT)
			break;
		if (at > MAX_L4)
			return OTHER;
		ext = h.data + at;
		if (next == IPPROTO_FRAGMENT) {
			struct fragment_header *piece = (void *)ext;

			if ((void *)(piece + 1) > h.end)
				return OTHER;
			if (piece->offset & bpf_htons(0xfff8))
				p->fragment = LATER_FRAGMENT;
			else if (piece->offset & bpf_htons(1))
				p->fragment = FIRST_FRAGMENT;
			p->fragment_id = piece->id;
			at += sizeof(*piece);
			next = piece->next;
			if (p->fragment == LATER_FRAGMENT)
				break;
			continue;
		}
		if ((void *)(ext + 1) > h.end)
			return OTHER;
		/* The address is not yet the destination. */
		if (next == IPPROTO_ROUTING && ext->left)
			return OTHER;
		at += (ext->length + 1) * 8;
		next = ext->next;
	}
	if (at > MAX_L4 || at > p->l3 + p->ip_length)
		return OTHER;
	p->l4 = at;
	p->tuple.proto = next;
	return TRANSPORT;
}

/* What no host has as its address can be nobody's client. */
static __always_inline bool is_sender(const __be32 *addr)
{
	__u32 first = bpf_htonl(addr[is_v4(addr) ? 3 : 0]) >> 24;

	if (is_v4(addr))
		return first && first != 127 && first < 224;
	return first != 255 && (addr[0] | addr[1] | addr[2] | (addr[3] & ~bpf_htonl(1)));
}

/* How long the IP packet is when it is sent; of several that are one here, the longest. */
static __always_inline __u32 sent_length(const struct packet *p)
{
	__u32 header = p->l4 - p->l3;

	if (!p->segment)
		return p->ip_length;
	/* The option that says how long a train is goes when it is taken apart. */
	if (p->jumbo)
		header = sizeof(struct ipv6hdr);
	header += p->l4_header + p->segment;
	return header < p->ip_length ? header : p->ip_length;
}

static __always_inline bool is_tagged(const struct packet *p)
{
	return p->l3 > sizeof(struct ethhdr);
}

/* The ports, which a frame must have whole with the rest of the header. */
static __always_inline enum kind parse_ports(struct headers h, struct packet *p)
{
	void *l4 = h.data + bound(p->l4, MASK_L4);
	__u32 left = p->l3 + p->ip_length - p->l4;

	if (p->tuple.proto == IPPROTO_TCP) {
		struct tcphdr *tcp = l4;

		if ((void *)(tcp + 1) > h.end || left < sizeof(*tcp) || tcp->doff < 5)
			return OTHER;
		p->tuple.source_port = tcp->source;
		p->tuple.destination_port = tcp->dest;
		p->tcp_flags = ((__u8 *)tcp)[13];
		p->l4_header = tcp->doff * 4;
	} else {
		struct udphdr *udp = l4;

		if ((void *)(udp + 1) > h.end || left < sizeof(*udp))
			return OTHER;
		p->tuple.source_port = udp->source;
		p->tuple.destination_port = udp->dest;
		p->l4_header = sizeof(*udp);
	}
	return TRANSPORT;
}

/* Where the IP header begins; the ethertype, or 0 for frames that are not for us. */
static __always_inline __be16 parse_link(void *ctx, const bool xdp, bool raw, struct packet *p)
{
	struct headers h = headers_of(ctx, xdp);
	struct ethhdr *eth = h.data;
	struct vlan_header *vlan;

	if (!xdp) {
		if (((struct __sk_buff *)ctx)->vlan_present)
			return 0;
		p->l3 = raw ? 0 : sizeof(*eth);
		return ((struct __sk_buff *)ctx)->protocol;
	}
	if ((void *)(eth + 1) > h.end || eth->h_dest[0] & 1)
		return 0;
	p->l3 = sizeof(*eth);
	if (eth->h_proto != ETHERTYPE_VLAN)
		return eth->h_proto;
	vlan = (void *)(eth + 1);
	if ((void *)(vlan + 1) > h.end)
		return 0;
	p->vlan = bpf_htons(vlan->tag & VLAN_ID);
	p->l3 += sizeof(*vlan);
	return vlan->ethertype;
}

/* What the headers say that can be read directly. OTHER also if they are not all there. */
static __always_inline enum kind parse_headers(void *ctx, const bool xdp, struct packet *p)
{
	struct headers h = headers_of(ctx, xdp);
	enum kind kind = p->ipv4 ? parse_ipv4(h, p) : parse_ipv6(h, p);

	if (kind == OTHER || !is_sender(p->tuple.source))
		return OTHER;
	if (p->tuple.proto == (p->ipv4 ? IPPROTO_ICMP : IPPROTO_ICMPV6))
		return p->fragment == LATER_FRAGMENT ? OTHER : ICMP_MESSAGE;
	if (p->tuple.proto == IPPROTO_IPIP || p->tuple.proto == IPPROTO_IPV6) {
		p->inner = p->tuple.proto;
		return p->fragment == WHOLE ? TUNNEL : OTHER;
	}
	if (!is_transport(p->tuple.proto))
		return OTHER;
	/* The ports of a later fragment are those of its first one. */
	return p->fragment == LATER_FRAGMENT ? TRANSPORT : parse_ports(h, p);
}

static __always_inline enum kind parse(void *ctx, const bool xdp, bool raw, struct packet *p)
{
	__be16 ethertype = parse_link(ctx, xdp, raw, p);
	struct headers h = headers_of(ctx, xdp);
	enum kind kind;

	if (ethertype != ETHERTYPE_IPV4 && ethertype != ETHERTYPE_IPV6)
		return OTHER;
	p->length = length_of(ctx, xdp);
	p->segment = xdp ? 0 : ((struct __sk_buff *)ctx)->gso_size;
	p->ipv4 = ethertype == ETHERTYPE_IPV4;
	kind = parse_headers(ctx, xdp, p);
	/* Nothing is pulled before something is missed: a train of GRO's most often begins with its headers.
	 * Of a tunnel those inside are needed, too. */
	if (xdp || kind == TRANSPORT || kind == ICMP_MESSAGE || h.end - h.data >= MAX_PULL ||
	    h.end - h.data >= p->length)
		return kind;
	if (bpf_skb_pull_data(ctx, p->length < MAX_PULL ? p->length : MAX_PULL))
		return OTHER;
	p->fragment = WHOLE;
	return parse_headers(ctx, xdp, p);
}

#endif
