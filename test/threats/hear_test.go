// SPDX-License-Identifier: Apache-2.0

package threats

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// token is four bytes that one packet of one attack carries.
type token [4]byte

func newToken() (k token) {
	_, _ = rand.Read(k[:]) // never fails
	return k
}

// hearing counts the tokens that arrive anywhere: at the internet, at a socket
// of the host, in another sandbox.
type hearing struct {
	mu    sync.Mutex
	heard map[token]int // +checklocks:mu; of tokens that are awaited
}

// await makes a token known; it must be called before it is sent.
func (h *hearing) await(k token) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.heard == nil {
		h.heard = map[token]int{}
	}
	h.heard[k] = 0
}

func (h *hearing) count(k token) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.heard[k]
}

func (h *hearing) forget(k token) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.heard, k)
}

func (h *hearing) got(frame []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for k := range h.heard {
		if bytes.Contains(frame, k[:]) {
			h.heard[k]++
		}
	}
}

// waitFor answers how often a token came: as soon as it came want times, or
// else what there is after wait.
func (h *hearing) waitFor(k token, want int, wait time.Duration) int {
	for end := time.Now().Add(wait); h.count(k) < want && time.Now().Before(end); {
		time.Sleep(500 * time.Microsecond)
	}
	return h.count(k)
}

// listenPackets hears what devices of a namespace receive: all of them if name
// is "". With a protocol of its own a packet socket sees a frame only after the
// filter.
func (n *node) listenPackets(ns netns.NsHandle, name string, proto uint16) error {
	c, err := n.packetSocket(ns, name, proto)
	if err == nil {
		n.onClose(c.close)
	}
	return err
}

type packetSocket struct {
	fd   int
	stop chan struct{} // closed by close
	done chan struct{} // closed when the reader has left
}

func (c *packetSocket) close() error {
	close(c.stop)
	<-c.done
	return unix.Close(c.fd)
}

func (n *node) packetSocket(ns netns.NsHandle, name string, proto uint16) (*packetSocket, error) {
	c := &packetSocket{stop: make(chan struct{}), done: make(chan struct{})}
	err := in(ns, func() (err error) {
		at := &unix.SockaddrLinklayer{Protocol: proto<<8 | proto>>8}
		if name != "" {
			l, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			at.Ifindex = l.Attrs().Index
		}
		if c.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return errors.Join(
			unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20),
			unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 20000}),
			unix.Bind(c.fd, at),
		)
	})
	if err != nil {
		return nil, fmt.Errorf("packet socket on %q: %w", name, err)
	}
	go func() {
		defer close(c.done)
		buf := make([]byte, 64<<10)
		for {
			select {
			case <-c.stop:
				return
			default:
			}
			size, from, err := unix.Recvfrom(c.fd, buf, 0)
			if err != nil {
				continue // nothing came for a while, or the link went
			}
			if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype == unix.PACKET_OUTGOING {
				continue
			}
			n.got(buf[:size])
		}
	}()
	return c, nil
}

// hearFrames listens on a device until the test ends.
func (n *node) hearFrames(t testing.TB, ns netns.NsHandle, name string, proto uint16) {
	t.Helper()
	c, err := n.packetSocket(ns, name, proto)
	must(t, err)
	t.Cleanup(func() { must(t, c.close()) })
}

// hearUDP listens with an ordinary socket of a namespace until the test ends.
// It joins addr's group on each of the links if addr is one.
func (n *node) hearUDP(t testing.TB, ns netns.NsHandle, addr netip.Addr, port uint16, links ...int) *net.UDPConn {
	t.Helper()
	at := net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, port))
	network := "udp4"
	if addr.Is6() {
		network = "udp6"
	}
	if addr.IsMulticast() {
		at.IP = nil
	}
	var c *net.UDPConn
	must(t, in(ns, func() (err error) {
		c, err = net.ListenUDP(network, at)
		return err
	}))
	if addr.IsMulticast() {
		raw, err := c.SyscallConn()
		must(t, err)
		for _, l := range links {
			must(t, errors.Join(raw.Control(func(fd uintptr) { err = join(int(fd), addr, l) }), err))
		}
	}
	done := make(chan struct{}) // closed when the reader has left
	go func() {
		defer close(done)
		buf := make([]byte, 64<<10)
		for {
			size, _, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			n.got(buf[:size])
		}
	}()
	t.Cleanup(func() { must(t, c.Close()); <-done })
	return c
}

func join(fd int, group netip.Addr, link int) error {
	if group.Is6() {
		return unix.SetsockoptIPv6Mreq(fd, unix.IPPROTO_IPV6, unix.IPV6_JOIN_GROUP,
			&unix.IPv6Mreq{Multiaddr: group.As16(), Interface: uint32(link)})
	}
	return unix.SetsockoptIPMreqn(fd, unix.IPPROTO_IP, unix.IP_ADD_MEMBERSHIP,
		&unix.IPMreqn{Multiaddr: group.As4(), Ifindex: int32(link)})
}
