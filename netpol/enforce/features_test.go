// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/bulkheadhq/bulkhead/bpf"
	"github.com/bulkheadhq/bulkhead/netpol"
)

const allowEcho = "- {name: ping, action: allow, to: [{cidr: 0.0.0.0/0}, {cidr: '::/0'}], ports: [echo/icmp]}\n"

// Of ICMP nothing passes but whole, small, few echo requests that a rule
// allows.
func TestEcho(t *testing.T) {
	e := unit(t, allowAll+allowEcho)
	reset := func() { ok(t, e.maps["echoes"].Put(uint32(testSlot), uint64(0))) }
	for _, dst := range []netip.Addr{dst4, dst6} {
		request, reason, head := byte(8), "icmp", 20
		if dst.Is6() {
			request, reason, head = 128, "icmp6", 40
		}
		for typ := range 256 {
			reset()
			f := echo(dst, 84)
			f.l4[0] = byte(typ)
			want := reason
			switch {
			case byte(typ) == request:
				want = "allow"
			case dst.Is6() && (typ >= 130 && typ <= 137 || typ == 143):
				want = "neighbour"
			}
			expect(t, e, fmt.Sprintf("%s type %d", dst, typ), f.bytes(), want)
		}
		for code := 1; code < 256; code++ {
			f := echo(dst, 84)
			f.l4[1] = byte(code)
			expect(t, e, fmt.Sprintf("%s code %d", dst, code), f.bytes(), reason)
		}
		for n, want := range map[int]string{head + 7: "bad_length", head + 8: "allow", 84: "allow", 576: "allow", 577: "echo_size", 1500: "echo_size"} {
			reset()
			expect(t, e, fmt.Sprintf("%s %d bytes", dst, n), echo(dst, n).bytes(), want)
		}
	}

	// Ten at once, both families together, then one each 100 ms.
	reset()
	for i := range 10 {
		expect(t, e, fmt.Sprintf("ping %d", i), echo([]netip.Addr{dst4, dst6}[i%2], 84).bytes(), "allow")
	}
	start := time.Now()
	expect(t, e, "ping 11", echo(dst4, 84).bytes(), "echo_rate")
	for time.Since(start) < 500*time.Millisecond {
		run(t, e.fromSandbox, echo(dst4, 84).bytes(), 0)
		time.Sleep(5 * time.Millisecond)
	}
	rules, err := e.RuleCounters(testID, testSlot)
	ok(t, err)
	for _, r := range rules {
		// 2 of 256 types, 6 of sizes, 10 and what 500 ms and the clock's steps leave.
		if r.Rule == "ping" && (r.Packets < 18+3 || r.Packets > 18+7) {
			t.Errorf("%d echo requests passed, want 18 and about 5", r.Packets)
		}
	}

	// A neighbour has its own.
	place(t, e, sandbox(2, 4242, compile(t, allowEcho)))
	reset()
	for range 11 {
		run(t, e.fromSandbox, echo(dst4, 84).bytes(), 0)
	}
	if x, err := e.Explain(2, netpol.Flow{Proto: netpol.ICMP, Dst: dst4, Port: netpol.EchoPort}); err != nil || !x.Allowed || x.Rule != "ping" {
		t.Errorf("explain of a neighbour: %+v, %v", x, err)
	}
	if x, err := e.Explain(testSlot, netpol.Flow{Proto: netpol.ICMP, Dst: dst6, Port: netpol.EchoPort}); err != nil || x.Reason != "echo_rate" {
		t.Errorf("explain: %+v, %v, want echo_rate", x, err)
	}
}

// What is remembered about a destination holds for one policy of one sandbox
// and one set of hard denies.
func TestNothingIsRememberedTooLong(t *testing.T) {
	e := unit(t, allowAll)
	first := frame{dst: dst4}.bytes()
	allow := func(name string) {
		t.Helper()
		for range 3 { // the later ones are remembered
			expect(t, e, name, first, "allow")
		}
	}
	allow("before")
	ok(t, e.SetPolicy(testID, testSlot, compile(t, "- {name: no, action: deny, to: [{cidr: 192.0.2.0/24}]}\n"), 2, nil))
	expect(t, e, "next policy", first, "rule_deny")
	ok(t, e.SetPolicy(testID, testSlot, compile(t, allowAll4), 3, nil))
	allow("allowed again")

	ok(t, e.SetHostAddrs([]netip.Prefix{netip.PrefixFrom(dst4, 32)}))
	expect(t, e, "host address", first, "host")
	ok(t, e.SetHostAddrs(nil))
	allow("no host address")

	// Another sandbox, whose policy says nothing, on the same link.
	ok(t, e.Detach(testID, testSlot))
	other := sandbox(testSlot, 1, compile(t, "- {name: other, action: allow, to: [{cidr: 203.0.113.0/24}], ports: [443/tcp]}\n"))
	other.ID = "bbbbbbbbbbbb"
	place(t, e, other)
	expect(t, e, "next sandbox", first, "no_rule")

	// A process that died has used none of the generations of the next.
	used := e.shm.values[testSlot].Policy >> 32
	cfg := e.cfg
	ok(t, e.Close())
	e = open(t, cfg)
	ok(t, e.SetPolicy(other.ID, testSlot, compile(t, allowAll), 4, nil))
	if next := e.shm.values[testSlot].Policy >> 32; next <= used {
		t.Errorf("generation %d comes after %d", next, used)
	}
	allow("after a restart")
}

