// SPDX-License-Identifier: Apache-2.0

package supervisortest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"sync"

	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/netpol"
)

type links struct{ p *Process }

func (l links) Create(_ context.Context, id string, plan sandbox.Plan) (int, error) {
	if err := l.p.enter("links.Create", id); err != nil {
		return 0, err
	}
	m := l.p.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if have := m.links[id]; have != nil {
		if have.plan != plan {
			m.violate("link %s: another plan, %+v and %+v", id, have.plan, plan)
		}
		have.drift = ""
		return have.ifindex, nil
	}
	m.ifindex++
	m.links[id] = &linkState{plan: plan, ifindex: m.ifindex}
	return m.ifindex, nil
}

func (l links) Publish(id string, ports []sandbox.Port) error {
	if err := l.p.enter("links.Publish", id); err != nil {
		return err
	}
	m := l.p.m
	m.mu.Lock()
	defer m.mu.Unlock()
	have := m.links[id]
	if have == nil {
		return fmt.Errorf("link %s: %w", id, fs.ErrNotExist)
	}
	for other, l := range m.links {
		for _, q := range l.ports {
			for _, p := range ports {
				if other != id && p.Host == q.Host && p.Proto == q.Proto {
					m.violate("port %s of %s is %s's", p, id, other)
				}
			}
		}
	}
	have.ports = slices.Clone(ports)
	return nil
}

func (l links) Verify(id string) error {
	if err := l.p.enter("links.Verify", id); err != nil {
		return err
	}
	m := l.p.m
	m.mu.Lock()
	defer m.mu.Unlock()
	have := m.links[id]
	if have == nil {
		return fmt.Errorf("link %s: %w", id, fs.ErrNotExist)
	}
	if have.drift != "" {
		return fmt.Errorf("link %s: %s", id, have.drift)
	}
	return nil
}

func (l links) VerifyTable() error {
	if err := l.p.enter("links.VerifyTable", ""); err != nil {
		return err
	}
	m := l.p.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.table != "" {
		return errors.New(m.table)
	}
	return nil
}

func (l links) Restore() error {
	if err := l.p.enter("links.Restore", ""); err != nil {
		return err
	}
	m := l.p.m
	m.mu.Lock()
	defer m.mu.Unlock()
	m.table = ""
	return nil
}

func (l links) Up(id string) error {
	if err := l.p.enter("links.Up", id); err != nil {
		return err
	}
	m := l.p.m
	m.mu.Lock()
	defer m.mu.Unlock()
	have := m.links[id]
	if have == nil {
		return fmt.Errorf("link %s: %w", id, fs.ErrNotExist)
	}
	have.up = true
	if m.passes(id) == nil {
		m.violate("link %s is up and has no program", id)
	}
	return nil
}

func (l links) Down(id string) error {
	if err := l.p.enter("links.Down", id); err != nil {
		return err
	}
	m := l.p.m
	m.mu.Lock()
	defer m.mu.Unlock()
	have := m.links[id]
	if have == nil {
		return fmt.Errorf("link %s: %w", id, fs.ErrNotExist)
	}
	have.up = false
	return nil
}

func (l links) Remove(id string) error {
	if err := l.p.enter("links.Remove", id); err != nil {
		return err
	}
	m := l.p.m
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.links, id)
	return nil
}

func (l links) List() ([]string, error) {
	if err := l.p.enter("links.List", ""); err != nil {
		return nil, err
	}
	m := l.p.m
	m.mu.Lock()
	defer m.mu.Unlock()
	return keys(m.links), nil
}

// resolver is what answers the names of one sandbox. mu is held while a policy
// is swapped and while something is learned.
type resolver struct {
	mu      sync.Mutex
	slot    uint32
	program netpol.Program // +checklocks:mu
}

type names struct{ p *Process }

