// SPDX-License-Identifier: Apache-2.0

package netpol

import (
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// layer parses a policy given without its first two lines.
func layer(t *testing.T, tenant, body string) Layer {
	t.Helper()
	file := strings.ReplaceAll(tenant, "/", "-") + ".yaml"
	p, err := Parse(file, []byte("kind: EgressPolicy\nname: p\n"+body))
	if err != nil {
		t.Fatal(err)
	}
	return Layer{Tenant: tenant, File: file, Policy: p}
}

func compile(t *testing.T, layers ...Layer) Program {
	t.Helper()
	p, err := Compile(layers)
	if err != nil {
		t.Fatal(err)
	}
	checkProgram(t, layers, p)
	return p
}

// checkProgram holds a program against what every program promises, and
// against the reference at the edges of everything that its layers mention.
func checkProgram(t testing.TB, layers []Layer, p Program) {
	t.Helper()
	for i, r := range p.Rules {
		if int(r.ID) != i {
			t.Errorf("rule %d has ID %d", i, r.ID)
		}
	}
	for i, e := range p.Entries {
		if i > 0 && p.Entries[i-1].Prefix.Compare(e.Prefix) >= 0 {
			t.Errorf("entry %s is not after %s", e.Prefix, p.Entries[i-1].Prefix)
		}
		if e.Prefix != e.Prefix.Masked() || len(e.Ports) > MaxPortRules {
			t.Errorf("bad entry %+v", e)
		}
		checkSteps(t, p, e.Prefix.String(), e.Ports)
	}
	addrs, ports, names := edges(layers)
	if len(addrs)*len(ports) > 100000 {
		return
	}
	for i, a := range addrs {
		for j, port := range ports {
			for _, proto := range []Proto{TCP, UDP, ICMP, 132} {
				f := Flow{proto, a, port}
				compareFlow(t, layers, p, f)
				if len(names) > 0 {
					compareFlow(t, layers, p, f, names[(i+j)%len(names)])
				}
			}
		}
	}
}

// checkSteps holds a list of steps against what the datapath relies on.
func checkSteps(t testing.TB, p Program, what string, steps []PortRule) {
	t.Helper()
	stage := func(r PortRule) int {
		switch {
		case r.Deny && !r.Audit:
			return 0
		case r.Deny:
			return 1
		case !r.Audit:
			return 2
		}
		return 3
	}
	for i, r := range steps {
		none := r.Audit && !r.Deny
		switch {
		case none != (r.Rule == NoRule), !none && (int(r.Rule) >= len(p.Rules) || r.Deny != (p.Rules[r.Rule].Action == Deny)):
			t.Errorf("%s: step %+v has a rule that does not fit", what, r)
		case r.Lo > r.Hi, r.Audit && p.Mode != ModeAudit:
			t.Errorf("%s: bad step %+v", what, r)
		case i > 0 && stage(steps[i-1]) > stage(r):
			t.Errorf("%s: step %+v comes after %+v", what, r, steps[i-1])
		}
	}
}

func compareFlow(t testing.TB, layers []Layer, p Program, f Flow, names ...string) {
	t.Helper()
	var lists [][]PortRule
	for _, name := range names {
		steps := p.Learn(name, f.Dst)
		checkSteps(t, p, name, steps)
		lists = append(lists, steps)
	}
	if _, err := MergeSteps(lists...); err != nil {
		return // the address is not learned
	}
	got, want := p.Evaluate(f, names...), ReferenceEvaluate(layers, f, names...)
	if got != want {
		t.Errorf("%s %s port %d names %q: compiled %+v, reference %+v\n%s", f.Proto, f.Dst, f.Port, names, got, want, p.Describe())
	}
}

// edges lists the first and last addresses and ports of everything mentioned,
// and their neighbours, and names that match the patterns and that do not.
func edges(layers []Layer) ([]netip.Addr, []uint16, []string) {
	addrs, ports := map[netip.Addr]bool{}, map[uint16]bool{0: true}
	var names []string
	target := func(p netip.Prefix) {
		first, last := p.Addr(), lastAddr(p)
		for _, a := range []netip.Addr{first, first.Prev(), last, last.Next()} {
			if a.IsValid() {
				addrs[a] = true
			}
		}
	}
	collect := func(to []Target, ranges []PortRange) {
		for _, t := range to {
			if t.FQDN != "" {
				_, rest := splitPattern(t.FQDN)
				names = append(names, rest, "a."+rest, "b.a."+rest)
				addrs[netip.MustParseAddr("192.168.0.1")] = true
				addrs[netip.MustParseAddr("203.0.113.99")] = true
				continue
			}
			target(t.CIDR)
			for _, e := range t.Except {
				target(e)
			}
		}
		for _, r := range ranges {
			ports[r.Lo], ports[r.Lo-1], ports[r.Hi], ports[r.Hi+1] = true, true, true, true
		}
	}
	for _, l := range layers {
		for _, r := range l.Policy.Rules {
			collect(r.To, r.Ports)
		}
		if l.Policy.Guardrail != nil {
			for _, b := range l.Policy.Guardrail.Bounds {
				collect(b.To, b.Ports)
			}
		}
	}
	var as []netip.Addr
	for a := range addrs {
		as = append(as, a)
	}
	var ps []uint16
	for p := range ports {
		ps = append(ps, p)
	}
	return as, ps, names
}

func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

func TestCompile(t *testing.T) {
	for _, tt := range []struct {
		name   string
		layers []Layer
		want   string // Describe, spaces folded
	}{{
		name: "nothing denies everything",
		want: "deny everything all no rule",
	}, {
		name: "no rules deny everything",
		layers: []Layer{
			layer(t, "acme", "rules: []"),
		},
		want: "deny everything all no rule",
	}, {
		name: "except becomes an empty entry",
		layers: []Layer{layer(t, "globex", `
rules:
- {name: api, action: allow, to: [{cidr: 203.0.113.0/24, except: [203.0.113.128/25]}], ports: [80/tcp]}
`)},
		want: `
allow 203.0.113.0/24 80/tcp rule api of globex
deny 203.0.113.128/25 all no rule
deny everything else all no rule`,
	}, {
		name: "an exception of one rule is open by another",
		layers: []Layer{layer(t, "globex", `
rules:
- {name: wide, action: allow, to: [{cidr: 10.0.0.0/8, except: [10.1.0.0/16]}], ports: [80/tcp]}
- {name: narrow, action: allow, to: [{cidr: 10.1.2.0/24}], ports: [81/tcp]}
`)},
		want: `
allow 10.0.0.0/8 80/tcp rule wide of globex
deny 10.1.0.0/16 all no rule
allow 10.1.2.0/24 81/tcp rule narrow of globex
deny everything else all no rule`,
	}, {
		name: "longer prefix keeps the rules of the shorter",
		layers: []Layer{layer(t, "acme", `
rules:
- {name: host, action: allow, to: [{cidr: 10.1.2.3/32}], ports: [443/tcp]}
- {name: net, action: allow, to: [{cidr: 10.0.0.0/8}], ports: [80-90/tcp, 53/udp]}
`)},
		want: `
allow 10.0.0.0/8 80-90/tcp 53/udp rule net of acme
allow 10.1.2.3/32 443/tcp rule host of acme
allow 10.1.2.3/32 80-90/tcp 53/udp rule net of acme
deny everything else all no rule`,
	}, {
		name: "a broad deny beats a narrow allow of an ancestor",
		layers: []Layer{
			layer(t, "acme", `
rules:
- {name: host, action: allow, to: [{cidr: 10.1.2.3/32}], ports: [443/tcp]}
`),
			layer(t, "acme/vision", `
rules:
- {name: none, action: deny, to: [{cidr: 0.0.0.0/0}]}
`)},
		want: `
deny 0.0.0.0/0 all rule none of acme/vision
deny everything else all no rule`,
	}, {
		name: "deny some ports of a wide allow",
		layers: []Layer{layer(t, "acme", `
rules:
- {name: all, action: allow, to: [{cidr: "::/0"}], ports: [any/tcp]}
- {name: mail, action: deny, to: [{cidr: "::/0", except: ["2001:db8::/32"]}], ports: [25/tcp]}
`)},
		want: `
deny ::/0 25/tcp rule mail of acme
allow ::/0 any/tcp rule all of acme
allow 2001:db8::/32 any/tcp rule all of acme
deny everything else all no rule`,
	}, {
		name: "the first allow gets the hit",
		layers: []Layer{layer(t, "acme", `
rules:
- {name: first, action: allow, to: [{cidr: 10.0.0.0/8}], ports: [any/tcp]}
- {name: second, action: allow, to: [{cidr: 10.0.0.0/8}], ports: [80/tcp, 80/udp]}
`)},
		want: `
allow 10.0.0.0/8 any/tcp rule first of acme
allow 10.0.0.0/8 80/udp rule second of acme
deny everything else all no rule`,
	}, {
		name: "a guardrail cuts later layers and not its own",
		layers: []Layer{
			layer(t, "acme", `
rules:
- {name: own, action: allow, to: [{cidr: 198.51.100.0/24}], ports: [22/tcp]}
guardrail:
- {to: [{cidr: 203.0.113.0/24, except: [203.0.113.64/26]}], ports: [80/tcp, 443/tcp]}
`),
			layer(t, "acme/vision", `
rules:
- {name: web, action: allow, to: [{cidr: 0.0.0.0/0}], ports: [1-100/tcp]}
`)},
		want: `
allow 198.51.100.0/24 22/tcp rule own of acme
allow 203.0.113.0/24 80/tcp rule web of acme/vision
deny 203.0.113.64/26 all no rule
deny everything else all no rule`,
	}, {
		name: "every guardrail cuts",
		layers: []Layer{
			layer(t, "a", "rules: []\nguardrail: [{to: [{cidr: 10.0.0.0/8}], ports: [1-100/tcp]}]"),
			layer(t, "a/b", "rules: []\nguardrail: [{to: [{cidr: 10.1.0.0/16}, {cidr: 11.0.0.0/8}], ports: [50-200/tcp, any/udp]}]"),
			layer(t, "a/b/c", "rules: [{name: r, action: allow, to: [{cidr: 0.0.0.0/0}], ports: [any/tcp]}]\nguardrail: []"),
		},
		want: `
allow 10.1.0.0/16 50-100/tcp rule r of a/b/c
deny everything else all no rule`,
	}} {
		t.Run(tt.name, func(t *testing.T) {
			got := fold(compile(t, tt.layers...).Describe())
			if diff := cmp.Diff(strings.TrimSpace(tt.want), got); diff != "" {
				t.Errorf("program (-want +got):\n%s", diff)
			}
		})
	}
}

// fold makes columns single spaces.
func fold(s string) string {
	var out []string
	for _, l := range strings.Split(strings.TrimSpace(s), "\n") {
		out = append(out, strings.Join(strings.Fields(l), " "))
	}
	return strings.Join(out, "\n")
}

func TestCompileErrors(t *testing.T) {
	rail := layer(t, "acme", "rules: []\nguardrail:\n- {to: [{cidr: 203.0.113.0/24, except: [203.0.113.128/25]}], ports: [80/tcp]}\n")
	child := func(to, ports string) Layer {
		return layer(t, "acme/vision", "rules:\n- name: web\n  action: allow\n  to: "+to+"\n  ports: "+ports+"\n")
	}
	many := "rules:\n"
	for i := range 3 {
		var ports []string
		for j := range 11 {
			ports = append(ports, fmt.Sprintf("%d/tcp", 1000+100*i+2*j))
		}
		many += fmt.Sprintf("- {name: r%d, action: allow, to: [{cidr: 10.0.0.0/8}], ports: [%s]}\n", i, strings.Join(ports, ", "))
	}
	for _, tt := range []struct {
		name   string
		layers []Layer
		want   string
	}{
		{"target outside a guardrail", []Layer{rail, child("[{cidr: 198.51.100.0/24}, {cidr: 203.0.113.0/25}]", "[80/tcp]")},
			`acme-vision.yaml:6: rule "web" of acme/vision: 198.51.100.0/24 is outside the guardrail of acme (acme.yaml:5)`},
		{"other family", []Layer{rail, child("[{cidr: '2001:db8::/32'}, {cidr: 203.0.113.0/25}]", "[80/tcp]")},
			`acme-vision.yaml:6: rule "web" of acme/vision: 2001:db8::/32 is outside the guardrail of acme (acme.yaml:5)`},
		{"in an exception of the guardrail", []Layer{rail, child("[{cidr: 203.0.113.192/26}]", "[80/tcp]")},
			`acme-vision.yaml:6: rule "web" of acme/vision: 203.0.113.192/26 is outside the guardrail of acme (acme.yaml:5)`},
		{"ports outside", []Layer{rail, child("[{cidr: 203.0.113.0/25}]", "[443/tcp, 80/udp]")},
			`acme-vision.yaml:6: rule "web" of acme/vision: 203.0.113.0/25 at 443/tcp 80/udp is outside the guardrail of acme (acme.yaml:5)`},
		{"one port outside", []Layer{rail, child("[{cidr: 203.0.113.0/25}]", "[443/tcp, 80/tcp]")},
			`acme-vision.yaml:4: rule "web" of acme/vision: 443/tcp is outside the guardrail of acme (acme.yaml:5)`},
		{"guardrail without bounds", []Layer{layer(t, "acme", "rules: []\nguardrail: []"), child("[{cidr: 203.0.113.0/25}]", "[80/tcp]")},
			`acme-vision.yaml:6: rule "web" of acme/vision: 203.0.113.0/25 is outside the guardrail of acme (acme.yaml:4)`},
		{"outside the first of two guardrails", []Layer{rail, layer(t, "acme/x", "rules: []\nguardrail: [{to: [{cidr: 0.0.0.0/0}], ports: [any/tcp]}]"), child("[{cidr: 10.0.0.0/8}]", "[80/tcp]")},
			`acme-vision.yaml:6: rule "web" of acme/vision: 10.0.0.0/8 is outside the guardrail of acme (acme.yaml:5)`},
		{"same rule twice in one tenant", []Layer{child("[{cidr: 203.0.113.0/25}]", "[80/tcp]"), child("[{cidr: 203.0.113.0/25}]", "[80/tcp]")},
			`acme-vision.yaml:4: rule "web" of acme/vision is already defined in acme-vision.yaml:4: choose another name`},
		{"too many port ranges", []Layer{layer(t, "acme", many)},
			"acme.yaml:6: 10.0.0.0/8 takes more than 32 port ranges to decide: join port ranges or rules, or split the prefix; it is covered by acme/r0, acme/r1, acme/r2"},
		{"made by hand, all wrong", []Layer{{Tenant: "acme", Policy: Policy{Mode: 7, Rules: []Rule{{
			Action: 3,
			To: []Target{
				{}, {CIDR: netip.MustParsePrefix("10.0.0.1/8")}, {CIDR: pfx("::ffff:10.0.0.0/104")},
				{CIDR: pfx("10.0.0.0/8"), Except: []netip.Prefix{pfx("11.0.0.0/8"), pfx("10.0.0.0/8")}},
			},
		}, {Name: "r", Action: Allow, Ports: []PortRange{{2, 1, TCP}, {1, 1, 132}}}}, Guardrail: &Guardrail{Bounds: []Bound{{}}}}}},
			strings.Join([]string{
				"policy of acme has unknown mode 7",
				"a rule of acme has no name",
				`rule "" of acme has unknown action 3`,
				`rule "" of acme has no ports`,
				`rule "" of acme: cidr invalid Prefix is not a prefix`,
				`rule "" of acme: cidr 10.0.0.1/8 has host bits set: write 10.0.0.0/8, or 10.0.0.1/32 for the one address`,
				`rule "" of acme: cidr ::ffff:10.0.0.0/104 is IPv4-mapped IPv6, which no packet carries: write 10.0.0.0/8`,
				`rule "" of acme: except 11.0.0.0/8 does not lie inside 10.0.0.0/8`,
				`rule "" of acme: except 10.0.0.0/8 does not lie inside 10.0.0.0/8`,
				`rule "r" of acme has no targets`,
				`rule "r" of acme: bad port range 2-1/tcp`,
				`rule "r" of acme: bad port range 1-1/protocol 132`,
				`a guardrail bound of acme has no ports`,
				`a guardrail bound of acme has no targets`,
			}, "\n")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, err := Compile(tt.layers)
			if err == nil {
				t.Fatalf("got no error, want %s", tt.want)
			}
			if diff := cmp.Diff(tt.want, err.Error()); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
			if len(p.Entries) != 0 {
				t.Errorf("got entries with an error: %v", p.Entries)
			}
		})
	}
}

