// SPDX-License-Identifier: Apache-2.0

package spool

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

const (
	segmentSuffix = ".seg"
	tempSuffix    = ".tmp"
)

// segment is one file of records. All fields are guarded by Spool.mu for
// reading and change only under Spool.io as well.
type segment struct {
	first uint64
	path  string
	body  int64 // where the batches begin
	size  int64 // what readers may see: all of it is on disk
	hash  [32]byte
}

func segmentPath(dir string, first uint64) string {
	return filepath.Join(dir, fmt.Sprintf("%020d", first)+segmentSuffix)
}

// listSegments answers the segments of a directory, oldest first, by name alone.
func listSegments(dir string) ([]*segment, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read spool directory: %w", err)
	}
	var out []*segment
	for _, e := range entries {
		digits, ok := strings.CutSuffix(e.Name(), segmentSuffix)
		if !ok {
			continue
		}
		first, err := strconv.ParseUint(digits, 10, 64)
		if err != nil || first == 0 || segmentPath(dir, first) != filepath.Join(dir, e.Name()) {
			return nil, &CorruptError{File: filepath.Join(dir, e.Name()), Reason: "name is not that of a segment"}
		}
		out = append(out, &segment{first: first, path: filepath.Join(dir, e.Name())})
	}
	slices.SortFunc(out, func(a, b *segment) int {
		if a.first < b.first {
			return -1
		}
		return 1
	})
	return out, nil
}

// openHeader reads a segment's header and, if x is not nil, its index into x.
func (g *segment) openHeader(f *os.File, x index) (header, error) {
	info, err := f.Stat()
	if err != nil {
		return header{}, fmt.Errorf("stat %s: %w", g.path, err)
	}
	size := info.Size()
	first, err := readFrame(f, 0, size)
	if err != nil {
		return header{}, g.corrupt(0, err)
	}
	if first.kind != typeHeader {
		return header{}, g.corrupt(0, errors.New("segment does not begin with a header"))
	}
	h, err := decodeHeader(first.payload)
	if err != nil {
		return header{}, g.corrupt(0, err)
	}
	if h.first != g.first {
		return header{}, g.corrupt(0, fmt.Errorf("header says that it begins at %d", h.first))
	}
	off := first.size()
	if x == nil {
		x = make(index)
	}
	for n := uint32(0); n < h.entries; {
		fr, err := readFrame(f, off, size)
		if err != nil {
			return header{}, g.corrupt(off, err)
		}
		if fr.kind != typeIndex {
			return header{}, g.corrupt(off, errors.New("index is cut short"))
		}
		got, err := x.decode(fr.payload)
		if err != nil {
			return header{}, g.corrupt(off, err)
		}
		if got == 0 || got > h.entries-n {
			return header{}, g.corrupt(off, errors.New("index has another number of entries than the header says"))
		}
		n += got
		off += fr.size()
	}
	g.body, g.size, g.hash = off, size, h.prevHash
	return h, nil
}

// corrupt names the segment in an error about its content. Errors of reading
// stay what they are.
func (g *segment) corrupt(off int64, err error) error {
	var fe *frameError
	if errors.As(err, &fe) {
		return &CorruptError{File: g.path, Offset: fe.Offset, Reason: fe.Reason}
	}
	var ce *CorruptError
	var pe *fs.PathError
	if errors.As(err, &ce) || errors.As(err, &pe) {
		return err
	}
	return &CorruptError{File: g.path, Offset: off, Reason: err.Error()}
}

// encodeSegment makes the beginning of a segment: header and index.
func encodeSegment(h header, x index) []byte {
	h.entries = uint32(x.entries())
	b := appendFrame(nil, frame{kind: typeHeader, payload: h.encode()})
	for _, p := range x.encode() {
		b = appendFrame(b, frame{kind: typeIndex, payload: p})
	}
	return b
}