// Every destination, port and protocol is remembered for itself, also where
// many share a place.
func TestRememberedVerdictsDoNotMix(t *testing.T) {
	e := unit(t, "- {name: odd, action: allow, to: [{cidr: 192.0.0.0/16}, {cidr: '2001:db8::/32'}], ports: [443/tcp, 53/udp]}\n")
	for i := range 5000 {
		a := netip.AddrFrom4([4]byte{192, byte(i % 3), byte(i >> 8), byte(i)})
		f := frame{dst: a, port: []uint16{443, 53, 444}[i%3], udp: i%2 == 0}
		want := drop
		if a.As4()[1] == 0 && (f.port == 443 && !f.udp || f.port == 53 && f.udp) {
			want = next
		}
		for range 2 {
			if got := run(t, e.fromSandbox, f.bytes(), 0); got.ret != int32(want) {
				t.Fatalf("%s port %d udp %v: got %d, want %d", a, f.port, f.udp, got.ret, want)
			}
		}
	}
}

// Answers leave only to where a connection to a published port came from.
func TestPublishedPorts(t *testing.T) {
	e := open(t, testConfig(t))
	p, err := netpol.WithPublished(compile(t, "- {name: smtp, action: deny, to: [{cidr: 192.0.2.9/32}]}\n"), "acme",
		[]netpol.PortRange{{Lo: 80, Hi: 80, Proto: netpol.TCP}, {Lo: 53, Hi: 53, Proto: netpol.UDP}})
	ok(t, err)
	place(t, e, sandbox(testSlot, 1, p))
	in := func(f frame, mark uint32) {
		t.Helper()
		f.dst = addr4(testSlot)
		if f.src.Is6() {
			f.dst = addr6(testSlot)
		}
		ctx := make([]byte, skbSize)
		binary.NativeEndian.PutUint32(ctx[skbMark:], mark)
		ret, err := e.toSandbox.Run(&ebpf.RunOptions{Data: f.toSandbox(), Context: ctx})
		ok(t, err)
		if int32(ret) != next {
			t.Fatalf("a packet from outside was dropped: %+v", f)
		}
	}
	answer := frame{dst: dst4, sport: 80, port: 40000, flags: 0x12}
	expect(t, e, "before", answer.bytes(), "no_rule")
	in(frame{src: dst4, sport: 40000, port: 80, flags: 0x10}, 0) // an answer itself, as far as we know
	expect(t, e, "an ACK opens nothing", answer.bytes(), "no_rule")
	in(frame{src: dst4, sport: 40000, port: 80, flags: 0x12}, 0)
	expect(t, e, "a SYN with ACK opens nothing", answer.bytes(), "no_rule")
	in(frame{src: dst4, sport: 40000, port: 81}, 0)
	in(frame{src: dst4, sport: 40000, port: 80, udp: true}, 0x62690000)
	expect(t, e, "other port, other protocol", answer.bytes(), "no_rule")
	in(frame{src: dst4, sport: 40000, port: 80}, 0)
	expect(t, e, "answer", answer.bytes(), "allow")
	for name, f := range map[string]frame{
		"other peer":        {dst: netip.MustParseAddr("192.0.2.2"), sport: 80, port: 40000, flags: 0x10},
		"other remote port": {dst: dst4, sport: 80, port: 40001, flags: 0x10},
		"other local port":  {dst: dst4, sport: 81, port: 40000, flags: 0x10},
		"udp":               {dst: dst4, sport: 80, port: 40000, udp: true},
		"v6":                {dst: dst6, sport: 80, port: 40000, flags: 0x10},
		"of its own":        {dst: dst4, sport: 80, port: 40000, flags: 2},
	} {
		expect(t, e, name, f.bytes(), "no_rule")
	}

	in(frame{src: dst6, sport: 5353, port: 53, udp: true}, 0)
	dns := frame{dst: dst6, sport: 53, port: 5353, udp: true}
	expect(t, e, "a datagram opens nothing", dns.bytes(), "no_rule")
	in(frame{src: dst6, sport: 5353, port: 53, udp: true}, 0x62690000)
	expect(t, e, "but one that the host marked", dns.bytes(), "allow")
	in(frame{src: netip.MustParseAddr("192.0.2.9"), sport: 40000, port: 80}, 0)
	expect(t, e, "a deny rule beats it", frame{dst: netip.MustParseAddr("192.0.2.9"), sport: 80, port: 40000}.bytes(), "rule_deny")

	rules, err := e.RuleCounters(testID, testSlot)
	ok(t, err)
	var names []string
	for _, r := range rules {
		if r.Packets > 0 {
			names = append(names, fmt.Sprint(r.Tenant, " ", r.Rule, " ", r.Packets))
		}
	}
	if got, want := strings.Join(names, ", "), "acme published:53/udp 1, acme published:80/tcp 1, acme smtp 1"; got != want {
		t.Errorf("rules: got %s, want %s", got, want)
	}

	// Nobody is answered for ever who has said nothing any more.
	age(t, e, 8001)
	expect(t, e, "long after the last packet", answer.bytes(), "no_rule")
	in(frame{src: dst4, sport: 40000, port: 80}, 0)
	expect(t, e, "and again", answer.bytes(), "allow")

	// Not published any more, and not for the next sandbox in the slot.
	ok(t, e.SetPolicy(testID, testSlot, compile(t, allowEcho), 2, nil))
	expect(t, e, "no longer published", answer.bytes(), "no_rule")
	ok(t, e.Detach(testID, testSlot))
	place(t, e, sandbox(testSlot, 1, p))
	expect(t, e, "another life", answer.bytes(), "no_rule")
}

