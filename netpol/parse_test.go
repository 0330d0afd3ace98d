// SPDX-License-Identifier: Apache-2.0

package netpol

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// comparePrefixes lets go-cmp look at prefixes and addresses as values.
var comparePrefixes = cmp.Options{
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
	cmpopts.EquateEmpty(),
}

const full = `kind: EgressPolicy
name: agents-default
mode: audit
rules:
- name: model-api
  action: allow
  to:
  - cidr: 203.0.113.10/32
  - fqdn: API.Example.com.
  ports: [443/tcp, 80/tcp, 81/tcp, echo/icmp]
  rate: 2.5Mbit
- name: registry
  action: allow
  to: [{cidr: 10.20.0.0/16, except: [10.20.9.0/24, 10.20.0.0/30]}]
  ports: [5000/tcp, 8000-8010/tcp, 8005-8020/tcp, any/udp]
- name: no-mail
  action: deny
  to: [{cidr: 0.0.0.0/0}, {cidr: "::/0"}]
  ports: [25/tcp]
- name: quarantine
  action: deny
  to: [{cidr: 198.51.100.7/32}]
guardrail:
- to: [{cidr: 203.0.113.0/24, except: [203.0.113.128/25]}]
  ports: [any/tcp]
- to: [{fqdn: "**.example.com"}, {fqdn: "*.corp.example", allow_private: true}, {fqdn: git.example.com, allow_private: false}]
  ports: [443/tcp]
rate: {sandbox: 1Gbit, tenant: 400Gbit}
budget:
- {egress: 50GiB, per: day, then: block}
- {egress: 1.5KiB, per: month, then: block, scope: sandbox}
`

