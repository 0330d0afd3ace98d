// SPDX-License-Identifier: Apache-2.0

package spool

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

func FuzzFrame(f *testing.F) {
	batch, err := encodeBatch([]*usagev1.Record{{NodeSeq: 1, Id: "x"}, {NodeSeq: 2}})
	if err != nil {
		f.Fatal(err)
	}
	x := make(index)
	x.put(sandboxID(1), usagev1.MeterCPU, position{generation: 1, seq: 2})
	seed := encodeSegment(header{first: 1, nodeID: node}, x)
	seed = appendFrame(seed, frame{kind: typeBatch, durable: int64(len(seed)), payload: batch})
	seed = appendFrame(seed, frame{kind: typeForget, payload: appendText(nil, sandboxID(1))})
	f.Add(seed)
	f.Add(seed[:len(seed)-3])
	f.Add(append(bytes.Clone(seed), "BhF1 and what is not a frame"...))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		end, err := walk(r, 0, int64(len(b)), func(off int64, fr frame) error {
			if again := appendFrame(nil, fr); !bytes.Equal(again, b[off:off+fr.size()]) {
				t.Errorf("frame at %d is not what its content makes", off)
			}
			return nil
		})
		var fe *frameError
		if err != nil && (!errors.As(err, &fe) || fe.Offset != end) {
			t.Errorf("ended at %d with %v", end, err)
		}
		if err == nil && end != int64(len(b)) {
			t.Errorf("ended at %d of %d without an error", end, len(b))
		}
		if _, err := provesDurable(r, end, int64(len(b))); err != nil {
			t.Error(err)
		}
	})
}

// The payload parsers must survive what has a good checksum and a bad content.
func FuzzPayload(f *testing.F) {
	batch, err := encodeBatch([]*usagev1.Record{{NodeSeq: 9, Id: "x"}, {NodeSeq: 10}})
	if err != nil {
		f.Fatal(err)
	}
	x := make(index)
	x.put(sandboxID(1), usagev1.MeterCPU, position{generation: 1, seq: 2})
	f.Add(batch)
	f.Add(header{first: 3, nodeID: node}.encode())
	f.Add(x.encode()[0])
	f.Add(encodeAck(7))
	f.Fuzz(func(t *testing.T, b []byte) {
		next := uint64(0)
		if err := decodeBatch(b, 0, func(r *usagev1.Record) error {
			if next != 0 && r.NodeSeq != next {
				t.Errorf("node_seq %d, want %d", r.NodeSeq, next)
			}
			next = r.NodeSeq + 1
			return nil
		}); err == nil && next == 0 {
			t.Error("a batch without records was accepted")
		}
		if h, err := decodeHeader(b); err == nil && !bytes.Equal(h.encode(), b) {
			t.Error("header is not what its content makes")
		}
		_, _ = make(index).decode(b)
		if seq, ok := decodeAck(b); ok && !bytes.Equal(encodeAck(seq), b) {
			t.Error("ack is not what its content makes")
		}
	})
}

func TestIndexRoundTrip(t *testing.T) {
	x := make(index)
	for i := range 20000 {
		x.put(sandboxID(i), usagev1.MeterCPU, position{generation: uint64(i), seq: 7, digest: [16]byte{byte(i)}})
	}
	frames := x.encode()
	if len(frames) < 2 {
		t.Fatalf("%d frames: the test wants more than one", len(frames))
	}
	got := make(index)
	total := 0
	for _, p := range frames {
		n, err := got.decode(p)
		if err != nil {
			t.Fatal(err)
		}
		total += int(n)
	}
	if total != x.entries() {
		t.Errorf("%d entries, want %d", total, x.entries())
	}
	if diff := cmp.Diff(x, got, cmp.AllowUnexported(position{})); diff != "" {
		t.Error(diff)
	}
}

// filled is a closed spool with several segments.
func filled(t *testing.T, acked uint64) (Config, []*segment) {
	t.Helper()
	s := open(t, config(t.TempDir()))
	for seq := uint64(1); seq <= 45; seq++ {
		add(t, s, record(1, usagev1.MeterCPU, seq))
	}
	if acked > 0 {
		if err := s.Ack(acked); err != nil {
			t.Fatal(err)
		}
	}
	s.Close()
	return s.cfg, s.segments
}

