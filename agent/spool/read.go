// SPDX-License-Identifier: Apache-2.0

package spool

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sort"

	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

// errStop ends a walk early.
var errStop = errors.New("stop")

// view is what a reader saw of the spool at one moment.
type view struct {
	segments []segment
	last     uint64
	place    place
}

func (s *Spool) view() view {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := view{last: s.last, place: s.place}
	for _, g := range s.segments {
		v.segments = append(v.segments, *g)
	}
	return v
}

// end is the number after the last record of segment i.
func (v view) end(i int) uint64 {
	if i+1 < len(v.segments) {
		return v.segments[i+1].first
	}
	return v.last + 1
}

// Read answers up to limit records from node_seq from on, in order; none if
// from is past the last one. Only durable records are answered. Errors:
// ErrPruned if from is acknowledged and gone; a CorruptError.
func (s *Spool) Read(from uint64, limit int) ([]*usagev1.Record, error) {
	for {
		recs, err := s.read(s.view(), from, limit)
		// A segment that went away meanwhile was acknowledged; look again.
		if errors.Is(err, fs.ErrNotExist) && s.Status().First > from {
			continue
		}
		return recs, err
	}
}

func (s *Spool) read(v view, from uint64, limit int) ([]*usagev1.Record, error) {
	if first := v.segments[0].first; from < first {
		return nil, fmt.Errorf("read usage from %d: %w: the first one kept is %d", from, ErrPruned, first)
	}
	if from > v.last || limit <= 0 {
		return nil, nil
	}
	var recs []*usagev1.Record
	i := sort.Search(len(v.segments), func(i int) bool { return v.segments[i].first > from }) - 1
	for ; i < len(v.segments) && len(recs) < limit && from <= v.last; i++ {
		at := place{segment: v.segments[i].first, seq: v.segments[i].first, offset: v.segments[i].body}
		if v.place.segment == at.segment && v.place.seq <= from {
			at = v.place
		}
		next, err := v.walkFrom(i, at, func(r *usagev1.Record) error {
			if r.NodeSeq < from {
				return nil
			}
			if len(recs) == limit {
				return errStop
			}
			recs = append(recs, r)
			from++
			return nil
		})
		if err != nil {
			return nil, err
		}
		s.mu.Lock()
		s.place = next
		s.mu.Unlock()
	}
	return recs, nil
}

// walkFrom calls fn for the records of segment i from a place on, at least for
// those not before the place. It answers the place of the first record that fn
// refused with errStop, or the segment's end, which must be where the next
// segment begins.
func (v view) walkFrom(i int, at place, fn func(*usagev1.Record) error) (place, error) {
	g := &v.segments[i]
	f, err := os.Open(g.path)
	if err != nil {
		return at, fmt.Errorf("open spool segment: %w", err)
	}
	defer func() { _ = f.Close() }() // only read
	end := v.end(i)
	_, err = walk(f, at.offset, g.size, func(off int64, fr frame) error {
		at.offset = off
		if at.seq == end {
			return errStop // whatever follows was never durable
		}
		if fr.kind != typeBatch {
			return nil
		}
		first, count, err := batchRange(fr.payload)
		if err != nil {
			return g.corrupt(off, err)
		}
		if first > at.seq {
			return &CorruptError{File: g.path, Offset: off, Reason: fmt.Sprintf("node_seq %d is missing", at.seq)}
		}
		err = decodeBatch(fr.payload, at.seq, func(r *usagev1.Record) error {
			if err := fn(r); err != nil {
				return err
			}
			at.seq = r.NodeSeq + 1
			return nil
		})
		if err == nil {
			at.seq, at.offset = first+uint64(count), off+fr.size()
		}
		return err
	})
	var torn *frameError
	switch {
	case errors.Is(err, errStop), errors.As(err, &torn) && at.seq == end:
		return at, nil
	case err != nil:
		return at, g.corrupt(at.offset, err)
	case at.seq != end:
		return at, &CorruptError{File: g.path, Offset: g.size, Reason: fmt.Sprintf("node_seq %d is missing", at.seq)}
	}
	return at, nil
}

// Scan calls fn for every record kept, acknowledged or not, in order, and
// checks the hash chain on the way. It ends with fn's first error.
func (s *Spool) Scan(fn func(*usagev1.Record) error) error {
	v := s.view()
	for i := range v.segments {
		g := &v.segments[i]
		seq, hash := g.first-1, g.hash
		var stopped error
		_, err := v.walkFrom(i, place{segment: g.first, seq: g.first, offset: g.body}, func(r *usagev1.Record) error {
			if err := usagev1.VerifyChain(seq, hash[:], r); err != nil {
				return err
			}
			seq, hash = r.NodeSeq, [32]byte(r.Hash)
			if stopped = fn(r); stopped != nil {
				return errStop
			}
			return nil
		})
		if errors.Is(err, fs.ErrNotExist) && s.Status().First > g.first {
			continue // acknowledged and removed since
		}
		if err := errors.Join(err, stopped); err != nil {
			return err
		}
		if i+1 < len(v.segments) && v.segments[i+1].hash != hash {
			return &CorruptError{File: v.segments[i+1].path, Reason: "does not continue the hash chain of the segment before"}
		}
	}
	return nil
}

// HashAt answers the hash of a record that is kept, or of the one before the
// first kept; the zero hash for 0. Errors: ErrPruned, ErrUnknown.
func (s *Spool) HashAt(seq uint64) ([]byte, error) {
	v := s.view()
	if seq > v.last {
		return nil, fmt.Errorf("%w: %d, the last one is %d", ErrUnknown, seq, v.last)
	}
	for _, g := range v.segments {
		if g.first == seq+1 {
			return append([]byte(nil), g.hash[:]...), nil
		}
	}
	recs, err := s.Read(seq, 1)
	if err != nil {
		return nil, err
	}
	return recs[0].Hash, nil
}
