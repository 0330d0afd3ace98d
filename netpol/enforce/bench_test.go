// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
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

// busyHost sets some host addresses, as a node has them.
func busyHost(b *testing.B, e *Enforcer) {
	ok(b, e.SetHostAddrs([]netip.Prefix{
		netip.MustParsePrefix("10.0.0.5/32"), netip.MustParsePrefix("172.17.0.1/32"), netip.MustParsePrefix("2001:db8:7::5/128"),
	}))
}

// BenchmarkProgramAllow is the cost of one allowed packet of a flow, by the
// size of the policy. Run it with -benchtime=1000000x -count=7 and take the
// median.
func BenchmarkProgramAllow(b *testing.B) {
	for _, n := range []int{1, 10, 1000, 10000, 100000} {
		b.Run(fmt.Sprintf("cidrs=%d", n), func(b *testing.B) {
			e := open(b, testConfig(b))
			busyHost(b, e)
			place(b, e, sandbox(testSlot, 1, entries(n)))
			benchmarkRun(b, e.fromSandbox, frame{dst: dst4}.bytes())
		})
	}
}

// BenchmarkProgramLimits is the same with limits in force that do not bite.
func BenchmarkProgramLimits(b *testing.B) {
	const fast = 100e9
	rates := []netpol.ProgramRate{{Tenant: "acme", Scope: netpol.ScopeTenant, Bits: fast}, {Tenant: "acme", Scope: netpol.ScopeSandbox, Bits: fast}}
	budget := []netpol.ProgramBudget{{Tenant: "acme", Scope: netpol.ScopeTenant, Bytes: 1 << 60, Per: netpol.PerDay}}
	for _, c := range []struct {
		name    string
		rates   []netpol.ProgramRate
		budgets []netpol.ProgramBudget
		rule    uint64
	}{
		{"rule rate", nil, nil, fast},
		{"one rate", rates[:1], nil, 0},
		{"two rates", rates, nil, 0},
		{"budget", nil, budget, 0},
		{"two rates, budget", rates, budget, 0},
	} {
		b.Run(c.name, func(b *testing.B) {
			e := open(b, testConfig(b))
			busyHost(b, e)
			ok(b, e.SetBudget(Budget{Tenant: "acme", Window: 1, Limit: 1 << 60}))
			p := entries(10)
			p.Rates, p.Budgets, p.Rules[0].Rate = c.rates, c.budgets, c.rule
			place(b, e, sandbox(testSlot, 1, p))
			benchmarkRun(b, e.fromSandbox, frame{dst: dst4}.bytes())
			if c := counters(b, e, testSlot); len(c.Drops) != 0 {
				b.Errorf("drops: %v", c.Drops)
			}
		})
	}
}

// BenchmarkProgramRandom is the cost of packets that each go somewhere else in
// the policy, so that nothing that is remembered helps.
func BenchmarkProgramRandom(b *testing.B) {
	for _, n := range []int{10, 1000, 10000, 100000} {
		b.Run(fmt.Sprintf("cidrs=%d", n), func(b *testing.B) {
			e := open(b, testConfig(b))
			busyHost(b, e)
			p := entries(n)
			place(b, e, sandbox(testSlot, 1, p))
			r := rand.New(rand.NewPCG(2, 2))
			var to [1 << 16]netip.Addr
			for i := range to {
				prefix := p.Entries[r.IntN(len(p.Entries))].Prefix
				a := prefix.Addr().As4()
				v := binary.BigEndian.Uint32(a[:]) | r.Uint32()>>prefix.Bits()
				to[i] = netip.AddrFrom4([4]byte{byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)})
			}
			benchmarkScattered(b, e.fromSandbox, to[:])
		})
	}
}

// benchmarkScattered is benchmarkRun with a destination of to, by chance, in
// each run. Writing it there is subtracted, too.
func benchmarkScattered(b *testing.B, p *ebpf.Program, to []netip.Addr) {
	dests, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: uint32(len(to))})
	ok(b, err)
	defer dests.Close()
	for i, a := range to {
		ok(b, dests.Put(uint32(i), a.As4()))
	}
	next, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 2})
	ok(b, err)
	defer next.Close()
	const dataAt, dataEndAt, dstAt = 76, 80, 30
	scatter := func(slot int32) *ebpf.Program {
		prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Type: ebpf.SchedCLS, AttachType: ebpf.AttachTCXIngress, License: "Dual BSD/GPL",
			Instructions: asm.Instructions{
				asm.Mov.Reg(asm.R6, asm.R1),
				asm.FnGetPrandomU32.Call(),
				asm.And.Imm(asm.R0, int32(len(to)-1)),
				asm.StoreMem(asm.RFP, -4, asm.R0, asm.Word),
				asm.LoadMapPtr(asm.R1, dests.FD()),
				asm.Mov.Reg(asm.R2, asm.RFP),
				asm.Add.Imm(asm.R2, -4),
				asm.FnMapLookupElem.Call(),
				asm.JEq.Imm(asm.R0, 0, "out"),
				asm.LoadMem(asm.R7, asm.R0, 0, asm.Word),
				asm.LoadMem(asm.R2, asm.R6, dataAt, asm.Word),
				asm.LoadMem(asm.R3, asm.R6, dataEndAt, asm.Word),
				asm.Mov.Reg(asm.R4, asm.R2),
				asm.Add.Imm(asm.R4, dstAt+4),
				asm.JGT.Reg(asm.R4, asm.R3, "out"),
				asm.StoreMem(asm.R2, dstAt, asm.R7, asm.Word),
				asm.Mov.Reg(asm.R1, asm.R6),
				asm.LoadMapPtr(asm.R2, next.FD()),
				asm.Mov.Imm(asm.R3, slot),
				asm.FnTailCall.Call(),
				asm.Mov.Imm(asm.R0, -1).WithSymbol("out"),
				asm.Return(),
			},
		})
		ok(b, err)
		return prog
	}
	judged, floor := scatter(0), scatter(1)
	defer judged.Close()
	defer floor.Close()
	noop, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, AttachType: ebpf.AttachTCXIngress, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
	})
	ok(b, err)
	defer noop.Close()
	ok(b, next.Put(uint32(0), p))
	ok(b, next.Put(uint32(1), noop))
	data := frame{dst: dst4}.bytes()
	_, base, err := floor.Benchmark(data, b.N, nil)
	ok(b, err)
	b.ResetTimer()
	_, took, err := judged.Benchmark(data, b.N, nil)
	ok(b, err)
	b.ReportMetric(float64(took), "ns/op")
	b.ReportMetric(float64(took-base), "net-ns/op")
}

