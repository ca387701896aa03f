/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* One endpoint of a set for a socket, as service.algorithm says. */
#ifndef POINTSMAN_CHOOSE_H
#define POINTSMAN_CHOOSE_H

#define DRAWS 4 /* by chance; then one after the other is asked */
#define ASKED 20 /* at most */
#define NEVER ((__u64)-1)
#define AT_ONCE 0ULL
#define NOBODY ((__u32)-1)

enum { NO, IF_NEED_BE, YES };

/* What a choice is made of. `random` is used up from draw to draw. */
struct chooser {
	__u64 set;
	__u64 random;
	struct service *service;
	__u32 id;
};

/*
 * Read anew wherever it is asked: what the verifier learns of it at one place it would carry through all
 * that follows, and so verify that once for each combination of bits, some ten times as much.
 */
static __always_inline __u8 choice_of(const struct chooser *by)
{
	return *(volatile __u8 *)&by->service->algorithm;
}

static __always_inline bool is_p2c(const struct chooser *by)
{
	__u8 algorithm = choice_of(by) & ALGORITHM_MASK;

	return algorithm == ALGORITHM_LEAST_CONNECTIONS || algorithm == ALGORITHM_PEAK_EWMA;
}

static __always_inline __u64 next_random(struct chooser *by)
{
	__u64 x = by->random;

	by->random = mix(x + 0x9e3779b97f4a7c15ULL);
	return x;
}

/*
 * The index of a slot: by the high half of a random number, and with weights by the low half. `anywhere`: in
 * any zone, where zones count.
 */
static __always_inline __u32 draw(const struct chooser *by, bool anywhere, __u64 random)
{
	__u32 first = (__u32)by->set, count = by->set >> 32;
	__u32 index = first + (__u32)((random >> 32) * count >> 32);
	struct share *share;
	__u64 alias;

	if (!(choice_of(by) & CHOICE_WEIGHTED) || (anywhere && choice_of(by) & CHOICE_ZONE))
		return index;
	share = shares.lookup(&index);
	if (!share)
		return index;
	alias = *(volatile __u64 *)&share->keep;
	return (__u32)random >= (__u32)alias ? first + (__u32)(alias >> 32) : index;
}

/* The next one round, or with weights the next of a sequence that leaves no gaps. */
static __always_inline __u32 next_in_turn(const struct chooser *by)
{
	__u64 turn, *turn_of;
	__u32 id = by->id;

	turn_of = turns.lookup(&id);
	if (!turn_of)
		return (__u32)by->set;
	/* Nodes that begin alike would go on alike, all at one endpoint after the other. */
	if (!*turn_of)
		replace(turn_of, 0, mix(by->random) | 1);
	turn = fetch_and_add(turn_of, 1);
	if (!(choice_of(by) & CHOICE_WEIGHTED))
		return (__u32)by->set + turn % (by->set >> 32);
	return draw(by, false,
		    (turn * 0xc13fa9a902a6328fULL & 0xffffffff00000000ULL) |
			    turn * 0x91e10da5c79e7b1dULL >> 32);
}

/* The place that the table has for a client, or any. */
static __always_inline __u32 by_table(struct chooser *by, __u64 client)
{
	__u64 table = *(volatile __u64 *)&by->service->inside;
	__u32 entries = table >> 32, count = by->set >> 32, place, index;
	__u32 hash = mix(client ^ (__u64)by->service->owner << 32) >> 32;
	struct line *line;

	if (entries) {
		place = (__u64)hash * entries >> 32;
		index = (__u32)table + place / 32;
		line = maglev.lookup(&index);
		/* The set may have been switched a moment ago: a place that it lacks is not used. */
		if (line && line->place[place & 31] < count)
			return (__u32)by->set + line->place[place & 31];
	}
	return draw(by, false, (__u64)hash << 32 | (__u32)mix(hash));
}

