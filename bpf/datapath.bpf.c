// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

//go:build ignore

/*
 * The programs on the host side of every sandbox's veth. README.md says what
 * they promise.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "account.h"
#include "maps.h"
#include "parse.h"
#include "policy.h"

/* Of a TCX program: go on with the next program, then the stack; or drop. */
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

static __always_inline int drop_unknown(struct __sk_buff *skb)
{
	struct bh_packet p = {
		.segments = 1,
		.bytes = skb->len - sizeof(struct ethhdr),
	};

	count_drop(0, BH_UNKNOWN_LINK, &p);
	return BH_DROP;
}

/* What a sandbox sends. */
SEC("tcx/ingress")
int from_sandbox(struct __sk_buff *skb)
{
	struct bh_packet p = {};
	struct bh_verdict v;
	struct bh_slot *s;
	__u32 slot;

	s = slot_of(skb, offsetof(struct ethhdr, h_source), &slot);
	if (!s)
		return drop_unknown(skb);
	judge(skb, s, &p, &v);
	if (v.rule != BH_NO_RULE)
		count_rule(v.rule, &p);
	if (v.reason == BH_ALLOWED) {
		count_egress(slot, &p);
		skb->mark = BH_MARK | (slot & 0xffff);
		return BH_NEXT;
	}
	count_drop(slot, v.reason, &p);
	return BH_DROP;
}

/* What a sandbox gets. */
SEC("tcx/egress")
int to_sandbox(struct __sk_buff *skb)
{
	struct bh_packet p = {};
	struct bh_slot *s;
	__u32 slot, reason;

	s = slot_of(skb, offsetof(struct ethhdr, h_dest), &slot);
	if (!s)
		return drop_unknown(skb);
	reason = judge_ingress(skb, s, &p);
	if (reason == BH_ALLOWED) {
		count_ingress(slot, &p);
		return BH_NEXT;
	}
	count_drop(slot, reason, &p);
	return BH_DROP;
}

/*
 * What from_sandbox would do with a frame of the slot in cb: the same code on
 * the same maps, but nothing is counted. It is never attached; user space runs
 * it and reads the answer from cb.
 */
SEC("tc")
int explain(struct __sk_buff *skb)
{
	struct bh_packet p = {};
	struct bh_verdict v;
	struct bh_slot *s;
	__u32 slot = skb->cb[BH_CB_SLOT];

	skb->cb[BH_CB_REASON] = BH_UNKNOWN_LINK;
	skb->cb[BH_CB_RULE] = BH_NO_RULE;
	s = bpf_map_lookup_elem(&slots, &slot);
	if (!s || !s->ifindex)
		return BH_DROP;
	judge(skb, s, &p, &v);
	skb->cb[BH_CB_REASON] = v.reason;
	skb->cb[BH_CB_RULE] = v.rule;
	skb->cb[BH_CB_POLICY] = v.policy;
	if (v.reason == BH_ALLOWED)
		return BH_NEXT;
	return BH_DROP;
}

char _license[] SEC("license") = "Dual BSD/GPL";
