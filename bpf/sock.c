/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * The socket hooks. A connect or send to a Service's address is given an endpoint's address once;
 * every packet then goes straight to the endpoint. The hooks own the verdict, the functions
 * above them only say what should happen.
 */
#include <linux/bpf.h>
#include <linux/errno.h>
#include <linux/in.h>
#include "abi.h"
#include "maps.h"
#include "atomic.h"
#include "lookup.h"
#include "outcome.h"
#include "choose.h"
#include "affinity.h"
#include "record.h"
#include "datagram.h"

#define PROCEED 1
#define REJECT 0

#ifndef AF_INET6
#define AF_INET6 10
#endif

#define V4_DESTINATION(ctx) \
	{ { 0, 0, V4_MAPPED, (ctx)->user_ip4 }, (__be16)(ctx)->user_port, (ctx)->protocol, 0 }
#define V6_DESTINATION(ctx) \
	{ { (ctx)->user_ip6[0], (ctx)->user_ip6[1], (ctx)->user_ip6[2], (ctx)->user_ip6[3] }, \
	  (__be16)(ctx)->user_port, (ctx)->protocol, 0 }

static __always_inline void write_v4(struct bpf_sock_addr *ctx, const struct frontend_key *to)
{
	ctx->user_ip4 = to->addr[3];
	ctx->user_port = to->port;
}

static __always_inline void write_v6(struct bpf_sock_addr *ctx, const struct frontend_key *to)
{
	ctx->user_ip6[0] = to->addr[0];
	ctx->user_ip6[1] = to->addr[1];
	ctx->user_ip6[2] = to->addr[2];
	ctx->user_ip6[3] = to->addr[3];
	ctx->user_port = to->port;
}

static __always_inline void translate(struct frontend_key *to, const __be32 *addr, __be16 port)
{
	copy_address(to->addr, addr);
	to->port = port;
}

/* Without the helper (before Linux 5.18) all that is refused is EPERM to the caller. */
static __always_inline int verdict(int error)
{
	if (error >= 0)
		return PROCEED;
#ifdef HAVE_SET_RETVAL
	bpf_set_retval(error);
#endif
	return REJECT;
}

#ifdef HAVE_MPTCP
/*
 * The program sees a subflow connect, getpeername is asked of the MPTCP socket: the socket's
 * address in the kernel is what both can name. It is forgotten when the socket is released, because
 * the kernel uses addresses again.
 */
static __always_inline void record_mptcp(struct bpf_sock_addr *ctx, const struct frontend_key *vip,
					 const struct slot *slot)
{
	struct mptcp_sock *msk;
	struct socket record = {};
	__u64 key;

	if (!ctx->sk)
		return;
	msk = bpf_skc_to_mptcp_sock(ctx->sk);
	if (!msk)
		return;
	key = (__u64)msk;
	record.proto = vip->proto;
	copy_address(record.vip, vip->addr);
	copy_address(record.peer, slot->addr);
	record.vip_port = vip->port;
	record.peer_port = slot->port;
	mptcp.update(&key, &record);
}

static __always_inline void forget_mptcp(struct bpf_sock *ctx)
{
	__u64 key = (__u64)ctx; /* the context of this hook is the socket itself */

	if (ctx->protocol == IPPROTO_MPTCP)
		mptcp.delete(&key);
}
#else
#define record_mptcp(ctx, vip, slot)
#define forget_mptcp(ctx)
#endif

/*
 * A random number for the choice, from what the hook has at hand: cookies are given out in sequence,
 * and mixed they spread evenly. The kernel's generator would be a noticeable part of the hook.
 */
static __always_inline __u64 random_of(__u64 cookie, struct bucket *bucket)
{
	__u64 x = cookie ^ ((__u64)bucket->turn++ << 40);

	return mix(x);
}

/*
 * connect(): a socket that had a record loses it when it now connects past the Services. When it
 * is refused it keeps it: a UDP socket then is still connected to its old peer.
 */
