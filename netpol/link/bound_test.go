// SPDX-License-Identifier: Apache-2.0

package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// openBounded is open with a cap on connections and on how fast they come.
func openBounded(t testing.TB, limit, rate uint32) *Manager {
	t.Helper()
	m := open(t)
	m.cfg.MaxConnections, m.cfg.NewConnectionsPerSecond = limit, rate
	must(t, m.Restore())
	return m
}

// bound is how many entries of conntrack a sandbox holds at most in one
// family and direction.
func (m *Manager) bound() int {
	c := m.cfg
	return int(2*c.MaxConnections + c.NewConnectionsPerSecond*uint32(timeWait/time.Second))
}

// hammer opens short connections from a namespace as fast as it can until
// stop is closed. It answers how many came about.
func hammer(ns *os.File, to netip.AddrPort, stop <-chan struct{}) (done *atomic.Int64, wait func()) {
	done = new(atomic.Int64)
	var all sync.WaitGroup
	for range 16 {
		all.Go(func() {
			_ = inNetns(ns, func() error {
				for {
					select {
					case <-stop:
						return nil
					default:
					}
					c, err := net.DialTimeout("tcp", to.String(), 100*time.Millisecond)
					if err != nil {
						continue
					}
					_ = c.SetReadDeadline(time.Now().Add(time.Second))
					_, _ = c.Read(make([]byte, 64))
					_, _ = c.Read(make([]byte, 1)) // its end first, so that no port of ours waits
					_ = c.Close()
					done.Add(1)
				}
			})
		})
	}
	return done, all.Wait
}

// most looks again and again, for a time, how many entries match, and answers
// the most that it saw.
func most(t *testing.T, match func(flow) bool, d time.Duration) (n int) {
	t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		n = max(n, count(t, match))
	}
	return n
}

func count(t *testing.T, match func(flow) bool) (n int) {
	t.Helper()
	c, err := dialProto(unix.NETLINK_NETFILTER)
	must(t, err)
	defer c.close()
	must(t, c.eachFlow(func(f flow) {
		if match(f) {
			n++
		}
	}))
	return n
}

func from(a netip.Addr) func(flow) bool { return func(f flow) bool { return f.src == a } }

// TestConntrackIsBounded: a sandbox that hammers an allowed listener with
// short connections holds no more of conntrack than its bound, and goes on at
// its rate; its neighbour notices nothing.
func TestConntrackIsBounded(t *testing.T) {
	const limit, rate = 50, 40
	const lasts = timeWait + 3*time.Second
	m, f := openBounded(t, limit, rate), newFar(t)
	markAll(t)
	a, b := launch(t, m, 1), launch(t, m, 2)
	for _, c := range []struct{ far, addr netip.Addr }{{f.addr4, a.Addr4}, {f.addr6, a.Addr6}} {
		to := serve(t, f.ns, net.JoinHostPort(c.far.String(), "0"))
		stop := make(chan struct{}) // closed by the test
		done, wait := hammer(openNetns(t, m, a.ID), to, stop)
		quiet := make(chan error, 1) // one answer; never closed
		go func() { quiet <- steady(openNetns(t, m, b.ID), to, rate/2, stop) }()
		got := most(t, from(c.addr), lasts)
		close(stop)
		wait()
		if err := <-quiet; err != nil {
			t.Errorf("the neighbour: %v", err)
		}
		if got > m.bound() {
			t.Errorf("%s had %d conntrack entries, want at most %d", c.addr, got, m.bound())
		}
		least, top := int64(rate*lasts/time.Second*3/4), int64(limit+rate*(lasts/time.Second+1))
		if n := done.Load(); n < least || n > top {
			t.Errorf("%s made %d connections in %s, want %d to %d", c.addr, n, lasts, least, top)
		}
		t.Logf("%s: %d connections, at most %d entries, bound %d", c.addr, done.Load(), got, m.bound())
	}
	if n, err := m.Capped(a.ID); err != nil || n == 0 {
		t.Errorf("Capped = %d, %v, want some", n, err)
	}
	if n, err := m.Capped(b.ID); err != nil || n != 0 {
		t.Errorf("neighbour: Capped = %d, %v, want 0", n, err)
	}
	must(t, m.Verify(a.ID))
	must(t, m.Remove(a.ID))
	must(t, m.Remove(b.ID))
	noElementsLeft(t, m)

	// The next holder has a burst of its own.
	next := launch(t, m, 1)
	to := serve(t, f.ns, net.JoinHostPort(f.addr4.String(), "0"))
	for i := range limit {
		if _, err := ask(openNetns(t, m, next.ID), to, 5*time.Second); err != nil {
			t.Fatalf("connection %d of the next holder: %v", i, err)
		}
	}
	if n, err := m.Capped(next.ID); err != nil || n != 0 {
		t.Errorf("next holder: Capped = %d, %v, want 0", n, err)
	}
}

