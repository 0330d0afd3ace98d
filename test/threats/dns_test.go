// SPDX-License-Identifier: Apache-2.0

package threats

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	mdns "github.com/miekg/dns"

	"github.com/bulkheadhq/bulkhead/netpol/dns"
)

// The only resolver is the sandbox's own; a packet to another is a packet like
// any other.
func TestOtherResolver(t *testing.T) {
	n := theWorld(t)
	zone := records(map[string][]string{"a.example.": {"203.0.113.8"}, "evil.example.": {"203.0.113.7"}})
	theirs := newUpstream(t, n, other4, zone)
	ours := newUpstream(t, n, far4, zone)
	b, _ := n.resolve(t, ours, fqdn("a.example", ""), nil)
	if m := n.stranger(t, theirs, "evil.example", mdns.TypeA); len(m.Answer) != 1 {
		t.Fatalf("control: the stranger's name server answers %v", m)
	}
	query := func(server netip.Addr, port uint16) func(*box, token) [][]byte {
		q, err := new(mdns.Msg).SetQuestion("evil.example.", mdns.TypeA).Pack()
		must(t, err)
		return one(packet{dst: server, port: port, payload: q})
	}
	b.repel(t,
		attack{"DNS", "no_rule", query(other4, 53), false},
		attack{"the node's own upstream", "no_rule", query(far4, 53), false},
		attack{"IPv6", "no_rule", query(other6, 53), false},
		attack{"DNS over TCP", "no_rule", one(packet{dst: other4, port: 53, syn: true}), false},
		attack{"DNS over TLS", "no_rule", one(packet{dst: other4, port: 853, syn: true}), false},
		attack{"DNS over QUIC", "no_rule", query(other4, 853), false},
		attack{"DNS over HTTPS", "no_rule", one(packet{dst: other4, port: 443, syn: true}), false},
		attack{"multicast DNS", "multicast", query(netip.MustParseAddr("224.0.0.251"), 5353), true},
	)
	if got, code := b.lookup(t, "a.example", mdns.TypeA); code != "NOERROR" || !slices.Equal(got, []string{"203.0.113.8"}) {
		t.Errorf("the sandbox's own resolver: %v, %s", got, code)
	}
	if got := theirs.saw("example."); got != 2 { // the controls of this test
		t.Errorf("the stranger's name server was asked %d times, want 2", got)
	}
}

// Data in the labels of names. What no rule allows is refused before it is
// forwarded: the tunnel's server never sees it.
func TestDNSTunnel(t *testing.T) {
	n := theWorld(t)
	u := newUpstream(t, n, far4, func(q mdns.Question) []mdns.RR { return []mdns.RR{record(q.Name, "203.0.113.8")} })
	b, s := n.resolve(t, u, fqdn("*.allowed.example", "")+"- {name: deep, action: allow, to: [{fqdn: '**.deep.example'}], ports: [443/tcp]}\n",
		func(c *dns.Config) { c.NamesPerMinute, c.WildcardLabel = 50, 20 })
	chunk := func(i int) string { return fmt.Sprintf("%08x%024d", i, i) }
	for i := range 20 {
		n.stranger(t, u, chunk(i)+".evil.example", mdns.TypeA)
	}
	if got := u.saw(".evil.example."); got != 20 {
		t.Fatalf("control: the tunnel's server saw %d of 20 names", got)
	}
	for i := range 200 {
		if _, code := b.lookup(t, chunk(i)+".evil.example", mdns.TypeA); code != "REFUSED" {
			t.Fatalf("a name that no rule allows: %s", code)
		}
	}
	if got := u.saw(".evil.example."); got != 20 {
		t.Errorf("%d queries reached the tunnel's server", got-20)
	}
	// Types that carry more than addresses.
	for _, typ := range []uint16{mdns.TypeTXT, mdns.TypeNULL, mdns.TypeANY, mdns.TypeMX, mdns.TypeNS, mdns.TypeAXFR, 65399} {
		before := u.saw(".allowed.example.")
		m, err := b.ask(t, "tcp", dns.Address, "a.allowed.example", typ)
		if err == nil && len(m.Answer) != 0 || u.saw(".allowed.example.") != before {
			t.Errorf("type %s: %v, %v; forwarded %d", mdns.TypeToString[typ], m, err, u.saw(".allowed.example.")-before)
		}
	}
	// Under a wildcard the names are the sandbox's to choose: bounded.
	if _, code := b.lookup(t, strings.Repeat("x", 21)+".allowed.example", mdns.TypeA); code != "REFUSED" {
		t.Errorf("a long label under a wildcard: %s", code)
	}
	answered := 0
	for i := range 200 {
		if _, code := b.lookup(t, fmt.Sprintf("d%d.allowed.example", i), mdns.TypeA); code == "NOERROR" {
			answered++
		}
	}
	if answered == 0 || answered > 100 {
		t.Errorf("%d of 200 different names under a wildcard were answered, want about 50", answered)
	}
	if got := u.saw(".allowed.example."); got > answered+1 {
		t.Errorf("the server behind the wildcard saw %d names, answered %d", got, answered)
	}
	long := strings.Repeat("abcdefghij.", 20)
	if _, code := b.lookup(t, long+"deep.example", mdns.TypeA); code != "REFUSED" {
		t.Errorf("a name of %d bytes: %s", len(long)+12, code)
	}
	st := s.Stats(b.id)
	if st.NoRule != 200 || st.Type == 0 || st.Tunnel == 0 || st.ClientBytesIn == 0 {
		t.Errorf("not counted: %+v", st)
	}
}

