// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/test/need"
)

// world is three network namespaces: a sandbox, the host that routes for it,
// and a peer upstream. Nothing of it has a name; it goes with the test.
type world struct {
	host, box, up netns.NsHandle
	link          int // host side of the sandbox's veth
	uplink        int // host side of the veth to the peer
}

var (
	up4     = netip.MustParseAddr("192.0.2.1")
	up6     = netip.MustParseAddr("2001:db8::1")
	host4   = netip.MustParseAddr("192.0.2.254")
	gate4   = netip.MustParseAddr("169.254.1.1")
	gate6   = netip.MustParseAddr("fe80::1")
	peerMAC = net.HardwareAddr{0x02, 0, 0, 0, 0, 0x01}
	upMAC   = net.HardwareAddr{0x02, 0, 0, 0, 0, 0x02}
)

// newWorld makes a world for the sandbox of testSlot. Its link is down.
func newWorld(t testing.TB) *world {
	t.Helper()
	need.Netns(t)
	w := &world{host: newNS(t), box: newNS(t), up: newNS(t)}
	sb := sandbox(testSlot, 0, compile(t, allowAll))

	h, b, u := handle(t, w.host), handle(t, w.box), handle(t, w.up)
	ok(t, in(w.host, func() error {
		for _, name := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
			if err := os.WriteFile("/proc/sys/"+name, []byte("1"), 0); err != nil {
				return err
			}
		}
		return nil
	}))
	w.link = veth(t, h, "bh0", net.HardwareAddr(hostMAC[:]), "eth0", sb.MAC, w.box)
	w.uplink = veth(t, h, "up0", peerMAC, "u0", upMAC, w.up)

	set(t, b, "eth0", gate4, gate6, net.HardwareAddr(hostMAC[:]), sb.Addrs...)
	set(t, h, "up0", up4, up6, upMAC, host4, netip.MustParseAddr("2001:db8::fe"))
	set(t, u, "u0", host4, netip.MustParseAddr("2001:db8::fe"), peerMAC, up4, up6)
	return w
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

type nsHandle = netns.NsHandle

// newNS makes a namespace that nobody is in, with loopback up.
func newNS(t testing.TB) nsHandle {
	t.Helper()
	type made struct {
		ns  nsHandle
		err error
	}
	c := make(chan made)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		ns, err := netns.New()
		c <- made{ns, err}
	}()
	m := <-c
	ok(t, m.err)
	t.Cleanup(func() { m.ns.Close() })
	h := handle(t, m.ns)
	lo, err := h.LinkByName("lo")
	ok(t, err)
	ok(t, h.LinkSetUp(lo))
	return m.ns
}

func handle(t testing.TB, ns nsHandle) *netlink.Handle {
	t.Helper()
	h, err := netlink.NewHandleAt(ns)
	ok(t, err)
	t.Cleanup(h.Close)
	return h
}

// in runs f in a namespace.
func in(ns nsHandle, f func() error) error {
	c := make(chan error)
	go func() {
		runtime.LockOSThread()
		if err := netns.Set(ns); err != nil {
			c <- err
			return
		}
		c <- f()
	}()
	return <-c
}

// veth makes a pair and answers the index of the side that stays.
func veth(t testing.TB, h *netlink.Handle, name string, mac net.HardwareAddr, peer string, peerMAC net.HardwareAddr, to nsHandle) int {
	t.Helper()
	l := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: name, HardwareAddr: mac},
		PeerName:  peer, PeerHardwareAddr: peerMAC, PeerNamespace: netlink.NsFd(to),
	}
	ok(t, h.LinkAdd(l))
	made, err := h.LinkByName(name)
	ok(t, err)
	return made.Attrs().Index
}

// set gives a link addresses, brings it up, and routes everything over it to
// neighbours that need no resolution.
func set(t testing.TB, h *netlink.Handle, name string, via4, via6 netip.Addr, mac net.HardwareAddr, addrs ...netip.Addr) {
	t.Helper()
	l, err := h.LinkByName(name)
	ok(t, err)
	for _, a := range addrs {
		ok(t, h.AddrAdd(l, &netlink.Addr{IPNet: single(a), Flags: unix.IFA_F_NODAD}))
	}
	ok(t, h.LinkSetUp(l))
	for _, via := range []netip.Addr{via4, via6} {
		dst := &net.IPNet{IP: make(net.IP, via.BitLen()/8), Mask: net.CIDRMask(0, via.BitLen())}
		ok(t, h.NeighSet(&netlink.Neigh{LinkIndex: l.Attrs().Index, State: unix.NUD_PERMANENT, IP: via.AsSlice(), HardwareAddr: mac}))
		ok(t, h.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: dst, Gw: via.AsSlice(), Flags: int(netlink.FLAG_ONLINK)}))
	}
}

