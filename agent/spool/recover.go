// SPDX-License-Identifier: Apache-2.0

package spool

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strings"

	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

// Open locks the directory, makes it if need be, and recovers what a crash
// left. It answers ErrLocked if another process has it, a CorruptError if
// durable data is missing, and an error if the directory belongs to another node.
func Open(cfg Config) (*Spool, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	if err := makeDir(cfg.Dir); err != nil {
		return nil, err
	}
	lock, err := lockDir(cfg.Dir)
	if err != nil {
		return nil, err
	}
	s := &Spool{cfg: cfg, lock: lock, index: make(index), changed: make(chan struct{})}
	if err := s.recover(); err != nil {
		if s.file != nil {
			err = errors.Join(err, s.file.Close())
		}
		return nil, errors.Join(err, lock.Close())
	}
	return s, nil
}

func (c *Config) complete() error {
	if c.Dir == "" || c.NodeID == "" {
		return errors.New("open spool: directory and node id are required")
	}
	if len(c.NodeID) > math.MaxUint16 {
		return errors.New("open spool: node id is too long")
	}
	if c.LimitBytes == 0 {
		c.LimitBytes = DefaultLimitBytes
	}
	if c.SegmentBytes == 0 {
		c.SegmentBytes = min(DefaultSegmentBytes, c.LimitBytes/segmentsInLimit)
	}
	if c.SegmentBytes < minSegmentBytes || c.SegmentBytes > maxPayload || c.LimitBytes/segmentsInLimit < c.SegmentBytes {
		return fmt.Errorf("open spool: segments of %d bytes in a limit of %d: want at least %d, at most %d, and %d of them in the limit",
			c.SegmentBytes, c.LimitBytes, minSegmentBytes, maxPayload, segmentsInLimit)
	}
	return nil
}

func makeDir(dir string) error {
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		if err := makeDir(filepath.Dir(dir)); err != nil {
			return err
		}
		err = os.Mkdir(dir, 0o700)
	}
	if err != nil {
		return fmt.Errorf("make spool directory: %w", err)
	}
	if err := syncDir(filepath.Dir(dir)); err != nil {
		return fmt.Errorf("sync parent of spool directory: %w", err)
	}
	return nil
}

func (s *Spool) recover() error {
	if err := s.removeTemps(); err != nil {
		return err
	}
	var err error
	if s.segments, err = listSegments(s.cfg.Dir); err != nil {
		return err
	}
	ackFile, err := os.ReadFile(filepath.Join(s.cfg.Dir, "ack"))
	switch {
	case err == nil:
		var ok bool
		if s.acked, ok = decodeAck(ackFile); !ok {
			s.recovered.AckLost = true
		}
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("read spool acknowledgement: %w", err)
	}
	if len(s.segments) == 0 {
		if s.acked > 0 || s.recovered.AckLost {
			return &CorruptError{File: s.cfg.Dir, Reason: "records were acknowledged and there is no segment"}
		}
		return s.roll()
	}
	// Segments that an acknowledgement covers are done with, and may have holes
	// between them where some were already removed.
	for len(s.segments) > 1 && s.segments[1].first-1 <= s.acked {
		if err := s.removeSegment(s.segments[0]); err != nil {
			return err
		}
		s.segments = s.segments[1:]
	}
	if err := s.openNewest(); err != nil {
		return err
	}
	if err := s.checkOlder(); err != nil {
		return err
	}
	newest := s.segments[len(s.segments)-1]
	if s.acked > s.last {
		return &CorruptError{File: newest.path, Offset: newest.size,
			Reason: fmt.Sprintf("node_seq %d is acknowledged and the last one found is %d", s.acked, s.last)}
	}
	if first := s.segments[0].first; s.recovered.AckLost {
		s.acked = first - 1
	} else if first-1 > s.acked {
		return &CorruptError{File: s.cfg.Dir,
			Reason: fmt.Sprintf("node_seq %d to %d are missing and were not acknowledged", s.acked+1, first-1)}
	}
	for _, g := range s.segments {
		s.bytes += g.size
	}
	return nil
}

func (s *Spool) removeTemps() error {
	entries, err := os.ReadDir(s.cfg.Dir)
	if err != nil {
		return fmt.Errorf("read spool directory: %w", err)
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), tempSuffix) {
			if err := os.Remove(filepath.Join(s.cfg.Dir, e.Name())); err != nil {
				return fmt.Errorf("remove unfinished spool file: %w", err)
			}
		}
	}
	return nil
}

// openNewest reads the newest segment whole: index, chain, and where its last
// whole batch ends.
func (s *Spool) openNewest() error {
	g := s.segments[len(s.segments)-1]
	f, err := os.OpenFile(g.path, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("open spool segment: %w", err)
	}
	s.file = f
	h, err := g.openHeader(f, s.index)
	if err != nil {
		return err
	}
	if h.nodeID != s.cfg.NodeID {
		return fmt.Errorf("open spool %s: it belongs to node %s, this is %s", s.cfg.Dir, h.nodeID, s.cfg.NodeID)
	}
	s.last, s.lastHash = g.first-1, g.hash
	end, err := walk(f, g.body, g.size, func(off int64, fr frame) error {
		switch fr.kind {
		case typeBatch:
			err := decodeBatch(fr.payload, 0, func(r *usagev1.Record) error {
				if err := usagev1.VerifyChain(s.last, s.lastHash[:], r); err != nil {
					return err
				}
				if err := s.index.note(r); err != nil {
					return err
				}
				s.last, s.lastHash = r.NodeSeq, [32]byte(r.Hash)
				return nil
			})
			if err != nil {
				return g.corrupt(off, err)
			}
			return nil
		case typeForget:
			c := cursor{b: fr.payload}
			delete(s.index, c.text())
			return nil
		}
		return &CorruptError{File: g.path, Offset: off, Reason: fmt.Sprintf("frame of unexpected type %d", fr.kind)}
	})
	var torn *frameError
	switch {
	case errors.As(err, &torn):
		if err := s.cutTail(g, end, torn); err != nil {
			return err
		}
	case err != nil:
		return err
	}
	// What was whole may still only be in the page cache of a process that was
	// killed before its fsync.
	if err := s.sync("recover:fsync", f); err != nil {
		return err
	}
	g.size = end
	s.written = end
	return nil
}

// cutTail removes an unfinished write, after making sure that it is one.
func (s *Spool) cutTail(g *segment, end int64, torn *frameError) error {
	proof, err := provesDurable(s.file, end, g.size)
	if err != nil {
		return fmt.Errorf("read spool segment %s: %w", g.path, err)
	}
	if proof {
		return &CorruptError{File: g.path, Offset: end, Reason: torn.Reason + ", and what follows shows that it was durable"}
	}
	if s.acked > s.last {
		return &CorruptError{File: g.path, Offset: end,
			Reason: fmt.Sprintf("%s, and node_seq %d is acknowledged while the last one found is %d", torn.Reason, s.acked, s.last)}
	}
	if err := s.step("recover:truncate", g.path); err != nil {
		return err
	}
	if err := s.file.Truncate(end); err != nil {
		return fmt.Errorf("truncate spool segment: %w", err)
	}
	s.recovered.TornFile, s.recovered.TornBytes = g.path, g.size-end
	return nil
}

// checkOlder reads the headers of all segments but the newest. Their records
// are checked when they are read.
func (s *Spool) checkOlder() error {
	for _, g := range s.segments[:len(s.segments)-1] {
		f, err := os.Open(g.path)
		if err != nil {
			return fmt.Errorf("open spool segment: %w", err)
		}
		_, err = g.openHeader(f, nil)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}
