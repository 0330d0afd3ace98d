/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The parsers. parse_strict reads what a sandbox sends and accepts only what
 * it understands to the last byte: untagged Ethernet II, then IPv4 without
 * options and fragments or IPv6 without extension headers, then TCP, UDP or an
 * ICMP echo request, with lengths that agree with each other and with the frame.
 */
#ifndef BH_PARSE_H
#define BH_PARSE_H

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "abi.h"

/* Fixed headers of the longest packet that a sandbox may send. */
#define BH_PULL_STRICT (sizeof(struct ethhdr) + sizeof(struct ipv6hdr) + sizeof(struct tcphdr))
/* The same of the longest that it may get: IPv4 options or an IPv6 jumbo header more. */
#define BH_PULL_LENIENT (sizeof(struct ethhdr) + 60 + sizeof(struct tcphdr))

#define BH_IP_DF 0x4000
#define BH_IP_OFFSET 0x1fff

/* Echo requests of both families. */
#define BH_ECHO4 8
#define BH_ECHO6 128
#define BH_ECHO_HDR 8

/* What the parsers find out. The other end is where a packet goes or comes from. */
struct bh_packet {
	struct bh_lpm_key other;
	__u32 proto; /* IPPROTO_ICMP of an echo request of either family */
	__u16 sport, port; /* source and destination, host byte order; BH_ECHO4 of an echo request */
	__u16 hdrs; /* IP and L4 headers */
	__u16 opens; /* a TCP segment that opens a connection */
	__u32 segments;
	__u64 bytes; /* IP header and payload of all segments */
};

static __always_inline void set_other4(struct bh_packet *p, __be32 addr)
{
	p->other.prefixlen = BH_FAMILY_BITS + 128;
	p->other.family = bpf_htonl(4);
	__builtin_memset(p->other.addr, 0, sizeof(p->other.addr));
	__builtin_memcpy(p->other.addr, &addr, sizeof(addr));
}

static __always_inline void set_other6(struct bh_packet *p, const struct in6_addr *addr)
{
	p->other.prefixlen = BH_FAMILY_BITS + 128;
	p->other.family = bpf_htonl(6);
	__builtin_memcpy(p->other.addr, addr, sizeof(p->other.addr));
}

/* Whether an address is that of the slot. A slot without one has none. */
static __always_inline int is_own4(const struct bh_slot *s, __be32 addr)
{
	return addr == s->addr4 && (s->has & BH_HAS_ADDR4);
}

static __always_inline int is_own6(const struct bh_slot *s, const struct in6_addr *addr)
{
	const __u32 *own = (const __u32 *)s->addr6, *a = addr->in6_u.u6_addr32;

	return a[3] == own[3] && a[2] == own[2] && a[1] == own[1] && a[0] == own[0] && (s->has & BH_HAS_ADDR6);
}

/*
 * Makes the first bytes readable, as many as there are up to want. False if
 * that is not even an Ethernet header. What is read afterwards is the kernel's
 * own copy: the sender cannot change it any more.
 */
static __always_inline int linear(struct __sk_buff *skb, __u32 want, void **data, void **end)
{
	*data = (void *)(long)skb->data;
	*end = (void *)(long)skb->data_end;
	if (*data + want > *end) {
		if (bpf_skb_pull_data(skb, skb->len < want ? skb->len : want))
			return 0;
		*data = (void *)(long)skb->data;
		*end = (void *)(long)skb->data_end;
	}
	return *data + sizeof(struct ethhdr) <= *end;
}

/*
 * Bytes and segments as they leave the machine. skb->len is that of one large
 * packet when segmentation is left to the device: each further segment brings
 * its own copy of the headers. extra is what no segment carries.
 */
static __always_inline void measure(struct __sk_buff *skb, __u32 extra, struct bh_packet *p)
{
	__u32 l3 = skb->len - sizeof(struct ethhdr) - extra;
	__u32 mss = skb->gso_size;

	p->segments = 1;
	p->bytes = l3;
	if (mss && l3 > p->hdrs) {
		p->segments = (l3 - p->hdrs + mss - 1) / mss;
		p->bytes += (__u64)(p->segments - 1) * p->hdrs;
	}
}

static __always_inline __u32 l4_strict(struct bh_packet *p, void *l4, void *end, __u32 l3_hdr, __u32 l4_len)
{
	if (p->proto == IPPROTO_TCP) {
		struct tcphdr *tcp = l4;
		__u32 doff;

		if (l4_len < sizeof(*tcp))
			return BH_BAD_LENGTH;
		if ((void *)(tcp + 1) > end)
			return BH_SHORT;
		doff = tcp->doff * 4;
		if (doff < sizeof(*tcp) || doff > l4_len)
			return BH_BAD_LENGTH;
		p->sport = bpf_ntohs(tcp->source);
		p->port = bpf_ntohs(tcp->dest);
		p->opens = tcp->syn && !tcp->ack;
		p->hdrs = l3_hdr + doff;
		return BH_ALLOWED;
	}
	if (p->proto == IPPROTO_UDP) {
		struct udphdr *udp = l4;

		if (l4_len < sizeof(*udp))
			return BH_BAD_LENGTH;
		if ((void *)(udp + 1) > end)
			return BH_SHORT;
		if (bpf_ntohs(udp->len) != l4_len)
			return BH_BAD_LENGTH;
		p->sport = bpf_ntohs(udp->source);
		p->port = bpf_ntohs(udp->dest);
		p->hdrs = l3_hdr + sizeof(*udp);
		return BH_ALLOWED;
	}
	return BH_PROTOCOL;
}

