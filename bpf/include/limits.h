/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Limits on what a policy allows: echoes, rates, budgets. A packet that any of
 * them stops uses up none of them.
 */
#ifndef BH_LIMITS_H
#define BH_LIMITS_H

#include "maps.h"
#include "parse.h"
#include "policy.h"

#define BH_NS_PER_SECOND 1000000000ull
#define BH_ECHO_NS (BH_NS_PER_SECOND / BH_ECHO_PER_SECOND)
#define BH_COST_SHIFT 20

/* What a CPU leases of a large budget; of a small one a 64th, so that little is left with others at its end. */
#define BH_LEASE_SHIFT 6
#define BH_LEASE_TRIES 8

/* Whether a bucket has room for a packet. */
static __always_inline int fits(const __u64 *tat, __u64 now, __u64 cost, __u64 burst)
{
	__u64 at = *(volatile const __u64 *)tat;

	return (at > now ? at : now) + cost <= now + burst;
}

/*
 * Puts a packet into a bucket. If another CPU comes between, it has just moved
 * the clock to now or later, and what remains is an addition.
 */
static __always_inline void fill(__u64 *tat, __u64 now, __u64 cost)
{
	__u64 at = *(volatile __u64 *)tat;

	if (at < now && __sync_val_compare_and_swap(tat, at, now + cost) == at)
		return;
	__sync_fetch_and_add(tat, cost);
}

static __always_inline __u64 cost_of(const struct bh_rate *r, const struct bh_packet *p)
{
	return p->bytes * r->cost >> BH_COST_SHIFT;
}

static __always_inline int rate_fits(__u32 id, __u64 now, const struct bh_packet *p)
{
	struct bh_rate *r = bpf_map_lookup_elem(&rates, &id);

	return r && fits(&r->tat, now, cost_of(r, p), r->burst);
}

static __always_inline void rate_fill(__u32 id, __u64 now, const struct bh_packet *p)
{
	struct bh_rate *r = bpf_map_lookup_elem(&rates, &id);

	if (r)
		fill(&r->tat, now, cost_of(r, p));
}

/* Takes bytes out of a budget that the lease of this CPU does not cover. */
static __noinline int lease_more(struct bh_budget *b, struct bh_lease *l, __u64 bytes)
{
	__u64 window = *(volatile __u64 *)&b->window;
	__s64 left, need, want;
	int i;

	if (l->window != window) {
		__sync_lock_test_and_set(&l->left, 0);
		l->window = window;
	}
	for (i = 0; i < BH_LEASE_TRIES; i++) {
		left = *(volatile __s64 *)&b->left;
		need = (__s64)bytes - *(volatile __s64 *)&l->left;
		if (left < need)
			return 0;
		want = left >> BH_LEASE_SHIFT;
		if (want > BH_LEASE_BYTES)
			want = BH_LEASE_BYTES;
		if (want < need)
			want = need;
		if (__sync_val_compare_and_swap(&b->left, left, left - want) == left) {
			__sync_fetch_and_add(&l->left, want - (__s64)bytes);
			return 1;
		}
	}
	return 0;
}

/* Takes a packet's bytes out of a budget. */
static __always_inline int budget_take(__u32 id, const struct bh_packet *p)
{
	struct bh_budget *b = bpf_map_lookup_elem(&budgets, &id);
	struct bh_lease *l = bpf_map_lookup_elem(&leases, &id);

	if (!b || !l)
		return 0;
	if (l->window == *(volatile __u64 *)&b->window && *(volatile __s64 *)&l->left >= (__s64)p->bytes) {
		__sync_fetch_and_add(&l->left, -(__s64)p->bytes);
		return 1;
	}
	return lease_more(b, l, p->bytes);
}

/* Gives back what budget_take took, to this CPU's lease. */
static __always_inline void budget_refund(__u32 id, const struct bh_packet *p)
{
	struct bh_lease *l = bpf_map_lookup_elem(&leases, &id);

	if (l)
		__sync_fetch_and_add(&l->left, (__s64)p->bytes);
}

