/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * What the agent may not do itself: it never writes `load`, because its stores would race with the
 * programs' atomic additions. It runs these with BPF_PROG_TEST_RUN, the work list as the packet.
 */
#define MAX_CORRECTIONS 256

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
		__u32 endpoint;

		if ((void *)(work + i + 1) > end)
			break;
		endpoint = work[i].endpoint;
		load_of = load.lookup(&endpoint);
		/* What has this generation already keeps its count: an upgrade may set it again. */
		if (!load_of || load_of->generation == work[i].generation)
			continue;
		if (!(work[i].generation & GENERATION_RETIRED))
			load_of->open = 0;
		barrier();
		*(volatile __u32 *)&load_of->generation = work[i].generation;
	}
	return XDP_PASS;
}

#ifdef HAVE_PREVIOUS_LOAD
/*
 * After an upgrade that needed a new `load`: what the old programs counted is added to what the new
 * ones did. Sums don't mind the order, and the exchange makes a second run add nothing.
 */
int merge_load(struct xdp_md *ctx)
{
	struct correction *work = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;

	for (int i = 0; i < MAX_CORRECTIONS; i++) {
		struct load *from, *to;
		__u32 endpoint;

		if ((void *)(work + i + 1) > end)
			break;
		endpoint = work[i].endpoint;
		from = previous_load.lookup(&endpoint);
		to = load.lookup(&endpoint);
		if (from && to)
			__sync_fetch_and_add(&to->open, __sync_lock_test_and_set(&from->open, 0));
	}
	return XDP_PASS;
}
#endif
