// SPDX-License-Identifier: Apache-2.0

package link

import (
	"errors"
	"net"
	"net/netip"
	"strconv"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

const (
	tcp = unix.IPPROTO_TCP
	udp = unix.IPPROTO_UDP
)

func TestPublish(t *testing.T) {
	m, f := open(t), newFar(t)
	markAll(t)
	a, b := launch(t, m, 1), launch(t, m, 2)
	inside := openNetns(t, m, a.ID)
	must(t, m.Publish(a.ID, []Port{{Host: 8080, Sandbox: 80, Proto: tcp}, {Host: 8081, Sandbox: 80, Proto: tcp}}))
	for _, c := range []struct{ host, sandbox, client netip.Addr }{{f.host4, a.Addr4, f.addr4}, {f.host6, a.Addr6, f.addr6}} {
		serve(t, inside, net.JoinHostPort(c.sandbox.String(), "80"))
		serve(t, inside, net.JoinHostPort(c.sandbox.String(), "81"))
		for _, port := range []uint16{8080, 8081} {
			got, err := ask(f.ns, netip.AddrPortFrom(c.host, port), 5*time.Second)
			if err != nil || got != c.client.String() {
				t.Errorf("sandbox behind %s:%d saw %q, %v, want %s", c.host, port, got, err, c.client)
			}
		}
		// Not published, by the host's address and by the sandbox's.
		for _, to := range []netip.AddrPort{
			netip.AddrPortFrom(c.host, 80), netip.AddrPortFrom(c.host, 81),
			netip.AddrPortFrom(c.sandbox, 80), netip.AddrPortFrom(c.sandbox, 81), netip.AddrPortFrom(c.sandbox, 8080),
		} {
			if got, err := ask(f.ns, to, refused); err == nil {
				t.Errorf("%s was reached as %s", to, got)
			}
		}
		// No sandbox reaches it through the host: not the neighbour, not itself.
		for _, l := range []Link{a, b} {
			if got, err := ask(openNetns(t, m, l.ID), netip.AddrPortFrom(c.host, 8080), refused); err == nil {
				t.Errorf("sandbox %s reached a published port of the host as %s", l.ID, got)
			}
		}
	}
	// One of two host ports of the same port goes; the other stays.
	must(t, m.Publish(a.ID, []Port{{Host: 8081, Sandbox: 80, Proto: tcp}}))
	if _, err := ask(f.ns, netip.AddrPortFrom(f.host4, 8081), 5*time.Second); err != nil {
		t.Errorf("the port that stayed: %v", err)
	}
	if got, err := ask(f.ns, netip.AddrPortFrom(f.host4, 8080), refused); err == nil {
		t.Errorf("the port that went was reached as %s", got)
	}
	// A host port leads elsewhere.
	must(t, m.Publish(a.ID, []Port{{Host: 8081, Sandbox: 81, Proto: tcp}}))
	if _, err := ask(f.ns, netip.AddrPortFrom(f.host6, 8081), 5*time.Second); err != nil {
		t.Errorf("the port that was changed: %v", err)
	}
	must(t, m.VerifyTable())
}

func TestPublishUDP(t *testing.T) {
	m, f := open(t), newFar(t)
	markAll(t)
	l := launch(t, m, 1)
	in := listenUDP(t, openNetns(t, m, l.ID), l.Addr4)
	port := uint16(in.LocalAddr().(*net.UDPAddr).Port)
	must(t, m.Publish(l.ID, []Port{{Host: 5353, Sandbox: port, Proto: udp}}))
	c, err := dialFrom(f.ns, "udp", netip.AddrPortFrom(f.host4, 5353).String(), time.Second)
	must(t, err)
	defer c.Close()
	_, err = c.Write([]byte("question"))
	must(t, err)
	from, ok := received(in, 2*time.Second)
	if !ok || from.Addr() != f.addr4 {
		t.Fatalf("a datagram to the published port arrived from %s, %t", from, ok)
	}
	_, err = in.WriteToUDPAddrPort([]byte("answer"), from)
	must(t, err)
	must(t, c.SetReadDeadline(time.Now().Add(2*time.Second)))
	if _, err := c.Read(make([]byte, 64)); err != nil {
		t.Errorf("the answer: %v", err)
	}
	// The client goes; its kernel's complaint about the next answer arrives.
	must(t, errors.Join(c.Close(), in.Close()))
	var back *net.UDPConn
	must(t, inNetns(openNetns(t, m, l.ID), func() (err error) {
		back, err = net.DialUDP("udp", &net.UDPAddr{IP: l.Addr4.AsSlice(), Port: int(port)}, net.UDPAddrFromAddrPort(from))
		return err
	}))
	defer back.Close()
	_, err = back.Write([]byte("too late"))
	must(t, err)
	must(t, back.SetReadDeadline(time.Now().Add(2*time.Second)))
	if _, err := back.Read(make([]byte, 64)); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("an ICMP error about a published connection: %v, want refused", err)
	}
}

