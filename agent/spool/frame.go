// SPDX-License-Identifier: Apache-2.0

package spool

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"

	"google.golang.org/protobuf/proto"

	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

const (
	frameMagic  = "BhF1"
	frameHeader = 24
	maxPayload  = 64 << 20

	typeHeader = 1
	typeIndex  = 2
	typeBatch  = 3
	typeForget = 4

	formatVersion = 1
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// frame is one frame of a segment.
type frame struct {
	kind    byte
	durable int64
	payload []byte
}

func (f frame) size() int64 { return frameHeader + int64(len(f.payload)) }

func frameCRC(head, payload []byte) uint32 {
	crc := crc32.Update(0, castagnoli, head[:12])
	crc = crc32.Update(crc, castagnoli, head[16:frameHeader])
	return crc32.Update(crc, castagnoli, payload)
}

func appendFrame(b []byte, f frame) []byte {
	at := len(b)
	b = append(b, frameMagic...)
	b = append(b, f.kind, 0, 0, 0)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(f.payload)))
	b = append(b, 0, 0, 0, 0)
	b = binary.LittleEndian.AppendUint64(b, uint64(f.durable))
	b = append(b, f.payload...)
	binary.LittleEndian.PutUint32(b[at+12:], frameCRC(b[at:], b[at+frameHeader:]))
	return b
}

// frameError says why the bytes at an offset are not a frame.
type frameError struct {
	Offset int64
	Reason string
}

func (e *frameError) Error() string { return fmt.Sprintf("offset %d: %s", e.Offset, e.Reason) }

// readFrame reads the frame at off. limit is where the readable part of the
// file ends. The error is a *frameError if the bytes are there and wrong.
func readFrame(r io.ReaderAt, off, limit int64) (frame, error) {
	bad := func(reason string) (frame, error) { return frame{}, &frameError{Offset: off, Reason: reason} }
	if limit-off < frameHeader {
		return bad("too short for a frame header")
	}
	var head [frameHeader]byte
	if _, err := r.ReadAt(head[:], off); err != nil {
		return frame{}, fmt.Errorf("read frame header at %d: %w", off, err)
	}
	if string(head[:4]) != frameMagic || head[5] != 0 || head[6] != 0 || head[7] != 0 {
		return bad("no frame begins here")
	}
	length := int64(binary.LittleEndian.Uint32(head[8:]))
	if length > maxPayload || length > limit-off-frameHeader {
		return bad("frame goes beyond the end")
	}
	durable := binary.LittleEndian.Uint64(head[16:])
	if durable > math.MaxInt64 {
		return bad("durable offset is out of range")
	}
	payload := make([]byte, length)
	if _, err := r.ReadAt(payload, off+frameHeader); err != nil {
		return frame{}, fmt.Errorf("read frame at %d: %w", off, err)
	}
	if binary.LittleEndian.Uint32(head[12:]) != frameCRC(head[:], payload) {
		return bad("checksum does not match")
	}
	return frame{kind: head[4], durable: int64(durable), payload: payload}, nil
}

// walk calls fn for each frame in [from, to) and answers where the last whole
// one ended. It stops at the first error; a *frameError is about the bytes there.
func walk(r io.ReaderAt, from, to int64, fn func(off int64, f frame) error) (int64, error) {
	for off := from; ; {
		if off == to {
			return off, nil
		}
		f, err := readFrame(r, off, to)
		if err != nil {
			return off, err
		}
		if err := fn(off, f); err != nil {
			return off, err
		}
		off += f.size()
	}
}

// provesDurable looks behind off for a whole frame that was written when the
// bytes at off were already on disk.
func provesDurable(r io.ReaderAt, off, end int64) (bool, error) {
	const window = 1 << 20
	magic := []byte(frameMagic)
	buf := make([]byte, window+frameHeader)
	for base := off + 1; base < end; base += window {
		n, err := r.ReadAt(buf[:min(int64(len(buf)), end-base)], base)
		if err != nil && !errors.Is(err, io.EOF) {
			return false, fmt.Errorf("read at %d: %w", base, err)
		}
		for i := 0; i < min(n, window); {
			hit := bytes.Index(buf[i:n], magic)
			if hit < 0 || i+hit >= window {
				break
			}
			at := base + int64(i+hit)
			if f, err := readFrame(r, at, end); err == nil && f.durable > off && f.durable <= at {
				return true, nil
			}
			i += hit + 1
		}
	}
	return false, nil
}

// cursor takes a payload apart. After any failure everything reads as zero and
// bad is set.
type cursor struct {
	b   []byte
	bad bool
}

