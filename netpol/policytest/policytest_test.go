// SPDX-License-Identifier: Apache-2.0

package policytest

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/bulkheadhq/bulkhead/netpol"
)

const policy = `kind: EgressPolicy
name: p
rules:
- {name: api, action: allow, to: [{fqdn: api.example.com}, {fqdn: "*.models.example.com"}], ports: [443/tcp, 443/udp]}
- {name: git, action: allow, to: [{fqdn: git.corp.example, allow_private: true}], ports: [22/tcp]}
- {name: ads, action: deny, to: [{fqdn: "**.ads.example.com"}]}
- {name: net, action: allow, to: [{cidr: 203.0.113.0/24}, {cidr: "2001:db8::/32"}, {cidr: 169.254.0.0/15}], ports: [443/tcp, echo/icmp]}
- {name: mail, action: deny, to: [{cidr: 0.0.0.0/0}], ports: [25/tcp]}
`

func program(t testing.TB, policies ...string) netpol.Program {
	t.Helper()
	var layers []netpol.Layer
	for i, s := range policies {
		p, err := netpol.Parse("p.yaml", []byte(s))
		if err != nil {
			t.Fatal(err)
		}
		layers = append(layers, netpol.Layer{Tenant: "acme" + strings.Repeat("/x", i), Policy: p})
	}
	prog, err := netpol.Compile(layers)
	if err != nil {
		t.Fatal(err)
	}
	return prog
}

func TestRun(t *testing.T) {
	prog := program(t, strings.Replace(policy, "169.254.0.0/15", "169.0.0.0/8", 1))
	cases, err := Load("cases.yaml", []byte(`kind: PolicyTest
cases:
- {name: api, to: "api.example.com:443", expect: allow, rule: api, tenant: acme}
- {name: case and dot, to: "API.Example.com.:443", expect: allow}
- {name: udp, to: "a.models.example.com:443", proto: udp, expect: allow}
- {name: two labels, to: "b.a.models.example.com:443", expect: deny}
- {name: other port, to: "api.example.com:80", expect: deny}
- {name: ads, to: "x.ads.example.com:443", expect: deny, rule: ads}
- {name: address, to: "203.0.113.9:443", expect: allow, rule: net}
- {name: v6, to: "[2001:db8::1]:443", expect: allow}
- {name: ping, to: echo 203.0.113.9, expect: allow}
- {name: ping v6, to: "echo 2001:db8::1", expect: allow}
- {name: ping of a name, to: echo api.example.com, resolves: [203.0.113.9], expect: allow, rule: net}
- {name: mail, to: "203.0.113.9:25", expect: deny, rule: mail}
- {name: mail by name, to: "api.example.com:25", expect: deny, rule: mail}
- {name: metadata, to: "169.254.169.254:443", expect: deny}
- {name: rebinding, to: "api.example.com:443", resolves: [10.0.0.1], expect: deny}
- {name: rebinding to metadata, to: "api.example.com:443", resolves: [169.254.169.254], expect: deny}
- {name: private, to: "git.corp.example:22", resolves: [10.0.0.1, "fd00::1"], expect: allow}
- {name: mapped, to: "[::ffff:203.0.113.9]:443", expect: deny}
- {name: fails by verdict, to: "api.example.com:443", resolves: [198.51.100.1, 10.0.0.1], expect: allow}
- {name: fails by rule, to: "203.0.113.9:443", expect: allow, rule: api}
- {name: fails by tenant, to: "203.0.113.9:443", expect: allow, tenant: globex}
`))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	results := Run(prog, cases)
	for _, r := range results {
		got = append(got, r.String())
	}
	want := []string{
		"api: api.example.com:443 at 192.0.2.1: got allow (allow, rule api of acme)",
		"case and dot: api.example.com:443 at 192.0.2.1: got allow (allow, rule api of acme)",
		"udp: a.models.example.com:443 at 192.0.2.1: got allow (allow, rule api of acme)",
		"two labels: b.a.models.example.com:443: got deny (no_rule)",
		"other port: api.example.com:80 at 192.0.2.1: got deny (no_rule)",
		"ads: x.ads.example.com:443: got deny (rule_deny, rule ads of acme)",
		"address: 203.0.113.9:443: got allow (allow, rule net of acme)",
		"v6: [2001:db8::1]:443: got allow (allow, rule net of acme)",
		"ping: echo 203.0.113.9: got allow (allow, rule net of acme)",
		"ping v6: echo 2001:db8::1: got allow (allow, rule net of acme)",
		"ping of a name: echo api.example.com at 203.0.113.9: got allow (allow, rule net of acme)",
		"mail: 203.0.113.9:25: got deny (rule_deny, rule mail of acme)",
		"mail by name: api.example.com:25 at 192.0.2.1: got deny (rule_deny, rule mail of acme)",
		"metadata: 169.254.169.254:443: got deny (metadata)",
		"rebinding: api.example.com:443 at 10.0.0.1: got deny (stripped_answer)",
		"rebinding to metadata: api.example.com:443 at 169.254.169.254: got deny (metadata)",
		"private: git.corp.example:22 at fd00::1: got allow (allow, rule git of acme)",
		"mapped: [::ffff:203.0.113.9]:443: got deny (reserved)",
		"fails by verdict: api.example.com:443 at 10.0.0.1: got deny (stripped_answer), want allow",
		"fails by rule: 203.0.113.9:443: got allow (allow, rule net of acme), want allow, rule api",
		"fails by tenant: 203.0.113.9:443: got allow (allow, rule net of acme), want allow, tenant globex",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("results (-want +got):\n%s", diff)
	}
	if got := len(Failed(results)); got != 3 {
		t.Errorf("got %d failed, want 3", got)
	}
}

