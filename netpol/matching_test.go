// SPDX-License-Identifier: Apache-2.0

package netpol

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// The rules that match a name are found without looking at all.
func TestMatching(t *testing.T) {
	var b strings.Builder
	patterns := []string{"a.b.c.example", "*.b.c.example", "**.b.c.example", "**.c.example", "*.c.example", "**.example", "*.example", "x.example"}
	for i := range 3 * len(patterns) {
		action, ports := "allow", ", ports: [443/tcp]"
		if i%5 == 0 {
			action, ports = "deny", ""
		}
		fmt.Fprintf(&b, "- {name: r%d, action: %s, to: [{fqdn: '%s'}, {fqdn: '%s'}]%s}\n", i, action, patterns[i%len(patterns)], patterns[(3*i+1)%len(patterns)], ports)
	}
	p := compile(t, layer(t, "acme", "rules:\n"+b.String()))
	all := p
	all.byPattern = nil
	hits := 0
	for _, name := range []string{
		"a.b.c.example", "z.b.c.example", "y.z.b.c.example", "b.c.example", "c.example", "x.example", "y.x.example", "example",
		"xexample", "a.xb.c.example", "other.test", "a.b.c.example.test",
	} {
		got, want := p.matching(name), all.matching(name)
		hits += len(got)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
	if hits == 0 {
		t.Error("no rule ever matched")
	}
}

// A sandbox's own policy of thousands of names does not make its questions
// expensive for the node.
func TestManyNamesAreCheap(t *testing.T) {
	targets := make([]string, 8000)
	for i := range targets {
		targets[i] = fmt.Sprintf("{fqdn: '*.n%d.example'}", i)
	}
	p := compile(t, layer(t, "acme", "rules:\n- {name: many, action: allow, to: ["+strings.Join(targets, ", ")+"], ports: [443/tcp]}\n"))
	addr := netip.MustParseAddr("192.0.2.1")
	cost := func(p Program) time.Duration {
		const rounds = 200
		start := time.Now()
		for range rounds {
			if len(p.Learn("q.n7999.example", addr)) != 1 {
				t.Fatal("nothing learned")
			}
		}
		return time.Since(start) / rounds
	}
	all := p
	all.byPattern = nil
	if found, looked := cost(p), cost(all); found > looked/10 {
		t.Errorf("%s for one address, %s by looking at all names", found, looked)
	}
}

// No sandbox can take so many rates that others get none.
func TestTooManyRates(t *testing.T) {
	rated := func(from, n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, "- {name: r%d, action: allow, to: [{cidr: 192.0.2.%d/32}], ports: [443/tcp], rate: 1Mbit}\n", from+i, i)
		}
		return "rules:\n" + b.String()
	}
	layers := []Layer{layer(t, "acme", rated(0, MaxRated/2)), layer(t, "acme/a", rated(0, MaxRated/2))}
	compile(t, layers...)
	layers = append(layers, layer(t, "acme/a", rated(100, 1)))
	_, err := Compile(layers)
	if err == nil || !strings.Contains(err.Error(), "17 rules with a rate") {
		t.Errorf("got %v", err)
	}
}

// What is decided for one prefix is not decided again for thousands like it: a
// policy of the largest size must not hold up a reload.
func TestDecidedOnce(t *testing.T) {
	var b strings.Builder
	for i := range 500 {
		fmt.Fprintf(&b, "- {name: w%d, action: allow, to: [{cidr: 0.0.0.0/0}], ports: [443/tcp]}\n", i)
	}
	targets := make([]string, 5000)
	for i := range targets {
		targets[i] = fmt.Sprintf("{cidr: 10.%d.%d.0/24}", i>>8, i&255)
	}
	l := layer(t, "acme", "rules:\n"+b.String()+"- {name: many, action: allow, to: ["+strings.Join(targets, ", ")+"], ports: [80/tcp]}\n")
	c := compiler{layers: []Layer{l}, auditFrom: 1}
	c.number()
	c.names()
	c.index()
	c.walk()
	if len(c.prog.Entries) != 5001 || len(c.decided) != 2 {
		t.Errorf("%d entries by %d decisions, want 5001 by 2", len(c.prog.Entries), len(c.decided))
	}
}
