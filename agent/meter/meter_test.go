// SPDX-License-Identifier: Apache-2.0

package meter

import (
	"encoding/json"
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

const boot1 = "b0000000-0000-0000-0000-000000000001"

var (
	start = time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	who   = Subject{Source: "node/n/boot/" + boot1, Sandbox: "abcdefghijkl", SandboxName: "a", Tenant: "acme", PolicyRev: 1, Generation: 1}
)

func u(v uint64) *uint64 { return &v }

// at is a sample d after the start with counters that grow evenly.
func at(d time.Duration) Sample {
	n := uint64(d.Milliseconds())
	return Sample{Wall: start.Add(d), Boot: time.Hour + d, BootID: boot1, CPUNs: u(n * 1000), EgressBytes: u(n * 3), IngressBytes: u(n * 2), MemoryUsed: u(32 << 20), MemoryReserved: 64 << 20}
}

func begin() Mark { return Begin(start, time.Hour, boot1, 64<<20) }

func advance(t *testing.T, m Mark, s Sample, flush, final bool) ([]*usagev1.Record, Mark) {
	t.Helper()
	recs, next, err := Advance(who, m, s, flush, final)
	if err != nil {
		t.Fatal(err)
	}
	return recs, next
}

func deltas(recs []*usagev1.Record) map[string]uint64 {
	out := map[string]uint64{}
	for _, r := range recs {
		out[r.Meter] += r.Delta
	}
	return out
}

func TestShortLife(t *testing.T) {
	recs, m := advance(t, begin(), at(200*time.Millisecond), true, true)
	want := map[string]uint64{
		usagev1.MeterCPU: 200_000, usagev1.MeterEgress: 600, usagev1.MeterIngress: 400,
		usagev1.MeterMemReserved: 64 * 200, usagev1.MeterMemUsed: 32 * 200, usagev1.MeterWall: 200,
	}
	if diff := cmp.Diff(want, deltas(recs)); diff != "" {
		t.Error(diff)
	}
	if _, _, err := Advance(who, m, at(time.Second), false, false); !errors.Is(err, ErrClosed) {
		t.Errorf("advance after the final sample: got %v, want ErrClosed", err)
	}
}

func TestSplitAtMidnight(t *testing.T) {
	recs, _ := advance(t, begin(), at(36*time.Hour), false, false) // over two midnights
	perDay := map[string][]uint64{}
	for _, r := range recs {
		perDay[r.Meter] = append(perDay[r.Meter], r.Delta)
		s, e := time.Unix(0, r.StartNs).UTC(), time.Unix(0, r.EndNs).UTC()
		if e.After(midnightAfter(s)) {
			t.Errorf("%s reaches over midnight: %s to %s", r.Meter, s, e)
		}
	}
	hour := uint64(time.Hour.Milliseconds())
	if diff := cmp.Diff([]uint64{12 * hour, 24 * hour}, perDay[usagev1.MeterWall]); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]uint64{36 * hour, 72 * hour}, perDay[usagev1.MeterEgress]); diff != "" {
		t.Error(diff)
	}
}

func TestClockSteps(t *testing.T) {
	const year = 365 * 24 * time.Hour
	for _, step := range []time.Duration{time.Hour, -time.Hour, 23 * time.Hour, 50 * year, -50 * year, 250 * year, -100 * year} {
		m := begin()
		breaks, wantBreaks := 0, 0
		if step == 50*year || step == -50*year {
			wantBreaks = 1
		}
		var mono time.Duration
		var lastEnd int64
		for i := 1; i <= 20; i++ {
			s := at(time.Duration(i) * 10 * time.Second)
			if i > 5 {
				s.Wall = s.Wall.Add(step)
			}
			var recs []*usagev1.Record
			recs, m = advance(t, m, s, true, i == 20)
			for _, r := range recs {
				if r.Meter != usagev1.MeterWall {
					continue
				}
				mono += time.Duration(r.MonoNs)
				if lastEnd != 0 && r.StartNs != lastEnd {
					breaks++
				}
				if i > 7 && wantBreaks > 0 && r.EndNs != s.Wall.UnixNano() {
					t.Errorf("step %s: interval ends at %d, the clock says %d", step, r.EndNs, s.Wall.UnixNano())
				}
				if r.EndNs < r.StartNs {
					t.Errorf("step %s: interval of negative length", step)
				}
				lastEnd = r.EndNs
			}
		}
		if mono != 200*time.Second || m.Meters[usagev1.MeterWall].Total != 200_000 {
			t.Errorf("step %s: metered %s and %d ms, want 200 s", step, mono, m.Meters[usagev1.MeterWall].Total)
		}
		if breaks != wantBreaks {
			t.Errorf("step %s: %d breaks between intervals, want %d", step, breaks, wantBreaks)
		}
	}
}

