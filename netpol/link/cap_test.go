// SPDX-License-Identifier: Apache-2.0

package link

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// openCapped is open with a cap on connections.
func openCapped(t testing.TB, limit uint32) *Manager {
	t.Helper()
	m := open(t)
	m.cfg.MaxConnections = limit
	must(t, m.Restore())
	return m
}

// hold accepts TCP connections and keeps them until the test ends.
func hold(t testing.TB, ns *os.File, addr string) netip.AddrPort {
	t.Helper()
	var ln net.Listener
	must(t, inNetns(ns, func() (err error) {
		ln, err = net.Listen("tcp", addr)
		return err
	}))
	done := make(chan struct{}) // closed when the server has left
	go func() {
		defer close(done)
		var held []net.Conn
		for {
			c, err := ln.Accept()
			if err != nil {
				break
			}
			held = append(held, c)
			go func() { // closes its end when the other does
				_, _ = c.Read(make([]byte, 1))
				_ = c.Close()
			}()
		}
		for _, c := range held {
			_ = c.Close()
		}
	}()
	t.Cleanup(func() { _ = ln.Close(); <-done })
	return netip.MustParseAddrPort(ln.Addr().String())
}

// TestConnectionCap: a sandbox gets as many connections as the cap says, and
// no more; what it has goes on; its neighbour notices nothing; after closing
// some it may open new ones.
func TestConnectionCap(t *testing.T) {
	const limit = 20
	m, f := openCapped(t, limit), newFar(t)
	markAll(t)
	a, b := launch(t, m, 1), launch(t, m, 2)
	from, neighbour := openNetns(t, m, a.ID), openNetns(t, m, b.ID)
	capped := uint64(0)
	for _, far := range []netip.Addr{f.addr4, f.addr6} {
		to := hold(t, f.ns, net.JoinHostPort(far.String(), "0")).String()
		var conns []net.Conn
		for i := range limit {
			c, err := dialFrom(from, "tcp", to, 5*time.Second)
			if err != nil {
				t.Fatalf("connection %d of %d: %v", i+1, limit, err)
			}
			t.Cleanup(func() { _ = c.Close() })
			conns = append(conns, c)
		}
		if got, err := m.Capped(a.ID); err != nil || got != capped {
			t.Errorf("at the cap: Capped = %d, %v, want %d", got, err, capped)
		}
		for range 3 {
			if _, err := dialFrom(from, "tcp", to, refused); err == nil {
				t.Fatalf("connection beyond the cap of %d to %s came about", limit, far)
			}
		}
		got, err := m.Capped(a.ID)
		if err != nil || got < capped+3 {
			t.Errorf("beyond the cap: Capped = %d, %v, want at least %d", got, err, capped+3)
		}
		if _, err := dialFrom(neighbour, "tcp", to, 5*time.Second); err != nil {
			t.Errorf("the neighbour cannot connect: %v", err)
		}
		if n, err := m.Capped(b.ID); err != nil || n != 0 {
			t.Errorf("neighbour: Capped = %d, %v, want 0", n, err)
		}
		for _, c := range conns {
			if _, err := c.Write([]byte("x")); err != nil {
				t.Errorf("an existing connection was hurt: %v", err)
			}
		}
		for _, c := range conns[:5] {
			must(t, c.Close())
		}
		closed := time.Now()
		for range 3 {
			if _, err := dialFrom(from, "tcp", to, 5*time.Second); err != nil {
				t.Errorf("after closing some: %v", err)
			}
		}
		t.Logf("%s: three connections %s after five were closed", far, time.Since(closed))
		if capped, err = m.Capped(a.ID); err != nil {
			t.Error(err)
		}
	}
	drops(t, m, map[string]uint64{countCapped: 1})
	if n, _, err := m.SecondLayerDrops(); err != nil || n != 0 {
		t.Errorf("SecondLayerDrops = %d, %v, want 0: a capped connection is not an alarm", n, err)
	}
	must(t, m.Remove(a.ID))
	launch(t, m, 1)
	if got, err := m.Capped(a.ID); err != nil || got != 0 {
		t.Errorf("the next holder's Capped = %d, %v, want 0", got, err)
	}
	if _, err := m.Capped(sandboxID(9)); err == nil {
		t.Error("Capped answered for a link that is not there")
	}
}

