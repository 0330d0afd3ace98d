// SPDX-License-Identifier: Apache-2.0

package supervisor

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/netpol"
	"github.com/bulkheadhq/bulkhead/tenant"
)

// Reload puts another set of tenants in force: limits of the tenants' cgroups
// and the policies of running sandboxes. All or nothing: if any of it is
// refused, what was changed is put back and the old set stays.
//
// A sandbox whose own policy no longer fits its tenant's guardrails is cut off
// and stopped. It must not hold up a change that may well be aimed at it.
func (s *Supervisor) Reload(ctx context.Context, set *tenant.Set) (updated int, err error) {
	s.admission.Lock()
	defer s.admission.Unlock()
	old := s.tenants.Load()
	type change struct {
		b        *box
		from, to netpol.Program
	}
	var changes []change
	doomed := map[*box]error{}
	s.mu.Lock()
	boxes := make([]*box, 0, len(s.boxes))
	for _, b := range s.boxes {
		boxes = append(boxes, b)
	}
	s.mu.Unlock()
	for _, b := range boxes {
		rec := b.record()
		if !rec.State.Live() {
			continue
		}
		if len(set.Chain(rec.Spec.Tenant)) == 0 {
			return 0, fmt.Errorf("tenant %s would go, but sandbox %s of it is %s: stop it first", rec.Spec.Tenant, rec.Spec.Name, rec.State)
		}
		to, err := compile(set, rec.Spec)
		if err != nil && rec.Spec.Policy != "" {
			doomed[b] = err
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("sandbox %s of %s: %w", rec.Spec.Name, rec.Spec.Tenant, err)
		}
		if to.Digest != rec.PolicyDigest {
			changes = append(changes, change{b: b, to: to})
		}
	}
	if len(changes) > 0 {
		// Usage up to here belongs to the old revision. If the disk refuses, the
		// next record covers both; that is no reason to keep an old policy.
		if err := s.MeterNow(ctx, true); err != nil {
			s.cfg.Log.Warn("close usage intervals before a change of policy", "err", err)
		}
	}
	back := func(err error, changed []change) error {
		for _, done := range changed {
			if _, uerr := done.b.setPolicy(done.from); uerr != nil {
				err = errors.Join(err, fmt.Errorf("put back: %w", uerr))
			}
		}
		if uerr := s.limit(old); uerr != nil {
			err = errors.Join(err, fmt.Errorf("put back: %w", uerr))
		}
		return err
	}
	if err := s.limit(set); err != nil {
		return 0, back(err, nil)
	}
	for i := range changes {
		c := &changes[i]
		if c.from, err = c.b.setPolicy(c.to); err != nil {
			return 0, back(err, changes[:i])
		}
	}
	s.tenants.Store(set)
	s.warn("limits", "")
	for b, why := range doomed {
		b.cutOff(fmt.Errorf("its own policy no longer fits its tenant's: %w", why))
	}
	return len(changes) + len(doomed), nil
}

// limit gives the cgroups of all tenants that are in use their limits in set.
func (s *Supervisor) limit(set *tenant.Set) error {
	for _, t := range set.All() {
		if s.InUse(t.Path).Sandboxes == 0 {
			continue
		}
		if err := s.cfg.Cgroups.Ensure(string(t.Path), t.Quota); err != nil {
			return err
		}
	}
	return nil
}

// setPolicy swaps the policy of one sandbox. When it returns without an error
// the new one judges the next packet; else the old one still does.
func (b *box) setPolicy(to netpol.Program) (from netpol.Program, err error) {
	b.repair.Lock() // a repair that has begun must not put the old one back
	defer b.repair.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	from = b.program
	next := b.rec.Clone()
	next.PolicyRev++
	next.PolicyDigest = to.Digest
	next.Log(time.Now(), "policy", "revision %d", next.PolicyRev)
	if err := b.s.cfg.Store.Put(next); err != nil {
		return from, err
	}
	if b.rec.State == sandbox.Running || b.rec.State == sandbox.Paused {
		if err := b.s.cfg.Egress.SetPolicy(b.rec.ID, b.rec.Slot, to, next.PolicyRev); err != nil {
			return from, errors.Join(err, b.s.cfg.Store.Put(b.rec))
		}
	}
	b.rec, b.program = next, to
	if b.rec.State != sandbox.Placed { // Placed: start sees that it moved
		b.attached = next.PolicyRev
	}
	b.s.publish(next.Clone(), false)
	return from, nil
}

// ensureTenant makes the cgroup of a tenant and of every ancestor.
func (s *Supervisor) ensureTenant(path tenant.Path) error {
	for _, t := range s.tenants.Load().Chain(path) {
		if err := s.cfg.Cgroups.Ensure(string(t.Path), t.Quota); err != nil {
			return err
		}
	}
	return nil
}

// verifyLoop asks the kernel again and again whether every running sandbox is
// still enforced. If not, its link goes down first and is brought back only
// with the program attached.
func (s *Supervisor) verifyLoop(ctx context.Context) {
	for sleep(ctx, s.cfg.VerifyEvery) {
		for _, rec := range s.List() {
			if rec.State != sandbox.Running {
				continue
			}
			if b, err := s.box(rec.ID); err == nil {
				b.verify(ctx)
			}
		}
	}
}

func (b *box) verify(ctx context.Context) {
	b.repair.Lock()
	defer b.repair.Unlock()
	b.mu.Lock()
	ifindex := b.ifindex
	b.mu.Unlock()
	rec := b.record()
	if rec.State != sandbox.Running || ifindex == 0 { // 0: not adopted yet, which verifies too
		return
	}
	err := b.s.cfg.Egress.Verify(rec.ID, rec.Slot, ifindex)
	if err == nil && b.repairs == 0 || b.record().State != sandbox.Running {
		return // with a repair begun, the link is still down
	}
	if derr := b.s.cfg.Links.Down(rec.ID); derr != nil {
		b.s.cfg.Log.Error("take link down", "sandbox", rec.ID, "err", derr)
	}
	if b.repairs == 0 {
		b.note("drift", "link down until repaired: %v", err)
	}
	// A want of memory or of descriptors passes; until then the link is down.
	if err := b.reattach(ctx); err != nil {
		if b.repairs++; b.repairs == maxRepairs {
			b.cutOff(err)
		}
		return
	}
	b.repairs = 0
	b.note("repaired", "egress enforced again")
}

// maxRepairs is how often a repair may fail before the sandbox is stopped.
const maxRepairs = 5
