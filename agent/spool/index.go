// SPDX-License-Identifier: Apache-2.0

package spool

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"

	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

// position is the last record spooled of one sandbox's meter.
type position struct {
	generation uint64
	seq        uint64
	digest     [16]byte
}

func (p position) compare(q position) int {
	switch {
	case p.generation < q.generation || p.generation == q.generation && p.seq < q.seq:
		return -1
	case p.generation == q.generation && p.seq == q.seq:
		return 0
	}
	return 1
}

// index knows for every sandbox and meter what was spooled last.
type index map[string]map[string]position

func (x index) put(sandbox, meter string, p position) {
	meters := x[sandbox]
	if meters == nil {
		meters = make(map[string]position)
		x[sandbox] = meters
	}
	meters[meter] = p
}

func (x index) entries() int {
	n := 0
	for _, meters := range x {
		n += len(meters)
	}
	return n
}

// contentDigest is over what the producer of a record decides.
func contentDigest(r *usagev1.Record) [16]byte {
	seq, prev := r.NodeSeq, r.PrevHash
	r.NodeSeq, r.PrevHash = 0, nil
	sum := sha256.Sum256(usagev1.CanonicalBytes(r))
	r.NodeSeq, r.PrevHash = seq, prev
	return [16]byte(sum[:16])
}

// note enters a record that is on disk. The record must be valid.
func (x index) note(r *usagev1.Record) error {
	id, err := usagev1.ParseID(r.Id)
	if err != nil {
		return err
	}
	x.put(id.Sandbox, id.Meter, position{generation: id.Generation, seq: id.Seq, digest: contentDigest(r)})
	return nil
}

// fresh answers which of recs are not spooled yet and what the index will say
// of their sandboxes afterwards. over holds what earlier batches of the same
// write have changed. The records stay in order.
func (x index) fresh(recs []*usagev1.Record, over index) ([]*usagev1.Record, index, error) {
	out := make([]*usagev1.Record, 0, len(recs))
	next := make(index)
	behind := make(map[[2]string]bool) // only older records of it seen so far
	for _, r := range recs {
		id, err := usagev1.ParseID(r.Id)
		if err != nil {
			return nil, nil, err
		}
		key := [2]string{id.Sandbox, id.Meter}
		pos := position{generation: id.Generation, seq: id.Seq, digest: contentDigest(r)}
		last, known := next[id.Sandbox][id.Meter]
		if !known {
			if last, known = over[id.Sandbox][id.Meter]; !known {
				last, known = x[id.Sandbox][id.Meter]
			}
		}
		order := 1
		if known {
			order = pos.compare(last)
		}
		switch {
		case order < 0:
			behind[key] = true
			continue
		case order == 0:
			if pos.digest != last.digest {
				return nil, nil, fmt.Errorf("%w: %s", ErrConflict, r.Id)
			}
			delete(behind, key)
			continue
		case known && pos.generation == last.generation && pos.seq != last.seq+1:
			return nil, nil, fmt.Errorf("%w: %s comes after sequence %d", ErrSkipped, r.Id, last.seq)
		}
		delete(behind, key)
		next.put(id.Sandbox, id.Meter, pos)
		out = append(out, r)
	}
	for key := range behind {
		return nil, nil, fmt.Errorf("%w: only records of %s/%s that are older than the last one",
			ErrConflict, key[0], key[1])
	}
	return out, next, nil
}

// merge takes over what next says.
func (x index) merge(next index) {
	for sandbox, meters := range next {
		for meter, p := range meters {
			x.put(sandbox, meter, p)
		}
	}
}

// maxIndexPayload keeps index frames small enough to be read in one piece.
const maxIndexPayload = 1 << 20

// encode makes the payloads of the index frames of a segment.
func (x index) encode() [][]byte {
	var out [][]byte
	var b []byte
	for _, sandbox := range slices.Sorted(maps.Keys(x)) {
		meters := x[sandbox]
		for _, meter := range slices.Sorted(maps.Keys(meters)) {
			p := meters[meter]
			b = appendText(b, sandbox)
			b = appendText(b, meter)
			b = binary.LittleEndian.AppendUint64(b, p.generation)
			b = binary.LittleEndian.AppendUint64(b, p.seq)
			b = append(b, p.digest[:]...)
			if len(b) >= maxIndexPayload {
				out = append(out, b)
				b = nil
			}
		}
	}
	if len(b) > 0 {
		out = append(out, b)
	}
	return out
}

// decode enters the entries of one index frame and answers how many there were.
func (x index) decode(p []byte) (uint32, error) {
	var n uint32
	for c := (cursor{b: p}); len(c.b) > 0; n++ {
		sandbox, meter := c.text(), c.text()
		pos := position{generation: c.u64(), seq: c.u64()}
		copy(pos.digest[:], c.take(len(pos.digest)))
		if c.bad {
			return 0, errors.New("index is malformed")
		}
		x.put(sandbox, meter, pos)
	}
	return n, nil
}
