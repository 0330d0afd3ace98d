// SPDX-License-Identifier: Apache-2.0

package spool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"google.golang.org/protobuf/proto"

	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

// request is one Append that waits for its turn.
type request struct {
	recs []*usagev1.Record
	turn chan struct{} // lead the next write; depth 1 so that the sender never waits
	done chan error    // the outcome; depth 1 so that the sender never waits
}

// Append numbers the records, links them and writes them as one batch. They are
// safe when it returns nil. Records that are already spooled are dropped. The
// caller's records are not changed.
//
// Errors: ErrFull at the limit; ErrConflict and ErrSkipped, see the package
// comment; ErrTooLarge; usagev1.ErrInvalid; an error of the disk, after which
// the same batch may be tried again; the context's, if the batch was still
// waiting for its turn. After an error nothing of the batch is kept.
//
// Concurrent calls share one fsync.
func (s *Spool) Append(ctx context.Context, recs []*usagev1.Record) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	req := &request{turn: make(chan struct{}, 1), done: make(chan error, 1)}
	for _, r := range recs {
		if err := usagev1.Validate(r); err != nil {
			return fmt.Errorf("append usage: %w", err)
		}
		c := proto.CloneOf(r)
		c.NodeSeq, c.PrevHash, c.Hash = 0, nil, nil
		req.recs = append(req.recs, c)
	}
	if len(recs) == 0 {
		return nil
	}

	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return ErrClosed
	}
	s.waiting = append(s.waiting, req)
	lead := !s.leading
	s.leading = true
	s.mu.Unlock()

	if !lead {
		select {
		case err := <-req.done:
			return err
		case <-req.turn:
		case <-ctx.Done():
			if s.withdraw(req) {
				return ctx.Err()
			}
			select {
			case err := <-req.done:
				return err
			case <-req.turn:
			}
		}
	}
	s.writeWaiting()
	return <-req.done
}

// withdraw takes a request back that nobody has begun to write.
func (s *Spool) withdraw(req *request) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	at := slices.Index(s.waiting, req)
	if at < 0 || len(req.turn) > 0 {
		return false
	}
	s.waiting = slices.Delete(s.waiting, at, at+1)
	return true
}

// writeWaiting writes all that waits as one group, then gives the lead to the
// first that came meanwhile.
func (s *Spool) writeWaiting() {
	s.io.Lock()
	s.mu.Lock()
	group := s.waiting
	s.waiting = nil
	closed := s.closed
	s.mu.Unlock()

	var outcome []error
	if closed {
		outcome = slices.Repeat([]error{ErrClosed}, len(group))
	} else {
		outcome = s.writeGroup(group)
	}
	s.io.Unlock()
	for i, req := range group {
		req.done <- outcome[i]
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.waiting) == 0 {
		s.leading = false
		return
	}
	s.waiting[0].turn <- struct{}{}
}

// staged is what a group will have changed once it is durable.
type staged struct {
	buf  []byte
	last uint64
	hash [32]byte
	over index
}

// writeGroup answers one outcome for each request. The caller holds io.
func (s *Spool) writeGroup(group []*request) []error {
	outcome := make([]error, len(group))
	for from := 0; from < len(group); {
		from = s.writePart(group, from, outcome)
	}
	return outcome
}

// writePart writes requests from one index on, as many as fit into one write,
// and answers where the next write begins.
func (s *Spool) writePart(group []*request, from int, outcome []error) int {
	if err := s.ready(); err != nil {
		for i := from; i < len(group); i++ {
			outcome[i] = err
		}
		return len(group)
	}
	limit := min(maxGroupBytes, s.cfg.SegmentBytes)
	st := staged{last: s.last, hash: s.lastHash, over: make(index)}
	i := from
	for ; i < len(group) && int64(len(st.buf)) < limit; i++ {
		err := s.stage(&st, group[i])
		if errors.Is(err, ErrFull) {
			if len(st.buf) > 0 {
				break // what is staged goes first
			}
			var freed bool
			if freed, err = s.reclaim(err); freed {
				err = s.stage(&st, group[i])
			}
		}
		outcome[i] = err
	}
	if len(st.buf) == 0 {
		return i
	}
	if err := s.commit(&st); err != nil {
		// Also those that had nothing new: it may have been part of this write.
		for k := from; k < i; k++ {
			if outcome[k] == nil {
				outcome[k] = err
			}
		}
	}
	return i
}

// ready puts right what an earlier failure left and begins a new segment if one
// is due.
func (s *Spool) ready() error {
	if s.dirty {
		if err := s.cutBack(); err != nil {
			return err
		}
	}
	g := s.segments[len(s.segments)-1]
	if s.mustRoll || s.written-g.body >= s.cfg.SegmentBytes {
		return s.roll()
	}
	return nil
}

// stage adds one request to the group.
func (s *Spool) stage(st *staged, req *request) error {
	fresh, next, err := s.index.fresh(req.recs, st.over)
	if err != nil {
		return fmt.Errorf("append usage: %w", err)
	}
	if len(fresh) == 0 {
		return nil
	}
	last, hash := st.last, st.hash
	for _, r := range fresh {
		r.NodeSeq, r.PrevHash = last+1, slices.Clone(hash[:])
		r.Hash = usagev1.Hash(r.PrevHash, r)
		last, hash = r.NodeSeq, [32]byte(r.Hash)
	}
	payload, err := encodeBatch(fresh)
	if err != nil {
		return err
	}
	f := frame{kind: typeBatch, durable: s.segments[len(s.segments)-1].size, payload: payload}
	if most := min(maxPayload, s.cfg.LimitBytes/2); f.size() > most {
		return fmt.Errorf("append usage: %w: %d bytes, at most %d", ErrTooLarge, f.size(), most)
	}
	if s.bytes+int64(len(st.buf))+f.size() > s.cfg.LimitBytes {
		return fmt.Errorf("append usage: %w: %d of %d bytes used", ErrFull, s.bytes, s.cfg.LimitBytes)
	}
	st.buf = appendFrame(st.buf, f)
	st.last, st.hash = last, hash
	st.over.merge(next)
	return nil
}

