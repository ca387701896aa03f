/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Unconnected UDP: a socket keeps one endpoint for each VIP it sends to, as long as that endpoint
 * is valid. The choices live in the socket's own storage; the kernel frees them with the socket
 * and runs the hooks under the socket's lock.
 */
#ifndef POINTSMAN_DATAGRAM_H
#define POINTSMAN_DATAGRAM_H

/*
 * Still an endpoint of the service that this VIP belongs to? A hash is asked only for a NodePort,
 * whose own key has no address: the one that was meant may no longer be a node's.
 */
static __always_inline bool still_valid(struct datagram *choice, const struct frontend_key *to)
{
	__u32 endpoint = choice->endpoint, id = choice->service;
	struct load *load_of = load.lookup(&endpoint);
	struct service *service, *wildcard;
	__be32 any[4];
	__u64 set;

	if (!load_of || load_of->generation != choice->generation)
		return false;
	service = services.lookup(&id);
	if (!service || service->owner != choice->owner || service->key.port != to->port ||
	    service->key.proto != to->proto)
		return false;
	copy_address(any, to->addr);
	any_address(any);
	if (!same_address(service->key.addr, to->addr)) {
		if (!same_address(service->key.addr, any))
			return false;
		wildcard = find_wildcard(to->addr, &id);
		if (!wildcard || !reaches_node_port(wildcard->flags, service))
			return false;
	}
	/* Another set of the same service port may have the endpoint while this one lost it. */
	set = *(volatile __u64 *)&service->set;
	if (set == choice->set)
		return true;
	if (!(set >> 32) || !find_member(set, choice->peer, choice->peer_port))
		return false;
	choice->set = set;
	return true;
}

/* The endpoint this socket used for this VIP before, written to *to. */
static __always_inline bool recall(struct datagrams *sent, struct frontend_key *to)
{
#pragma unroll
	for (int i = 0; i < DATAGRAMS_PER_SOCKET; i++) {
		struct datagram *choice = &sent->choice[i];

		if (choice->vip_port != to->port || !same_address(choice->vip, to->addr))
			continue;
		if (!still_valid(choice, to))
			return false;
		choice->sequence = ++sent->sequence;
		copy_address(to->addr, choice->peer);
		to->port = choice->peer_port;
		return true;
	}
	return false;
}

/* Keeps a choice, in place of the one for the same VIP or of the one used longest ago. */
static __always_inline void remember(struct datagrams *sent, const struct frontend_key *vip,
				     const struct slot *slot, const struct destination *of)
{
	struct datagram *place = &sent->choice[0];
	__u32 oldest = 0;

#pragma unroll
	for (int i = 0; i < DATAGRAMS_PER_SOCKET; i++) {
		struct datagram *choice = &sent->choice[i];
		__u32 age = sent->sequence - choice->sequence;

		if (choice->vip_port == vip->port && same_address(choice->vip, vip->addr)) {
			place = choice;
			break;
		}
		if (!choice->generation)
			age = ~0U; /* never used */
		if (age > oldest) {
			oldest = age;
			place = choice;
		}
	}
	copy_address(place->vip, vip->addr);
	copy_address(place->peer, slot->addr);
	place->vip_port = vip->port;
	place->peer_port = slot->port;
	place->endpoint = slot->endpoint;
	place->generation = slot->generation;
	place->service = of->id;
	place->set = of->set;
	place->owner = slot->owner;
	place->sequence = ++sent->sequence;
}

/*
 * A send past the Services to what was an endpoint once: its answers are its own again. Of one that
 * still is one the choice stands, for what comes from it can't be told apart.
 */
static __always_inline void forget(struct datagrams *sent, const struct frontend_key *peer)
{
#pragma unroll
	for (int i = 0; i < DATAGRAMS_PER_SOCKET; i++) {
		struct datagram *choice = &sent->choice[i];
		__u32 endpoint = choice->endpoint;
		struct load *load_of;

		if (choice->peer_port != peer->port || !same_address(choice->peer, peer->addr))
			continue;
		load_of = load.lookup(&endpoint);
		if (!load_of || load_of->generation != choice->generation)
			choice->generation = choice->vip_port = 0;
	}
}

/*
 * The VIP that a datagram's source stands for. Two VIPs that share an endpoint can't be told
 * apart on the way back: the last send wins.
 */
static __always_inline bool answer(const struct datagrams *sent, struct frontend_key *from)
{
	const struct datagram *found = NULL;

#pragma unroll
	for (int i = 0; i < DATAGRAMS_PER_SOCKET; i++) {
		const struct datagram *choice = &sent->choice[i];

		if (!choice->generation || choice->peer_port != from->port ||
		    !same_address(choice->peer, from->addr))
			continue;
		if (!found || (__s32)(choice->sequence - found->sequence) > 0)
			found = choice;
	}
	if (!found)
		return false;
	copy_address(from->addr, found->vip);
	from->port = found->vip_port;
	return true;
}

#endif
