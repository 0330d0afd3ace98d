// SPDX-License-Identifier: Apache-2.0

package supervisor

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sync/errgroup"

	"github.com/bulkheadhq/bulkhead/agent/sandbox"
)

// verifyLoop asks the kernel again and again whether every running sandbox is
// still enforced: its program, its link, and the second layer that all links
// share. If not, its link goes down first and is brought back only with all of
// that in place.
func (s *Supervisor) verifyLoop(ctx context.Context) {
	for sleep(ctx, s.cfg.VerifyEvery) {
		s.verifyAll(ctx)
	}
}

func (s *Supervisor) verifyAll(ctx context.Context) {
	var running []*box
	for _, rec := range s.List() {
		if rec.State != sandbox.Running {
			continue
		}
		if b, err := s.box(rec.ID); err == nil {
			running = append(running, b)
		}
	}
	shared := s.verifyShared(running)
	for _, b := range running {
		b.verify(ctx, shared)
	}
}

// verifyShared looks at what all links share and puts it right, all links down
// meanwhile. It answers what is still wrong.
func (s *Supervisor) verifyShared(running []*box) error {
	const key = "second layer"
	err := s.cfg.Links.VerifyTable()
	if err == nil {
		s.warn(key, "")
		return nil
	}
	s.cfg.Log.Error("the second layer is not as it must be; links go down until it is", "err", err)
	s.warn(key, fmt.Sprintf("the second layer is not as it must be, sandboxes are cut off until it is: %v", err))
	var group errgroup.Group
	group.SetLimit(atOnce)
	for _, b := range running {
		group.Go(func() error { b.lockedDrift(err); return nil })
	}
	_ = group.Wait() // none answers an error
	if err = s.cfg.Links.Restore(); err == nil {
		err = s.cfg.Links.VerifyTable()
	}
	if err == nil {
		s.warn(key, "")
	}
	return err
}

// lockedDrift is drift for a caller that does not hold repair.
func (b *box) lockedDrift(cause error) {
	b.repair.Lock()
	defer b.repair.Unlock()
	if b.watched() {
		b.drift(cause)
	}
}

// watched reports whether the watchdog has a say: the sandbox runs, and has
// been adopted, which verifies too. The caller holds repair.
func (b *box) watched() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.rec.State == sandbox.Running && b.ifindex != 0
}

// drift takes the link down and says why. The caller holds repair.
func (b *box) drift(cause error) {
	if err := b.s.cfg.Links.Down(b.id); err != nil {
		b.s.cfg.Log.Error("take link down", "sandbox", b.id, "err", err)
	}
	b.mu.Lock()
	b.degraded = cause.Error()
	b.mu.Unlock()
	if b.drifted {
		return
	}
	b.drifted = true
	b.note("drift", "link down until repaired: %v", cause)
	b.s.warn("degraded "+b.id, fmt.Sprintf("sandbox %s (%s) has no network until it is repaired: %v", b.record().Spec.Name, b.id, cause))
}

// verify asks for one sandbox and repairs it. shared is what is wrong with what
// it shares with others, which it cannot put right.
func (b *box) verify(ctx context.Context, shared error) {
	b.repair.Lock()
	defer b.repair.Unlock()
	if !b.watched() {
		return
	}
	b.mu.Lock()
	slot, ifindex := b.rec.Slot, b.ifindex
	b.mu.Unlock()
	if !b.drifted { // else the link is down, and a repair begun
		err := errors.Join(shared, b.s.cfg.Egress.Verify(b.id, slot, ifindex), b.s.cfg.Links.Verify(b.id))
		if err == nil {
			b.verifiedNow()
		}
		if err == nil || !b.watched() {
			return
		}
		b.drift(err)
	}
	// A want of memory or of descriptors passes; until then the link is down.
	err := shared
	if err == nil {
		err = b.reattach(ctx)
	}
	if err != nil {
		if b.repairs++; b.repairs == maxRepairs {
			b.cutOff(err)
		}
		return
	}
	b.repairs, b.drifted = 0, false
	b.note("repaired", "egress enforced again")
	b.s.warn("degraded "+b.id, "")
}

// maxRepairs is how often a repair may fail before the sandbox is stopped.
const maxRepairs = 5