/* Of ICMP only a whole echo request may go on; otherwise why. */
static __always_inline __u32 echo_strict(struct bh_packet *p, void *l4, void *end, __u32 l3_hdr, __u32 l4_len,
					 __u8 request, __u32 why)
{
	__u8 *b = l4;

	if (l4_len < 2 || (void *)(b + 2) > end)
		return l4_len ? why : BH_SHORT;
	if (b[0] != request || b[1])
		return why;
	if (l4_len < BH_ECHO_HDR)
		return BH_BAD_LENGTH;
	p->proto = IPPROTO_ICMP;
	p->port = BH_ECHO4;
	p->hdrs = l3_hdr + BH_ECHO_HDR;
	return BH_ALLOWED;
}

static __always_inline __u32 ip4_strict(struct __sk_buff *skb, const struct bh_slot *s, struct bh_packet *p,
					void *l3, void *end)
{
	struct iphdr *ip = l3;
	__u32 len = skb->len - sizeof(struct ethhdr);

	if ((void *)(ip + 1) > end)
		return BH_SHORT;
	if (ip->version != 4)
		return BH_BAD_VERSION;
	if (ip->ihl != 5)
		return ip->ihl < 5 ? BH_BAD_LENGTH : BH_IP_OPTIONS;
	if (bpf_ntohs(ip->tot_len) != len)
		return BH_BAD_LENGTH;
	if (ip->frag_off & ~bpf_htons(BH_IP_DF))
		return BH_FRAGMENT;
	if (!is_own4(s, ip->saddr))
		return BH_SPOOF_IP;
	set_other4(p, ip->daddr);
	if (ip->protocol == IPPROTO_ICMP)
		return echo_strict(p, ip + 1, end, sizeof(*ip), len - sizeof(*ip), BH_ECHO4, BH_ICMP);
	p->proto = ip->protocol;
	return l4_strict(p, ip + 1, end, sizeof(*ip), len - sizeof(*ip));
}

/* Why IPv6 with this next header is dropped; BH_ALLOWED if it may be an echo request. */
static __always_inline __u32 ip6_other(__u8 next, void *l4, void *end)
{
	__u8 *b = l4;
	__u8 type;

	switch (next) {
	case IPPROTO_ICMPV6:
		if ((void *)(b + 1) > end)
			return BH_SHORT;
		type = b[0];
		break;
	case IPPROTO_HOPOPTS:
		/* Listener reports carry a router alert of 8 bytes. */
		if ((void *)(b + 9) > end || b[0] != IPPROTO_ICMPV6 || b[1] != 0)
			return BH_EXT_HEADER;
		type = b[8];
		if (type != 130 && type != 131 && type != 132 && type != 143)
			return BH_EXT_HEADER;
		return BH_NEIGHBOUR;
	case IPPROTO_FRAGMENT:
		return BH_FRAGMENT;
	case IPPROTO_ROUTING:
	case IPPROTO_ESP:
	case IPPROTO_AH:
	case IPPROTO_NONE:
	case IPPROTO_DSTOPTS:
	case IPPROTO_MH:
	case 139: /* host identity */
	case 140: /* shim6 */
		return BH_EXT_HEADER;
	default:
		return BH_PROTOCOL;
	}
	if ((type >= 130 && type <= 137) || type == 143)
		return BH_NEIGHBOUR;
	return type == BH_ECHO6 ? BH_ALLOWED : BH_ICMP6;
}

static __always_inline __u32 ip6_strict(struct __sk_buff *skb, const struct bh_slot *s, struct bh_packet *p,
					void *l3, void *end)
{
	struct ipv6hdr *ip = l3;
	__u32 len = skb->len - sizeof(struct ethhdr);
	__u32 why;

	if ((void *)(ip + 1) > end)
		return BH_SHORT;
	if (ip->version != 6)
		return BH_BAD_VERSION;
	if (bpf_ntohs(ip->payload_len) + sizeof(*ip) != len)
		return BH_BAD_LENGTH;
	if (ip->nexthdr != IPPROTO_TCP && ip->nexthdr != IPPROTO_UDP) {
		why = ip6_other(ip->nexthdr, ip + 1, end);
		if (why)
			return why;
	}
	if (!is_own6(s, &ip->saddr))
		return BH_SPOOF_IP;
	set_other6(p, &ip->daddr);
	if (ip->nexthdr == IPPROTO_ICMPV6)
		return echo_strict(p, ip + 1, end, sizeof(*ip), len - sizeof(*ip), BH_ECHO6, BH_ICMP6);
	p->proto = ip->nexthdr;
	return l4_strict(p, ip + 1, end, sizeof(*ip), len - sizeof(*ip));
}

