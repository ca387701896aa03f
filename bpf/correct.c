/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * What the agent may not do itself: it never writes `load`, because its stores would race with the
 * programs' atomic additions. It runs these with BPF_PROG_TEST_RUN, the work list as the packet.
 */
#define MAX_CORRECTIONS 192

/*
 * A new generation for an endpoint id. A retired one keeps its count, but nothing adds to it any
 * more; a fresh one starts from 0. The agent lets a grace period pass between the two.
 */
int set_generation(struct xdp_md *ctx)
{
	struct correction *work = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;

	for (int i = 0; i < MAX_CORRECTIONS; i++) {
		struct load *load_of;
		struct policy *how;
		__u32 endpoint, owner;

		if ((void *)(work + i + 1) > end)
			break;
		endpoint = work[i].endpoint;
		load_of = load.lookup(&endpoint);
		/* What has this generation already keeps its count: an upgrade may set it again. */
		if (!load_of || load_of->generation == work[i].generation)
			continue;
		/* Before it looks at `until`: see eject(). */
		if (work[i].generation & GENERATION_RETIRED)
			*(volatile __u32 *)&load_of->generation = work[i].generation;
		/* The first one is the barrier, too. */
		if (!swap(&load_of->until, 0, 0) && swap(&load_of->until, load_of->until, 0)) {
			owner = load_of->owner;
			how = policies.lookup(&owner);
			if (how)
				__sync_fetch_and_add(&how->ejected, -1);
		}
		if (!(work[i].generation & GENERATION_RETIRED)) {
			load_of->open = 0;
			load_of->owner = work[i].owner;
			load_of->latency = load_of->streak = 0;
			load_of->measured = load_of->window = 0;
		}
		barrier();
		*(volatile __u32 *)&load_of->generation = work[i].generation;
	}
	return XDP_PASS;
}

#ifdef HAVE_PREVIOUS_LOAD
/* The `load` of another layout or size; the loader reads from its BTF where the count stands. */
struct previous_load {
	__u8 value[PREVIOUS_LOAD_SIZE];
};
MAP(array, previous_load, __u32, struct previous_load, PREVIOUS_LOAD_ENTRIES, BPF_F_MMAPABLE);

/*
 * After an upgrade that needed a new `load`: what the old programs counted is added to what the new
 * ones did. Sums don't mind the order, and a second run finds nothing left to add.
 */
int merge_load(struct xdp_md *ctx)
{
	struct correction *work = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;

	for (int i = 0; i < MAX_CORRECTIONS; i++) {
		struct previous_load *from;
		struct load *to;
		__u32 endpoint, *counted;

		if ((void *)(work + i + 1) > end)
			break;
		endpoint = work[i].endpoint;
		from = previous_load.lookup(&endpoint);
		to = load.lookup(&endpoint);
		if (!from || !to)
			continue;
		/* Its last writers have ended: a grace period has passed since the links flipped. */
		counted = (__u32 *)&from->value[PREVIOUS_LOAD_OPEN];
		__sync_fetch_and_add(&to->open, *counted);
		*counted = 0;
	}
	return XDP_PASS;
}
#endif
