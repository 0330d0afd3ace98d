// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/bulkheadhq/bulkhead/netpol"
)

// The reference: what DESIGN and the program's README promise, written again
// without a look at the C.

// refFlow reads a frame of the sandbox in testSlot. It answers the flow, or
// why the frame must not pass.
func refFlow(b []byte) (f netpol.Flow, hdrs int, why string) {
	if len(b) < 14 {
		return f, 0, "short"
	}
	if string(b[6:12]) != string([]byte{0x02, 0x62, 0x68, 0, 0, testSlot}) {
		return f, 0, "spoof_mac"
	}
	l3 := b[14:]
	var src netip.Addr
	var l4 []byte
	switch binary.BigEndian.Uint16(b[12:]) {
	case 0x0800:
		switch {
		case len(l3) < 20:
			return f, 0, "short"
		case l3[0]>>4 != 4:
			return f, 0, "bad_version"
		case l3[0]&15 < 5:
			return f, 0, "bad_length"
		case l3[0]&15 > 5:
			return f, 0, "ip_options"
		case int(binary.BigEndian.Uint16(l3[2:])) != len(l3):
			return f, 0, "bad_length"
		case binary.BigEndian.Uint16(l3[6:])&^0x4000 != 0:
			return f, 0, "fragment"
		}
		src, f.Dst = netip.AddrFrom4([4]byte(l3[12:])), netip.AddrFrom4([4]byte(l3[16:]))
		f.Proto, hdrs, l4 = netpol.Proto(l3[9]), 20, l3[20:]
	case 0x86dd:
		switch {
		case len(l3) < 40:
			return f, 0, "short"
		case l3[0]>>4 != 6:
			return f, 0, "bad_version"
		case 40+int(binary.BigEndian.Uint16(l3[4:])) != len(l3):
			return f, 0, "bad_length"
		}
		src, f.Dst = netip.AddrFrom16([16]byte(l3[8:])), netip.AddrFrom16([16]byte(l3[24:]))
		f.Proto, hdrs, l4 = netpol.Proto(l3[6]), 40, l3[40:]
		if why := refIPv6Other(l3[6], l4); why != "" {
			return f, 0, why
		}
	case 0x0806, 0x8035:
		return f, 0, "arp"
	case 0x8100, 0x88a8, 0x9100, 0x9200, 0x9300:
		return f, 0, "vlan"
	default:
		return f, 0, "ethertype"
	}
	if src != addr4(testSlot) && src != addr6(testSlot) {
		return f, hdrs, "spoof_ip"
	}
	switch f.Proto {
	case netpol.TCP:
		if len(l4) < 20 {
			return f, 0, "bad_length"
		}
		doff := int(l4[12]>>4) * 4
		if doff < 20 || doff > len(l4) {
			return f, 0, "bad_length"
		}
		hdrs += doff
	case netpol.UDP:
		if len(l4) < 8 || int(binary.BigEndian.Uint16(l4[4:])) != len(l4) {
			return f, 0, "bad_length"
		}
		hdrs += 8
	case 1, 58:
		why := "icmp"
		if f.Proto == 58 {
			why = "icmp6"
		}
		switch v4 := f.Dst.Is4(); {
		case v4 != (f.Proto == 1):
			return f, 0, "protocol"
		case len(l4) == 0:
			return f, 0, "short"
		case len(l4) == 1 || v4 && l4[0] != 8 || !v4 && l4[0] != 128 || l4[1] != 0:
			return f, 0, why
		case len(l4) < 8:
			return f, 0, "bad_length"
		}
		return netpol.Flow{Proto: netpol.ICMP, Dst: f.Dst, Port: netpol.EchoPort}, hdrs + 8, ""
	default:
		return f, 0, "protocol"
	}
	f.Port = binary.BigEndian.Uint16(l4[2:])
	return f, hdrs, ""
}

