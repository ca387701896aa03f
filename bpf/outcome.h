/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * How connects end, and what follows for the endpoint: an estimate of its connect time, and ejection
 * when too many fail. An endpoint that is ejected gets no connections until its time is over; then one
 * tries it, and it is back when that one succeeds.
 */
#ifndef POINTSMAN_OUTCOME_H
#define POINTSMAN_OUTCOME_H

#define FADE (8 * NSEC_PER_SEC) /* in this time what is known of an endpoint counts for half */
#define SLOW_US 1000000 /* connect time that a failure stands for */
#define MAX_LATENCY_US (1 << 22)
#define WINDOW_CONNECT 1ULL
#define WINDOW_FAILURE (WINDOW_CONNECT << WINDOW_BITS)
#define WINDOW_EJECTION (WINDOW_FAILURE << WINDOW_BITS)
#define WINDOW_MASK ((1ULL << WINDOW_BITS) - 1)

static __always_inline __u64 connects_of(__u64 window)
{
	return window & WINDOW_MASK;
}

static __always_inline __u64 failures_of(__u64 window)
{
	return window >> WINDOW_BITS & WINDOW_MASK;
}

static __always_inline __u64 ejections_of(__u64 window)
{
	return window >> 2 * WINDOW_BITS & WINDOW_MASK;
}

static __always_inline struct policy *policy_of(__u32 owner)
{
	return policies.lookup(&owner);
}

/* Half for each FADE that has passed since it was measured. */
static __always_inline __u32 faded(__u32 value, __u64 measured, __u64 now)
{
	__u64 halves = now > measured ? (now - measured) / FADE : 0;

	return halves < 32 ? value >> halves : 0;
}

/* A peak counts at once, what is better as time goes by: an eighth at least for each connect. */
static __always_inline void observe(struct load *load_of, __u32 latency, __u64 now)
{
	__u32 known = load_of->latency;
	__u64 age = now > load_of->measured ? (now - load_of->measured) >> 10 : 0;

	if (latency > MAX_LATENCY_US)
		latency = MAX_LATENCY_US;
	if (!latency)
		latency = 1;
	if (age > FADE >> 10)
		age = FADE >> 10;
	if (age < FADE >> 13)
		age = FADE >> 13;
	if (latency < known)
		latency = known - (__u32)((__u64)(known - latency) * age / (FADE >> 10));
	load_of->latency = latency;
	load_of->measured = now;
}

static __always_inline __u64 add_outcome(struct load *load_of, __u64 what)
{
	__u64 window = fetch_and_add(&load_of->window, what) + what, half;

	if (connects_of(window) < WINDOW_FULL)
		return window;
	half = (connects_of(window) >> 1) * WINDOW_CONNECT + (failures_of(window) >> 1) * WINDOW_FAILURE +
	       (ejections_of(window) >> 1) * WINDOW_EJECTION;
	/* If another outcome comes between, the next one does it. */
	replace(&load_of->window, window, half);
	return window;
}

/* From the shortest to the longest. */
static __always_inline __u64 ejection_time(const struct policy *how, __u64 window)
{
	__u64 times = ejections_of(window), time = how->shortest << (times < 16 ? times : 16);

	return time < how->longest ? time : how->longest;
}

/* `generation`: of the endpoint that failed. */
static __always_inline void eject(struct load *load_of, struct policy *how, __u32 generation, __u64 window,
				  __u64 now)
{
#ifdef HAVE_COMPARE_AND_SWAP
	__u64 before = load_of->until, until = (now + ejection_time(how, window)) & ~(__u64)UNTIL_TRIAL;

	if (before) {
		/* The trial failed, or the time was over; else it is a connect from before, which says nothing new. */
		if ((!(before & UNTIL_TRIAL) && now < before) || !swap(&load_of->until, before, until))
			return;
	} else if (__sync_fetch_and_add(&how->ejected, 1) >= how->most ||
		   !swap(&load_of->until, 0, until)) {
		__sync_fetch_and_add(&how->ejected, -1);
		return;
	}
	/* It has left meanwhile: one of both, here or set_generation(), sees what the other did. */
	if (*(volatile __u32 *)&load_of->generation != generation) {
		if (swap(&load_of->until, until, 0))
			__sync_fetch_and_add(&how->ejected, -1);
		return;
	}
	count(COUNTER_EJECTED);
	if (ejections_of(window) < 255)
		__sync_fetch_and_add(&load_of->window, WINDOW_EJECTION);
#endif
}

/* `connects`: 1 if the connect has not been counted yet. `generation`: of the endpoint that it was of. */
static __always_inline void failed(struct load *load_of, __u32 generation, __u32 connects)
{
	__u64 now = coarse_time(), window;
	struct policy *how;
	__u32 streak;

	count(COUNTER_CONNECT_FAILED);
	observe(load_of, SLOW_US, now);
	__sync_fetch_and_add(&load_of->streak, 1);
	streak = *(volatile __u32 *)&load_of->streak;
	window = add_outcome(load_of, connects + WINDOW_FAILURE);
	how = policy_of(load_of->owner);
	if (!how || !(how->flags & POLICY_WATCH))
		return;
	if (load_of->until || (how->streak && streak >= how->streak) ||
	    (how->percent && connects_of(window) >= how->volume &&
	     failures_of(window) * 100 >= connects_of(window) * how->percent))
		eject(load_of, how, generation, window, now);
}

static __always_inline void succeeded(struct load *load_of, __u32 latency)
{
	__u64 now = coarse_time(), until = load_of->until;
	struct policy *how;

	count(COUNTER_CONNECTED);
	observe(load_of, latency, now);
	if (load_of->streak)
		*(volatile __u32 *)&load_of->streak = 0;
	add_outcome(load_of, WINDOW_CONNECT);
	/* What began before the ejection is no sign that it is over. */
	if (!until || (!(until & UNTIL_TRIAL) && now < until))
		return;
	if (!swap(&load_of->until, until, 0))
		return;
	how = policy_of(load_of->owner);
	if (how)
		__sync_fetch_and_add(&how->ejected, -1);
	/* What was counted before must not eject it again; how often it was, counts on. */
	load_of->window &= WINDOW_MASK << 2 * WINDOW_BITS;
}

#endif
