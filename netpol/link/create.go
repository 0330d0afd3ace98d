// SPDX-License-Identifier: Apache-2.0

package link

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// maxOffload keeps packets below the size at which BIG TCP writes a length of
// zero into the IP header, which a strict parser must drop.
const maxOffload = 64 << 10

// carrierWait bounds how long Up waits for the sandbox's end to be usable.
// It takes microseconds; the kernel does it in a worker.
const carrierWait = 2 * time.Second

// Fields of struct ipv4_devconf, from linux/ip.h, and of ipv6_devconf, from
// linux/ipv6.h.
const (
	devconfForwarding        = 1
	devconfProxyARP          = 3
	devconfAcceptRedirects   = 4
	devconfSendRedirects     = 6
	devconfRPFilter          = 8
	devconfAcceptSourceRoute = 9
	devconfRouteLocalnet     = 26

	devconf6AcceptRA        = 3
	devconf6AcceptRedirects = 4
	devconf6Autoconf        = 5
	devconf6AcceptDAD       = 27
)

const addrGenNone = 1 // IN6_ADDR_GEN_MODE_NONE

// owned is what a link's alias says.
type owned struct {
	addr4, addr6 netip.Addr
	mac          net.HardwareAddr
}

const aliasWord = "bulkhead"

func (o owned) alias() string {
	return strings.Join([]string{aliasWord, o.addr4.String(), o.addr6.String(), o.mac.String()}, " ")
}

func parseAlias(s string) (owned, error) {
	f := strings.Split(s, " ")
	if len(f) != 4 || f[0] != aliasWord {
		return owned{}, fmt.Errorf("alias %q does not say what the link is for", s)
	}
	a4, err4 := netip.ParseAddr(f[1])
	a6, err6 := netip.ParseAddr(f[2])
	mac, errMAC := net.ParseMAC(f[3])
	if err := errors.Join(err4, err6, errMAC); err != nil {
		return owned{}, fmt.Errorf("alias %q: %w", s, err)
	}
	if !a4.Is4() || !a6.Is6() || len(mac) != 6 {
		return owned{}, fmt.Errorf("alias %q: wrong kind of address", s)
	}
	return owned{addr4: a4, addr6: a6, mac: mac}, nil
}

// Create makes the namespace and the link of a sandbox and answers the index
// of the host's end, which it leaves down. What is there already is kept if
// it is right and made again if it is half-made. A link that is up and
// differs is an error: it belongs to a running sandbox.
//
// After an error, Remove takes away what was made.
func (m *Manager) Create(ctx context.Context, l Link) (int, error) {
	l, err := m.check(l)
	if err != nil {
		return 0, err
	}
	if err := ctx.Err(); err != nil {
		return 0, fmt.Errorf("create link %s: %w", l.ID, err)
	}
	index, err := m.create(l)
	if err != nil {
		return 0, fmt.Errorf("create link %s: %w", l.ID, err)
	}
	return index, nil
}

func (m *Manager) create(l Link) (index int, err error) {
	o := owned{addr4: l.Addr4, addr6: l.Addr6, mac: l.MAC}
	m.mu.Lock()
	m.live[l.ID] = o
	m.mu.Unlock()

	in, err := m.ensureNetns(l.ID)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, in.close()) }()
	if err := m.failpoint("netns"); err != nil {
		return 0, err
	}
	host, err := m.ensurePair(l, o, in)
	if err != nil {
		return 0, err
	}
	eth, err := in.rt.link(insideName)
	if err != nil {
		return 0, err
	}
	err = in.rt.do(
		setFlags("bring up lo", "lo", unix.IFF_UP, unix.IFF_UP),
		setAddrGen(insideName),
		setFlags("bring up "+insideName, insideName, unix.IFF_UP|unix.IFF_NOARP, unix.IFF_UP|unix.IFF_NOARP),
		addAddr(eth.index, l.Addr4),
		addAddr(eth.index, l.Addr6),
		addNeigh(eth.index, Gateway4, hostMAC),
		addNeigh(eth.index, Gateway6, hostMAC),
		addDefaultRoute(eth.index, Gateway4, l.Addr4),
		addDefaultRoute(eth.index, Gateway6, l.Addr6),
	)
	if err != nil {
		return 0, err
	}
	return host.index, m.failpoint("inside")
}

