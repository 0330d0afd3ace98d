/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The decision: sender, then hard denies, then the policy of the slot: its
 * addresses, then its names, then published ports. Deny is the last line.
 */
#ifndef BH_POLICY_H
#define BH_POLICY_H

#include "cache.h"
#include "maps.h"
#include "parse.h"
#include "published.h"

struct bh_verdict {
	__u32 reason;
	__u32 rule;
	__u32 policy;	/* index that was used, 0 if something decided before */
	__u32 audit;	/* the reason that it would have been dropped for */
	__u32 limited;	/* as in struct bh_port_rule */
	__u32 rate;	/* as in struct bh_port_rule */
};

/* The reason why no policy can open an address, BH_ALLOWED if there is none. */
static __always_inline __u32 hard_denied(const struct bh_lpm_key *key)
{
	__u32 zero = 0, first = key->addr[0] << 8 | key->addr[1], word = first / 64;
	struct bh_deny_filter *f;
	enum bh_reason *reason;

	/* The compiler knows that word is in bounds; before 6.6 the verifier may not. */
	barrier_var(word);
	word &= BH_FILTER_WORDS - 1;
	f = bpf_map_lookup_elem(&deny_filter, &zero);
	if (f && !(f->bits[word] >> first % 64 & 1))
		return BH_ALLOWED;
	reason = bpf_map_lookup_elem(&hard_deny, key);
	return reason ? *reason : BH_ALLOWED;
}

/* The first of count steps that matches. */
static __always_inline int find_step(const struct bh_port_rule *rules, __u32 count, const __u32 room,
				     const struct bh_packet *p, struct bh_port_rule *out)
{
	__u32 i;

	for (i = 0; i < room && i < count; i++) {
		const struct bh_port_rule *r = &rules[i];

		if (r->proto == p->proto && r->lo <= p->port && p->port <= r->hi) {
			*out = *r;
			return 1;
		}
	}
	return 0;
}

/* What the names of the destination say, and that they are in use. */
static __always_inline int learned_step(__u32 policy, const struct bh_packet *p, __u64 tick, struct bh_port_rule *out)
{
	void *table = bpf_map_lookup_elem(&learned, &policy);
	struct bh_learned *l;

	if (!table)
		return 0;
	l = bpf_map_lookup_elem(table, &p->other.family);
	if (!l)
		return 0;
	if (tick && l->used != tick)
		l->used = tick;
	return find_step(l->rules, l->count, BH_MAX_LEARNED_RULES, p, out);
}

static __noinline int follow(struct bh_verdict *v, const struct bh_port_rule *r, enum bh_step step)
{
	v->rule = r->rule;
	v->limited = r->limited;
	v->rate = r->rate;
	switch (step) {
	case BH_STEP_ALLOW:
		v->reason = BH_ALLOWED;
		return 0;
	case BH_STEP_AUDIT_DENY:
		v->reason = BH_ALLOWED;
		v->audit = BH_RULE_DENY;
		return 0;
	case BH_STEP_AUDIT:
		v->reason = BH_ALLOWED;
		v->audit = BH_NO_RULE_MATCHED;
		return 0;
	case BH_STEP_DENY:
		break;
	}
	v->reason = BH_RULE_DENY;
	return 0;
}

/* The steps of e that are not in it. One that is missing denies. */
static __noinline int more_steps(void *trie, const struct bh_policy_entry *e, const struct bh_packet *p,
				 struct bh_port_rule *out)
{
	struct bh_lpm_key key = {
		.prefixlen = BH_FAMILY_BITS + 128,
		.family = BH_FAMILY_MORE,
	};
	__u32 n, count = e->count;

	*(__u32 *)key.addr = e->more;
	for (n = 1; n < BH_MAX_PORT_RULES / BH_ENTRY_RULES && n * BH_ENTRY_RULES < count; n++) {
		struct bh_policy_entry *m;

		*(__u32 *)(key.addr + 4) = n;
		m = bpf_map_lookup_elem(trie, &key);
		if (!m) {
			out->step = BH_STEP_DENY;
			out->rule = BH_NO_RULE;
			return 1;
		}
		if (find_step(m->rules, count - n * BH_ENTRY_RULES, BH_ENTRY_RULES, p, out))
			return 1;
	}
	return 0;
}

/*
 * What the trie says. A step that lets pass for audit what no rule allows
 * waits for what the names say.
 */
static __always_inline int trie_step(void *trie, const struct bh_packet *p, struct bh_port_rule *out)
{
	struct bh_policy_entry *e = bpf_map_lookup_elem(trie, &p->other);

	if (!e)
		return 0;
	if (find_step(e->rules, e->count, BH_ENTRY_RULES, p, out))
		return 1;
	return e->count > BH_ENTRY_RULES && more_steps(trie, e, p, out);
}

/* What the names, published ports and audit say where no address has decided. */
static __always_inline void ask_names(const struct bh_slot *s, __u32 slot, const struct bh_packet *p, __u64 now,
				      const int live, struct bh_verdict *v, struct bh_port_rule *step, int watched)
{
	struct bh_port_rule name = {};

	if (learned_step(v->policy, p, live ? now : 0, &name)) {
		if (name.step != BH_STEP_AUDIT || !watched)
			*step = name;
		watched = 1;
	}
	if (watched && step->step != BH_STEP_AUDIT) {
		follow(v, step, step->step);
		return;
	}
	if (is_answer(s, slot, v->policy, p, now, &v->rule)) {
		v->reason = BH_ALLOWED;
		v->limited = 1;
		return;
	}
	if (watched)
		follow(v, step, step->step);
}

/*
 * Judges a frame that the sandbox of slot s sent. v->reason is BH_ALLOWED only
 * if an allow rule matched, or if the policy only watches. p->segments and
 * p->bytes are set in any case. Only if live is set verdicts are remembered and
 * names marked as used.
 */
static __always_inline void judge(struct __sk_buff *skb, const struct bh_slot *s, __u32 slot,
				  const struct bh_state *st, struct bh_packet *p, struct bh_verdict *v, const int live)
{
	__u64 policy = *(volatile const __u64 *)&s->policy;
	__u32 gen = policy >> 32, deny_gen = *(volatile const __u32 *)&st->deny_gen;
	struct bh_port_rule step = {};
	struct bh_cached *c = NULL;
	void *trie;
	int found;

	v->rule = BH_NO_RULE;
	v->policy = 0;
	v->audit = 0;
	v->limited = 0;
	v->rate = 0;
	p->segments = 1;
	p->bytes = skb->len - sizeof(struct ethhdr);

	v->reason = parse_strict(skb, s, p);
	if (v->reason)
		return;
	measure(skb, 0, p);

	if (live) {
		c = cache_of(gen, p);
		if (c && cache_hit(c, gen, deny_gen, p, &step)) {
			v->policy = policy;
			v->rule = step.rule;
			v->limited = step.limited;
			v->rate = step.rate;
			return;
		}
	}
	v->reason = hard_denied(&p->other);
	if (v->reason)
		return;

	v->reason = BH_NO_POLICY;
	v->policy = policy;
	trie = bpf_map_lookup_elem(&policies, &v->policy);
	if (!trie)
		return;
	v->reason = BH_NO_RULE_MATCHED;
	found = trie_step(trie, p, &step);
	if (!found || step.step == BH_STEP_AUDIT) {
		ask_names(s, slot, p, st->tick, live, v, &step, found);
		return;
	}
	if (c && step.step == BH_STEP_ALLOW)
		cache_store(c, (__u64)gen << 32 | deny_gen, p, &step);
	follow(v, &step, step.step);
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