// steady connects at a rate until stop is closed. No connection may fail or
// take long.
func steady(ns *os.File, to netip.AddrPort, perSecond int, stop <-chan struct{}) error {
	for n := 1; ; n++ {
		if _, err := ask(ns, to, 900*time.Millisecond); err != nil { // less than the first SYN waits
			return fmt.Errorf("connection %d: %w", n, err)
		}
		select {
		case <-stop:
			return nil
		case <-time.After(time.Second / time.Duration(perSecond)):
		}
	}
}

// TestBoundIsOfTheRules is the control: without the limits the same load
// holds more in a moment.
func TestBoundIsOfTheRules(t *testing.T) {
	m, f := openBounded(t, 50, 40), newFar(t)
	markAll(t)
	l := launch(t, m, 1)
	c := &nftables.Conn{}
	c.FlushChain(&nftables.Chain{Name: begun.chain, Table: m.table()})
	must(t, c.Flush())
	stop := make(chan struct{}) // closed by the test
	done, wait := hammer(openNetns(t, m, l.ID), serve(t, f.ns, net.JoinHostPort(f.addr4.String(), "0")), stop)
	got := 0
	for end := time.Now().Add(20 * time.Second); got <= m.bound() && time.Now().Before(end); {
		got = most(t, from(l.Addr4), time.Second)
	}
	close(stop)
	wait()
	t.Logf("%d connections, %d entries, bound %d", done.Load(), got, m.bound())
	if got <= m.bound() {
		t.Errorf("without the limits the sandbox had %d entries, want more than %d", got, m.bound())
	}
}

// TestReopenedIsCounted: the kernel takes a SYN and its answer on a connection
// that was reset for the same connection, if its entry is still there, and
// then nobody counts it. A sandbox and its far end may not gain any so.
func TestReopenedIsCounted(t *testing.T) {
	const limit = 10
	m, f := openBounded(t, limit, 1000), newFar(t)
	markAll(t)
	l := launch(t, m, 1)
	to := resetThenHold(t, f.ns, net.JoinHostPort(f.addr4.String(), "0"))
	reopened := 0
	must(t, inNetns(openNetns(t, m, l.ID), func() error {
		for i := range 4 * limit {
			d := net.Dialer{
				Timeout: 150 * time.Millisecond, LocalAddr: &net.TCPAddr{IP: l.Addr4.AsSlice(), Port: 20000 + i},
				Control: reuse,
			}
			c, err := d.Dial("tcp", to.String())
			if err == nil {
				_, err = c.Read(make([]byte, 1))
				_ = c.Close()
			}
			if timeout := net.Error(nil); errors.As(err, &timeout) && timeout.Timeout() {
				continue // at the cap
			}
			if !errors.Is(err, unix.ECONNRESET) { // the reset may come before Dial is back
				return fmt.Errorf("first connection from port %d: %w, want a reset", 20000+i, err)
			}
			time.Sleep(10 * time.Millisecond)
			if other, err := net.DialTimeout("tcp", to.String(), 150*time.Millisecond); err == nil {
				_ = other.Close() // the kernel has counted again, and left out what is closed
			}
			if c, err = d.Dial("tcp", to.String()); err == nil {
				reopened++
				t.Cleanup(func() { _ = c.Close() })
			}
		}
		return nil
	}))
	if n := count(t, from(l.Addr4)); reopened > limit || n > limit {
		t.Errorf("the sandbox holds %d connections and %d entries, want at most %d", reopened, n, limit)
	}
	if reopened < limit-1 {
		t.Errorf("the sandbox could use a port again %d times, want %d", reopened, limit)
	}
}