// Only what the node's own upstream says about the name that was asked for
// opens an address.
func TestDNSPoisoning(t *testing.T) {
	n := theWorld(t)
	u := newUpstream(t, n, far4, func(q mdns.Question) []mdns.RR {
		if q.Qtype != mdns.TypeA {
			return []mdns.RR{}
		}
		// A second record of another name: out of bailiwick.
		return []mdns.RR{record(q.Name, "203.0.113.8"), record("bank.example.", other4.String())}
	})
	forge := func(m *mdns.Msg) []*mdns.Msg {
		wrongID, wrongName := m.Copy(), m.Copy()
		wrongID.Id++
		wrongID.Answer = []mdns.RR{record(m.Question[0].Name, other4.String())}
		wrongName.Question[0].Name = "other.example."
		wrongName.Answer = []mdns.RR{record("other.example.", other4.String())}
		return []*mdns.Msg{wrongID, wrongName}
	}
	b, s := n.resolve(t, u, fqdn("a.example", "")+strings.Replace(fqdn("bank.example", ""), "name: n", "name: bank", 1), nil)
	if m := n.stranger(t, u, "a.example", mdns.TypeA); len(m.Answer) != 2 {
		t.Fatalf("control: the answer does not hold the forged record: %v", m)
	}
	u.mu.Lock()
	u.first = forge
	u.mu.Unlock()
	got, code := b.lookup(t, "a.example", mdns.TypeA)
	if code != "NOERROR" || !slices.Equal(got, []string{"203.0.113.8"}) {
		t.Errorf("a.example: %v, %s", got, code)
	}
	b.repel(t, attack{"an address of a forged answer", "no_rule", one(packet{dst: other4, port: 443}), false})
	arrives(t, n, b, packet{dst: netip.MustParseAddr("203.0.113.8"), port: 443})
	if names := s.NamesOf(b.id, other4); len(names) != 0 {
		t.Errorf("%s was learned from %v", other4, names)
	}
	if st := s.Stats(b.id); st.Spoofed != 2 {
		t.Errorf("%d forged messages counted, want 2", st.Spoofed)
	}
	// What merely looks like an answer, on the sandbox's own link.
	m := new(mdns.Msg).SetQuestion("a.example.", mdns.TypeA)
	m.Response, m.Answer = true, []mdns.RR{record("a.example.", other4.String())}
	body, err := m.Pack()
	must(t, err)
	n.open.send(t, packet{dst: b.addr4, src: far4, l4: append([]byte{0, 53, 0xc3, 0x50, 0, byte(8 + len(body)), 0, 0}, body...), proto: protoUDP, badSum: true}.from(n.open))
	b.repel(t, attack{"after a sniffed answer", "no_rule", one(packet{dst: other4, port: 443}), false})
}