func refIPv6Other(next byte, l4 []byte) string {
	listener := []byte{130, 131, 132, 143}
	switch next {
	case 6, 17:
		return ""
	case 58:
		switch {
		case len(l4) == 0:
			return "short"
		case l4[0] >= 130 && l4[0] <= 137 || l4[0] == 143:
			return "neighbour"
		case l4[0] == 128:
			return ""
		}
		return "icmp6"
	case 0:
		if len(l4) > 8 && l4[0] == 58 && l4[1] == 0 && slices.Contains(listener, l4[8]) {
			return "neighbour"
		}
		return "ext_header"
	case 44:
		return "fragment"
	case 43, 50, 51, 59, 60, 135, 139, 140:
		return "ext_header"
	}
	return "protocol"
}

// refDeny answers why an address is denied to everybody.
func refDeny(list []netpol.HardDeny, a netip.Addr) (why string) {
	bits := -1
	for _, h := range list {
		if h.Prefix.Contains(a) && h.Prefix.Bits() > bits {
			bits, why = h.Prefix.Bits(), h.Reason
		}
	}
	if b := a.As16(); why == "" && netip.MustParsePrefix("64:ff9b::/96").Contains(a) { // a translator's
		return refDeny(list, netip.AddrFrom4([4]byte(b[12:])))
	} else if why == "" && netip.MustParsePrefix("2002::/16").Contains(a) {
		return refDeny(list, netip.AddrFrom4([4]byte(b[2:6])))
	}
	return why
}

// differ compares program and reference over frames.
type differ struct {
	e       *Enforcer
	program netpol.Program
	names   map[netip.Addr][]string // that were learned at an address
	inbound map[flowEnds]bool       // connections from outside to published ports
	last    flowEnds                // of them
	denied  []netpol.HardDeny       // always
	host    netip.Prefix            // and this
	total   Counters
	hits    map[ruleKey]uint64 // packets
	seen    map[string]int     // verdicts
}

// flowEnds is a connection as the sandbox sees it.
type flowEnds struct {
	proto         netpol.Proto
	local, remote uint16
	peer          netip.Addr
}

var someHosts = []netip.Prefix{netip.MustParsePrefix("10.1.2.3/32"), netip.MustParsePrefix("10.0.0.1/32"), netip.MustParsePrefix("2001:db8::1/128")}

func newDiffer(t testing.TB) *differ {
	cfg := testConfig(t)
	cfg.HardDeny = []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16")}
	d := &differ{e: open(t, cfg), hits: map[ruleKey]uint64{}, seen: map[string]int{}, inbound: map[flowEnds]bool{}}
	place(t, d.e, sandbox(testSlot, 1, netpol.Program{}))
	for _, h := range netpol.HardDenied() {
		if h.Prefix.Addr().Is4() || !mapped.Contains(h.Prefix.Addr()) || h.Prefix.IsSingleIP() {
			d.denied = append(d.denied, h)
		}
	}
	d.denied = append(d.denied,
		netpol.HardDeny{Prefix: mapped, Reason: "v4_mapped"},
		netpol.HardDeny{Prefix: cfg.HardDeny[0], Reason: "host_network"},
		netpol.HardDeny{Prefix: pool4, Reason: "sandbox"},
		netpol.HardDeny{Prefix: pool6, Reason: "sandbox"})
	d.setHost(t, someHosts[0])
	return d
}

// setHost changes the address of the node.
func (d *differ) setHost(t testing.TB, p netip.Prefix) {
	t.Helper()
	ok(t, d.e.SetHostAddrs([]netip.Prefix{p}))
	d.host = p
}

