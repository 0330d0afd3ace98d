// SPDX-License-Identifier: Apache-2.0

package netpol

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParsePattern(t *testing.T) {
	long := strings.Repeat("a", 63)
	for _, tt := range []struct{ in, want string }{
		{"api.example.com", "api.example.com"},
		{"API.Example.COM.", "api.example.com"},
		{"*.models.example.com", "*.models.example.com"},
		{"**.example.com.", "**.example.com"},
		{"_dmarc.xn--bcher-kva.example", "_dmarc.xn--bcher-kva.example"},
		{"localhost", "localhost"},
		{"3com.example", "3com.example"},
		{long + ".example", long + ".example"},
		{strings.Repeat(long+".", 3) + strings.Repeat("b", 61), strings.Repeat(long+".", 3) + strings.Repeat("b", 61)},
	} {
		if got, err := ParsePattern(tt.in); got != tt.want || err != nil {
			t.Errorf("%q: got %q, %v, want %q", tt.in, got, err, tt.want)
		}
	}
	star := "has a * that is not a whole label in front: *.example.com stands for one label, **.example.com for one or more"
	for _, tt := range []struct{ in, want string }{
		{"", "is empty"},
		{".", "is empty"},
		{"*", "would match every name: write the domain behind it, as in *.example.com"},
		{"**.", "would match every name: write the domain behind it, as in *.example.com"},
		{"*.", "would match every name: write the domain behind it, as in *.example.com"},
		{"**..", "is empty"},
		{"example..com", "has an empty label (a dot at the start, or two together)"},
		{"example.com..", "has an empty label (a dot at the start, or two together)"},
		{".example.com", "has an empty label (a dot at the start, or two together)"},
		{"*.*.example.com", star},
		{"***.example.com", star},
		{"api-*.example.com", star},
		{"api.*.com", star},
		{"*example.com", star},
		{"-a.example.com", `has the label "-a", which begins or ends with -`},
		{"a-.example.com", `has the label "a-", which begins or ends with -`},
		{"bücher.example", "has the character 'ü': write the name in ASCII, its labels as xn--... (punycode)"},
		{"api example.com", "has the character ' ': a name is letters, digits, '-', '_' and dots"},
		{"https://example.com/", "has the character ':': a name is letters, digits, '-', '_' and dots"},
		{"example.com:443", "has the character ':': a name is letters, digits, '-', '_' and dots"},
		{"192.0.2.1", "is an address: use cidr"},
		{"2001:db8::1", "is an address: use cidr"},
		{long + "a.example", "has a label of 64 bytes, at most 63 are allowed"},
		{strings.Repeat(long+".", 3) + strings.Repeat("b", 62), "is 254 bytes long, at most 253 are allowed"},
		{"*." + strings.Repeat(long+".", 3) + strings.Repeat("b", 60), "is 254 bytes long, at most 253 are allowed"},
	} {
		got, err := ParsePattern(tt.in)
		if err == nil || err.Error() != tt.want {
			t.Errorf("%q: got %q, %v, want the error %s", tt.in, got, err, tt.want)
		}
	}
}

func TestMatchName(t *testing.T) {
	for _, tt := range []struct {
		pattern string
		yes, no []string
	}{
		{"a.example.com", []string{"a.example.com"}, []string{"example.com", "b.a.example.com", "xa.example.com", ""}},
		{"*.example.com", []string{"a.example.com"}, []string{"example.com", "b.a.example.com", ".example.com", "aexample.com", "a.example.com.evil.test"}},
		{"**.example.com", []string{"a.example.com", "b.a.example.com"}, []string{"example.com", ".example.com", "aexample.com", "example.com.evil.test"}},
	} {
		for _, name := range tt.yes {
			if !MatchName(tt.pattern, name) {
				t.Errorf("%s does not match %s", tt.pattern, name)
			}
		}
		for _, name := range tt.no {
			if MatchName(tt.pattern, name) {
				t.Errorf("%s matches %s", tt.pattern, name)
			}
		}
	}
}