func reuse(_, _ string, c syscall.RawConn) (err error) {
	cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	return errors.Join(err, cerr)
}

// resetThenHold resets the first connection from each port and keeps those
// that follow.
func resetThenHold(t *testing.T, ns *os.File, addr string) netip.AddrPort {
	t.Helper()
	var ln net.Listener
	must(t, inNetns(ns, func() (err error) {
		ln, err = net.Listen("tcp", addr)
		return err
	}))
	done := make(chan struct{}) // closed when the server has left
	go func() {
		defer close(done)
		seen := map[string]bool{}
		var held []net.Conn
		for {
			c, err := ln.Accept()
			if err != nil {
				break
			}
			from := c.RemoteAddr().String()
			if seen[from] {
				held = append(held, c)
				continue
			}
			seen[from] = true
			_ = c.(*net.TCPConn).SetLinger(0)
			_ = c.Close()
		}
		for _, c := range held {
			_ = c.Close()
		}
	}()
	t.Cleanup(func() { _ = ln.Close(); <-done })
	return netip.MustParseAddrPort(ln.Addr().String())
}

// TestTimeouts: closed connections go soon; the other timeouts are those of
// the host, TCP or not.
func TestTimeouts(t *testing.T) {
	const established = 54321
	m, f := open(t), newFar(t)
	markAll(t)
	path := "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established"
	was, err := readSysctl(path)
	must(t, err)
	must(t, writeSysctl(path, strconv.Itoa(established)))
	t.Cleanup(func() { must(t, writeSysctl(path, was)) })
	must(t, m.VerifyTable())
	must(t, m.Restore())
	must(t, m.VerifyTable())
	l := launch(t, m, 1)
	ns := openNetns(t, m, l.ID)
	for _, far := range []netip.Addr{f.addr4, f.addr6} {
		sink := listenUDP(t, f.ns, far)
		u, err := dialFrom(ns, "udp", sink.LocalAddr().String(), time.Second)
		must(t, err)
		_, err = u.Write([]byte("x"))
		must(t, errors.Join(err, u.Close()))
		c, err := dialFrom(ns, "tcp", hold(t, f.ns, net.JoinHostPort(far.String(), "0")).String(), 5*time.Second)
		must(t, err)
		want := func(when string, tcpMost, tcpLeast uint32) {
			t.Helper()
			for proto, left := range timeouts(t, l) {
				most, least := tcpMost, tcpLeast
				if proto == udp {
					most, least = 30, 25 // nf_conntrack_udp_timeout
				}
				if left > most || left < least {
					t.Errorf("%s, %s: protocol %d has %d s left, want %d to %d", far, when, proto, left, least, most)
				}
			}
		}
		want("established", established, established-5)
		must(t, c.Close())
		time.Sleep(100 * time.Millisecond)
		want("closed", 5, 3)
		must(t, m.forget(l.Addr4, l.Addr6))
	}
}