// policy swaps in a random policy, with what random names have resolved to.
func (d *differ) policy(t testing.TB, r *rand.Rand) {
	t.Helper()
	d.setHost(t, pick(r, someHosts))
	var p netpol.Program
	for {
		var err error
		if p, err = netpol.Compile(randomLayers(r)); err == nil {
			break
		}
	}
	if r.IntN(3) == 0 {
		var err error
		p, err = netpol.WithPublished(p, "t0", []netpol.PortRange{{Lo: 80, Hi: 80, Proto: netpol.TCP}, {Lo: 53, Hi: 53, Proto: netpol.UDP}})
		ok(t, err)
	}
	d.program, d.names = p, map[netip.Addr][]string{}
	var learned []netpol.Learned
	for _, s := range someAddrs {
		a := netip.MustParseAddr(s)
		if a.Is4In6() || r.IntN(2) == 0 {
			continue
		}
		var lists [][]netpol.PortRule
		var names []string
		for range 1 + r.IntN(2) {
			name := pick(r, someNames)
			names, lists = append(names, name), append(lists, p.Learn(name, a))
		}
		steps, err := netpol.MergeSteps(lists...)
		if err != nil || len(steps) == 0 {
			continue
		}
		d.names[a] = names
		learned = append(learned, netpol.Learned{Addr: a, Steps: steps})
	}
	ok(t, d.e.SetPolicy(testID, testSlot, p, 1, learned))
}

// connect lets the outside begin a connection, or try to.
func (d *differ) connect(t testing.TB, r *rand.Rand) {
	t.Helper()
	src := netip.MustParseAddr(pick(r, someAddrs))
	f := frame{src: src, dst: addr4(testSlot), sport: pick(r, somePorts), port: pick(r, []uint16{53, 80, 443}), udp: r.IntN(2) == 0}
	proto, began := netpol.TCP, true
	if src.Is6() {
		f.dst = addr6(testSlot)
	}
	if f.udp {
		proto = netpol.UDP
	} else if r.IntN(2) == 0 {
		f.flags, began = 0x12, false // SYN, ACK: an answer
	}
	in := make([]byte, skbSize)
	if r.IntN(2) == 0 {
		binary.NativeEndian.PutUint32(in[skbMark:], 0x62690000)
		began = true
	} else if f.udp {
		began = false
	}
	ret, err := d.e.toSandbox.Run(&ebpf.RunOptions{Data: f.toSandbox(), Context: in})
	if err != nil || int32(ret) != next || !began {
		return
	}
	for _, p := range d.program.Published {
		if p.Port == f.port && p.Proto == proto {
			d.last = flowEnds{proto, f.port, f.sport, src}
			d.inbound[d.last] = true
		}
	}
}