// reclaim makes room in a full spool if there is any to be had. It answers false
// and why if there is none.
func (s *Spool) reclaim(why error) (bool, error) {
	s.mu.Lock()
	s.full = true
	s.mu.Unlock()
	if err := s.prune(); err != nil {
		return false, errors.Join(why, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.full {
		return false, why
	}
	return true, nil
}

// commit makes the group durable and then visible.
func (s *Spool) commit(st *staged) error {
	s.dirty = true
	if err := s.write("append:write", s.file, st.buf, s.written); err != nil {
		return s.undo(err)
	}
	if err := s.sync("append:fsync", s.file); err != nil {
		// The kernel may have dropped the pages and forgotten it.
		s.mustRoll = true
		return s.undo(err)
	}
	s.dirty = false
	s.written += int64(len(st.buf))
	s.index.merge(st.over)

	s.mu.Lock()
	defer s.mu.Unlock()
	g := s.segments[len(s.segments)-1]
	s.bytes += s.written - g.size
	g.size = s.written
	s.last, s.lastHash = st.last, st.hash
	s.full = false
	close(s.changed)
	s.changed = make(chan struct{})
	return nil
}

// undo takes back a write that failed. If that fails too, the next append tries
// again before it writes.
func (s *Spool) undo(err error) error {
	return errors.Join(fmt.Errorf("append usage: %w", err), s.cutBack())
}

// cutBack removes everything behind the durable end of the newest segment.
func (s *Spool) cutBack() error {
	g := s.segments[len(s.segments)-1]
	err := s.step("append:truncate", g.path)
	if err == nil {
		if err = s.file.Truncate(g.size); err != nil {
			err = fmt.Errorf("append:truncate: %w", err)
		}
	}
	if err == nil {
		err = s.sync("append:truncsync", s.file)
	}
	if err != nil {
		err = fmt.Errorf("take back an unfinished append: %w", err)
	} else {
		s.written, s.dirty = g.size, false
	}
	s.mu.Lock()
	s.broken = err
	s.mu.Unlock()
	return err
}

// roll begins a new segment. Until that has worked the old one gets no more
// data, since the new one may already be in the directory.
func (s *Spool) roll() error {
	s.mustRoll = true
	h := header{first: s.last + 1, prevHash: s.lastHash, nodeID: s.cfg.NodeID}
	content := encodeSegment(h, s.index)
	path := segmentPath(s.cfg.Dir, h.first)
	f, err := s.replace("segment", path, content)
	if err != nil {
		return fmt.Errorf("begin spool segment %d: %w", h.first, err)
	}
	// f was opened under its temporary name; open it by the name it has now.
	if err := f.Close(); err != nil {
		return fmt.Errorf("begin spool segment %d: %w", h.first, err)
	}
	if f, err = os.OpenFile(path, os.O_RDWR, 0); err != nil {
		return fmt.Errorf("begin spool segment %d: %w", h.first, err)
	}
	old := s.file
	s.file, s.written, s.mustRoll, s.dirty = f, int64(len(content)), false, false

	s.mu.Lock()
	if n := len(s.segments); n > 0 && s.segments[n-1].first == h.first {
		s.bytes -= s.segments[n-1].size
		s.segments = s.segments[:n-1]
	}
	size := int64(len(content))
	s.segments = append(slices.Clip(s.segments), &segment{first: h.first, path: path, body: size, size: size, hash: h.prevHash})
	s.bytes += size
	s.mu.Unlock()
	if old != nil {
		// Everything in it is durable or was refused.
		return old.Close()
	}
	return nil
}

// Forget drops what the spool knows of a sandbox whose last record is spooled
// and whose meter mark is deleted: a record of it that comes later counts as
// new. Its spooled records stay.
func (s *Spool) Forget(sandbox string) error {
	s.io.Lock()
	defer s.io.Unlock()
	s.mu.Lock()
	closed := s.closed
	s.mu.Unlock()
	if closed {
		return ErrClosed
	}
	if s.index[sandbox] == nil {
		return nil
	}
	if err := s.ready(); err != nil {
		return fmt.Errorf("forget %s: %w", sandbox, err)
	}
	g := s.segments[len(s.segments)-1]
	b := appendFrame(nil, frame{kind: typeForget, durable: g.size, payload: appendText(nil, sandbox)})
	if s.bytes+int64(len(b)) <= s.cfg.LimitBytes {
		if err := s.write("forget:write", s.file, b, s.written); err != nil {
			s.dirty = true
			return errors.Join(fmt.Errorf("forget %s: %w", sandbox, err), s.cutBack())
		}
		s.written += int64(len(b)) // durable with the next batch
	}
	delete(s.index, sandbox)
	return nil
}

// Sandboxes answers the ids that the spool knows records of and has not been
// told to forget.
func (s *Spool) Sandboxes() []string {
	s.io.Lock()
	defer s.io.Unlock()
	out := make([]string, 0, len(s.index))
	for id := range s.index {
		out = append(out, id)
	}
	slices.Sort(out)
	return out
}
