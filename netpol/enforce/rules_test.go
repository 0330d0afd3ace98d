// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"fmt"
	"strings"
	"testing"

	"github.com/bulkheadhq/bulkhead/netpol"
)

// A sandbox with a thousand rules takes what nobody has a right to, and no
// more: every other one can still have as many as it is promised.
func TestRulesOfOthers(t *testing.T) {
	e := open(t, testConfig(t))
	many := func(n int) netpol.Program {
		p := compile(t, allowAll)
		for i := range n {
			p.Rules = append(p.Rules, netpol.RuleRef{ID: uint16(len(p.Rules)), Tenant: "acme", Name: fmt.Sprint("r", i)})
		}
		return distinct(p)
	}
	greedy, refused := 0, error(nil)
	for refused == nil && greedy < 10 {
		greedy++
		sb := sandbox(uint32(greedy), 4000+greedy, many(1000))
		s := &e.slots[greedy]
		s.mu.Lock()
		ok(t, e.takeSlot(s, sb))
		refused = e.setPolicy(s, uint32(greedy), sb.Program, 1, nil)
		s.mu.Unlock()
	}
	if refused == nil || !strings.Contains(refused.Error(), "no room for more than") {
		t.Fatalf("%d sandboxes have a thousand rules each: %v", greedy, refused)
	}
	if greedy == 1 {
		t.Error("not even one may have a thousand rules")
	}
	// Who is there can still change its policy.
	ok(t, e.SetPolicy(sandbox(1, 4001, many(1)).ID, 1, many(1010), 2, nil))
	for n := greedy + 1; n <= int(e.cfg.MaxSandboxes); n++ {
		place(t, e, sandbox(uint32(n), 4000+n, many(rulesPerSandbox-2)))
	}
	// It is all known after a restart.
	was, short := len(e.rules.owner), e.rules.short
	ok(t, e.Close())
	e = open(t, e.cfg)
	if len(e.rules.owner) != was || e.rules.short != short {
		t.Errorf("after a restart %d counters and %d short, were %d and %d", len(e.rules.owner), e.rules.short, was, short)
	}
	for n := 1; n <= int(e.cfg.MaxSandboxes); n++ {
		ok(t, e.Detach(e.shm.id(uint32(n)), uint32(n)))
	}
	if len(e.rules.owner) != 0 || e.rules.short != rulesPerSandbox*int(e.cfg.MaxSandboxes) {
		t.Errorf("left: %d counters, %d short", len(e.rules.owner), e.rules.short)
	}
}