func TestUnknownIsNeverZero(t *testing.T) {
	_, m := advance(t, begin(), at(time.Second), false, false)
	s := at(2 * time.Second)
	s.CPUNs, s.MemoryUsed, s.EgressBytes = nil, nil, nil
	recs, m := advance(t, m, s, false, false)
	got := deltas(recs)
	if _, ok := got[usagev1.MeterCPU]; ok {
		t.Error("an unreadable CPU counter made a record")
	}
	recs, m = advance(t, m, s2(3*time.Second, nil), false, false)
	for _, r := range recs {
		if r.Meter == usagev1.MeterMemUsed && r.Quality != usagev1.Quality_QUALITY_GAP {
			t.Errorf("memory unknown at both ends: got quality %s, want gap", r.Quality)
		}
	}
	recs, _ = advance(t, m, at(4*time.Second), false, true)
	if got := deltas(recs)[usagev1.MeterEgress]; got != 3*3000 {
		t.Errorf("egress after two unknown readings: got %d, want 9000", got)
	}
}

// s2 is at(d) with unknown memory and egress.
func s2(d time.Duration, mem *uint64) Sample {
	s := at(d)
	s.MemoryUsed, s.EgressBytes = mem, nil
	return s
}

// With one reading of two a gauge is an estimate, and says so.
func TestGaugeQuality(t *testing.T) {
	quality := func(recs []*usagev1.Record) usagev1.Quality {
		for _, r := range recs {
			if r.Meter == usagev1.MeterMemUsed {
				return r.Quality
			}
		}
		return usagev1.Quality_QUALITY_UNSPECIFIED
	}
	m := begin()
	for i, tc := range []struct {
		mem  *uint64
		want usagev1.Quality
	}{
		{u(1 << 20), usagev1.Quality_QUALITY_ESTIMATED}, // nothing was read at the start
		{u(2 << 20), usagev1.Quality_QUALITY_MEASURED},
		{nil, usagev1.Quality_QUALITY_ESTIMATED},
		{nil, usagev1.Quality_QUALITY_GAP},
		{u(2 << 20), usagev1.Quality_QUALITY_ESTIMATED},
		{u(2 << 20), usagev1.Quality_QUALITY_MEASURED},
	} {
		var recs []*usagev1.Record
		recs, m = advance(t, m, s2(time.Duration(i+1)*time.Second, tc.mem), false, false)
		if got := quality(recs); got != tc.want {
			t.Errorf("reading %d: got %s, want %s", i, got, tc.want)
		}
	}
	if got, want := m.Meters[usagev1.MeterMemUsed].Total, uint64(1000+1500+2000+2000+2000); got != want {
		t.Errorf("got %d MiB ms, want %d", got, want)
	}
}

func TestCounterGoesBack(t *testing.T) {
	_, m := advance(t, begin(), at(10*time.Second), false, false)
	s := at(11 * time.Second)
	s.EgressBytes = u(5)
	recs, m := advance(t, m, s, false, false)
	for _, r := range recs {
		if r.Meter == usagev1.MeterEgress && (r.Delta != 0 || r.Quality != usagev1.Quality_QUALITY_GAP) {
			t.Errorf("counter went back: got delta %d, quality %s", r.Delta, r.Quality)
		}
	}
	s = at(12 * time.Second)
	s.EgressBytes = u(105)
	recs, _ = advance(t, m, s, false, false)
	if got := deltas(recs)[usagev1.MeterEgress]; got != 100 {
		t.Errorf("after a counter went back: got %d, want 100", got)
	}
}

func TestReboot(t *testing.T) {
	_, m := advance(t, begin(), at(10*time.Second), false, false)
	s := at(time.Minute)
	s.BootID, s.Boot = "another", time.Second
	recs, next := advance(t, m, s, false, true)
	for _, r := range recs {
		if r.Quality != usagev1.Quality_QUALITY_RECONSTRUCTED || r.Delta != 0 || r.EndNs != m.Meters[r.Meter].Wall.UnixNano() {
			t.Errorf("%s after a reboot: %v", r.Meter, r)
		}
	}
	if !next.Closed || len(recs) != len(specs) {
		t.Errorf("after a reboot: closed %t, %d records", next.Closed, len(recs))
	}
}

