// SPDX-License-Identifier: Apache-2.0

package threats

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/netpol"
	"github.com/bulkheadhq/bulkhead/netpol/enforce"
	"github.com/bulkheadhq/bulkhead/netpol/link"
	"github.com/bulkheadhq/bulkhead/test/need"
)

const (
	// patience is how long something that must happen may take; an emulated
	// guest is slow.
	patience = 10 * time.Second
	// refused is how long a connection that must fail is tried.
	refused = 250 * time.Millisecond
	// settle is how long after the last packet of a sandbox something is still
	// waited for that must not arrive.
	settle = 20 * time.Millisecond

	mtu = 9000
)

var (
	pool4 = netip.MustParsePrefix("100.96.0.0/16")
	pool6 = netip.MustParsePrefix("fd62:6b68::/64")

	// Of the internet: far is what policies allow, other what they do not name.
	far4, far6     = netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("2001:db8::2")
	other4, other6 = netip.MustParseAddr("203.0.113.7"), netip.MustParseAddr("2001:db8:1::7")
	host4, host6   = netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")

	metadata4 = netip.MustParseAddr("169.254.169.254")
	metadata6 = netip.MustParseAddr("fd00:ec2::254")
	bmc4      = netip.MustParseAddr("169.254.0.17")
	oob4      = netip.MustParseAddr("198.18.5.5") // in the operator's own network

	open4, open6 = netip.MustParseAddr("198.51.100.10"), netip.MustParseAddr("2001:db8:2::10")
)

const (
	fencePort = 9
	// maxConnections of a sandbox; no other test needs so many.
	maxConnections = 100
)

const (
	allowAll4 = "- {name: all4, action: allow, to: [{cidr: 0.0.0.0/0}], ports: [1-65535/tcp, 1-65535/udp]}\n"
	allowAll6 = "- {name: all6, action: allow, to: [{cidr: '::/0'}], ports: [1-65535/tcp, 1-65535/udp]}\n"
	allowAll  = allowAll4 + allowAll6
	// fence lets out the packet that says that all packets before it are gone.
	fence = "- {name: fence, action: allow, to: [{cidr: 192.0.2.2/32}], ports: [9/udp]}\n"
)

// node is the machine under attack and the internet behind it. All tests use
// the same one; each makes its own sandboxes.
type node struct {
	dir     string
	links   *link.Manager
	enforce *enforce.Enforcer
	far     netns.NsHandle
	open    *box // a veth without any filter
	open2   *box // another
	hearing
	closers []func() error
	slot    atomic.Uint32
}

// box is where an attacker is root.
type box struct {
	node         *node
	id           string // of a sandbox; "" for the open box
	slot         uint32
	ns           netns.NsHandle
	link         int // index of the host's end
	host         string
	inside       int // index of eth0
	addr4, addr6 netip.Addr
	mac, gateway net.HardwareAddr
	raw          int // an AF_PACKET socket inside
}

var theNode struct {
	once sync.Once
	n    *node
	err  error
}

// theWorld answers the node, made by the first test that needs it.
func theWorld(t testing.TB) *node {
	t.Helper()
	need.Netns(t)
	need.BPF(t)
	theNode.once.Do(func() {
		n := &node{}
		theNode.n, theNode.err = n, n.make()
	})
	if theNode.err != nil {
		t.Fatalf("make the node: %v", theNode.err)
	}
	return theNode.n
}

func closeNode() error {
	n := theNode.n
	if n == nil {
		return nil
	}
	var errs []error
	for _, f := range slices.Backward(n.closers) {
		errs = append(errs, f())
	}
	return errors.Join(errs...)
}

func (n *node) onClose(f func() error) { n.closers = append(n.closers, f) }

func (n *node) make() (err error) {
	if n.dir, err = os.MkdirTemp("", "bulkhead-threats"); err != nil {
		return err
	}
	n.onClose(func() error { return os.RemoveAll(n.dir) })
	for _, f := range []func() error{n.makeInternet, n.makeStack, n.makeOpenBoxes, n.warmUp} {
		if err := f(); err != nil {
			return err
		}
	}
	return nil
}