func pfx(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func TestParse(t *testing.T) {
	got, err := Parse("p.yaml", []byte(full))
	if err != nil {
		t.Fatal(err)
	}
	want := Policy{
		Name:   "agents-default",
		Source: "p.yaml",
		Mode:   ModeAudit,
		Rules: []Rule{{
			Name: "model-api", Action: Allow, Line: 5, Rate: 2500000,
			To:    []Target{{CIDR: pfx("203.0.113.10/32"), Line: 8}, {FQDN: "api.example.com", Line: 9}},
			Ports: []PortRange{{8, 8, ICMP}, {80, 81, TCP}, {443, 443, TCP}},
		}, {
			Name: "registry", Action: Allow, Line: 12,
			To: []Target{{
				CIDR: pfx("10.20.0.0/16"), Line: 14,
				Except: []netip.Prefix{pfx("10.20.0.0/30"), pfx("10.20.9.0/24")},
			}},
			Ports: []PortRange{{5000, 5000, TCP}, {8000, 8020, TCP}, {1, 65535, UDP}},
		}, {
			Name: "no-mail", Action: Deny, Line: 16,
			To:    []Target{{CIDR: pfx("0.0.0.0/0"), Line: 18}, {CIDR: pfx("::/0"), Line: 18}},
			Ports: []PortRange{{25, 25, TCP}},
		}, {
			Name: "quarantine", Action: Deny, Line: 20,
			To:    []Target{{CIDR: pfx("198.51.100.7/32"), Line: 22}},
			Ports: everyPort(),
		}},
		Guardrail: &Guardrail{Line: 24, Bounds: []Bound{{
			Line:  24,
			To:    []Target{{CIDR: pfx("203.0.113.0/24"), Except: []netip.Prefix{pfx("203.0.113.128/25")}, Line: 24}},
			Ports: []PortRange{{1, 65535, TCP}},
		}, {
			Line:  26,
			To:    []Target{{FQDN: "**.example.com", Line: 26}, {FQDN: "*.corp.example", AllowPrivate: true, Line: 26}, {FQDN: "git.example.com", Line: 26}},
			Ports: []PortRange{{443, 443, TCP}},
		}}},
		Rates:   []RateLimit{{ScopeTenant, 400_000_000_000, 28}, {ScopeSandbox, 1_000_000_000, 28}},
		Budgets: []Budget{{ScopeTenant, 50 << 30, PerDay, 30}, {ScopeSandbox, 1536, PerMonth, 31}},
	}
	if diff := cmp.Diff(want, got, comparePrefixes); diff != "" {
		t.Errorf("policy (-want +got):\n%s", diff)
	}
}

// rule wraps one rule in a policy; its first line is line 4.
func rule(lines ...string) string {
	return "kind: EgressPolicy\nname: p\nrules:\n- name: web\n  " + strings.Join(lines, "\n  ") + "\n"
}

// allowTo is a policy with one allow rule to the given targets, on line 6.
func allowTo(to string) string { return rule("action: allow", "to: "+to, "ports: [443/tcp]") }

// allowPorts is a policy with one allow rule at the given ports, on line 7.
func allowPorts(ports string) string {
	return rule("action: allow", "to: [{cidr: 192.0.2.0/24}]", "ports: "+ports)
}

func TestParseErrors(t *testing.T) {
	deep := strings.Repeat("[", 40) + strings.Repeat("]", 40)
	for _, tt := range []struct{ name, in, want string }{
		{"empty file", "", "p.yaml: is empty"},
		{"comment only", "# nothing\n", "p.yaml: is empty"},
		{"syntax", "kind: EgressPolicy\nname: [\n", "p.yaml:3: not valid YAML: did not find expected node content"},
		{"indentation", "kind: EgressPolicy\nname: p\nrules:\n- name: web\n   action: allow\n", "p.yaml:5: not valid YAML: mapping values are not allowed in this context"},
		{"list not closed", allowPorts("[80/tcp"), "p.yaml:7: not valid YAML: did not find expected ',' or ']'"},
		{"v6 without quotes", allowTo("[{cidr: ::/0}]"),
			`p.yaml:6: not valid YAML: did not find expected node content (a value that begins with a colon, such as ::/0, needs quotes)`},
		{"control character", "kind: \x01\n", "p.yaml: not valid YAML: control characters are not allowed"},
		{"not a mapping", "- a\n", "p.yaml:1: must be a mapping that begins with a kind, not a list"},
		{"two documents", "kind: EgressPolicy\n---\nkind: EgressPolicy\n", "p.yaml:2: starts a second document: write one document a file"},
		{"too large", strings.Repeat("#", MaxPolicyBytes+1), "p.yaml: is 1048577 bytes long, at most 1048576 are read"},
		{"too deep", "a: " + deep, "p.yaml:1: is nested more than 16 deep"},
		{"anchor", "kind: &k EgressPolicy\n", "p.yaml:1: anchor &k: anchors are not allowed, write the value where it is used"},
		{"alias", "kind: &k EgressPolicy\nname: *k\n",
			"p.yaml:1: anchor &k: anchors are not allowed, write the value where it is used\n" +
				"p.yaml:2: alias *k: aliases are not allowed, write the value out"},
		{"tag", "kind: !!str EgressPolicy\n", "p.yaml:1: tag !!str: tags are not allowed"},
		{"merge key", "kind: EgressPolicy\nname: p\nrules: []\n<<: {mode: audit}\n", `p.yaml:4: policy has a key that is not a word: "<<"`},
		{"key not a word", "kind: EgressPolicy\nname: p\nrules: []\n1: 2\n", "p.yaml:4: policy has a key that is not a word: the number 1"},

		{"no kind", "name: p\nrules: []\n", `p.yaml:1: kind is missing: write "kind: EgressPolicy"`},
		{"wrong kind", "kind: NetworkPolicy\nname: p\nrules: []\n", `p.yaml:1: unknown kind "NetworkPolicy": known are EgressPolicy`},
		{"kind typo, nothing else is said", "kind: EgresPolicy\nfoo: 1\n", `p.yaml:1: unknown kind "EgresPolicy": did you mean "EgressPolicy"?`},
		{"unknown key", "kind: EgressPolicy\nname: p\nrulez: []\nrules: []\n", `p.yaml:3: unknown key "rulez" in policy: did you mean "rules"?`},
		{"unknown key, nothing near", "kind: EgressPolicy\nname: p\nrules: []\ningress: []\n",
			`p.yaml:4: unknown key "ingress" in policy: known are kind, name, rules, guardrail, mode, rate, budget`},
		{"duplicate key", "kind: EgressPolicy\nname: p\nrules: []\nrules: []\n", `p.yaml:4: key "rules" is in policy twice, first on line 3`},
		{"no name", "kind: EgressPolicy\nrules: []\n", "p.yaml:1: policy has no name"},
		{"bad name", "kind: EgressPolicy\nname: My Policy\nrules: []\n",
			`p.yaml:2: name "My Policy" of policy: use 1 to 63 of a-z, 0-9, '.', '_' and '-', with a letter or a digit at both ends`},
		{"name is a number", "kind: EgressPolicy\nname: 7\nrules: []\n", "p.yaml:2: name of policy must be text, not the number 7"},
		{"no rules", "kind: EgressPolicy\nname: p\n", `p.yaml:1: policy has no rules: write "rules: []" to allow nothing`},
		{"empty rules", "kind: EgressPolicy\nname: p\nrules:\n", "p.yaml:3: rules must be a list, not empty"},
		{"rules as a mapping", "kind: EgressPolicy\nname: p\nrules: {web: 1}\n", "p.yaml:3: rules must be a list, not a mapping"},
		{"rule not a mapping", "kind: EgressPolicy\nname: p\nrules: [web]\n", `p.yaml:3: rule 1 must be a mapping, not "web"`},
		{"mode unknown", "kind: EgressPolicy\nname: p\nmode: enforced\nrules: []\n", `p.yaml:3: unknown mode "enforced": did you mean "enforce"?`},

		{"rule without a name", "kind: EgressPolicy\nname: p\nrules:\n- action: deny\n  to: [{cidr: 192.0.2.0/24}]\n", "p.yaml:4: rule 1 has no name"},
		{"rule twice", allowTo("[{cidr: 192.0.2.0/24}]") + "- {name: web, action: deny, to: [{cidr: 192.0.2.0/24}]}\n",
			`p.yaml:8: rule "web" is defined twice, first on line 4: every rule needs a name of its own`},
		{"no action", rule("to: [{cidr: 192.0.2.0/24}]", "ports: [443/tcp]"), `p.yaml:4: rule "web" has no action: write "action: allow" or "action: deny"`},
		{"action typo", rule("action: alow", "to: [{cidr: 192.0.2.0/24}]", "ports: [443/tcp]"), `p.yaml:5: unknown action "alow" in rule "web": did you mean "allow"?`},
		{"key typo in a rule", rule("action: deny", "to: [{cidr: 192.0.2.0/24}]", "port: [443/tcp]"), `p.yaml:7: unknown key "port" in rule "web": did you mean "ports"?`},

		{"no to", rule("action: allow", "ports: [443/tcp]"), `p.yaml:4: rule "web" has no to: list where it leads, as in [{fqdn: api.example.com}] or [{cidr: 10.20.0.0/16}]`},
		{"empty to", allowTo("[]"), `p.yaml:6: to of rule "web" is empty: it would match nothing, list at least one fqdn or cidr or remove the rule`},
		{"null to", allowTo(""), `p.yaml:6: to of rule "web" must be a list, not empty`},
		{"to is text", allowTo("192.0.2.0/24"), `p.yaml:6: to of rule "web" must be a list, not "192.0.2.0/24"`},
		{"target is text", allowTo("[192.0.2.0/24]"), `p.yaml:6: target of rule "web" must be a mapping: write {cidr: 192.0.2.0/24}`},
		{"target without cidr", allowTo("[{except: [192.0.2.0/25]}]"), `p.yaml:6: target of rule "web" has neither fqdn nor cidr`},
		{"target key typo", allowTo("[{cdir: 192.0.2.0/24}]"),
			"p.yaml:6: unknown key \"cdir\" in target of rule \"web\": did you mean \"cidr\"?\np.yaml:6: target of rule \"web\" has neither fqdn nor cidr"},
		{"cidr twice", allowTo("[{cidr: 192.0.2.0/24}, {cidr: 192.0.2.0/24, except: [192.0.2.0/25]}]"), `p.yaml:6: cidr 192.0.2.0/24 is in rule "web" twice, first on line 6`},
		{"address", allowTo("[{cidr: 192.0.2.1}]"), "p.yaml:6: cidr 192.0.2.1 has no prefix length: write 192.0.2.1/32"},
		{"v6 address", allowTo("[{cidr: 2001:db8::1}]"), "p.yaml:6: cidr 2001:db8::1 has no prefix length: write 2001:db8::1/128"},
		{"host name", allowTo("[{cidr: example.com}]"), `p.yaml:6: cidr "example.com" is not an address prefix: write one like 10.20.0.0/16 or 2001:db8::/32`},
		{"zone", allowTo("[{cidr: 'fe80::1%eth0/64'}]"), `p.yaml:6: cidr "fe80::1%eth0/64" is not an address prefix: write one like 10.20.0.0/16 or 2001:db8::/32`},
		{"prefix too long", allowTo("[{cidr: 192.0.2.0/33}]"), `p.yaml:6: cidr "192.0.2.0/33" is not an address prefix: write one like 10.20.0.0/16 or 2001:db8::/32`},
		{"host bits", allowTo("[{cidr: 10.20.1.7/16}]"), "p.yaml:6: cidr 10.20.1.7/16 has host bits set: write 10.20.0.0/16, or 10.20.1.7/32 for the one address"},
		{"v6 host bits", allowTo("[{cidr: 2001:db8::1/32}]"), "p.yaml:6: cidr 2001:db8::1/32 has host bits set: write 2001:db8::/32, or 2001:db8::1/128 for the one address"},
		{"mapped", allowTo("[{cidr: '::ffff:10.0.0.0/104'}]"), "p.yaml:6: cidr ::ffff:10.0.0.0/104 is IPv4-mapped IPv6, which no packet carries: write 10.0.0.0/8"},
		{"except outside", allowTo("[{cidr: 192.0.2.0/24, except: [198.51.100.0/24]}]"), "p.yaml:6: except 198.51.100.0/24 is outside 192.0.2.0/24"},
		{"except all", allowTo("[{cidr: 192.0.2.0/24, except: [192.0.2.0/24]}]"), "p.yaml:6: except 192.0.2.0/24 leaves nothing of 192.0.2.0/24"},
		{"except wider", allowTo("[{cidr: 192.0.2.0/24, except: [192.0.0.0/16]}]"), "p.yaml:6: except 192.0.0.0/16 leaves nothing of 192.0.2.0/24"},
		{"except other family", allowTo("[{cidr: 0.0.0.0/0, except: ['2001:db8::/32']}]"), "p.yaml:6: except 2001:db8::/32 is not of the same family as 0.0.0.0/0"},
		{"except twice", allowTo("[{cidr: 192.0.2.0/24, except: [192.0.2.0/25, 192.0.2.0/25]}]"), "p.yaml:6: except 192.0.2.0/25 is listed twice"},
		{"except empty", allowTo("[{cidr: 192.0.2.0/24, except: []}]"), "p.yaml:6: except of 192.0.2.0/24 is empty: list what is excepted or remove the key"},
		{"except null", allowTo("[{cidr: 192.0.2.0/24, except: }]"), "p.yaml:6: except must be a list, not empty"},

		{"metadata", allowTo("[{cidr: 169.254.169.254/32}]"), "p.yaml:6: cidr 169.254.169.254/32 can never match: 169.254.169.254/32 is always denied (metadata)"},
		{"azure", allowTo("[{cidr: 168.63.129.16/32}]"), "p.yaml:6: cidr 168.63.129.16/32 can never match: 168.63.129.16/32 is always denied (metadata)"},
		{"alibaba", allowTo("[{cidr: 100.100.100.200/32}]"), "p.yaml:6: cidr 100.100.100.200/32 can never match: 100.100.100.200/32 is always denied (metadata)"},
		{"aws v6", allowTo("[{cidr: 'fd00:ec2::254/128'}]"), "p.yaml:6: cidr fd00:ec2::254/128 can never match: fd00:ec2::254/128 is always denied (metadata)"},
		{"link-local", allowTo("[{cidr: 169.254.0.0/20}]"), "p.yaml:6: cidr 169.254.0.0/20 can never match: 169.254.0.0/16 is always denied (link_local)"},
		{"v6 link-local", allowTo("[{cidr: 'fe80::/10'}]"), "p.yaml:6: cidr fe80::/10 can never match: fe80::/10 is always denied (link_local)"},
		{"loopback", allowTo("[{cidr: 127.0.0.1/32}]"), "p.yaml:6: cidr 127.0.0.1/32 can never match: 127.0.0.0/8 is always denied (loopback)"},
		{"v6 loopback", allowTo("[{cidr: '::1/128'}]"), "p.yaml:6: cidr ::1/128 can never match: ::1/128 is always denied (loopback)"},
		{"multicast", allowTo("[{cidr: 224.0.0.0/4}]"), "p.yaml:6: cidr 224.0.0.0/4 can never match: 224.0.0.0/4 is always denied (multicast)"},
		{"v6 multicast", allowTo("[{cidr: 'ff02::1/128'}]"), "p.yaml:6: cidr ff02::1/128 can never match: ff00::/8 is always denied (multicast)"},

		{"no ports", rule("action: allow", "to: [{cidr: 192.0.2.0/24}]"), `p.yaml:4: rule "web" has no ports: list them, as in [443/tcp], or write [any/tcp]`},
		{"empty ports", allowPorts("[]"), `p.yaml:7: ports of rule "web" is empty: list at least one, as in [443/tcp]`},
		{"empty ports of a deny rule", rule("action: deny", "to: [{cidr: 192.0.2.0/24}]", "ports: []"), `p.yaml:7: ports of rule "web" is empty: list at least one, as in [443/tcp]`},
		{"null ports of a deny rule", rule("action: deny", "to: [{cidr: 192.0.2.0/24}]", "ports:"), `p.yaml:7: ports of rule "web" must be a list, not empty`},
		{"ports is text", allowPorts("443/tcp"), `p.yaml:7: ports of rule "web" must be a list, not "443/tcp"`},
		{"no protocol", allowPorts("[443]"), `p.yaml:7: port "443" of rule "web": has no protocol, write 443/tcp or 443/udp`},
		{"word", allowPorts("[https]"), `p.yaml:7: port "https" of rule "web": write one like 443/tcp, 8000-8010/tcp or any/udp`},
		{"service name", allowPorts("[https/tcp]"), `p.yaml:7: port "https/tcp" of rule "web": "https" is not a port number, write a number, a range like 8000-8010, or any`},
		{"protocol", allowPorts("[443/sctp]"), `p.yaml:7: port "443/sctp" of rule "web": unknown protocol "sctp": did you mean "tcp"?`},
		{"upper case", allowPorts("[443/TCP]"), `p.yaml:7: port "443/TCP" of rule "web": unknown protocol "TCP": did you mean "tcp"?`},
		{"port 0", allowPorts("[0/tcp]"), `p.yaml:7: port "0/tcp" of rule "web": ports are 1 to 65535`},
		{"range from 0", allowPorts("[0-10/tcp]"), `p.yaml:7: port "0-10/tcp" of rule "web": ports are 1 to 65535`},
		{"port too large", allowPorts("[65536/udp]"), `p.yaml:7: port "65536/udp" of rule "web": ports are 1 to 65535`},
		{"backwards", allowPorts("[20-10/tcp]"), `p.yaml:7: port "20-10/tcp" of rule "web": is backwards, write 10-20/tcp`},
		{"open range", allowPorts("[10-/tcp]"), `p.yaml:7: port "10-/tcp" of rule "web": "" is not a port number, write a number, a range like 8000-8010, or any`},
		{"sign", allowPorts("[+1/tcp]"), `p.yaml:7: port "+1/tcp" of rule "web": "+1" is not a port number, write a number, a range like 8000-8010, or any`},
		{"leading zero", allowPorts("[080/tcp]"), `p.yaml:7: port "080/tcp" of rule "web": "080" has leading zeros`},
		{"too many ranges", allowPorts("[" + manyPorts(33) + "]"), `p.yaml:7: rule "web" has 33 separate port ranges, at most 32 are allowed: join some`},

		{"guardrail null", "kind: EgressPolicy\nname: p\nrules: []\nguardrail:\n", "p.yaml:4: guardrail must be a list, not empty"},
		{"guardrail without ports", "kind: EgressPolicy\nname: p\nrules: []\nguardrail:\n- to: [{cidr: 192.0.2.0/24}]\n",
			"p.yaml:5: guardrail bound 1 has no ports: list them, as in [443/tcp], or write [any/tcp, any/udp]"},
		{"guardrail without to", "kind: EgressPolicy\nname: p\nrules: []\nguardrail:\n- ports: [any/tcp]\n",
			"p.yaml:5: guardrail bound 1 has no to: list where it leads, as in [{fqdn: api.example.com}] or [{cidr: 10.20.0.0/16}]"},
		{"guardrail key", "kind: EgressPolicy\nname: p\nrules: []\nguardrail:\n- {name: x, to: [{cidr: 192.0.2.0/24}], ports: [any/tcp]}\n",
			`p.yaml:5: unknown key "name" in guardrail bound 1: known are to, ports`},

		{"several, in order", rule("action: allow", "to: [{cidr: 10.0.0.1/8}]", "ports: [0/tcp]", "prio: 1"),
			"p.yaml:6: cidr 10.0.0.1/8 has host bits set: write 10.0.0.0/8, or 10.0.0.1/32 for the one address\n" +
				"p.yaml:7: port \"0/tcp\" of rule \"web\": ports are 1 to 65535\n" +
				"p.yaml:8: unknown key \"prio\" in rule \"web\": known are name, action, to, ports, rate"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Parse("p.yaml", []byte(tt.in))
			if err == nil {
				t.Fatalf("got no error, want %s", tt.want)
			}
			if diff := cmp.Diff(tt.want, err.Error()); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
			var e *Error
			if !errors.As(err, &e) || e.File != "p.yaml" {
				t.Errorf("got %#v, want an *Error of p.yaml", err)
			}
		})
	}
}