// TestReplay: whatever the sequence of samples, unknowns and crashes, the sum
// of the records' deltas is what the counters and the clock say.
func TestReplay(t *testing.T) {
	for seed := range uint64(300) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		m := begin()
		spooled := map[string]*usagev1.Record{}
		now, cpu, out := time.Duration(0), uint64(0), uint64(0)
		steps := 1 + rnd.IntN(40)
		for i := range steps {
			now += time.Duration(1 + rnd.Int64N(int64(3*time.Hour)))
			cpu += rnd.Uint64N(1 << 30)
			if rnd.IntN(2) == 0 {
				out += rnd.Uint64N(1 << 20)
			}
			last := i == steps-1
			s := Sample{Wall: start.Add(now + time.Duration(rnd.Int64N(2000)-1000)*time.Millisecond/4), Boot: time.Hour + now, BootID: boot1,
				CPUNs: u(cpu), EgressBytes: u(out), IngressBytes: u(0), MemoryUsed: u(rnd.Uint64N(1 << 30)), MemoryReserved: 100_000_001}
			if !last && rnd.IntN(5) == 0 {
				s.CPUNs, s.EgressBytes = nil, nil
			}
			_, next, err := Advance(who, m, s, rnd.IntN(4) == 0, last)
			if err != nil {
				t.Fatal(err)
			}
			if rnd.IntN(4) == 0 {
				continue // crash before the mark was on disk: this sample never was
			}
			data, err := json.Marshal(next)
			if err != nil {
				t.Fatal(err)
			}
			m = Mark{}
			if err := json.Unmarshal(data, &m); err != nil {
				t.Fatal(err)
			}
			for range 1 + rnd.IntN(2) { // append, and perhaps again after a crash
				recs, err := m.Records()
				if err != nil {
					t.Fatal(err)
				}
				for _, r := range recs {
					spooled[r.Id] = r
				}
			}
		}
		if !m.Closed {
			_, next, err := Advance(who, m, Sample{Wall: start.Add(now), Boot: time.Hour + now, BootID: boot1, CPUNs: u(cpu), EgressBytes: u(out), IngressBytes: u(0), MemoryUsed: u(0), MemoryReserved: 100_000_001}, true, true)
			if err != nil {
				t.Fatal(err)
			}
			recs, _ := next.Records()
			for _, r := range recs {
				spooled[r.Id] = r
			}
		}
		sum := map[string]uint64{}
		mono := map[string]int64{}
		for _, r := range spooled {
			sum[r.Meter] += r.Delta
			mono[r.Meter] += r.MonoNs
		}
		want := map[string]uint64{usagev1.MeterCPU: cpu, usagev1.MeterEgress: out, usagev1.MeterIngress: 0, usagev1.MeterWall: uint64(now.Milliseconds())}
		for name, w := range want {
			if sum[name] != w {
				t.Errorf("seed %d, %s: got %d, want %d", seed, name, sum[name], w)
			}
		}
		reserved, _, _ := scale(100_000_001, uint64(now), 0, mibMs)
		if sum[usagev1.MeterMemReserved] != reserved {
			t.Errorf("seed %d, reserved memory: got %d, want %d", seed, sum[usagev1.MeterMemReserved], reserved)
		}
		for name, n := range mono {
			if time.Duration(n) != now {
				t.Errorf("seed %d, %s: intervals last %s together, want %s", seed, name, time.Duration(n), now)
			}
		}
	}
}

// TestYearOfTerabytes: the largest thing that anybody will meter fits.
func TestYearOfTerabytes(t *testing.T) {
	m := Begin(start, 0, boot1, 1<<40)
	s := Sample{Wall: start.AddDate(1, 0, 0), Boot: 365 * 24 * time.Hour, BootID: boot1, MemoryUsed: u(1 << 40), MemoryReserved: 1 << 40}
	_, m = advance(t, m, s, true, true)
	if got, want := m.Meters[usagev1.MeterMemReserved].Total, uint64(365*24*3600*1000)<<20; got != want {
		t.Errorf("got %d, want %d", got, want)
	}
}

func FuzzAdvance(f *testing.F) {
	f.Add(int64(time.Second), int64(time.Second), uint64(5), uint64(1<<30), false)
	f.Add(int64(-1), int64(1<<62), uint64(1)<<63, ^uint64(0), true)
	f.Fuzz(func(t *testing.T, mono, wall int64, count, mem uint64, final bool) {
		mono %= int64(10 * 24 * time.Hour) // bounds the number of midnights, whatever the wall clock says
		m := begin()
		s := Sample{Wall: start.Add(time.Duration(wall)), Boot: time.Hour + time.Duration(mono), BootID: boot1,
			CPUNs: &count, EgressBytes: &count, IngressBytes: &count, MemoryUsed: &mem, MemoryReserved: mem}
		recs, next, err := Advance(who, m, s, false, final)
		if err != nil {
			return
		}
		if len(recs) > 12*len(specs) {
			t.Fatalf("%d records", len(recs))
		}
		for _, r := range recs {
			if err := usagev1.Validate(r); err != nil {
				t.Fatal(err)
			}
			if r.EndNs < r.StartNs || r.MonoNs < 0 {
				t.Fatalf("interval of negative length: %v", r)
			}
		}
		if got := deltas(recs)[usagev1.MeterCPU]; got != next.Meters[usagev1.MeterCPU].Total {
			t.Fatalf("deltas sum to %d, total is %d", got, next.Meters[usagev1.MeterCPU].Total)
		}
	})
}