func single(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// attach attaches the sandbox and takes its link up, in that order, and routes
// to it.
func (w *world) attach(t testing.TB, e *Enforcer, sb Sandbox) {
	t.Helper()
	ok(t, in(w.host, func() error { return e.Attach(context.Background(), sb) }))
	h := handle(t, w.host)
	l, err := h.LinkByIndex(w.link)
	ok(t, err)
	ok(t, h.LinkSetUp(l))
	// Until the kernel has noticed, the sandbox's side throws packets away.
	b := handle(t, w.box)
	eventually(t, func() string {
		l, err := b.LinkByName("eth0")
		if err != nil || l.Attrs().OperState != netlink.OperUp {
			return fmt.Sprintf("eth0 of the sandbox is not up: %v", err)
		}
		return ""
	})
	for _, a := range sb.Addrs {
		ok(t, h.NeighSet(&netlink.Neigh{LinkIndex: w.link, State: unix.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: sb.MAC}))
		ok(t, h.RouteReplace(&netlink.Route{LinkIndex: w.link, Dst: single(a), Scope: unix.RT_SCOPE_LINK}))
	}
}

// down takes the sandbox's link down.
func (w *world) down(t testing.TB) {
	t.Helper()
	h := handle(t, w.host)
	l, err := h.LinkByIndex(w.link)
	ok(t, err)
	ok(t, h.LinkSetDown(l))
}

// serve accepts TCP connections upstream and hands each to f.
func (w *world) serve(t testing.TB, addr netip.Addr, port uint16, f func(net.Conn)) {
	t.Helper()
	var l *net.TCPListener
	ok(t, in(w.up, func() (err error) {
		l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(addr, port)))
		return err
	}))
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				f(c)
			}()
		}
	}()
}

// dial connects from the sandbox to what must be reached, on a busy machine too.
func (w *world) dial(network string, addr netip.Addr, port uint16) (net.Conn, error) {
	return w.dialWithin(5*time.Second, network, addr, port)
}

// dialWithin connects from the sandbox or gives up after limit.
func (w *world) dialWithin(limit time.Duration, network string, addr netip.Addr, port uint16) (c net.Conn, err error) {
	err = in(w.box, func() error {
		d := net.Dialer{Timeout: limit, FallbackDelay: -1}
		c, err = d.Dial(network, netip.AddrPortFrom(addr, port).String())
		return err
	})
	return c, err
}

// noOffload makes the device take only packets that are ready for the wire:
// the kernel cuts large ones into segments before it hands them over.
func noOffload(t testing.TB, ns nsHandle, name string) {
	t.Helper()
	ok(t, in(ns, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		value := [2]uint32{unix.ETHTOOL_STXCSUM, 0}
		var req struct {
			name [unix.IFNAMSIZ]byte
			data unsafe.Pointer
			_    [16]byte
		}
		copy(req.name[:], name)
		req.data = unsafe.Pointer(&value)
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 {
			return fmt.Errorf("ethtool %s: %w", name, errno)
		}
		return nil
	}))
}

// capture counts the packets that a device sends, as they are when it sends
// them.
type capture struct {
	fd             int
	packets, bytes atomic.Uint64
	largest        atomic.Uint64
	done           chan struct{}
}

// newCapture starts a capture of packets of the given type, PACKET_OUTGOING or
// PACKET_HOST.
func newCapture(t testing.TB, ns nsHandle, link int, typ uint8) *capture {
	t.Helper()
	c := &capture{done: make(chan struct{})}
	ok(t, in(ns, func() (err error) {
		proto := int(networkOrder(unix.ETH_P_ALL) >> 16)
		if c.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if err := unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 256<<20); err != nil {
			return err
		}
		if err := unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 20000}); err != nil {
			return err
		}
		return unix.Bind(c.fd, &unix.SockaddrLinklayer{Protocol: uint16(proto), Ifindex: link})
	}))
	stop := make(chan struct{})
	go func() {
		defer close(c.done)
		buf := make([]byte, 256)
		for {
			n, from, err := unix.Recvfrom(c.fd, buf, 0)
			if err != nil {
				select {
				case <-stop:
					return
				default:
					continue
				}
			}
			ll, ok := from.(*unix.SockaddrLinklayer)
			if !ok || ll.Pkttype != typ {
				continue
			}
			size, mine := sizeOf(buf[14:n])
			if !mine {
				continue
			}
			c.packets.Add(1)
			c.bytes.Add(size)
			c.largest.Store(max(c.largest.Load(), size))
		}
	}()
	t.Cleanup(func() {
		close(stop)
		<-c.done
		stats, err := unix.GetsockoptTpacketStats(c.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
		if err != nil || stats.Drops != 0 {
			t.Errorf("capture lost packets: %+v, %v", stats, err)
		}
		unix.Close(c.fd)
	})
	return c
}

// eventually waits for f to answer "", and fails with what it last answered.
func eventually(t testing.TB, f func() string) {
	t.Helper()
	var why string
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if why = f(); why == "" {
			return
		}
	}
	t.Error(why)
}

// sizeOf answers the length of an IP packet, and whether the sandbox of
// testSlot is one of its ends.
func sizeOf(ip []byte) (uint64, bool) {
	switch {
	case len(ip) >= 20 && ip[0]>>4 == 4:
		src, dst := netip.AddrFrom4([4]byte(ip[12:])), netip.AddrFrom4([4]byte(ip[16:]))
		return uint64(binary.BigEndian.Uint16(ip[2:])), src == addr4(testSlot) || dst == addr4(testSlot)
	case len(ip) >= 40 && ip[0]>>4 == 6:
		src, dst := netip.AddrFrom16([16]byte(ip[8:])), netip.AddrFrom16([16]byte(ip[24:]))
		return 40 + uint64(binary.BigEndian.Uint16(ip[4:])), src == addr6(testSlot) || dst == addr6(testSlot)
	}
	return 0, false
}
