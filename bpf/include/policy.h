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

static __always_inline void lpm_key(struct bh_lpm_key *key, const union bh_addr *a, __u32 v6)
{
	key->prefixlen = 8 * (sizeof(*key) - offsetof(struct bh_lpm_key, family));
	if (v6) {
		key->family = bpf_htonl(6);
		__builtin_memcpy(key->addr, a->b, sizeof(key->addr));
		return;
	}
	key->family = bpf_htonl(4);
	__builtin_memset(key->addr, 0, sizeof(key->addr));
	__builtin_memcpy(key->addr, &a->w[3], sizeof(a->w[3]));
}

/* The reason why no policy can open an address, BH_ALLOWED if there is none. */
static __always_inline __u32 hard_denied(const struct bh_lpm_key *key)
{
	enum bh_reason *reason = bpf_map_lookup_elem(&hard_deny, key);

	return reason ? *reason : BH_ALLOWED;
}

static __always_inline int is_slot_addr(const struct bh_slot *s, const union bh_addr *a, __u32 v6)
{
	if (v6)
		return (s->has & BH_HAS_ADDR6) && a->d[0] == s->addr6[0] && a->d[1] == s->addr6[1];
	return (s->has & BH_HAS_ADDR4) && a->w[3] == s->addr4;
}

/*
 * Judges a frame that the sandbox of slot s sent. v->reason is BH_ALLOWED only
 * if an allow rule matched. p->segments and p->bytes are set in any case.
 */
static __always_inline void judge(struct __sk_buff *skb, const struct bh_slot *s, struct bh_packet *p,
				  struct bh_verdict *v)
{
	struct bh_policy_entry *e;
	struct bh_lpm_key key;
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

	v->reason = BH_SPOOF_IP;
	if (!is_slot_addr(s, &p->src, p->v6))
		return;

	lpm_key(&key, &p->dst, p->v6);
	v->reason = hard_denied(&key);
	if (v->reason)
		return;

	v->reason = BH_NO_POLICY;
	v->policy = *(volatile const __u32 *)&s->policy;
	trie = bpf_map_lookup_elem(&policies, &v->policy);
	if (!trie)
		return;
	v->reason = BH_NO_RULE_MATCHED;
	e = bpf_map_lookup_elem(trie, &key);
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
	struct bh_lpm_key key;
	__u32 reason;

	p->segments = 1;
	p->bytes = skb->len - sizeof(struct ethhdr);
	reason = parse_lenient(skb, p);
	if (reason)
		return reason;
	if (!is_slot_addr(s, &p->dst, p->v6))
		return BH_IN_DESTINATION;
	lpm_key(&key, &p->src, p->v6);
	switch (hard_denied(&key)) {
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
