// SPDX-License-Identifier: Apache-2.0

package netpol

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestCompileAuditAndNames(t *testing.T) {
	const rail = "guardrail:\n- {to: [{cidr: 203.0.113.0/24}], ports: [any/tcp]}\n- {to: [{fqdn: '**.example.com'}], ports: [443/tcp]}\n"
	for _, tt := range []struct {
		name   string
		layers []Layer
		want   string
	}{{
		name: "audit lets everything pass but what others deny",
		layers: []Layer{
			layer(t, "acme", "rules:\n- {name: mail, action: deny, to: [{cidr: 0.0.0.0/0}], ports: [25/tcp]}\n"),
			layer(t, "acme/vision", "mode: audit\nrules:\n- {name: web, action: allow, to: [{cidr: 203.0.113.0/24}], ports: [443/tcp]}\n"),
		},
		want: `
deny 0.0.0.0/0 25/tcp rule mail of acme
audit 0.0.0.0/0 all no rule
deny 203.0.113.0/24 25/tcp rule mail of acme
allow 203.0.113.0/24 443/tcp rule web of acme/vision
audit 203.0.113.0/24 all no rule
audit ::/0 all no rule
deny everything else all no rule
mode audit what says audit passes and is recorded`,
	}, {
		name: "its own deny is recorded",
		layers: []Layer{
			layer(t, "acme", "mode: audit\nrules:\n- {name: none, action: deny, to: [{cidr: 203.0.113.0/24}, {fqdn: ads.example.com}]}\n"),
		},
		want: `
audit 0.0.0.0/0 all no rule
audit 203.0.113.0/24 all rule none of acme
audit ::/0 all no rule
audit ads.example.com all rule none of acme
deny everything else all no rule
mode audit what says audit passes and is recorded`,
	}, {
		name: "only inside the guardrails before it",
		layers: []Layer{
			layer(t, "acme", "rules: []\n"+rail),
			layer(t, "acme/vision", "mode: audit\nrules:\n- {name: mail, action: deny, to: [{cidr: 0.0.0.0/0}], ports: [25/tcp]}\nguardrail: []\n"),
		},
		want: `
deny 0.0.0.0/0 25/tcp rule mail of acme/vision
audit 203.0.113.0/24 25/tcp rule mail of acme/vision
audit 203.0.113.0/24 any/tcp no rule
deny everything else all no rule
mode audit what says audit passes and is recorded, inside the guardrail of acme`,
	}, {
		name: "an enforcing layer below ends it",
		layers: []Layer{
			layer(t, "acme", "mode: audit\nrules:\n- {name: web, action: allow, to: [{cidr: 203.0.113.0/24}], ports: [443/tcp]}\n"),
			layer(t, "acme/vision", "rules: []\n"),
		},
		want: `
allow 203.0.113.0/24 443/tcp rule web of acme
deny everything else all no rule`,
	}, {
		name: "names under a guardrail",
		layers: []Layer{
			layer(t, "acme", "rules:\n- {name: own, action: allow, to: [{fqdn: git.example.org}], ports: [22/tcp], rate: 1Mbit}\n"+rail),
			layer(t, "acme/vision", "rules:\n- {name: api, action: allow, to: [{fqdn: '*.example.com'}, {fqdn: api.example.org}], ports: [443/tcp]}\n- {name: ads, action: deny, to: [{fqdn: '**.ads.example.com'}]}\n"),
		},
		want: `
allow git.example.org 22/tcp rule own of acme, at most 1Mbit
allow *.example.com 443/tcp rule api of acme/vision, inside the guardrail of acme
allow api.example.org 443/tcp rule api of acme/vision, inside the guardrail of acme
deny **.ads.example.com all rule ads of acme/vision
deny everything else all no rule`,
	}} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(strings.TrimSpace(tt.want), fold(compile(t, tt.layers...).Describe())); diff != "" {
				t.Errorf("program (-want +got):\n%s", diff)
			}
		})
	}
}