// TestPublishCutsFlows: a port that is no longer published is closed for the
// flows that it had, and opens again with them.
func TestPublishCutsFlows(t *testing.T) {
	m, f := open(t), newFar(t)
	markAll(t)
	l := launch(t, m, 1)
	in := listenUDP(t, openNetns(t, m, l.ID), l.Addr4)
	ports := []Port{{Host: 5353, Sandbox: uint16(in.LocalAddr().(*net.UDPAddr).Port), Proto: udp}}
	c, err := dialFrom(f.ns, "udp", netip.AddrPortFrom(f.host4, 5353).String(), time.Second)
	must(t, err)
	defer c.Close()
	send := func() bool {
		t.Helper()
		_, err := c.Write([]byte("x"))
		must(t, err)
		from, ok := received(in, refused)
		if ok {
			_, err := in.WriteToUDPAddrPort([]byte("answer"), from) // makes the flow an established one
			must(t, err)
			_ = c.SetReadDeadline(time.Now().Add(time.Second))
			_, err = c.Read(make([]byte, 64))
			must(t, err)
		}
		return ok
	}
	for i, want := range []bool{true, false, true} {
		if want {
			must(t, m.Publish(l.ID, ports))
		} else {
			must(t, m.Publish(l.ID, nil))
		}
		if got := send(); got != want {
			t.Errorf("step %d: arrived = %t, want %t", i, got, want)
		}
	}
}

func TestPublishRefuses(t *testing.T) {
	m := open(t)
	a, b := launch(t, m, 1), launch(t, m, 2)
	must(t, m.Publish(a.ID, []Port{{Host: 8080, Sandbox: 80, Proto: tcp}}))
	if err := m.Publish(b.ID, []Port{{Host: 8080, Sandbox: 81, Proto: tcp}}); !errors.Is(err, ErrPortTaken) {
		t.Errorf("a taken port = %v, want ErrPortTaken", err)
	}
	must(t, m.Publish(b.ID, []Port{{Host: 8080, Sandbox: 80, Proto: udp}})) // another protocol
	if err := m.Publish(sandboxID(9), nil); !errors.Is(err, ErrNotFound) {
		t.Errorf("unknown link = %v, want ErrNotFound", err)
	}
	for name, ports := range map[string][]Port{
		"host port 0":    {{Sandbox: 80, Proto: tcp}},
		"sandbox port 0": {{Host: 80, Proto: tcp}},
		"protocol":       {{Host: 80, Sandbox: 80, Proto: unix.IPPROTO_ICMP}},
		"twice":          {{Host: 80, Sandbox: 80, Proto: tcp}, {Host: 80, Sandbox: 81, Proto: tcp}},
	} {
		if err := m.Publish(a.ID, ports); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	want := map[string][]Port{
		a.ID: {{Host: 8080, Sandbox: 80, Proto: tcp}},
		b.ID: {{Host: 8080, Sandbox: 80, Proto: udp}},
	}
	got, err := m.Published()
	must(t, err)
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("Published (-want +got):\n%s", d)
	}
	// A later process knows them, though it has to make the table anew, and
	// frees those of who goes.
	c := &nftables.Conn{}
	c.AddChain(&nftables.Chain{Name: "extra", Table: m.table()})
	must(t, c.Flush())
	again, err := Open(m.cfg)
	must(t, err)
	defer again.Close()
	if got, err = again.Published(); err != nil || !cmp.Equal(want, got) {
		t.Errorf("after Open: Published = %v, %v, want %v", got, err, want)
	}
	if err := again.Publish(b.ID, []Port{{Host: 8080, Sandbox: 81, Proto: tcp}}); !errors.Is(err, ErrPortTaken) {
		t.Errorf("a taken port after Open = %v, want ErrPortTaken", err)
	}
	must(t, again.Remove(a.ID))
	must(t, again.Publish(b.ID, []Port{{Host: 8080, Sandbox: 81, Proto: tcp}}))
	must(t, again.Remove(b.ID))
	noElementsLeft(t, again)
}

// TestNextHolderInheritsNoInboundFlow: a flow that came in by a published
// port of a removed sandbox does not go on with the next one of the slot,
// though it publishes the same port of its own.
func TestNextHolderInheritsNoInboundFlow(t *testing.T) {
	m, f := open(t), newFar(t)
	markAll(t)
	const port = 4000
	listen := func(l Link) *net.UDPConn {
		t.Helper()
		var c *net.UDPConn
		must(t, inNetns(openNetns(t, m, l.ID), func() (err error) {
			c, err = net.ListenUDP("udp", &net.UDPAddr{IP: l.Addr4.AsSlice(), Port: port})
			return err
		}))
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	for host, want := range map[uint16]bool{5000: true, 5001: false} {
		c, err := dialFrom(f.ns, "udp", net.JoinHostPort(f.host4.String(), strconv.Itoa(5000)), time.Second)
		must(t, err)
		t.Cleanup(func() { _ = c.Close() })
		l := launch(t, m, 1)
		in := listen(l)
		must(t, m.Publish(l.ID, []Port{{Host: 5000, Sandbox: port, Proto: udp}}))
		_, err = c.Write([]byte("x"))
		must(t, err)
		if _, ok := received(in, 2*time.Second); !ok {
			t.Fatal("the first sandbox was not reached")
		}
		must(t, m.Remove(l.ID))
		l = launch(t, m, 1)
		in = listen(l)
		must(t, m.Publish(l.ID, []Port{{Host: host, Sandbox: port, Proto: udp}}))
		_, _ = c.Write([]byte("x"))
		if _, ok := received(in, refused); ok != want {
			t.Errorf("next sandbox with host port %d: reached = %t, want %t", host, ok, want)
		}
		must(t, m.Remove(l.ID))
	}
}
