// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"

	"github.com/bulkheadhq/bulkhead/bpf"
	"github.com/bulkheadhq/bulkhead/netpol"
)

// keptRules is how many counters a sandbox keeps at most for rules that its
// policy no longer has.
const keptRules = 256

// SetPolicy replaces the policy of a sandbox by one store. When it returns,
// every packet that comes after is judged by the new policy: live flows are cut
// at their next packet. On error the old policy stays in force. learned is what
// the new program lets the names that the sandbox has resolved open; it is
// ignored if the program is already in force.
//
// It waits for nothing but system calls. A packet that is being judged while it
// returns may still be judged by the old policy.
//
// A rule keeps its counter if the new program has one of the same tenant and
// name, and RuleCounters goes on reporting rules that are gone.
func (e *Enforcer) SetPolicy(id string, slot uint32, p netpol.Program, rev uint64, learned []netpol.Learned) error {
	if err := e.use(); err != nil {
		return err
	}
	defer e.life.RUnlock()
	s, err := e.lockSlot(id, slot)
	if err != nil {
		return fmt.Errorf("set policy of %s: %w", id, err)
	}
	defer s.mu.Unlock()
	if err := e.setPolicy(s, slot, p, rev, learned); err != nil {
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
func (e *Enforcer) setPolicy(s *slot, n uint32, p netpol.Program, rev uint64, learned []netpol.Learned) error {
	old := e.shm.policy(n)
	if old != 0 && p.Digest != [32]byte{} && p.Digest == s.digest {
		return e.keepPolicy(s, n, p, rev)
	}
	rules, added, err := e.countersFor(s, n, p)
	if err != nil {
		return err
	}
	limits, err := e.limitsFor(n, p)
	if err != nil {
		return errors.Join(err, e.rules.release(added))
	}
	made, err := e.makePolicy(s, n, p, rev, learned, rules, limits)
	if err != nil {
		e.releaseLimits(limits)
		return errors.Join(err, e.rules.release(added))
	}
	generation, err := e.generations.take()
	if err != nil {
		e.releaseLimits(limits)
		return errors.Join(err, e.pool.putBack(made), e.rules.release(added))
	}
	e.shm.setPolicy(n, generation, made.index)
	maps.Copy(s.rules, added)
	// From here on p is in force. What cannot be forgotten now is found again
	// by the next Open.
	gone, _ := e.trimRules(s, rules)
	e.retire(s, old, gone)
	s.digest, s.byID, s.limits, s.learned = p.Digest, rules, limits, made.learned
	_ = made.trie.Close()
	return nil
}

// keepPolicy takes up that p, which is in force already, has a new revision. If
// an earlier process put it in force, its rule ids are known from here on.
//
// +checklocks:s.mu
func (e *Enforcer) keepPolicy(s *slot, n uint32, p netpol.Program, rev uint64) error {
	index := e.shm.policy(n)
	info, err := e.pool.infoOf(index)
	if err != nil {
		return err
	}
	if s.byID == nil {
		rules, added, err := e.countersFor(s, n, p)
		if err != nil {
			return err
		}
		limits, err := e.limitsFor(n, p)
		if err != nil {
			return errors.Join(err, e.rules.release(added))
		}
		e.releaseLimits(s.limits)
		maps.Copy(s.rules, added)
		s.byID, s.limits = rules, limits
	}
	info.Rev = rev
	return e.pool.setInfo(index, info)
}

// retire gives up the policy that the slot had until now, and counters that
// nobody names any more.
//
// +checklocks:s.mu
func (e *Enforcer) retire(s *slot, policy uint32, counters []uint32) {
	if s.learned != nil {
		_ = s.learned.Close()
	}
	if policy != 0 {
		e.pool.retire(retired{index: policy, counters: counters, limits: s.limits})
	} else {
		e.rules.recycle(counters) // without a policy no program has counted there
		e.releaseLimits(s.limits)
	}
	s.byID, s.limits, s.learned = nil, limitIDs{}, nil
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
			if index, err = e.rules.add(n, k, e.shm.policy(n) == 0); err != nil {
				return nil, nil, errors.Join(err, e.rules.release(added))
			}
			added[k] = index
		}
		byID[i] = index
	}
	return byID, added, nil
}

// makePolicy writes p under an unused index.
//
// +checklocks:s.mu
func (e *Enforcer) makePolicy(s *slot, n uint32, p netpol.Program, rev uint64, learned []netpol.Learned, rules []uint32, limits limitIDs) (_ spare, err error) {
	t, err := trieOf(p, rules, limits)
	if err != nil {
		return spare{}, err
	}
	head, err := policyHead(p, rules, limits)
	if err != nil {
		return spare{}, err
	}
	made, err := e.pool.take()
	if err != nil {
		return spare{}, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.pool.putBack(made))
		}
	}()
	if err := e.maps["heads"].Put(made.index, head); err != nil {
		return spare{}, fmt.Errorf("write limits and published ports: %w", err)
	}
	if err := e.writeLearned(made.learned, s, learned, rules, limits); err != nil {
		return spare{}, err
	}
	info := bpf.DatapathBhPolicyInfo{Rev: rev, Slot: n, Entries: uint32(len(p.Entries)), Digest: p.Digest}
	return made, e.pool.fill(made, t.keys, t.values, info)
}

