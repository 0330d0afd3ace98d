// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"net/netip"
	"testing"

	"github.com/bulkheadhq/bulkhead/netpol"
)

// What no policy can open, none can open by way of a translator either.
func TestHardDeniesThroughTranslators(t *testing.T) {
	e := unit(t, allowAll)
	ok(t, e.SetHostAddrs([]netip.Prefix{netip.MustParsePrefix("198.51.100.1/32")}))
	a4 := addr4(testSlot).As4()
	in := func(prefix string, v4 [4]byte) netip.Addr {
		b := netip.MustParseAddr(prefix).As16()
		at := 12
		if b[0] == 0x20 {
			at = 2
		}
		copy(b[at:], v4[:])
		return netip.AddrFrom16(b)
	}
	for _, prefix := range []string{"64:ff9b::", "2002::"} {
		for v4, want := range map[[4]byte]string{
			{169, 254, 169, 254}: "metadata", {100, 100, 100, 200}: "metadata", {169, 254, 0, 17}: "link_local",
			{127, 0, 0, 1}: "loopback", {198, 51, 100, 1}: "host", a4: "sandbox", {192, 0, 2, 1}: "allow", {198, 51, 100, 2}: "allow",
		} {
			x, err := e.Explain(testSlot, netpol.Flow{Proto: netpol.TCP, Dst: in(prefix, v4), Port: 443})
			ok(t, err)
			if x.Reason != want {
				t.Errorf("%s: got %s, want %s", in(prefix, v4), x.Reason, want)
			}
		}
	}
}