func TestDenyRuleMadeByHandWithoutPortsDeniesAll(t *testing.T) {
	layers := []Layer{{Tenant: "acme", Policy: Policy{Rules: []Rule{
		{Name: "all", Action: Allow, To: []Target{{CIDR: pfx("0.0.0.0/0")}}, Ports: []PortRange{{1, 65535, TCP}}},
		{Name: "none", To: []Target{{CIDR: pfx("10.0.0.0/8")}}},
	}}}}
	p := compile(t, layers...)
	got := p.Evaluate(Flow{TCP, netip.MustParseAddr("10.9.9.9"), 80})
	if want := (Verdict{Reason: ReasonDenied, Rule: 1}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// The digest is compared across agent versions, so its value is pinned.
func TestDigest(t *testing.T) {
	l := layer(t, "globex", "rules:\n- {name: api, action: allow, to: [{cidr: 203.0.113.0/24, except: [203.0.113.128/25]}], ports: [80/tcp]}\n")
	p := compile(t, l)
	if got, want := hex.EncodeToString(p.Digest[:]), "223021d811149725e3405e3da3a7fdfe8bd294dad2cef3c7fb8c9e34bf202ffd"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	l.File, l.Policy.Name, l.Policy.Rules[0].Line = "elsewhere", "renamed", 99
	if got := compile(t, l).Digest; got != p.Digest {
		t.Errorf("digest depends on where a policy was written")
	}
	l.Policy.Rules[0].Name = "other"
	if got := compile(t, l).Digest; got == p.Digest {
		t.Errorf("digest does not depend on a rule's name, though counters do")
	}
}

// Patterns and names of the small universe: some patterns cover others, and
// some names match none.
var (
	somePatterns = []string{"a.test", "b.a.test", "*.a.test", "**.a.test", "**.b.a.test", "*.test", "**.test", "c.test"}
	someNames    = []string{"a.test", "b.a.test", "c.b.a.test", "c.test", "d.example"}
)

func pick[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

// randomChain makes layers in a small universe, so that rules meet often.
func randomChain(r *rand.Rand) []Layer {
	v6 := r.IntN(2) == 0
	prefix := func(within netip.Prefix) netip.Prefix {
		bits := within.Bits() + r.IntN(within.Addr().BitLen()-within.Bits()+1)
		b := lastAddr(within).AsSlice()
		b[len(b)-1] = within.Addr().AsSlice()[len(b)-1] | byte(r.IntN(1<<(len(b)*8-within.Bits())))
		a, _ := netip.AddrFromSlice(b)
		return netip.PrefixFrom(a, bits).Masked()
	}
	universe := pfx("192.0.2.0/27")
	if v6 {
		universe = pfx("2001:db8::/123")
	}
	target := func() Target {
		if r.IntN(3) == 0 {
			return Target{FQDN: pick(r, somePatterns), AllowPrivate: r.IntN(2) == 0}
		}
		t := Target{CIDR: prefix(universe)}
		for range r.IntN(3) {
			if e := prefix(t.CIDR); e != t.CIDR {
				t.Except = append(t.Except, e)
			}
		}
		return t
	}
	ports := func() []PortRange {
		var out []PortRange
		for range 1 + r.IntN(3) {
			lo := uint16(1 + r.IntN(8))
			out = append(out, PortRange{lo, lo + uint16(r.IntN(5)), []Proto{TCP, UDP}[r.IntN(2)]})
		}
		if r.IntN(6) == 0 {
			out = append(out, echoPort)
		}
		return out
	}
	targets := func() (out []Target) {
		for range 1 + r.IntN(3) {
			out = append(out, target())
		}
		return out
	}
	var layers []Layer
	for i := range 1 + r.IntN(3) {
		l := Layer{Tenant: fmt.Sprintf("t%d", i)}
		if r.IntN(3) == 0 {
			l.Policy.Mode = ModeAudit
		}
		for j := range r.IntN(5) {
			rule := Rule{Name: fmt.Sprintf("r%d", j), Action: Allow, To: targets(), Ports: ports()}
			if r.IntN(4) == 0 {
				rule.Action = Deny
				for k := range rule.To {
					rule.To[k].AllowPrivate = false
				}
				if r.IntN(2) == 0 || hasName(rule.To) {
					rule.Ports = nil
				}
			}
			l.Policy.Rules = append(l.Policy.Rules, rule)
		}
		if r.IntN(3) == 0 {
			l.Policy.Guardrail = &Guardrail{}
			for range 1 + r.IntN(3) {
				l.Policy.Guardrail.Bounds = append(l.Policy.Guardrail.Bounds, Bound{To: targets(), Ports: ports()})
			}
		}
		for _, s := range scopes {
			if r.IntN(4) == 0 {
				l.Policy.Budgets = append(l.Policy.Budgets, Budget{Scope: s, Bytes: 1 << r.IntN(50), Per: PerDay})
			}
		}
		layers = append(layers, l)
	}
	return layers
}

// TestCompileEqualsReference holds compiled programs against the reference on
// every flow of a small universe, with none, one and two names. Guardrail
// errors are put aside, because what they refuse still has a meaning.
func TestCompileEqualsReference(t *testing.T) {
	const chains = 400
	refused, verdicts := 0, map[string]int{}
	for seed := range uint64(chains) {
		r := rand.New(rand.NewPCG(seed, 1))
		layers := randomChain(r)
		p, err := Compile(layers)
		if err != nil {
			refused++
			continue
		}
		for _, a := range universe() {
			var names []string
			for range r.IntN(3) {
				names = append(names, pick(r, someNames))
			}
			for port := range uint16(15) {
				for _, proto := range []Proto{TCP, UDP, ICMP} {
					f := Flow{proto, a, port}
					compareFlow(t, layers, p, f)
					compareFlow(t, layers, p, f, names...)
					v := p.Evaluate(f, names...)
					verdicts[v.Reason+" "+v.Audit]++
				}
			}
		}
		if t.Failed() {
			t.Fatalf("seed %d: %+v", seed, layers)
		}
	}
	if refused > chains*3/4 {
		t.Errorf("%d of %d chains were refused, too few were compared", refused, chains)
	}
	t.Logf("%d chains compared, %d refused: %v", chains-refused, refused, verdicts)
	for _, v := range []string{"allow ", "rule_deny ", "no_rule ", "allow rule_deny", "allow no_rule"} {
		if verdicts[v] < 1000 {
			t.Errorf("got %d verdicts %q, too few to prove anything", verdicts[v], v)
		}
	}
}

// universe lists the addresses of randomChain, their neighbours, and two
// private ones.
func universe() []netip.Addr {
	out := []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")}
	for _, start := range []string{"192.0.1.255", "2001:db7:ffff:ffff:ffff:ffff:ffff:ffff"} {
		a := netip.MustParseAddr(start)
		for range 34 {
			out, a = append(out, a), a.Next()
		}
	}
	return out
}

func TestHardDenied(t *testing.T) {
	list := HardDenied()
	seen := map[netip.Prefix]bool{}
	for _, h := range list {
		if h.Prefix != h.Prefix.Masked() || h.Reason == "" || seen[h.Prefix] {
			t.Errorf("bad hard deny %+v", h)
		}
		seen[h.Prefix] = true
	}
	list[0].Reason = "changed"
	if HardDenied()[0].Reason == "changed" {
		t.Error("callers share the list")
	}
	for addr, want := range map[string]string{
		"169.254.169.254": "metadata", "169.254.0.17": "link_local", "168.63.129.16": "metadata",
		"100.100.100.200": "metadata", "fd00:ec2::254": "metadata", "fe80::1": "link_local",
		"127.8.8.8": "loopback", "::1": "loopback", "::": "unspecified", "::ffff:169.254.169.254": "reserved",
		"0.0.0.0": "unspecified", "255.255.255.255": "broadcast", "239.1.1.1": "multicast", "ff02::fb": "multicast",
		"203.0.113.10": "", "2001:db8:113::10": "", "10.0.0.1": "", "100.96.0.1": "",
	} {
		a := netip.MustParseAddr(addr)
		h, _ := hardDenied(netip.PrefixFrom(a, a.BitLen()))
		if h.Reason != want {
			t.Errorf("%s: got %q, want %q", addr, h.Reason, want)
		}
	}
}

func BenchmarkCompile(b *testing.B) {
	var l Layer
	l.Tenant = "acme"
	for i := range 1000 {
		a := netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0})
		l.Policy.Rules = append(l.Policy.Rules, Rule{
			Name: fmt.Sprintf("r%d", i), Action: Allow, Ports: []PortRange{{443, 443, TCP}},
			To: []Target{{CIDR: netip.PrefixFrom(a, 24)}},
		})
	}
	for b.Loop() {
		if _, err := Compile([]Layer{l}); err != nil {
			b.Fatal(err)
		}
	}
}