// ensurePair answers the host's end of a pair whose other end is in the
// sandbox's namespace.
func (m *Manager) ensurePair(l Link, o owned, in *inside) (linkInfo, error) {
	name := m.HostName(l.ID)
	err := m.rt.do(newPair(name, l, int(in.ns.Fd())))
	if errors.Is(err, unix.EEXIST) {
		host, right, err := m.existingPair(name, l, o, in)
		switch {
		case err != nil:
			return host, err
		case right:
			return host, m.configureHost(name, o, l.MTU)
		case host.up:
			return host, fmt.Errorf("link %s is up and differs (%s)", name, host.alias)
		}
		if err := m.rt.do(deleteLink(name)); err != nil {
			return host, err
		}
		if err := m.rt.do(newPair(name, l, int(in.ns.Fd()))); err != nil {
			return host, err
		}
	} else if err != nil {
		return linkInfo{}, err
	}
	if err := m.failpoint("pair"); err != nil {
		return linkInfo{}, err
	}
	if err := m.configureHost(name, o, l.MTU); err != nil {
		return linkInfo{}, err
	}
	return m.rt.link(name)
}

// existingPair reports whether a link that is there is the wanted pair.
func (m *Manager) existingPair(name string, l Link, o owned, in *inside) (linkInfo, bool, error) {
	host, err := m.rt.link(name)
	if err != nil {
		return host, false, err
	}
	eth, err := in.rt.link(insideName)
	if errors.Is(err, ErrNotFound) {
		return host, false, nil
	}
	if err != nil {
		return host, false, err
	}
	right := host.alias == o.alias() && host.mtu == l.MTU && eth.mtu == l.MTU &&
		host.peer == eth.index && eth.peer == host.index && slices.Equal(eth.mac, l.MAC)
	return host, right, nil
}

// configureHost sets all of the host's end that is not set by making it.
func (m *Manager) configureHost(name string, o owned, mtu int) error {
	if err := m.rt.do(setShape(name, mtu)); err != nil {
		return err
	}
	if err := hostLinkSysctls6(name); err != nil {
		return err
	}
	if err := m.failpoint("host sysctls"); err != nil {
		return err
	}
	// The alias is last: a link that has it is complete.
	return m.rt.do(hostSpec(name, o))
}

// newPair asks for the pair, both ends down. One queue each: veth needs no
// transmit lock, and one queue per CPU makes a pair slow to make and large.
//
// The host's end begins with an MTU that is too small for IPv6 and without
// multicast. IPv6 comes to it with the real MTU, when it is no longer a
// multicast link, so that the kernel joins no group of routers there and
// sends the sandbox no reports about it.
func newPair(name string, l Link, nsFD int) *request {
	ends := func(add func(typ int, data []byte), ifname string, mac net.HardwareAddr, mtu int) {
		add(unix.IFLA_IFNAME, nl.ZeroTerminated(ifname))
		add(unix.IFLA_ADDRESS, mac)
		add(unix.IFLA_MTU, nl.Uint32Attr(uint32(mtu)))
		for _, t := range []int{unix.IFLA_NUM_TX_QUEUES, unix.IFLA_NUM_RX_QUEUES} {
			add(t, nl.Uint32Attr(1))
		}
		for _, t := range []int{unix.IFLA_GSO_MAX_SIZE, unix.IFLA_GRO_MAX_SIZE, unix.IFLA_GSO_IPV4_MAX_SIZE, unix.IFLA_GRO_IPV4_MAX_SIZE} {
			add(t, nl.Uint32Attr(maxOffload))
		}
	}
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(unix.IFLA_INFO_KIND, nl.NonZeroTerminated("veth"))
	peer := info.AddRtAttr(unix.IFLA_INFO_DATA, nil).AddRtAttr(nl.VETH_INFO_PEER, nil)
	peer.AddChild(noARP(nl.NewIfInfomsg(unix.AF_UNSPEC)))
	ends(func(t int, d []byte) { peer.AddRtAttr(t, d) }, insideName, l.MAC, l.MTU)
	peer.AddRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(nsFD)))

	r := newRequest("make link "+name, unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	msg := noARP(nl.NewIfInfomsg(unix.AF_UNSPEC))
	msg.Change |= unix.IFF_MULTICAST
	r.add(msg)
	ends(func(t int, d []byte) { r.add(nl.NewRtAttr(t, d)) }, name, hostMAC, minMTU-1)
	return r.add(info)
}

