// SPDX-License-Identifier: Apache-2.0

package rig

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Capture counts the L3 bytes that cross the host side of a link, the way a
// packet capture on the far wire would: every segment of a large packet with
// headers of its own. It shares no code with what bills: the kernel says the
// segment size in the packet socket's virtio header.
type Capture struct {
	fd   int
	keep func(remote netip.Addr) bool
	done chan struct{} // closed by the reader

	mu            sync.Mutex
	sent, recv    uint64 // of the sandbox
	packets, seen uint64
	err           error
}

// vnetHeader is struct virtio_net_hdr of linux/virtio_net.h.
const vnetHeader = 10

// OpenCapture starts to count packets of a link whose other end is one that
// keep says yes to.
func OpenCapture(link string, keep func(remote netip.Addr) bool) (*Capture, error) {
	ifi, err := net.InterfaceByName(link)
	if err != nil {
		return nil, fmt.Errorf("capture on %s: %w", link, err)
	}
	const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8 // network byte order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("packet socket: %w", err)
	}
	c := &Capture{fd: fd, keep: keep, done: make(chan struct{})}
	for _, o := range []struct {
		level, opt, value int
	}{
		{unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 256 << 20},
		{unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1},
	} {
		if err := unix.SetsockoptInt(fd, o.level, o.opt, o.value); err != nil {
			unix.Close(fd)
			return nil, fmt.Errorf("packet socket option %d: %w", o.opt, err)
		}
	}
	tv := unix.NsecToTimeval((100 * time.Millisecond).Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		unix.Close(fd)
		return nil, err
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: ifi.Index}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("bind packet socket to %s: %w", link, err)
	}
	go c.read()
	return c, nil
}

func (c *Capture) read() {
	defer close(c.done)
	buf := make([]byte, 256)
	idle := 0
	for {
		n, from, err := unix.Recvfrom(c.fd, buf, unix.MSG_TRUNC)
		switch {
		case errors.Is(err, unix.EAGAIN):
			c.mu.Lock()
			stop := c.keep == nil
			c.mu.Unlock()
			if idle++; stop && idle > 1 {
				return
			}
			continue
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ENETDOWN):
			continue // the link went down; what was queued is still read
		case err != nil:
			c.mu.Lock()
			c.err = err
			c.mu.Unlock()
			return
		}
		idle = 0
		ll, ok := from.(*unix.SockaddrLinklayer)
		if !ok {
			continue
		}
		c.count(buf[:min(n, len(buf))], n, ll.Pkttype == unix.PACKET_OUTGOING)
	}
}

// count adds one packet; toSandbox says its direction.
func (c *Capture) count(b []byte, total int, toSandbox bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seen++
	const eth = 14
	if len(b) < vnetHeader+eth+20 || c.keep == nil {
		return
	}
	gsoSize := int(binary.NativeEndian.Uint16(b[4:]))
	l3 := total - vnetHeader - eth
	ip := b[vnetHeader+eth:]
	var proto byte
	var hdr int
	var src, dst netip.Addr
	switch binary.BigEndian.Uint16(b[vnetHeader+12:]) {
	case unix.ETH_P_IP:
		hdr, proto = int(ip[0]&15)*4, ip[9]
		src, _ = netip.AddrFromSlice(ip[12:16])
		dst, _ = netip.AddrFromSlice(ip[16:20])
	case unix.ETH_P_IPV6:
		if len(ip) < 40 {
			return
		}
		hdr, proto = 40, ip[6]
		src, _ = netip.AddrFromSlice(ip[8:24])
		dst, _ = netip.AddrFromSlice(ip[24:40])
	default:
		return
	}
	remote := dst
	if toSandbox {
		remote = src
	}
	if !c.keep(remote) {
		return
	}
	l4 := 8
	if proto == unix.IPPROTO_TCP && len(ip) > hdr+12 {
		l4 = int(ip[hdr+12]>>4) * 4
	}
	segs := 1
	if gsoSize > 0 {
		segs = (l3 - hdr - l4 + gsoSize - 1) / gsoSize
	}
	bytes := uint64(l3 + (segs-1)*(hdr+l4))
	c.packets += uint64(segs)
	if toSandbox {
		c.recv += bytes
	} else {
		c.sent += bytes
	}
}

// Counted is what a capture has seen.
type Counted struct{ Sent, Received, Packets uint64 }

// Now answers what has been counted so far.
func (c *Capture) Now() Counted {
	c.mu.Lock()
	defer c.mu.Unlock()
	return Counted{Sent: c.sent, Received: c.recv, Packets: c.packets}
}

// Stop reads what is still queued, ends the capture and answers the total. It
// errs if the kernel dropped packets, since the count is then worth nothing.
func (c *Capture) Stop() (Counted, error) {
	total := c.Now()
	for { // until a quiet moment
		time.Sleep(250 * time.Millisecond)
		next := c.Now()
		if next == total {
			break
		}
		total = next
	}
	c.mu.Lock()
	c.keep = nil
	c.mu.Unlock()
	<-c.done
	defer unix.Close(c.fd)
	if c.err != nil {
		return total, fmt.Errorf("capture: %w", c.err)
	}
	st, err := unix.GetsockoptTpacketStats(c.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil {
		return total, fmt.Errorf("capture statistics: %w", err)
	}
	if st.Drops > 0 {
		return total, fmt.Errorf("capture: the kernel dropped %d packets", st.Drops)
	}
	return total, nil
}
