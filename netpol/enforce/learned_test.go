// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/bulkheadhq/bulkhead/netpol"
)

const names = "- {name: api, action: allow, to: [{fqdn: api.example.com}], ports: [443/tcp, 8000-8001/tcp]}\n" +
	"- {name: all, action: allow, to: [{fqdn: '**.example.com'}], ports: [53/udp]}\n" +
	"- {name: web, action: allow, to: [{cidr: 198.51.100.0/24}], ports: [80/tcp]}\n" +
	"- {name: no25, action: deny, to: [{cidr: 192.0.2.0/24}], ports: [8001/tcp]}\n"

// learned is what a name opens at an address.
func learned(t testing.TB, p netpol.Program, name string, a netip.Addr) netpol.Learned {
	t.Helper()
	steps := p.Learn(name, a)
	if len(steps) == 0 {
		t.Fatalf("%s opens nothing at %s", name, a)
	}
	return netpol.Learned{Addr: a, Steps: steps}
}

func TestLearnAndForget(t *testing.T) {
	p := compile(t, names)
	e := open(t, testConfig(t))
	place(t, e, sandbox(testSlot, 1, p))
	expect(t, e, "before", frame{dst: dst4}.bytes(), "no_rule")
	for _, dst := range []netip.Addr{dst4, dst6} {
		ok(t, e.Learn(testID, testSlot, p.Digest, learned(t, p, "api.example.com", dst)))
		expect(t, e, "name", frame{dst: dst}.bytes(), "allow")
		expect(t, e, "range", frame{dst: dst, port: 8000}.bytes(), "allow")
		expect(t, e, "other pattern", frame{dst: dst, port: 53, udp: true}.bytes(), "allow")
		expect(t, e, "other port", frame{dst: dst, port: 80}.bytes(), "no_rule")
		expect(t, e, "other address", frame{dst: dst.Next()}.bytes(), "no_rule")
	}
	expect(t, e, "denied address of a name", frame{dst: dst4, port: 8001}.bytes(), "rule_deny")
	expect(t, e, "no such deny in IPv6", frame{dst: dst6, port: 8001}.bytes(), "allow")

	// Another name at the same address replaces what was learned.
	ok(t, e.Learn(testID, testSlot, p.Digest, learned(t, p, "x.example.com", dst4)))
	expect(t, e, "replaced", frame{dst: dst4}.bytes(), "no_rule")
	expect(t, e, "replacement", frame{dst: dst4, port: 53, udp: true}.bytes(), "allow")

	ok(t, e.Forget(testID, testSlot, dst4))
	expect(t, e, "forgotten", frame{dst: dst4, port: 53, udp: true}.bytes(), "no_rule")
	expect(t, e, "not forgotten", frame{dst: dst6}.bytes(), "allow")
	ok(t, e.Forget(testID, testSlot, dst4))
	ok(t, e.Forget(testID, testSlot, dst6))
	expect(t, e, "forgotten 6", frame{dst: dst6}.bytes(), "no_rule")

	hits := map[string]uint64{}
	rules, err := e.RuleCounters(testID, testSlot)
	ok(t, err)
	for _, r := range rules {
		hits[r.Rule] = r.Packets
	}
	if diff := cmp.Diff(map[string]uint64{"api": 6, "all": 3, "web": 0, "no25": 1}, hits); diff != "" {
		t.Errorf("hits (-want +got):\n%s", diff)
	}

	steps := learned(t, p, "api.example.com", dst4).Steps
	for name, l := range map[string]netpol.Learned{
		"mapped": {Addr: netip.MustParseAddr("::ffff:192.0.2.1"), Steps: steps}, "zone": {Addr: netip.MustParseAddr("fe80::1%x"), Steps: steps},
		"no address": {Steps: steps}, "no steps": {Addr: dst4},
		"many steps": {Addr: dst4, Steps: make([]netpol.PortRule, netpol.MaxLearnedSteps+1)},
		"rule":       {Addr: dst4, Steps: []netpol.PortRule{{Lo: 1, Hi: 1, Proto: netpol.TCP, Rule: 99}}},
	} {
		if err := e.Learn(testID, testSlot, p.Digest, l); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if err := e.Learn("nobody", testSlot, p.Digest, netpol.Learned{}); !errors.Is(err, ErrNotFound) {
		t.Errorf("learn for nobody: got %v", err)
	}
}

// What is learned belongs to a program. The next one gets what it is given.
func TestLearnedFollowsThePolicy(t *testing.T) {
	old, p := compile(t, names), compile(t, names+"- {name: more, action: allow, to: [{cidr: 10.0.0.0/8}], ports: [1/tcp]}\n")
	e := open(t, testConfig(t))
	place(t, e, sandbox(testSlot, 1, old))
	ok(t, e.Learn(testID, testSlot, old.Digest, learned(t, old, "api.example.com", dst4)))
	ok(t, e.Learn(testID, testSlot, old.Digest, learned(t, old, "api.example.com", dst6)))
	expect(t, e, "old", frame{dst: dst4}.bytes(), "allow")
	if err := e.Learn(testID, testSlot, p.Digest, learned(t, p, "api.example.com", dst4)); !errors.Is(err, ErrPolicyMoved) {
		t.Errorf("learn by a program that is not in force: got %v", err)
	}
	ok(t, e.SetPolicy(testID, testSlot, p, 2, []netpol.Learned{learned(t, p, "api.example.com", dst4), {Addr: dst6}}))
	expect(t, e, "taken along", frame{dst: dst4}.bytes(), "allow")
	expect(t, e, "left out", frame{dst: dst6}.bytes(), "no_rule")
	if err := e.Learn(testID, testSlot, old.Digest, learned(t, old, "api.example.com", dst6)); !errors.Is(err, ErrPolicyMoved) {
		t.Errorf("learn by the old program: got %v", err)
	}
	ok(t, e.SetPolicy(testID, testSlot, old, 3, nil))
	expect(t, e, "none given", frame{dst: dst4}.bytes(), "no_rule")
	got, err := e.Learned(testID, testSlot)
	if err != nil || len(got) != 0 {
		t.Errorf("learned: got %v, %v", got, err)
	}
}

// A restart keeps what was learned; more can be once the program is known.
func TestLearnedAfterARestart(t *testing.T) {
	p := compile(t, names)
	p.Rules[0].Rate = 1e9
	p = distinct(p)
	cfg := testConfig(t)
	e := open(t, cfg)
	sb := sandbox(testSlot, 1, p)
	sb.Learned = []netpol.Learned{learned(t, p, "api.example.com", dst4)}
	place(t, e, sb)
	expect(t, e, "given at the start", frame{dst: dst4}.bytes(), "allow")
	ok(t, e.Learn(testID, testSlot, p.Digest, learned(t, p, "api.example.com", dst6)))
	ok(t, e.Close())
	if err := e.Learn(testID, testSlot, p.Digest, learned(t, p, "api.example.com", dst6)); !errors.Is(err, ErrClosed) {
		t.Errorf("learn after close: got %v", err)
	}

	e = open(t, cfg)
	expect(t, e, "kept", frame{dst: dst4}.bytes(), "allow")
	expect(t, e, "kept 6", frame{dst: dst6}.bytes(), "allow")
	got, err := e.Learned(testID, testSlot)
	if err != nil || len(got) != 2 {
		t.Errorf("learned: got %v, %v", got, err)
	}
	ok(t, e.Forget(testID, testSlot, dst6))
	expect(t, e, "forgotten", frame{dst: dst6}.bytes(), "no_rule")
	// The numbers of its rules are not known yet.
	if err := e.Learn(testID, testSlot, p.Digest, learned(t, p, "api.example.com", dst6)); !errors.Is(err, ErrPolicyMoved) {
		t.Errorf("learn before the program is known: got %v", err)
	}
	place(t, e, sandbox(testSlot, 1, p)) // in force already: Learned is not used
	expect(t, e, "kept", frame{dst: dst4}.bytes(), "allow")
	ok(t, e.Learn(testID, testSlot, p.Digest, learned(t, p, "api.example.com", dst6)))
	expect(t, e, "learned again", frame{dst: dst6}.bytes(), "allow")
}

// Since when nobody has sent to an address is known to the second, across
// changes of policy and what is learned again.
func TestLearnedLastUse(t *testing.T) {
	p := compile(t, names)
	e := open(t, testConfig(t))
	place(t, e, sandbox(testSlot, 1, p))
	l4, l6 := learned(t, p, "api.example.com", dst4), learned(t, p, "api.example.com", dst6)
	ok(t, e.Learn(testID, testSlot, p.Digest, l4))
	ok(t, e.Learn(testID, testSlot, p.Digest, l6))
	check := func(when string, want4 func(time.Duration) bool) {
		t.Helper()
		got, err := e.Learned(testID, testSlot)
		ok(t, err)
		if len(got) != 2 || !want4(got[dst4]) || got[dst6] >= 0 {
			t.Errorf("%s: got %v", when, got)
		}
	}
	check("new", func(d time.Duration) bool { return d < 0 })
	expect(t, e, "used", frame{dst: dst4}.bytes(), "allow")
	recent := func(d time.Duration) bool { return d >= 0 && d <= 2*time.Second }
	check("used", recent)
	ok(t, e.Learn(testID, testSlot, p.Digest, l4))
	check("learned again", recent)
	other := p
	other.Digest[0]++
	ok(t, e.SetPolicy(testID, testSlot, other, 2, []netpol.Learned{l4, l6}))
	check("another policy", recent)
	// A packet that is dropped for its port is a sign of life, too; explain is none.
	if _, err := e.Explain(testSlot, netpol.Flow{Proto: netpol.TCP, Dst: dst6, Port: 443}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(3100 * time.Millisecond)
	check("idle", func(d time.Duration) bool { return d >= 2*time.Second && d <= 5*time.Second })
	expect(t, e, "used again", frame{dst: dst4}.bytes(), "allow")
	check("used again", recent)
}

func TestLearnedFull(t *testing.T) {
	p := compile(t, names)
	e := open(t, testConfig(t))
	place(t, e, sandbox(testSlot, 1, p))
	most := int(e.slots[testSlot].learned.MaxEntries())
	steps := learned(t, p, "api.example.com", dst4).Steps
	addr := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{203, 0, byte(i >> 8), byte(i)}) }
	all := []netpol.Learned{}
	for i := range most + 1 {
		all = append(all, netpol.Learned{Addr: addr(i), Steps: steps})
		err := e.Learn(testID, testSlot, p.Digest, all[i])
		if full := i == most; full != errors.Is(err, ErrLearnedFull) || !full && err != nil {
			t.Fatalf("address %d of %d: got %v", i+1, most, err)
		}
	}
	expect(t, e, "too many", frame{dst: addr(most)}.bytes(), "no_rule")
	ok(t, e.Learn(testID, testSlot, p.Digest, all[0])) // is there already
	ok(t, e.Forget(testID, testSlot, addr(0)))
	ok(t, e.Learn(testID, testSlot, p.Digest, all[most]))
	expect(t, e, "room again", frame{dst: addr(most)}.bytes(), "allow")
	expect(t, e, "forgotten", frame{dst: addr(0)}.bytes(), "no_rule")

	other := p
	other.Digest[0]++
	if err := e.SetPolicy(testID, testSlot, other, 2, all); !errors.Is(err, ErrLearnedFull) {
		t.Errorf("policy with too many: got %v", err)
	}
	expect(t, e, "the old policy stays", frame{dst: addr(most)}.bytes(), "allow")
	got, err := e.Learned(testID, testSlot)
	if err != nil || len(got) != most {
		t.Errorf("learned: got %d, %v", len(got), err)
	}
	if _, err := e.Learned("nobody", testSlot); !errors.Is(err, ErrNotFound) {
		t.Errorf("learned of nobody: %v", err)
	}
}
