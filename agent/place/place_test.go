// SPDX-License-Identifier: Apache-2.0

package place

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/bulkheadhq/bulkhead/agent/sandbox"
)

func TestPlace(t *testing.T) {
	beyond := errors.New("beyond the pool")
	n := Node{
		Pool4: netip.MustParsePrefix("100.96.0.0/16"), Pool6: netip.MustParsePrefix("fd62::/64"), MTU: 1500, LogRoot: "/logs",
		Addr: func(p netip.Prefix, slot uint32) (netip.Addr, error) {
			if slot > 2 {
				return netip.Addr{}, beyond
			}
			return p.Addr().Next(), nil
		},
		MAC:      func(uint32) net.HardwareAddr { return net.HardwareAddr{2, 0, 0, 0, 0, 1} },
		HostLink: func(id string) string { return "bh" + id },
		Netns:    func(id string) string { return "/run/netns/" + id },
		Cgroup:   func(tenant, id string) string { return "/slice/" + tenant + "/" + id },
	}
	got, err := Place(n, "abcdefghijkl", "acme/vision", 1)
	if err != nil {
		t.Fatal(err)
	}
	want := sandbox.Plan{
		Slot: 1, Addr4: netip.MustParseAddr("100.96.0.1"), Addr6: netip.MustParseAddr("fd62::1"), MAC: "02:00:00:00:00:01", MTU: 1500,
		HostLink: "bhabcdefghijkl", NetnsPath: "/run/netns/abcdefghijkl", CgroupPath: "/slice/acme/vision/abcdefghijkl", LogDir: "/logs/abcdefghijkl",
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
	if _, err := Place(n, "abcdefghijkl", "acme", 0); err == nil || !strings.Contains(err.Error(), "slot 0") {
		t.Errorf("slot 0: got %v", err)
	}
	if _, err := Place(n, "abcdefghijkl", "acme", 3); !errors.Is(err, beyond) {
		t.Errorf("slot beyond the pool: got %v", err)
	}
}
