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

static __always_inline void add(struct bh_count *c, const struct bh_packet *p)
{
	__sync_fetch_and_add(&c->packets, p->segments);
	__sync_fetch_and_add(&c->bytes, p->bytes);
}

/* Counts a hit of a rule and answers its counter, that of this CPU. */
static __always_inline struct bh_count *count_rule(__u32 rule, const struct bh_packet *p)
{
	__u32 page = rule / BH_RULES_PER_PAGE, offset = rule % BH_RULES_PER_PAGE;
	struct bh_count *c;
	void *counters;

	counters = bpf_map_lookup_elem(&rule_counters, &page);
	if (!counters)
		return NULL;
	c = bpf_map_lookup_elem(counters, &offset);
	if (c)
		add(c, p);
	return c;
}

/*
 * Counts a packet under a reason and answers the counter, which all CPUs share.
 * Under BH_ALLOWED is what passed for audit and by no rule.
 */
static __always_inline struct bh_count *count_reason(__u32 slot, __u32 reason, const struct bh_packet *p)
{
	struct bh_drops *d = bpf_map_lookup_elem(&drops, &slot);

	if (!d || reason >= BH_REASON_ROOM)
		return NULL;
	add(&d->by_reason[reason], p);
	return &d->by_reason[reason];
}

/* Notes a packet that passes only because its policy watches. */
static __noinline int count_audited(const struct bh_slot *s, __u32 slot, __u32 rule, const struct bh_packet *p)
{
	struct bh_audit_key k = {
		.slot = slot,
		.epoch = s->epoch,
		.rule = rule,
		.port = p->port,
		.proto = p->proto,
		.addr = *(const struct bh_addr *)&p->other.family,
	};
	struct bh_count first = { .packets = p->segments, .bytes = p->bytes };
	struct bh_count *c = bpf_map_lookup_elem(&audited, &k);

	if (!c) {
		if (!bpf_map_update_elem(&audited, &k, &first, BPF_NOEXIST))
			return 0;
		c = bpf_map_lookup_elem(&audited, &k); /* another CPU was first */
	}
	if (c)
		add(c, p);
	return 0;
}

#endif
