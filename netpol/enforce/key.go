// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/bulkheadhq/bulkhead/bpf"
)

const familyBits = 32

// lpmKey is the key of p in both tries.
func lpmKey(p netip.Prefix) (bpf.DatapathBhLpmKey, error) {
	addr := p.Addr()
	if !p.IsValid() || addr.Is4In6() && p.Bits() >= 96 || addr.Zone() != "" {
		return bpf.DatapathBhLpmKey{}, fmt.Errorf("prefix %s is not one of plain IPv4 or IPv6", p)
	}
	k := bpf.DatapathBhLpmKey{Prefixlen: uint32(familyBits + p.Bits()), Family: networkOrder(6)}
	if addr.Is4() {
		k.Family = networkOrder(4)
	}
	copy(k.Addr[:], p.Masked().Addr().AsSlice())
	return k, nil
}

// prefixOf is the inverse of lpmKey.
func prefixOf(k bpf.DatapathBhLpmKey) netip.Prefix {
	addr := netip.AddrFrom16(k.Addr)
	if k.Family == networkOrder(4) {
		addr = netip.AddrFrom4([4]byte(k.Addr[:4]))
	}
	return netip.PrefixFrom(addr, int(k.Prefixlen)-familyBits)
}

// networkOrder is v as a __be32 in a struct that is written in host order.
func networkOrder(v uint32) uint32 {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], v)
	return binary.NativeEndian.Uint32(b[:])
}

// nativeUint32 and nativeUint64 read bytes in network order into a field
// whose value is only compared with such bytes.
func nativeUint32(b []byte) uint32 { return binary.NativeEndian.Uint32(b) }
func nativeUint64(b []byte) uint64 { return binary.NativeEndian.Uint64(b) }
