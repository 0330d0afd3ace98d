// SPDX-License-Identifier: Apache-2.0

package netpol

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseRate(t *testing.T) {
	for in, want := range map[string]uint64{
		"8kbit": 8000, "100Mbit": 100_000_000, "2.5Gbit": 2_500_000_000, "400Gbit": 400_000_000_000, "8.001kbit": 8001, "10 Mbit": 10_000_000,
	} {
		if got, err := ParseRate(in); got != want || err != nil {
			t.Errorf("%s: got %d, %v, want %d", in, got, err, want)
		}
	}
	for in, want := range map[string]string{
		"100":        `rate "100": write a number and one of kbit, Mbit, Gbit (a second), as in 100Mbit`,
		"100mbit":    `rate "100mbit": write 100Mbit`,
		"100Mbps":    `rate "100Mbps": write a number and one of kbit, Mbit, Gbit (a second), as in 100Mbit`,
		"Mbit":       `rate "Mbit": has no number that can be read`,
		"-1Mbit":     `rate "-1Mbit": write a number and one of kbit, Mbit, Gbit (a second), as in 100Mbit`,
		"7.999kbit":  `rate "7.999kbit": must be from 8kbit to 400Gbit`,
		"0Gbit":      `rate "0Gbit": must be from 8kbit to 400Gbit`,
		"400.1Gbit":  `rate "400.1Gbit": must be from 8kbit to 400Gbit`,
		"8.0001kbit": `rate "8.0001kbit": is finer than can be counted`,
	} {
		if got, err := ParseRate(in); err == nil || err.Error() != want {
			t.Errorf("%s: got %d, %v, want %s", in, got, err, want)
		}
	}
}

