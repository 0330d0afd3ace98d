// SPDX-License-Identifier: Apache-2.0

package netpol

import "net/netip"

// HardDeny is a destination that no policy can open.
type HardDeny struct {
	Prefix netip.Prefix
	Reason string
}

// hardDenies: where two overlap the longer one names the reason.
var hardDenies = []struct{ prefix, reason string }{
	// Cloud metadata services hand credentials to whoever asks. Most live in
	// link-local addresses, some do not.
	{"169.254.169.254/32", "metadata"},     // nearly every cloud
	{"169.254.170.2/32", "metadata"},       // AWS container credentials
	{"168.63.129.16/32", "metadata"},       // Azure
	{"100.100.100.200/32", "metadata"},     // Alibaba
	{"fd00:ec2::254/128", "metadata"},      // AWS
	{"fd00:ec2::23/128", "metadata"},       // AWS pod identity
	{"fd00:c1::a9fe:a9fe/128", "metadata"}, // Oracle
	{"fd20:ce::254/128", "metadata"},       // Google
	{"fd00:42::42/128", "metadata"},        // Scaleway

	{"169.254.0.0/16", "link_local"}, // management controllers answer here too
	{"fe80::/10", "link_local"},
	{"127.0.0.0/8", "loopback"},
	{"::1/128", "loopback"},
	{"224.0.0.0/4", "multicast"},
	{"ff00::/8", "multicast"},
	{"255.255.255.255/32", "broadcast"},
	{"0.0.0.0/8", "unspecified"},
	{"::/128", "unspecified"},
	{"240.0.0.0/4", "reserved"},
	{"::/96", "reserved"},         // IPv4-compatible
	{"::ffff:0:0/96", "reserved"}, // IPv4-mapped: never on a wire
}

// HardDenied lists what no policy can open: the datapath drops it before it
// looks at a Program, and Parse refuses an allow rule that lies in it. Where
// two prefixes overlap the longer one names the reason. The node adds its own
// addresses, the sandbox pools and the operator's host networks.
func HardDenied() []HardDeny {
	var out []HardDeny
	for _, h := range hardDenies {
		p := netip.MustParsePrefix(h.prefix)
		out = append(out, HardDeny{p, h.reason})
		for _, e := range Embedded(p) {
			out = append(out, HardDeny{e, h.reason})
		}
	}
	return out
}

// embeddings are the IPv6 networks whose addresses carry an IPv4 address at
// this byte: a packet to one of them ends at that address, if the network has a
// gateway.
var embeddings = []struct {
	prefix netip.Prefix
	at     int
}{
	{netip.MustParsePrefix("64:ff9b::/96"), 12}, // NAT64, RFC 6052
	{netip.MustParsePrefix("2002::/16"), 2},     // 6to4, RFC 3056
}

// Embedded answers the IPv6 prefixes that lead to an IPv4 prefix, none for an
// IPv6 prefix. Whoever denies the one has to deny the others.
func Embedded(p netip.Prefix) []netip.Prefix {
	if !p.Addr().Is4() {
		return nil
	}
	var out []netip.Prefix
	for _, e := range embeddings {
		b := e.prefix.Addr().As16()
		copy(b[e.at:], p.Addr().AsSlice())
		out = append(out, netip.PrefixFrom(netip.AddrFrom16(b), 8*e.at+p.Bits()))
	}
	return out
}

// Embeds says whether a prefix lies in a network of Embedded.
func Embeds(p netip.Prefix) bool {
	for _, e := range embeddings {
		if covers(e.prefix, p) {
			return true
		}
	}
	return false
}

var builtinHardDenied = HardDenied()

// hardDenied answers the narrowest hard deny that covers all of p.
func hardDenied(p netip.Prefix) (HardDeny, bool) {
	var best HardDeny
	for _, h := range builtinHardDenied {
		if covers(h.Prefix, p) && (!best.Prefix.IsValid() || h.Prefix.Bits() > best.Prefix.Bits()) {
			best = h
		}
	}
	return best, best.Prefix.IsValid()
}
