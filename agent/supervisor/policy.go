// SPDX-License-Identifier: Apache-2.0

package supervisor

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/netpol"
	"github.com/bulkheadhq/bulkhead/tenant"
)

// change is another policy for one sandbox.
type change struct {
	b             *box
	from, to      netpol.Program
	before, after sandbox.Record
	done          bool  // the kernel has to
	failed        error // why it has not
}

// Reload puts another set of tenants in force: limits of the tenants' cgroups
// and the policies of running sandboxes. All or nothing: if any of it is
// refused, what was changed is put back and the old set stays.
//
// A sandbox whose own policy no longer fits its tenant's guardrails is cut off
// and stopped. It must not hold up a change that may well be aimed at it.
func (s *Supervisor) Reload(ctx context.Context, set *tenant.Set) (updated int, err error) {
	s.admission.Lock()
	defer s.admission.Unlock()
	changes, doomed, err := s.changes(set)
	if err != nil {
		return 0, err
	}
	if len(changes) > 0 {
		// Usage up to here belongs to the old revision. If the disk refuses, the
		// next record covers both; that is no reason to keep an old policy.
		if err := s.MeterNow(ctx, true); err != nil {
			s.cfg.Log.Warn("close usage intervals before a change of policy", "err", err)
		}
	}
	old := s.tenants.Load()
	if err = s.limit(set); err == nil {
		err = s.setPolicies(changes)
	}
	if err != nil {
		if uerr := s.limit(old); uerr != nil {
			err = errors.Join(err, fmt.Errorf("put back: %w", uerr))
		}
		return 0, err
	}
	s.tenants.Store(set)
	s.warn("limits", "")
	for b, why := range doomed {
		b.cutOff(fmt.Errorf("its own policy no longer fits its tenant's: %w", why))
	}
	return len(changes) + len(doomed), nil
}

