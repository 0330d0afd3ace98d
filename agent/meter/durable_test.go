// SPDX-License-Identifier: Apache-2.0

package meter_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/agent/meter"
	"github.com/bulkheadhq/bulkhead/agent/spool"
	"github.com/bulkheadhq/bulkhead/agent/store"
	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

// bench is a node that meters one sandbox: real store, real spool.
type bench struct {
	t     *testing.T
	dir   string
	store *store.Store
	spool *spool.Spool
	fail  string // step of the spool that fails next
}

const boot = "b0000000-0000-0000-0000-000000000002"

var subject = meter.Subject{Source: usagev1.Source("n", boot), Sandbox: "abcdefghijkl", Tenant: "acme", PolicyRev: 1, Generation: 1}

func (b *bench) open() {
	b.t.Helper()
	var err error
	if b.store, err = store.Open(filepath.Join(b.dir, "db")); err != nil {
		b.t.Fatal(err)
	}
	b.spool, err = spool.Open(spool.Config{
		Dir: filepath.Join(b.dir, "spool"), NodeID: "n", LimitBytes: 32 << 10, SegmentBytes: 4 << 10,
		Fault: func(op, _ string) error {
			if op == b.fail {
				b.fail = ""
				return errors.New("the test says no")
			}
			return nil
		},
	})
	if err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) crash() {
	b.t.Helper()
	if err := errors.Join(b.spool.Close(), b.store.Close()); err != nil {
		b.t.Fatal(err)
	}
	b.open()
}

// mark answers the mark on disk after its records are in the spool, as after a
// start or a failed append; false while the spool does not take them.
func (b *bench) mark(begin meter.Mark) (meter.Mark, bool) {
	b.t.Helper()
	marks, err := b.store.Marks()
	if err != nil {
		b.t.Fatal(err)
	}
	m, ok := marks[subject.Sandbox]
	if !ok {
		return begin, true
	}
	recs, err := m.Records()
	if err != nil {
		b.t.Fatal(err)
	}
	return m, b.spool.Append(context.Background(), recs) == nil
}

// TestNothingTwiceNothingLost meters through crashes, a failing disk and a full
// spool, in the order that the package documentation asks for. What left the
// spool and what is in it add up to what the counters say, to the byte.
func TestNothingTwiceNothingLost(t *testing.T) {
	ops := []string{"append:write", "append:fsync", "append:truncate", "segment:fsync", "segment:rename", "segment:dirsync"}
	for seed := range uint64(12) {
		rng := rand.New(rand.NewPCG(seed, 9))
		b := &bench{t: t, dir: t.TempDir()}
		b.open()
		start := time.Date(2026, 11, 30, 23, 0, 0, 0, time.UTC)
		begin := meter.Begin(start, 0, boot, 64<<20)
		sums := map[string]uint64{} // of what was acknowledged
		seen := map[string]bool{}
		ship := func() {
			for next := b.spool.Status().Acked + 1; ; {
				recs, err := b.spool.Read(next, 50)
				if err != nil {
					t.Fatal(err)
				}
				if len(recs) == 0 {
					return
				}
				for _, r := range recs {
					if seen[r.Id] {
						t.Fatalf("%s twice", r.Id)
					}
					seen[r.Id] = true
					sums[r.Meter] += r.Delta
					if r.Cumulative != sums[r.Meter] {
						t.Fatalf("%s: cumulative %d, records add up to %d", r.Id, r.Cumulative, sums[r.Meter])
					}
				}
				next += uint64(len(recs))
				if err := b.spool.Ack(next - 1); err != nil {
					t.Fatal(err)
				}
			}
		}
		var now time.Duration
		var cpu, out, in uint64
		const steps = 120
		for i := 0; i < steps; {
			now += time.Duration(rng.Int64N(int64(20 * time.Minute)))
			cpu, out, in = cpu+rng.Uint64N(1e9), out+rng.Uint64N(1e6), in+rng.Uint64N(1e6)
			if rng.IntN(3) == 0 {
				b.fail = ops[rng.IntN(len(ops))]
			}
			if rng.IntN(40) == 0 {
				ship()
			}
			m, settled := b.mark(begin)
			if !settled {
				if b.spool.Status().Full {
					ship()
				}
				b.fail = ""
				continue // the counters go on
			}
			final := i == steps-1
			mem := rng.Uint64N(1 << 26)
			s := meter.Sample{Wall: start.Add(now), Boot: now, BootID: boot, CPUNs: &cpu, EgressBytes: &out, IngressBytes: &in, MemoryUsed: &mem, MemoryReserved: 64 << 20}
			if !final && rng.IntN(4) == 0 {
				s.CPUNs, s.IngressBytes, s.MemoryUsed = nil, nil, nil
			}
			recs, next, err := meter.Advance(subject, m, s, false, final)
			if err != nil {
				t.Fatal(err)
			}
			if rng.IntN(10) == 0 && !final {
				b.crash() // before the mark
				continue
			}
			if err := b.store.PutMarks(map[string]meter.Mark{subject.Sandbox: next}); err != nil {
				t.Fatal(err)
			}
			i++
			if rng.IntN(10) == 0 {
				b.crash() // between mark and spool
				continue
			}
			_ = b.spool.Append(context.Background(), recs) // mark() tries again if it failed
			if rng.IntN(10) == 0 {
				b.crash() // after the spool
			}
		}
		b.fail = ""
		for {
			m, settled := b.mark(begin)
			if settled && m.Closed {
				break
			}
			ship()
		}
		ship()
		for name, want := range map[string]uint64{
			usagev1.MeterCPU: cpu, usagev1.MeterEgress: out, usagev1.MeterIngress: in,
			usagev1.MeterWall: uint64(now.Milliseconds()), usagev1.MeterMemReserved: 64 * uint64(now.Milliseconds()),
		} {
			got := sums[name]
			if name == usagev1.MeterMemReserved {
				// Whole MiB times nanoseconds, rounded down once, not once per interval.
				want = 64 * uint64(now) / uint64(time.Millisecond)
			}
			if got != want {
				t.Errorf("seed %d, %s: %d, want %d", seed, name, got, want)
			}
		}
		if err := errors.Join(b.spool.Close(), b.store.Close()); err != nil {
			t.Fatal(err)
		}
	}
}
