// SPDX-License-Identifier: Apache-2.0

package supervisor

import (
	"context"
	"fmt"

	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/netpol"
	"github.com/bulkheadhq/bulkhead/tenant"
)

// compile makes the policy of a sandbox: its tenant's chain, then its own, then
// the answers of the ports that it publishes.
func compile(set *tenant.Set, spec sandbox.Spec) (netpol.Program, error) {
	var own *netpol.Policy
	if spec.Policy != "" {
		p, err := netpol.Parse("policy of "+spec.Name, []byte(spec.Policy))
		if err != nil {
			return netpol.Program{}, err
		}
		own = &p
	}
	prog, err := set.Compile(spec.Tenant, own)
	if err != nil {
		return netpol.Program{}, err
	}
	return published(prog, spec)
}

// published lets the answers of published ports out.
func published(prog netpol.Program, spec sandbox.Spec) (netpol.Program, error) {
	if len(spec.Publish) == 0 {
		return prog, nil
	}
	var ports []netpol.PortRange
	seen := map[netpol.PortRange]bool{}
	for _, p := range spec.Publish { // two ports of the node may lead to one of the sandbox
		r := netpol.PortRange{Lo: p.Sandbox, Hi: p.Sandbox, Proto: p.Proto}
		if !seen[r] {
			seen[r] = true
			ports = append(ports, r)
		}
	}
	return netpol.WithPublished(prog, string(spec.Tenant), ports)
}

// compiler compiles what many sandboxes share once.
type compiler struct {
	set    *tenant.Set
	shared map[tenant.Path]netpol.Program
}

func newCompiler(set *tenant.Set) *compiler {
	return &compiler{set: set, shared: map[tenant.Path]netpol.Program{}}
}

func (c *compiler) compile(spec sandbox.Spec) (netpol.Program, error) {
	if spec.Policy != "" {
		return compile(c.set, spec)
	}
	prog, ok := c.shared[spec.Tenant]
	if !ok {
		var err error
		if prog, err = c.set.Compile(spec.Tenant, nil); err != nil {
			return netpol.Program{}, err
		}
		c.shared[spec.Tenant] = prog
	}
	return published(prog, spec)
}

// resolvable refuses a policy that allows names where none resolves.
func (s *Supervisor) resolvable(p netpol.Program) error {
	if _, off := s.cfg.Names.(noNames); !off {
		return nil
	}
	for _, n := range p.Names {
		if !n.Deny {
			r := p.Rules[n.Rule]
			return &sandbox.SpecError{Field: "policy", Msg: fmt.Sprintf(
				"rule %s of %s allows %s, but no name resolves on this node: neither dns.upstreams nor the host's /etc/resolv.conf names a resolver",
				r.Name, r.Tenant, n.Pattern)}
		}
	}
	return nil
}

// noNames stands for a node without a resolver.
type noNames struct{}

func (noNames) Start(context.Context, string, uint32, string, netpol.Program) error { return nil }

func (noNames) Stop(string) error { return nil }

func (noNames) Swap(_ string, _ netpol.Program, apply func([]netpol.Learned) error) error {
	return apply(nil)
}
