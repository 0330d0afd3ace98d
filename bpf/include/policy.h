/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The decision: sender, then hard denies, then the policy of the slot. Deny is
 * the last line.
 */
#ifndef BH_POLICY_H
#define BH_POLICY_H

#include "maps.h"
#include "parse.h"

struct bh_verdict {
	__u32 reason;
	__u32 rule;
	__u32 policy;
};

/* The reason why no policy can open an address, BH_ALLOWED if there is none. */
static __always_inline __u32 hard_denied(const struct bh_lpm_key *key)
{
	__u32 zero = 0, first = key->addr[0] << 8 | key->addr[1];
	struct bh_deny_filter *f;
	enum bh_reason *reason;

	f = bpf_map_lookup_elem(&deny_filter, &zero);
	if (f && !(f->bits[first / 64] >> first % 64 & 1))
		return BH_ALLOWED;
	reason = bpf_map_lookup_elem(&hard_deny, key);
	return reason ? *reason : BH_ALLOWED;
}

/*
 * Judges a frame that the sandbox of slot s sent. v->reason is BH_ALLOWED only
 * if an allow rule matched. p->segments and p->bytes are set in any case.
 */
static __always_inline void judge(struct __sk_buff *skb, const struct bh_slot *s, struct bh_packet *p,
				  struct bh_verdict *v)
{
	struct bh_policy_entry *e;
	void *trie;
	__u32 i;

	v->rule = BH_NO_RULE;
	v->policy = 0;
	p->segments = 1;
	p->bytes = skb->len - sizeof(struct ethhdr);

	v->reason = parse_strict(skb, s, p);
	if (v->reason)
		return;
	measure(skb, 0, p);

	v->reason = hard_denied(&p->other);
	if (v->reason)
		return;

	v->reason = BH_NO_POLICY;
	v->policy = *(volatile const __u32 *)&s->policy;
	trie = bpf_map_lookup_elem(&policies, &v->policy);
	if (!trie)
		return;
	v->reason = BH_NO_RULE_MATCHED;
	e = bpf_map_lookup_elem(trie, &p->other);
	if (!e)
		return;
	for (i = 0; i < BH_MAX_PORT_RULES && i < e->count; i++) {
		const struct bh_port_rule *r = &e->rules[i];

		if (r->proto == p->proto && r->lo <= p->port && p->port <= r->hi) {
			v->rule = r->rule;
			v->reason = r->deny ? BH_RULE_DENY : BH_ALLOWED;
			return;
		}
	}
}

/*
 * Judges a packet on its way to the sandbox of slot s. Whether it answers
 * something that the sandbox sent is for the connection tracker; here it must
 * only not come from where nothing honest comes from.
 */
static __always_inline __u32 judge_ingress(struct __sk_buff *skb, const struct bh_slot *s, struct bh_packet *p)
{
	__u32 reason;

	p->segments = 1;
	p->bytes = skb->len - sizeof(struct ethhdr);
	reason = parse_lenient(skb, s, p);
	if (reason)
		return reason;
	switch (hard_denied(&p->other)) {
	case BH_ALLOWED:
	case BH_HOST: /* its ICMP errors: path MTU */
	case BH_HOST_NETWORK:
		return BH_ALLOWED;
	case BH_SANDBOX:
		return BH_IN_SANDBOX;
	}
	return BH_IN_SOURCE;
}

#endif