func TestAuditOfNames(t *testing.T) {
	org := layer(t, "acme", "rules:\n- {name: bad, action: deny, to: [{fqdn: '**.bad.example.com'}]}\n- {name: git, action: allow, to: [{fqdn: git.example.org}], ports: [443/tcp]}\nguardrail:\n- {to: [{fqdn: '**.example.com'}], ports: [443/tcp]}\n")
	team := layer(t, "acme/vision", "mode: audit\nrules:\n- {name: api, action: allow, to: [{fqdn: '*.example.com'}], ports: [443/tcp]}\n- {name: ads, action: deny, to: [{fqdn: ads.example.com}, {fqdn: x.ads.example.com}, {fqdn: git.example.org}]}\n")
	p := compile(t, org, team)
	for _, tt := range []struct {
		name  string
		want  NameVerdict
		audit string // of a flow to port 443
	}{
		{"api.example.com", NameVerdict{Allowed: true, Rule: 2, Rules: []int{2}, Reason: ReasonAllowed}, ""},
		{"ads.example.com", NameVerdict{Allowed: true, Audit: true, Rule: 3, Rules: []int{2}, Reason: ReasonDenied}, ""},
		// Outside the guardrail, but allowed by the layer that has it.
		{"git.example.org", NameVerdict{Allowed: true, Audit: true, Rule: 3, Rules: []int{1}, Reason: ReasonDenied}, ""},
		{"x.ads.example.com", NameVerdict{Audit: true, AllowPrivate: true, Rule: 3, Reason: ReasonDenied}, ReasonNoRule},
		{"a.b.example.com", NameVerdict{Audit: true, AllowPrivate: true, Rule: -1, Reason: ReasonNoRule}, ReasonNoRule},
		{"x.bad.example.com", NameVerdict{Rule: 0, Reason: ReasonDenied}, "denied"},
		{"example.org", NameVerdict{Rule: -1, Reason: ReasonNoRule}, "denied"},
	} {
		if diff := cmp.Diff(tt.want, p.Name(tt.name)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
		v := p.Evaluate(Flow{TCP, netip.MustParseAddr("198.51.100.1"), 443}, tt.name)
		if got := v.Audit; !v.Allowed && tt.audit != "denied" || v.Allowed && got != tt.audit {
			t.Errorf("%s: got %+v, want audit %q", tt.name, v, tt.audit)
		}
		if v := p.Evaluate(Flow{TCP, netip.MustParseAddr("198.51.100.1"), 80}, tt.name); v.Allowed {
			t.Errorf("%s: port 80 is outside the guardrail, got %+v", tt.name, v)
		}
		if v := p.Evaluate(Flow{TCP, netip.MustParseAddr("10.0.0.1"), 443}, tt.name); v.Allowed {
			t.Errorf("%s: a private address passed without allow_private: %+v", tt.name, v)
		}
	}
}

// A name's guardrail may bound it by name, by address, or by both.
func TestGuardrailsOfNames(t *testing.T) {
	org := layer(t, "acme", `rules: []
guardrail:
- {to: [{fqdn: "**.example.com"}], ports: [443/tcp, 80/tcp]}
- {to: [{fqdn: "**.corp.example.com", allow_private: true}], ports: [22/tcp]}
- {to: [{cidr: 203.0.113.0/24}, {cidr: 10.1.0.0/16}], ports: [8000-8010/tcp]}
`)
	team := layer(t, "acme/vision", `rules:
- {name: web, action: allow, to: [{fqdn: "**.example.com", allow_private: true}, {fqdn: api.example.org, allow_private: true}], ports: [443/tcp, 8005-9000/tcp]}
- {name: git, action: allow, to: [{fqdn: git.corp.example.com, allow_private: true}], ports: [22/tcp]}
`)
	p := compile(t, org, team)
	for _, tt := range []struct {
		name, addr string
		want       string
	}{
		{"a.example.com", "198.51.100.1", "443/tcp"},
		{"a.example.com", "203.0.113.1", "443/tcp 8005-8010/tcp"},
		{"a.example.com", "10.1.0.1", "8005-8010/tcp"},
		{"a.example.com", "10.2.0.1", ""},
		{"git.corp.example.com", "10.2.0.1", "22/tcp"},
		{"git.corp.example.com", "198.51.100.1", "443/tcp 22/tcp"},
		{"api.example.org", "198.51.100.1", ""},
		{"api.example.org", "203.0.113.1", "8005-8010/tcp"},
		{"api.example.org", "10.1.0.1", "8005-8010/tcp"},
	} {
		var ports []PortRange
		for _, s := range p.Learn(tt.name, netip.MustParseAddr(tt.addr)) {
			ports = append(ports, PortRange{s.Lo, s.Hi, s.Proto})
		}
		if got := joinPorts(ports); got != tt.want {
			t.Errorf("%s at %s: got %q, want %q", tt.name, tt.addr, got, tt.want)
		}
	}

	names := layer(t, "acme", "rules: []\nguardrail: [{to: [{fqdn: '*.example.com'}], ports: [443/tcp]}]\n")
	for _, tt := range []struct{ to, ports, want string }{
		{"{fqdn: example.org}", "443/tcp", "example.org is outside the guardrail of acme (acme.yaml:4)"},
		{"{fqdn: '**.example.com'}", "443/tcp", "**.example.com is outside the guardrail of acme (acme.yaml:4)"},
		{"{fqdn: b.a.example.com}", "443/tcp", "b.a.example.com is outside the guardrail of acme (acme.yaml:4)"},
		{"{fqdn: a.example.com}", "80/tcp", "a.example.com at 80/tcp is outside the guardrail of acme (acme.yaml:4)"},
		{"{fqdn: a.example.com}", "80/tcp, 443/tcp", "80/tcp is outside the guardrail of acme (acme.yaml:4)"},
		{"{fqdn: a.example.com, allow_private: true}", "443/tcp", "a.example.com with allow_private is outside the guardrail of acme (acme.yaml:4)"},
		{"{cidr: 203.0.113.0/24}", "443/tcp", "203.0.113.0/24 is outside the guardrail of acme (acme.yaml:4)"},
		{"{fqdn: a.example.com}", "443/tcp", ""},
		{"{fqdn: '*.example.com'}", "443/tcp", ""},
	} {
		_, err := Compile([]Layer{names, layer(t, "acme/vision", "rules:\n- {name: web, action: allow, to: ["+tt.to+"], ports: ["+tt.ports+"]}\n")})
		want := tt.want
		if want != "" {
			want = `acme-vision.yaml:4: rule "web" of acme/vision: ` + want
		}
		if diff := cmp.Diff(want, errText(err)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.to, diff)
		}
	}
}