// changes answers what a set of tenants means for the sandboxes that are there:
// another policy, or that their own no longer fits.
func (s *Supervisor) changes(set *tenant.Set) (changes []*change, doomed map[*box]error, err error) {
	s.mu.Lock()
	boxes := make([]*box, 0, len(s.boxes))
	for _, b := range s.boxes {
		boxes = append(boxes, b)
	}
	s.mu.Unlock()
	doomed = map[*box]error{}
	compiler := newCompiler(set)
	for _, b := range boxes {
		rec := b.record()
		if !rec.State.Live() {
			continue
		}
		if len(set.Chain(rec.Spec.Tenant)) == 0 {
			return nil, nil, fmt.Errorf("tenant %s would go, but sandbox %s of it is %s: stop it first", rec.Spec.Tenant, rec.Spec.Name, rec.State)
		}
		to, err := compiler.compile(rec.Spec)
		if err != nil && rec.Spec.Policy != "" {
			doomed[b] = err
			continue
		}
		if err == nil && to.Digest != rec.PolicyDigest {
			err = s.resolvable(to)
			changes = append(changes, &change{b: b, to: to})
		}
		if err != nil {
			return nil, nil, fmt.Errorf("sandbox %s of %s: %w", rec.Spec.Name, rec.Spec.Tenant, err)
		}
	}
	return changes, doomed, nil
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

// setPolicies swaps the policies of many sandboxes. When it returns without an
// error the new ones judge the next packet; else the old ones do, and an event
// of each sandbox that was in the way says why.
func (s *Supervisor) setPolicies(changes []*change) error {
	err := s.swapAll(changes)
	for _, c := range changes {
		key, rec := "policy "+c.b.id, c.b.record()
		if c.failed == nil {
			if err == nil {
				s.warn(key, "")
			}
			continue
		}
		c.b.note("policy_failed", "the old policy stays in force: %v", c.failed)
		s.warn(key, fmt.Sprintf("the last change of policy failed for sandbox %s (%s), the old one is in force: %v", rec.Spec.Name, rec.ID, c.failed))
	}
	return err
}

// hold keeps everybody else from the sandboxes of changes until release. It
// answers those that are still there.
func hold(changes []*change) (live []*change, release func()) {
	for _, c := range changes {
		c.b.repair.Lock() // a repair that has begun must not put the old one back
	}
	for _, c := range changes {
		c.b.mu.Lock()
		if c.b.rec.State.Live() { // it may have ended meanwhile
			live = append(live, c)
		}
	}
	return live, func() {
		for _, c := range changes {
			c.b.mu.Unlock()
			c.b.repair.Unlock()
		}
	}
}

// swapAll is setPolicies while every sandbox is held. All records are on disk,
// in one transaction, before the first policy is in force.
func (s *Supervisor) swapAll(changes []*change) error {
	live, release := hold(changes)
	defer release()
	if len(live) == 0 {
		return nil
	}
	var next []sandbox.Record
	for _, c := range live {
		c.from, c.before, c.after = c.b.program, c.b.rec, c.b.rec.Clone()
		c.after.PolicyRev++
		c.after.PolicyDigest = c.to.Digest
		c.after.Log(time.Now(), "policy", "revision %d", c.after.PolicyRev)
		next = append(next, c.after)
	}
	if err := s.cfg.Store.PutAll(next); err != nil {
		return err
	}
	var failed atomic.Bool
	err := eachOf(live, func(c *change) error {
		if failed.Load() {
			return nil
		}
		if c.failed = c.apply(c.to, c.after.PolicyRev); c.failed != nil {
			failed.Store(true)
			return fmt.Errorf("sandbox %s of %s: %w", c.before.Spec.Name, c.before.Spec.Tenant, c.failed)
		}
		c.done = true
		return nil
	})
	if err != nil {
		err = errors.Join(err, s.putBack(live))
	}
	for _, c := range live {
		c.commit()
	}
	return err
}

// putBack is what swapAll does if the kernel has refused a policy. A sandbox
// that cannot be given its old policy again keeps the new one, and its record
// says so.
func (s *Supervisor) putBack(live []*change) error {
	err := eachOf(live, func(c *change) error {
		if !c.done {
			if !c.b.judged() {
				return nil
			}
			return s.cfg.Budgets.Ensure(c.b.id, c.before.Slot, c.from)
		}
		back := c.before.Clone()
		back.PolicyRev = c.after.PolicyRev + 1
		back.Log(time.Now(), "policy", "revision %d: the former policy again", back.PolicyRev)
		if err := c.apply(c.from, back.PolicyRev); err != nil {
			return err
		}
		c.done, c.before = false, back
		return nil
	})
	var recs []sandbox.Record
	for _, c := range live {
		recs = append(recs, c.record())
	}
	if err = errors.Join(err, s.cfg.Store.PutAll(recs)); err != nil {
		return fmt.Errorf("put back: %w", err)
	}
	return nil
}

// record is what holds once the change was made, or was put back.
func (c *change) record() sandbox.Record {
	if c.done {
		return c.after
	}
	return c.before
}

// commit makes what is on disk and in the kernel the sandbox's own. The caller
// holds the box's mu.
func (c *change) commit() {
	b := c.b
	if c.done {
		b.program = c.to
	}
	b.rec = c.record()
	if b.judged() { // else start sees that it moved
		b.attached = b.rec.PolicyRev
	}
	b.s.publish(b.rec.Clone(), false)
}

// apply puts a program in force if the sandbox is judged by one yet. The caller
// holds the box's mu.
func (c *change) apply(p netpol.Program, rev uint64) error {
	b := c.b
	if !b.judged() {
		return nil
	}
	return b.enforce(b.rec.Slot, p, func(learned []netpol.Learned) error {
		return b.s.cfg.Egress.SetPolicy(b.id, b.rec.Slot, p, rev, learned)
	})
}

// judged reports whether a program in the kernel judges the sandbox. The caller
// holds mu.
func (b *box) judged() bool {
	return b.rec.State == sandbox.Running || b.rec.State == sandbox.Paused
}

// enforce calls put, which puts p in force, once the kernel has its budgets and
// with what its names have taught.
func (b *box) enforce(slot uint32, p netpol.Program, put func(learned []netpol.Learned) error) error {
	if err := b.s.cfg.Budgets.Ensure(b.id, slot, p); err != nil {
		return err
	}
	return b.s.cfg.Names.Swap(b.id, p, put)
}

// atOnce is how many sandboxes are given another policy side by side.
const atOnce = 8

// eachOf calls do for all changes, some side by side, and answers the errors of
// all.
func eachOf(changes []*change, do func(*change) error) error {
	var (
		group errgroup.Group
		mu    sync.Mutex
		errs  []error
	)
	group.SetLimit(atOnce)
	for _, c := range changes {
		group.Go(func() error {
			if err := do(c); err != nil {
				mu.Lock()
				defer mu.Unlock()
				errs = append(errs, err)
			}
			return nil
		})
	}
	_ = group.Wait() // errs has them
	return errors.Join(errs...)
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