/* Whoever finds the time of an ejection over tries the endpoint; others wait for what comes of it. */
static __always_inline bool takes_trial(struct load *load_of, const struct policy *how)
{
	__u64 until = load_of->until, now = coarse_time();

	if (!until || now < until)
		return false;
	return swap(&load_of->until, until, (now + how->trial) | UNTIL_TRIAL);
}

/* The less the better: AT_ONCE before all others, NEVER not at all. */
static __always_inline __u64 cost_of(const struct chooser *by, struct policy *policy, __u32 index,
				     __u32 endpoint)
{
	struct load *load_of = load.lookup(&endpoint);
	__u64 cost, latency;
	struct share *share;
	__u32 open, streak, weight;

	if (!load_of)
		return NEVER;
	open = (__s32)load_of->open < 0 ? 0 : load_of->open;
	if (policy) {
		if (policy->max_connections && open >= policy->max_connections)
			return NEVER;
		if (choice_of(by) & CHOICE_AVOID && load_of->until)
			return takes_trial(load_of, policy) ? AT_ONCE : NEVER;
	}
	cost = open + 1;
	if (choice_of(by) & CHOICE_WEIGHTED) {
		share = shares.lookup(&index);
		weight = share ? share->weight & (WEIGHT_ELSEWHERE - 1) : 0;
		if (!weight)
			return NEVER;
		/* Who is idle costs the same whatever he weighs: he was drawn by his weight. */
		cost = (__u64)open * MAX_WEIGHT / weight + MAX_WEIGHT / USUAL_WEIGHT;
	}
	if ((choice_of(by) & ALGORITHM_MASK) == ALGORITHM_PEAK_EWMA) {
		latency = load_of->latency;
		/* Nothing known: one connection finds out, the others wait for it. */
		if (!latency)
			latency = open ? SLOW_US : 1;
		else
			latency = faded(latency, load_of->measured, coarse_time());
		cost *= latency + 1;
	}
	/* Who refuses has few connections open: it must not look idle. */
	streak = load_of->streak;
	if (streak) {
		streak = 1 << (streak < 8 ? streak : 8);
		cost *= 1 + faded(streak, load_of->measured, coarse_time());
	}
	return cost;
}

/* Connections above what its zone takes go anywhere: the more there are, the likelier. */
static __always_inline bool spills_over(struct policy *policy, __u32 endpoint, __u32 random)
{
	struct load *load_of = load.lookup(&endpoint);
	__u32 open;

	if (!load_of || !policy)
		return false;
	open = load_of->open;
	return (__s32)open > (__s32)policy->room && (__u64)random * open >> 32 >= policy->room;
}

/* YES if it is neither full nor ejected, and of some weight; IF_NEED_BE if it is only ejected. */
static __always_inline int may_be_taken(const struct chooser *by, struct policy *policy, __u32 index,
					__u32 endpoint)
{
	struct load *load_of = load.lookup(&endpoint);
	struct share *share;

	if (!load_of)
		return NO;
	/* Asked also where all are alike: one way through here is less to verify than two. */
	share = shares.lookup(&index);
	if (!share || !share->weight)
		return NO;
	if (policy->max_connections && (__s32)load_of->open >= (__s32)policy->max_connections)
		return NO;
	if (!(choice_of(by) & CHOICE_AVOID) || !load_of->until || takes_trial(load_of, policy))
		return YES;
	return IF_NEED_BE;
}

/* What comes next by chance, then one after the other, until one may be taken; if there is none `found`. */
static __always_inline struct slot *take_another(struct chooser *by, __u32 found)
{
	__u32 first = (__u32)by->set, length = by->set >> 32, index = first;
	struct policy *policy = policy_of(by->service->owner);
	struct slot *slot;
	int may;

	if (!policy)
		return NULL;
#pragma nounroll
	for (int i = 0; i < ASKED; i++) {
		index = i < DRAWS ? draw(by, true, next_random(by)) : index + 1;
		if (index - first >= length)
			index = first;
		slot = slots.lookup(&index);
		if (!slot)
			break;
		may = may_be_taken(by, policy, index, slot->endpoint);
		/* A set may have shrunk to those that are ejected. */
		if (may != NO)
			found = index;
		if (may == YES)
			break;
	}
	slot = slots.lookup(&found);
	if (!slot)
		count(COUNTER_ALL_FULL);
	return slot;
}