// age makes all that came in come from so many seconds ago.
func age(t *testing.T, e *Enforcer, seconds uint64) {
	t.Helper()
	var k bpf.DatapathBhInbound
	var seen uint64
	var keys []bpf.DatapathBhInbound
	for it := e.maps["inbound"].Iterate(); it.Next(&k, &seen); {
		keys = append(keys, k)
	}
	for _, k := range keys {
		ok(t, e.maps["inbound"].Put(k, e.state.values[0].Tick-seconds))
	}
}

// A budget is spent to the byte and never beyond, and a packet that one limit
// stops takes nothing from the others.
func TestBudgetToTheByte(t *testing.T) {
	defer pinCPU(t)() // what is left of a lease is with its CPU
	e := open(t, testConfig(t))
	p := compile(t, allowAll)
	p.Budgets = []netpol.ProgramBudget{{Tenant: "acme", Scope: netpol.ScopeTenant, Bytes: 1}, {Tenant: "acme", Scope: netpol.ScopeSandbox, Bytes: 1}}
	const limit = 300_003
	ok(t, e.SetBudget(Budget{Tenant: "acme", Window: 1, Limit: limit}))
	ok(t, e.SetBudget(Budget{Tenant: "acme", Slot: testSlot, Window: 1, Limit: 1 << 40}))
	place(t, e, sandbox(testSlot, 1, p))
	spent := func(slot uint32) uint64 {
		t.Helper()
		list, err := e.Budgets()
		ok(t, err)
		for _, b := range list {
			if b.Slot == slot {
				return b.Spent
			}
		}
		t.Fatalf("no budget of slot %d in %v", slot, list)
		return 0
	}
	send := func(n int, want int32) {
		t.Helper()
		if got := run(t, e.fromSandbox, frame{dst: dst4, udp: true, payload: n - 28}.bytes(), 0); got.ret != want {
			t.Fatalf("%d bytes after %d of %d: got %d, want %d", n, spent(0), limit, got.ret, want)
		}
	}
	sum := 0
	for n := 29; sum+n <= limit-1000; n = 28 + n*7%1400 {
		send(n, next)
		sum += n
		if got := spent(0); got != uint64(sum) {
			t.Fatalf("spent %d, want %d", got, sum)
		}
	}
	rest := limit - sum
	send(rest+1, drop)
	send(rest, next)
	send(28, drop)
	send(28, drop)
	if a, b := spent(0), spent(testSlot); a != limit || b != limit {
		t.Errorf("spent %d and %d, want %d: the second gave back what the first refused", a, b, limit)
	}
	if got := counters(t, e, testSlot).EgressBytes; got != limit {
		t.Errorf("%d bytes left, want %d", got, limit)
	}
	if got := drops(t, e, testSlot)["budget"]; got != 3 {
		t.Errorf("drops for budget: got %d, want 3", got)
	}
	if x, err := e.Explain(testSlot, netpol.Flow{Proto: netpol.TCP, Dst: dst4, Port: 443}); err != nil || x.Reason != "budget" || x.Rule != "all4" {
		t.Errorf("explain: %+v, %v, want budget", x, err)
	}

	// The other order: what the first had leased comes back when the second has
	// nothing left.
	ok(t, e.SetBudget(Budget{Tenant: "acme", Window: 2, Limit: 1 << 40}))
	ok(t, e.SetBudget(Budget{Tenant: "acme", Slot: testSlot, Window: 2, Limit: 100}))
	send(28, next)
	for range 5 {
		send(500, drop)
	}
	if a, b := spent(0), spent(testSlot); a != 28 || b != 28 {
		t.Errorf("spent %d and %d, want 28", a, b)
	}
	send(72, next)
	send(28, drop)
}

