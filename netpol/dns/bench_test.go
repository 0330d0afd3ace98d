// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"

	mdns "github.com/miekg/dns"

	"github.com/bulkheadhq/bulkhead/netpol"
)

// BenchmarkAddedLatency asks an upstream on the loopback device directly and
// through the resolver of a namespace, in turn, and reports what is added.
func BenchmarkAddedLatency(b *testing.B) {
	upstream := serveZone(b, newZone(web, "www.example.com. 60 A 93.184.216.35"))
	sp := newSpace(b, true)
	p := compile(b, webRules)
	srv, err := Open(Config{Dir: filepath.Join(b.TempDir(), "dns"), Table: newTable(p), Upstreams: []string{upstream}, Rate: 1e6, Burst: 1e6})
	if err != nil {
		b.Fatal(err)
	}
	defer srv.Close()
	if err := srv.Start(context.Background(), Sandbox{ID: testID, Slot: testSlot, Netns: sp.path(), Program: p}); err != nil {
		b.Fatal(err)
	}
	q := new(mdns.Msg)
	q.SetQuestion("www.example.com.", mdns.TypeA)
	raw, err := q.Pack()
	if err != nil {
		b.Fatal(err)
	}
	buf := make([]byte, 1500)
	ask := func(conn net.Conn) time.Duration {
		start := time.Now()
		_ = conn.SetDeadline(start.Add(5 * time.Second))
		if _, err := conn.Write(raw); err != nil {
			b.Fatal(err)
		}
		if _, err := conn.Read(buf); err != nil {
			b.Fatal(err)
		}
		return time.Since(start)
	}
	inside := sp.dial("udp")
	direct, err := net.Dial("udp", upstream)
	if err != nil {
		b.Fatal(err)
	}
	defer direct.Close()
	var one, two []time.Duration
	for b.Loop() {
		one = append(one, ask(direct))
		two = append(two, ask(inside))
	}
	slices.Sort(one)
	slices.Sort(two)
	for _, at := range []int{50, 99} {
		i := len(one) * at / 100
		b.ReportMetric(float64((two[i] - one[i]).Microseconds()), fmt.Sprintf("added-p%d-us", at))
		b.ReportMetric(float64(one[i].Microseconds()), fmt.Sprintf("direct-p%d-us", at))
	}
}

// BenchmarkSwap changes the policy of a sandbox that knows many addresses.
func BenchmarkSwap(b *testing.B) {
	var records []string
	for i := range 1000 {
		records = append(records, fmt.Sprintf("n%d.cdn.example.com. 600 A 93.184.%d.%d", i, i>>8, i&255))
	}
	p := compile(b, webRules)
	r := newRig(b, p, newZone(), func(c *Config) { c.NamesPerMinute = 1 << 20 })
	r.srv.up = newZone(records...)
	for i := range 1000 {
		r.ask(fmt.Sprintf("n%d.cdn.example.com", i), mdns.TypeA)
	}
	if n := len(r.tb.has()); n != 1000 {
		b.Fatal(n)
	}
	for b.Loop() {
		if err := r.srv.Swap(testID, p, func([]netpol.Learned) error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkStart starts sandboxes, each in a namespace of its own, and reports
// what one that asks nothing costs.
func BenchmarkStart(b *testing.B) {
	p := compile(b, webRules)
	const n = 64
	var spaces []*space
	for range n {
		spaces = append(spaces, newSpace(b, true))
	}
	var before, after runtime.MemStats
	for b.Loop() {
		b.StopTimer()
		srv, err := Open(Config{Dir: filepath.Join(b.TempDir(), "dns"), Table: silent{}, Upstreams: []string{"127.0.0.1:1"}})
		if err != nil {
			b.Fatal(err)
		}
		runtime.GC()
		runtime.ReadMemStats(&before)
		b.StartTimer()
		for i, sp := range spaces {
			as := Sandbox{ID: fmt.Sprintf("s%d", i), Slot: uint32(i), Netns: sp.path(), Program: p}
			if err := srv.Start(context.Background(), as); err != nil {
				b.Fatal(err)
			}
		}
		b.StopTimer()
		runtime.GC()
		runtime.ReadMemStats(&after)
		srv.Close()
		b.StartTimer()
	}
	used := int64(after.HeapInuse+after.StackInuse) - int64(before.HeapInuse+before.StackInuse)
	b.ReportMetric(float64(used)/n/1024, "KiB/sandbox")
	b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N)/n, "us/start")
}

// silent is a table of any sandbox.
type silent struct{}

func (silent) Learn(string, uint32, [32]byte, netpol.Learned) error { return nil }
func (silent) Forget(string, uint32, netip.Addr) error              { return nil }
func (silent) Learned(string, uint32) (map[netip.Addr]time.Duration, error) {
	return nil, nil
}