func TestFormat(t *testing.T) {
	for bits, want := range map[uint64]string{8000: "8kbit", 8001: "8.001kbit", 2_500_000_000: "2.5Gbit", 999_999_999: "999.999999Mbit"} {
		if got := FormatRate(bits); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	for n, want := range map[uint64]string{1: "1B", 1536: "1.5KiB", 50 << 30: "50GiB", 1 << 41: "2TiB", 1<<30 + 1: "1073741825B", 5 << 28: "1.25GiB"} {
		if got := FormatSize(n); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

func TestParseNameAndLimitErrors(t *testing.T) {
	top := func(lines string) string { return "kind: EgressPolicy\nname: p\nrules: []\n" + lines + "\n" }
	for _, tt := range []struct{ name, in, want string }{
		{"bad name", allowTo("[{fqdn: https://example.com}]"), `p.yaml:6: fqdn "https://example.com" of rule "web": has the character ':': a name is letters, digits, '-', '_' and dots`},
		{"star without quotes", allowTo("[{fqdn: *.example.com}]"),
			`p.yaml:6: not valid YAML: did not find expected alphabetic or numeric character (a value that begins with a star, such as "*.example.com", needs quotes)`},
		{"public suffix", allowTo(`[{fqdn: "*.com"}]`), `p.yaml:6: fqdn *.com of rule "web" matches names that anybody can register: write the domain, as in *.example.com`},
		{"public suffix in a guardrail", top(`guardrail: [{to: [{fqdn: "**.org"}], ports: [443/tcp]}]`),
			"p.yaml:4: fqdn **.org of guardrail bound 1 matches names that anybody can register: write the domain, as in **.example.org"},
		{"both", allowTo("[{fqdn: a.example.com, cidr: 192.0.2.0/24}]"), `p.yaml:6: target of rule "web" has both fqdn and cidr: list them as two targets`},
		{"except", allowTo("[{fqdn: a.example.com, except: [b.example.com]}]"), "p.yaml:6: except belongs to a cidr: to refuse a name write a deny rule for it"},
		{"allow_private alone", allowTo("[{allow_private: true}]"), `p.yaml:6: target of rule "web" has neither fqdn nor cidr`},
		{"allow_private of a cidr", allowTo("[{cidr: 10.0.0.0/8, allow_private: true}]"), "p.yaml:6: allow_private belongs to an fqdn: a cidr says itself which addresses it means"},
		{"allow_private as text", allowTo(`[{fqdn: a.example.com, allow_private: "yes"}]`), `p.yaml:6: allow_private must be true or false, not "yes"`},
		{"allow_private of a deny rule", rule("action: deny", "to: [{fqdn: a.example.com, allow_private: true}]"),
			`p.yaml:6: allow_private in rule "web": a deny rule refuses the name whatever its addresses are, remove it`},
		{"name twice", allowTo("[{fqdn: a.example.com}, {fqdn: A.example.com.}]"), `p.yaml:6: fqdn a.example.com is in rule "web" twice, first on line 6`},
		{"name as text", allowTo("[a.example.com]"), `p.yaml:6: target of rule "web" must be a mapping: write {fqdn: a.example.com}`},
		{"address as text", allowTo("[192.0.2.1]"), `p.yaml:6: target of rule "web" must be a mapping: write {cidr: 192.0.2.1}`},

		{"ports of a denied name", rule("action: deny", "to: [{fqdn: a.example.com}]", "ports: [25/tcp]"),
			`p.yaml:7: ports of rule "web": a deny rule refuses the names of an fqdn whatever the port is, remove the ports or deny a cidr in a rule of its own`},
		{"icmp", allowPorts("[any/icmp]"), `p.yaml:7: port "any/icmp" of rule "web": of ICMP only echo requests can pass, write echo/icmp`},
		{"echo of tcp", allowPorts("[echo/tcp]"), `p.yaml:7: port "echo/tcp" of rule "web": "echo" is not a port number, write a number, a range like 8000-8010, or any`},

		{"rate of a deny rule", rule("action: deny", "to: [{cidr: 192.0.2.0/24}]", "rate: 1Mbit"),
			`p.yaml:7: rate of rule "web": a deny rule lets nothing pass that could have a rate, remove it`},
		{"bad rate of a rule", allowPorts("[443/tcp]\n  rate: fast"), `p.yaml:8: rate of rule "web": rate "fast": write a number and one of kbit, Mbit, Gbit (a second), as in 100Mbit`},
		{"rate without a scope", top("rate: 1Gbit"),
			"p.yaml:4: rate of the policy must say whose it is: write {sandbox: 1Gbit} for each sandbox, or {tenant: 1Gbit} for all of the tenant together"},
		{"rate empty", top("rate: {}"), "p.yaml:4: rate of the policy is empty: write {sandbox: 1Gbit}, {tenant: 5Gbit} or both, or remove it"},
		{"rate null", top("rate:"), "p.yaml:4: rate of the policy must be a mapping, not empty"},
		{"rate key", top("rate: {tennant: 1Gbit}"), `p.yaml:4: unknown key "tennant" in rate of the policy: did you mean "tenant"?`},
		{"rate value", top("rate: {tenant: 7kbit}"), `p.yaml:4: tenant rate: rate "7kbit": must be from 8kbit to 400Gbit`},

		{"budget without parts", top("budget: {}"),
			"p.yaml:4: budget has no egress: write how many bytes may leave, as in 50GiB\n" +
				"p.yaml:4: budget has no per: write hour, day, month\n" +
				`p.yaml:4: budget has no then: write "then: block"`},
		{"budget null", top("budget:"), "p.yaml:4: budget must be a mapping, not empty"},
		{"budget list empty", top("budget: []"), "p.yaml:4: budget is empty: list at least one or remove it"},
		{"budget words", top("budget: {egress: 50GB, per: week, then: warn, scope: sandboxes}"),
			"p.yaml:4: egress of budget: size \"50GB\": GB is ambiguous, write 50GiB for steps of 1024\n" +
				"p.yaml:4: unknown per of budget \"week\": known are hour, day, month\n" +
				"p.yaml:4: unknown then of budget \"warn\": known is block, which drops what goes beyond it\n" +
				"p.yaml:4: unknown scope of budget \"sandboxes\": did you mean \"sandbox\"?"},
		{"budget without a unit", top("budget: {egress: 50, per: day, then: block}"), "p.yaml:4: egress of budget: 50 has no unit, write 50B or one of KiB, MiB, GiB, TiB"},
		{"budget of zero", top("budget: {egress: 0, per: day, then: block}"), "p.yaml:4: egress of budget: zero would block everything: remove the rules for that"},
		{"two budgets of one scope", top("budget:\n- {egress: 1GiB, per: day, then: block}\n- {egress: 9GiB, per: month, then: block}"),
			"p.yaml:6: policy has two budgets of scope tenant, the first on line 5: keep the one that matters"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Parse("p.yaml", []byte(tt.in))
			if diff := cmp.Diff(tt.want, errText(err)); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
		})
	}
	for _, in := range []string{
		rule("action: deny", `to: [{fqdn: "**.com"}]`),
		allowTo(`[{fqdn: "*.internal"}]`),
	} {
		if _, err := Parse("p.yaml", []byte(in)); err != nil {
			t.Errorf("%s: %v", in, err)
		}
	}
}

func TestCompileLimits(t *testing.T) {
	org := layer(t, "acme", "rules: []\nrate: {tenant: 5Gbit, sandbox: 1Gbit}\nbudget: {egress: 1TiB, per: month, then: block}\n")
	team := layer(t, "acme/vision", "rules:\n- {name: web, action: allow, to: [{cidr: 203.0.113.0/24}], ports: [443/tcp], rate: 10Mbit}\nrate: {sandbox: 2Gbit}\n")
	own := layer(t, "acme/vision", "rules: []\nrate: {sandbox: 100Mbit}\nbudget: {egress: 1GiB, per: day, then: block, scope: sandbox}\n")
	p := compile(t, org, team, own)
	if diff := cmp.Diff([]ProgramRate{
		{"acme", ScopeTenant, 5_000_000_000}, {"acme", ScopeSandbox, 1_000_000_000}, {"acme/vision", ScopeSandbox, 100_000_000},
	}, p.Rates); diff != "" {
		t.Errorf("rates (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]ProgramBudget{{"acme", ScopeTenant, 1 << 40, PerMonth}, {"acme/vision", ScopeSandbox, 1 << 30, PerDay}}, p.Budgets); diff != "" {
		t.Errorf("budgets (-want +got):\n%s", diff)
	}
	want := strings.TrimSpace(`
allow 203.0.113.0/24 443/tcp rule web of acme/vision, at most 10Mbit
deny everything else all no rule
rate all of acme 5Gbit set by acme
rate each sandbox 1Gbit set by acme
rate each sandbox 100Mbit set by acme/vision
budget all of acme 1TiB per month set by acme
budget each sandbox 1GiB per day set by acme/vision`)
	if diff := cmp.Diff(want, fold(p.Describe())); diff != "" {
		t.Errorf("program (-want +got):\n%s", diff)
	}

	clash := layer(t, "acme/vision", "rules: []\nbudget: {egress: 1GiB, per: hour, then: block, scope: sandbox}\n")
	_, err := Compile([]Layer{org, own, clash})
	if got, want := errText(err), "acme-vision.yaml:4: budget of scope sandbox per hour: acme/vision has one per day already, write this one per day too"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}

	var deep []Layer
	for i := range 4 {
		deep = append(deep, layer(t, fmt.Sprintf("t%d", i), "rules: []\nrate: {tenant: 5Gbit, sandbox: 1Gbit}\n"))
	}
	_, err = Compile(deep)
	if got, want := errText(err), "t3.yaml: t3 has 8 rates together with its ancestors, at most 7 are allowed: remove some"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}

	bad := Layer{Tenant: "acme", Policy: Policy{
		Rates:   []RateLimit{{Scope: 9, Bits: 1}},
		Budgets: []Budget{{Scope: ScopeTenant, Per: 7}},
		Rules:   []Rule{{Name: "r", Action: Allow, Rate: 5, To: []Target{{CIDR: pfx("10.0.0.0/8"), FQDN: "a.test"}, {FQDN: "A.test"}, {FQDN: "*"}}, Ports: []PortRange{{8, 9, ICMP}}}},
	}}
	bad.Policy.Rules = append(bad.Policy.Rules, Rule{Name: "d", To: []Target{{FQDN: "a.test"}}, Ports: []PortRange{{25, 25, TCP}}})
	_, err = Compile([]Layer{bad})
	wantAll := strings.Join([]string{
		`rule "r" of acme has a rate that it cannot have: 5 bits a second`,
		`rule "r" of acme: target a.test has a cidr as well`,
		`rule "r" of acme: fqdn "A.test" must be written a.test`,
		`rule "r" of acme: fqdn "*" would match every name: write the domain behind it, as in *.example.com`,
		`rule "r" of acme: bad port range 8-9/icmp`,
		`rule "d" of acme denies an fqdn at some ports only: it refuses the name whatever the port is`,
		"acme has a bad rate of scope 9: 1 bits a second",
		"acme has a bad budget of tenant: 0 bytes per window 7",
	}, "\n")
	if diff := cmp.Diff(wantAll, errText(err)); diff != "" {
		t.Errorf("error (-want +got):\n%s", diff)
	}
}
