// SPDX-License-Identifier: Apache-2.0

package netpol

import (
	"fmt"
	"net/netip"
	"testing"
)

// BenchmarkLearn is what the resolver asks for each address of an answer,
// under 1,000 rules with a name each and a guardrail above.
func BenchmarkLearn(b *testing.B) {
	org := Layer{Tenant: "acme", Policy: Policy{Guardrail: &Guardrail{Bounds: []Bound{
		{To: []Target{{FQDN: "**.example.com"}}, Ports: []PortRange{{443, 443, TCP}}},
	}}}}
	team := Layer{Tenant: "acme/vision"}
	for i := range 1000 {
		team.Policy.Rules = append(team.Policy.Rules, Rule{
			Name: fmt.Sprintf("r%d", i), Action: Allow, Ports: []PortRange{{443, 443, TCP}},
			To: []Target{{FQDN: fmt.Sprintf("*.s%d.example.com", i)}},
		})
	}
	p, err := Compile([]Layer{org, team})
	if err != nil {
		b.Fatal(err)
	}
	a := netip.MustParseAddr("198.51.100.1")
	for b.Loop() {
		if len(p.Learn("api.s999.example.com", a)) != 1 {
			b.Fatal("nothing was learned")
		}
	}
}
