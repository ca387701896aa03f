/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * The maps: MAP(type, name, key, value, entries, flags), read by the agent as well. The loader
 * defines the MAX_… sizes; it pins each map, and refuses a pin that differs from this.
 */
#ifndef POINTSMAN_MAPS_H
#define POINTSMAN_MAPS_H

/* The compiler's own map is thrown away, so it is a small one: the loader makes that of `entries`. */
#define MAP(type, name, key, value, entries, flags) \
	BPF_F_TABLE(#type, key, value, name, (entries) ? 1 : 0, flags)

/* As bcc's own for a ring buffer, with its size in bytes; the compiler's is a page of any kernel. */
#define RINGBUF(name, bytes) \
	struct name##_table_t { \
		int key; \
		__u32 leaf; \
		int (*ringbuf_output)(void *, __u64, __u64); \
		void *(*ringbuf_reserve)(__u64); \
		void (*ringbuf_discard)(void *, __u64); \
		void (*ringbuf_submit)(void *, __u64); \
		__u64 (*ringbuf_query)(__u64); \
		__u32 max_entries; \
	}; \
	__attribute__((section("maps/ringbuf"))) \
	struct name##_table_t name = { .max_entries = (bytes) ? 65536 : 0 }

/* What a lookup reads. The arrays are mapped by the agent, so an update is a store, no syscall. */
MAP(array, marks, __u32, __u64, MAX_MARKS, BPF_F_MMAPABLE);
MAP(hash, frontends, struct frontend_key, struct frontend, MAX_SERVICES, 0);
MAP(array, services, __u32, struct service, MAX_SERVICES, BPF_F_MMAPABLE);
MAP(array, slots, __u32, struct slot, MAX_SLOTS, BPF_F_MMAPABLE);
MAP(array, shares, __u32, struct share, MAX_SLOTS, BPF_F_MMAPABLE);
MAP(array, load, __u32, struct load, MAX_ENDPOINTS, BPF_F_MMAPABLE);
MAP(array, policies, __u32, struct policy, MAX_SERVICES, BPF_F_MMAPABLE);
/* Of each service, for round-robin: apart from what every lookup reads. */
MAP(array, turns, __u32, __u64, MAX_SERVICES, 0);
MAP(hash, names, __u32, struct name, MAX_SERVICES, BPF_F_NO_PREALLOC);
MAP(array, settings, __u32, struct settings, 1, 0);
MAP(hash, skipped_netns, __u64, __u32, MAX_SKIPPED, BPF_F_NO_PREALLOC);
MAP(array, maglev, __u32, struct line, MAX_LINES, 0);
MAP(lpm_trie, source_ranges, struct source_range, __u32, MAX_SOURCE_RANGES, BPF_F_NO_PREALLOC);
MAP(percpu_array, counters, __u32, __u64, COUNTERS, 0);

/* What outlives an upgrade with the sockets it describes. */
MAP(array, sockets, __u32, struct bucket, MAX_BUCKETS, BPF_F_MMAPABLE);
MAP(array, sockets_more, __u32, struct more, MAX_BUCKETS, BPF_F_MMAPABLE);
MAP(hash, sockets_overflow, __u64, struct overflow, MAX_OVERFLOW, 0);
MAP(lru_hash, overflow_netns, __u64, __u32, MAX_OVERFLOW_NETNS, 0);
MAP(lru_hash, affinity, struct affinity_key, struct affinity, MAX_AFFINITY, 0);
/* Sockets that the agent is about to end, by cookie: that says nothing about their endpoint. */
MAP(lru_hash, destroyed, __u64, __u32, MAX_DESTROYED, 0);
MAP(sk_storage, datagrams, int, struct datagrams, 0, BPF_F_NO_PREALLOC);
#ifdef HAVE_MPTCP
/* An MPTCP socket connects by a subflow with a cookie of its own: found again by its address. */
MAP(lru_hash, mptcp, __u64, struct socket, MAX_MPTCP, 0);
#endif

#ifdef HAVE_PACKETS
MAP(hash, flows, struct tuple, struct flow, MAX_FLOWS, BPF_F_NO_PREALLOC);
MAP(lru_hash, flows_new, struct tuple, struct flow, MAX_FLOWS_NEW, 0);
/* Can be mapped, and is not: so its elements begin where lines of memory do. A power of two. */
MAP(array, recent, __u32, struct recent, MAX_RECENT, BPF_F_MMAPABLE);
MAP(lru_hash, affinity_clients, struct client_key, struct affinity, MAX_AFFINITY, 0);
MAP(lru_hash, fragments, struct fragment_key, struct fragment, MAX_FRAGMENTS, 0);
MAP(lru_hash, held_fragments, struct fragment_key, __u64, MAX_FRAGMENTS, 0);
MAP(hash, devices, __u32, struct device, MAX_DEVICES, 0);
MAP(hash, vlans, struct vlan_key, __u32, MAX_DEVICES, 0);
MAP(array, packet_settings, __u32, struct packet_settings, 1, BPF_F_MMAPABLE);
MAP(percpu_array, packet_counters, __u32, __u64, VERDICTS, 0);
RINGBUF(trace, MAX_TRACE_BYTES);
/* What the agent asks `sweep` to look at: flows that may have ended. */
MAP(array, sweep_keys, __u32, struct tuple, MAX_SWEEP, BPF_F_MMAPABLE);
#endif

#endif
