/* choose.h and outcome.h as a library of this machine: one set, its maps are arrays, time is told. */
#include <stdbool.h>
#include <stddef.h>
#include <linux/types.h>

#undef __always_inline
#define __always_inline inline __attribute__((always_inline, unused))
#define HAVE_COMPARE_AND_SWAP
#include "abi.h"

static __u64 now_ns;

static __u64 bpf_ktime_get_coarse_ns(void)
{
	return now_ns;
}

#include "atomic.h"

#define FIRST 3 /* slot of the set */
#define SLOTS 64
#define MAP(type, name, elements)                                        \
	static type name##_array[elements];                                 \
	static type *name##_at(__u32 *key)                               \
	{                                                                \
		return *key < (elements) ? &name##_array[*key] : 0;         \
	}                                                                \
	static struct {                                                  \
		type *(*lookup)(__u32 *);                                \
	} name = { name##_at }

MAP(struct slot, slots, SLOTS);
MAP(struct share, shares, SLOTS);
MAP(struct load, load, SLOTS);
MAP(struct line, maglev, 512);
MAP(struct policy, policies, 2);
MAP(__u64, turns, 1);

struct destination {
	struct service *service;
	__u64 set;
	__u32 id;
};

static void count(__u32 counter)
{
	(void)counter;
}

#include "outcome.h"
#include "choose.h"

static struct service service = { .owner = 1 };
static struct destination to = { .service = &service };

void start(__u32 endpoints, __u8 algorithm, const struct policy *policy)
{
	__builtin_memset(load_array, 0, sizeof(load_array));
	turns_array[0] = 1; /* begun */
	policies_array[1] = *policy;
	for (__u32 i = 0; i < endpoints; i++) {
		slots_array[FIRST + i].endpoint = i;
		load_array[i].owner = 1;
		shares_array[FIRST + i].weight = USUAL_WEIGHT;
	}
	service.algorithm = algorithm;
	to.set = (__u64)endpoints << 32 | FIRST;
}

void use_table(const __u16 *places, __u32 entries)
{
	for (__u32 i = 0; i < entries; i++)
		maglev_array[1 + i / 32].place[i % 32] = places[i];
	service.inside = (__u64)entries << 32 | 1;
}

/* The place in the set, or -1. */
int choose_at(__u64 now, __u64 random, __u64 client)
{
	struct slot *slot;

	now_ns = now;
	slot = choose_at_once(&to, random);
	if (!slot)
		slot = choose_slot(&to, mix(random), client);
	return slot ? (int)(slot - slots_array) - FIRST : -1;
}

void opened(__u32 place, __u32 connections)
{
	load_array[place].open += connections;
}

void ended(__u64 now, __u32 place, bool well, __u32 latency)
{
	now_ns = now;
	if (well)
		succeeded(&load_array[place], latency);
	else
		failed(&load_array[place], load_array[place].generation, WINDOW_CONNECT);
}

/* In the order of choices.Load. */
void known(__u32 place, __u64 *fields)
{
	const struct load *of = &load_array[place];

	fields[0] = of->open;
	fields[1] = of->latency;
	fields[2] = of->measured;
	fields[3] = of->until;
	fields[4] = connects_of(of->window);
	fields[5] = failures_of(of->window);
	fields[6] = ejections_of(of->window);
	fields[7] = of->streak;
}

__u64 ejected(void)
{
	return policies_array[1].ejected;
}
