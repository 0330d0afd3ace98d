// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"github.com/bulkheadhq/bulkhead/netpol"
)

// entries is a program that allows dst4 and n-1 other prefixes at port 443,
// the way CIDR lists of services look.
func entries(n int) netpol.Program {
	p := netpol.Program{Rules: []netpol.RuleRef{{Tenant: "acme", Name: "bench", Action: netpol.Allow}}}
	https := []netpol.PortRule{{Lo: 443, Hi: 443, Proto: netpol.TCP}}
	p.Entries = []netpol.Entry{{Prefix: netip.MustParsePrefix("192.0.2.0/24"), Ports: https}}
	r := rand.New(rand.NewPCG(1, 1))
	seen := map[netip.Prefix]bool{}
	for len(p.Entries) < n {
		a := r.Uint32()
		prefix := netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(a >> 24), byte(a >> 16), byte(a >> 8), byte(a)}), 16+r.IntN(17)).Masked()
		if !seen[prefix] && !prefix.Overlaps(p.Entries[0].Prefix) {
			seen[prefix] = true
			p.Entries = append(p.Entries, netpol.Entry{Prefix: prefix, Ports: https})
		}
	}
	return p
}

// benchmarkRun reports the time of one run of p beside that of a program that
// does nothing, which is what a test run costs by itself.
func benchmarkRun(b *testing.B, p *ebpf.Program, data []byte) {
	noop, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
	})
	ok(b, err)
	defer noop.Close()
	_, floor, err := noop.Benchmark(data, b.N, nil)
	ok(b, err)
	b.ResetTimer()
	_, took, err := p.Benchmark(data, b.N, nil)
	ok(b, err)
	b.ReportMetric(float64(took), "ns/op")
	b.ReportMetric(float64(took-floor), "net-ns/op")
}

// BenchmarkProgramAllow is the cost of one allowed packet, by the size of the
// policy. Run it with -benchtime=1000000x -count=7 and take the median.
func BenchmarkProgramAllow(b *testing.B) {
	for _, n := range []int{1, 10, 100, 1000, 10000} {
		b.Run(fmt.Sprintf("cidrs=%d", n), func(b *testing.B) {
			e := open(b, testConfig(b))
			ok(b, e.SetHostAddrs([]netip.Prefix{
				netip.MustParsePrefix("10.0.0.5/32"), netip.MustParsePrefix("172.17.0.1/32"), netip.MustParsePrefix("2001:db8:7::5/128"),
			}))
			place(b, e, sandbox(testSlot, 1, entries(n)))
			benchmarkRun(b, e.fromSandbox, frame{dst: dst4}.bytes())
		})
	}
}

// BenchmarkProgram is the cost of other paths through the programs.
func BenchmarkProgram(b *testing.B) {
	e := open(b, testConfig(b))
	place(b, e, sandbox(testSlot, 1, compile(b, allowAll)))
	for _, c := range []struct {
		name string
		p    *ebpf.Program
		data []byte
	}{
		{"allow udp6", e.fromSandbox, frame{dst: dst6, udp: true}.bytes()},
		{"drop metadata", e.fromSandbox, frame{dst: netip.MustParseAddr("169.254.169.254")}.bytes()},
		{"drop arp", e.fromSandbox, frame{ether: 0x0806}.bytes()},
		{"drop spoofed mac", e.fromSandbox, frame{srcMAC: make([]byte, 6)}.bytes()},
		{"ingress", e.toSandbox, frame{src: dst4, dst: addr4(1)}.toSandbox()},
	} {
		b.Run(c.name, func(b *testing.B) { benchmarkRun(b, c.p, c.data) })
	}
}

// BenchmarkAttach is what Attach adds to the start of a sandbox.
func BenchmarkAttach(b *testing.B) {
	ns, index := links(b, 1)
	e := open(b, testConfig(b))
	sb := sandbox(1, index[0], entries(20))
	var took time.Duration
	for b.Loop() {
		ok(b, in(ns, func() error {
			start := time.Now()
			defer func() { took += time.Since(start) }()
			return e.Attach(context.Background(), sb)
		}))
		ok(b, in(ns, func() error { return e.Detach(sb.ID, 1) }))
	}
	b.ReportMetric(float64(took.Nanoseconds())/float64(b.N), "ns/op")
}

// BenchmarkAttachWithoutLinks is the part of it that is ours.
func BenchmarkAttachWithoutLinks(b *testing.B) {
	e := open(b, testConfig(b))
	sb := sandbox(1, 1, entries(20))
	var took time.Duration
	for b.Loop() {
		start := time.Now()
		place(b, e, sb)
		took += time.Since(start)
		ok(b, e.Detach(sb.ID, 1))
	}
	b.ReportMetric(float64(took.Nanoseconds())/float64(b.N), "ns/op")
}

func BenchmarkSetPolicy(b *testing.B) {
	e := open(b, testConfig(b))
	place(b, e, sandbox(testSlot, 1, netpol.Program{}))
	p := entries(20)
	for b.Loop() {
		ok(b, e.SetPolicy(testID, testSlot, p, 1))
	}
}

func BenchmarkCounters(b *testing.B) {
	e := open(b, testConfig(b))
	place(b, e, sandbox(testSlot, 1, netpol.Program{}))
	for b.Loop() {
		counters(b, e, testSlot)
	}
}

// BenchmarkAttachBurst is the time until the last of 50 sandboxes that start
// at once is attached.
func BenchmarkAttachBurst(b *testing.B) {
	const n = 50
	ns, index := links(b, n)
	e := open(b, testConfig(b))
	p := entries(20)
	var took time.Duration
	for b.Loop() {
		start := time.Now()
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() {
				if err := in(ns, func() error { return e.Attach(context.Background(), sandbox(uint32(i+1), index[i], p)) }); err != nil {
					b.Error(err)
				}
			})
		}
		wg.Wait()
		took += time.Since(start)
		for i := range n {
			ok(b, e.Detach(sandbox(uint32(i+1), index[i], p).ID, 0))
		}
	}
	b.ReportMetric(float64(took.Nanoseconds())/float64(b.N), "ns/op")
}
