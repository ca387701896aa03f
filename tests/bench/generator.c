/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Makes frames in the kernel, and counts those that come back. Run with live frames. */
#include <linux/bpf.h>

struct plan {
	__u8 frame[42]; /* Ethernet, IPv4, UDP without a checksum */
	__u16 pad;
	__u32 flows; /* how many different ones */
	__u64 sent;
};

BPF_TABLE_PINNED("array", __u32, struct plan, plan, 1, PINS "/plan");
BPF_TABLE_PINNED("percpu_array", __u32, __u64, back, 1, PINS "/back");

/* Page by page the frames come again as the node has changed them: all headers are written anew. */
int generate(struct xdp_md *ctx)
{
	__u8 *frame = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	__u32 zero = 0, flow, high;
	struct plan *how = plan.lookup(&zero);

	if (!how || (void *)(frame + 42) > end)
		return XDP_DROP;
	flow = how->sent++ % how->flows;
	__builtin_memcpy(frame, how->frame, 42);
	/* 40,000 source ports; above that the source address changes, and the ID makes up for it. */
	high = flow / 40000;
	flow = flow % 40000 + 10000;
	*(__u16 *)(frame + 28) = __builtin_bswap16(high);
	*(__u16 *)(frame + 18) = __builtin_bswap16(~high);
	*(__u16 *)(frame + 34) = __builtin_bswap16(flow);
	return XDP_TX;
}

int count_back(struct xdp_md *ctx)
{
	__u32 zero = 0;
	__u64 *counted = back.lookup(&zero);

	if (counted)
		*counted += 1;
	return XDP_DROP;
}

int drop(struct xdp_md *ctx)
{
	return XDP_DROP;
}