func mutate(t *testing.T, path string, fn func([]byte) []byte) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, fn(b), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Data that was durable and is not there any more is told, and nothing is touched.
func TestCorruption(t *testing.T) {
	flip := func(at int64) func([]byte) []byte {
		return func(b []byte) []byte { b[at] ^= 0x40; return b }
	}
	for name, tc := range map[string]struct {
		acked  uint64
		damage func(t *testing.T, dir string, segs []*segment)
	}{
		"header of the newest": {damage: func(t *testing.T, _ string, segs []*segment) { mutate(t, segs[len(segs)-1].path, flip(30)) }},
		"header of an older":   {damage: func(t *testing.T, _ string, segs []*segment) { mutate(t, segs[1].path, flip(30)) }},
		"first batch of the newest": {damage: func(t *testing.T, _ string, segs []*segment) {
			g := segs[len(segs)-1]
			mutate(t, g.path, flip(g.body+40))
		}},
		"acknowledged batch cut off": {acked: 45, damage: func(t *testing.T, _ string, segs []*segment) {
			mutate(t, segs[len(segs)-1].path, func(b []byte) []byte { return b[:len(b)-5] })
		}},
		"oldest is gone": {damage: func(t *testing.T, _ string, segs []*segment) { os.Remove(segs[0].path) }},
		"all are gone": {acked: 3, damage: func(t *testing.T, _ string, segs []*segment) {
			for _, g := range segs {
				os.Remove(g.path)
			}
		}},
		"renamed": {damage: func(t *testing.T, dir string, segs []*segment) { os.Rename(segs[1].path, segmentPath(dir, 2)) }},
		"odd name": {damage: func(t *testing.T, dir string, segs []*segment) {
			os.Rename(segs[1].path, filepath.Join(dir, "7.seg"))
		}},
		"index of the newest": {damage: func(t *testing.T, _ string, segs []*segment) {
			g := segs[len(segs)-1]
			mutate(t, g.path, flip(g.body-3))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			cfg, segs := filled(t, tc.acked)
			tc.damage(t, cfg.Dir, segs)
			before := newDisk(cfg.Dir).files(t)
			s, err := Open(cfg)
			var ce *CorruptError
			if !errors.As(err, &ce) {
				if err == nil {
					s.Close()
				}
				t.Fatalf("got %v, want a CorruptError", err)
			}
			if diff := cmp.Diff(before, newDisk(cfg.Dir).files(t)); diff != "" {
				t.Error("the directory was changed")
			}
		})
	}
}

// Damage in an older segment is found when it is read, and all before it is good.
func TestCorruptionInOlderSegment(t *testing.T) {
	for name, damage := range map[string]func(g *segment) func([]byte) []byte{
		"flipped":   func(g *segment) func([]byte) []byte { return func(b []byte) []byte { b[g.body+50] ^= 1; return b } },
		"cut":       func(g *segment) func([]byte) []byte { return func(b []byte) []byte { return b[:len(b)-4] } },
		"cut clean": func(g *segment) func([]byte) []byte { return func(b []byte) []byte { return b[:g.body] } },
	} {
		t.Run(name, func(t *testing.T) {
			cfg, segs := filled(t, 0)
			g := segs[1]
			mutate(t, g.path, damage(g))
			s := open(t, cfg)
			if recs, err := s.Read(1, int(g.first-1)); err != nil || len(recs) != int(g.first-1) {
				t.Errorf("before it: %d records, %v", len(recs), err)
			}
			var ce *CorruptError
			if _, err := s.Read(segs[2].first-1, 1); !errors.As(err, &ce) || ce.File != g.path {
				t.Errorf("got %v, want a CorruptError", err)
			}
			if err := s.Scan(func(*usagev1.Record) error { return nil }); !errors.As(err, &ce) {
				t.Errorf("got %v, want a CorruptError", err)
			}
			if recs, err := s.Read(segs[2].first, 3); err != nil || len(recs) != 3 {
				t.Errorf("after it: %d records, %v", len(recs), err)
			}
		})
	}
}

func TestTornTail(t *testing.T) {
	cfg, segs := filled(t, 0)
	g := segs[len(segs)-1]
	mutate(t, g.path, func(b []byte) []byte { return b[:len(b)-5] })
	s := open(t, cfg)
	got := s.Recovered()
	if got.TornFile != g.path || got.TornBytes == 0 {
		t.Errorf("got %+v", got)
	}
	if last := s.Status().Last; last != 44 {
		t.Errorf("last is %d, want 44", last)
	}
	add(t, s, record(1, usagev1.MeterCPU, 45))
	s = reopen(t, s)
	if got := s.Recovered(); got != (Recovered{}) {
		t.Errorf("got %+v the second time", got)
	}
	if got := len(ids(t, s, 1)); got != 45 {
		t.Errorf("%d records, want 45", got)
	}
}

// Without its acknowledgement file a spool sends everything again.
func TestAckFileLost(t *testing.T) {
	for name, damage := range map[string]func([]byte) []byte{
		"empty":   func([]byte) []byte { return nil },
		"flipped": func(b []byte) []byte { b[6] ^= 1; return b },
	} {
		cfg, segs := filled(t, 20)
		mutate(t, filepath.Join(cfg.Dir, "ack"), damage)
		s := open(t, cfg)
		if !s.Recovered().AckLost {
			t.Errorf("%s: nothing is said about it", name)
		}
		if got, want := s.Status().Acked, segs[0].first-1; got != want {
			t.Errorf("%s: acknowledged up to %d, want %d", name, got, want)
		}
	}
}

// Any byte of a spool may be anything: no panic, and no record that was not written.
func TestRandomDamage(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	cfg, segs := filled(t, 12)
	good := newDisk(cfg.Dir).files(t)
	for range 120 {
		dir := t.TempDir()
		for name, b := range good {
			os.WriteFile(filepath.Join(dir, name), b, 0o600)
		}
		victim := filepath.Join(dir, filepath.Base(segs[rng.IntN(len(segs))].path))
		mutate(t, victim, func(b []byte) []byte {
			b[rng.IntN(len(b))] ^= byte(1 << rng.IntN(8))
			return b
		})
		s, err := Open(config(dir))
		if err != nil {
			var ce *CorruptError
			if !errors.As(err, &ce) {
				t.Fatalf("got %v, want a CorruptError", err)
			}
			continue
		}
		n := uint64(0)
		err = s.Scan(func(r *usagev1.Record) error { n = r.NodeSeq; return nil })
		var ce *CorruptError
		if err == nil && n != 45 && s.Recovered().TornBytes == 0 || err != nil && !errors.As(err, &ce) {
			t.Fatalf("scan ended at %d with %v", n, err)
		}
		s.Close()
	}
}
