// SPDX-License-Identifier: Apache-2.0

package threats

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/netpol"
	"github.com/bulkheadhq/bulkhead/netpol/enforce"
)

// silent4 and silent6 answer nothing, so that a connection stays half open.
var (
	silent4 = netip.MustParseAddr("203.0.113.250")
	silent6 = netip.MustParseAddr("2001:db8:1::250")
)

// One sandbox opens connections without end; the tracker is all sandboxes'.
func TestConntrackExhaustion(t *testing.T) {
	n := theWorld(t)
	neighbour := n.sandbox(t, allowAll)
	const many = 10 * maxConnections
	for _, c := range []struct {
		name string
		dst  netip.Addr
	}{
		{"IPv4", silent4}, {"IPv6", silent6},
	} {
		t.Run(c.name, func(t *testing.T) {
			flood := func(from *box, k token) {
				for i := range uint16(many) {
					from.send(t, packet{dst: c.dst, syn: true, sport: 10000 + i, port: 8080, payload: k[:]}.from(from))
				}
				time.Sleep(2 * settle)
			}
			v6 := c.dst.Is6()
			k := newToken()
			n.await(k)
			flood(n.open, k)
			if got := flows(t, n.open.addr(v6)); n.count(k) < many || got < many {
				t.Errorf("control: %d of %d connections arrived without a cap, %d are tracked", n.count(k), many, got)
			}
			n.forget(k)

			b := n.sandbox(t, allowAll)
			live := packet{dst: far4, port: 7000, sport: 9999}
			arrives(t, n, b, live)
			before, err := n.links.Capped(b.id)
			must(t, err)
			k = newToken()
			n.await(k)
			flood(b, k)
			t.Logf("%d of %d arrived, %d are tracked", n.count(k), many, flows(t, b.addr(v6)))
			if got := flows(t, b.addr(v6)); got == 0 || got > maxConnections+2 {
				t.Errorf("the tracker holds %d connections of the sandbox, want at most %d", got, maxConnections)
			}
			n.forget(k)
			capped, err := n.links.Capped(b.id)
			must(t, err)
			if capped == before {
				t.Error("nothing is counted as capped")
			}
			arrives(t, n, b, live)
			if capped, err := n.links.Capped(neighbour.id); err != nil || capped != 0 {
				t.Errorf("the neighbour: %d packets capped, %v", capped, err)
			}
			arrives(t, n, neighbour, packet{dst: far4, syn: true, port: 8080, sport: 60000})
		})
	}
}

// Connections that are closed at once: the cap does not count them, and the
// tracker remembers each for up to two minutes. They cost nobody a place: the
// kernel gives them up first when its table is full.
func TestConntrackOfClosedConnections(t *testing.T) {
	n := theWorld(t)
	const many = 4 * maxConnections
	to := netip.AddrPortFrom(far4, 5000)
	serve(t, n, to, func(io.ReadWriter) {}) // closes first
	churn := func(b *box) {
		must(t, in(b.ns, func() error {
			for range many {
				c, err := net.DialTimeout("tcp", to.String(), refused)
				if err != nil {
					continue // the cap
				}
				_, _ = c.Read(make([]byte, 1)) // its end
				_ = c.Close()
			}
			return nil
		}))
	}
	churn(n.open)
	if got := flowsThat(t, n.open.addr4, closed); got < many/2 {
		t.Errorf("control: of %d closed connections %d are tracked", many, got)
	}
	b := n.sandbox(t, allowAll)
	churn(b)
	open := flowsThat(t, b.addr4, func(f *netlink.ConntrackFlow) bool { return !closed(f) })
	if open > maxConnections {
		t.Errorf("the tracker holds %d open connections of the sandbox, want at most %d", open, maxConnections)
	}
}

// noOffload makes a device take only packets that are ready for the wire.
func noOffload(t testing.TB, name string, on uint32) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(fd)
	value := [2]uint32{unix.ETHTOOL_STXCSUM, on}
	var req struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}
	copy(req.name[:], name)
	req.data = unsafe.Pointer(&value)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 {
		t.Fatalf("ethtool %s: %v", name, errno)
	}
}