// policyHead is what holds for all packets that p allows.
func policyHead(p netpol.Program, rules []uint32, limits limitIDs) (head bpf.DatapathBhHead, err error) {
	if len(limits.rates) > len(head.Rates) || len(limits.budgets) > len(head.Budgets) {
		return head, fmt.Errorf("%d rates and %d budgets, at most %d of each", len(limits.rates), len(limits.budgets), len(head.Rates))
	}
	if len(p.Published) > len(head.Ports) {
		return head, fmt.Errorf("%d published ports, at most %d", len(p.Published), len(head.Ports))
	}
	copy(head.Rates[:], limits.rates)
	copy(head.Budgets[:], limits.budgets)
	head.Limited = uint32(limits.limited())
	head.Published = uint32(len(p.Published))
	for i, port := range p.Published {
		if int(port.Rule) >= len(rules) {
			return head, fmt.Errorf("published port %d names rule %d of %d", port.Port, port.Rule, len(rules))
		}
		head.Ports[i] = bpf.DatapathBhPublished{Port: port.Port, Proto: uint8(port.Proto), Rule: rules[port.Rule]}
	}
	return head, nil
}

// Values of abi.h.
const (
	familyMore   = 1 << 31 // BH_FAMILY_MORE
	maxPortRules = 32      // BH_MAX_PORT_RULES
)

// policyTrie is what a policy's trie holds.
type policyTrie struct {
	keys   []bpf.DatapathBhLpmKey
	values []bpf.DatapathBhPolicyEntry
	more   map[string]uint32 // which steps, as text, have which number
}

// trieOf makes the trie of a program.
func trieOf(p netpol.Program, rules []uint32, limits limitIDs) (*policyTrie, error) {
	t := &policyTrie{
		keys:   make([]bpf.DatapathBhLpmKey, 0, len(p.Entries)),
		values: make([]bpf.DatapathBhPolicyEntry, 0, len(p.Entries)),
		more:   map[string]uint32{},
	}
	for _, entry := range p.Entries {
		if err := t.add(entry, rules, limits); err != nil {
			return nil, fmt.Errorf("entry %s: %w", entry.Prefix, err)
		}
	}
	return t, nil
}

func (t *policyTrie) add(entry netpol.Entry, rules []uint32, limits limitIDs) error {
	k, err := lpmKey(entry.Prefix)
	if err != nil {
		return err
	}
	if len(entry.Ports) > maxPortRules {
		return fmt.Errorf("%d port rules, at most %d", len(entry.Ports), maxPortRules)
	}
	steps := make([]bpf.DatapathBhPortRule, len(entry.Ports))
	for i, r := range entry.Ports {
		if steps[i], err = portRule(r, rules, limits); err != nil {
			return fmt.Errorf("port rule %d: %w", i, err)
		}
	}
	v := bpf.DatapathBhPolicyEntry{Count: uint32(len(steps))}
	if rest := steps[copy(v.Rules[:], steps):]; len(rest) > 0 {
		v.More = t.addMore(rest)
	}
	t.keys, t.values = append(t.keys, k), append(t.values, v)
	return nil
}

// addMore adds the steps that do not fit into an entry, and answers their
// number.
func (t *policyTrie) addMore(rest []bpf.DatapathBhPortRule) uint32 {
	text := fmt.Sprint(rest)
	if id, ok := t.more[text]; ok {
		return id
	}
	id := uint32(len(t.more) + 1)
	t.more[text] = id
	for n := uint32(1); len(rest) > 0; n++ {
		k := bpf.DatapathBhLpmKey{Prefixlen: familyBits + 128, Family: familyMore}
		binary.NativeEndian.PutUint32(k.Addr[:], id)
		binary.NativeEndian.PutUint32(k.Addr[4:], n)
		var v bpf.DatapathBhPolicyEntry
		rest = rest[copy(v.Rules[:], rest):]
		t.keys, t.values = append(t.keys, k), append(t.values, v)
	}
	return id
}

// portRule is one step as the programs read it. rules are the counters and
// limits the buckets by rule id.
func portRule(r netpol.PortRule, rules []uint32, limits limitIDs) (bpf.DatapathBhPortRule, error) {
	out := bpf.DatapathBhPortRule{Lo: r.Lo, Hi: r.Hi, Proto: uint8(r.Proto), Limited: limits.limited(), Rule: cbNoRule}
	switch {
	case r.Audit && r.Deny:
		out.Step = uint8(bpf.DatapathBhStepBH_STEP_AUDIT_DENY)
	case r.Audit:
		out.Step = uint8(bpf.DatapathBhStepBH_STEP_AUDIT)
		return out, nil
	case r.Deny:
		out.Step = uint8(bpf.DatapathBhStepBH_STEP_DENY)
	}
	if int(r.Rule) >= len(rules) {
		return out, fmt.Errorf("names rule %d of %d", r.Rule, len(rules))
	}
	out.Rule = rules[r.Rule]
	if int(r.Rule) < len(limits.byRule) {
		out.Rate = limits.byRule[r.Rule]
	}
	return out, nil
}

// trimRules forgets the rules that the policy no longer has once there are
// too many of them, and answers their counters.
//
// +checklocks:s.mu
func (e *Enforcer) trimRules(s *slot, current []uint32) ([]uint32, error) {
	inForce := map[uint32]bool{}
	for _, index := range current {
		inForce[index] = true
	}
	if len(s.rules)-len(inForce) <= keptRules {
		return nil, nil
	}
	gone := map[ruleKey]uint32{}
	for k, index := range s.rules {
		if !inForce[index] {
			gone[k] = index
			delete(s.rules, k)
		}
	}
	return e.rules.forget(gone)
}
