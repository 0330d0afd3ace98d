// SPDX-License-Identifier: Apache-2.0

package threats

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/netpol"
	"github.com/bulkheadhq/bulkhead/netpol/link"
)

// An accomplice outside asks a published port in the name of a server that the
// policy closes. The sandbox may answer, but not connect to that server.
func TestPublishedPortInAnothersName(t *testing.T) {
	n := theWorld(t)
	const port, hostPort = 8080, 30081
	server := netip.AddrPortFrom(other4, 4443)
	p, err := netpol.WithPublished(compile(t, ""), "acme", []netpol.PortRange{{Lo: port, Hi: port, Proto: netpol.TCP}})
	must(t, err)
	b := n.launch(t, p)
	must(t, n.links.Publish(b.id, []link.Port{{Host: hostPort, Sandbox: port, Proto: protoTCP}}))
	serveEcho(t, n, server)

	syn := packet{dst: host4, src: other4, syn: true, sport: server.Port(), port: hostPort}.from(n.open)[14:]
	must(t, in(n.far, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, syn, 0, &unix.SockaddrInet4{Addr: host4.As4()})
	}))
	time.Sleep(settle)
	connects := func(b *box) bool {
		var c net.Conn
		err := in(b.ns, func() (err error) {
			d := net.Dialer{Timeout: refused, LocalAddr: &net.TCPAddr{Port: port}}
			c, err = d.Dial("tcp4", server.String())
			return err
		})
		if err != nil {
			return false
		}
		defer c.Close()
		return ping(c, patience) == nil
	}
	if !connects(n.open) {
		t.Error("control: the server does not answer")
	}
	before := b.drops(t)
	if connects(b) {
		t.Errorf("the sandbox has connected to %s", server)
	}
	if b.dropped(t, "no_rule", before, 1) == 0 {
		t.Errorf("nothing was dropped: %v", b.drops(t))
	}
}

// The answers of a published UDP port leave to who asked.
func TestPublishedUDPPort(t *testing.T) {
	n := theWorld(t)
	const port, hostPort = 5300, 30082
	p, err := netpol.WithPublished(compile(t, ""), "acme", []netpol.PortRange{{Lo: port, Hi: port, Proto: netpol.UDP}})
	must(t, err)
	b := n.launch(t, p)
	must(t, n.links.Publish(b.id, []link.Port{{Host: hostPort, Sandbox: port, Proto: protoUDP}}))
	for _, host := range []netip.Addr{host4, host6} {
		var server, visitor net.PacketConn
		must(t, in(b.ns, func() (err error) {
			server, err = net.ListenPacket("udp", netip.AddrPortFrom(b.addr(host.Is6()), port).String())
			return err
		}))
		must(t, in(n.far, func() (err error) {
			visitor, err = net.ListenPacket("udp", netip.AddrPortFrom(map[bool]netip.Addr{false: far4, true: far6}[host.Is6()], 0).String())
			return err
		}))
		buf := make([]byte, 16)
		must(t, server.SetDeadline(time.Now().Add(patience)))
		must(t, visitor.SetDeadline(time.Now().Add(patience)))
		_, err := visitor.WriteTo([]byte("ping"), net.UDPAddrFromAddrPort(netip.AddrPortFrom(host, hostPort)))
		must(t, err)
		_, from, err := server.ReadFrom(buf)
		must(t, err)
		_, err = server.WriteTo([]byte("pong"), from)
		must(t, err)
		if _, _, err := visitor.ReadFrom(buf); err != nil {
			t.Errorf("no answer from %s: %v; drops %v", host, err, b.drops(t))
		}
		must(t, server.Close())
		must(t, visitor.Close())
	}
}
