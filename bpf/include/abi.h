/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Everything that the programs share with user space: layout version, structs,
 * reasons. Whoever changes a struct, a key or the meaning of a field here
 * raises BH_LAYOUT_VERSION and the version directory of the pins; whoever adds
 * a reason appends it.
 */
#ifndef BH_ABI_H
#define BH_ABI_H

#include <stddef.h>
#include <linux/types.h>

#define BH_LAYOUT_VERSION 2

/* Mark of an allowed packet: BH_MARK in the upper half, slot in the lower. */
#define BH_MARK 0x62680000u

/*
 * Upper half of the mark of a packet on its way to a sandbox that belongs to a
 * connection which the outside began with a published port. nftables sets it.
 */
#define BH_MARK_INBOUND 0x62690000u
#define BH_MARK_MASK 0xffff0000u

#define BH_MAX_PORT_RULES 32
#define BH_MAX_LEARNED_RULES 16
#define BH_MAX_LEVELS 7 /* limits of one kind that one packet may meet: five tenants, the sandbox, the rule */
#define BH_MAX_PUBLISHED 8
#define BH_RULES_PER_PAGE 4096
#define BH_RULE_TEXT 500

/* No rule decided. */
#define BH_NO_RULE 0xffffffffu

#define BH_ASSERT_SIZE(type, size) \
	_Static_assert(sizeof(type) == (size), "layout of " #type " changed")

/*
 * Why a packet was dropped. The order is part of the layout: counters are
 * stored under these numbers.
 */
enum bh_reason {
	BH_ALLOWED = 0,

	/* the frame was not understood, or is of a kind that never passes */
	BH_UNKNOWN_LINK, /* counted under slot 0 */
	BH_VLAN,
	BH_ARP,
	BH_ETHERTYPE,
	BH_SHORT,
	BH_BAD_VERSION,
	BH_BAD_LENGTH,
	BH_IP_OPTIONS,
	BH_FRAGMENT,
	BH_EXT_HEADER,
	BH_PROTOCOL,
	BH_ICMP,
	BH_ICMP6,
	BH_NEIGHBOUR, /* neighbour and multicast listener discovery: noise of every IPv6 stack */

	/* the sender is not who the slot says it is */
	BH_SPOOF_MAC,
	BH_SPOOF_IP,

	/* hard denies: no policy can allow these destinations */
	BH_MAPPED, /* ::/64: IPv4-mapped, -compatible, -translated addresses, and nothing routable */
	BH_METADATA,
	BH_LINK_LOCAL,
	BH_LOOPBACK,
	BH_MULTICAST,
	BH_BROADCAST,
	BH_UNSPECIFIED,
	BH_RESERVED,
	BH_HOST,
	BH_HOST_NETWORK,
	BH_SANDBOX,

	/* the policy */
	BH_NO_POLICY,
	BH_NO_RULE_MATCHED,
	BH_RULE_DENY,

	/* towards the sandbox */
	BH_IN_MALFORMED,
	BH_IN_NOT_IP,
	BH_IN_DESTINATION, /* not an address of the sandbox */
	BH_IN_SANDBOX,	   /* from another sandbox */
	BH_IN_SOURCE,	   /* from an address that nothing honest uses */

	/* limits */
	BH_RATE,       /* a token bucket of the rule, the sandbox or a tenant is empty */
	BH_BUDGET,     /* a byte budget of the sandbox or a tenant is spent */
	BH_ECHO_SIZE,  /* an ICMP echo longer than BH_ECHO_BYTES */
	BH_ECHO_RATE,  /* more ICMP echoes than BH_ECHO_PER_SECOND */

	BH_REASONS, /* how many there are */
};

/* struct bh_drops has room for this many reasons. */
#define BH_REASON_ROOM 48
_Static_assert(BH_REASONS <= BH_REASON_ROOM, "raise BH_REASON_ROOM and the layout version");

#define BH_HAS_ADDR4 1
#define BH_HAS_ADDR6 2

/*
 * ICMP echo requests that a rule allows are bounded, or they would be a tunnel:
 * bytes of the IP packet, and packets a second of one sandbox.
 */
#define BH_ECHO_BYTES 576
#define BH_ECHO_PER_SECOND 10

/* One sandbox. */
struct bh_slot {
	__u32 ifindex;	 /* host side of its veth; 0: the slot is free and nothing passes */
	__u32 epoch;	 /* raised when the slot goes to another sandbox */
	/*
	 * What is in force, changed by one store: the generation of the policy in
	 * the upper half, its index into policies, learned and heads in the lower.
	 * Index 0: none, nothing passes. A generation is never used twice.
	 */
	__u64 policy;
	__u8 mac[6];	 /* of the sandbox */
	__u16 has;	 /* BH_HAS_ADDR* */
	__be32 addr4;	 /* of the sandbox */
	__u32 reserved;
	__be64 addr6[2]; /* of the sandbox */
	__u8 id[16]; /* of the sandbox, padded with zeros; only user space looks at it */
};
BH_ASSERT_SIZE(struct bh_slot, 64);

/*
 * Key of both tries. The family comes first, so that no IPv6 prefix, ::/0
 * neither, can match an IPv4 address.
 */
struct bh_lpm_key {
	__u32 prefixlen; /* BH_FAMILY_BITS + that of the address, host byte order */
	__be32 family;	 /* 4 or 6 */
	__u8 addr[16];	 /* network byte order; IPv4: the first 4, the others are zero */
};
BH_ASSERT_SIZE(struct bh_lpm_key, 24);

#define BH_FAMILY_BITS 32

/*
 * Which addresses need not be looked up in hard_deny. A clear bit proves that
 * no prefix there holds an address, of either family, that starts with these
 * 16 bits. A set bit proves nothing.
 */
#define BH_FILTER_WORDS 1024
struct bh_deny_filter {
	__u64 bits[BH_FILTER_WORDS];
};
BH_ASSERT_SIZE(struct bh_deny_filter, 8192);

enum bh_step {
	BH_STEP_ALLOW,
	BH_STEP_DENY,
	BH_STEP_AUDIT_DENY, /* a deny rule whose policy only watches: recorded, and allowed */
	BH_STEP_AUDIT,	    /* no rule, and the policy only watches: recorded, and allowed */
};

/* One step of the decision about a destination. The first that matches decides. */
struct bh_port_rule {
	__u16 lo, hi; /* host byte order, both included; of an ICMP echo request both are 8 */
	__u8 proto;   /* IPPROTO_TCP, IPPROTO_UDP; IPPROTO_ICMP of either family */
	__u8 step;    /* enum bh_step */
	__u16 limited; /* the policy has rates or budgets: see its head */
	__u32 rule; /* index of its counter: page * BH_RULES_PER_PAGE + offset; BH_NO_RULE for BH_STEP_AUDIT */
	__u32 rate; /* index into rates of the rule's own bucket, 0: none */
};
BH_ASSERT_SIZE(struct bh_port_rule, 16);

#define BH_ENTRY_RULES 4

/*
 * Value of a policy's trie: the steps of a prefix, the first ones here and the
 * others in further values of the same trie, so that most nodes stay small. The
 * n-th of those, from 1 on, has a key of family BH_FAMILY_MORE, all bits of which
 * count: more and n, in the first 8 bytes of the address. Prefixes with the same
 * steps share them.
 */
struct bh_policy_entry {
	__u32 count; /* of all steps; not used in further values */
	__u32 more;
	struct bh_port_rule rules[BH_ENTRY_RULES];
};
BH_ASSERT_SIZE(struct bh_policy_entry, 72);

#define BH_FAMILY_MORE 0x80000000u /* host byte order; no packet has it */

/* Key of the learned addresses of a policy. */
struct bh_addr {
	__be32 family; /* 4 or 6 */
	__u8 addr[16]; /* as in bh_lpm_key */
};
BH_ASSERT_SIZE(struct bh_addr, 20);

/*
 * What names that resolved to an address allow there. It is asked when no
 * step of the trie has decided: a deny of an address beats a name.
 */
struct bh_learned {
	__u64 used; /* bh_state.tick of the last packet; written by the program */
	__u32 count;
	__u32 reserved;
	struct bh_port_rule rules[BH_MAX_LEARNED_RULES];
};
BH_ASSERT_SIZE(struct bh_learned, 272);

/* A port of the sandbox that the outside may connect to. */
struct bh_published {
	__u16 port; /* of the sandbox, host byte order */
	__u8 proto;
	__u8 reserved;
	__u32 rule; /* index of the counter of the answers */
};
BH_ASSERT_SIZE(struct bh_published, 8);

/* What holds for all packets that a policy allows. Indices are 0 from the first unused one on. */
struct bh_head {
	__u32 rates[BH_MAX_LEVELS];   /* into rates */
	__u32 budgets[BH_MAX_LEVELS]; /* into budgets and leases */
	__u32 limited;		      /* any of the above is set */
	__u32 published;	      /* how many */
	struct bh_published ports[BH_MAX_PUBLISHED];
};
BH_ASSERT_SIZE(struct bh_head, 128);

#define BH_OWNER_TEXT 92

/*
 * A token bucket, as a virtual clock (GCRA, ITU-T I.371): a packet passes if
 * max(tat, now) + its cost is at most burst ahead of now, and moves tat there.
 * Clock: bpf_ktime_get_coarse_ns.
 */
struct bh_rate {
	__u64 tat;   /* ns; programs move it */
	__u64 cost;  /* ns of one byte, times 2^20 */
	__u64 burst; /* ns */
	__u32 slot;  /* owner; 0: a tenant */
	__u16 used;  /* whether somebody owns it */
	__u16 len;
	__u8 text[BH_OWNER_TEXT]; /* tenant, or tenant and rule; only user space looks at it */
	__u32 reserved;
};
BH_ASSERT_SIZE(struct bh_rate, 128);

/*
 * A byte budget. left is what no CPU has leased yet; programs take
 * BH_LEASE_BYTES at a time, so that CPUs do not fight over a cache line, less
 * when little is left, and what they need to the byte at the end. Never more is
 * sent than was granted.
 */
struct bh_budget {
	__s64 left;
	__u64 window; /* raised by user space when left is set anew: leases of another window are void */
	__u64 granted; /* all that was ever put into left in this window; only user space looks at it */
	__u32 slot;  /* owner; 0: a tenant */
	__u16 used;  /* whether somebody owns it */
	__u16 len;
	__u8 text[BH_OWNER_TEXT]; /* only user space looks at it */
	__u32 reserved;
};
BH_ASSERT_SIZE(struct bh_budget, 128);

#define BH_LEASE_BYTES 65536

struct bh_lease {
	__s64 left;
	__u64 window;
};
BH_ASSERT_SIZE(struct bh_lease, 16);

/* What user space tells all programs. */
struct bh_state {
	__u64 tick;	/* seconds of CLOCK_BOOTTIME, moved by the agent; 0: nobody listens, no events */
	__u32 deny_gen; /* raised after every change of hard_deny: cached verdicts of another one are void */
	__u32 reserved;
};
BH_ASSERT_SIZE(struct bh_state, 16);

/*
 * A remembered verdict of one CPU: the step that the trie gave for a
 * destination that is not hard denied. seq is odd while it changes. The
 * generation names sandbox and policy.
 */
struct bh_cached {
	__u32 seq;
	__u32 gen;
	__u32 deny_gen;
	__u16 port;
	__u8 proto;
	__u8 reserved;
	struct bh_addr addr;
	struct bh_port_rule step;
	__u32 reserved2[3];
};
BH_ASSERT_SIZE(struct bh_cached, 64);
#define BH_CACHED 1024

/* A connection from outside to a published port. */
struct bh_inbound {
	__u32 gen; /* of the slot: its epoch */
	__u32 slot;
	__u16 local, remote; /* ports, host byte order */
	__u8 proto;
	__u8 reserved[3];
	struct bh_addr addr; /* of the other end */
};
BH_ASSERT_SIZE(struct bh_inbound, 36);

/* Ticks after which who was let in may no longer be answered: more than the two hours after which TCP keeps alive. */
#define BH_INBOUND_IDLE 8000

/* A flow that a policy in audit mode let pass. */
struct bh_audit_key {
	__u32 slot;
	__u32 epoch;
	__u32 rule;   /* index of the counter of the deny rule, or BH_NO_RULE */
	__u16 port;
	__u8 proto;
	__u8 reserved;
	struct bh_addr addr;
};
BH_ASSERT_SIZE(struct bh_audit_key, 36);

/*
 * One entry of the flow log: the first packet of a sandbox, rule, reason and
 * tick on a CPU. What is left out shows in packets and bytes, which are
 * totals of their counter with this packet.
 */
struct bh_event {
	__u64 packets, bytes;
	__u32 slot;
	__u32 epoch; /* of the slot */
	__u32 rule;  /* index of the counter, or BH_NO_RULE */
	__u32 len;   /* l3 bytes of this packet, all segments */
	__u16 sport, dport; /* host byte order; dport 8 of an echo request */
	__u8 reason; /* enum bh_reason; BH_ALLOWED, too, if only audited */
	__u8 audit;  /* enum bh_reason that it would have been denied for, or 0 */
	__u8 proto;
	__u8 inbound; /* towards the sandbox */
	struct bh_addr addr; /* the other end; family 0 if the packet was not understood so far */
	__u32 cpu; /* whose counter packets and bytes are of, or BH_ALL_CPUS */
};
BH_ASSERT_SIZE(struct bh_event, 64);

/* The counter is shared by all CPUs: one by reason. */
#define BH_ALL_CPUS 0xffffffffu

/* What user space knows about a policy. No program reads it. */
struct bh_policy_info {
	__u64 rev;
	__u32 slot;
	__u32 entries;
	__u8 digest[32];
};
BH_ASSERT_SIZE(struct bh_policy_info, 48);

/*
 * What a sandbox may be billed for. Bytes are IP header and payload of every
 * segment as it leaves; wire bytes are bytes + 14 * segments.
 */
struct bh_counters {
	__u64 egress_bytes;
	__u64 egress_segments;
	__u64 ingress_bytes;
	__u64 ingress_segments;
	__u64 reserved[4];
};
BH_ASSERT_SIZE(struct bh_counters, 64);

struct bh_count {
	__u64 packets; /* segments */
	__u64 bytes;
	__u64 tick; /* of the last event about it */
};
BH_ASSERT_SIZE(struct bh_count, 24);

/* by_reason[BH_ALLOWED] counts no drops: what passed for audit and by no rule. */
struct bh_drops {
	struct bh_count by_reason[BH_REASON_ROOM];
};
BH_ASSERT_SIZE(struct bh_drops, 1152);

/* Whose counter it is: text is the tenant, then the rule's name. No program reads it. */
struct bh_rule_name {
	__u32 slot;
	__u16 tenant_len;
	__u16 name_len;
	__u8 text[BH_RULE_TEXT];
	__u32 reserved;
};
BH_ASSERT_SIZE(struct bh_rule_name, 512);

/* What is pinned beside it. */
struct bh_meta {
	__u32 layout;	     /* BH_LAYOUT_VERSION */
	__u32 max_sandboxes;
	__u8 program[32];    /* digest of the object that the pinned programs were loaded from */
	__u32 next_gen;	     /* the first policy generation that was never used */
	__u8 reserved[20];
};
BH_ASSERT_SIZE(struct bh_meta, 64);

/* skb->cb of the explain program. */
#define BH_CB_SLOT 0   /* in */
#define BH_CB_REASON 1 /* out: enum bh_reason */
#define BH_CB_RULE 2   /* out: index of the counter, or BH_NO_RULE */
#define BH_CB_POLICY 3 /* out: index into policies that was used */
#define BH_CB_AUDIT 4  /* out: enum bh_reason that it would have been denied for, or 0 */

#endif
