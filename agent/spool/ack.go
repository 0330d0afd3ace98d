// SPDX-License-Identifier: Apache-2.0

package spool

import (
	"fmt"
	"os"
	"path/filepath"
)

// Ack says that the gateway has everything up to and including seq. It is on
// disk when Ack returns; segments that hold nothing else are then removed. An
// acknowledgement that says nothing new changes nothing. ErrUnknown if seq was
// never spooled.
//
// If only the removal of segments fails the acknowledgement stands, and the
// next one tries again.
func (s *Spool) Ack(seq uint64) error {
	s.io.Lock()
	defer s.io.Unlock()
	s.mu.Lock()
	closed, acked, last := s.closed, s.acked, s.last
	s.mu.Unlock()
	switch {
	case closed:
		return ErrClosed
	case seq > last:
		return fmt.Errorf("acknowledge usage: %w: %d, the last one is %d", ErrUnknown, seq, last)
	case seq > acked:
		f, err := s.replace("ack", filepath.Join(s.cfg.Dir, "ack"), encodeAck(seq))
		if err != nil {
			return fmt.Errorf("acknowledge usage up to %d: %w", seq, err)
		}
		if err := f.Close(); err != nil {
			return fmt.Errorf("acknowledge usage up to %d: %w", seq, err)
		}
		s.mu.Lock()
		s.acked = seq
		s.mu.Unlock()
	}
	return s.prune()
}

// prune removes segments that are wholly acknowledged. When the spool is full
// and everything is acknowledged the newest one goes too. The caller holds io.
func (s *Spool) prune() error {
	s.mu.Lock()
	acked, last, full := s.acked, s.last, s.full
	s.mu.Unlock()
	newest := s.segments[len(s.segments)-1]
	if full && acked == last && newest.first <= last {
		if err := s.roll(); err != nil {
			return err
		}
	}
	for {
		s.mu.Lock()
		if len(s.segments) < 2 || s.segments[1].first-1 > s.acked {
			s.mu.Unlock()
			return nil
		}
		g := s.segments[0]
		// Readers must not be sent to a file that is about to go.
		s.segments = s.segments[1:]
		s.bytes -= g.size
		s.full = false
		s.mu.Unlock()
		if err := s.removeSegment(g); err != nil {
			s.mu.Lock()
			s.segments = append([]*segment{g}, s.segments...)
			s.bytes += g.size
			s.mu.Unlock()
			return err
		}
	}
}

func (s *Spool) removeSegment(g *segment) error {
	if err := s.step("prune:remove", g.path); err != nil {
		return err
	}
	if err := os.Remove(g.path); err != nil {
		return fmt.Errorf("remove acknowledged spool segment: %w", err)
	}
	return nil
}