func noARP(m *nl.IfInfomsg) *nl.IfInfomsg {
	m.Flags |= unix.IFF_NOARP
	m.Change |= unix.IFF_NOARP
	return m
}

// hostSpec asks for the alias, the IPv4 sysctls and no IPv6 address.
func hostSpec(name string, o owned) *request {
	spec := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
	conf := spec.AddRtAttr(unix.AF_INET, nil).AddRtAttr(unix.IFLA_INET_CONF, nil)
	for _, s := range hostSysctls {
		if s.fam == unix.AF_INET {
			conf.AddRtAttr(s.id, nl.Uint32Attr(uint32(s.value)))
		}
	}
	spec.AddRtAttr(unix.AF_INET6, nil).AddRtAttr(unix.IFLA_INET6_ADDR_GEN_MODE, []byte{addrGenNone})
	return newRequest("configure link "+name, unix.RTM_SETLINK, 0).add(
		nl.NewIfInfomsg(unix.AF_UNSPEC), nameAttr(name), spec,
		nl.NewRtAttr(unix.IFLA_IFALIAS, []byte(o.alias())))
}

func setAddrGen(name string) *request {
	spec := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
	spec.AddRtAttr(unix.AF_INET6, nil).AddRtAttr(unix.IFLA_INET6_ADDR_GEN_MODE, []byte{addrGenNone})
	return newRequest("configure link "+name, unix.RTM_SETLINK, 0).add(
		nl.NewIfInfomsg(unix.AF_UNSPEC), nameAttr(name), spec)
}

// setShape asks for what newPair could not give the host's end, and for what
// it gave but someone may have changed since.
func setShape(name string, mtu int) *request {
	msg := noARP(nl.NewIfInfomsg(unix.AF_UNSPEC))
	msg.Change |= unix.IFF_MULTICAST
	return newRequest("set mtu of "+name, unix.RTM_SETLINK, 0).add(
		msg, nameAttr(name), nl.NewRtAttr(unix.IFLA_ADDRESS, hostMAC),
		nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(mtu))))
}

func setFlags(op, name string, flags, change uint32) *request {
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Flags, msg.Change = flags, change
	return newRequest(op, unix.RTM_NEWLINK, 0).add(msg, nameAttr(name))
}

func deleteLink(name string) *request {
	return newRequest("remove link "+name, unix.RTM_DELLINK, 0, unix.ENODEV).add(
		nl.NewIfInfomsg(unix.AF_UNSPEC), nameAttr(name))
}

// Up lets the sandbox send. The egress program must be attached and verified.
// When Up returns, a packet from the sandbox reaches the program and an
// answer reaches the sandbox.
func (m *Manager) Up(id string) error {
	if err := m.up(id); err != nil {
		return fmt.Errorf("bring up link %s: %w", id, err)
	}
	return nil
}

func (m *Manager) up(id string) error {
	name := m.HostName(id)
	host, err := m.rt.link(name)
	if err != nil {
		return err
	}
	o, err := parseAlias(host.alias)
	if err != nil {
		return err
	}
	err = m.rt.do(
		setFlags("set link up", name, unix.IFF_UP, unix.IFF_UP),
		addNeigh(host.index, o.addr4, o.mac),
		addNeigh(host.index, o.addr6, o.mac),
		addHostRoute(host.index, o.addr4),
		addHostRoute(host.index, o.addr6),
	)
	if err != nil {
		return err
	}
	return m.waitCarrier(id)
}

