/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Where a packet leaves the node. XDP sends what it can; TC does it where a neighbour is to be found. */
#ifndef POINTSMAN_ROUTE_H
#define POINTSMAN_ROUTE_H

#define AF_INET 2
#ifndef AF_INET6
#define AF_INET6 10
#endif

/* As bcc declares it an argument is missing. */
static long (*redirect_neigh)(__u32 ifindex, void *way, int size, __u64 flags) =
	(void *)BPF_FUNC_redirect_neigh;

/* The kernel finds the neighbour. It drops what came in without a frame, so that gets room for one. */
static __always_inline int send_by_kernel(struct __sk_buff *ctx, __u32 ifindex, bool raw)
{
	if (raw && bpf_skb_change_head(ctx, sizeof(struct ethhdr), 0))
		return TC_ACT_SHOT;
	return redirect_neigh(ifindex, NULL, 0, 0);
}

#define TUNNEL_V4 ((__u32)sizeof(struct iphdr))
#define TUNNEL_V6 ((__u32)sizeof(struct ipv6hdr))

/* BPF_FIB_LKUP_RET_…, or negative. `length` of the IP packet; 0: whatever fits the device. */
static __always_inline long find_way(void *ctx, __u32 ifindex, const struct tuple *to, bool ipv4,
				     __u32 length, struct bpf_fib_lookup *way)
{
	__builtin_memset(way, 0, sizeof(*way));
	way->family = ipv4 ? AF_INET : AF_INET6;
	way->l4_protocol = to->proto;
	way->sport = to->source_port;
	way->dport = to->destination_port;
	way->tot_len = length;
	way->ifindex = ifindex;
	if (ipv4) {
		way->ipv4_src = to->source[3];
		way->ipv4_dst = to->destination[3];
	} else {
		copy_address(way->ipv6_src, to->source);
		copy_address(way->ipv6_dst, to->destination);
	}
	return bpf_fib_lookup(ctx, way, sizeof(*way), 0);
}

/* Whether XDP can send to that device what came in with this tag. */
static __always_inline bool can_send(struct xdp_md *ctx, const struct packet *p, __u32 ifindex,
				     const struct device *out)
{
	__u32 lower;

	if (!out || !!out->vlan != !!p->vlan)
		return false;
	lower = out->lower ? out->lower : ifindex;
	return lower == ctx->ingress_ifindex || out->flags & DEVICE_XDP;
}

#define WAY_LIFE NSEC_PER_SEC

static __always_inline void note_way(struct xdp_md *ctx, struct way *way, const struct bpf_fib_lookup *found,
				     const struct device *out, __u64 now)
{
	way->until = now + WAY_LIFE;
	way->from = ctx->ingress_ifindex;
	way->lower = out->lower ? out->lower : found->ifindex;
	way->vlan = out->vlan;
	way->mtu = found->mtu_result;
	__builtin_memcpy(way->macs, found->dmac, ETH_ALEN);
	__builtin_memcpy(way->macs + ETH_ALEN, found->smac, ETH_ALEN);
}

/* Nobody may read it half written: `until` goes first and comes last. */
static __always_inline void keep_way(struct way *at, const struct way *way)
{
	*(volatile __u64 *)&at->until = 0;
	at->from = way->from;
	at->lower = way->lower;
	at->vlan = way->vlan;
	at->mtu = way->mtu;
	__builtin_memcpy(at->macs, way->macs, sizeof(at->macs));
	*(volatile __u64 *)&at->until = way->until;
}

static __always_inline long send_frame(struct xdp_md *ctx, const struct way *way)
{
	struct headers h = headers_of(ctx, true);
	struct ethhdr *eth = h.data;
	struct vlan_header *vlan = (void *)(eth + 1);

	if ((void *)(vlan + 1) > h.end)
		return XDP_DROP;
	__builtin_memcpy(eth, way->macs, sizeof(way->macs));
	if (way->vlan)
		vlan->tag = (vlan->tag & ~VLAN_ID) | bpf_htons(way->vlan);
	return way->lower == ctx->ingress_ifindex ? XDP_TX : bpf_redirect(way->lower, 0);
}

/* An outer header in front of the packet, for the node of an endpoint. Lengths do not count it. */
static __always_inline void outer_v4(struct iphdr *ip, const __be32 *from, const __be32 *to,
				     __u32 length, __u8 proto, __be16 flags)
{
	__u64 sum = 0;

	ip->version = 4;
	ip->ihl = 5;
	ip->tos = 0;
	length += sizeof(*ip);
	ip->tot_len = bpf_htons((__u16)(length > 65535 ? 0 : length)); /* 0: BIG TCP */
	ip->id = 0;
	ip->frag_off = flags;
	ip->ttl = 64;
	ip->protocol = proto;
	ip->check = 0;
	ip->saddr = from[3];
	ip->daddr = to[3];
#pragma unroll
	for (int i = 0; i < 10; i++)
		sum += ((__u16 *)ip)[i];
	ip->check = ~fold_sum(sum);
}

static __always_inline void outer_v6(struct ipv6hdr *ip, const __be32 *from, const __be32 *to,
				     __u32 length, __u8 proto)
{
	*(__be32 *)ip = bpf_htonl(6 << 28);
	ip->payload_len = bpf_htons((__u16)(length > 65535 ? 0 : length));
	ip->nexthdr = proto;
	ip->hop_limit = 64;
	copy_address((__be32 *)&ip->saddr, from);
	copy_address((__be32 *)&ip->daddr, to);
}

/* The Ethernet header, tag included, when what is in front of IP grows or shrinks. */
struct link_header {
	struct ethhdr eth;
	struct vlan_header vlan;
};

static __always_inline bool take_link(struct xdp_md *ctx, struct link_header *link)
{
	struct headers h = headers_of(ctx, true);

	if (h.data + sizeof(*link) > h.end)
		return false;
	__builtin_memcpy(link, h.data, sizeof(*link));
	return true;
}

static __always_inline bool put_link(struct xdp_md *ctx, const struct link_header *link, bool tagged)
{
	struct headers h = headers_of(ctx, true);

	if (h.data + sizeof(*link) > h.end)
		return false;
	if (tagged)
		__builtin_memcpy(h.data, link, sizeof(*link));
	else
		__builtin_memcpy(h.data, &link->eth, sizeof(link->eth));
	return true;
}

#endif