// timeouts answers how many seconds the entries of a sandbox have left, by
// protocol.
func timeouts(t *testing.T, l Link) map[uint8]uint32 {
	t.Helper()
	const ctaTimeout, ctaTupleProto, ctaProtoNum = 7, 2, 1
	c, err := dialProto(unix.NETLINK_NETFILTER)
	must(t, err)
	defer c.close()
	r := &request{op: "list conntrack entries", msg: nl.NewNetlinkRequest(ctGet, unix.NLM_F_DUMP)}
	r.add(&nl.Nfgenmsg{NfgenFamily: unix.AF_UNSPEC})
	all := map[uint8]uint32{}
	must(t, c.get(r, func(_ uint16, b []byte) error {
		f, err := parseFlow(b)
		if err != nil || f.src != l.Addr4 && f.src != l.Addr6 {
			return err
		}
		var proto uint8
		b = b[nl.SizeofNfgenmsg:]
		err = along(b, []uint16{ctaTupleOrig, ctaTupleProto, ctaProtoNum}, func(v []byte) error { proto = v[0]; return nil })
		return errors.Join(err, within(b, ctaTimeout, func(v []byte) error {
			all[proto] = binary.BigEndian.Uint32(v)
			return nil
		}))
	}))
	if len(all) != 2 {
		t.Errorf("entries of %d protocols, want TCP and UDP: %v", len(all), all)
	}
	return all
}

// TestInboundIsBounded: others hold no more connections to a published port
// than the cap, and open them no faster than the rate; what the sandbox begins
// is counted apart.
func TestInboundIsBounded(t *testing.T) {
	const limit, rate = 20, 20
	m, f := openBounded(t, limit, rate), newFar(t)
	markAll(t)
	l := launch(t, m, 1)
	inside := openNetns(t, m, l.ID)
	must(t, m.Publish(l.ID, []Port{{Host: 8080, Sandbox: 80, Proto: tcp}, {Host: 8081, Sandbox: 81, Proto: tcp}}))
	for _, c := range []struct{ host, sandbox, far netip.Addr }{{f.host4, l.Addr4, f.addr4}, {f.host6, l.Addr6, f.addr6}} {
		hold(t, inside, net.JoinHostPort(c.sandbox.String(), "80"))
		serve(t, inside, net.JoinHostPort(c.sandbox.String(), "81"))
		to := func(f flow) bool { return f.answers == c.sandbox }
		var held []net.Conn
		for range 2 * limit {
			if conn, err := dialFrom(f.ns, "tcp", netip.AddrPortFrom(c.host, 8080).String(), 100*time.Millisecond); err == nil {
				held = append(held, conn)
			}
		}
		if n := count(t, to); len(held) != limit || n != limit {
			t.Errorf("%s: %d connections from outside and %d entries, want %d", c.host, len(held), n, limit)
		}
		if _, err := ask(inside, serve(t, f.ns, net.JoinHostPort(c.far.String(), "0")), 5*time.Second); err != nil {
			t.Errorf("%s: the sandbox itself cannot connect: %v", c.host, err)
		}
		for _, conn := range held {
			must(t, conn.Close())
		}
		stop := make(chan struct{}) // closed by the test
		done, wait := hammer(f.ns, netip.AddrPortFrom(c.host, 8081), stop)
		got := most(t, to, timeWait+2*time.Second)
		close(stop)
		wait()
		if n := done.Load(); got > m.bound() || n < rate {
			t.Errorf("%s: at most %d entries, want %d; %d connections, want at least %d", c.host, got, m.bound(), n, rate)
		}
		t.Logf("%s: %d connections, at most %d entries, bound %d", c.host, done.Load(), got, m.bound())
	}
	if n, err := m.Capped(l.ID); err != nil || n == 0 {
		t.Errorf("Capped = %d, %v, want some", n, err)
	}
	must(t, m.Remove(l.ID))
	if n := count(t, func(f flow) bool { return f.answers == l.Addr4 || f.answers == l.Addr6 }); n != 0 {
		t.Errorf("%d entries are left", n)
	}
	noElementsLeft(t, m)
}