/*
 * Reads a frame that the sandbox of slot s sent. Answers BH_ALLOWED if it is
 * understood and comes from that sandbox, and fills p but for bytes and
 * segments.
 */
static __always_inline __u32 parse_strict(struct __sk_buff *skb, const struct bh_slot *s, struct bh_packet *p)
{
	struct ethhdr *eth;
	void *data, *end;

	if (skb->vlan_present)
		return BH_VLAN;
	if (!linear(skb, BH_PULL_STRICT, &data, &end))
		return BH_SHORT;
	eth = data;
	if (*(__u32 *)eth->h_source != *(__u32 *)s->mac ||
	    *(__u16 *)(eth->h_source + 4) != *(__u16 *)(s->mac + 4))
		return BH_SPOOF_MAC;
	switch (eth->h_proto) {
	case bpf_htons(ETH_P_IP):
		return ip4_strict(skb, s, p, eth + 1, end);
	case bpf_htons(ETH_P_IPV6):
		return ip6_strict(skb, s, p, eth + 1, end);
	case bpf_htons(ETH_P_ARP):
	case bpf_htons(ETH_P_RARP):
		return BH_ARP;
	case bpf_htons(ETH_P_8021Q):
	case bpf_htons(ETH_P_8021AD):
	case bpf_htons(ETH_P_QINQ1):
	case bpf_htons(ETH_P_QINQ2):
	case bpf_htons(ETH_P_QINQ3):
		return BH_VLAN;
	}
	return BH_ETHERTYPE;
}

/* The ports of a packet towards the sandbox, as far as it has them. */
static __always_inline void ports_lenient(struct bh_packet *p, void *l4, void *end)
{
	if (p->proto == IPPROTO_TCP && l4 + sizeof(struct tcphdr) <= end) {
		struct tcphdr *tcp = l4;

		p->sport = bpf_ntohs(tcp->source);
		p->port = bpf_ntohs(tcp->dest);
		p->opens = tcp->syn && !tcp->ack;
	} else if (p->proto == IPPROTO_UDP && l4 + sizeof(struct udphdr) <= end) {
		struct udphdr *udp = l4;

		p->sport = bpf_ntohs(udp->source);
		p->port = bpf_ntohs(udp->dest);
	}
}

/*
 * Reads a frame on its way to the sandbox of slot s, which the host's stack
 * has already accepted: addresses, ports if they are there, and headers if it
 * stands for several segments. Answers BH_ALLOWED if that was possible and it
 * is for the sandbox.
 */
static __always_inline __u32 parse_lenient(struct __sk_buff *skb, const struct bh_slot *s, struct bh_packet *p)
{
	__u32 l3_hdr, extra = 0, later = 0;
	struct ethhdr *eth;
	void *data, *end, *l4;

	if (skb->vlan_present)
		return BH_IN_NOT_IP;
	if (!linear(skb, BH_PULL_LENIENT, &data, &end))
		return BH_IN_MALFORMED;
	eth = data;
	if (eth->h_proto == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = (void *)(eth + 1);

		if ((void *)(ip + 1) > end || ip->version != 4 || ip->ihl < 5)
			return BH_IN_MALFORMED;
		if (!is_own4(s, ip->daddr))
			return BH_IN_DESTINATION;
		set_other4(p, ip->saddr);
		p->proto = ip->protocol;
		l3_hdr = ip->ihl * 4;
		later = ip->frag_off & bpf_htons(BH_IP_OFFSET);
	} else if (eth->h_proto == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = (void *)(eth + 1);

		if ((void *)(ip + 1) > end || ip->version != 6)
			return BH_IN_MALFORMED;
		if (!is_own6(s, &ip->daddr))
			return BH_IN_DESTINATION;
		set_other6(p, &ip->saddr);
		p->proto = ip->nexthdr;
		l3_hdr = sizeof(*ip);
		/* More than 64 KiB: a jumbo header that no segment will carry. */
		if (ip->payload_len == 0 && ip->nexthdr == IPPROTO_HOPOPTS && skb->gso_size) {
			__u8 *next = (void *)(ip + 1);

			if ((void *)(next + 1) > end)
				return BH_IN_MALFORMED;
			p->proto = *next;
			extra = 8;
		}
	} else {
		return BH_IN_NOT_IP;
	}
	l4 = (void *)(eth + 1) + l3_hdr + extra;
	if (!later)
		ports_lenient(p, l4, end);
	if (!skb->gso_size)
		return BH_ALLOWED;
	if (p->proto == IPPROTO_TCP && l4 + sizeof(struct tcphdr) <= end)
		p->hdrs = l3_hdr + ((struct tcphdr *)l4)->doff * 4;
	else if (p->proto == IPPROTO_UDP)
		p->hdrs = l3_hdr + sizeof(struct udphdr);
	else
		return BH_IN_MALFORMED;
	measure(skb, extra, p);
	return BH_ALLOWED;
}

#endif
