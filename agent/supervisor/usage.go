// SPDX-License-Identifier: Apache-2.0

package supervisor

import (
	"context"
	"fmt"
	"maps"
	"time"

	"github.com/bulkheadhq/bulkhead/agent/meter"
	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

// meterLoop takes a sample of every running sandbox, again and again.
func (s *Supervisor) meterLoop(ctx context.Context) {
	for {
		if err := s.MeterNow(ctx, false); err != nil && ctx.Err() == nil {
			s.cfg.Log.Error("record usage; the kernel keeps counting", "err", err)
			s.warn("usage", fmt.Sprintf("usage cannot be recorded, the kernel keeps counting: %v", err))
		} else {
			s.warn("usage", "")
		}
		if !sleep(ctx, s.cfg.Interval) {
			return
		}
	}
}

// MeterNow makes the usage of every running sandbox up to now durable: marks
// first, the spool second. flush closes the intervals of idle counters too.
func (s *Supervisor) MeterNow(ctx context.Context, flush bool) error {
	s.metering.Lock()
	defer s.metering.Unlock()
	if err := s.settle(ctx); err != nil {
		return err
	}
	next := map[string]meter.Mark{}
	var recs []*usagev1.Record
	for _, rec := range s.List() {
		if rec.State != sandbox.Running && rec.State != sandbox.Paused || rec.Started.IsZero() || rec.Final != nil {
			continue
		}
		if rec.BootID != s.cfg.BootID {
			continue // lost: adoption closes it
		}
		sample := s.sample(rec)
		more, mark, err := meter.Advance(s.subject(rec), s.mark(rec), sample, flush, false)
		if err != nil {
			s.cfg.Log.Error("meter sandbox", "sandbox", rec.ID, "err", err)
			continue
		}
		if len(more) > 0 {
			next[rec.ID] = mark
			recs = append(recs, more...)
		}
	}
	return s.commit(ctx, next, recs)
}

// meterFinal makes the last usage of a sandbox durable. It may be repeated.
func (s *Supervisor) meterFinal(ctx context.Context, rec sandbox.Record) error {
	s.metering.Lock()
	defer s.metering.Unlock()
	if err := s.settle(ctx); err != nil {
		return err
	}
	mark := s.mark(rec)
	if !mark.Closed {
		recs, next, err := meter.Advance(s.subject(rec), mark, *rec.Final, true, true)
		if err != nil {
			return err
		}
		if err := s.commit(ctx, map[string]meter.Mark{rec.ID: next}, recs); err != nil {
			return err
		}
		mark = next
	}
	if len(mark.Pending) == 0 {
		return nil
	}
	// They are in the spool. Once the spool forgets the sandbox nothing must
	// offer them again.
	mark.Pending = nil
	if err := s.cfg.Store.PutMarks(map[string]meter.Mark{rec.ID: mark}); err != nil {
		return err
	}
	s.marks[rec.ID] = mark
	return nil
}

// settle appends records whose mark is on disk and which the spool may not
// have: after a restart, and after an append that failed.
func (s *Supervisor) settle(ctx context.Context) error {
	if s.settled {
		return nil
	}
	var recs []*usagev1.Record
	for id, m := range s.marks {
		more, err := m.Records()
		if err != nil {
			return fmt.Errorf("sandbox %s: %w", id, err)
		}
		recs = append(recs, more...)
	}
	if err := s.spool(ctx, recs); err != nil {
		return err
	}
	s.settled = true
	return nil
}

// maxBatch is how many records go into the spool at once, give or take those of
// one sandbox: the smallest spool has room for so many.
const maxBatch = 512

// spool appends records. Those of one sandbox stand together, and go together:
// the spool takes a batch that ends before what it has for a contradiction.
func (s *Supervisor) spool(ctx context.Context, recs []*usagev1.Record) error {
	for len(recs) > 0 {
		n := min(len(recs), maxBatch)
		for n < len(recs) && recs[n].Sandbox == recs[n-1].Sandbox {
			n++
		}
		if err := s.cfg.Spool.Append(ctx, recs[:n]); err != nil {
			return err
		}
		recs = recs[n:]
	}
	return nil
}

// commit puts marks on disk and then their records into the spool.
func (s *Supervisor) commit(ctx context.Context, next map[string]meter.Mark, recs []*usagev1.Record) error {
	if len(next) == 0 {
		return nil
	}
	if err := s.cfg.Store.PutMarks(next); err != nil {
		return err
	}
	maps.Copy(s.marks, next)
	s.settled = false
	if err := s.fault("usage:marked"); err != nil {
		return err
	}
	if err := s.spool(ctx, recs); err != nil {
		return err
	}
	s.settled = true
	return s.fault("usage:spooled")
}

// mark of a sandbox; one that has none yet begins where it was started.
func (s *Supervisor) mark(rec sandbox.Record) meter.Mark {
	if m, ok := s.marks[rec.ID]; ok {
		return m
	}
	return meter.Begin(rec.Started, rec.StartedBoot, rec.BootID, uint64(rec.Spec.Limits.MemoryBytes))
}

func (s *Supervisor) subject(rec sandbox.Record) meter.Subject {
	return meter.Subject{
		Source:      s.cfg.Source,
		Sandbox:     rec.ID,
		SandboxName: rec.Spec.Name,
		Tenant:      string(rec.Spec.Tenant),
		WorkloadRef: rec.Spec.WorkloadRef,
		PolicyRev:   rec.PolicyRev,
		Generation:  1,
	}
}

// sample reads a sandbox's counters. What cannot be read is nil and said.
func (s *Supervisor) sample(rec sandbox.Record) meter.Sample {
	out := meter.Sample{
		Wall:           time.Now().UTC(),
		Boot:           s.cfg.BootTime(),
		BootID:         s.cfg.BootID,
		MemoryReserved: uint64(rec.Spec.Limits.MemoryBytes),
	}
	if t, err := s.cfg.Egress.Traffic(rec.Slot); err != nil {
		s.cfg.Log.Warn("read egress counters", "sandbox", rec.ID, "err", err)
	} else {
		out.EgressBytes, out.IngressBytes = &t.EgressBytes, &t.IngressBytes
	}
	if u, err := s.cfg.Cgroups.Usage(string(rec.Spec.Tenant), rec.ID); err != nil {
		s.cfg.Log.Warn("read cgroup", "sandbox", rec.ID, "err", err)
	} else {
		out.CPUNs, out.MemoryUsed = u.CPUNs, u.MemoryUsed
	}
	return out
}

// lastSample is sample for a sandbox that has ended. After a reboot there is
// nothing left to read.
func (s *Supervisor) lastSample(rec sandbox.Record) meter.Sample {
	if rec.BootID != s.cfg.BootID {
		return meter.Sample{Wall: time.Now().UTC(), Boot: s.cfg.BootTime(), BootID: s.cfg.BootID}
	}
	return s.sample(rec)
}

// Usage answers the meters of every sandbox that has not been deleted, up to
// its last record.
func (s *Supervisor) Usage() map[string]meter.Mark {
	s.metering.Lock()
	defer s.metering.Unlock()
	return maps.Clone(s.marks)
}
