// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

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
		case l3[9] == 1:
			return f, 0, "icmp"
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
	return why
}

// differ compares program and reference over frames.
type differ struct {
	e       *Enforcer
	program netpol.Program
	deny    []netpol.HardDeny
	total   Counters
}

func newDiffer(t testing.TB) *differ {
	cfg := testConfig(t)
	cfg.HardDeny = []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16")}
	d := &differ{e: open(t, cfg)}
	place(t, d.e, sandbox(testSlot, 1, netpol.Program{}))
	host := netip.MustParsePrefix("10.1.2.3/32")
	ok(t, d.e.SetHostAddrs([]netip.Prefix{host}))
	for _, h := range netpol.HardDenied() {
		if h.Prefix.Addr().Is4() || !mapped.Contains(h.Prefix.Addr()) || h.Prefix.IsSingleIP() {
			d.deny = append(d.deny, h)
		}
	}
	d.deny = append(d.deny,
		netpol.HardDeny{Prefix: mapped, Reason: "v4_mapped"},
		netpol.HardDeny{Prefix: cfg.HardDeny[0], Reason: "host_network"},
		netpol.HardDeny{Prefix: host, Reason: "host"},
		netpol.HardDeny{Prefix: pool4, Reason: "sandbox"},
		netpol.HardDeny{Prefix: pool6, Reason: "sandbox"})
	return d
}

// policy swaps in a random policy.
func (d *differ) policy(t testing.TB, r *rand.Rand) {
	t.Helper()
	p, err := netpol.Compile(randomLayers(r))
	if err != nil {
		t.Fatal(err)
	}
	d.program = p
	ok(t, d.e.SetPolicy(testID, testSlot, p, 1))
}

// check judges a frame both ways. It answers what the reference says.
func (d *differ) check(t testing.TB, data []byte, gso uint32) string {
	t.Helper()
	flow, hdrs, want := refFlow(data)
	if want == "" {
		want = refDeny(d.deny, flow.Dst)
	}
	if want == "" {
		want = d.program.Evaluate(flow).Reason
	}
	got, err := tryRun(d.e.fromSandbox, data, gso)
	if err != nil {
		return "refused" // by the kernel, before the program
	}
	v, err := d.e.ask(testSlot, data)
	ok(t, err)
	if reasonName(v.reason) != want || (got.ret == next) != (want == "allow") || got.ret != next && got.ret != drop {
		t.Fatalf("program answers %d, explain %s, want %s: gso %d, flow %+v\n% x", got.ret, reasonName(v.reason), want, gso, flow, data)
	}
	if want == "allow" {
		l3, segments := uint64(len(data)-14), uint64(1)
		if payload := len(data) - 14 - hdrs; gso != 0 && payload > 0 {
			segments = uint64((payload + int(gso) - 1) / int(gso))
			l3 = uint64(payload) + segments*uint64(hdrs)
		}
		d.total.EgressPackets += segments
		d.total.EgressBytes += l3
		d.total.EgressWireBytes += l3 + 14*segments
	}
	return want
}

// checkTotals compares what was counted with what the reference added up.
func (d *differ) checkTotals(t testing.TB) {
	t.Helper()
	got := counters(t, d.e, testSlot)
	if got.EgressPackets != d.total.EgressPackets || got.EgressBytes != d.total.EgressBytes || got.EgressWireBytes != d.total.EgressWireBytes {
		t.Errorf("counted %+v, want %+v", got, d.total)
	}
}

// Few values, so that rules overlap and frames hit them.
var (
	someAddrs = []string{
		"10.0.0.1", "10.0.0.129", "10.0.1.1", "10.1.2.3", "10.1.2.4", "10.9.0.1", "11.0.0.1", "169.254.169.254", "100.96.0.2",
		"127.0.0.1", "224.0.0.1", "255.255.255.255", "2001:db8::1", "2001:db8:0:1::1", "2001:db9::1", "::ffff:10.0.0.1",
		"fd00:ec2::254", "fe80::1", "ff02::1", "::1", "fd62:6b68::2",
	}
	somePrefixes = []string{
		"0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/16", "10.0.0.0/24", "10.0.0.128/25", "10.0.0.1/32", "10.1.2.3/32", "11.0.0.0/8",
		"::/0", "2001:db8::/32", "2001:db8:0:1::/64", "2001:db8::1/128", "2001::/16",
	}
	somePorts = []uint16{1, 22, 53, 80, 443, 8000, 8080, 65535}
)

func pick[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

func randomLayers(r *rand.Rand) []netpol.Layer {
	layers := make([]netpol.Layer, 1+r.IntN(3))
	for i := range layers {
		l := &layers[i]
		l.Tenant = fmt.Sprintf("t%d", i)
		l.Policy.Name = "p"
		for n := range r.IntN(6) {
			rule := netpol.Rule{Name: fmt.Sprintf("r%d", n), Action: netpol.Allow}
			if r.IntN(4) == 0 {
				rule.Action = netpol.Deny
			}
			for range 1 + r.IntN(3) {
				to := netpol.Target{CIDR: netip.MustParsePrefix(pick(r, somePrefixes))}
				for _, s := range somePrefixes {
					p := netip.MustParsePrefix(s)
					if r.IntN(8) == 0 && to.CIDR.Overlaps(p) && p.Bits() > to.CIDR.Bits() {
						to.Except = append(to.Except, p)
					}
				}
				rule.To = append(rule.To, to)
			}
			for range 1 + r.IntN(3) {
				a, b := pick(r, somePorts), pick(r, somePorts)
				rule.Ports = append(rule.Ports, netpol.PortRange{Lo: min(a, b), Hi: max(a, b), Proto: pick(r, []netpol.Proto{netpol.TCP, netpol.UDP})})
			}
			l.Policy.Rules = append(l.Policy.Rules, rule)
		}
	}
	return layers
}

// randomFrame is mostly what an honest sandbox sends, and often wrong in one
// place.
func randomFrame(r *rand.Rand) ([]byte, uint32) {
	f := frame{
		dst: netip.MustParseAddr(pick(r, someAddrs)), udp: r.IntN(2) == 0,
		port: pick(r, somePorts) + uint16(r.IntN(3)) - 1, payload: r.IntN(64),
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
		f.l4, f.proto = make([]byte, r.IntN(64)), byte(r.Uint32())
		if len(f.l4) > 0 {
			f.l4[0] = byte(r.Uint32())
		}
	case 9:
		f.trailer = r.IntN(8)
	case 10, 11:
		f.payload, gso = r.IntN(3000), 1+r.Uint32N(1500)
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

// TestProgramAgainstReference runs random frames against random policies.
func TestProgramAgainstReference(t *testing.T) {
	const policies, frames = 50, 400
	d := newDiffer(t)
	seen := map[string]int{}
	for seed := range uint64(policies) {
		r := rand.New(rand.NewPCG(seed, 1))
		d.policy(t, r)
		for range frames {
			data, gso := randomFrame(r)
			seen[d.check(t, data, gso)]++
		}
	}
	d.checkTotals(t)
	t.Logf("%d frames: %v", policies*frames, seen)
	for _, reason := range []string{"allow", "rule_deny", "no_rule", "bad_length", "fragment", "host", "sandbox", "metadata"} {
		if seen[reason] < 20 {
			t.Errorf("only %d frames with %s", seen[reason], reason)
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
