/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Packets from outside the node, and of pods whose sockets the hooks can't see. XDP serves what comes
 * in at the node's devices; TC serves what XDP leaves, every device without XDP, and the way back from
 * endpoints of this node. One pipeline for all three:
 *
 *   parse → the flow that the packet is of, or a new one → rewrite → go on, or send
 *
 * What is not ours passes untouched, and XDP changes nothing before it knows that it can finish.
 */
#include <linux/bpf.h>
#include <linux/errno.h>
#include <linux/in.h>
#include <linux/pkt_cls.h>
#include "abi.h"
#include "maps.h"
#include "atomic.h"
#include "lookup.h"
#include "parse.h"
#include "recent.h"
#include "flow.h"
#include "fragment.h"
#include "select.h"
#include "rewrite.h"
#include "route.h"
#include "icmp.h"

#define GO_ON(xdp) ((xdp) ? XDP_PASS : TC_ACT_UNSPEC)
#define END(xdp) ((xdp) ? XDP_DROP : TC_ACT_SHOT)

/* What does not fit on the stack. Only release() lets a program run inside of another. */
struct scratch {
	struct packet packet;
	struct tuple key; /* of the flow that an error or a tunnel is about */
	struct tuple to; /* what the packet becomes */
	struct flow flow;
	struct flow reply;
	struct quote quote;
	struct bpf_fib_lookup way;
	struct event event;
	struct client client;
	struct fragment_key fragment_key;
	struct answer answer;
	struct way leaves;
	struct recent recent;
	__u64 fence;
};

BPF_PERCPU_ARRAY(scratch, struct scratch, 1);

/* One packet on its way through. */
struct pass {
	void *ctx;
	struct scratch *of;
	const struct packet_settings *how;
	__u64 now;
	__u32 ifindex; /* of the device that the packet belongs to, which may be a VLAN's */
	__u32 device; /* DEVICE_… */
	__u32 hook; /* enum hook */
};

static __always_inline void tell(const struct pass *pass, __u32 verdict, const struct tuple *after,
				 __u32 owner)
{
	__u64 *value = packet_counters.lookup(&verdict);
	struct event *event = &pass->of->event;

	if (value)
		*value += 1;
	if (pass->how->trace_until < pass->now)
		return;
	event->time = pass->now;
	event->before = pass->of->packet.tuple;
	event->after = *after;
	event->ifindex = pass->ifindex;
	event->length = pass->of->packet.length;
	event->owner = owner;
	event->verdict = verdict;
	event->hook = pass->hook;
	event->pad = 0;
	/* Below zero is lost. Without a branch, for the verifier's sake: element 0 is nobody's. */
	verdict = trace.ringbuf_output(event, sizeof(*event), 0) >> 31 & TRACE_LOST;
	value = packet_counters.lookup(&verdict);
	if (value)
		*value += 1;
}

/* Whether this hook is the one that deals with that direction of a flow. */
static __always_inline bool is_for_hook(const struct pass *pass, __u32 flags)
{
	if (!(flags & FLOW_POD) != !(pass->device & DEVICE_POD))
		return false;
	if (pass->hook == HOOK_TC_EGRESS)
		return (flags & (FLOW_REPLY | FLOW_REMOTE | FLOW_DSR)) == FLOW_REPLY;
	return !(flags & FLOW_REPLY) || flags & FLOW_REMOTE;
}

/* ---- sending ---- */

