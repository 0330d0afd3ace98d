// SPDX-License-Identifier: Apache-2.0

package suggest

import (
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/bulkheadhq/bulkhead/netpol"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func TestPolicy(t *testing.T) {
	got := string(Policy("proposal", []Seen{
		{"", addr("203.0.113.9"), 443, netpol.TCP, 3, 180},
		{"git.corp.example", addr("10.0.0.5"), 22, netpol.TCP, 100, 1 << 20},
		{"api.example.com", addr("198.51.100.1"), 443, netpol.TCP, 10, 1000},
		{"API.example.com.", addr("198.51.100.2"), 443, netpol.UDP, 5, 24},
		{"api.example.com", addr("198.51.100.2"), 8, netpol.ICMP, 1, 0},
		{"", addr("2001:db8::1"), 53, netpol.UDP, 1, 64},
		{"", addr("169.254.169.254"), 80, netpol.TCP, 1, 60},
		{"rebind.example.net", addr("127.0.0.1"), 80, netpol.TCP, 1, 60},
		{"", addr("203.0.113.9"), 0, 132, 1, 60},
		{"bad\nname", addr("203.0.113.9"), 1, netpol.TCP, 1, 60},
	}))
	want := `# Proposed from what was seen. Read it before you use it: what is here
# because of an attack would be allowed, too.
# not proposed: "bad\nname" at 1/tcp: the name has the character '\n': a name is letters, digits, '-', '_' and dots
# not proposed: "rebind.example.net" at 80/tcp: no name may lead to 127.0.0.1
# not proposed: 169.254.169.254 at 80/tcp: no rule can open it
# not proposed: 203.0.113.9 at 0/protocol 132: no rule can name 0/protocol 132
kind: EgressPolicy
name: "proposal"
rules:
# 16 packets, 1KiB
- name: "api.example.com"
  action: allow
  to: [{fqdn: "api.example.com"}]
  ports: [echo/icmp, 443/tcp, 443/udp]
# 100 packets, 1MiB
# allow_private: it resolved to 10.0.0.5
- name: "git.corp.example"
  action: allow
  to: [{fqdn: "git.corp.example", allow_private: true}]
  ports: [22/tcp]
# 3 packets, 180B
# no name led to this address
- name: "203.0.113.9"
  action: allow
  to: [{cidr: "203.0.113.9/32"}]
  ports: [443/tcp]
# 1 packets, 64B
# no name led to this address
- name: "2001-0db8-0000-0000-0000-0000-0000-0001"
  action: allow
  to: [{cidr: "2001:db8::1/128"}]
  ports: [53/udp]
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("policy (-want +got):\n%s", diff)
	}
	if _, err := netpol.Parse("p.yaml", []byte(got)); err != nil {
		t.Error(err)
	}
}

func TestPolicyOfNothing(t *testing.T) {
	p, err := netpol.Parse("p.yaml", Policy("proposal", nil))
	if err != nil || len(p.Rules) != 0 {
		t.Errorf("got %+v, %v", p, err)
	}
}

func TestPolicyOfAScan(t *testing.T) {
	var seen []Seen
	for i := range 3000 {
		seen = append(seen, Seen{Addr: addr("203.0.113.9"), Port: uint16(1 + 2*i), Proto: netpol.TCP, Packets: uint64(i)})
	}
	for i := range 2000 {
		seen = append(seen, Seen{Addr: netip.AddrFrom4([4]byte{198, 51, byte(i >> 8), byte(i)}), Port: 1, Proto: netpol.TCP, Packets: 1})
		seen = append(seen, Seen{Addr: netip.AddrFrom4([4]byte{127, 1, byte(i >> 8), byte(i)}), Port: 1, Proto: netpol.TCP, Packets: 1})
	}
	out := Policy("proposal", seen)
	p, err := netpol.Parse("p.yaml", out)
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Rules) != netpol.MaxRules {
		t.Errorf("got %d rules, want %d", len(p.Rules), netpol.MaxRules)
	}
	for _, line := range []string{"# 977 more destinations were seen", "# not proposed: 1980 more"} {
		if !strings.Contains(string(out), line) {
			t.Errorf("the policy does not say %q", line)
		}
	}
	out = Policy("proposal", seen[:3000])
	if p, err = netpol.Parse("p.yaml", out); err != nil {
		t.Fatal(err)
	}
	if got := len(p.Rules[0].Ports); got != netpol.MaxLearnedSteps {
		t.Errorf("got %d ports, want %d", got, netpol.MaxLearnedSteps)
	}
	if got, want := p.Rules[0].Ports[15].Hi, uint16(5999); got != want {
		t.Errorf("got port %d as the last, want %d, which had the most packets", got, want)
	}
}

// TestPolicyAllowsWhatWasSeenAndNothingElse compiles proposals of random
// traffic and asks them about other random traffic.
func TestPolicyAllowsWhatWasSeenAndNothingElse(t *testing.T) {
	names := []string{"", "a.example.com", "b.example.com", "_x.example", "1.5", "null", "_"}
	random := func(r *rand.Rand) Seen {
		s := Seen{
			Name: names[r.IntN(len(names))], Addr: netip.AddrFrom4([4]byte{[]byte{10, 198}[r.IntN(2)], 51, 100, byte(r.IntN(4))}),
			Port: uint16(1 + r.IntN(6)), Proto: []netpol.Proto{netpol.TCP, netpol.UDP}[r.IntN(2)], Packets: 1,
		}
		if r.IntN(8) == 0 {
			s.Proto, s.Port = netpol.ICMP, netpol.EchoPort
		}
		return s
	}
	type key struct {
		to    string
		port  uint16
		proto netpol.Proto
	}
	keyOf := func(s Seen) key {
		to := s.Name
		if to == "" {
			to = s.Addr.String()
		}
		return key{to, s.Port, s.Proto}
	}
	denied := 0
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 3))
		var seen []Seen
		open := map[key]bool{}
		private := map[string]bool{}
		for range r.IntN(12) {
			s := random(r)
			seen = append(seen, s)
			open[keyOf(s)] = true
			private[s.Name] = private[s.Name] || netpol.PrivateAddr(s.Addr)
		}
		p, err := netpol.Parse("p.yaml", Policy("proposal", seen))
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		prog, err := netpol.Compile([]netpol.Layer{{Tenant: "acme", Policy: p}})
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		allowed := func(s Seen) bool {
			f := netpol.Flow{Proto: s.Proto, Dst: s.Addr, Port: s.Port}
			if s.Name == "" {
				return prog.Evaluate(f).Allowed
			}
			return prog.Evaluate(f, s.Name).Allowed
		}
		for _, s := range seen {
			if !allowed(s) {
				t.Fatalf("seed %d: %+v was seen and is denied", seed, s)
			}
		}
		for range 100 {
			s := random(r)
			byAddr := open[key{s.Addr.String(), s.Port, s.Proto}]
			byName := s.Name != "" && open[keyOf(s)] && (private[s.Name] || !netpol.PrivateAddr(s.Addr))
			if got, want := allowed(s), byAddr || byName; got != want {
				t.Fatalf("seed %d: %+v: allowed %v, want %v\n%s", seed, s, got, want, prog.Describe())
			}
			if !byAddr && !byName {
				denied++
			}
		}
	}
	if denied < 5000 {
		t.Errorf("only %d flows were denied", denied)
	}
}

func FuzzPolicy(f *testing.F) {
	f.Add("api.example.com", []byte{10, 0, 0, 1}, uint16(443), byte(6))
	f.Add("a: [b\n", []byte{127, 0, 0, 1}, uint16(0), byte(1))
	f.Add("**.x", []byte(nil), uint16(8), byte(1))
	f.Fuzz(func(t *testing.T, name string, b []byte, port uint16, proto byte) {
		a, _ := netip.AddrFromSlice(b)
		out := Policy("proposal", []Seen{{name, a, port, netpol.Proto(proto), 1, 1}, {"", a, port, netpol.Proto(proto), 1, 1}})
		if _, err := netpol.Parse("p.yaml", out); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	})
}