// A pattern covers another exactly if it matches all that the other matches:
// checked on all names of a small alphabet.
func TestPatternCovers(t *testing.T) {
	var names []string
	level := []string{"a", "b"}
	for range 4 {
		names = append(names, level...)
		var next []string
		for _, n := range level {
			next = append(next, "a."+n, "b."+n)
		}
		level = next
	}
	var patterns []string
	for _, rest := range []string{"a", "b.a", "a.a", "a.b.a"} {
		patterns = append(patterns, rest, "*."+rest, "**."+rest)
	}
	covered := 0
	for _, a := range patterns {
		for _, b := range patterns {
			want := !slices.ContainsFunc(names, func(n string) bool { return MatchName(b, n) && !MatchName(a, n) })
			// "*.x" does match all four labels that "**.x" does where the
			// alphabet ends; longer names tell them apart.
			want = want && (!strings.HasPrefix(b, "**") || strings.HasPrefix(a, "**"))
			if got := patternCovers(a, b); got != want {
				t.Errorf("%s covers %s: got %v, want %v", a, b, got, want)
			}
			if got := slices.Contains(widerPatterns(b), a); got != want {
				t.Errorf("%s is listed as wider than %s: got %v, want %v", a, b, got, want)
			}
			if want {
				covered++
			}
		}
	}
	if covered <= len(patterns) {
		t.Errorf("only %d pairs are covered", covered)
	}
}

func TestSpecialUseAndPrivate(t *testing.T) {
	for addr, want := range map[string]string{
		"203.0.113.10": "", "2001:db8:113::10": "", "8.8.8.8": "", "2606:4700::1111": "", "100.63.255.255": "", "100.128.0.0": "", "172.32.0.1": "",
		"64:ff9b::808:808": "", "2002:808:808::1": "",
		"10.0.0.1": "private", "172.16.0.1": "private", "172.31.255.255": "private", "192.168.1.1": "private", "100.64.0.1": "private",
		"198.18.0.1": "private", "198.19.255.255": "private", "fd00::1": "private", "fec0::1": "private", "64:ff9b:1::1": "private",
		"64:ff9b::10.0.0.1": "private", "2002:a00:1::": "private", "2002:c0a8:101::5": "private",
		"127.0.0.1": "special", "169.254.169.254": "special", "168.63.129.16": "special", "100.100.100.200": "special", "0.0.0.0": "special",
		"224.0.0.1": "special", "255.255.255.255": "special", "240.0.0.1": "special", "192.0.0.8": "special", "192.88.99.1": "special",
		"::": "special", "::1": "special", "::10.0.0.1": "special", "::ffff:203.0.113.10": "special", "::ffff:0:10.0.0.1": "special",
		"fe80::1": "special", "ff02::1": "special", "fd00:ec2::254": "special", "100::1": "special", "2001::1": "special",
		"64:ff9b::169.254.169.254": "special", "2002:7f00:1::": "special",
	} {
		a := netip.MustParseAddr(addr)
		got := ""
		switch {
		case SpecialUse(a):
			got = "special"
		case PrivateAddr(a):
			got = "private"
		}
		if got != want {
			t.Errorf("%s: got %q, want %q", addr, got, want)
		}
	}
	if !SpecialUse(netip.Addr{}) || !SpecialUse(netip.MustParseAddr("fe80::1%eth0")) {
		t.Error("no address and one with a zone are not special")
	}
}

const named = `
rules:
- {name: api, action: allow, to: [{fqdn: api.example.com}, {fqdn: "*.models.example.com"}], ports: [443/tcp]}
- {name: all, action: allow, to: [{fqdn: "**.example.com", allow_private: true}], ports: [443/tcp, 80/tcp, echo/icmp]}
- {name: ads, action: deny, to: [{fqdn: "**.ads.example.com"}]}
- {name: net, action: allow, to: [{cidr: 203.0.113.0/24}], ports: [80/tcp]}
- {name: mail, action: deny, to: [{cidr: 0.0.0.0/0}], ports: [25/tcp]}
`

