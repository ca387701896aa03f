/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* From a packet to a service and one of its endpoints, as lookup.h does it for sockets. */
#ifndef POINTSMAN_SELECT_H
#define POINTSMAN_SELECT_H

/* Equal on every node: of a NodePort's address, which differs, nothing goes in. Mirrored by
 * flow_hash() in ctl/pointsman/maglev.py. */
static __always_inline __u32 flow_hash(const struct tuple *tuple)
{
	__u64 x = mix((__u64)tuple->source[0] << 32 | tuple->source[1]);

	x = mix(x ^ ((__u64)tuple->source[2] << 32 | tuple->source[3]));
	x = mix(x ^ ((__u64)tuple->source_port << 32 | (__u32)tuple->destination_port << 16 |
		     tuple->proto));
	return x >> 32;
}

/* What a destination is to a client on that side. */
struct target {
	struct service *service;
	__u64 set;
	__u32 id;
	__u32 refused; /* a VIP's port that nobody defines */
};

static __always_inline void destination_key(struct frontend_key *key, const struct tuple *tuple)
{
	copy_address(key->addr, tuple->destination);
	key->port = tuple->destination_port;
	key->proto = tuple->proto;
	key->pad = 0;
}

/* For clients outside of the cluster: NodePorts at addresses of these SERVICE_… kinds, externalIPs,
 * load balancers' addresses. */
static __always_inline bool find_outside(const struct tuple *tuple, __u8 nodes, struct target *to)
{
	struct frontend_key key;
	struct service *service;

	destination_key(&key, tuple);
	service = find_service(&key, &to->id);
	if (!service || service->flags & SERVICE_NODE_PORT) {
		service = find_wildcard(key.addr, &to->id);
		if (!service || !(service->flags & nodes))
			return false;
		any_address(key.addr);
		service = find_service(&key, &to->id);
	}
	if (!service || !(service->packets & PACKETS_OUTSIDE))
		return false;
	to->service = service;
	to->set = *(volatile __u64 *)&service->outside;
	to->refused = 0;
	return true;
}

/* For a pod whose sockets the hooks can't see: what find_destination() would give its sockets. */
static __always_inline bool find_for_pod(const struct tuple *tuple, struct target *to)
{
	struct frontend_key key;
	struct service *service;
	__u8 node;

	destination_key(&key, tuple);
	to->refused = 0;
	service = find_service(&key, &to->id);
	if (!service || service->flags & SERVICE_NODE_PORT) {
		service = find_wildcard(key.addr, &to->id);
		if (!service || !service->flags) {
			to->service = NULL;
			to->set = 0;
			to->refused = service || is_unused(key.addr);
			return to->refused;
		}
		node = service->flags;
		if (!(node & (SERVICE_NODE | SERVICE_REMOTE_NODE)))
			return false;
		any_address(key.addr);
		service = find_service(&key, &to->id);
		if (!service || !reaches_node_port(node, service))
			return false;
	} else if (service->flags & SERVICE_HOST_NETNS) {
		return false;
	}
	to->service = service;
	to->set = *(volatile __u64 *)&service->set;
	return true;
}

/* loadBalancerSourceRanges */
static __always_inline bool is_welcome(const struct target *to, const __be32 *client)
{
	struct source_range key = {};

	/* Who comes from outside has found one; the verifier of Linux 6.1 does not see that. */
	if (!to->service || !(to->service->packets & PACKETS_RANGES))
		return true;
	key.prefix = 32 + 128;
	key.service = to->id;
	copy_address(key.addr, client);
	return source_ranges.lookup(&key) != NULL;
}

static __always_inline __u32 client_check(const struct client_key *key, const struct affinity *value)
{
	__u64 sum = mix((__u64)key->addr[0] << 32 | key->addr[1]) ^ (__u64)key->owner << 32 ^ value->port;

	sum = mix(sum ^ ((__u64)key->addr[2] << 32 | key->addr[3]));
	sum = mix(sum ^ ((__u64)value->addr[0] << 32 | value->addr[1]));
	return mix(sum ^ ((__u64)value->addr[2] << 32 | value->addr[3]));
}

/* By the hash alone, and by weight. A zone counts for nobody here: it is not known how full it is. */
static __always_inline struct slot *pick_by_weight(const struct target *to, __u32 hash, bool outside)
{
	__u32 first = (__u32)to->set, index = first + (__u32)((to->set >> 32) * hash >> 32);
	struct share *share;
	__u64 alias;

	share = shares.lookup(&index);
	if (share && (outside || !share->weight || !(to->service->algorithm & CHOICE_ZONE))) {
		alias = *(volatile __u64 *)&share->keep;
		if ((__u32)mix(hash) >= (__u32)alias)
			index = first + (__u32)(alias >> 32);
	}
	return slots.lookup(&index);
}

/* The place in the set that the table has for this packet, or the hash alone without a table. */
static __always_inline struct slot *pick_by_hash(const struct target *to, __u32 hash, bool outside)
{
	__u64 table = outside ? *(volatile __u64 *)&to->service->table : 0;
	__u32 entries = table >> 32, count = to->set >> 32, place, index;
	struct line *line;

	if (entries) {
		place = (__u64)hash * entries >> 32;
		index = (__u32)table + place / 32;
		line = maglev.lookup(&index);
		/* The set may have been switched a moment ago: a place that it lacks is not used. */
		if (line && line->place[place & 31] < count) {
			index = (__u32)to->set + line->place[place & 31];
			return slots.lookup(&index);
		}
	}
	return pick_by_weight(to, hash, outside);
}

/* Room for a client's key and value, which does not fit on the stack. */
struct client {
	struct client_key key;
	struct affinity value;
};

/* One endpoint for a packet that begins a flow. */
static __always_inline struct slot *choose_for_packet(const struct target *to,
						      const struct tuple *tuple, bool outside,
						      __u64 now, struct client *room)
{
	struct client_key *key = &room->key;
	struct affinity *known, *value = &room->value;
	struct slot *slot;

	if (!to->service->affinity)
		return pick_by_hash(to, flow_hash(tuple), outside);
	copy_address(key->addr, tuple->source);
	key->owner = to->service->owner;
	key->pad = 0;
	known = affinity_clients.lookup(key);
	if (known) {
		*value = *known;
		if (value->check == client_check(key, value) &&
		    (__s64)(now - value->seen) <= (__s64)SECONDS(to->service->affinity)) {
			slot = find_member(to->set, value->addr, value->port);
			if (slot) {
				*(volatile __u64 *)&known->seen = now;
				return slot;
			}
		}
	}
	slot = pick_by_hash(to, flow_hash(tuple), outside);
	if (!slot)
		return NULL;
	value->seen = now;
	copy_address(value->addr, slot->addr);
	value->port = slot->port;
	value->pad = 0;
	value->check = client_check(key, value);
	affinity_clients.update(key, value);
	return slot;
}

#endif