func (n names) Start(_ context.Context, id string, slot uint32, netns string, prog netpol.Program) error {
	if err := n.p.enter("names.Start", id); err != nil {
		return err
	}
	n.p.naming.Lock()
	defer n.p.naming.Unlock()
	r := n.p.serving[id]
	if r == nil {
		r = &resolver{slot: slot}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	m := n.p.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if l := m.links[id]; l == nil || l.plan.NetnsPath != netns {
		return fmt.Errorf("netns %s of %s: %w", netns, id, fs.ErrNotExist)
	}
	kernel := m.programs[id]
	if kernel == nil || kernel.slot != slot {
		return fmt.Errorf("learned addresses of %s: %w", id, fs.ErrNotExist)
	}
	if m.journals[id] == nil {
		m.journals[id] = []lesson{}
	}
	learned := m.learned(id, prog)
	if len(learned) > 0 && kernel.program.Digest != prog.Digest {
		return fmt.Errorf("learn for %s: another policy is in force", id)
	}
	kernel.learned = learned
	r.program = prog
	n.p.serving[id] = r
	return nil
}

// learned is what a journal gives under a program. The caller holds mu.
func (m *Machine) learned(id string, prog netpol.Program) map[netip.Addr][]netpol.PortRule {
	out := map[netip.Addr][]netpol.PortRule{}
	for _, l := range m.journals[id] {
		if steps := prog.Learn(l.name, l.addr); len(steps) > 0 {
			out[l.addr] = steps
		}
	}
	return out
}

func (n names) Stop(id string) error {
	if err := n.p.enter("names.Stop", id); err != nil {
		return err
	}
	n.p.naming.Lock()
	delete(n.p.serving, id)
	n.p.naming.Unlock()
	m := n.p.m
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.journals, id)
	return nil
}

func (n names) Swap(id string, prog netpol.Program, apply func([]netpol.Learned) error) error {
	if err := n.p.enter("names.Swap", id); err != nil {
		return err
	}
	r := n.p.resolver(id)
	if r != nil {
		r.mu.Lock()
		defer r.mu.Unlock()
	}
	n.p.m.mu.Lock()
	var learned []netpol.Learned
	for addr, steps := range n.p.m.learned(id, prog) {
		learned = append(learned, netpol.Learned{Addr: addr, Steps: steps})
	}
	n.p.m.mu.Unlock()
	if err := apply(learned); err != nil {
		return err
	}
	if r != nil {
		r.program = prog
	}
	return nil
}

func (p *Process) resolver(id string) *resolver {
	p.naming.Lock()
	defer p.naming.Unlock()
	return p.serving[id]
}

// Resolve lets a sandbox ask for a name, whose address is addr, and reports
// whether it got an answer. As the real resolver does, it answers only once the
// address is in the journal and in the kernel.
func (p *Process) Resolve(id, name string, addr netip.Addr) bool {
	r := p.resolver(id)
	if r == nil || p.Dead() {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	steps := r.program.Learn(name, addr)
	if len(steps) == 0 {
		return false
	}
	m := p.m
	m.mu.Lock()
	defer m.mu.Unlock()
	prog := m.programs[id]
	if prog == nil || prog.slot != r.slot || prog.program.Digest != r.program.Digest {
		m.violate("the resolver of %s works by another policy than the kernel", id)
		return false
	}
	if l := (lesson{name, addr}); !slices.Contains(m.journals[id], l) {
		m.journals[id] = append(m.journals[id], l)
	}
	prog.learned[addr] = steps
	return true
}

type budgets struct{ p *Process }

func (b budgets) Ensure(id string, slot uint32, prog netpol.Program) error {
	if err := b.p.enter("budgets.Ensure", id); err != nil {
		return err
	}
	m := b.p.m
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, x := range prog.Budgets {
		m.budgets[budgetOf(x, slot)] = x.Bytes
	}
	return nil
}

func (b budgets) Release(id string, _ uint32) error {
	if err := b.p.enter("budgets.Release", id); err != nil {
		return err
	}
	m := b.p.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if l := m.links[id]; l != nil && l.up {
		m.violate("the budgets of %s are settled while its link is up", id)
	}
	return nil
}

func budgetOf(b netpol.ProgramBudget, slot uint32) budgetKey {
	if b.Scope == netpol.ScopeTenant {
		slot = 0
	}
	return budgetKey{b.Tenant, slot}
}