// BenchmarkProgram is the cost of other paths through the programs.
func BenchmarkProgram(b *testing.B) {
	e := open(b, testConfig(b))
	place(b, e, sandbox(testSlot, 1, compile(b, allowAll+"- {name: no25, action: deny, to: [{cidr: 0.0.0.0/0}], ports: [25/tcp]}\n")))
	for _, c := range []struct {
		name string
		p    *ebpf.Program
		data []byte
	}{
		{"allow udp6", e.fromSandbox, frame{dst: dst6, udp: true}.bytes()},
		{"deny by rule", e.fromSandbox, frame{dst: dst4, port: 25}.bytes()},
		{"drop metadata", e.fromSandbox, frame{dst: netip.MustParseAddr("169.254.169.254")}.bytes()},
		{"drop arp", e.fromSandbox, frame{ether: 0x0806}.bytes()},
		{"drop spoofed mac", e.fromSandbox, frame{srcMAC: make([]byte, 6)}.bytes()},
		{"ingress", e.toSandbox, frame{src: dst4, dst: addr4(1)}.toSandbox()},
	} {
		b.Run(c.name, func(b *testing.B) { benchmarkRun(b, c.p, c.data) })
	}
	none := open(b, testConfig(b))
	place(b, none, sandbox(testSlot, 1, entries(10)))
	b.Run("no rule", func(b *testing.B) { benchmarkRun(b, none.fromSandbox, frame{dst: dst4, port: 80}.bytes()) })
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

// BenchmarkSetPolicy is a change of policy of 100 entries while packets are
// being judged. Run it with -benchtime=1000x.
func BenchmarkSetPolicy(b *testing.B) {
	e := open(b, testConfig(b))
	place(b, e, sandbox(testSlot, 1, netpol.Program{}))
	stop := traffic(b, e)
	defer stop()
	p := entries(100)
	var took []time.Duration
	for n := 0; b.Loop(); n++ {
		p.Digest = [32]byte{1, byte(n), byte(n >> 8), byte(n >> 16)}
		start := time.Now()
		ok(b, e.SetPolicy(testID, testSlot, p, 1, nil))
		took = append(took, time.Since(start))
		time.Sleep(time.Millisecond) // 1,000 changes a second would be more than a node ever sees
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-us")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-us")
	b.ReportMetric(float64(took[len(took)-1].Microseconds()), "max-us")
}

// BenchmarkSetPolicyOfMany is a change of the policy, of 100 entries, of 100
// sandboxes in a row while packets are being judged.
func BenchmarkSetPolicyOfMany(b *testing.B) {
	const n = 100
	cfg := testConfig(b)
	cfg.MaxSandboxes = 256
	e := open(b, cfg)
	for i := range uint32(n) {
		place(b, e, sandbox(i+1, 1+int(i)*1000, netpol.Program{}))
	}
	stop := traffic(b, e)
	defer stop()
	p := entries(100)
	var took []time.Duration
	for round := 0; b.Loop(); round++ {
		time.Sleep(500 * time.Millisecond) // as long after the last change as people are
		p.Digest = [32]byte{2, byte(round), byte(round >> 8)}
		start := time.Now()
		for i := range uint32(n) {
			ok(b, e.SetPolicy(sandbox(i+1, 0, p).ID, i+1, p, 1, nil))
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-us/100")
	b.ReportMetric(float64(took[len(took)-1].Microseconds()), "max-us/100")
}

// traffic judges packets of slot 1 until it is told to stop.
func traffic(b *testing.B, e *Enforcer) (stop func()) {
	quit, done := make(chan struct{}), make(chan struct{})
	data := frame{dst: dst4}.bytes()
	go func() {
		defer close(done)
		for {
			select {
			case <-quit:
				return
			default:
			}
			if _, _, err := e.fromSandbox.Benchmark(data, 1000, nil); err != nil {
				b.Error(err)
				return
			}
		}
	}()
	return func() {
		close(quit)
		<-done
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