// makeInternet makes the far namespace, with every address that an attacker
// may be after, and the host's routes to them.
func (n *node) makeInternet() (err error) {
	if n.far, err = newNS(); err != nil {
		return err
	}
	n.onClose(n.far.Close)
	if err := cable("up0", "far", n.far, nil, nil, mtu); err != nil {
		return err
	}
	if err := cable("usb0", "bmc", n.far, nil, nil, mtu); err != nil {
		return err
	}
	if err := errors.Join(
		address("up0", "192.0.2.1/24", "2001:db8::1/64", "172.17.0.1/16"),
		address("usb0", "169.254.0.18/24"),
		route(map[string]string{
			"203.0.112.0/20": far4.String(), "198.18.0.0/15": far4.String(), "2001:db8:1::/48": far6.String(),
			"169.254.169.254/32": far4.String(), "169.254.170.2/32": far4.String(),
			"168.63.129.16/32": far4.String(), "100.100.100.200/32": far4.String(), "fd00:ec2::254/128": far6.String(),
			"10.0.0.0/8": far4.String(),
			// What an operator's careless default route would do.
			"::/64": far6.String(),
		}),
	); err != nil {
		return err
	}
	err = in(n.far, func() error {
		return errors.Join(
			address("far", "192.0.2.2/24", "2001:db8::2/64"),
			address("bmc", "169.254.0.17/24"),
			address("lo", "203.0.113.7/32", "203.0.113.8/32", "2001:db8:1::7/128", "169.254.169.254/32", "169.254.170.2/32", "168.63.129.16/32",
				"100.100.100.200/32", "fd00:ec2::254/128", "198.18.5.5/32", "10.20.0.5/32"),
			route(map[string]string{
				"198.51.100.0/24": host4.String(), "2001:db8:2::/64": host6.String(),
				pool4.String(): host4.String(), pool6.String(): host6.String(),
			}),
		)
	})
	if err != nil {
		return err
	}
	return n.listenPackets(n.far, "", unix.ETH_P_ALL)
}

// makeStack opens the product's packages.
func (n *node) makeStack() (err error) {
	n.links, err = link.Open(linkConfig(n.dir))
	if err != nil {
		return err
	}
	n.onClose(func() error { return errors.Join(n.links.Purge(), n.links.Close()) })
	// The host mounts it: the agent takes none for its own that goes with it.
	pins := n.enforceConfig().PinDir
	if err := os.Mkdir(pins, 0o700); err != nil {
		return err
	}
	if err := unix.Mount("bpf", pins, "bpf", 0, "mode=700"); err != nil {
		return fmt.Errorf("mount bpffs: %w", err)
	}
	n.onClose(func() error { return unix.Unmount(pins, 0) })
	n.enforce, err = enforce.Open(n.enforceConfig())
	if err != nil {
		return err
	}
	n.onClose(func() error { return n.enforce.Purge() })
	local, err := link.HostAddrs()
	if err != nil {
		return err
	}
	return n.enforce.SetHostAddrs(local)
}

func (n *node) enforceConfig() enforce.Config {
	return enforce.Config{
		PinDir: filepath.Join(n.dir, "bpf"), MaxSandboxes: 250, Pools: []netip.Prefix{pool4, pool6},
		HardDeny: []netip.Prefix{netip.MustParsePrefix("198.18.5.0/24")},
	}
}

// makeOpenBoxes makes what sandboxes would be without Bulkhead: routed veths
// with the kernel's defaults.
func (n *node) makeOpenBoxes() error {
	n.open = &box{node: n, host: "open0", addr4: open4, addr6: open6, mac: openMAC(4), gateway: link.HostMAC()}
	n.open2 = &box{node: n, host: "open1", addr4: open4.Next(), addr6: open6.Next(), mac: openMAC(5), gateway: link.HostMAC()}
	return errors.Join(n.open.makeOpen(), n.open2.makeOpen())
}

func openMAC(n byte) net.HardwareAddr { return net.HardwareAddr{0x02, 0x62, 0x70, 0, 0, n} }

func (b *box) makeOpen() (err error) {
	if b.ns, err = newNS(); err != nil {
		return err
	}
	b.node.onClose(b.ns.Close)
	if err := cable(b.host, "eth0", b.ns, b.gateway, b.mac, mtu); err != nil {
		return err
	}
	err = in(b.ns, func() error {
		return errors.Join(
			address("eth0", b.addr4.String()+"/32", b.addr6.String()+"/128"),
			onlink("eth0", b.gateway, link.Gateway4, link.Gateway6),
		)
	})
	if err != nil {
		return err
	}
	l, err := netlink.LinkByName(b.host)
	if err != nil {
		return err
	}
	b.link = l.Attrs().Index
	return errors.Join(
		sysctl("ipv6/conf/"+b.host+"/accept_ra", "2"), // as link.Open leaves it on links that take their routes from a router
		sysctl("ipv4/neigh/"+b.host+"/locktime", "0"),
		neighbour(b.host, b.addr4, b.mac, netlink.NUD_PERMANENT),
		neighbour(b.host, b.addr6, b.mac, netlink.NUD_PERMANENT),
		route(map[string]string{b.addr4.String() + "/32": "dev:" + b.host, b.addr6.String() + "/128": "dev:" + b.host}),
		b.openRaw(),
	)
}

// warmUp waits until the ways to the internet work: neighbours are found,
// addresses are no longer tentative.
func (n *node) warmUp() error {
	for _, dst := range []netip.Addr{far4, far6, other4, other6, bmc4} {
		k := newToken()
		n.await(k)
		for end := time.Now().Add(patience); n.count(k) == 0; {
			f := one(packet{dst: dst, port: fencePort})(n.open, k)[0]
			if err := unix.Sendto(n.open.raw, f, 0, &unix.SockaddrLinklayer{Ifindex: n.open.inside, Halen: 6}); err != nil {
				return err
			}
			if n.waitFor(k, 1, settle) == 0 && time.Now().After(end) {
				return fmt.Errorf("there is no way to %s", dst)
			}
		}
		n.forget(k)
	}
	return nil
}