func (c *cursor) take(n int) []byte {
	if c.bad || n < 0 || n > len(c.b) {
		c.bad = true
		return nil
	}
	out := c.b[:n]
	c.b = c.b[n:]
	return out
}

func (c *cursor) u16() uint16 {
	if b := c.take(2); b != nil {
		return binary.LittleEndian.Uint16(b)
	}
	return 0
}

func (c *cursor) u32() uint32 {
	if b := c.take(4); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

func (c *cursor) u64() uint64 {
	if b := c.take(8); b != nil {
		return binary.LittleEndian.Uint64(b)
	}
	return 0
}

func (c *cursor) text() string { return string(c.take(int(c.u16()))) }

func appendText(b []byte, s string) []byte {
	b = binary.LittleEndian.AppendUint16(b, uint16(len(s)))
	return append(b, s...)
}

// header is the payload of a segment's first frame.
type header struct {
	first    uint64
	prevHash [usagev1.HashLen]byte
	entries  uint32
	nodeID   string
}

func (h header) encode() []byte {
	b := binary.LittleEndian.AppendUint16(nil, formatVersion)
	b = binary.LittleEndian.AppendUint64(b, h.first)
	b = append(b, h.prevHash[:]...)
	b = binary.LittleEndian.AppendUint32(b, h.entries)
	return appendText(b, h.nodeID)
}

func decodeHeader(p []byte) (header, error) {
	c := cursor{b: p}
	if v := c.u16(); !c.bad && v != formatVersion {
		return header{}, fmt.Errorf("segment format %d is not known, this version knows %d", v, formatVersion)
	}
	var h header
	h.first = c.u64()
	copy(h.prevHash[:], c.take(usagev1.HashLen))
	h.entries = c.u32()
	h.nodeID = c.text()
	if c.bad || len(c.b) > 0 || h.first == 0 {
		return header{}, errors.New("segment header is malformed")
	}
	return h, nil
}

// encodeBatch makes the payload of a batch frame from numbered records.
func encodeBatch(recs []*usagev1.Record) ([]byte, error) {
	b := make([]byte, 0, 16+len(recs)*400)
	b = binary.LittleEndian.AppendUint64(b, recs[0].NodeSeq)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(recs)))
	for _, r := range recs {
		at := len(b)
		b = append(b, 0, 0, 0, 0)
		var err error
		if b, err = (proto.MarshalOptions{Deterministic: true}).MarshalAppend(b, r); err != nil {
			return nil, fmt.Errorf("encode usage record %s: %w", r.Id, err)
		}
		binary.LittleEndian.PutUint32(b[at:], uint32(len(b)-at-4))
	}
	return b, nil
}

// batchRange reads only which records a batch frame holds.
func batchRange(p []byte) (first uint64, count uint32, err error) {
	c := cursor{b: p}
	first, count = c.u64(), c.u32()
	if c.bad || first == 0 || count == 0 || first+uint64(count) < first || uint64(count)*4 > uint64(len(c.b)) {
		return 0, 0, errors.New("batch is malformed")
	}
	return first, count, nil
}

// decodeBatch calls fn for each record of a batch frame from node_seq from on.
func decodeBatch(p []byte, from uint64, fn func(*usagev1.Record) error) error {
	first, count, err := batchRange(p)
	if err != nil {
		return err
	}
	c := cursor{b: p[12:]}
	for seq := first; seq < first+uint64(count); seq++ {
		body := c.take(int(c.u32()))
		if c.bad {
			return errors.New("batch is malformed")
		}
		if seq < from {
			continue
		}
		r := &usagev1.Record{}
		if err := proto.Unmarshal(body, r); err != nil {
			return fmt.Errorf("decode node_seq %d: %w", seq, err)
		}
		if r.NodeSeq != seq {
			return fmt.Errorf("node_seq %d is found in the place of %d", r.NodeSeq, seq)
		}
		if err := fn(r); err != nil {
			return err
		}
	}
	if len(c.b) > 0 {
		return errors.New("batch is malformed")
	}
	return nil
}

func encodeAck(seq uint64) []byte {
	b := binary.LittleEndian.AppendUint64([]byte("BhA1"), seq)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func decodeAck(b []byte) (uint64, bool) {
	if len(b) != 16 || string(b[:4]) != "BhA1" ||
		binary.LittleEndian.Uint32(b[12:]) != crc32.Checksum(b[:12], castagnoli) {
		return 0, false
	}
	return binary.LittleEndian.Uint64(b[4:]), true
}