/* DSR: the whole packet goes on inside another, to the endpoint's node. */
static __always_inline int send_tunneled(struct pass *pass, const bool xdp, const struct device *out)
{
	struct scratch *of = pass->of;
	struct packet *p = &of->packet;
	__u32 header = p->ipv4 ? TUNNEL_V4 : TUNNEL_V6;
	__u32 ifindex = of->way.ifindex;
	__u8 proto = p->ipv4 ? IPPROTO_IPIP : IPPROTO_IPV6;
	const __be32 *from = p->ipv4 ? out->ipv4 : out->ipv6;
	struct headers h;
	void *outer;

	if (p->ipv4)
		outer_v4(&of->answer.outer.v4, from, of->to.destination, p->ip_length, proto,
			 p->dont_fragment ? IP_DONT_FRAGMENT : 0);
	else
		outer_v6(&of->answer.outer.v6, from, of->to.destination, p->ip_length, proto);
	if (!xdp) {
		/* The packets of a train stay as long as they are: datagrams have to, and all were measured. */
		__u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO |
			      (p->ipv4 ? BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 : BPF_F_ADJ_ROOM_ENCAP_L3_IPV6);

		if (!rewrite(pass->ctx, false, p, &p->tuple, true) ||
		    bpf_skb_adjust_room(pass->ctx, header, BPF_ADJ_ROOM_MAC, flags) ||
		    (p->ipv4 ? bpf_skb_store_bytes(pass->ctx, p->l3, &of->answer.outer.v4, TUNNEL_V4, 0) :
			       bpf_skb_store_bytes(pass->ctx, p->l3, &of->answer.outer.v6, TUNNEL_V6, 0)))
			return TC_ACT_SHOT;
		return send_by_kernel(pass->ctx, ifindex, pass->device & DEVICE_RAW);
	}
	if (!rewrite(pass->ctx, true, p, &p->tuple, true) || !take_link(pass->ctx, &of->answer.link) ||
	    bpf_xdp_adjust_head(pass->ctx, -(int)header) || !put_link(pass->ctx, &of->answer.link, is_tagged(p)))
		return XDP_DROP;
	h = headers_of(pass->ctx, true);
	outer = h.data + bound(p->l3, MASK_L3);
	if (outer + sizeof(struct ipv6hdr) > h.end)
		return XDP_DROP;
	if (p->ipv4)
		__builtin_memcpy(outer, &of->answer.outer.v4, sizeof(of->answer.outer.v4));
	else
		__builtin_memcpy(outer, &of->answer.outer.v6, sizeof(of->answer.outer.v6));
	return send_frame(pass->ctx, &of->leaves);
}

/*
 * Larger than the way can carry: the sender is told. Also where the packet has no DF: nothing here can make
 * fragments, and a sender that knows the MTU makes them itself.
 */
static __always_inline int too_big(struct pass *pass, const bool xdp, const bool error, __u32 mtu,
				   __u32 owner)
{
	struct scratch *of = pass->of;

	/* Nobody is told of an error about an error (RFC 1122, 3.2.2). */
	if (error || of->packet.fragment == LATER_FRAGMENT || !may_tell(pass->now)) {
		tell(pass, DROP_ICMP_LIMIT, &of->packet.tuple, owner);
		return END(xdp);
	}
	tell(pass, PACKET_TOO_BIG, &of->packet.tuple, owner);
	return tell_mtu(pass->ctx, xdp, &of->packet, mtu, &of->answer);
}

/*
 * Whether what was asked last still goes for this packet. Routes and neighbours are asked again every
 * second: they cost more than all else that a packet needs.
 */
static __always_inline bool is_known(const struct pass *pass, const struct way *way)
{
	const struct packet *p = &pass->of->packet;

	return (__s64)(way->until - pass->now) > 0 && p->ip_length <= way->mtu &&
	       way->from == ((struct xdp_md *)pass->ctx)->ingress_ifindex && way->vlan == p->vlan;
}

/*
 * Out of the node, as of->to: the client of a reply, or an endpoint on another node. `error`: the
 * packet is an ICMP error, of->quote says about what.
 */