static __always_inline int sock_connect(struct bpf_sock_addr *ctx, struct frontend_key *to)
{
	struct frontend_key vip = *to;
	struct destination of;
	struct bucket *bucket;
	struct found found;
	__u64 cookie, first;
	struct slot *slot;
	bool ours;
	int error;

	if (to->proto != IPPROTO_TCP && to->proto != IPPROTO_UDP)
		return NOT_A_SERVICE;
	ours = concerns_us(to->addr);
	/* What a TCP socket left in the record when its SYN never went, sock_ops tells by the peer. */
	if (!ours && to->proto == IPPROTO_TCP)
		return NOT_A_SERVICE;
	cookie = bpf_get_socket_cookie(ctx);
	bucket = bucket_of(cookie);
	if (!bucket)
		return NOT_A_SERVICE;
	first = first_of(bucket);
	error = ours ? find_destination(ctx, to, &of) : NOT_A_SERVICE;
	if (error != TRANSLATED) {
		if (error == NOT_A_SERVICE)
			free_record(cookie, bucket);
		return error;
	}
	slot = choose(ctx, &of, vip.addr, random_of(cookie, bucket));
	if (!slot)
		return -ECONNREFUSED;
	translate(to, slot->addr, slot->port);
	if (find_record(cookie, bucket, first, &found)) {
		if (!found.cookie) {
			free_overflow(cookie, bucket);
		} else {
			/* Keep the place: mark it busy, settle the old connection, write anew. */
			*(volatile __u64 *)found.cookie = cookie | COOKIE_BUSY;
			count_closed(found.record);
		}
	}
	if (!found.cookie && !claim_place(cookie, &found)) {
		record_overflow(cookie, bpf_get_netns_cookie(ctx), bucket, &vip, slot);
	} else {
		fill_record(found.record, &vip, slot);
		barrier();
		*(volatile __u64 *)found.cookie = cookie;
	}
	if (to->proto == IPPROTO_TCP)
		record_mptcp(ctx, &vip, slot);
	return TRANSLATED;
}

int connect4(struct bpf_sock_addr *ctx)
{
	struct frontend_key to = V4_DESTINATION(ctx);
	int error = sock_connect(ctx, &to);

	if (error == TRANSLATED)
		write_v4(ctx, &to);
	return verdict(error);
}

int connect6(struct bpf_sock_addr *ctx)
{
	struct frontend_key to = V6_DESTINATION(ctx);
	int error = sock_connect(ctx, &to);

	if (error == TRANSLATED)
		write_v6(ctx, &to);
	return verdict(error);
}