// manyPorts is n ports that cannot be joined.
func manyPorts(n int) string {
	var ports []string
	for i := range n {
		ports = append(ports, PortRange{uint16(1000 + 2*i), uint16(1000 + 2*i), TCP}.String())
	}
	return strings.Join(ports, ", ")
}

func TestParseCountsErrorsItDoesNotList(t *testing.T) {
	_, err := Parse("p.yaml", []byte("kind: EgressPolicy\nname: p\nrules:\n"+strings.Repeat("- x\n", 50)))
	lines := strings.Split(err.Error(), "\n")
	if got, want := len(lines), maxErrors+1; got != want {
		t.Errorf("got %d lines, want %d", got, want)
	}
	if got, want := lines[len(lines)-1], "p.yaml: and 30 more errors"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestParseShowsLittleOfALongValue(t *testing.T) {
	_, err := Parse("p.yaml", []byte("kind: EgressPolicy\nname: p\nrules: []\n"+strings.Repeat("k", 100000)+": 1\n"))
	if got := len(err.Error()); got > 300 {
		t.Errorf("got an error of %d bytes, want at most 300", got)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(full))
	f.Add([]byte(allowTo("[{cidr: 10.0.0.0/8, except: [10.1.0.0/16]}]")))
	f.Add([]byte(allowPorts("[any/tcp, 1-2/udp]")))
	f.Add([]byte("kind: EgressPolicy\nname: p\nrules: []\nguardrail: []\n"))
	f.Add([]byte(allowTo(`[{fqdn: "**.a.example.com", allow_private: true}, {fqdn: b.example.com}]`) + "mode: audit\nrate: {sandbox: 8kbit}\n"))
	f.Add([]byte(allowPorts("[echo/icmp]") + "budget: {egress: 1TiB, per: hour, then: block}\n"))
	f.Add([]byte("a: &a [*a]\n"))
	f.Add([]byte("? {a: b}\n: c\n--- |\n x\n...\n"))
	f.Add([]byte("\xff\xfek\x00:\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := Parse("p.yaml", data)
		if err != nil {
			var e *Error
			if !errors.As(err, &e) {
				t.Fatalf("got %T, want an *Error: %v", err, err)
			}
			return
		}
		// What Parse accepts, Compile understands; only the size of a
		// decision may still be too much.
		layers := []Layer{{Tenant: "acme", Policy: p}}
		prog, err := Compile(layers)
		if err != nil {
			if !strings.Contains(err.Error(), "port ranges") {
				t.Fatalf("compile: %v", err)
			}
			return
		}
		checkProgram(t, layers, prog)
	})
}