static __always_inline int send(struct pass *pass, const bool xdp, struct flow *flow,
				const bool error)
{
	struct scratch *of = pass->of;
	struct packet *p = &of->packet;
	bool tunnel = !error && flow->flags & FLOW_DSR;
	__u32 overhead = tunnel ? (p->ipv4 ? TUNNEL_V4 : TUNNEL_V6) : 0;
	__u32 verdict = flow->flags & FLOW_REPLY ? PACKET_REPLIED : PACKET_FORWARDED;
	__u32 owner = flow->owner;
	struct device *out = NULL;
	struct recent *line;
	long result;
	bool fresh;

	/* The stack tells the sender. */
	if (p->ttl <= 1)
		return GO_ON(xdp);
	if (xdp)
		of->leaves = flow->way;
	if (!xdp || error || tunnel || !is_known(pass, &of->leaves)) {
		result = find_way(pass->ctx, pass->ifindex, &of->to, p->ipv4, sent_length(p) + overhead,
				  &of->way);
		if (result == BPF_FIB_LKUP_RET_FRAG_NEEDED)
			return too_big(pass, xdp, error, of->way.mtu_result - overhead, owner);
		if (result != BPF_FIB_LKUP_RET_SUCCESS && result != BPF_FIB_LKUP_RET_NO_NEIGH) {
			tell(pass, DROP_NO_ROUTE, &of->to, owner);
			return END(xdp);
		}
		out = devices.lookup(&of->way.ifindex);
		if (xdp) {
			if (result || !can_send(pass->ctx, p, of->way.ifindex, out)) {
				tell(pass, PACKET_SLOW, &of->to, owner);
				return XDP_PASS;
			}
			note_way(pass->ctx, &of->leaves, &of->way, out, pass->now);
			/* An error may have come in elsewhere than its flow does. */
			if (!error && !tunnel)
				keep_way(&flow->way, &of->leaves);
		}
	}
	if (tunnel) {
		if (!out || is_nothing(p->ipv4 ? out->ipv4 : out->ipv6)) {
			tell(pass, DROP_NO_ADDRESS, &of->to, owner);
			return END(xdp);
		}
		tell(pass, PACKET_TUNNELED, &of->to, owner);
		return send_tunneled(pass, xdp, out);
	}
	if (xdp && !error && is_plain(p) && flow->flags & FLOW_ANSWERED &&
	    of->leaves.lower == of->leaves.from) {
		line = remember(pass->ctx, &p->tuple, &of->to, flow, &of->leaves, verdict, pass->now);
		/* Another CPU may have begun a flow under this tuple, and forgotten, before that. */
		__sync_lock_test_and_set(&of->fence, 0);
		if (line && find_flow_of(&p->tuple, &fresh) != flow)
			line->until = 0;
	}
	if (!(error ? rewrite_error(pass->ctx, xdp, p, &of->quote, &flow->other, of->to.source,
				    of->to.destination, true) :
		      rewrite(pass->ctx, xdp, p, &of->to, true))) {
		tell(pass, DROP_MALFORMED, &of->to, owner);
		return END(xdp);
	}
	tell(pass, error ? PACKET_ERROR : verdict, &of->to, owner);
	if (xdp)
		return send_frame(pass->ctx, &of->leaves);
	return send_by_kernel(pass->ctx, of->way.ifindex, pass->device & DEVICE_RAW);
}

/* As the flow's last packet, if that was a moment ago. -1 if not. Who traces wants to know more. */
static __always_inline int send_again(struct pass *pass)
{
	struct scratch *of = pass->of;
	struct recent *as = &of->recent;
	struct way way = {};

	if (!is_plain(&of->packet) || pass->how->trace_until >= pass->now ||
	    !recall(pass->ctx, &of->packet, pass->now, as))
		return -1;
	v4_address(of->to.source, as->new_source);
	v4_address(of->to.destination, as->new_destination);
	of->to.source_port = as->new_source_port;
	of->to.destination_port = as->new_destination_port;
	of->to.proto = as->proto;
	if (!rewrite(pass->ctx, true, &of->packet, &of->to, true))
		return XDP_DROP;
	tell(pass, as->verdict, &of->to, 0);
	way.lower = as->device;
	__builtin_memcpy(way.macs, as->macs, sizeof(way.macs));
	return send_frame(pass->ctx, &way);
}

/* A pod that reached itself: back to where it came from, because no route leads there. */
static __always_inline int turn_back(struct pass *pass, const struct flow *flow)
{
	struct scratch *of = pass->of;
	__u8 mac[12], swapped[12];

	if (!rewrite(pass->ctx, false, &of->packet, &of->to, false))
		return TC_ACT_SHOT;
	tell(pass, PACKET_HERE, &of->to, flow->owner);
	if (!(pass->device & DEVICE_RAW)) {
		if (bpf_skb_load_bytes(pass->ctx, 0, mac, 12))
			return TC_ACT_SHOT;
		__builtin_memcpy(swapped, mac + 6, 6);
		__builtin_memcpy(swapped + 6, mac, 6);
		bpf_skb_store_bytes(pass->ctx, 0, swapped, 12, 0);
	}
	return bpf_redirect(pass->ifindex, 0);
}

/* ---- flows ---- */

/* A packet of a flow. */
static __always_inline int carry(struct pass *pass, const bool xdp, struct flow *flow)
{
	struct scratch *of = pass->of;
	__u32 flags = flow->flags;

	mirror(&of->to, &flow->other);
	if (!xdp && flags & FLOW_POD && flags & FLOW_REMOTE)
		return turn_back(pass, flow);
	if (flags & (FLOW_REMOTE | FLOW_DSR))
		return send(pass, xdp, flow, false);
	if (!rewrite(pass->ctx, xdp, &of->packet, &of->to, false)) {
		tell(pass, DROP_MALFORMED, &of->to, flow->owner);
		return END(xdp);
	}
	tell(pass, flags & FLOW_REPLY ? PACKET_REPLIED : PACKET_HERE, &of->to, flow->owner);
	return GO_ON(xdp);
}

