/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Published ports: what comes in is written down, and what goes out to where
 * something came from is an answer.
 */
#ifndef BH_PUBLISHED_H
#define BH_PUBLISHED_H

#include "maps.h"
#include "parse.h"

/* The published port of a head that has this number, NULL if there is none. */
static __always_inline const struct bh_published *published(const struct bh_head *h, __u16 port, __u32 proto)
{
	__u32 i;

	for (i = 0; i < BH_MAX_PUBLISHED && i < h->published; i++)
		if (h->ports[i].port == port && h->ports[i].proto == proto)
			return &h->ports[i];
	return NULL;
}

static __always_inline void inbound_key(struct bh_inbound *k, const struct bh_slot *s, __u32 slot, __u16 local,
					__u16 remote, const struct bh_packet *p)
{
	__builtin_memset(k, 0, sizeof(*k));
	k->gen = s->epoch;
	k->slot = slot;
	k->local = local;
	k->remote = remote;
	k->proto = p->proto;
	k->addr = *(const struct bh_addr *)&p->other.family;
}

/*
 * Whether a packet of the sandbox answers a connection to a published port; then
 * under which rule. What opens a connection is no answer: whoever asked may have
 * asked in another's name. Nor is what comes long after the last packet from there.
 */
static __always_inline int is_answer(const struct bh_slot *s, __u32 slot, __u32 policy, const struct bh_packet *p,
				     __u64 now, __u32 *rule)
{
	struct bh_head *h = bpf_map_lookup_elem(&heads, &policy);
	const struct bh_published *port;
	struct bh_inbound k;
	__u64 *seen;

	if (!h || !h->published || p->opens)
		return 0;
	port = published(h, p->sport, p->proto);
	if (!port)
		return 0;
	inbound_key(&k, s, slot, p->sport, p->port, p);
	seen = bpf_map_lookup_elem(&inbound, &k);
	if (!seen || now > *seen + BH_INBOUND_IDLE)
		return 0;
	*rule = port->rule;
	return 1;
}

/*
 * Writes down a connection to a published port. It must be certain that the
 * outside began it: what answers the sandbox would keep a flow open whose rule
 * has gone. The first segment of TCP says so itself, and otherwise the mark of
 * the host's connection tracker.
 */
static __always_inline void note_inbound(struct __sk_buff *skb, const struct bh_slot *s, __u32 slot,
					 const struct bh_packet *p)
{
	__u32 policy = (__u32)*(volatile const __u64 *)&s->policy, zero = 0;
	struct bh_head *h = bpf_map_lookup_elem(&heads, &policy);
	struct bh_state *st;
	struct bh_inbound k;
	__u64 now, *seen;

	if (!h || !h->published)
		return;
	if (!p->opens && (skb->mark & BH_MARK_MASK) != BH_MARK_INBOUND)
		return;
	if (!published(h, p->port, p->proto))
		return;
	st = bpf_map_lookup_elem(&state, &zero);
	now = st ? st->tick : 0;
	inbound_key(&k, s, slot, p->port, p->sport, p);
	seen = bpf_map_lookup_elem(&inbound, &k);
	if (seen)
		*seen = now;
	else
		bpf_map_update_elem(&inbound, &k, &now, BPF_ANY);
}

#endif