// Large packets that the device cuts up: each segment has headers of its own,
// which a sum of packet lengths misses.
func TestSegmentsSpendTheBudget(t *testing.T) {
	n := theWorld(t)
	const (
		limit   = 256 << 10
		payload = 100
		segment = payload + 28
		each    = 60 // segments
	)
	noOffload(t, "up0", 0)
	t.Cleanup(func() { noOffload(t, "up0", 1) })
	program := func(tenant, more string) netpol.Program {
		p, err := netpol.Compile([]netpol.Layer{{Tenant: tenant, Policy: parse(t, "- {name: udp, action: allow, to: [{cidr: 192.0.2.0/24}], ports: [7000/udp]}\n"+more)}})
		must(t, err)
		return p
	}
	// blast sends twice the budget and answers the segments that arrive.
	blast := func(b *box) (arrived int) {
		k := newToken()
		n.await(k)
		defer n.forget(k)
		body := bytes.Repeat(k[:], each*payload/len(k))
		must(t, in(b.ns, func() error {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			if err := unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_SEGMENT, payload); err != nil {
				return err
			}
			for sent := 0; sent < 2*limit; sent += each * segment {
				if err := unix.Sendto(fd, body, 0, &unix.SockaddrInet4{Port: 7000, Addr: far4.As4()}); err != nil {
					return err
				}
				time.Sleep(time.Millisecond)
			}
			return nil
		}))
		time.Sleep(2 * settle)
		return n.count(k)
	}
	if got := blast(n.launch(t, program("acme/free", ""))); got*segment < 2*limit-each*segment {
		t.Errorf("control: %d bytes arrive without a budget, want %d", got*segment, 2*limit)
	}
	must(t, n.enforce.SetBudget(enforce.Budget{Tenant: "acme/spent", Window: 3600, Limit: limit}))
	b := n.launch(t, program("acme/spent", "budget: {egress: 256KiB, per: hour, then: block}\n"))
	got := blast(b)
	if bytes := got * segment; bytes > limit || bytes < limit/2 {
		t.Errorf("%d bytes left under a budget of %d", bytes, limit)
	}
	c, err := n.enforce.Counters(b.slot)
	must(t, err)
	if c.EgressBytes != uint64(got*segment) {
		t.Errorf("%d bytes counted, %d left", c.EgressBytes, got*segment)
	}
	if b.drops(t)["budget"] == 0 {
		t.Errorf("nothing was dropped for the budget: %v", b.drops(t))
	}
}

// A sandbox that makes the log write without end must cost neither a verdict
// nor its neighbour's lines.
func TestFloodOfDeniedPackets(t *testing.T) {
	n := theWorld(t)
	b, neighbour := n.sandbox(t, ""), n.sandbox(t, openRule)
	const many = 20000
	ctx, cancel := context.WithCancel(context.Background())
	var mu sync.Mutex
	seen := map[string]int{}
	var total uint64
	done := make(chan error, 1)
	go func() {
		done <- n.enforce.Events(ctx, func(e enforce.Event) {
			mu.Lock()
			defer mu.Unlock()
			seen[e.ID+" "+e.Reason]++
			if e.ID == b.id {
				total = max(total, e.TotalPackets)
			}
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil && ctx.Err() == nil {
			t.Errorf("events: %v", err)
		}
	})
	count := func(b *box, reason string) int {
		mu.Lock()
		defer mu.Unlock()
		return seen[b.id+" "+reason]
	}
	denied := one(packet{dst: other4, port: 7777})
	eventually(t, func() string { // until somebody listens
		b.send(t, denied(b, newToken())...)
		if count(b, "no_rule") == 0 {
			return "no event of a denied packet"
		}
		return ""
	})
	n.control(t, attack{"flood", "no_rule", denied, false})

	k := newToken()
	n.await(k)
	defer n.forget(k)
	before, lines, start := b.drops(t)["no_rule"], count(b, "no_rule"), time.Now()
	for i := range uint16(many) {
		b.send(t, packet{dst: other4, port: 1 + i%1000, sport: i + 1024, payload: k[:]}.from(b))
		if i%(many/4) == 0 {
			arrives(t, n, neighbour, packet{dst: other4, port: 7000 + i})
			neighbour.send(t, one(packet{dst: oob4, port: 1})(neighbour, newToken())...)
		}
	}
	seconds := int(time.Since(start).Seconds()) + 2
	eventually(t, func() string {
		if got := b.drops(t)["no_rule"] - before; got != many {
			return fmt.Sprintf("%d of %d packets were dropped", got, many)
		}
		return ""
	})
	if got := n.count(k); got != 0 {
		t.Errorf("%d packets of the flood arrived", got)
	}
	if got := count(b, "no_rule") - lines; got > 4*seconds {
		t.Errorf("%d lines in %d seconds for one sandbox, rule and reason", got, seconds)
	}
	eventually(t, func() string {
		if count(neighbour, "allow") == 0 || count(neighbour, "host_network") == 0 {
			return "the neighbour's lines are missing"
		}
		return ""
	})
	lost, err := n.enforce.EventsLost()
	must(t, err)
	if lost != 0 {
		t.Errorf("%d events lost", lost)
	}
}
