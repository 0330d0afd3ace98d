// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	mdns "github.com/miekg/dns"
)

func TestAnswers(t *testing.T) {
	z := newZone(
		"www.example.com. 60 A 93.184.216.34",
		"www.example.com. 60 A 93.184.216.35",
		"www.example.com. 60 AAAA 2600:1406::1",
		"a.cdn.example.com. 60 CNAME b.elsewhere.net.",
		"b.elsewhere.net. 60 CNAME c.elsewhere.net.",
		"c.elsewhere.net. 60 A 93.184.216.36",
		"loop.cdn.example.com. 60 CNAME loop2.example.net.",
		"loop2.example.net. 60 CNAME loop.cdn.example.com.",
		"meta.cdn.example.com. 60 A 169.254.169.254",
		"home.cdn.example.com. 60 A 10.0.0.1",
		"mixed.cdn.example.com. 60 A 10.0.0.1",
		"mixed.cdn.example.com. 60 A 93.184.216.37",
		"mapped.cdn.example.com. 60 AAAA ::ffff:93.184.216.34",
		"inner.example.com. 60 A 10.0.0.2",
		"inner.example.com. 60 A 127.0.0.1",
		"bad.cdn.example.com. 60 A 93.184.216.38",
		"other.example.org. 60 A 93.184.216.39",
		"odd.cdn.example.com. 60 CNAME a\\032b.example.net.",
	)
	for _, c := range []struct {
		name, want, learned, outcome string
		qtype                        uint16
	}{
		{name: "www.example.com", want: "NOERROR 93.184.216.34 93.184.216.35", learned: "93.184.216.34 93.184.216.35", outcome: OutcomeAnswered},
		{name: "WwW.eXample.com", want: "NOERROR 93.184.216.34 93.184.216.35", learned: "93.184.216.34 93.184.216.35", outcome: OutcomeAnswered},
		{name: "www.example.com", qtype: mdns.TypeAAAA, want: "NOERROR 2600:1406::1", learned: "2600:1406::1", outcome: OutcomeAnswered},
		{name: "a.cdn.example.com", want: "NOERROR ->b.elsewhere.net ->c.elsewhere.net 93.184.216.36", learned: "93.184.216.36", outcome: OutcomeAnswered},
		{name: "a.cdn.example.com", qtype: mdns.TypeCNAME, want: "NOERROR ->b.elsewhere.net", outcome: OutcomeAnswered},
		{name: "a.cdn.example.com", qtype: mdns.TypeAAAA, want: "NOERROR ->b.elsewhere.net ->c.elsewhere.net", outcome: OutcomeAnswered},
		{name: "none.cdn.example.com", want: "NXDOMAIN", outcome: OutcomeAnswered},
		{name: "loop.cdn.example.com", want: "SERVFAIL (22 upstream: too many aliases)", outcome: OutcomeUpstream},
		{name: "odd.cdn.example.com", want: "SERVFAIL (22 upstream: odd.cdn.example.com is an alias for \"a\\\\032b.example.net\", which is no host name)", outcome: OutcomeUpstream},
		{name: "meta.cdn.example.com", want: "REFUSED (17 answers only private addresses)", outcome: OutcomeStripped},
		{name: "home.cdn.example.com", want: "REFUSED (17 answers only private addresses)", outcome: OutcomeStripped},
		{name: "mapped.cdn.example.com", qtype: mdns.TypeAAAA, want: "REFUSED (17 answers only private addresses)", outcome: OutcomeStripped},
		{name: "mixed.cdn.example.com", want: "NOERROR 93.184.216.37", learned: "93.184.216.37", outcome: OutcomeAnswered},
		{name: "inner.example.com", want: "NOERROR 10.0.0.2", learned: "10.0.0.2", outcome: OutcomeAnswered},
		{name: "bad.cdn.example.com", want: "REFUSED (17 rule bad of acme denies the name)", outcome: OutcomeDenied},
		{name: "other.example.org", want: "REFUSED (18 no rule allows the name)", outcome: OutcomeNoRule},
		{name: "x.a.cdn.example.com", want: "REFUSED (18 no rule allows the name)", outcome: OutcomeNoRule},
	} {
		t.Run(fmt.Sprint(c.name, c.qtype), func(t *testing.T) {
			r := newRig(t, compile(t, webRules), z, nil)
			if c.qtype == 0 {
				c.qtype = mdns.TypeA
			}
			m := r.ask(c.name, c.qtype)
			if got := told(m); got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
			if len(m.Answer) > 0 && m.Answer[0].Header().Name != c.name+"." {
				t.Errorf("answer about %s, want it as asked, %s", m.Answer[0].Header().Name, c.name)
			}
			if got := strings.Join(r.tb.has(), " "); got != c.learned {
				t.Errorf("learned %q, want %q", got, c.learned)
			}
			if got := r.outcomes(); !slices.Equal(got, []string{c.outcome}) {
				t.Errorf("events %v, want %s", got, c.outcome)
			}
			if n := r.sb.n.of(c.outcome).Load(); n != 1 {
				t.Errorf("counted %d times as %s, want once", n, c.outcome)
			}
			r.consistent()
		})
	}
}