// An allowed name that resolves to where nobody may go.
func TestDNSRebinding(t *testing.T) {
	n := theWorld(t)
	special := []string{
		"169.254.169.254", "127.0.0.1", "127.0.0.53", "0.0.0.0", "169.254.0.17", "224.0.0.1", "255.255.255.255", "240.0.0.1",
		"100.100.100.200", "168.63.129.16", "::1", "::", "fe80::1", "ff02::1", "fd00:ec2::254", "::ffff:169.254.169.254",
	}
	private := []string{"10.20.0.5", "172.16.0.1", "192.168.1.1", "100.64.0.1", "fd12::1"}
	mine := []string{"100.96.0.1", "fd62:6b68::1", host4.String(), host6.String()}
	addrs := map[string]string{}
	zone := map[string][]string{}
	for i, a := range slices.Concat(special, private, mine) {
		name := fmt.Sprintf("r%d.rebind.example.", i)
		zone[name], addrs[a] = []string{a}, name
	}
	zone["mixed.rebind.example."] = []string{"203.0.113.8", "169.254.169.254", "10.20.0.5"}
	u := newUpstream(t, n, far4, records(zone))
	b, s := n.resolve(t, u, fqdn("*.rebind.example", ""), nil)
	open, _ := n.resolveMore(t, u, fqdn("*.rebind.example", ", allow_private: true"))

	typeOf := func(a string) uint16 {
		if strings.Contains(a, ":") {
			return mdns.TypeAAAA
		}
		return mdns.TypeA
	}
	for _, a := range slices.Concat(special, private) {
		m := n.stranger(t, u, addrs[a], typeOf(a))
		if len(m.Answer) != 1 {
			t.Errorf("control: %s does not resolve to %s: %v", addrs[a], a, m)
		}
		if got, code := b.lookup(t, addrs[a], typeOf(a)); len(got) != 0 {
			t.Errorf("%s was released: %v, %s", a, got, code)
		}
	}
	for _, a := range special {
		if got, _ := open.lookup(t, addrs[a], typeOf(a)); len(got) != 0 {
			t.Errorf("%s was released under allow_private: %v", a, got)
		}
	}
	for _, a := range private {
		if got, code := open.lookup(t, addrs[a], typeOf(a)); len(got) != 1 {
			t.Errorf("control: %s is not released under allow_private: %s", a, code)
		}
	}
	arrives(t, n, open, packet{dst: netip.MustParseAddr("10.20.0.5"), port: 443})
	b.repel(t, attack{"a private address", "no_rule", one(packet{dst: netip.MustParseAddr("10.20.0.5"), port: 443}), false})
	// The host's and the sandboxes' addresses may be released; they are denied
	// before any rule.
	for _, a := range mine {
		dst := netip.MustParseAddr(a)
		b.lookup(t, addrs[a], typeOf(a))
		reason := map[bool]string{true: "sandbox", false: "host"}[pool4.Contains(dst) || pool6.Contains(dst)]
		b.repel(t, attack{"a name for " + a, reason, one(packet{dst: dst, port: 443}), true})
	}
	if got, code := b.lookup(t, "mixed.rebind.example", mdns.TypeA); !slices.Equal(got, []string{"203.0.113.8"}) {
		t.Errorf("a mixed answer: %v, %s", got, code)
	}
	b.repel(t, attack{"metadata after a mixed answer", "metadata", one(packet{dst: metadata4, port: 80, syn: true}), false})
	if st := s.Stats(b.id); st.StrippedAddrs < uint64(len(special)+len(private)) {
		t.Errorf("%d addresses counted as stripped", st.StrippedAddrs)
	}
}

// resolveMore is resolve for a second sandbox of a test.
func (n *node) resolveMore(t testing.TB, u *upstream, rules string) (*box, *dns.Server) {
	t.Helper()
	return n.resolve(t, u, rules, func(c *dns.Config) { c.Dir += "2" })
}

// Names that share an address cannot be told apart by address. What a name
// rule gives is the address; the other name itself stays refused.
func TestSharedAddress(t *testing.T) {
	n := theWorld(t)
	u := newUpstream(t, n, far4, records(map[string][]string{"good.example.": {other4.String()}, "bad.example.": {other4.String()}}))
	b, _ := n.resolve(t, u, fqdn("good.example", ""), nil)
	web := attack{"before the name was asked for", "no_rule", one(packet{dst: other4, port: 443}), false}
	b.repel(t, web)
	if m := n.stranger(t, u, "bad.example", mdns.TypeA); len(m.Answer) != 1 {
		t.Fatalf("control: bad.example does not resolve: %v", m)
	}
	if got, code := b.lookup(t, "bad.example", mdns.TypeA); len(got) != 0 || code != "REFUSED" {
		t.Errorf("bad.example: %v, %s", got, code)
	}
	b.repel(t, web)
	if _, code := b.lookup(t, "good.example", mdns.TypeA); code != "NOERROR" {
		t.Errorf("good.example: %s", code)
	}
	// Whoever knows the address reaches bad.example's server too: documented.
	arrives(t, n, b, packet{dst: other4, port: 443})
	// Another sandbox knows nothing of it.
	other := n.sandbox(t, fqdn("good.example", ""))
	other.repel(t, web)
}

