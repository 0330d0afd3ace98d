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

#define BH_LAYOUT_VERSION 1

/* Mark of an allowed packet: BH_MARK in the upper half, slot in the lower. */
#define BH_MARK 0x62680000u

#define BH_MAX_PORT_RULES 32
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

	BH_REASONS, /* how many there are */
};

/* struct bh_drops has room for this many reasons. */
#define BH_REASON_ROOM 48
_Static_assert(BH_REASONS <= BH_REASON_ROOM, "raise BH_REASON_ROOM and the layout version");

#define BH_HAS_ADDR4 1
#define BH_HAS_ADDR6 2

/* One sandbox. */
struct bh_slot {
	__u32 ifindex;	 /* host side of its veth; 0: the slot is free and nothing passes */
	__u32 policy;	 /* index into policies; 0: none, nothing passes */
	__u8 mac[6];	 /* of the sandbox */
	__u16 has;	 /* BH_HAS_ADDR* */
	__be32 addr4;	 /* of the sandbox */
	__u32 epoch;	 /* raised when the slot goes to another sandbox */
	__be64 addr6[2]; /* of the sandbox */
	__u64 reserved;
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

/* One step of the decision about a destination. The first that matches decides. */
struct bh_port_rule {
	__u16 lo, hi; /* host byte order, both included */
	__u8 proto;   /* IPPROTO_TCP, IPPROTO_UDP */
	__u8 deny;
	__u16 reserved;
	__u32 rule; /* index of its counter: page * BH_RULES_PER_PAGE + offset */
};
BH_ASSERT_SIZE(struct bh_port_rule, 12);

/* Value of a policy's trie. */
struct bh_policy_entry {
	__u32 count;
	struct bh_port_rule rules[BH_MAX_PORT_RULES];
};
BH_ASSERT_SIZE(struct bh_policy_entry, 388);

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
};
BH_ASSERT_SIZE(struct bh_count, 16);

struct bh_drops {
	struct bh_count by_reason[BH_REASON_ROOM];
};
BH_ASSERT_SIZE(struct bh_drops, 768);

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
	__u8 reserved[24];
};
BH_ASSERT_SIZE(struct bh_meta, 64);

/* skb->cb of the explain program. */
#define BH_CB_SLOT 0   /* in */
#define BH_CB_REASON 1 /* out: enum bh_reason */
#define BH_CB_RULE 2   /* out: index of the counter, or BH_NO_RULE */
#define BH_CB_POLICY 3 /* out: index into policies that was used */

#endif