// What no rule allows, and what nobody asks of a resolver, must not leave the
// node.
func TestRefusedBeforeForwarded(t *testing.T) {
	long := strings.Repeat("a", 63)
	z := newZone("www.example.com. 60 A 93.184.216.34")
	r := newRig(t, compile(t, webRules), z, func(c *Config) { c.WildcardLabel = 20 })
	question := func(name string, qtype uint16) *mdns.Msg {
		m := new(mdns.Msg)
		m.SetQuestion(name, qtype)
		m.SetEdns0(1232, false)
		return m
	}
	edit := func(f func(m *mdns.Msg)) *mdns.Msg { m := question("www.example.com.", mdns.TypeA); f(m); return m }
	for name, c := range map[string]struct {
		m       *mdns.Msg
		want    string
		outcome string
	}{
		"any":     {question("www.example.com.", mdns.TypeANY), "REFUSED (17 records of type ANY are not answered)", OutcomeType},
		"null":    {question("www.example.com.", mdns.TypeNULL), "REFUSED (17 records of type NULL are not answered)", OutcomeType},
		"txt":     {question("www.example.com.", mdns.TypeTXT), "REFUSED (17 records of type TXT are not answered)", OutcomeType},
		"mx":      {question("www.example.com.", mdns.TypeMX), "REFUSED (17 records of type MX are not answered)", OutcomeType},
		"unknown": {question("www.example.com.", 65399), "REFUSED (17 records of type TYPE65399 are not answered)", OutcomeType},
		"class":   {edit(func(m *mdns.Msg) { m.Question[0].Qclass = mdns.ClassCHAOS }), "REFUSED (17 class CH is not answered)", OutcomeType},
		"root":    {question(".", mdns.TypeA), "", OutcomeName},
		"space":   {question("a\\032b.cdn.example.com.", mdns.TypeA), "", OutcomeName},
		"dot":     {question("a\\.b.cdn.example.com.", mdns.TypeA), "", OutcomeName},
		"utf-8":   {question("b\\195\\188.cdn.example.com.", mdns.TypeA), "", OutcomeName},
		"labels":  {question(strings.Repeat("a.", 16)+"example.com.", mdns.TypeA), "", OutcomeName},
		"label":   {question(long+".cdn.example.com.", mdns.TypeA), "REFUSED (18 a label of 63 characters, 20 are allowed under a wildcard)", OutcomeTunnel},
		"no rule": {question("www.example.org.", mdns.TypeA), "REFUSED (18 no rule allows the name)", OutcomeNoRule},
		"deny":    {question("bad.cdn.example.com.", mdns.TypeHTTPS), "REFUSED (17 rule bad of acme denies the name)", OutcomeDenied},
		"notify":  {edit(func(m *mdns.Msg) { m.Opcode = mdns.OpcodeNotify }), "NOTIMP", OutcomeMalformed},
		"update":  {edit(func(m *mdns.Msg) { m.Opcode = mdns.OpcodeUpdate }), "NOTIMP", OutcomeMalformed},
		"two":     {edit(func(m *mdns.Msg) { m.Question = append(m.Question, m.Question[0]) }), "FORMERR", OutcomeMalformed},
		"none":    {edit(func(m *mdns.Msg) { m.Question = nil }), "FORMERR", OutcomeMalformed},
		"with answer": {edit(func(m *mdns.Msg) {
			m.Answer = append(m.Answer, &mdns.A{Hdr: mdns.RR_Header{Name: "x.", Rrtype: 1, Class: 1}})
		}), "FORMERR", OutcomeMalformed},
		"edns 1": {edit(func(m *mdns.Msg) { m.IsEdns0().SetVersion(1) }), "BADSIG", OutcomeMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			before := r.sb.n.of(c.outcome).Load()
			m := r.send(c.m)
			if got := told(m); c.want != "" && got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
			if m == nil || m.Rcode == mdns.RcodeSuccess || len(m.Answer) > 0 {
				t.Errorf("answered: %v", m)
			}
			if got := r.sb.n.of(c.outcome).Load(); got != before+1 {
				t.Errorf("counted %d as %s, want 1", got-before, c.outcome)
			}
		})
	}
	raw, _ := question("www.example.com.", mdns.TypeA).Pack()
	for name, b := range map[string][]byte{
		"empty": nil, "short": raw[:11], "an answer": append([]byte{raw[0], raw[1], raw[2] | 0x80}, raw[3:]...),
	} {
		if out := r.sb.handle(b, true); out != nil {
			t.Errorf("%s: answered", name)
		}
	}
	if out := r.sb.handle(append(raw, make([]byte, maxQuery)...), true); len(out) < 12 || out[3]&0xf != mdns.RcodeFormatError {
		t.Errorf("too long: got %x, want FORMERR", out)
	}
	if n := z.asked.Load(); n != 0 {
		t.Errorf("the upstream was asked %d times", n)
	}
}