func TestRunAudit(t *testing.T) {
	prog := program(t, policy, "kind: EgressPolicy\nname: p\nmode: audit\nrules:\n- {name: none, action: deny, to: [{cidr: 198.51.100.0/24}, {fqdn: api.example.com}]}\n")
	cases := []Case{
		{Host: "unknown.example.net", Port: 443, Proto: netpol.TCP, Expect: Audit},
		{Addr: netip.MustParseAddr("198.51.100.1"), Port: 443, Proto: netpol.TCP, Expect: Audit, Rule: "none", Tenant: "acme/x"},
		{Addr: netip.MustParseAddr("198.51.100.1"), Port: 25, Proto: netpol.TCP, Expect: Deny, Rule: "mail"},
		{Host: "a.models.example.com", Port: 443, Proto: netpol.TCP, Expect: Allow, Rule: "api"},
		{Host: "api.example.com", Port: 443, Proto: netpol.TCP, Expect: Audit, Rule: "none"},
		{Host: "x.ads.example.com", Port: 443, Proto: netpol.TCP, Expect: Deny, Rule: "ads"},
	}
	for _, r := range Run(prog, cases) {
		if !r.OK {
			t.Error(r)
		}
	}
}

func TestLoadErrors(t *testing.T) {
	one := func(fields string) string { return "kind: PolicyTest\ncases:\n- {" + fields + "}\n" }
	for _, tt := range []struct{ name, in, want string }{
		{"empty", "", "c.yaml: is empty"},
		{"kind", "kind: EgressPolicy\n", `c.yaml:1: unknown kind "EgressPolicy": known are PolicyTest`},
		{"no cases", "kind: PolicyTest\n", "c.yaml:1: file has no cases: list at least one, as in {name: api, to: api.example.com:443, expect: allow}"},
		{"empty cases", "kind: PolicyTest\ncases: []\n", "c.yaml:2: cases is empty: it would test nothing"},
		{"not a mapping", "kind: PolicyTest\ncases: [x]\n", `c.yaml:2: case 1 must be a mapping, not "x"`},
		{"nothing in it", one(""), "c.yaml:3: case 1 has no name\nc.yaml:3: case 1 has no to\nc.yaml:3: case 1 has no expect"},
		{"key", one(`name: a, to: "a.test:1", expects: allow`), "c.yaml:3: unknown key \"expects\" in case 1: did you mean \"expect\"?\nc.yaml:3: case \"a\" has no expect"},
		{"twice", one(`name: a, to: "a.test:1", expect: deny`) + `- {name: a, to: "b.test:1", expect: deny}` + "\n", `c.yaml:4: case "a" is there twice, first on line 3`},
		{"expect", one(`name: a, to: "a.test:1", expect: alow`), `c.yaml:3: unknown expect "alow" of case "a": did you mean "allow"?`},
		{"no port", one("name: a, to: a.test, expect: deny"), `c.yaml:3: to "a.test" of case "a": has no port: write a.test:443, or echo a.test`},
		{"port", one(`name: a, to: "a.test:0443", expect: deny`), `c.yaml:3: to "a.test:0443" of case "a": "0443" is not a port, 1 to 65535`},
		{"no digits", one(`name: a, to: "a.test:", expect: deny`), `c.yaml:3: to "a.test:" of case "a": "" is not a port, 1 to 65535`},
		{"v6", one(`name: a, to: "2001:db8::1:443", expect: deny`), `c.yaml:3: to "2001:db8::1:443" of case "a": write an IPv6 address in brackets, as in [2001:db8::1]:443`},
		{"bracket", one(`name: a, to: "[2001:db8::1:443", expect: deny`), `c.yaml:3: to "[2001:db8::1:443" of case "a": has a [ without a ]`},
		{"zone", one(`name: a, to: "[fe80::1%eth0]:443", expect: deny`), `c.yaml:3: to "[fe80::1%eth0]:443" of case "a": has a zone, which no packet carries`},
		{"pattern", one(`name: a, to: "*.a.test:443", expect: deny`), `c.yaml:3: to "*.a.test:443" of case "a": is a pattern: write a name that it matches`},
		{"bad name", one(`name: a, to: "a_/b.test:443", expect: deny`), `c.yaml:3: to "a_/b.test:443" of case "a": has the character '/': a name is letters, digits, '-', '_' and dots`},
		{"proto", one(`name: a, to: "a.test:1", proto: sctp, expect: deny`), `c.yaml:3: unknown proto "sctp" of case "a": did you mean "tcp"?`},
		{"proto of an echo", one(`name: a, to: echo a.test, proto: udp, expect: deny`), `c.yaml:3: proto of case "a": an echo has none, remove it`},
		{"resolves", one(`name: a, to: "a.test:1", resolves: [b.test], expect: deny`), `c.yaml:3: "b.test" in resolves of case "a" is not an address`},
		{"resolves empty", one(`name: a, to: "a.test:1", resolves: [], expect: deny`), `c.yaml:3: resolves of case "a" is empty: list at least one address or remove it`},
		{"resolves of an address", one(`name: a, to: "192.0.2.1:1", resolves: [192.0.2.1], expect: deny`), `c.yaml:3: case "a" leads to an address: resolves is for names`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Load("c.yaml", []byte(tt.in))
			if err == nil {
				t.Fatalf("got no error, want %s", tt.want)
			}
			if diff := cmp.Diff(tt.want, err.Error()); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
			var e *netpol.Error
			if !errors.As(err, &e) {
				t.Errorf("got %T, want an *netpol.Error", err)
			}
		})
	}
}

// FuzzLoad holds that what is read can be run, and that To is read again.
func FuzzLoad(f *testing.F) {
	f.Add([]byte("kind: PolicyTest\ncases:\n- {name: a, to: \"a.test:1\", expect: deny}\n"))
	f.Add([]byte("kind: PolicyTest\ncases:\n- {name: a, to: \"[2001:db8::1]:1\", proto: udp, expect: audit, rule: r, tenant: t}\n"))
	f.Add([]byte("kind: PolicyTest\ncases:\n- {name: a, to: echo a.test, resolves: [::1], expect: allow}\n"))
	prog := program(f, policy)
	f.Fuzz(func(t *testing.T, data []byte) {
		cases, err := Load("c.yaml", data)
		if err != nil {
			return
		}
		for _, r := range Run(prog, cases) {
			var again Case
			if err := again.setTo(r.Case.To()); err != nil || again.To() != r.Case.To() {
				t.Fatalf("%+v is written %q, read again as %+v, %v", r.Case, r.Case.To(), again, err)
			}
		}
	})
}