// waitCarrier returns when the kernel has noticed that the sandbox's end has
// a carrier. Until then it drops what the sandbox sends, and the first DNS
// question of a sandbox would cost its retry time.
func (m *Manager) waitCarrier(id string) (err error) {
	ns, err := os.Open(m.NetnsPath(id))
	if err != nil {
		return fmt.Errorf("open netns: %w", err)
	}
	defer func() { err = errors.Join(err, ns.Close()) }()
	var rt *conn
	if err := inNetns(ns, func() (err error) { rt, err = dial(); return err }); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rt.close()) }()
	deadline := time.Now().Add(carrierWait)
	for {
		eth, err := rt.link(insideName)
		switch {
		case err != nil:
			return err
		case eth.oper == operUp, !eth.up: // taken down from inside: the sandbox's own doing
			return nil
		case time.Now().After(deadline):
			return fmt.Errorf("%s inside has no carrier after %s", insideName, carrierWait)
		}
		time.Sleep(100 * time.Microsecond)
	}
}

// Down stops all traffic of a sandbox at once. ErrNotFound if there is no
// such link.
func (m *Manager) Down(id string) error {
	err := m.rt.do(setFlags("take down link "+id, m.HostName(id), 0, unix.IFF_UP))
	if errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("take down link %s: %w", id, ErrNotFound)
	}
	return err
}

// Remove takes away the published ports, the link, the namespace's file and
// mount, the conntrack entries and what the table noted of a sandbox, or
// whatever part of them is there. The
// namespace itself ends with its last process.
func (m *Manager) Remove(id string) error {
	if !validID(id) {
		return fmt.Errorf("remove link: sandbox id %q: want %d characters of a-z and 2-7", id, idLen)
	}
	if err := m.remove(id); err != nil {
		return fmt.Errorf("remove link %s: %w", id, err)
	}
	return nil
}

func (m *Manager) remove(id string) error {
	o, known := m.known(id)
	if known {
		// First, or what still comes in would follow the host's default route.
		if err := m.publish(id, nil); err != nil {
			return err
		}
	}
	if err := m.failpoint("unpublished"); err != nil {
		return err
	}
	if err := m.rt.do(deleteLink(m.HostName(id))); err != nil {
		return err
	}
	if err := m.failpoint("link removed"); err != nil {
		return err
	}
	if err := removeNetnsFile(m.NetnsPath(id)); err != nil {
		return err
	}
	if err := m.failpoint("netns removed"); err != nil {
		return err
	}
	if !known {
		return nil // Open found no link of it, and has swept what else there was
	}
	noted, err := m.noted(o)
	if err != nil {
		return err
	}
	if noted {
		if err := m.forget(o.addr4, o.addr6); err != nil {
			return err
		}
	}
	m.mu.Lock()
	delete(m.live, id)
	m.mu.Unlock()
	return nil
}

// List answers, sorted, every id of which a link or a namespace file exists.
func (m *Manager) List() ([]string, error) {
	files, err := m.netnsFiles()
	if err != nil {
		return nil, err
	}
	links, err := m.links()
	if err != nil {
		return nil, err
	}
	ids := map[string]bool{}
	for _, id := range files {
		ids[id] = true
	}
	for _, l := range links {
		ids[strings.TrimPrefix(l.name, m.cfg.LinkPrefix)] = true
	}
	return slices.Sorted(maps.Keys(ids)), nil
}

// links answers the host's ends of our links.
func (m *Manager) links() ([]linkInfo, error) {
	all, err := m.rt.list()
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(l linkInfo) bool {
		id, ok := strings.CutPrefix(l.name, m.cfg.LinkPrefix)
		return !ok || !validID(id)
	}), nil
}
