// SPDX-License-Identifier: Apache-2.0

package netpol

import (
	"math/rand/v2"
	"testing"
)

// Who may start sandboxes may give each a policy of its own, and that may be in
// audit mode. It opens nothing that allow rules of its own could not have opened:
// the guardrails and deny rules of the layers above hold as they do for those.
func TestOwnAuditOpensNoMoreThanOwnRules(t *testing.T) {
	const chains = 2000
	watched := 0
	for seed := range uint64(chains) {
		r := rand.New(rand.NewPCG(seed, 3))
		chain := randomChain(r)
		with := func(p Policy) (Program, error) {
			return Compile(append(chain[:len(chain):len(chain)], Layer{Tenant: chain[len(chain)-1].Tenant, Policy: p}))
		}
		without, err := Compile(chain)
		if err != nil {
			continue
		}
		audit, err := with(Policy{Mode: ModeAudit})
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		var own []Program // one for each family and protocol, or a guardrail may refuse all at once
		for _, all := range []string{"0.0.0.0/0", "::/0"} {
			for _, ports := range everyPort() {
				rule := Rule{Name: "own", Action: Allow, To: []Target{{CIDR: pfx(all)}}, Ports: []PortRange{ports}}
				if p, err := with(Policy{Rules: []Rule{rule}}); err == nil {
					own = append(own, p)
				}
			}
		}
		for range 50 {
			f := Flow{Proto: pick(r, []Proto{TCP, UDP, ICMP}), Port: uint16(1 + r.IntN(14)), Dst: pick(r, universe())}
			if !audit.Evaluate(f).Allowed || without.Evaluate(f).Allowed {
				continue
			}
			watched++
			open := false
			for _, p := range own {
				open = open || p.Evaluate(f).Allowed
			}
			if !open {
				t.Errorf("seed %d: audit lets pass %+v, no rule of its own could", seed, f)
			}
		}
	}
	if watched < 1000 {
		t.Errorf("only %d flows passed for audit", watched)
	}
}