// The record of a service must not lead round the resolver.
func TestServiceRecords(t *testing.T) {
	z := newZone(
		`www.example.com. 300 HTTPS 1 . alpn="h2,h3" ipv4hint=10.0.0.1 ipv6hint=2001:db8::1 ech="AEX+DQA=" port=8443`,
		`www.example.com. 300 HTTPS 2 a.cdn.example.com. alpn="h2"`,
		`www.example.com. 300 HTTPS 3 outside.example.org. alpn="h2"`,
		`www.example.com. 300 HTTPS 4 . mandatory=ipv4hint ipv4hint=10.0.0.1`,
		`www.example.com. 300 HTTPS 5 . mandatory=alpn alpn="h2"`,
		`www.example.com. 300 HTTPS 6 bad.cdn.example.com. alpn="h2"`,
		`www.example.com. 300 HTTPS 7 . key65400="secret"`,
	)
	r := newRig(t, compile(t, webRules), z, nil)
	m := r.ask("www.example.com", mdns.TypeHTTPS)
	want := `NOERROR 1 . alpn="h2,h3" port="8443" 2 a.cdn.example.com. alpn="h2" 5 . mandatory="alpn" alpn="h2" 7 .`
	if got := told(m); got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
	if got := r.tb.has(); len(got) != 0 {
		t.Errorf("learned %v of hints", got)
	}
	raw, _ := m.Pack()
	for _, hint := range [][]byte{{10, 0, 0, 1}, []byte("secret")} {
		if strings.Contains(string(raw), string(hint)) {
			t.Errorf("%q is in the answer", hint)
		}
	}
}

// Records that the chain from the question does not lead to are neither
// learned nor released.
func TestBailiwick(t *testing.T) {
	r := newRig(t, compile(t, webRules), nil, nil)
	r.srv.up = replier(func(name string, qtype uint16) *mdns.Msg {
		m := new(mdns.Msg)
		m.SetQuestion(mdns.Fqdn(name), qtype)
		for _, text := range []string{
			"www.example.com. 60 A 93.184.216.34", "evil.example.org. 60 A 93.184.216.66",
			"www.example.com. 60 CH A 93.184.216.67", "inner.example.com. 60 A 93.184.216.68",
			"www.example.com. 60 TXT \"x\"",
		} {
			rr, err := mdns.NewRR(text)
			if err == nil {
				m.Answer = append(m.Answer, rr)
			}
		}
		m.Extra = append(m.Extra, &mdns.A{Hdr: mdns.RR_Header{Name: "www.example.com.", Rrtype: mdns.TypeA, Class: 1}, A: []byte{93, 184, 216, 69}})
		return m
	})
	if got := told(r.ask("www.example.com", mdns.TypeA)); got != "NOERROR 93.184.216.34" {
		t.Errorf("got %s", got)
	}
	if got := strings.Join(r.tb.has(), " "); got != "93.184.216.34" {
		t.Errorf("learned %s", got)
	}
}

// An alias whose target the upstream leaves to us is asked for, not for ever.
func TestFollowsAliases(t *testing.T) {
	r := newRig(t, compile(t, webRules), nil, nil)
	asked := 0
	r.srv.up = replier(func(name string, qtype uint16) *mdns.Msg {
		asked++
		m := new(mdns.Msg)
		m.SetQuestion(mdns.Fqdn(name), qtype)
		n := 0
		fmt.Sscanf(name, "n%d.", &n)
		if n == 4 {
			rr, _ := mdns.NewRR(name + ". 5 A 93.184.216.34")
			m.Answer = append(m.Answer, rr)
			return m
		}
		rr, _ := mdns.NewRR(fmt.Sprintf("%s. 60 CNAME n%d.example.net.", name, n+1))
		m.Answer = append(m.Answer, rr)
		return m
	})
	m := r.ask("www.example.com", mdns.TypeA)
	if got := told(m); got != "NOERROR ->n1.example.net ->n2.example.net ->n3.example.net ->n4.example.net 93.184.216.34" || asked != 5 {
		t.Errorf("got %s after %d questions", got, asked)
	}
	for _, rr := range m.Answer {
		if rr.Header().Ttl != 5 {
			t.Errorf("%s: want the least TTL of the chain, 5", rr)
		}
	}
	asked = 0
	r.srv.up = replier(func(name string, qtype uint16) *mdns.Msg {
		asked++
		m := new(mdns.Msg)
		m.SetQuestion(mdns.Fqdn(name), qtype)
		rr, _ := mdns.NewRR(fmt.Sprintf("%s. 60 CNAME x%d.example.net.", name, asked))
		m.Answer = append(m.Answer, rr)
		return m
	})
	if m := r.ask("www.example.com", mdns.TypeA); m.Rcode != mdns.RcodeServerFailure || asked > maxHops {
		t.Errorf("endless aliases: %s after %d questions", told(m), asked)
	}
}