/* sendmsg() of a UDP socket with an address: the endpoint that this socket uses for this VIP. */
static __always_inline int sock_sendmsg(struct bpf_sock_addr *ctx, struct frontend_key *to)
{
	struct frontend_key vip = *to;
	struct datagrams *sent;
	struct destination of;
	struct slot *slot;
	int error;

	if (to->proto != IPPROTO_UDP || !ctx->sk)
		return NOT_A_SERVICE;
	sent = datagrams.sk_storage_get(ctx->sk, NULL, 0);
	if (sent && recall(sent, to))
		return TRANSLATED;
	error = concerns_us(to->addr) ? find_destination(ctx, to, &of) : NOT_A_SERVICE;
	if (error != TRANSLATED) {
		if (sent && error == NOT_A_SERVICE)
			forget(sent, to);
		return error;
	}
	slot = choose(ctx, &of, vip.addr,
		      (__u64)bpf_get_prandom_u32() << 32 | bpf_get_prandom_u32());
	if (!slot)
		return -ECONNREFUSED;
	translate(to, slot->addr, slot->port);
	sent = datagrams.sk_storage_get(ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (sent)
		remember(sent, &vip, slot, &of);
	return TRANSLATED;
}

int sendmsg4(struct bpf_sock_addr *ctx)
{
	struct frontend_key to = V4_DESTINATION(ctx);
	int error = sock_sendmsg(ctx, &to);

	if (error == TRANSLATED)
		write_v4(ctx, &to);
	return verdict(error);
}

int sendmsg6(struct bpf_sock_addr *ctx)
{
	struct frontend_key to = V6_DESTINATION(ctx);
	int error = sock_sendmsg(ctx, &to);

	if (error == TRANSLATED)
		write_v6(ctx, &to);
	return verdict(error);
}

/* The peer as the program knows it: the VIP that it connected to, if its peer came from one. */
static __always_inline bool peer_of_record(__u64 cookie, struct frontend_key *peer)
{
	struct bucket *bucket = bucket_of(cookie);
	struct found found;

	if (!bucket || !find_record(cookie, bucket, first_of(bucket), &found))
		return false;
	/* connect(AF_UNSPEC) passes no hook: only the real peer tells that the record still holds. */
	if (!same_address(found.record->peer, peer->addr) ||
	    found.record->peer_port != peer->port || found.record->proto != peer->proto)
		return false;
	translate(peer, found.record->vip, found.record->vip_port);
	return true;
}

static __always_inline bool sock_recvmsg(struct bpf_sock_addr *ctx, struct frontend_key *from)
{
	struct datagrams *sent;

	if (from->proto != IPPROTO_UDP || !ctx->sk)
		return false;
	sent = datagrams.sk_storage_get(ctx->sk, NULL, 0);
	if (sent && answer(sent, from))
		return true;
	return peer_of_record(bpf_get_socket_cookie(ctx), from);
}

int recvmsg4(struct bpf_sock_addr *ctx)
{
	struct frontend_key from = V4_DESTINATION(ctx);

	if (sock_recvmsg(ctx, &from))
		write_v4(ctx, &from);
	return PROCEED;
}

int recvmsg6(struct bpf_sock_addr *ctx)
{
	struct frontend_key from = V6_DESTINATION(ctx);

	if (sock_recvmsg(ctx, &from))
		write_v6(ctx, &from);
	return PROCEED;
}

static __always_inline bool sock_getpeername(struct bpf_sock_addr *ctx, struct frontend_key *peer)
{
#ifdef HAVE_MPTCP
	struct socket *record;
	__u64 key;
#endif
	/* An MPTCP socket says IPPROTO_MPTCP here, its record was made by a TCP subflow. */
	if (peer->proto != IPPROTO_UDP)
		peer->proto = IPPROTO_TCP;
	if (peer_of_record(bpf_get_socket_cookie(ctx), peer))
		return true;
#ifdef HAVE_MPTCP
	if (peer->proto == IPPROTO_UDP)
		return false;
	key = (__u64)ctx->sk;
	record = mptcp.lookup(&key);
	if (record && same_address(record->peer, peer->addr) && record->peer_port == peer->port) {
		translate(peer, record->vip, record->vip_port);
		return true;
	}
#endif
	return false;
}

int getpeername4(struct bpf_sock_addr *ctx)
{
	struct frontend_key peer = V4_DESTINATION(ctx);

	if (sock_getpeername(ctx, &peer))
		write_v4(ctx, &peer);
	return PROCEED;
}

int getpeername6(struct bpf_sock_addr *ctx)
{
	struct frontend_key peer = V6_DESTINATION(ctx);

	if (sock_getpeername(ctx, &peer))
		write_v6(ctx, &peer);
	return PROCEED;
}

/* A NodePort, or a load balancer's port at its address, that no process of the host may take. */
static __always_inline bool is_guarded(const struct frontend_key *to)
{
	struct frontend_key key = *to;
	struct service *service;
	__u32 id;

	service = find_service(&key, &id);
	if (!service) {
		service = find_wildcard(key.addr, &id);
		if (!service || !(service->flags & (SERVICE_NODE | SERVICE_LOOPBACK)))
			return false;
		any_address(key.addr);
		service = find_service(&key, &id);
	}
	return service && service->flags & SERVICE_GUARDED;
}

/* bind(): who listens where connections never arrive would wait for ever. */
static __always_inline int sock_bind(struct bpf_sock *ctx, struct frontend_key *to)
{
	bool guarded;

	if (!to->port || (to->proto != IPPROTO_TCP && to->proto != IPPROTO_UDP) ||
	    !in_host_netns(ctx))
		return PROCEED;
	guarded = is_guarded(to);
	if (!guarded && !(to->addr[0] | to->addr[1] | to->addr[2] | to->addr[3])) {
		to->addr[2] = V4_MAPPED; /* [::] most often stands for 0.0.0.0 as well */
		guarded = is_guarded(to);
	}
	if (!guarded)
		return PROCEED;
	count(COUNTER_BIND_REFUSED);
	return verdict(-EADDRINUSE);
}

int post_bind4(struct bpf_sock *ctx)
{
	struct frontend_key to = {
		{ 0, 0, V4_MAPPED, ctx->src_ip4 }, bpf_htons(ctx->src_port), ctx->protocol, 0
	};

	return sock_bind(ctx, &to);
}

int post_bind6(struct bpf_sock *ctx)
{
	struct frontend_key to = {
		{ ctx->src_ip6[0], ctx->src_ip6[1], ctx->src_ip6[2], ctx->src_ip6[3] },
		bpf_htons(ctx->src_port), ctx->protocol, 0
	};

	return sock_bind(ctx, &to);
}

/* Whether the connection that begins is the one that the record is of. */
static __always_inline bool is_of_record(struct bpf_sock_ops *ctx, const struct socket *record)
{
	/* Read beforehand: a choice between two fields of the context is no access to it. */
	volatile __be32 v4 = ctx->remote_ip4;
	__be32 peer[4] = { ctx->remote_ip6[0], ctx->remote_ip6[1], ctx->remote_ip6[2],
			   ctx->remote_ip6[3] };

	if (ctx->family != AF_INET6) {
		peer[0] = peer[1] = 0;
		peer[2] = V4_MAPPED;
		peer[3] = v4;
	}
	return same_address(record->peer, peer) &&
	       record->peer_port == bpf_htons((__u16)bpf_htonl(ctx->remote_port));
}

/* How the connect of this record ended, told once: well with a connect time (µs), else badly. */
static __always_inline void tell_outcome(struct socket *record, bool well, __u32 latency)
{
	__u32 endpoint = record->endpoint;
	struct load *load_of;

	if (record->counted & COUNTED_OUTCOME)
		return;
	record->counted |= COUNTED_OUTCOME;
	load_of = load.lookup(&endpoint);
	if (!load_of || load_of->generation != record->generation)
		return;
	if (well)
		succeeded(load_of, latency);
	else
		failed(load_of, record->generation, WINDOW_CONNECT);
}

/* An answer, and the connection is gone before it said anything. */
static __always_inline void tell_reset(struct socket *record)
{
	__u32 endpoint = record->endpoint;
	struct load *load_of = load.lookup(&endpoint);

	if (load_of && load_of->generation == record->generation)
		failed(load_of, record->generation, 0);
}

/*
 * A socket whose own program closes it has no record any more when its state changes: what ends here was
 * ended by the other side, or by its silence.
 */
static __always_inline void changes_state(struct bpf_sock_ops *ctx)
{
	__u32 from = ctx->args[0], to = ctx->args[1];
	struct bucket *bucket;
	struct found found;
	__u64 cookie;

	if (to != BPF_TCP_CLOSE && from != BPF_TCP_SYN_SENT)
		return;
	cookie = bpf_get_socket_cookie(ctx);
	bucket = bucket_of(cookie);
	if (!bucket || !find_record(cookie, bucket, first_of(bucket), &found))
		return;
	if (to == BPF_TCP_CLOSE && destroyed.lookup(&cookie))
		; /* by the agent, which says nothing about the endpoint */
	else if (from == BPF_TCP_SYN_SENT)
		tell_outcome(found.record, to == BPF_TCP_ESTABLISHED, ctx->srtt_us >> 3);
	else if (from == BPF_TCP_ESTABLISHED && !ctx->bytes_received)
		tell_reset(found.record);
	if (to == BPF_TCP_CLOSE)
		free_record(cookie, bucket);
}

/* A SYN that is not answered within a second: programs rarely wait until the kernel gives up. */
static __always_inline void has_no_answer(struct bpf_sock_ops *ctx)
{
	struct bucket *bucket;
	struct found found;
	__u64 cookie;

	if (ctx->state != BPF_TCP_SYN_SENT)
		return;
	cookie = bpf_get_socket_cookie(ctx);
	bucket = bucket_of(cookie);
	if (bucket && find_record(cookie, bucket, first_of(bucket), &found))
		tell_outcome(found.record, false, 0);
}

/* Counting starts with the SYN and ends with TCP_CLOSE, however the connection got there. */
int sock_ops(struct bpf_sock_ops *ctx)
{
	struct bucket *bucket;
	struct found found;
	__u64 cookie;

	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		cookie = bpf_get_socket_cookie(ctx);
		bucket = bucket_of(cookie);
		if (!bucket || !find_record(cookie, bucket, first_of(bucket), &found) ||
		    !is_of_record(ctx, found.record))
			break;
		if (!(found.record->counted & COUNTED_OPEN))
			count_open(found.record);
		/* Only a socket with a record pays for the seven state changes of a connection. */
		bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags |
						       BPF_SOCK_OPS_STATE_CB_FLAG |
						       BPF_SOCK_OPS_RTO_CB_FLAG);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		changes_state(ctx);
		break;
	case BPF_SOCK_OPS_RTO_CB:
		has_no_answer(ctx);
		break;
	}
	return PROCEED;
}

int sock_release(struct bpf_sock *ctx)
{
	__u64 cookie = bpf_get_socket_cookie(ctx);

	free_record(cookie, bucket_of(cookie));
	forget_mptcp(ctx);
	return PROCEED;
}