/* The flow that a packet belongs to; NULL if there is none, or if it must be chosen anew. */
static __always_inline struct flow *flow_of(struct pass *pass)
{
	struct scratch *of = pass->of;
	struct packet *p = &of->packet;
	struct flow *flow;
	bool fresh, tcp = p->tuple.proto == IPPROTO_TCP;
	__u32 done;

	flow = find_flow_of(&p->tuple, &fresh);
	if (!flow || !is_for_hook(pass, flow->flags))
		return NULL;
	if (!(flow->flags & FLOW_REPLY)) {
		/* TCP connections end with their endpoint, datagrams go to another one. Tunnels end with DSR:
		 * at the other nodes nobody looks into them any more. */
		bool anew = tcp ? (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN &&
					  (has_left(flow) || is_free(pass->how, &p->tuple, flow, OF_ITS_CLIENT, pass->now)) :
				  has_left(flow);

		if (flow->flags & FLOW_DSR && !pass->how->dsr)
			anew = true;
		if (anew) {
			/* The other half may be another flow's by now. */
			of->to = mate_of(&p->tuple, flow) ? flow->other : p->tuple;
			forget_flow(&p->tuple, &of->to);
			tell(pass, FLOW_MOVED, &p->tuple, 0);
			return NULL;
		}
	}
	/* What comes behind it is to be noted again. */
	if (p->tcp_flags & (TCP_FIN | TCP_RST))
		forget(&p->tuple);
	/* Only then: a flow that nobody answers must not look for an answer with every packet. */
	if (touch(flow, p->tcp_flags, pass->now) && fresh) {
		of->flow = *flow;
		done = promote(&p->tuple, &of->flow, &of->reply);
		if (done)
			tell(pass, done, &p->tuple, of->flow.owner);
		if (done == FLOW_PROMOTED)
			return &of->flow;
		if (done == FLOW_MOVED)
			return NULL;
	}
	return flow;
}

/* Whether the endpoint is on another node, and if so by which of this node's addresses it is asked. */
static __always_inline __u32 place_of(struct pass *pass, const struct slot *slot,
				      const struct target *to, struct flow *flow)
{
	struct scratch *of = pass->of;
	struct packet *p = &of->packet;
	struct device *out;
	const __be32 *address;
	__u32 ifindex = pass->ifindex;
	bool led, dsr = pass->how->dsr && slot->flags & SLOT_ELSEWHERE;
	long result;

	if (to->service->packets & PACKETS_LOCAL || slot->flags & SLOT_HERE)
		return 0;
	copy_address(of->to.source, p->tuple.source);
	copy_address(of->to.destination, slot->addr);
	of->to.source_port = of->to.destination_port = 0;
	of->to.proto = p->tuple.proto;
	result = find_way(pass->ctx, pass->ifindex, &of->to, p->ipv4, 0, &of->way);
	out = devices.lookup(&of->way.ifindex);
	led = result == BPF_FIB_LKUP_RET_SUCCESS || result == BPF_FIB_LKUP_RET_NO_NEIGH ||
	      result == BPF_FIB_LKUP_RET_FRAG_NEEDED;
	if (led && out && out->flags & DEVICE_NODE)
		ifindex = of->way.ifindex;
	else if (!(slot->flags & SLOT_ELSEWHERE))
		return 0;
	out = devices.lookup(&ifindex);
	if (!out)
		return DROP_NO_ADDRESS;
	address = p->ipv4 ? out->ipv4 : out->ipv6;
	if (is_nothing(address))
		return DROP_NO_ADDRESS;
	flow->flags |= dsr ? FLOW_DSR : FLOW_REMOTE;
	if (!dsr)
		copy_address(flow->other.destination, address);
	return 0;
}

/* There is no endpoint, which the sender is told, or none for him, which he is not. */
static __always_inline int no_endpoint(struct pass *pass, const bool xdp, const struct target *to)
{
	struct scratch *of = pass->of;
	__u32 owner = to->service ? to->service->owner : 0;

	if (!to->refused && (__u32)to->set == EMPTY_UNREACHABLE) {
		tell(pass, DROP_NO_LOCAL_ENDPOINT, &of->packet.tuple, owner);
		return END(xdp);
	}
	if (of->packet.fragment == LATER_FRAGMENT) {
		tell(pass, DROP_FRAGMENT, &of->packet.tuple, owner);
		return END(xdp);
	}
	if (!may_tell(pass->now)) {
		tell(pass, DROP_ICMP_LIMIT, &of->packet.tuple, owner);
		return END(xdp);
	}
	tell(pass, PACKET_REFUSED, &of->packet.tuple, owner);
	return xdp ? refuse(pass->ctx, &of->packet, &of->answer) : TC_ACT_SHOT;
}

/*
 * TC can't build an answer out of a packet whose checksum is to come. So the packet goes to port 0 of
 * this node, where nobody can listen: the stack answers as it does for any closed port, and the
 * answer is translated as that of an endpoint.
 */
static __always_inline bool refuse_by_stack(struct pass *pass, const struct target *to)
{
	struct device *device = devices.lookup(&pass->ifindex);
	struct scratch *of = pass->of;
	const __be32 *address;

	if (!device || (!to->refused && (__u32)to->set == EMPTY_UNREACHABLE))
		return false;
	address = of->packet.ipv4 ? device->ipv4 : device->ipv6;
	if (is_nothing(address))
		return false;
	copy_address(of->flow.other.source, address);
	of->flow.other.source_port = 0;
	return true;
}

/* A packet that is of no flow. */
static __always_inline int begin(struct pass *pass, const bool xdp)
{
	struct scratch *of = pass->of;
	struct packet *p = &of->packet;
	bool outside = pass->device & DEVICE_NODE;
	struct target room = {}, *to = &room;
	struct flow *flow = &of->flow;
	struct slot *slot = NULL;
	bool refused = false;
	__u32 failed;

	if (!(outside ? find_outside(&p->tuple, SERVICE_NODE, to) : find_for_pod(&p->tuple, to)))
		return GO_ON(xdp);
	/*
	 * A connection that began elsewhere: before Pointsman, by kube-proxy, which still translates it; or
	 * by way of another node, under an address of that node's. The stack deals with it. Only in a
	 * tunnel does it go on, for the tables of all nodes are equal and the client's address stays.
	 */
	if (p->tuple.proto == IPPROTO_TCP && (p->tcp_flags & (TCP_SYN | TCP_ACK)) != TCP_SYN &&
	    !(outside && pass->how->dsr && to->set >> 32))
		return GO_ON(xdp);
	if (outside && !is_welcome(to, p->tuple.source)) {
		tell(pass, DROP_SOURCE_RANGE, &p->tuple, to->service->owner);
		return END(xdp);
	}
	__builtin_memset(flow, 0, sizeof(*flow));
	if (!(to->set >> 32)) {
		if (xdp || !refuse_by_stack(pass, to))
			return no_endpoint(pass, xdp, to);
		refused = true;
	} else {
		slot = choose_for_packet(to, &p->tuple, outside, pass->now, &of->client);
		if (!slot)
			return no_endpoint(pass, xdp, to);
	}
	flow->other.proto = p->tuple.proto;
	copy_address(flow->other.destination, p->tuple.source);
	flow->flags = outside ? 0 : FLOW_POD;
	if (to->service)
		flow->owner = to->service->owner;
	if (slot) {
		copy_address(flow->other.source, slot->addr);
		flow->other.source_port = slot->port;
		flow->endpoint = slot->endpoint;
		flow->generation = slot->generation;
		failed = outside ? place_of(pass, slot, to, flow) : 0;
		if (failed) {
			tell(pass, failed, &p->tuple, flow->owner);
			return END(xdp);
		}
		if (!outside && same_address(slot->addr, p->tuple.source)) {
			struct device *device = devices.lookup(&pass->ifindex);

			if (device)
				copy_address(flow->other.destination,
					     p->ipv4 ? device->ipv4 : device->ipv6);
			flow->flags |= FLOW_REMOTE;
			if (is_nothing(flow->other.destination)) {
				tell(pass, DROP_NO_ADDRESS, &p->tuple, flow->owner);
				return END(xdp);
			}
		}
	}
	if (p->tuple.proto == IPPROTO_TCP && (p->tcp_flags & (TCP_SYN | TCP_ACK)) != TCP_SYN &&
	    !(flow->flags & FLOW_DSR))
		return GO_ON(xdp);
	failed = begin_flow(pass->how, &p->tuple, flow, &of->reply, !(flow->flags & FLOW_REMOTE),
			    pass->now);
	if (failed) {
		tell(pass, failed, &p->tuple, flow->owner);
		return END(xdp);
	}
	if (!refused)
		note_answers(flow, pass->now);
	tell(pass, refused ? PACKET_REFUSED : FLOW_BEGUN, &p->tuple, flow->owner);
	return carry(pass, xdp, flow);
}

#define GOES_ON -2 /* neither TC nor XDP has such an answer */

/*
 * A fragment whose ports concern us: they are noted, or known by now, or it ends here. XDP leaves to TC
 * what is to be kept or given back. `l3`: where the packet begins, its tunnel included.
 */
static __always_inline int on_fragment(struct pass *pass, const bool xdp, __u32 l3)
{
	struct scratch *of = pass->of;
	struct packet *p = &of->packet;
	struct fragment_key *key = &of->fragment_key;

	if (p->fragment == FIRST_FRAGMENT) {
		/* hold() does the same the other way round: keeps a fragment, then looks for the ports. Of
		 * two CPUs one sees the other, if none looks before all see what it has written: a lock is
		 * no such barrier, and of BPF's instructions only atomic ones that fetch are. */
		note_ports(p, key, pass->now);
		__sync_lock_test_and_set(&of->fence, 0);
		if (!is_held(key))
			return GOES_ON;
		if (xdp)
			return XDP_PASS;
		tell(pass, FRAGMENT_RELEASED, &p->tuple, 0);
		release(pass->ctx, l3, key, pass->hook == HOOK_TC_INGRESS, pass->now);
		return TC_ACT_SHOT;
	}
	if (recall_ports(p, key, pass->now))
		return GOES_ON;
	if (xdp)
		return XDP_PASS;
	if (hold(pass->ctx, l3, p->l3 - l3 + p->ip_length, key, pass->now)) {
		tell(pass, FRAGMENT_HELD, &p->tuple, 0);
		return TC_ACT_SHOT;
	}
	if (recall_ports(p, key, pass->now))
		return GOES_ON;
	tell(pass, FRAGMENT_UNKNOWN, &p->tuple, 0);
	return TC_ACT_UNSPEC;
}

static __always_inline int on_transport(struct pass *pass, const bool xdp)
{
	struct scratch *of = pass->of;
	struct packet *p = &of->packet;
	bool leaves = pass->hook == HOOK_TC_EGRESS, concerned = false;
	struct flow *flow;
	int done;

	if (p->fragment) {
		concerned = leaves ? answers(p) : concerns_us(p->tuple.destination);
		if (concerned) {
			done = on_fragment(pass, xdp, p->l3);
			if (done != GOES_ON)
				return done;
		} else if (p->fragment == LATER_FRAGMENT &&
			   !recall_ports(p, &of->fragment_key, pass->now)) {
			return GO_ON(xdp);
		}
	}
	/* Also what concerns us no more: flows outlive their frontend, and a change of the ports. */
	flow = flow_of(pass);
	if (flow) {
		if (p->fragment == FIRST_FRAGMENT && !concerned)
			note_ports(p, &of->fragment_key, pass->now);
		return carry(pass, xdp, flow);
	}
	if (leaves || !concerns_us(p->tuple.destination))
		return GO_ON(xdp);
	return begin(pass, xdp);
}

/* An error about a packet that went out as the translation of another: its sender never sent it so. */
static __always_inline int on_icmp(struct pass *pass, const bool xdp)
{
	struct scratch *of = pass->of;
	struct packet *p = &of->packet;
	struct quote *q = &of->quote;
	const struct tuple *inner;
	struct flow *flow;
	bool fresh;

	if (!read_quote(pass->ctx, xdp, p, q) ||
	    !same_address(q->tuple.source, p->tuple.destination))
		return GO_ON(xdp);
	mirror(&of->key, &q->tuple);
	flow = find_flow(&of->key, &fresh);
	if (!flow || !is_for_hook(pass, flow->flags))
		return GO_ON(xdp);
	inner = &flow->other;
	of->to.proto = p->tuple.proto;
	of->to.source_port = of->to.destination_port = 0;
	copy_address(of->to.destination, inner->source);
	/* Who reported it keeps his name towards an endpoint of this node; the client knows only the VIP,
	 * and another node would take no packet of a stranger. */
	if (flow->flags & (FLOW_REPLY | FLOW_REMOTE))
		copy_address(of->to.source, inner->destination);
	else
		copy_address(of->to.source, p->tuple.source);
	if (flow->flags & FLOW_REMOTE && !(flow->flags & FLOW_POD))
		return send(pass, xdp, flow, true);
	if (!rewrite_error(pass->ctx, xdp, p, q, inner, of->to.source, of->to.destination, false)) {
		tell(pass, DROP_MALFORMED, &of->to, flow->owner);
		return END(xdp);
	}
	tell(pass, PACKET_ERROR, &of->to, flow->owner);
	return GO_ON(xdp);
}

/* DSR, at the endpoint's node: the tunnel leads to the endpoint, which answers the client itself. */
static __always_inline int on_tunnel(struct pass *pass, const bool xdp)
{
	struct scratch *of = pass->of;
	struct packet *p = &of->packet;
	struct target room = {}, *to = &room;
	__u32 shift = p->l4 - p->l3, id, failed;
	struct service *sender;
	struct flow *flow;
	struct slot *slot;
	enum kind kind;
	bool ipv4 = p->ipv4;
	int done;

	if (!pass->how->dsr || pass->hook == HOOK_TC_EGRESS || !(pass->device & DEVICE_NODE) ||
	    p->inner != (ipv4 ? IPPROTO_IPIP : IPPROTO_IPV6))
		return GO_ON(xdp);
	sender = find_wildcard(p->tuple.source, &id);
	if (!sender || !(sender->flags & (SERVICE_NODE | SERVICE_REMOTE_NODE)))
		return GO_ON(xdp);
	copy_address(of->key.destination, p->tuple.destination);
	if (p->l4 > MASK_L3)
		return GO_ON(xdp);
	p->l3 = p->l4;
	kind = ipv4 ? parse_ipv4(headers_of(pass->ctx, xdp), p) :
		      parse_ipv6(headers_of(pass->ctx, xdp), p);
	if (kind == OTHER || !is_sender(p->tuple.source) || !is_transport(p->tuple.proto))
		return GO_ON(xdp);
	if (p->fragment != LATER_FRAGMENT && parse_ports(headers_of(pass->ctx, xdp), p) == OTHER)
		return GO_ON(xdp);
	if (p->fragment) {
		done = on_fragment(pass, xdp, p->l3 - shift);
		if (done != GOES_ON)
			return done;
	}
	flow = flow_of(pass);
	if (!flow) {
		if (!find_outside(&p->tuple, SERVICE_NODE | SERVICE_REMOTE_NODE, to) ||
		    !(to->set >> 32))
			return GO_ON(xdp);
		if (!is_welcome(to, p->tuple.source)) {
			tell(pass, DROP_SOURCE_RANGE, &p->tuple, to->service->owner);
			return END(xdp);
		}
		slot = find_last(to->set, of->key.destination, bpf_htons(0xffff));
		if (!slot || !same_address(slot->addr, of->key.destination))
			return GO_ON(xdp);
		flow = &of->flow;
		__builtin_memset(flow, 0, sizeof(*flow));
		flow->other.proto = p->tuple.proto;
		copy_address(flow->other.source, slot->addr);
		copy_address(flow->other.destination, p->tuple.source);
		flow->other.source_port = slot->port;
		flow->owner = to->service->owner;
		flow->endpoint = slot->endpoint;
		flow->generation = slot->generation;
		failed = begin_flow(pass->how, &p->tuple, flow, &of->reply, true, pass->now);
		if (failed) {
			tell(pass, failed, &p->tuple, flow->owner);
			return END(xdp);
		}
		note_answers(flow, pass->now);
		tell(pass, FLOW_BEGUN, &p->tuple, flow->owner);
	} else if (flow->flags & (FLOW_REMOTE | FLOW_DSR | FLOW_REPLY)) {
		return GO_ON(xdp);
	}
	mirror(&of->to, &flow->other);
	if (xdp ? !take_link(pass->ctx, &of->answer.link) || bpf_xdp_adjust_head(pass->ctx, shift) :
		  bpf_skb_adjust_room(pass->ctx, -(int)shift, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO))
		return END(xdp);
	p->l3 -= shift;
	p->l4 -= shift;
	if ((xdp && !put_link(pass->ctx, &of->answer.link, is_tagged(p))) ||
	    !rewrite(pass->ctx, xdp, p, &of->to, false)) {
		tell(pass, DROP_MALFORMED, &of->to, flow->owner);
		return END(xdp);
	}
	tell(pass, PACKET_HERE, &of->to, flow->owner);
	return GO_ON(xdp);
}

/* XDP sees what is for other hosts, too, where a device is promiscuous: bridged, or tcpdump runs. */
static __always_inline bool is_sent_to(struct xdp_md *ctx, const struct device *device)
{
	struct headers h = headers_of(ctx, true);
	const __u16 *to = h.data, *own = (const __u16 *)device->mac;

	if (!has_mac(device))
		return true;
	return h.data + ETH_ALEN <= h.end && to[0] == own[0] && to[1] == own[1] && to[2] == own[2];
}

static __always_inline int process(struct pass *pass, const bool xdp)
{
	struct scratch *of = pass->of;
	struct packet *p = &of->packet;
	struct vlan_key tag = {};
	struct device *device;
	__u32 *ifindex;
	enum kind kind;

	__builtin_memset(p, 0, sizeof(*p));
	pass->how = get_packet_settings();
	if (!pass->how)
		return GO_ON(xdp);
	pass->now = bpf_ktime_get_coarse_ns();
	device = xdp ? NULL : devices.lookup(&pass->ifindex);
	kind = parse(pass->ctx, xdp, !xdp && device && device->flags & DEVICE_RAW, p);
	if (kind == OTHER)
		return GO_ON(xdp);
	if (xdp) {
		int done = kind == TRANSPORT ? send_again(pass) : -1;

		if (done >= 0)
			return done;
		/* A device that only carries VLANs of ours has no flag. */
		device = devices.lookup(&pass->ifindex);
	}
	if (p->vlan) {
		tag.lower = pass->ifindex;
		tag.vlan = p->vlan;
		ifindex = vlans.lookup(&tag);
		if (!ifindex)
			return GO_ON(xdp);
		pass->ifindex = *ifindex;
		device = devices.lookup(&pass->ifindex);
	}
	if (!device || (xdp && !is_sent_to(pass->ctx, device)))
		return GO_ON(xdp);
	if (pass->hook == HOOK_TC_INGRESS && ((struct __sk_buff *)pass->ctx)->pkt_type)
		return TC_ACT_UNSPEC; /* for another host, or for many */
	pass->device = device->flags;
	if (!(pass->device & (DEVICE_NODE | DEVICE_POD)))
		return GO_ON(xdp);
	if (kind == TRANSPORT)
		return on_transport(pass, xdp);
	if (kind == ICMP_MESSAGE)
		return on_icmp(pass, xdp);
	return on_tunnel(pass, xdp);
}

int xdp_ingress(struct xdp_md *ctx)
{
	struct pass pass = { .ctx = ctx, .ifindex = ctx->ingress_ifindex, .hook = HOOK_XDP };
	__u32 zero = 0;

	pass.of = scratch.lookup(&zero);
	return pass.of ? process(&pass, true) : XDP_PASS;
}

int tc_ingress(struct __sk_buff *ctx)
{
	struct pass pass = { .ctx = ctx, .ifindex = ctx->ifindex, .hook = HOOK_TC_INGRESS };
	__u32 zero = 0;

	pass.of = scratch.lookup(&zero);
	return pass.of ? process(&pass, false) : TC_ACT_UNSPEC;
}

int tc_egress(struct __sk_buff *ctx)
{
	struct pass pass = { .ctx = ctx, .ifindex = ctx->ifindex, .hook = HOOK_TC_EGRESS };
	__u32 zero = 0;

	pass.of = scratch.lookup(&zero);
	return pass.of ? process(&pass, false) : TC_ACT_UNSPEC;
}

/*
 * Run by the agent with BPF_PROG_TEST_RUN: of the keys in sweep_keys, as many as the packet says in its
 * first four bytes, deletes the flows that are over. Returns how many.
 */
int sweep(struct xdp_md *ctx)
{
	struct headers h = headers_of(ctx, true);
	__u64 now = bpf_ktime_get_coarse_ns();
	struct packet_settings *how = get_packet_settings();
	struct tuple *key, other;
	struct flow *flow;
	__u32 many, ended = 0;
	bool fresh;

	if (!how || h.data + sizeof(many) > h.end)
		return 0;
	many = *(__u32 *)h.data;
	for (__u32 i = 0; i < MAX_SWEEP; i++) {
		__u32 index = i;

		if (i >= many)
			break;
		key = sweep_keys.lookup(&index);
		if (!key)
			break;
		flow = find_flow(key, &fresh);
		if (!flow || !is_over(how, key, flow, OF_NOBODY, now))
			continue;
		ended++;
		/* With the first half that is met the other goes, too, if it is this one's. */
		other = mate_of(key, flow) ? flow->other : *key;
		forget_flow(key, &other);
	}
	return ended;
}
