// SPDX-License-Identifier: Apache-2.0

package link

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

func TestHostAddrs(t *testing.T) {
	m, f := open(t), newFar(t)
	launch(t, m, 1)
	got, err := HostAddrs()
	must(t, err)
	for _, want := range []string{"127.0.0.0/8", "127.0.0.1/32", "::1/128", "192.0.2.1/32", "192.0.2.255/32", "2001:db8::1/128"} {
		if !slices.Contains(got, netip.MustParsePrefix(want)) {
			t.Errorf("host addresses lack %s: %v", want, got)
		}
	}
	for _, p := range got {
		if p.Overlaps(pool4) || p.Overlaps(pool6) || p.Contains(f.addr4) || p.Contains(f.addr6) || p.Bits() == 0 {
			t.Errorf("host addresses hold %s", p)
		}
	}
}

func TestWatchHostAddrs(t *testing.T) {
	m, _ := open(t), newFar(t)
	ctx, cancel := context.WithCancel(context.Background())
	seen := make(chan []netip.Prefix, 16) // never closed; room for every change below
	ended := make(chan error, 1)
	go func() { ended <- WatchHostAddrs(ctx, func(p []netip.Prefix) { seen <- p }) }()
	next := func() []netip.Prefix {
		t.Helper()
		select {
		case p := <-seen:
			return p
		case err := <-ended:
			t.Fatalf("watch ended: %v", err)
		case <-time.After(5 * time.Second):
			t.Fatal("no news of a changed address")
		}
		return nil
	}
	first := next()
	launch(t, m, 1) // not news
	uplink, err := netlink.LinkByName("uplink")
	must(t, err)
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(198, 51, 100, 7), Mask: net.CIDRMask(32, 32)}}
	want := netip.MustParsePrefix("198.51.100.7/32")
	must(t, netlink.AddrAdd(uplink, addr))
	if got := next(); !slices.Contains(got, want) {
		t.Errorf("after adding %s: %v", want, got)
	}
	must(t, netlink.AddrDel(uplink, addr))
	if got := next(); !slices.Equal(got, first) {
		t.Errorf("after removing it: %v, want %v", got, first)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("watch ended with %v, want nil", err)
	}
}
