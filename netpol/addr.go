// SPDX-License-Identifier: Apache-2.0

package netpol

import (
	"net/netip"
	"slices"
)

// specialUse is what no honest name resolves to, beyond the hard denies.
var specialUse = prefixes(
	"192.0.0.0/24",   // protocol assignments (RFC 6890)
	"192.88.99.0/24", // 6to4 relays, withdrawn (RFC 7526)
	"::/64",          // mapped, compatible and translated IPv4
	"100::/64",       // discard (RFC 6666)
	"2001::/32",      // Teredo
	"2001:10::/28",   // ORCHID, withdrawn (RFC 4843)
	"5f00::/16",      // segment identifiers (RFC 9602)
)

// privateUse is what names of private networks resolve to.
var privateUse = prefixes(
	"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", // RFC 1918
	"100.64.0.0/10",  // carriers' NAT (RFC 6598)
	"198.18.0.0/15",  // benchmarks (RFC 2544)
	"fc00::/7",       // unique local (RFC 4193)
	"fec0::/10",      // site-local, deprecated (RFC 3879)
	"64:ff9b:1::/48", // translation inside a network (RFC 8215)
)

// embedding are the IPv6 prefixes that carry an IPv4 address, behind so many
// bytes: what a packet reaches there is that address.
var embedding = []struct {
	prefix netip.Prefix
	offset int
}{
	{netip.MustParsePrefix("64:ff9b::/96"), 12}, // NAT64 (RFC 6052)
	{netip.MustParsePrefix("2002::/16"), 2},     // 6to4 (RFC 3056)
}

func prefixes(list ...string) []netip.Prefix {
	out := make([]netip.Prefix, len(list))
	for i, s := range list {
		out[i] = netip.MustParsePrefix(s)
	}
	return out
}

// SpecialUse says whether an address in an answer is of no use to any sandbox:
// what is hard denied on every node, and what nothing routes. Whatever its
// rule says, a name loses such an address.
func SpecialUse(a netip.Addr) bool {
	if !a.IsValid() || a.Zone() != "" || a.Is4In6() {
		return true
	}
	if _, never := hardDenied(netip.PrefixFrom(a, a.BitLen())); never {
		return true
	}
	if v4, ok := embedded(a); ok {
		return SpecialUse(v4)
	}
	return within(specialUse, a)
}

// PrivateAddr says whether an address belongs to private networks. A name
// loses it unless its rule says allow_private: else whoever answers for the
// name could lead a sandbox into the operator's network.
func PrivateAddr(a netip.Addr) bool {
	if v4, ok := embedded(a); ok {
		return PrivateAddr(v4)
	}
	return within(privateUse, a)
}

func within(list []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Contains(a) })
}

// embedded answers the IPv4 address that an IPv6 address carries.
func embedded(a netip.Addr) (netip.Addr, bool) {
	for _, e := range embedding {
		if e.prefix.Contains(a) {
			b := a.As16()
			return netip.AddrFrom4([4]byte(b[e.offset : e.offset+4])), true
		}
	}
	return netip.Addr{}, false
}
