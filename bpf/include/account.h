/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Counters. All additions are atomic, per-CPU ones too: on a kernel where
 * softirqs may nest a plain addition would be lost.
 */
#ifndef BH_ACCOUNT_H
#define BH_ACCOUNT_H

#include "maps.h"
#include "parse.h"

static __always_inline void count_egress(__u32 slot, const struct bh_packet *p)
{
	struct bh_counters *c = bpf_map_lookup_elem(&counters, &slot);

	if (!c)
		return;
	__sync_fetch_and_add(&c->egress_bytes, p->bytes);
	__sync_fetch_and_add(&c->egress_segments, p->segments);
}

static __always_inline void count_ingress(__u32 slot, const struct bh_packet *p)
{
	struct bh_counters *c = bpf_map_lookup_elem(&counters, &slot);

	if (!c)
		return;
	__sync_fetch_and_add(&c->ingress_bytes, p->bytes);
	__sync_fetch_and_add(&c->ingress_segments, p->segments);
}

static __always_inline void count_rule(__u32 rule, const struct bh_packet *p)
{
	__u32 page = rule / BH_RULES_PER_PAGE, offset = rule % BH_RULES_PER_PAGE;
	struct bh_count *c;
	void *counters;

	counters = bpf_map_lookup_elem(&rule_counters, &page);
	if (!counters)
		return;
	c = bpf_map_lookup_elem(counters, &offset);
	if (!c)
		return;
	__sync_fetch_and_add(&c->packets, p->segments);
	__sync_fetch_and_add(&c->bytes, p->bytes);
}

static __always_inline void count_drop(__u32 slot, __u32 reason, const struct bh_packet *p)
{
	struct bh_drops *d = bpf_map_lookup_elem(&drops, &slot);

	if (!d || reason >= BH_REASON_ROOM)
		return;
	__sync_fetch_and_add(&d->by_reason[reason].packets, p->segments);
	__sync_fetch_and_add(&d->by_reason[reason].bytes, p->bytes);
}

#endif
