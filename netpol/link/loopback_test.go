// SPDX-License-Identifier: Apache-2.0

package link

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestLoopbackStaysInside: the sandbox has a loopback of its own, where a
// resolver can listen. A frame to such an address that is put on the link by
// force reaches no socket of the host, not even when the host is set to take
// it.
func TestLoopbackStaysInside(t *testing.T) {
	m, f := open(t), newFar(t)
	markAll(t)
	l := launch(t, m, 1)
	inside := openNetns(t, m, l.ID)
	resolver := netip.MustParseAddr("127.0.0.53")

	serve(t, inside, netip.AddrPortFrom(resolver, 53).String())
	if got, err := ask(inside, netip.AddrPortFrom(resolver, 53), time.Second); err != nil || got == "" {
		t.Errorf("loopback inside: %q, %v", got, err)
	}

	onHost := listenUDP(t, nil, resolver)
	onFar := listenUDP(t, f.ns, f.addr4)
	for _, c := range []struct {
		routeLocalnet string
		dst           *net.UDPConn
		arrives       bool
	}{
		{"0", onHost, false}, {"1", onHost, false},
		{"0", onFar, true}, // the frame is one that a host forwards
	} {
		must(t, writeSysctl(sysctl4+"conf/"+m.HostName(l.ID)+"/route_localnet", c.routeLocalnet))
		to := c.dst.LocalAddr().(*net.UDPAddr).AddrPort()
		must(t, inNetns(inside, func() error { return sendFrame(udpFrame(l.Addr4, to)) }))
		if from, ok := received(c.dst, refused); ok != c.arrives {
			t.Errorf("to %s with route_localnet=%s: arrived = %t from %s, want %t", to, c.routeLocalnet, ok, from, c.arrives)
		}
	}
	drops(t, m, map[string]uint64{countToHost: 1})
}

// udpFrame is a datagram of one byte as the sandbox's end puts it on the link.
func udpFrame(src netip.Addr, to netip.AddrPort) []byte {
	b := append([]byte(nil), hostMAC...)
	b = append(b, MACFor(1)...)
	b = append(b, 8, 0)
	ip := []byte{0x45, 0, 0, 29, 0, 1, 0x40, 0, 64, unix.IPPROTO_UDP, 0, 0}
	ip = append(ip, src.AsSlice()...)
	ip = append(ip, to.Addr().AsSlice()...)
	sum := uint32(0)
	for i := 0; i < len(ip); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum+sum>>16))
	b = append(b, ip...)
	b = binary.BigEndian.AppendUint16(b, 4444)
	b = binary.BigEndian.AppendUint16(b, to.Port())
	return append(b, 0, 9, 0, 0, 'x') // length; no checksum
}

// sendFrame puts a frame on eth0 of the thread's namespace.
func sendFrame(b []byte) error {
	eth, err := netlink.LinkByName(insideName)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Sendto(fd, b, 0, &unix.SockaddrLinklayer{Ifindex: eth.Attrs().Index})
}
