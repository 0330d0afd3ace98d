/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Remembered verdicts of this CPU. Only what the trie allows is remembered, of
 * destinations that are not hard denied. An entry speaks for one generation of
 * one policy of one sandbox and for one set of hard denies; nothing needs to be
 * thrown away.
 */
#ifndef BH_CACHE_H
#define BH_CACHE_H

#include "maps.h"
#include "parse.h"

_Static_assert(BH_CACHED == 1024, "cache_of takes 10 bits");

/* Where the verdict about a packet would be. */
static __always_inline struct bh_cached *cache_of(__u32 gen, const struct bh_packet *p)
{
	const __u64 *a = (const __u64 *)p->other.addr;
	__u64 h = a[0] ^ (a[1] * 0x9e3779b97f4a7c15ull);
	__u32 i;

	h ^= (__u64)gen << 32 | (__u32)p->port << 8 | p->proto;
	i = h * 0xd6e8feb86659fd93ull >> 54;
	return bpf_map_lookup_elem(&cached, &i);
}

/*
 * Whether c is about this packet; then *out is the step. seq catches a writer
 * that this reader has interrupted, or was interrupted by.
 */
static __always_inline int cache_hit(struct bh_cached *c, __u32 gen, __u32 deny_gen, const struct bh_packet *p,
				     struct bh_port_rule *out)
{
	const __u32 *has = (const __u32 *)c->addr.addr, *a = (const __u32 *)p->other.addr;
	__u32 seq = *(volatile __u32 *)&c->seq;

	if (c->gen != gen || has[0] != a[0] || c->port != p->port || c->proto != p->proto)
		return 0;
	if (has[1] != a[1] || has[2] != a[2] || has[3] != a[3] || c->addr.family != p->other.family)
		return 0;
	if (c->deny_gen != deny_gen)
		return 0;
	*out = c->step;
	return !(seq & 1) && *(volatile __u32 *)&c->seq == seq;
}

/* Out of line: a miss has cost more already. */
static __noinline int cache_store(struct bh_cached *c, __u64 gens, const struct bh_packet *p,
				  const struct bh_port_rule *step)
{
	__u32 seq = *(volatile __u32 *)&c->seq;

	if (seq & 1 || __sync_val_compare_and_swap(&c->seq, seq, seq + 1) != seq)
		return 0;
	c->gen = gens >> 32;
	c->deny_gen = gens;
	c->port = p->port;
	c->proto = p->proto;
	c->addr = *(const struct bh_addr *)&p->other.family;
	c->step = *step;
	__sync_fetch_and_add(&c->seq, 1);
	return 0;
}

#endif