// A name with a new address in every answer.
func TestRotatingName(t *testing.T) {
	n := theWorld(t)
	const kept = 32
	next := 0
	u := newUpstream(t, n, far4, func(q mdns.Question) []mdns.RR {
		if q.Qtype != mdns.TypeA {
			return []mdns.RR{}
		}
		next++
		rr := record(q.Name, fmt.Sprintf("203.0.%d.%d", 112+next/250, 1+next%250))
		rr.Header().Ttl = 0
		return []mdns.RR{rr}
	})
	b, s := n.resolve(t, u, fqdn("r.example", ""), func(c *dns.Config) { c.AddrsPerName, c.AddrsPerSandbox = kept, 2*kept })
	first, code := b.lookup(t, "r.example", mdns.TypeA)
	if code != "NOERROR" {
		t.Fatalf("r.example: %s", code)
	}
	live := netip.MustParseAddr(first[0])
	must(t, in(n.far, func() error { return address("lo", live.String()+"/32") }))
	arrives(t, n, b, packet{dst: live, port: 443})
	times := 5000
	if testing.Short() {
		times = 200
	}
	seen := map[string]bool{}
	for i := range times {
		got, code := b.lookup(t, "r.example", mdns.TypeA)
		if code != "NOERROR" || len(got) != 1 {
			t.Fatalf("answer %d: %v, %s", i, got, code)
		}
		seen[got[0]] = true
		if i%100 == 0 {
			arrives(t, n, b, packet{dst: live, port: 443}) // the flow goes on
		}
	}
	if len(seen) != times {
		t.Errorf("control: the name had %d addresses, want %d", len(seen), times)
	}
	learned, err := n.enforce.Learned(b.id, b.slot)
	must(t, err)
	if len(learned) == 0 || len(learned) > kept {
		t.Errorf("%d addresses are open, want at most %d", len(learned), kept)
	}
	if _, ok := learned[live]; !ok {
		t.Error("the address of the live flow gave way to newer ones")
	}
	arrives(t, n, b, packet{dst: live, port: 443})
	if st := s.Stats(b.id); st.Evicted == 0 {
		t.Error("evictions are not counted")
	}
	b.repel(t, attack{"an address that gave way", "no_rule", one(packet{dst: netip.MustParseAddr("203.0.112.20"), port: 443}), true})
}

// When an answer is there, its address is open: the first packet passes. When
// the resolver is gone, what it opened stays, and nothing new opens.
func TestResolverDies(t *testing.T) {
	n := theWorld(t)
	u := newUpstream(t, n, far4, func(q mdns.Question) []mdns.RR {
		if q.Qtype != mdns.TypeA {
			return []mdns.RR{}
		}
		return []mdns.RR{record(q.Name, other4.String())}
	})
	rules := fqdn("*.example", "")
	const rounds = 20
	for i := range rounds {
		b, s := n.resolve(t, u, rules, nil)
		b.lookup(t, fmt.Sprintf("n%d.example", i), mdns.TypeA)
		k := newToken()
		n.await(k)
		before := b.drops(t)["no_rule"]
		b.send(t, one(packet{dst: other4, port: 443})(b, k)...)
		time.Sleep(time.Millisecond)
		if got := b.drops(t)["no_rule"]; got != before {
			t.Fatalf("%d: the first packet after the answer was dropped", i)
		}
		n.forget(k)
		if i < rounds-1 {
			must(t, s.Stop(b.id))
			continue
		}
		must(t, s.Close())
		arrives(t, n, b, packet{dst: other4, port: 443})
		if _, err := b.ask(t, "tcp", dns.Address, "x.example", mdns.TypeA); err == nil {
			t.Error("a resolver that is closed answers")
		}
		b.repel(t, attack{"a new address", "no_rule", one(packet{dst: other6, port: 443}), false})
		again := n.startResolver(t, b, u, rules, nil)
		if names := again.NamesOf(b.id, other4); len(names) != 1 {
			t.Errorf("after a restart %s is known as %v", other4, names)
		}
		arrives(t, n, b, packet{dst: other4, port: 443})
	}
}