// TestCapCountsHalfOpen: attempts that are never answered, and UDP, count;
// and a flood of them leaves the neighbour alone and conntrack small.
func TestCapCountsHalfOpen(t *testing.T) {
	const limit = 50
	m, f := openCapped(t, limit), newFar(t)
	markAll(t)
	a, b := launch(t, m, 1), launch(t, m, 2)
	neighbour := openNetns(t, m, b.ID)
	silent := netip.MustParseAddr("192.0.2.77")
	must(t, inNetns(f.ns, func() error { return dropTo(silent) }))
	for proto, send := range map[string]func(i int) error{
		"tcp": func(i int) error { return sendSYN(netip.AddrPortFrom(silent, uint16(1+i))) },
		"udp": func(i int) error {
			c, err := net.Dial("udp", netip.AddrPortFrom(silent, uint16(1+i)).String())
			if err != nil {
				return err
			}
			_, err = c.Write([]byte("x"))
			_ = c.Close()
			return err
		},
	} {
		must(t, inNetns(openNetns(t, m, a.ID), func() error {
			for i := range 10 * limit {
				if err := send(i); err != nil {
					return fmt.Errorf("%s %d: %w", proto, i, err)
				}
			}
			return nil
		}))
		if n := entries(t, a.Addr4); n > limit {
			t.Errorf("after a flood of %s the sandbox has %d conntrack entries, want at most %d", proto, n, limit)
		}
		if n, err := m.Capped(a.ID); err != nil || n < 9*limit {
			t.Errorf("%s: Capped = %d, %v, want at least %d", proto, n, err, 9*limit)
		}
	}
	if n := entries(t, a.Addr4); n != limit {
		t.Errorf("the sandbox has %d conntrack entries, want %d", n, limit)
	}
	to := serve(t, f.ns, net.JoinHostPort(f.addr4.String(), "0"))
	if _, err := ask(neighbour, to, 5*time.Second); err != nil {
		t.Errorf("the neighbour cannot connect: %v", err)
	}
}

// TestCapLetsShortOnesThrough: connections that follow each other quickly do
// not add up to the cap, nor do the packets of one that is not answered.
func TestCapLetsShortOnesThrough(t *testing.T) {
	m, f := openBounded(t, 100, maxRate), newFar(t)
	markAll(t)
	l := launch(t, m, 1)
	from := openNetns(t, m, l.ID)
	to := serve(t, f.ns, net.JoinHostPort(f.addr4.String(), "0"))
	start := time.Now()
	const n = 2000
	must(t, inNetns(from, func() error {
		for range n {
			c, err := net.DialTimeout("tcp", to.String(), 5*time.Second)
			if err != nil {
				return err
			}
			_, _ = c.Read(make([]byte, 64))
			_, _ = c.Read(make([]byte, 1)) // its end first, so that no port of ours waits
			if err := c.Close(); err != nil {
				return err
			}
		}
		return nil
	}))
	t.Logf("%.0f connections a second", n/time.Since(start).Seconds())
	c, err := dialFrom(from, "udp", netip.AddrPortFrom(f.addr4, 9).String(), time.Second)
	must(t, err)
	for range 5000 {
		_, _ = c.Write([]byte("one way")) // refused, if the far end says so
	}
	must(t, c.Close())
	if got, err := m.Capped(l.ID); err != nil || got != 0 {
		t.Errorf("Capped = %d, %v, want 0", got, err)
	}
}

// sendSYN sends one SYN of a connection that nobody finishes.
func sendSYN(to netip.AddrPort) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	err = unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())})
	if err == unix.EINPROGRESS {
		return nil
	}
	return err
}

// entries counts the conntrack entries that an address began.
func entries(t *testing.T, src netip.Addr) (n int) {
	t.Helper()
	c, err := dialProto(unix.NETLINK_NETFILTER)
	must(t, err)
	defer c.close()
	must(t, c.eachFlow(func(f flow) {
		if f.src == src {
			n++
		}
	}))
	return n
}

// TestElementsOfTheGoneAreSwept: what the cap's sets hold of a sandbox that
// went while no process looked is deleted by Open.
func TestElementsOfTheGoneAreSwept(t *testing.T) {
	m, f := openCapped(t, 1), newFar(t)
	markAll(t)
	l := launch(t, m, 1)
	to := hold(t, f.ns, net.JoinHostPort(f.addr4.String(), "0")).String()
	_, err := dialFrom(openNetns(t, m, l.ID), "tcp", to, 5*time.Second)
	must(t, err)
	_, _ = dialFrom(openNetns(t, m, l.ID), "tcp", to, refused)
	if n, err := m.Capped(l.ID); err != nil || n == 0 {
		t.Fatalf("Capped = %d, %v, want some", n, err)
	}
	must(t, m.Publish(l.ID, []Port{{Host: 8080, Sandbox: 80, Proto: unix.IPPROTO_TCP}}))
	must(t, m.rt.do(deleteLink(m.HostName(l.ID))))
	again, err := Open(m.cfg)
	must(t, err)
	defer again.Close()
	noElementsLeft(t, again)
	must(t, again.Remove(l.ID))
}

// noElementsLeft waits until the kernel has let go of what has no connections
// any more, which it looks at once a second.
func noElementsLeft(t *testing.T, m *Manager) {
	t.Helper()
	var got []string
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if got = elementsLeft(t, m); len(got) == 0 {
			return
		}
		for _, e := range got {
			if !strings.HasPrefix(e, begun.connections) {
				t.Fatalf("elements left: %q", got)
			}
		}
	}
	t.Errorf("elements left after ten seconds: %q", got)
}

// elementsLeft names everything in the table's sets.
func elementsLeft(t *testing.T, m *Manager) []string {
	t.Helper()
	have, err := m.findTable()
	must(t, err)
	var all []string
	for _, s := range have.sets {
		elems, err := m.elements(s.Name)
		must(t, err)
		for _, e := range elems {
			all = append(all, s.Name+" "+element(e))
		}
	}
	return all
}