func TestName(t *testing.T) {
	p := compile(t, layer(t, "acme", named))
	for _, tt := range []struct {
		name string
		want NameVerdict
	}{
		{"api.example.com", NameVerdict{Allowed: true, AllowPrivate: true, Rules: []int{0, 1}, Reason: ReasonAllowed}},
		{"a.models.example.com", NameVerdict{Allowed: true, AllowPrivate: true, Rules: []int{0, 1}, Reason: ReasonAllowed}},
		{"b.a.models.example.com", NameVerdict{Allowed: true, AllowPrivate: true, Rule: 1, Rules: []int{1}, Reason: ReasonAllowed}},
		{"x.ads.example.com", NameVerdict{Rule: 2, Reason: ReasonDenied}},
		{"ads.example.com", NameVerdict{Allowed: true, AllowPrivate: true, Rule: 1, Rules: []int{1}, Reason: ReasonAllowed}},
		{"example.com", NameVerdict{Rule: -1, Reason: ReasonNoRule}},
		{"example.org", NameVerdict{Rule: -1, Reason: ReasonNoRule}},
	} {
		if diff := cmp.Diff(tt.want, p.Name(tt.name)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
	if got := (Program{}).Name("example.com"); got.Allowed || got.Audit {
		t.Errorf("the zero program answers %+v", got)
	}
}

func TestLearn(t *testing.T) {
	p := compile(t, layer(t, "acme", named))
	https, web, echo := PortRule{443, 443, TCP, false, false, 0}, PortRule{80, 80, TCP, false, false, 1}, PortRule{8, 8, ICMP, false, false, 1}
	httpsAll := https
	httpsAll.Rule = 1
	for _, tt := range []struct {
		name, addr string
		want       []PortRule
	}{
		{"api.example.com", "198.51.100.1", []PortRule{https, echo, web}},
		{"api.example.com", "2001:db8::1", []PortRule{https, echo, web}},
		{"api.example.com", "10.0.0.1", []PortRule{echo, web, httpsAll}},
		{"x.example.com", "198.51.100.1", []PortRule{echo, web, httpsAll}},
		{"x.ads.example.com", "198.51.100.1", nil},
		{"example.org", "198.51.100.1", nil},
		{"api.example.com", "169.254.169.254", nil},
		{"api.example.com", "127.0.0.1", nil},
		{"api.example.com", "::ffff:203.0.113.1", nil},
	} {
		if diff := cmp.Diff(tt.want, p.Learn(tt.name, netip.MustParseAddr(tt.addr))); diff != "" {
			t.Errorf("%s at %s (-want +got):\n%s", tt.name, tt.addr, diff)
		}
	}
}

func TestEvaluateWithNames(t *testing.T) {
	p := compile(t, layer(t, "acme", named))
	for _, tt := range []struct {
		flow  Flow
		names []string
		want  Verdict
	}{
		{Flow{TCP, netip.MustParseAddr("198.51.100.1"), 443}, nil, Verdict{Reason: ReasonNoRule, Rule: -1}},
		{Flow{TCP, netip.MustParseAddr("198.51.100.1"), 443}, []string{"x.example.com"}, Verdict{true, ReasonAllowed, 1, ""}},
		{Flow{TCP, netip.MustParseAddr("198.51.100.1"), 443}, []string{"x.example.com", "api.example.com"}, Verdict{true, ReasonAllowed, 0, ""}},
		{Flow{ICMP, netip.MustParseAddr("198.51.100.1"), EchoPort}, []string{"x.example.com"}, Verdict{true, ReasonAllowed, 1, ""}},
		{Flow{UDP, netip.MustParseAddr("198.51.100.1"), 443}, []string{"x.example.com"}, Verdict{Reason: ReasonNoRule, Rule: -1}},
		// A rule of an address gets the hit, and its deny beats the name.
		{Flow{TCP, netip.MustParseAddr("203.0.113.1"), 80}, []string{"x.example.com"}, Verdict{true, ReasonAllowed, 3, ""}},
		{Flow{TCP, netip.MustParseAddr("203.0.113.1"), 443}, []string{"x.example.com"}, Verdict{true, ReasonAllowed, 1, ""}},
		{Flow{TCP, netip.MustParseAddr("198.51.100.1"), 25}, []string{"x.example.com"}, Verdict{Reason: ReasonDenied, Rule: 4}},
	} {
		if got := p.Evaluate(tt.flow, tt.names...); got != tt.want {
			t.Errorf("%+v with %q: got %+v, want %+v", tt.flow, tt.names, got, tt.want)
		}
	}
}

func TestMergeSteps(t *testing.T) {
	step := func(lo, hi, rule uint16) PortRule { return PortRule{Lo: lo, Hi: hi, Proto: TCP, Rule: rule} }
	audit := PortRule{Lo: 0, Hi: 65535, Proto: TCP, Audit: true, Rule: NoRule}
	got, err := MergeSteps([]PortRule{step(443, 443, 2), audit}, []PortRule{step(400, 500, 1), step(80, 80, 2)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]PortRule{step(400, 500, 1), step(80, 80, 2), audit}, got); diff != "" {
		t.Errorf("steps (-want +got):\n%s", diff)
	}
	var many []PortRule
	for i := range uint16(MaxLearnedSteps) {
		many = append(many, step(2*i, 2*i, 0))
	}
	if got, err := MergeSteps(many); err != nil || len(got) != MaxLearnedSteps {
		t.Errorf("got %d steps, %v", len(got), err)
	}
	want := "the names of an address take 17 port ranges to decide, at most 16 fit: join port ranges or rules"
	if _, err := MergeSteps(many, []PortRule{step(9999, 9999, 1)}); err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestWithPublished(t *testing.T) {
	p := compile(t, layer(t, "acme", named))
	got, err := WithPublished(p, "acme", []PortRange{{80, 80, TCP}, {53, 53, UDP}})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]Published{{80, TCP, 5}, {53, UDP, 6}}, got.Published); diff != "" {
		t.Errorf("published (-want +got):\n%s", diff)
	}
	if got, want := got.Rules[5], (RuleRef{ID: 5, Tenant: "acme", Name: "published:80/tcp", Action: Allow}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if len(p.Rules) != 5 || len(p.Published) != 0 || got.Digest == p.Digest {
		t.Error("the program given was changed, or the new one has its digest")
	}
	for want, ports := range map[string][]PortRange{
		"publish 80-81/tcp: must be one port of tcp or udp":  {{80, 81, TCP}},
		"publish echo/icmp: must be one port of tcp or udp":  {echoPort},
		"publish 0/tcp: must be one port of tcp or udp":      {{0, 0, TCP}},
		"publish 80/tcp: is published twice":                 {{80, 80, TCP}, {80, 80, TCP}},
		"9 ports are to be published, at most 8 are allowed": make([]PortRange, 9),
	} {
		if _, err := WithPublished(p, "acme", ports); err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

func FuzzPattern(f *testing.F) {
	for _, s := range []string{"api.example.com", "**.example.com", "*.a_b.xn--c.", "192.0.2.1", "a..b", "*"} {
		f.Add(s, "x."+s)
	}
	f.Fuzz(func(t *testing.T, s, name string) {
		p, err := ParsePattern(s)
		if err != nil {
			return
		}
		if again, err := ParsePattern(p); err != nil || again != p {
			t.Fatalf("%q gives %q, which gives %q, %v", s, p, again, err)
		}
		if !patternCovers(p, p) {
			t.Fatalf("%q does not cover itself", p)
		}
		if MatchName(p, name) && patternCovers("**.example.com", p) && !strings.HasSuffix(name, ".example.com") {
			t.Fatalf("%q matches %q, though **.example.com covers it", p, name)
		}
	})
}

// FuzzQuantity holds that what is read is written again so that it reads alike.
func FuzzQuantity(f *testing.F) {
	for _, s := range []string{"8kbit", "2.5Gbit", "400Gbit", "1.5GiB", "0.5KiB", "1e3", "..", "9999999999999TiB"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if bits, err := ParseRate(s); err == nil {
			if again, err := ParseRate(FormatRate(bits)); err != nil || again != bits {
				t.Fatalf("%q is %d, written %s, read again as %d, %v", s, bits, FormatRate(bits), again, err)
			}
		}
		if n, err := ParseSize(s); err == nil {
			if again, err := ParseSize(FormatSize(uint64(n))); err != nil || again != n {
				t.Fatalf("%q is %d, written %s, read again as %d, %v", s, n, FormatSize(uint64(n)), again, err)
			}
		}
	})
}

// errText is what an error says, "" for none.
func errText(err error) string {
	if err == nil {
		return ""
	}
	var e *Error
	if !errors.As(err, &e) {
		return "not an *Error: " + err.Error()
	}
	return err.Error()
}