// want is what the reference says about a frame.
func (d *differ) want(data []byte) (v netpol.Verdict, flow netpol.Flow, hdrs int) {
	flow, hdrs, why := refFlow(data)
	if why == "" {
		why = refDeny(append(d.denied[:len(d.denied):len(d.denied)], netpol.HardDeny{Prefix: d.host, Reason: "host"}), flow.Dst)
	}
	if why != "" {
		return netpol.Verdict{Reason: why, Rule: -1}, flow, hdrs
	}
	v = d.program.Evaluate(flow, d.names[flow.Dst]...)
	l4 := data[14+20+20*btoi(flow.Dst.Is6()):]
	opens := flow.Proto == netpol.TCP && l4[13]&0x12 == 2 // SYN without ACK is no answer
	if v.Rule < 0 && flow.Proto != netpol.ICMP && !opens {
		sport := binary.BigEndian.Uint16(l4)
		for _, p := range d.program.Published {
			if p.Port == sport && p.Proto == flow.Proto && d.inbound[flowEnds{p.Proto, sport, flow.Port, flow.Dst}] {
				v = netpol.Verdict{Allowed: true, Reason: netpol.ReasonAllowed, Rule: int(p.Rule)}
				d.seen["answer"]++
			}
		}
	}
	if names := d.names[flow.Dst]; len(names) > 0 && v.Allowed && d.program.Evaluate(flow).Rule != v.Rule {
		d.seen["by name"]++
	}
	if v.Allowed && flow.Proto == netpol.ICMP && len(data)-14 > 576 {
		v.Allowed, v.Reason = false, "echo_size"
	}
	return v, flow, hdrs
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// check judges a frame both ways. It answers what the reference says.
func (d *differ) check(t testing.TB, data []byte, gso uint32) string {
	t.Helper()
	want, flow, hdrs := d.want(data)
	if flow.Proto == netpol.ICMP {
		ok(t, d.e.maps["echoes"].Put(uint32(testSlot), uint64(0))) // how many a second is no matter here
		if want.Allowed && gso != 0 {
			return "refused" // bytes of all segments, which no reference counts
		}
	}
	v, err := d.e.ask(testSlot, data)
	if err != nil {
		return "refused" // by the kernel, before the program
	}
	got, err := tryRun(d.e.fromSandbox, data, gso)
	ok(t, err)
	rule, audit := uint32(cbNoRule), ""
	if want.Rule >= 0 {
		rule = d.e.slots[testSlot].byID[want.Rule]
	}
	if v.audit != allowed {
		audit = reasonName(v.audit)
	}
	if reasonName(v.reason) != want.Reason || v.rule != rule || audit != want.Audit && want.Allowed ||
		(got.ret == next) != want.Allowed || got.ret != next && got.ret != drop {
		t.Fatalf("program answers %d, explain %s, rule %d, audit %q, want %+v (rule %d): gso %d, flow %+v of %v\n% x",
			got.ret, reasonName(v.reason), v.rule, audit, want, rule, gso, flow, d.names[flow.Dst], data)
	}
	l3, segments := uint64(len(data)-14), uint64(1)
	if payload := len(data) - 14 - hdrs; gso != 0 && payload > 0 {
		segments = uint64((payload + int(gso) - 1) / int(gso))
		l3 = uint64(payload) + segments*uint64(hdrs)
	}
	if want.Allowed {
		d.total.EgressPackets += segments
		d.total.EgressBytes += l3
		d.total.EgressWireBytes += l3 + 14*segments
	}
	if want.Rule >= 0 && (want.Allowed || want.Reason == "rule_deny") {
		ref := d.program.Rules[want.Rule]
		d.hits[ruleKey{ref.Tenant, ref.Name}] += segments
	}
	if want.Audit != "" {
		return "audit " + want.Audit
	}
	return want.Reason
}

// checkTotals compares what was counted with what the reference added up.
func (d *differ) checkTotals(t testing.TB) {
	t.Helper()
	got := counters(t, d.e, testSlot)
	if got.EgressPackets != d.total.EgressPackets || got.EgressBytes != d.total.EgressBytes || got.EgressWireBytes != d.total.EgressWireBytes {
		t.Errorf("counted %+v, want %+v", got, d.total)
	}
	rules, err := d.e.RuleCounters(testID, testSlot)
	ok(t, err)
	for _, r := range rules {
		if want := d.hits[ruleKey{r.Tenant, r.Rule}]; r.Packets != want {
			t.Errorf("rule %s of %s: %d hits, want %d", r.Rule, r.Tenant, r.Packets, want)
		}
	}
}

// Few values, so that rules overlap and frames hit them.
var (
	someAddrs = []string{
		"10.0.0.1", "10.0.0.129", "10.0.1.1", "10.1.2.3", "10.1.2.4", "10.9.0.1", "11.0.0.1", "169.254.169.254", "100.96.0.2",
		"127.0.0.1", "224.0.0.1", "255.255.255.255", "2001:db8::1", "2001:db8:0:1::1", "2001:db9::1", "::ffff:10.0.0.1",
		"fd00:ec2::254", "fe80::1", "ff02::1", "::1", "fd62:6b68::2", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1",
	}
	somePrefixes = []string{
		"0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/16", "10.0.0.0/24", "10.0.0.128/25", "10.0.0.1/32", "10.1.2.3/32", "11.0.0.0/8",
		"::/0", "2001:db8::/32", "2001:db8:0:1::/64", "2001:db8::1/128", "2001::/16",
	}
	somePorts = []uint16{1, 22, 53, 80, 443, 8000, 8080, 65535}
	someNames = []string{"a.test", "b.test", "x.a.test", "y.x.a.test", "other.org"}
	patterns  = []string{"a.test", "b.test", "*.a.test", "**.a.test", "**.test", "other.org"}
)

func pick[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

func randomPorts(r *rand.Rand) (out []netpol.PortRange) {
	for range 1 + r.IntN(3) {
		a, b := pick(r, somePorts), pick(r, somePorts)
		out = append(out, netpol.PortRange{Lo: min(a, b), Hi: max(a, b), Proto: pick(r, []netpol.Proto{netpol.TCP, netpol.UDP})})
	}
	if r.IntN(4) == 0 {
		out = append(out, netpol.PortRange{Lo: netpol.EchoPort, Hi: netpol.EchoPort, Proto: netpol.ICMP})
	}
	return out
}

func randomTargets(r *rand.Rand, n int) (out []netpol.Target) {
	for range n {
		if r.IntN(3) == 0 {
			out = append(out, netpol.Target{FQDN: pick(r, patterns), AllowPrivate: r.IntN(2) == 0})
			continue
		}
		to := netpol.Target{CIDR: netip.MustParsePrefix(pick(r, somePrefixes))}
		for _, s := range somePrefixes {
			p := netip.MustParsePrefix(s)
			if r.IntN(8) == 0 && to.CIDR.Overlaps(p) && p.Bits() > to.CIDR.Bits() {
				to.Except = append(to.Except, p)
			}
		}
		out = append(out, to)
	}
	return out
}

// randomLayers may not compile: a rule may lie outside a guardrail.
func randomLayers(r *rand.Rand) []netpol.Layer {
	layers := make([]netpol.Layer, 1+r.IntN(3))
	watching := r.IntN(3) == 0
	for i := range layers {
		l := &layers[i]
		l.Tenant = fmt.Sprintf("t%d", i)
		l.Policy.Name = "p"
		for n := range r.IntN(6) {
			rule := netpol.Rule{Name: fmt.Sprintf("r%d", n), Action: netpol.Allow, To: randomTargets(r, 1+r.IntN(3)), Ports: randomPorts(r)}
			if r.IntN(4) == 0 {
				rule.Action = netpol.Deny
			}
			l.Policy.Rules = append(l.Policy.Rules, rule)
		}
		if watching && (i == len(layers)-1 || r.IntN(2) == 0) {
			l.Policy.Mode = netpol.ModeAudit
		}
		if r.IntN(4) == 0 {
			l.Policy.Guardrail = &netpol.Guardrail{Bounds: []netpol.Bound{{
				To: append(randomTargets(r, 2), netpol.Target{CIDR: netip.MustParsePrefix("10.0.0.0/8")}), Ports: randomPorts(r),
			}}}
		}
	}
	return layers
}

// randomFrame is mostly what an honest sandbox sends, and often wrong in one
// place.
func randomFrame(r *rand.Rand) ([]byte, uint32) {
	f := frame{
		dst: netip.MustParseAddr(pick(r, someAddrs)), udp: r.IntN(2) == 0,
		port: pick(r, somePorts) + uint16(r.IntN(3)) - 1, payload: r.IntN(64), sport: pick(r, somePorts),
	}
	if !f.udp {
		f.tcpOpts = 4 * r.IntN(6)
	}
	var gso uint32
	switch r.IntN(16) {
	case 0:
		f.src = netip.MustParseAddr(pick(r, someAddrs))
		if f.src.Is4() != f.dst.Is4() {
			f.src = netip.Addr{}
		}
	case 1:
		f.lengthBy = r.IntN(5) - 2
	case 2:
		f.udpBy = r.IntN(5) - 2
	case 3:
		f.frag = uint16(r.Uint32())
	case 4:
		f.options = make([]byte, 4*r.IntN(10))
	case 5:
		f.doff = byte(r.IntN(16))
	case 6:
		f.ext = []ext{{pick(r, []byte{0, 43, 44, 58, 59, 60, 135, 200}), make([]byte, 7)}}
	case 7:
		f.tags = []uint16{pick(r, []uint16{0x8100, 0x88a8, 0x9100})}
	case 8:
		f.l4, f.proto = make([]byte, r.IntN(64)), pick(r, []byte{1, 1, 58, byte(r.Uint32())})
		if len(f.l4) > 0 {
			f.l4[0] = byte(r.Uint32())
		}
	case 9:
		f.trailer = r.IntN(8)
	case 10, 11:
		f.payload, gso = r.IntN(3000), 1+r.Uint32N(1500)
	case 12, 13:
		f = echo(f.dst, pick(r, []int{48, 60, 576, 577, 1400}))
	}
	data := f.bytes()
	switch r.IntN(16) {
	case 0:
		for range 1 + r.IntN(4) {
			data[r.IntN(len(data))] = byte(r.Uint32())
		}
	case 1:
		data = data[:14+r.IntN(len(data)-14)]
	}
	return data, gso
}

// fuzzCases is how many frames TestProgramAgainstReference judges; the
// environment may say more.
const fuzzCases = 30000

// TestProgramAgainstReference runs random frames against random policies.
// BULKHEAD_FUZZ_CASES says how many.
func TestProgramAgainstReference(t *testing.T) {
	const frames = 1000 // under one policy
	cases, base := fuzzCases, uint64(0)
	if s := os.Getenv("BULKHEAD_FUZZ_CASES"); s != "" {
		var err error
		if cases, err = strconv.Atoi(s); err != nil {
			t.Fatalf("BULKHEAD_FUZZ_CASES: %v", err)
		}
		base = uint64(time.Now().UnixNano())
	}
	d := newDiffer(t)
	start := time.Now()
	for n := range uint64(max(cases/frames, 1)) {
		seed := base + n
		r := rand.New(rand.NewPCG(seed, 1))
		d.policy(t, r)
		for i := range frames {
			switch {
			case i%50 == 10:
				d.connect(t, r)
			case i%250 == 100:
				d.setHost(t, pick(r, someHosts))
			}
			data, gso := randomFrame(r)
			if i%40 == 20 && d.last.peer.IsValid() {
				f := frame{dst: d.last.peer, sport: d.last.local, port: d.last.remote, udp: d.last.proto == netpol.UDP}
				f.flags = pick(r, []byte{0x02, 0x10, 0x12})
				data, gso = f.bytes(), 0
			}
			d.seen[d.check(t, data, gso)]++
		}
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
		if n%64 == 0 {
			d.checkTotals(t)
		}
	}
	d.checkTotals(t)
	t.Logf("%d frames, %.0f a second: %v", cases, float64(cases)/time.Since(start).Seconds(), d.seen)
	for _, reason := range []string{"allow", "rule_deny", "no_rule", "bad_length", "fragment", "host", "sandbox", "metadata", "echo_size", "icmp", "audit no_rule", "audit rule_deny", "by name", "answer"} {
		if d.seen[reason] < 20 {
			t.Errorf("only %d frames with %s", d.seen[reason], reason)
		}
	}
}

// FuzzProgram lets the fuzzer write frames and choose policies.
func FuzzProgram(f *testing.F) {
	r := rand.New(rand.NewPCG(7, 7))
	for range 200 {
		data, gso := randomFrame(r)
		f.Add(r.Uint64N(16), gso, data)
	}
	d := newDiffer(f)
	last := ^uint64(0)
	f.Fuzz(func(t *testing.T, seed uint64, gso uint32, data []byte) {
		if seed %= 64; seed != last {
			d.policy(t, rand.New(rand.NewPCG(seed, 1)))
			last = seed
		}
		if len(data) > 3000 {
			data = data[:3000]
		}
		d.check(t, data, gso%65536)
	})
}
