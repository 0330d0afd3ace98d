// SPDX-License-Identifier: Apache-2.0

package supervisor

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"strings"
	"time"

	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/runtime"
)

// adopt takes over what a record says and the machine shows:
//
//	record               machine                         answer
//	Admitted, Placed     anything                        undo, Stopped: launch_failed
//	Running, Paused      task runs, same boot            enforce, verify, go on
//	Running, Paused      task ended while we were away   its true exit, teardown
//	Running, Paused      no task, or another boot        Stopped: lost, usage to the last sample
//	Stopping             anything                        go on with the teardown
//	Stopped              anything left of it             removed (sweep)
//	no record            anything                        unknown: left alone, warned of
func (b *box) adopt(ctx context.Context) *runtime.Exit {
	rec := b.record()
	if rec.State != sandbox.Running && rec.State != sandbox.Paused {
		return nil
	}
	if rec.BootID != b.s.cfg.BootID {
		b.note("lost", "the node was rebooted")
		return nil
	}
	defer b.closeLaunched()
	b.reenforce(ctx) // first: it needs no runtime, which may be away for long
	task, state := b.findTask(ctx)
	if task == nil {
		return nil
	}
	b.mu.Lock()
	b.task = task
	b.neverRan = state == runtime.StateCreated // crashed between recording Running and starting
	b.mu.Unlock()
	if state == runtime.StateCreated {
		return nil
	}
	b.closeLaunched()
	b.note("adopted", "by a restarted agent, pid %d", task.PID())
	return b.follow(ctx, task)
}

// findTask asks until the runtime gives a certain answer; nil is gone.
func (b *box) findTask(ctx context.Context) (runtime.Task, runtime.State) {
	backoff := 50 * time.Millisecond
	for {
		task, err := b.s.cfg.Runtime.Find(ctx, b.id)
		var st runtime.Status
		if err == nil {
			st, err = task.Status(ctx)
		}
		switch {
		case err == nil:
			return task, st.State
		case errors.Is(err, runtime.ErrNotFound), ctx.Err() != nil:
			return nil, ""
		}
		b.s.cfg.Log.Warn("find sandbox after restart; asking again", "sandbox", b.id, "err", err)
		if !sleep(ctx, backoff) {
			return nil, ""
		}
		backoff = min(2*backoff, 5*time.Second)
	}
}

// reenforce makes sure that an adopted sandbox is enforced with the policy
// that its tenant has today. What cannot be enforced is cut off and stopped.
func (b *box) reenforce(ctx context.Context) {
	b.s.admission.Lock() // no reload between what its tenant has today and the record
	b.repair.Lock()
	defer b.repair.Unlock()
	rec := b.record()
	prog, err := compile(b.s.Tenants(), rec.Spec)
	if err == nil && prog.Digest != rec.PolicyDigest {
		err = b.update(func(r *sandbox.Record) error {
			r.PolicyRev++
			r.PolicyDigest = prog.Digest
			r.Log(time.Now(), "policy", "revision %d, changed while the agent was away", r.PolicyRev)
			return nil
		})
	}
	if err == nil {
		b.mu.Lock()
		b.program = prog
		b.mu.Unlock()
	}
	b.s.admission.Unlock()
	if err == nil {
		err = b.reattach(ctx)
	}
	if err != nil && ctx.Err() == nil {
		b.cutOff(err)
	}
}

// reattach brings link, program and resolver to what they must be and reads
// them back. On an error the link is down, or was when it came.
func (b *box) reattach(ctx context.Context) error {
	ifindex, err := b.link(ctx)
	if err != nil {
		return err
	}
	if err := b.attach(ctx); err != nil {
		return err
	}
	switch err := b.startNames(ctx); {
	case errors.Is(err, ErrNoResolver): // a sandbox may have taken the port from its own resolver
		b.note("no_resolver", "%v", err)
	case err != nil:
		return err
	}
	if err := b.s.cfg.Egress.Verify(b.id, b.record().Slot, ifindex); err != nil {
		return err
	}
	if err := b.s.cfg.Links.Up(b.id); err != nil {
		return err
	}
	if err := b.s.cfg.Links.Verify(b.id); err != nil {
		return errors.Join(err, b.s.cfg.Links.Down(b.id))
	}
	b.verifiedNow()
	return nil
}

// cutOff takes a sandbox's link down and stops it, because its egress cannot
// be enforced.
func (b *box) cutOff(cause error) {
	rec := b.record()
	if err := b.s.cfg.Links.Down(rec.ID); err != nil {
		b.s.cfg.Log.Error("take link down", "sandbox", rec.ID, "err", err)
	}
	b.note("not_enforced", "link down: %v", cause)
	if err := b.requestStop(sandbox.StopRequest{
		Reason: sandbox.StoppedBy, By: "bulkhead", At: time.Now().UTC(),
		Message: fmt.Sprintf("egress could not be enforced: %v", cause),
	}); err != nil {
		b.s.cfg.Log.Error("record a stop", "sandbox", rec.ID, "err", err)
	}
}

// sweep looks for what is left on the machine. What belongs to a record that
// says Stopped is removed; what belongs to no record is named and left alone.
func (s *Supervisor) sweep(ctx context.Context) {
	found := map[string][]string{}
	for _, l := range []struct {
		kind string
		list func() ([]string, error)
	}{
		{"container", func() ([]string, error) { return s.cfg.Runtime.List(ctx) }},
		{"link", s.cfg.Links.List},
		{"egress program", s.cfg.Egress.List},
		{"cgroup", s.cfg.Cgroups.List},
	} {
		ids, err := l.list()
		if err != nil {
			s.cfg.Log.Warn("list what is on the machine", "kind", l.kind, "err", err)
		}
		for _, id := range ids {
			found[id] = append(found[id], l.kind)
		}
	}
	for id, kinds := range found {
		sort.Strings(kinds)
		what := strings.Join(kinds, ", ")
		b, err := s.box(id)
		switch {
		case err != nil:
			s.warn("unknown "+id, fmt.Sprintf("unknown sandbox %s on this machine (%s): no record of it here, so it is left alone", id, what))
			s.cfg.Log.Warn("unknown sandbox left alone", "sandbox", id, "found", what)
		case !b.record().State.Live():
			s.cfg.Log.Warn("removing what was left of a stopped sandbox", "sandbox", id, "found", what)
			for i, steps := 0, b.steps(); i < len(steps); i++ {
				if err := steps[len(steps)-1-i].undo(ctx); err != nil {
					s.cfg.Log.Warn("remove leftover", "sandbox", id, "err", err)
				}
			}
		}
	}
}
