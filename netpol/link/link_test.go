// SPDX-License-Identifier: Apache-2.0

package link

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestAddrFor(t *testing.T) {
	for _, c := range []struct {
		pool, want string
		slot       uint32
	}{
		{"100.96.0.0/16", "100.96.0.1", 1},
		{"100.96.0.0/16", "100.96.1.0", 256},
		{"100.96.0.0/16", "100.96.255.254", 65534},
		{"10.0.0.240/28", "10.0.0.254", 14},
		{"fd62:6b68::/64", "fd62:6b68::1", 1},
		{"fd62:6b68::/64", "fd62:6b68::1:0", 65536},
		{"fd62:6b68::fff0/124", "fd62:6b68::ffff", 15},
		{"fd62:6b68::ff00/104", "fd62:6b68::1", 1}, // host bits of the pool do not count
	} {
		got, err := AddrFor(netip.MustParsePrefix(c.pool), c.slot)
		if err != nil || got.String() != c.want {
			t.Errorf("AddrFor(%s, %d) = %s, %v, want %s", c.pool, c.slot, got, err, c.want)
		}
	}
	for _, c := range []struct {
		pool string
		slot uint32
	}{
		{"100.96.0.0/16", 0},
		{"100.96.0.0/16", 65535}, // broadcast
		{"100.96.0.0/16", 65536},
		{"10.0.0.240/28", 15},
		{"fd62:6b68::fff0/124", 16},
		{"fd62:6b68::/64", 1 << 24}, // no hardware address
		{"10.0.0.1/32", 1},
	} {
		if got, err := AddrFor(netip.MustParsePrefix(c.pool), c.slot); err == nil {
			t.Errorf("AddrFor(%s, %d) = %s, want an error", c.pool, c.slot, got)
		}
	}
	if _, err := AddrFor(netip.Prefix{}, 1); err == nil {
		t.Error("AddrFor(no pool) answered")
	}
}

func TestMACFor(t *testing.T) {
	for slot, want := range map[uint32]string{1: "02:62:68:00:00:01", 0x0102: "02:62:68:00:01:02", 0x030405: "02:62:68:03:04:05"} {
		if got := MACFor(slot).String(); got != want {
			t.Errorf("MACFor(%#x) = %s, want %s", slot, got, want)
		}
	}
	HostMAC()[5] = 9
	if got, want := HostMAC().String(), "02:62:69:00:00:01"; got != want {
		t.Errorf("HostMAC() = %s, want %s", got, want)
	}
}

func TestConfigErrors(t *testing.T) {
	good := Config{Pool4: pool4, Pool6: pool6, NetnsDir: "/run/x"}
	for want, edit := range map[string]func(*Config){
		"link prefix": func(c *Config) { c.LinkPrefix = "bulk" },
		"link prefi":  func(c *Config) { c.LinkPrefix = "b*" },
		"netns dir":   func(c *Config) { c.NetnsDir = "run/x" },
		"pool4":       func(c *Config) { c.Pool4 = pool6 },
		"pool6":       func(c *Config) { c.Pool6 = pool4 },
		"pool6 ":      func(c *Config) { c.Pool6 = netip.MustParsePrefix("::ffff:10.0.0.0/112") },
	} {
		c := good
		edit(&c)
		if _, err := c.withDefaults(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error = %v, want one about %q", err, want)
		}
	}
	got, err := good.withDefaults()
	if err != nil || got.Table != "bulkhead" || got.LinkPrefix != "bh" {
		t.Errorf("defaults = %+v, %v", got, err)
	}
}

func TestLinkErrors(t *testing.T) {
	m := &Manager{cfg: Config{Pool4: pool4, Pool6: pool6, LinkPrefix: "bh"}}
	for want, edit := range map[string]func(*Link){
		"sandbox id":       func(l *Link) { l.ID = "../../../etc" },
		"outside pool 100": func(l *Link) { l.Addr4 = netip.MustParseAddr("10.0.0.1") },
		"outside pool fd6": func(l *Link) { l.Addr6 = netip.Addr{} },
		"hardware":         func(l *Link) { l.MAC = MACFor(1)[:5] },
		"hardware address": func(l *Link) { l.MAC = []byte{1, 0, 0, 0, 0, 1} },
		"mtu":              func(l *Link) { l.MTU = 576 },
	} {
		l := testLink(t, 3)
		edit(&l)
		if _, err := m.check(l); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error = %v, want one about %q", err, want)
		}
	}
	got, err := m.check(testLink(t, 3))
	if err != nil {
		t.Fatal(err)
	}
	want := testLink(t, 3)
	want.MAC, want.MTU = MACFor(3), 1500
	if d := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
		t.Errorf("defaults (-want +got):\n%s", d)
	}
}

func TestAlias(t *testing.T) {
	l := testLink(t, 77)
	o := owned{addr4: l.Addr4, addr6: l.Addr6, mac: MACFor(77)}
	got, err := parseAlias(o.alias())
	if err != nil || got.addr4 != o.addr4 || got.addr6 != o.addr6 || got.mac.String() != o.mac.String() {
		t.Errorf("parseAlias(%q) = %v, %v", o.alias(), got, err)
	}
	for _, s := range []string{"", "bulkhead", "bulkhead 1.2.3.4 1.2.3.4 02:62:68:00:00:01", "uplink of rack 4 now"} {
		if got, err := parseAlias(s); err == nil {
			t.Errorf("parseAlias(%q) = %v, want an error", s, got)
		}
	}
}

func FuzzAlias(f *testing.F) {
	f.Add("bulkhead 100.96.0.1 fd62:6b68::1 02:62:68:00:00:01")
	f.Fuzz(func(t *testing.T, s string) {
		o, err := parseAlias(s)
		if err != nil {
			return
		}
		again, err := parseAlias(o.alias())
		if err != nil || again.addr4 != o.addr4 || again.addr6 != o.addr6 {
			t.Errorf("alias %q does not come back: %v, %v", s, again, err)
		}
	})
}

// FuzzNetlink: no answer of the kernel may panic a parser.
func FuzzNetlink(f *testing.F) {
	f.Add([]byte{36, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0xed, 0xff, 0xff, 0xff, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(_ *testing.T, b []byte) {
		_, _ = parseLink(b)
		_, _, _, _ = parseLocal(b)
		_, _ = parseFlow(b)
		_, _, _ = parseRoute(b)
		_, _, _ = parseAddr(b)
		_, _, _ = parseNeigh(b)
		_, _ = parseRule(b)
		_ = parseComment(b)
		_, _ = parseElementPackets(b)
		_, _ = parseObject(b)
		_, _ = parseCounter(b)
		_, _ = parseTimeouts(b)
		_ = mayBeLocal(b)
		for _, flags := range []uint16{0, 0x100, 0x200, 0x300} {
			_ = ackError(b, flags)
		}
	})
}
