/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* What several CPUs do to one word, and the mixing of bits that nobody can foresee. */
#ifndef POINTSMAN_ATOMIC_H
#define POINTSMAN_ATOMIC_H

#define barrier() asm volatile("" ::: "memory")
#define NSEC_PER_SEC 1000000000ULL

/*
 * The whole decision about a word. Before Linux 5.12 programs have no compare-and-swap: nobody ever
 * wins then. Each record is in the overflow map, where the kernel decides, and no endpoint is ejected.
 */
static __always_inline bool swap(__u64 *word, __u64 from, __u64 to)
{
#ifdef HAVE_COMPARE_AND_SWAP
	return __sync_val_compare_and_swap(word, from, to) == from;
#else
	return false;
#endif
}

/* As swap(), where it does no harm if what another CPU did in this moment is lost. */
static __always_inline void replace(__u64 *word, __u64 from, __u64 to)
{
#ifdef HAVE_COMPARE_AND_SWAP
	__sync_val_compare_and_swap(word, from, to);
#else
	*(volatile __u64 *)word = to;
#endif
}

/* What the word was before. Before Linux 5.12 two CPUs may be told the same. */
static __always_inline __u64 fetch_and_add(__u64 *word, __u64 more)
{
#ifdef HAVE_COMPARE_AND_SWAP
	return __sync_fetch_and_add(word, more);
#else
	__u64 before = *(volatile __u64 *)word;

	__sync_fetch_and_add(word, more);
	return before;
#endif
}

/* Of the time to a few milliseconds, where there is a clock that costs less for it (Linux 5.11). */
static __always_inline __u64 coarse_time(void)
{
#ifdef HAVE_COMPARE_AND_SWAP
	return bpf_ktime_get_coarse_ns();
#else
	return bpf_ktime_get_ns();
#endif
}

static __always_inline __u64 mix(__u64 x)
{
	x *= 0xff51afd7ed558ccdULL;
	x ^= x >> 33;
	x *= 0xc4ceb9fe1a85ec53ULL;
	return x ^ x >> 33;
}

#endif