// No index is used again while a program may look at it, and all come back.
func TestPoliciesComeBack(t *testing.T) {
	e := unit(t, allowAll)
	total := settle(t, e)
	programs := []netpol.Program{compile(t, allowAll4), compile(t, allowAll)}
	data := frame{dst: dst4}.bytes()
	stop := make(chan struct{})
	done := make(chan error, 1)
	go func() { // every packet is allowed by either policy
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if got, err := tryRun(e.fromSandbox, data, 0); err != nil || got.ret != next {
				done <- fmt.Errorf("a packet got %d, %v while the policy changed", got.ret, err)
				return
			}
		}
	}()
	seen := map[uint64]bool{}
	for i := range 1000 {
		ok(t, e.SetPolicy(testID, testSlot, programs[i%2], uint64(i+2), nil))
		if gen := e.shm.values[testSlot].Policy >> 32; seen[gen] {
			t.Fatalf("generation %d was used twice", gen)
		} else {
			seen[gen] = true
		}
	}
	close(stop)
	if err := <-done; err != nil {
		t.Error(err)
	}
	if got := settle(t, e); got != total {
		t.Errorf("%d policies are free, were %d", got, total)
	}
	var meta bpf.DatapathBhMeta
	ok(t, e.maps["meta"].Lookup(uint32(0), &meta))
	if last := uint32(e.shm.values[testSlot].Policy >> 32); meta.NextGen <= last {
		t.Errorf("generation %d is in use, but the next process begins with %d", last, meta.NextGen)
	}
}

// Steps that do not fit into an entry of the trie decide as well, in their
// order, and one that is lost denies.
func TestLongEntries(t *testing.T) {
	e := open(t, testConfig(t))
	p := netpol.Program{Rules: []netpol.RuleRef{{Tenant: "acme", Name: "even"}, {Tenant: "acme", Name: "odd", Action: netpol.Deny}}}
	var steps []netpol.PortRule
	for i := range uint16(maxPortRules) {
		steps = append(steps, netpol.PortRule{Lo: 1000 + i, Hi: 1000 + i, Proto: netpol.TCP, Deny: i%2 == 1, Rule: i % 2})
	}
	for n, prefix := range []string{"192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24"} {
		p.Entries = append(p.Entries, netpol.Entry{Prefix: netip.MustParsePrefix(prefix), Ports: steps[:len(steps)-n*13]})
	}
	place(t, e, sandbox(testSlot, 1, p))
	for n, dst := range []string{"192.0.2.1", "198.51.100.1", "203.0.113.1"} {
		for i := range uint16(maxPortRules + 1) {
			want := "no_rule"
			if int(i) < len(steps)-n*13 {
				want = []string{"allow", "rule_deny"}[i%2]
			}
			expect(t, e, fmt.Sprintf("%s port %d", dst, 1000+i), frame{dst: netip.MustParseAddr(dst), port: 1000 + i}.bytes(), want)
		}
	}

	var trie *ebpf.Map
	ok(t, e.maps["policies"].Lookup(e.shm.policy(testSlot), &trie))
	defer trie.Close()
	k := bpf.DatapathBhLpmKey{Prefixlen: familyBits + 128, Family: familyMore}
	binary.NativeEndian.PutUint32(k.Addr[:], 1)
	binary.NativeEndian.PutUint32(k.Addr[4:], 3)
	ok(t, trie.Delete(k))
	if v, err := e.ask(testSlot, frame{dst: dst4, port: 1012}.bytes()); err != nil || reasonName(v.reason) != "rule_deny" {
		t.Errorf("a lost step: got %+v, %v, want rule_deny", v, err)
	}
}