/* Whether a budget has room for a packet sent by this CPU. */
static __always_inline int budget_fits(__u32 id, const struct bh_packet *p)
{
	struct bh_budget *b = bpf_map_lookup_elem(&budgets, &id);
	struct bh_lease *l = bpf_map_lookup_elem(&leases, &id);
	__s64 left;

	if (!b || !l)
		return 0;
	left = *(volatile __s64 *)&b->left;
	if (l->window == *(volatile __u64 *)&b->window)
		left += l->left;
	return left >= (__s64)p->bytes;
}

/* All budgets or none. */
static __always_inline int budgets_take(const struct bh_head *h, const struct bh_packet *p)
{
	__u32 i, taken;

	for (taken = 0; taken < BH_MAX_LEVELS; taken++) {
		if (!h->budgets[taken])
			return 1;
		if (!budget_take(h->budgets[taken], p))
			break;
	}
	if (taken == BH_MAX_LEVELS)
		return 1;
	for (i = 0; i < BH_MAX_LEVELS && i < taken; i++)
		budget_refund(h->budgets[i], p);
	return 0;
}

static __always_inline int budgets_fit(const struct bh_head *h, const struct bh_packet *p)
{
	__u32 i;

	for (i = 0; i < BH_MAX_LEVELS && h->budgets[i]; i++)
		if (!budget_fits(h->budgets[i], p))
			return 0;
	return 1;
}

static __always_inline int rates_fit(const struct bh_head *h, __u64 now, const struct bh_packet *p)
{
	__u32 i;

	for (i = 0; i < BH_MAX_LEVELS && h->rates[i]; i++)
		if (!rate_fits(h->rates[i], now, p))
			return 0;
	return 1;
}

static __always_inline void rates_fill(const struct bh_head *h, __u64 now, const struct bh_packet *p)
{
	__u32 i;

	for (i = 0; i < BH_MAX_LEVELS && h->rates[i]; i++)
		rate_fill(h->rates[i], now, p);
}

/* An echo request that a rule allows: its size, and the sandbox's bucket for all of them. */
static __always_inline __u32 echo_fits(const __u64 *tat, __u64 now, const struct bh_packet *p)
{
	if (p->bytes > BH_ECHO_BYTES)
		return BH_ECHO_SIZE;
	if (!tat || !fits(tat, now, BH_ECHO_NS, BH_NS_PER_SECOND))
		return BH_ECHO_RATE;
	return BH_ALLOWED;
}

/*
 * Which limit stops a packet that a policy allows; BH_ALLOWED if none does. With
 * take the packet uses them up. The verifier reads this function by itself, once,
 * which keeps what it reads of the programs short.
 */
__noinline int stopped_by(__u32 slot, const struct bh_verdict *v, const struct bh_packet *p, int take)
{
	__u64 *echo = NULL, now;
	struct bh_head *h = NULL;
	__u32 policy, why;

	if (!v || !p)
		return BH_RATE;
	now = bpf_ktime_get_coarse_ns();
	if (p->proto == IPPROTO_ICMP) {
		echo = bpf_map_lookup_elem(&echoes, &slot);
		why = echo_fits(echo, now, p);
		if (why)
			return why;
	}
	if (v->rate && !rate_fits(v->rate, now, p))
		return BH_RATE;
	if (v->limited) {
		policy = v->policy;
		h = bpf_map_lookup_elem(&heads, &policy);
		if (!h || !rates_fit(h, now, p))
			return BH_RATE;
		if (!(take ? budgets_take(h, p) : budgets_fit(h, p)))
			return BH_BUDGET;
	}
	if (!take)
		return BH_ALLOWED;
	if (echo)
		fill(echo, now, BH_ECHO_NS);
	if (v->rate)
		rate_fill(v->rate, now, p);
	if (h)
		rates_fill(h, now, p);
	return BH_ALLOWED;
}

static __always_inline __u32 limit(__u32 slot, const struct bh_verdict *v, const struct bh_packet *p, int take)
{
	if (!v->limited && !v->rate && p->proto != IPPROTO_ICMP)
		return BH_ALLOWED;
	return stopped_by(slot, v, p, take);
}

#endif
