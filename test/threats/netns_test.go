// SPDX-License-Identifier: Apache-2.0

package threats

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// onThread runs f on a thread that ends with it.
func onThread(f func() error) error {
	c := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked
		c <- f()
	}()
	return <-c
}

// in runs f in a namespace; 0 is the host's.
func in(ns netns.NsHandle, f func() error) error {
	if ns == 0 {
		return f()
	}
	return onThread(func() error {
		if err := netns.Set(ns); err != nil {
			return err
		}
		return f()
	})
}

// newNS makes a namespace that nobody is in, with loopback up.
func newNS() (ns netns.NsHandle, err error) {
	err = onThread(func() (err error) {
		if ns, err = netns.New(); err != nil {
			return err
		}
		return loopbackUp()
	})
	return ns, err
}

func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	return nil
}

// cable makes a veth pair between the host and a namespace; both ends are up.
func cable(host, name string, ns netns.NsHandle, hostMAC, mac net.HardwareAddr, mtu int) error {
	pair := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: host, HardwareAddr: hostMAC, MTU: mtu},
		PeerName:  name, PeerHardwareAddr: mac, PeerNamespace: netlink.NsFd(ns),
	}
	if err := netlink.LinkAdd(pair); err != nil {
		return fmt.Errorf("make %s: %w", host, err)
	}
	if err := netlink.LinkSetUp(pair); err != nil {
		return fmt.Errorf("bring up %s: %w", host, err)
	}
	return in(ns, func() error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetMTU(l, mtu); err != nil {
			return err
		}
		return netlink.LinkSetUp(l)
	})
}

// address gives a link of this thread's namespace addresses.
func address(name string, prefixes ...string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	for _, p := range prefixes {
		a := &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix(p)), Flags: unix.IFA_F_NODAD}
		if err := netlink.AddrAdd(l, a); err != nil {
			return fmt.Errorf("address %s of %s: %w", p, name, err)
		}
	}
	return nil
}

// route adds routes, "destination gateway" or "destination dev:name", to this
// thread's namespace.
func route(routes map[string]string) error {
	for dst, via := range routes {
		r := &netlink.Route{Dst: ipNet(netip.MustParsePrefix(dst))}
		if len(via) > 4 && via[:4] == "dev:" {
			l, err := netlink.LinkByName(via[4:])
			if err != nil {
				return err
			}
			r.LinkIndex, r.Scope = l.Attrs().Index, unix.RT_SCOPE_LINK
		} else {
			r.Gw = net.ParseIP(via)
		}
		if err := netlink.RouteReplace(r); err != nil {
			return fmt.Errorf("route %s via %s: %w", dst, via, err)
		}
	}
	return nil
}

// onlink routes everything over a link to gateways whose hardware address is
// known.
func onlink(name string, mac net.HardwareAddr, gateways ...netip.Addr) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	for _, gw := range gateways {
		if err := neighbour(name, gw, mac, netlink.NUD_PERMANENT); err != nil {
			return err
		}
		all := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if gw.Is6() {
			all = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: ipNet(all), Gw: gw.AsSlice(), Flags: int(netlink.FLAG_ONLINK)}
		if err := netlink.RouteReplace(r); err != nil {
			return fmt.Errorf("default route via %s: %w", gw, err)
		}
	}
	return nil
}

func neighbour(name string, a netip.Addr, mac net.HardwareAddr, state int) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	n := &netlink.Neigh{LinkIndex: l.Attrs().Index, State: state, IP: a.AsSlice(), HardwareAddr: mac}
	if err := netlink.NeighSet(n); err != nil {
		return fmt.Errorf("neighbour %s of %s: %w", a, name, err)
	}
	return nil
}

// hardwareOf answers what the host believes to be the hardware address of a.
func hardwareOf(name string, a netip.Addr) (string, error) {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return "", err
	}
	list, err := netlink.NeighList(l.Attrs().Index, 0)
	if err != nil {
		return "", err
	}
	for _, n := range list {
		if ip, ok := netip.AddrFromSlice(n.IP); ok && ip.Unmap() == a {
			return n.HardwareAddr.String(), nil
		}
	}
	return "", nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func sysctl(name, value string) error {
	return os.WriteFile("/proc/sys/net/"+name, []byte(value), 0)
}

// eventually waits for f to answer "", and fails with what it last answered.
func eventually(t testing.TB, f func() string) {
	t.Helper()
	var why string
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		if why = f(); why == "" {
			return
		}
	}
	t.Fatal(why)
}
