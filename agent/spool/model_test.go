// SPDX-License-Identifier: Apache-2.0

package spool

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
	"github.com/bulkheadhq/bulkhead/test/need"
)

// model is the spool as a list.
type model struct {
	all   []string // ids by node_seq
	acked uint64
	last  map[int]uint64 // sequence by sandbox
}

// Random operations do to the spool what they do to the list.
func TestAgainstModel(t *testing.T) {
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 7))
			cfg := config(t.TempDir())
			cfg.LimitBytes = int64(4+rng.IntN(4)) * minSegmentBytes
			fail := ""
			cfg.Fault = func(op, _ string) error {
				if op == fail {
					fail = ""
					return errors.New("the test says no")
				}
				return nil
			}
			s := open(t, cfg)
			m := model{last: make(map[int]uint64)}
			for range 300 {
				switch p := rng.IntN(100); {
				case p < 55:
					m.append(t, s, rng)
				case p < 60:
					ops := []string{"append:write", "append:fsync", "append:truncate", "segment:fsync", "segment:dirsync"}
					fail = ops[rng.IntN(len(ops))]
					was := s.Status()
					// It may have nothing to do with what comes next.
					_ = s.Append(context.Background(), []*usagev1.Record{record(100, usagev1.MeterCPU, m.last[100]+1)})
					if got := s.Status().Last; got == was.Last+1 {
						m.last[100]++
						m.all = append(m.all, record(100, usagev1.MeterCPU, m.last[100]).Id)
					}
					fail = ""
				case p < 80:
					seq := m.acked + rng.Uint64N(uint64(len(m.all))-m.acked+1)
					if err := s.Ack(seq); err != nil {
						t.Fatal(err)
					}
					m.acked = seq
				case p < 85:
					s = reopen(t, s)
				default:
					m.read(t, s, rng)
				}
				st := s.Status()
				if st.Last != uint64(len(m.all)) || st.Acked != m.acked || st.First > m.acked+1 || st.First == 0 {
					t.Fatalf("got %+v, want last %d, acked %d", st, len(m.all), m.acked)
				}
				if st.Bytes > st.Limit+2*minSegmentBytes {
					t.Fatalf("%d bytes with a limit of %d", st.Bytes, st.Limit)
				}
			}
		})
	}
}

func (m *model) append(t *testing.T, s *Spool, rng *rand.Rand) {
	var recs []*usagev1.Record
	next := make(map[int]uint64)
	for range 1 + rng.IntN(4) {
		sb := rng.IntN(4)
		if _, seen := next[sb]; !seen {
			next[sb] = m.last[sb]
			if back := rng.Uint64N(3); back <= next[sb] && rng.IntN(3) == 0 {
				next[sb] -= back // a replay
			}
		}
		for range 1 + rng.IntN(3) {
			next[sb]++
			recs = append(recs, record(sb, usagev1.MeterCPU, next[sb]))
		}
	}
	wantConflict := false
	for sb, to := range next {
		wantConflict = wantConflict || to < m.last[sb]
	}
	err := s.Append(context.Background(), recs)
	switch {
	case wantConflict:
		if !errors.Is(err, ErrConflict) {
			t.Fatalf("got %v, want ErrConflict", err)
		}
	case errors.Is(err, ErrFull):
		if m.acked == uint64(len(m.all)) {
			t.Fatalf("full, and everything is acknowledged: %v", err)
		}
	case err != nil:
		t.Fatal(err)
	default:
		for _, r := range recs {
			id, _ := usagev1.ParseID(r.Id)
			for sb := range next {
				if sandboxID(sb) == id.Sandbox && id.Seq > m.last[sb] {
					m.last[sb] = id.Seq
					m.all = append(m.all, r.Id)
				}
			}
		}
	}
}

func (m *model) read(t *testing.T, s *Spool, rng *rand.Rand) {
	from, n := 1+rng.Uint64N(uint64(len(m.all))+2), 1+rng.IntN(20)
	recs, err := s.Read(from, n)
	switch first := s.Status().First; {
	case from < first:
		if !errors.Is(err, ErrPruned) {
			t.Fatalf("read %d: got %v, want ErrPruned", from, err)
		}
	case err != nil:
		t.Fatal(err)
	default:
		lo := min(from-1, uint64(len(m.all)))
		hi := min(lo+uint64(n), uint64(len(m.all)))
		if got, want := recordIDs(recs), m.all[lo:hi]; !slices.Equal(got, want) {
			t.Fatalf("read %d: got %v, want %v", from, got, want)
		}
	}
}

// On a disk that is really full an append says so, and works when there is room.
func TestDiskFull(t *testing.T) {
	need.Root(t)
	mnt := t.TempDir()
	if err := unix.Mount("tmpfs", mnt, "tmpfs", 0, "size=256k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mnt, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	ballast := filepath.Join(mnt, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 150<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := config(filepath.Join(mnt, "spool"))
	cfg.SegmentBytes = 32 << 10
	s := open(t, cfg)
	var n uint64
	for {
		err := s.Append(context.Background(), run(1, usagev1.MeterCPU, n+1, n+5))
		if errors.Is(err, unix.ENOSPC) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if n += 5; n > 5000 {
			t.Fatal("the disk does not get full")
		}
	}
	if got := s.Status(); got.Last != n || got.Full {
		t.Errorf("got %+v, want last %d", got, n)
	}
	if got := len(ids(t, s, 1)); got != int(n) {
		t.Errorf("%d records, want %d", got, n)
	}
	s = reopen(t, s)
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		add(t, s, run(1, usagev1.MeterCPU, n+1, n+5)...)
		n += 5
	}
	if got := len(ids(t, s, 1)); got != int(n) {
		t.Errorf("%d records, want %d", got, n)
	}
}

func benchmarkAppend(b *testing.B, size int) {
	s := open(b, Config{Dir: b.TempDir(), NodeID: node, LimitBytes: 8 << 30, SegmentBytes: DefaultSegmentBytes})
	seq := uint64(0)
	for b.Loop() {
		recs := run(1, usagev1.MeterCPU, seq+1, seq+uint64(size))
		seq += uint64(size)
		if err := s.Append(context.Background(), recs); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N*size)/b.Elapsed().Seconds(), "records/s")
}

func BenchmarkAppend1(b *testing.B)   { benchmarkAppend(b, 1) }
func BenchmarkAppend100(b *testing.B) { benchmarkAppend(b, 100) }

func BenchmarkAppendParallel(b *testing.B) {
	s := open(b, Config{Dir: b.TempDir(), NodeID: node, LimitBytes: 8 << 30, SegmentBytes: DefaultSegmentBytes})
	ids := make(chan int, 1024)
	for i := range 1024 {
		ids <- i
	}
	b.SetParallelism(32)
	b.RunParallel(func(pb *testing.PB) {
		sb := <-ids
		for seq := uint64(1); pb.Next(); seq++ {
			if err := s.Append(context.Background(), run(sb, usagev1.MeterCPU, seq, seq)); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "records/s")
}

func BenchmarkRead1000(b *testing.B) {
	s := open(b, Config{Dir: b.TempDir(), NodeID: node})
	for seq := uint64(0); seq < 20000; seq += 500 {
		add(b, s, run(1, usagev1.MeterCPU, seq+1, seq+500)...)
	}
	next := uint64(1)
	for b.Loop() {
		recs, err := s.Read(next, 1000)
		if err != nil {
			b.Fatal(err)
		}
		if next += uint64(len(recs)); next > 19000 {
			next = 1
		}
	}
}
