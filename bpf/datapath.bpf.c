// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

//go:build ignore

/*
 * The programs on the host side of every sandbox's veth. README.md says what
 * they promise.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "account.h"
#include "event.h"
#include "limits.h"
#include "maps.h"
#include "parse.h"
#include "policy.h"
#include "published.h"

/* Of a TCX program, and of one of clsact: go on with the next program, then the stack; or drop. */
#define BH_NEXT (-1)
#define BH_DROP 2

/*
 * The slot of the link that skb is on. The link decides. MACs of sandboxes end
 * in the slot's number, so mac says where to look first; that spares a hash.
 */
static __always_inline struct bh_slot *slot_of(struct __sk_buff *skb, __u32 mac, __u32 *slot)
{
	__u8 *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u32 ifindex = skb->ifindex;
	struct bh_slot *s;
	__u32 *found;

	if (data + sizeof(struct ethhdr) <= end) {
		*slot = data[mac + 3] << 16 | data[mac + 4] << 8 | data[mac + 5];
		s = bpf_map_lookup_elem(&slots, slot);
		if (s && s->ifindex == ifindex)
			return s;
	}
	found = bpf_map_lookup_elem(&links, &ifindex);
	if (!found)
		return NULL;
	*slot = *found;
	s = bpf_map_lookup_elem(&slots, slot);
	if (!s || s->ifindex != ifindex)
		return NULL;
	return s;
}

static __always_inline const struct bh_state *state_of(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&state, &zero);
}

/* Counts a packet that does not pass, and says so. s is NULL if no slot has the link. */
static __always_inline int drop(const struct bh_state *st, const struct bh_slot *s, __u32 slot, __u32 reason, __u32 rule,
				__u8 inbound, const struct bh_packet *p)
{
	struct bh_count *c = count_reason(slot, reason, p);

	if (c && is_news(c, st)) {
		struct bh_event e = {
			.slot = slot,
			.epoch = s ? s->epoch : 0,
			.rule = rule,
			.cpu = BH_ALL_CPUS,
			.reason = reason,
			.inbound = inbound,
		};

		emit(&e, p, c);
	}
	return BH_DROP;
}

static __always_inline int drop_unknown(struct __sk_buff *skb, const struct bh_state *st, __u8 inbound)
{
	struct bh_packet p = {
		.segments = 1,
		.bytes = skb->len - sizeof(struct ethhdr),
	};

	return drop(st, NULL, 0, BH_UNKNOWN_LINK, BH_NO_RULE, inbound, &p);
}

/* Counts a packet that passes, and says so. */
static __always_inline int pass(const struct bh_state *st, const struct bh_slot *s, __u32 slot,
				const struct bh_packet *p, const struct bh_verdict *v)
{
	struct bh_count *c;

	count_egress(slot, p);
	if (v->audit)
		count_audited(s, slot, v->rule, p);
	if (v->rule != BH_NO_RULE)
		c = count_rule(v->rule, p);
	else
		c = count_reason(slot, BH_ALLOWED, p);
	if (c && is_news(c, st)) {
		struct bh_event e = {
			.slot = slot,
			.epoch = s->epoch,
			.rule = v->rule,
			.cpu = v->rule == BH_NO_RULE ? BH_ALL_CPUS : bpf_get_smp_processor_id(),
			.audit = v->audit,
		};

		emit(&e, p, c);
	}
	return BH_NEXT;
}

/* What a sandbox sends. */
SEC("tcx/ingress")
int from_sandbox(struct __sk_buff *skb)
{
	const struct bh_state *st = state_of();
	struct bh_packet p = {};
	struct bh_verdict v;
	struct bh_slot *s;
	__u32 slot;

	if (!st)
		return BH_DROP;
	s = slot_of(skb, offsetof(struct ethhdr, h_source), &slot);
	if (!s)
		return drop_unknown(skb, st, 0);
	judge(skb, s, slot, st, &p, &v, 1);
	if (v.reason == BH_ALLOWED)
		v.reason = limit(slot, &v, &p, 1);
	if (v.reason == BH_ALLOWED) {
		skb->mark = BH_MARK | (slot & 0xffff);
		return pass(st, s, slot, &p, &v);
	}
	if (v.reason == BH_RULE_DENY)
		count_rule(v.rule, &p);
	return drop(st, s, slot, v.reason, v.rule, 0, &p);
}

/* What a sandbox gets. */
SEC("tcx/egress")
int to_sandbox(struct __sk_buff *skb)
{
	const struct bh_state *st = state_of();
	struct bh_packet p = {};
	struct bh_slot *s;
	__u32 slot, reason;

	if (!st)
		return BH_DROP;
	s = slot_of(skb, offsetof(struct ethhdr, h_dest), &slot);
	if (!s)
		return drop_unknown(skb, st, 1);
	reason = judge_ingress(skb, s, &p);
	if (reason == BH_ALLOWED) {
		note_inbound(skb, s, slot, &p);
		count_ingress(slot, &p);
		return BH_NEXT;
	}
	return drop(st, s, slot, reason, BH_NO_RULE, 1, &p);
}

/*
 * What from_sandbox would do with a frame of the slot in cb: the same code on
 * the same maps, but nothing is counted, remembered or used up. It is never
 * attached; user space runs it and reads the answer from cb.
 */
SEC("tc")
int explain(struct __sk_buff *skb)
{
	const struct bh_state *st = state_of();
	struct bh_packet p = {};
	struct bh_verdict v;
	struct bh_slot *s;
	__u32 slot = skb->cb[BH_CB_SLOT];

	skb->cb[BH_CB_REASON] = BH_UNKNOWN_LINK;
	skb->cb[BH_CB_RULE] = BH_NO_RULE;
	skb->cb[BH_CB_AUDIT] = 0;
	s = bpf_map_lookup_elem(&slots, &slot);
	if (!st || !s || !s->ifindex)
		return BH_DROP;
	judge(skb, s, slot, st, &p, &v, 0);
	if (v.reason == BH_ALLOWED)
		v.reason = limit(slot, &v, &p, 0);
	skb->cb[BH_CB_REASON] = v.reason;
	skb->cb[BH_CB_RULE] = v.rule;
	skb->cb[BH_CB_POLICY] = v.policy;
	skb->cb[BH_CB_AUDIT] = v.audit;
	if (v.reason == BH_ALLOWED)
		return BH_NEXT;
	return BH_DROP;
}

char _license[] SEC("license") = "Dual BSD/GPL";
