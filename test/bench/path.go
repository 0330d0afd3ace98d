// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/netpol"
	"github.com/bulkheadhq/bulkhead/netpol/enforce"
)

// path is a sandbox's network without the rest of Bulkhead, in network
// namespaces that go with the process:
//
//	box, 100.96.0.1 --veth-- host, which routes --veth-- up, 192.0.2.1
//	second, 100.96.0.2 -veth--
//
// The programs are on the host's end of the first pair, and of the second's if
// there is a neighbour to measure, or are not; everything
// else stays as it is. Whoever sends is on the first CPU, whoever receives on
// the last.
type path struct {
	box, second, host, up netns.NsHandle
	pinDir                string
	enforcer              *enforce.Enforcer
	sandbox               enforce.Sandbox
	neighbour             enforce.Sandbox
	attached              bool
	rival                 bool   // nftables judges
	denies                bool   // some of the traffic is meant to be dropped
	sent                  uint64 // payload bytes that went through the programs
	counted               uint64 // what the programs counted, of lives that are over
}

var (
	pathPool = netip.MustParsePrefix("100.96.0.0/16")
	boxAddr  = netip.MustParseAddr("100.96.0.1")
	box2Addr = netip.MustParseAddr("100.96.0.2")
	upAddr   = netip.MustParseAddr("192.0.2.1")
	hostAddr = netip.MustParseAddr("192.0.2.254")
	gateway  = netip.MustParseAddr("169.254.1.1")
	boxMAC   = net.HardwareAddr{0x02, 0x62, 0x68, 0, 0, 1}
	box2MAC  = net.HardwareAddr{0x02, 0x62, 0x68, 0, 0, 2}
	boxGWMAC = net.HardwareAddr{0x02, 0x62, 0x69, 0, 0, 1}
	hostMAC  = net.HardwareAddr{0x02, 0, 0, 0, 0, 1}
	upMAC    = net.HardwareAddr{0x02, 0, 0, 0, 0, 2}
)

// pathPolicy has ten prefixes, one of which is the other end's.
const pathPolicy = `kind: EgressPolicy
name: bench
rules:
- name: up
  action: allow
  to: [{cidr: 192.0.2.0/24}]
  ports: [5000-5010/tcp, 5000-5010/udp]
- name: others
  action: allow
  to: [{cidr: 10.1.0.0/16}, {cidr: 10.2.0.0/16}, {cidr: 10.3.3.0/24}, {cidr: 198.51.100.0/25}, {cidr: 203.0.113.64/26},
    {cidr: 8.8.8.8/32}, {cidr: 9.9.9.0/24}, {cidr: 172.16.0.0/12}, {cidr: 151.101.0.0/16}]
  ports: [443/tcp]
`

func openPath() (_ *path, err error) {
	p := &path{box: netns.None(), second: netns.None(), host: netns.None(), up: netns.None()}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.close())
		}
	}()
	for _, ns := range []*netns.NsHandle{&p.box, &p.second, &p.host, &p.up} {
		if err := onThread(func() (err error) { *ns, err = netns.New(); return err }); err != nil {
			return nil, fmt.Errorf("make network namespace: %w", err)
		}
	}
	if err := p.wire(); err != nil {
		return nil, fmt.Errorf("make path: %w", err)
	}
	prog, err := compilePolicy(pathPolicy)
	if err != nil {
		return nil, err
	}
	if p.pinDir, err = os.MkdirTemp("", "bh-bench-"); err != nil {
		return nil, err
	}
	p.enforcer, err = enforce.Open(enforce.Config{PinDir: filepath.Join(p.pinDir, "bpf"), MaxSandboxes: 16, Pools: []netip.Prefix{pathPool}})
	if err != nil {
		return nil, err
	}
	for i, b := range []struct {
		link, id string
		mac      net.HardwareAddr
		addr     netip.Addr
	}{{"box", "benchbenchbe", boxMAC, boxAddr}, {"second", "secondsecond", box2MAC, box2Addr}} {
		index, err := p.index(b.link)
		if err != nil {
			return nil, err
		}
		sb := enforce.Sandbox{ID: b.id, Slot: uint32(i + 1), Ifindex: index, MAC: b.mac, Addrs: []netip.Addr{b.addr}, Program: prog, PolicyRev: 1}
		if i == 0 {
			p.sandbox = sb
		} else {
			p.neighbour = sb
		}
	}
	return p, nil
}

func compilePolicy(text string) (netpol.Program, error) {
	pol, err := netpol.Parse("bench", []byte(text))
	if err != nil {
		return netpol.Program{}, err
	}
	return netpol.Compile([]netpol.Layer{{Tenant: "acme", Policy: pol}})
}

// index of a link in the host's namespace.
func (p *path) index(name string) (int, error) {
	h, err := netlink.NewHandleAt(p.host)
	if err != nil {
		return 0, err
	}
	defer h.Close()
	l, err := h.LinkByName(name)
	if err != nil {
		return 0, err
	}
	return l.Attrs().Index, nil
}

