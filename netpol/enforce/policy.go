// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"errors"
	"fmt"
	"maps"

	"github.com/bulkheadhq/bulkhead/bpf"
	"github.com/bulkheadhq/bulkhead/netpol"
)

// keptRules is how many counters a sandbox keeps at most for rules that its
// policy no longer has.
const keptRules = 256

// SetPolicy replaces the policy of a sandbox by one store. When it returns, no
// packet is judged by the old policy any more: live flows are cut at their
// next packet. On error the old policy stays in force.
//
// A rule keeps its counter if the new program has one of the same tenant and
// name, and RuleCounters goes on reporting rules that are gone.
func (e *Enforcer) SetPolicy(id string, slot uint32, p netpol.Program, rev uint64) error {
	if err := e.use(); err != nil {
		return err
	}
	defer e.life.RUnlock()
	s, err := e.lockSlot(id, slot)
	if err != nil {
		return fmt.Errorf("set policy of %s: %w", id, err)
	}
	defer s.mu.Unlock()
	if err := e.setPolicy(s, slot, p, rev); err != nil {
		return fmt.Errorf("set policy of %s: %w", id, err)
	}
	return nil
}

// lockSlot locks the slot if id has it.
func (e *Enforcer) lockSlot(id string, n uint32) (*slot, error) {
	if n == 0 || n > e.cfg.MaxSandboxes {
		return nil, fmt.Errorf("slot %d: %w", n, ErrNotFound)
	}
	s := &e.slots[n]
	s.mu.Lock()
	if s.id == "" || s.id != id {
		s.mu.Unlock()
		return nil, fmt.Errorf("slot %d: %w", n, ErrNotFound)
	}
	return s, nil
}

// setPolicy makes p the policy of the slot, unless it already is.
//
// +checklocks:s.mu
func (e *Enforcer) setPolicy(s *slot, n uint32, p netpol.Program, rev uint64) error {
	old := e.shm.policy(n)
	if old != 0 && p.Digest != [32]byte{} && p.Digest == s.digest {
		info, err := e.tries.infoOf(old)
		if err != nil {
			return err
		}
		info.Rev = rev
		return e.tries.setInfo(old, info)
	}

	rules, added, err := e.countersFor(s, n, p)
	if err != nil {
		return err
	}
	t, err := e.makePolicy(n, p, rev, rules)
	if err != nil {
		return errors.Join(err, e.rules.release(added))
	}
	e.shm.setPolicy(n, t)
	s.digest = p.Digest
	maps.Copy(s.rules, added)
	// From here on p is in force, whatever becomes of the rest: what cannot be
	// given back now is found unused by the next Open.
	if old != 0 {
		_ = errors.Join(e.tries.discard(old), e.trimRules(s, rules))
	}
	return nil
}

// countersFor answers the counter of every rule of p, by rule id, and those
// among them that are new.
//
// +checklocks:s.mu
func (e *Enforcer) countersFor(s *slot, n uint32, p netpol.Program) (byID []uint32, added map[ruleKey]uint32, err error) {
	added = map[ruleKey]uint32{}
	byID = make([]uint32, len(p.Rules))
	for i, r := range p.Rules {
		k := ruleKey{r.Tenant, r.Name}
		index, ok := s.rules[k]
		if !ok {
			index, ok = added[k]
		}
		if !ok {
			if index, err = e.rules.add(n, k); err != nil {
				return nil, nil, errors.Join(err, e.rules.release(added))
			}
			added[k] = index
		}
		byID[i] = index
	}
	return byID, added, nil
}

// makePolicy writes p into an unused trie and answers its index.
func (e *Enforcer) makePolicy(n uint32, p netpol.Program, rev uint64, rules []uint32) (uint32, error) {
	keys := make([]bpf.DatapathBhLpmKey, len(p.Entries))
	values := make([]bpf.DatapathBhPolicyEntry, len(p.Entries))
	for i, entry := range p.Entries {
		var err error
		if keys[i], err = lpmKey(entry.Prefix); err != nil {
			return 0, err
		}
		if err = policyEntry(&values[i], entry, rules); err != nil {
			return 0, fmt.Errorf("entry %s: %w", entry.Prefix, err)
		}
	}
	t, err := e.tries.take()
	if err != nil {
		return 0, err
	}
	info := bpf.DatapathBhPolicyInfo{Rev: rev, Slot: n, Entries: uint32(len(keys)), Digest: p.Digest}
	err = e.tries.fill(t, keys, values, info)
	t.m.Close()
	if err != nil {
		return 0, errors.Join(err, e.tries.discard(t.index))
	}
	return t.index, nil
}

func policyEntry(v *bpf.DatapathBhPolicyEntry, entry netpol.Entry, rules []uint32) error {
	if len(entry.Ports) > len(v.Rules) {
		return fmt.Errorf("%d port rules, at most %d", len(entry.Ports), len(v.Rules))
	}
	v.Count = uint32(len(entry.Ports))
	for i, r := range entry.Ports {
		if int(r.Rule) >= len(rules) {
			return fmt.Errorf("port rule %d names rule %d of %d", i, r.Rule, len(rules))
		}
		pr := &v.Rules[i]
		pr.Lo, pr.Hi, pr.Proto, pr.Rule = r.Lo, r.Hi, uint8(r.Proto), rules[r.Rule]
		if r.Deny {
			pr.Deny = 1
		}
	}
	return nil
}

// trimRules forgets the rules that the policy no longer has once there are
// too many of them. No program may still use an older policy.
//
// +checklocks:s.mu
func (e *Enforcer) trimRules(s *slot, current []uint32) error {
	inForce := map[uint32]bool{}
	for _, index := range current {
		inForce[index] = true
	}
	if len(s.rules)-len(inForce) <= keptRules {
		return nil
	}
	gone := map[ruleKey]uint32{}
	for k, index := range s.rules {
		if !inForce[index] {
			gone[k] = index
			delete(s.rules, k)
		}
	}
	return e.rules.release(gone)
}