/* With weights the same one may well be drawn twice, else the next stands for it. */
static __always_inline struct slot *choose_by(struct chooser *by, __u32 index)
{
	__u32 first = (__u32)by->set, length = by->set >> 32, second, spare = NOBODY;
	struct slot *slot = slots.lookup(&index), *other;
	struct policy *policy = NULL;
	__u64 cost, cost_other;

	if (!slot)
		return NULL;
	if (choice_of(by) & CHOICE_POLICY)
		policy = policy_of(by->service->owner);
	if (is_p2c(by)) {
		second = draw(by, false, next_random(by));
		if (second == index && !(choice_of(by) & CHOICE_WEIGHTED) && ++second - first >= length)
			second = first;
		other = slots.lookup(&second);
		if (!other)
			return NULL;
		cost = cost_of(by, policy, index, slot->endpoint);
		cost_other = cost_of(by, policy, second, other->endpoint);
		if (cost_other < cost) {
			slot = other;
			index = second;
			cost = cost_other;
		}
		if (cost == NEVER)
			slot = NULL;
	} else if (policy && may_be_taken(by, policy, index, slot->endpoint) != YES) {
		slot = NULL;
	}
	if (slot && choice_of(by) & CHOICE_ZONE &&
	    spills_over(policy, slot->endpoint, next_random(by) >> 32)) {
		slot = NULL;
		spare = index;
	}
	if (slot)
		return slot;
	/* What the zone can't take goes anywhere. */
	return take_another(by, spare);
}

/*
 * Least connections and nothing else, as most Services have it: of two endpoints that had no failure of late
 * the one with fewer open connections. NULL if there is more to think about.
 */
static __always_inline struct slot *fewer_open(__u64 set, __u64 random)
{
	__u32 first = (__u32)set, length = set >> 32, one, two, endpoint;
	struct slot *slot, *other;
	struct load *a, *b;

	one = first + (__u32)((random >> 32) * length >> 32);
	two = first + (__u32)((__u64)(__u32)random * length >> 32);
	if (two == one && ++two - first >= length)
		two = first;
	slot = slots.lookup(&one);
	other = slots.lookup(&two);
	if (!slot || !other)
		return NULL;
	endpoint = slot->endpoint;
	a = load.lookup(&endpoint);
	endpoint = other->endpoint;
	b = load.lookup(&endpoint);
	if (!a || !b || a->streak | b->streak)
		return NULL;
	return (__s32)b->open < (__s32)a->open ? other : slot;
}

/* One endpoint of a set, by a random number. NULL only if the set reaches out of the map. */
static __always_inline struct slot *pick(__u64 set, __u32 random)
{
	__u32 index = (__u32)set + (__u32)(((set >> 32) * random) >> 32);

	return slots.lookup(&index);
}

/* Most Services need no more than this. NULL: choose_slot() is to choose. */
static __always_inline struct slot *choose_at_once(const struct destination *to, __u64 random)
{
	switch (to->service->algorithm) {
	case ALGORITHM_RANDOM:
		return pick(to->set, random >> 32);
	case ALGORITHM_LEAST_CONNECTIONS:
		return fewer_open(to->set, random);
	}
	return NULL;
}

/* One endpoint of the set that find_destination() found. `random` is 64 random bits, `client` stands for
 * whoever asks. NULL if all are full. */
static __always_inline struct slot *choose_slot(const struct destination *to, __u64 random, __u64 client)
{
	struct chooser by = { to->set, random, to->service, to->id };
	__u32 index;

	switch (choice_of(&by) & ALGORITHM_MASK) {
	case ALGORITHM_ROUND_ROBIN:
		index = next_in_turn(&by);
		break;
	case ALGORITHM_MAGLEV:
		index = by_table(&by, client);
		break;
	default:
		index = draw(&by, false, next_random(&by));
	}
	return choose_by(&by, index);
}

#endif