// wire makes the links and routes.
func (p *path) wire() error {
	for _, ns := range []netns.NsHandle{p.box, p.second, p.host, p.up} {
		// IPv6 would talk by itself.
		err := within(ns, func() error {
			err := os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0)
			return errors.Join(err, os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0))
		})
		if err != nil {
			return err
		}
	}
	h, err := netlink.NewHandleAt(p.host)
	if err != nil {
		return err
	}
	defer h.Close()
	for _, l := range []*netlink.Veth{
		{LinkAttrs: netlink.LinkAttrs{Name: "box", HardwareAddr: boxGWMAC}, PeerName: "eth0", PeerHardwareAddr: boxMAC, PeerNamespace: netlink.NsFd(p.box)},
		{LinkAttrs: netlink.LinkAttrs{Name: "second", HardwareAddr: boxGWMAC}, PeerName: "eth0", PeerHardwareAddr: box2MAC, PeerNamespace: netlink.NsFd(p.second)},
		{LinkAttrs: netlink.LinkAttrs{Name: "up", HardwareAddr: hostMAC}, PeerName: "eth0", PeerHardwareAddr: upMAC, PeerNamespace: netlink.NsFd(p.up)},
	} {
		if err := h.LinkAdd(l); err != nil {
			return err
		}
	}
	all := netip.MustParsePrefix("0.0.0.0/0")
	for _, e := range []struct {
		ns   netns.NsHandle
		link string
		addr netip.Addr   // of this end, if any
		to   netip.Prefix // over this link
		via  netip.Addr   // a neighbour that needs no resolution
		mac  net.HardwareAddr
	}{
		{p.box, "eth0", boxAddr, all, gateway, boxGWMAC},
		{p.host, "box", netip.Addr{}, netip.PrefixFrom(boxAddr, 32), boxAddr, boxMAC},
		{p.second, "eth0", box2Addr, all, gateway, boxGWMAC},
		{p.host, "second", netip.Addr{}, netip.PrefixFrom(box2Addr, 32), box2Addr, box2MAC},
		{p.host, "up", hostAddr, netip.PrefixFrom(upAddr, 32), upAddr, upMAC},
		{p.up, "eth0", upAddr, all, hostAddr, hostMAC},
	} {
		if err := setEnd(e.ns, e.link, e.addr, e.to, e.via, e.mac); err != nil {
			return fmt.Errorf("%s: %w", e.link, err)
		}
	}
	return nil
}

func setEnd(ns netns.NsHandle, name string, addr netip.Addr, to netip.Prefix, via netip.Addr, mac net.HardwareAddr) error {
	h, err := netlink.NewHandleAt(ns)
	if err != nil {
		return err
	}
	defer h.Close()
	l, err := h.LinkByName(name)
	if err != nil {
		return err
	}
	if addr.IsValid() {
		if err := h.AddrAdd(l, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(addr, 32))}); err != nil {
			return err
		}
	}
	if err := h.LinkSetUp(l); err != nil {
		return err
	}
	index := l.Attrs().Index
	if err := h.NeighSet(&netlink.Neigh{LinkIndex: index, State: unix.NUD_PERMANENT, IP: via.AsSlice(), HardwareAddr: mac}); err != nil {
		return err
	}
	r := &netlink.Route{LinkIndex: index, Dst: ipNet(to), Gw: via.AsSlice(), Flags: int(netlink.FLAG_ONLINK)}
	if to.IsSingleIP() {
		r.Gw, r.Flags, r.Scope = nil, 0, unix.RT_SCOPE_LINK
	}
	return h.RouteAdd(r)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func (p *path) attach() error {
	if p.attached {
		return nil
	}
	err := within(p.host, func() error { return p.enforcer.Attach(context.Background(), p.sandbox) })
	p.attached = err == nil
	return err
}

func (p *path) detach() error {
	if !p.attached {
		return nil
	}
	c, err := p.enforcer.Counters(p.sandbox.Slot)
	if err != nil {
		return err
	}
	p.counted += c.EgressBytes
	if len(c.Drops) > 0 && !p.denies {
		return fmt.Errorf("the policy dropped traffic: %+v", c.Drops)
	}
	p.attached = false
	return within(p.host, func() error { return p.enforcer.Detach(p.sandbox.ID, p.sandbox.Slot) })
}

// sane is an error if what was measured with policy did not go through it.
func (p *path) sane() error {
	if err := errors.Join(p.detach(), p.removeRival()); err != nil {
		return err
	}
	if p.sent == 0 || p.counted < p.sent {
		return fmt.Errorf("%d bytes were sent with policy and the programs counted %d", p.sent, p.counted)
	}
	return nil
}

func (p *path) close() error {
	var errs []error
	if p.enforcer != nil {
		errs = append(errs, p.detach(), p.enforcer.Purge())
	}
	if p.pinDir != "" {
		if err := unix.Unmount(filepath.Join(p.pinDir, "bpf"), 0); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("unmount pins: %w", err))
		}
		errs = append(errs, os.RemoveAll(p.pinDir))
	}
	for _, ns := range []*netns.NsHandle{&p.box, &p.second, &p.host, &p.up} {
		if ns.IsOpen() {
			errs = append(errs, ns.Close())
		}
	}
	return errors.Join(errs...)
}

// within runs f on a thread of its own in a namespace.
func within(ns netns.NsHandle, f func() error) error {
	return onThread(func() error {
		if err := netns.Set(ns); err != nil {
			return err
		}
		return f()
	})
}

// onThread runs f on a thread that is thrown away, so that neither its
// namespace nor its CPU is anybody else's.
func onThread(f func() error) error {
	errs := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		errs <- f()
	}()
	return <-errs
}