// openRaw opens the socket that frames leave by.
func (b *box) openRaw() error {
	return in(b.ns, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		b.inside = l.Attrs().Index
		b.raw, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		return err
	})
}

// sandboxID makes an id from a slot.
func sandboxID(slot uint32) string {
	const digits = "abcdefghijklmnopqrstuvwxyz234567"
	b := []byte("threataaaaaa")
	for i := len(b) - 1; i >= 6; i-- {
		b[i] = digits[slot%32]
		slot /= 32
	}
	return string(b)
}

// plan answers a sandbox's link and what its enforcement needs, in a slot of
// its own. Nothing is made.
func (n *node) plan(t testing.TB, p netpol.Program) (link.Link, enforce.Sandbox) {
	t.Helper()
	slot := n.slot.Add(1)
	a4, err := link.AddrFor(pool4, slot)
	must(t, err)
	a6, err := link.AddrFor(pool6, slot)
	must(t, err)
	l := link.Link{ID: sandboxID(slot), Slot: slot, Addr4: a4, Addr6: a6, MAC: link.MACFor(slot), MTU: mtu}
	return l, enforce.Sandbox{
		ID: l.ID, Slot: slot, MAC: l.MAC, Addrs: []netip.Addr{a4, a6}, Program: p, PolicyRev: 1,
	}
}

// sandbox makes one under a policy, in the order of the supervisor's steps,
// and removes it at the end of the test.
func (n *node) sandbox(t testing.TB, rules string) *box {
	t.Helper()
	return n.launch(t, compile(t, rules))
}

func (n *node) launch(t testing.TB, p netpol.Program) *box {
	t.Helper()
	l, sb := n.plan(t, p)
	return n.launchAs(t, l, sb)
}

func (n *node) launchAs(t testing.TB, l link.Link, sb enforce.Sandbox) *box {
	t.Helper()
	b := n.create(t, l)
	sb.Ifindex = b.link
	t.Cleanup(func() {
		must(t, n.links.Down(b.id))
		must(t, n.enforce.Detach(b.id, b.slot))
	})
	must(t, n.enforce.Attach(context.Background(), sb))
	must(t, n.links.Up(b.id))
	return b
}

// create makes the link of a sandbox and leaves it down.
func (n *node) create(t testing.TB, l link.Link) *box {
	t.Helper()
	t.Cleanup(func() { must(t, n.links.Remove(l.ID)) })
	index, err := n.links.Create(context.Background(), l)
	must(t, err)
	b := &box{
		node: n, id: l.ID, slot: l.Slot, link: index, host: n.links.HostName(l.ID),
		addr4: l.Addr4, addr6: l.Addr6, mac: l.MAC, gateway: link.HostMAC(),
	}
	b.ns, err = netns.GetFromPath(n.links.NetnsPath(l.ID))
	must(t, err)
	t.Cleanup(func() { must(t, b.ns.Close()) })
	must(t, b.openRaw())
	t.Cleanup(func() { must(t, unix.Close(b.raw)) })
	return b
}

// parse reads rules and what else a policy holds, in YAML; the fence is added.
func parse(t testing.TB, rules string) netpol.Policy {
	t.Helper()
	p, err := netpol.Parse("test.yaml", []byte("kind: EgressPolicy\nname: test\nrules:\n"+fence+rules))
	must(t, err)
	return p
}

func compile(t testing.TB, rules string) netpol.Program {
	t.Helper()
	prog, err := netpol.Compile([]netpol.Layer{{Tenant: "acme", Policy: parse(t, rules)}})
	must(t, err)
	return prog
}

// drops answers the sandbox's dropped packets by reason.
func (b *box) drops(t testing.TB) map[string]uint64 {
	t.Helper()
	c, err := b.node.enforce.Counters(b.slot)
	must(t, err)
	out := map[string]uint64{}
	for _, d := range c.Drops {
		out[d.Reason] = d.Packets
	}
	return out
}

// sent answers the packets that the sandbox was allowed to send.
func (b *box) sent(t testing.TB) uint64 {
	t.Helper()
	c, err := b.node.enforce.Counters(b.slot)
	must(t, err)
	return c.EgressPackets
}

func (b *box) addr(v6 bool) netip.Addr {
	if v6 {
		return b.addr6
	}
	return b.addr4
}

func (b *box) String() string {
	if b.id == "" {
		return "the open box"
	}
	return fmt.Sprintf("sandbox %s", b.id)
}

func linkConfig(dir string) link.Config {
	return link.Config{Pool4: pool4, Pool6: pool6, NetnsDir: filepath.Join(dir, "netns"), MaxConnections: maxConnections}
}

// restart takes up what an agent that is gone has left.
func (n *node) restart(t testing.TB) {
	t.Helper()
	e, err := enforce.Open(n.enforceConfig())
	must(t, err)
	n.enforce = e
	m, err := link.Open(linkConfig(n.dir))
	must(t, err)
	n.links = m
}