func TestTTL(t *testing.T) {
	for _, c := range []struct {
		ttl, want uint32
		life      time.Duration
	}{
		{0, 1, 30 * time.Second}, {5, 5, 30 * time.Second}, {30, 30, 30 * time.Second},
		{300, 300, 300 * time.Second}, {3600, 3600, time.Hour}, {86400, 3600, time.Hour}, {1<<31 - 1, 3600, time.Hour},
	} {
		r := newRig(t, compile(t, webRules), newZone(fmt.Sprintf("www.example.com. %d A 93.184.216.34", c.ttl)), nil)
		before := time.Now()
		m := r.ask("www.example.com", mdns.TypeA)
		after := time.Now()
		if got := m.Answer[0].Header().Ttl; got != c.want {
			t.Errorf("TTL %d: client is told %d, want %d", c.ttl, got, c.want)
		}
		ends := r.srv.Names(testID)[0].Expires
		if ends.Before(before.Add(c.life)) || ends.After(after.Add(c.life+releaseSlack)) {
			t.Errorf("TTL %d: lease of %s, want %s", c.ttl, ends.Sub(before), c.life)
		}
	}
}

func TestTruncatedForClient(t *testing.T) {
	var records []string
	for i := range 200 {
		records = append(records, fmt.Sprintf("www.example.com. 60 A 93.184.217.%d", i))
	}
	r := newRig(t, compile(t, webRules), newZone(records...), nil)
	for _, size := range []uint16{0, 100, 512, 1232, 65000} {
		q := new(mdns.Msg)
		q.SetQuestion("www.example.com.", mdns.TypeA)
		if size > 0 {
			q.SetEdns0(size, false)
		}
		raw, _ := q.Pack()
		out := r.sb.handle(raw, true)
		most := int(min(max(size, 512), ednsSize))
		if len(out) > most || len(out) < most-40 || out[2]&2 == 0 {
			t.Errorf("size %d: %d bytes, truncated %v", size, len(out), out[2]&2 != 0)
		}
		if n := binary.BigEndian.Uint16(out[10:]); (size > 0) != (n == 1) {
			t.Errorf("size %d: %d additional records", size, n)
		}
	}
	if m := r.ask("www.example.com", mdns.TypeA); len(m.Answer) != 200 || m.Truncated {
		t.Errorf("by TCP: %d records", len(m.Answer))
	}
}

func TestAudit(t *testing.T) {
	z := newZone("other.example.org. 60 A 93.184.216.39", "www.example.com. 60 A 93.184.216.34", "bad.cdn.example.com. 60 A 93.184.216.35",
		"meta.example.org. 60 A 169.254.169.254")
	p := compileAll(t, "rules:"+webRules+"mode: audit\n")
	r := newRig(t, p, z, nil)
	for _, c := range []struct{ name, want, outcome string }{
		{"www.example.com", "NOERROR 93.184.216.34", OutcomeAnswered},
		{"other.example.org", "NOERROR 93.184.216.39", OutcomeAudit},
		{"bad.cdn.example.com", "NOERROR 93.184.216.35", OutcomeAudit},
		{"meta.example.org", "REFUSED (17 answers only private addresses)", OutcomeStripped},
	} {
		if got := told(r.ask(c.name, mdns.TypeA)); got != c.want {
			t.Errorf("%s: got %s, want %s", c.name, got, c.want)
		}
		if got := r.outcomes(); got[len(got)-1] != c.outcome {
			t.Errorf("%s: event %v, want %s", c.name, got, c.outcome)
		}
	}
	if slices.Contains(r.tb.has(), "93.184.216.39") {
		t.Errorf("learned what is for audit alone: %v", r.tb.has())
	}
	if s := r.srv.Stats(testID); s.Audited != 2 || s.Answered != 1 {
		t.Errorf("stats %+v", s)
	}
	r.consistent()
}