func TestTooManyStepsOfAName(t *testing.T) {
	ports := func(first, n int) string {
		var list []string
		for i := range n {
			list = append(list, PortRange{uint16(first + 2*i), uint16(first + 2*i), TCP}.String())
		}
		return strings.Join(list, ", ")
	}
	rules := func(patterns ...string) error {
		body := "rules:\n"
		for i, p := range patterns {
			body += fmt.Sprintf("- {name: r%d, action: allow, to: [{fqdn: %q}], ports: [%s]}\n", i, p, ports(1000*(i+1), 9))
		}
		_, err := Compile([]Layer{layer(t, "acme", body)})
		return err
	}
	_, err := Compile([]Layer{layer(t, "acme", "rules:\n- {name: web, action: allow, to: [{fqdn: a.example.com}], ports: ["+ports(1, 17)+"]}\n")})
	if got, want := errText(err), "acme.yaml:4: a.example.com takes more than 16 port ranges to decide: join port ranges or rules; it is covered by acme/web"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	for _, tt := range []struct {
		patterns []string
		want     string // pattern in the error
	}{
		{[]string{"a.test", "b.test"}, ""},
		{[]string{"*.a.test", "*.test"}, ""},
		{[]string{"a.test", "a.test"}, "a.test"},
		{[]string{"*.a.test", "b.a.test"}, "b.a.test"},
		{[]string{"c.b.a.test", "**.a.test"}, "c.b.a.test"},
		{[]string{"*.b.a.test", "**.b.a.test"}, "*.b.a.test"},
		{[]string{"**.b.a.test", "**.a.test"}, "**.b.a.test"},
		{[]string{"**.b.a.test", "**.test"}, "**.b.a.test"},
	} {
		want := ""
		if tt.want != "" {
			want = "acme.yaml:5: " + tt.want + " takes more than 16 port ranges to decide: join port ranges or rules; it is covered by acme/r0, acme/r1"
		}
		if got := errText(rules(tt.patterns...)); got != want {
			t.Errorf("%q: got %s, want %s", tt.patterns, got, want)
		}
	}
}

// TestDigestCovers changes one thing at a time that a program decides by.
func TestDigestCovers(t *testing.T) {
	base := "mode: audit\nrules:\n- {name: web, action: allow, to: [{fqdn: a.example.com}], ports: [443/tcp], rate: 1Mbit}\nrate: {sandbox: 1Gbit}\nbudget: {egress: 1GiB, per: day, then: block}\n"
	org := "rules: []\nguardrail: [{to: [{fqdn: '**.example.com', allow_private: true}], ports: [443/tcp, 80/tcp]}]\n"
	seen := map[[32]byte]string{}
	for _, change := range [][2]string{
		{"", ""}, {"mode: audit", "mode: enforce"}, {"a.example.com", "b.example.com"}, {"a.example.com", "a.example.com, allow_private: true"}, {"443/tcp]", "80/tcp]"}, {"443/tcp]", "echo/icmp]"},
		{"rate: 1Mbit", "rate: 2Mbit"}, {"sandbox: 1Gbit", "tenant: 1Gbit"}, {"1Gbit", "2Gbit"}, {"1GiB", "2GiB"}, {"day", "month"}, {"block", "block, scope: sandbox"},
		{"action: allow", "action: deny"}, {"rate: 1Mbit", "rate: 1Mbit}\n- {name: x, action: deny, to: [{fqdn: x.example.com}]"},
	} {
		body := strings.Replace(base, change[0], change[1], 1)
		parent := org
		if strings.Contains(change[1], "echo") {
			parent = strings.Replace(org, "443/tcp", "443/tcp, echo/icmp", 1)
		}
		if change[1] == "action: deny" {
			body = strings.Replace(body, ", ports: [443/tcp], rate: 1Mbit", "", 1)
		}
		d := compile(t, layer(t, "acme", parent), layer(t, "acme/vision", body)).Digest
		if other, dup := seen[d]; dup {
			t.Errorf("%v has the digest of %s", change, other)
		}
		seen[d] = change[0] + " to " + change[1]
	}
}
