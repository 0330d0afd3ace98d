// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/bulkheadhq/bulkhead/bpf"
)

// ethernetHeader is what each segment has on the wire beside its l3 bytes.
const ethernetHeader = 14

// Counters are the totals of one sandbox since its first Attach. Bytes are IP
// header and payload of every segment as it leaves, packets are segments, wire
// bytes count the Ethernet header too (no preamble, no frame check sequence).
// They never go back.
type Counters struct {
	EgressBytes, EgressPackets, EgressWireBytes    uint64
	IngressBytes, IngressPackets, IngressWireBytes uint64
	Drops                                          []Drop // those that are not zero
}

// Drop counts packets of either direction that did not pass.
type Drop struct {
	Reason         string
	Packets, Bytes uint64
}

// RuleCount counts the hits of one rule. Those of deny rules were dropped, or
// passed for audit if their policy only watches.
type RuleCount struct {
	Tenant, Rule   string
	Packets, Bytes uint64
}

// Counters reads the totals of the sandbox in slot; ErrNotFound if it is free.
func (e *Enforcer) Counters(slot uint32) (Counters, error) {
	if err := e.use(); err != nil {
		return Counters{}, err
	}
	defer e.life.RUnlock()
	s, err := e.lockAny(slot)
	if err != nil {
		return Counters{}, fmt.Errorf("read counters: %w", err)
	}
	defer s.mu.Unlock()

	var perCPU []bpf.DatapathBhCounters
	if err := e.maps["counters"].Lookup(slot, &perCPU); err != nil {
		return Counters{}, fmt.Errorf("read counters of slot %d: %w", slot, err)
	}
	var c Counters
	for _, v := range perCPU {
		c.EgressBytes += v.EgressBytes
		c.EgressPackets += v.EgressSegments
		c.IngressBytes += v.IngressBytes
		c.IngressPackets += v.IngressSegments
	}
	c.EgressWireBytes = c.EgressBytes + ethernetHeader*c.EgressPackets
	c.IngressWireBytes = c.IngressBytes + ethernetHeader*c.IngressPackets
	c.Drops, err = e.drops(slot)
	return c, err
}

// UnknownDrops reads what was dropped because its link belongs to no sandbox.
func (e *Enforcer) UnknownDrops() ([]Drop, error) {
	if err := e.use(); err != nil {
		return nil, err
	}
	defer e.life.RUnlock()
	return e.drops(0)
}

func (e *Enforcer) drops(slot uint32) ([]Drop, error) {
	var d bpf.DatapathBhDrops
	if err := e.maps["drops"].Lookup(slot, &d); err != nil {
		return nil, fmt.Errorf("read drops of slot %d: %w", slot, err)
	}
	var out []Drop
	for i, c := range d.ByReason {
		if c.Packets != 0 && reason(i) != allowed { // under that, what no rule let pass for audit
			out = append(out, Drop{reasonName(reason(i)), c.Packets, c.Bytes})
		}
	}
	return out, nil
}

// RuleCounters reads the hits of every rule that the sandbox's policies have
// had, sorted by tenant and name. Of its allow rules they sum up to the egress
// totals, as long as no more than 256 rules have gone from its policy and none
// was in audit mode.
func (e *Enforcer) RuleCounters(id string, slot uint32) ([]RuleCount, error) {
	if err := e.use(); err != nil {
		return nil, err
	}
	defer e.life.RUnlock()
	s, err := e.lockSlot(id, slot)
	if err != nil {
		return nil, fmt.Errorf("read rule counters of %s: %w", id, err)
	}
	defer s.mu.Unlock()
	out := make([]RuleCount, 0, len(s.rules))
	for k, index := range s.rules {
		packets, bytes, err := e.rules.count(index)
		if err != nil {
			return nil, fmt.Errorf("read rule counters of %s: %w", id, err)
		}
		out = append(out, RuleCount{k.tenant, k.name, packets, bytes})
	}
	slices.SortFunc(out, func(a, b RuleCount) int {
		return cmp.Or(cmp.Compare(a.Tenant, b.Tenant), cmp.Compare(a.Rule, b.Rule))
	})
	return out, nil
}

// lockAny locks the slot if any sandbox has it.
func (e *Enforcer) lockAny(n uint32) (*slot, error) {
	if n == 0 || n > e.cfg.MaxSandboxes {
		return nil, fmt.Errorf("slot %d: %w", n, ErrNotFound)
	}
	s := &e.slots[n]
	s.mu.Lock()
	if s.id == "" {
		s.mu.Unlock()
		return nil, fmt.Errorf("slot %d: %w", n, ErrNotFound)
	}
	return s, nil
}
