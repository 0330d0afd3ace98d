// SPDX-License-Identifier: Apache-2.0

// Package meter turns samples of a sandbox's counters into usage records. It
// is pure: it reads nothing, keeps nothing and never sends.
//
// What must survive a crash is a Mark: for every meter how far its records
// reach, and the records of the last step. The owner puts the new Mark on disk
// first and appends its Pending records to the spool second. After a crash in
// between it appends them again, byte for byte the same; the spool knows which
// it has. So nothing is metered twice and nothing is lost.
//
// Rules:
//   - Durations are CLOCK_BOOTTIME's. The wall clock only labels: intervals of
//     a meter follow each other without gap or overlap. A clock that is set
//     forward makes one interval that is longer on the wall than by mono_ns; one
//     that is set back is ignored until it has caught up.
//   - Unless it was set by more than a day: then one of the two times was plainly
//     wrong. The open interval ends by CLOCK_BOOTTIME and the next one begins
//     where the clock is now, so that the mistake labels no more than it must. A
//     clock before 1970 or after 2200 is not believed at all.
//   - Intervals are split at midnight UTC, quantities in proportion, sums exact.
//   - A counter that cannot be read makes no record: the next reading covers the
//     time. One that went back makes a record of quality gap and goes on from
//     there.
//   - A gauge counts the mean of its readings at both ends of the interval. With
//     one of them it is that one's, quality estimated; with neither, a gap.
//     Unknown is never zero.
//   - A counter that did not move makes no record before midnight or the end.
//   - After a reboot every meter is closed where its last record ended, with
//     quality reconstructed and nothing added: what came after is not known.
package meter

import (
	"errors"
	"fmt"
	"math/bits"
	"time"

	"google.golang.org/protobuf/proto"

	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

// Subject is who is metered; it labels every record.
type Subject struct {
	Source      string
	Sandbox     string
	SandboxName string
	Tenant      string
	WorkloadRef string
	PolicyRev   uint64
	Generation  uint64 // of the lease; 1 for a sandbox
}

// Sample is one reading of a sandbox's meters. nil is unknown.
type Sample struct {
	Wall   time.Time     `json:"wall"`
	Boot   time.Duration `json:"boot"` // CLOCK_BOOTTIME
	BootID string        `json:"boot_id"`

	CPUNs        *uint64 `json:"cpu_ns"`
	EgressBytes  *uint64 `json:"egress_bytes"`
	IngressBytes *uint64 `json:"ingress_bytes"`
	MemoryUsed   *uint64 `json:"memory_used"` // bytes, now

	MemoryReserved uint64 `json:"memory_reserved"` // bytes
}

// State is how far one meter's records reach.
type State struct {
	Seq   uint64        `json:"seq"` // of its last record
	Total uint64        `json:"total"`
	Carry uint64        `json:"carry"` // numerator that is not yet a whole unit
	Value *uint64       `json:"value"` // counter or gauge at Wall; nil: not known
	Wall  time.Time     `json:"wall"`
	Boot  time.Duration `json:"boot"`
}

// Mark is what the owner keeps on disk for a sandbox.
type Mark struct {
	BootID  string           `json:"boot_id"`
	Meters  map[string]State `json:"meters"`
	Pending [][]byte         `json:"pending"` // protobuf of the last step's records
	Closed  bool             `json:"closed"`  // the final sample has been taken
}

// ErrClosed says that the final sample has been taken.
var ErrClosed = errors.New("meter is closed")

// kind of a meter: how readings become quantities.
type kind int

const (
	counter  kind = iota // the difference of two readings
	gauge                // mean of two readings times time
	reserved             // a constant times time
	elapsed              // time
)

// mibMs makes byte nanoseconds into MiB milliseconds.
const mibMs = 1 << 20 * uint64(time.Millisecond)

type spec struct {
	name    string
	kind    kind
	divisor uint64 // of the numerator; 1 for counters
	read    func(Sample) *uint64
}

var specs = []spec{
	{usagev1.MeterCPU, counter, 1, func(s Sample) *uint64 { return s.CPUNs }},
	{usagev1.MeterMemReserved, reserved, mibMs, func(s Sample) *uint64 { return &s.MemoryReserved }},
	{usagev1.MeterMemUsed, gauge, 2 * mibMs, func(s Sample) *uint64 { return s.MemoryUsed }},
	{usagev1.MeterEgress, counter, 1, func(s Sample) *uint64 { return s.EgressBytes }},
	{usagev1.MeterIngress, counter, 1, func(s Sample) *uint64 { return s.IngressBytes }},
	{usagev1.MeterWall, elapsed, uint64(time.Millisecond), func(Sample) *uint64 { return new(uint64) }},
}

// Begin is the Mark of a sandbox that starts now, with every counter at zero.
func Begin(wall time.Time, boot time.Duration, bootID string, memoryReserved uint64) Mark {
	m := Mark{BootID: bootID, Meters: map[string]State{}}
	zero := Sample{CPUNs: new(uint64), EgressBytes: new(uint64), IngressBytes: new(uint64), MemoryReserved: memoryReserved}
	for _, sp := range specs {
		m.Meters[sp.name] = State{Value: sp.read(zero), Wall: wall.UTC(), Boot: boot}
	}
	return m
}

// Advance answers the records from m to s, which are also the new Mark's
// Pending, and the new Mark. flush makes records of counters that did not move
// too, as a change of policy or of price needs it; final does as well and
// closes the meter. Errors leave m in force: the sample lies before it, a
// quantity does not fit, or ErrClosed.
func Advance(sub Subject, m Mark, s Sample, flush, final bool) ([]*usagev1.Record, Mark, error) {
	if m.Closed {
		return nil, m, fmt.Errorf("sandbox %s: %w", sub.Sandbox, ErrClosed)
	}
	next := Mark{BootID: m.BootID, Meters: make(map[string]State, len(specs)), Closed: final}
	var recs []*usagev1.Record
	for _, sp := range specs {
		st, ok := m.Meters[sp.name]
		if !ok {
			return nil, m, fmt.Errorf("sandbox %s: no state of meter %s", sub.Sandbox, sp.name)
		}
		b := builder{sub: sub, sp: sp, st: st}
		var err error
		if s.BootID != m.BootID {
			next.Closed = true
			err = b.add(piece{start: st.Wall, end: st.Wall, quality: usagev1.Quality_QUALITY_RECONSTRUCTED})
		} else {
			err = b.step(s, flush || final, final)
		}
		if err != nil {
			return nil, m, fmt.Errorf("sandbox %s, meter %s: %w", sub.Sandbox, sp.name, err)
		}
		next.Meters[sp.name] = b.st
		recs = append(recs, b.recs...)
	}
	for _, r := range recs {
		data, err := proto.MarshalOptions{Deterministic: true}.Marshal(r)
		if err != nil {
			return nil, m, err
		}
		next.Pending = append(next.Pending, data)
	}
	return recs, next, nil
}

// Records decodes the Pending records of a Mark.
func (m Mark) Records() ([]*usagev1.Record, error) {
	var recs []*usagev1.Record
	for _, data := range m.Pending {
		r := &usagev1.Record{}
		if err := proto.Unmarshal(data, r); err != nil {
			return nil, fmt.Errorf("pending usage record: %w", err)
		}
		recs = append(recs, r)
	}
	return recs, nil
}

// Total is what one meter has come to.
type Total struct {
	Meter string
	Total uint64
	Until time.Time
}

// Totals answers every meter, in reporting order.
func (m Mark) Totals() []Total {
	var out []Total
	for _, sp := range specs {
		if st, ok := m.Meters[sp.name]; ok {
			out = append(out, Total{Meter: sp.name, Total: st.Total, Until: st.Wall})
		}
	}
	return out
}

// builder makes the records of one meter in one step.
type builder struct {
	sub  Subject
	sp   spec
	st   State
	recs []*usagev1.Record
}

// piece is one interval that does not cross midnight.
type piece struct {
	start, end time.Time
	mono       time.Duration
	delta      uint64
	quality    usagev1.Quality
}

func (b *builder) step(s Sample, flush, final bool) error {
	mono := s.Boot - b.st.Boot
	if mono < 0 {
		return fmt.Errorf("sample at %s since boot lies before the last one at %s", s.Boot, b.st.Boot)
	}
	value := b.sp.read(s)
	if b.sp.kind == counter && value == nil && !final {
		return nil // the next reading covers this time
	}
	if mono == 0 && !final {
		return nil
	}
	delta, carry, quality, err := b.quantity(value, mono)
	if err != nil {
		return err
	}
	start := b.st.Wall
	end, resume := interval(start, mono, s.Wall)
	crosses := !end.Before(midnightAfter(start))
	if b.sp.kind == counter && delta == 0 && quality == usagev1.Quality_QUALITY_MEASURED && !flush && !crosses {
		return nil
	}
	if err := b.split(piece{start: start, end: end, mono: mono, delta: delta, quality: quality}); err != nil {
		return err
	}
	b.st.Carry, b.st.Wall, b.st.Boot = carry, resume, s.Boot
	if value != nil || b.sp.kind == gauge {
		b.st.Value = value
	}
	return nil
}

// maxStep is how far the wall clock may be off before one of the two times is
// taken for wrong.
const maxStep = 24 * time.Hour

// interval answers where an interval of mono from start on ends, now that the
// wall clock says wall, and where the next one begins.
func interval(start time.Time, mono time.Duration, wall time.Time) (end, resume time.Time) {
	end = start.Add(mono)
	step := wall.Sub(end)
	switch year := wall.UTC().Year(); {
	case year < 1970 || year > 2200:
		return end, end
	case step > maxStep || step < -maxStep:
		return end, wall.UTC()
	case step > time.Second:
		return wall.UTC(), wall.UTC() // set forward
	}
	return end, end
}

// quantity answers what was used since the last record.
func (b *builder) quantity(value *uint64, mono time.Duration) (delta, carry uint64, q usagev1.Quality, err error) {
	last := b.st.Value
	switch b.sp.kind {
	case counter:
		if value == nil || last == nil || *value < *last {
			return 0, 0, usagev1.Quality_QUALITY_GAP, nil
		}
		return *value - *last, 0, usagev1.Quality_QUALITY_MEASURED, nil
	case gauge:
		if value == nil && last == nil {
			return 0, b.st.Carry, usagev1.Quality_QUALITY_GAP, nil
		}
		quality := usagev1.Quality_QUALITY_MEASURED
		if last == nil {
			last, quality = value, usagev1.Quality_QUALITY_ESTIMATED
		}
		if value == nil {
			value, quality = last, usagev1.Quality_QUALITY_ESTIMATED
		}
		sum, over := bits.Add64(*last, *value, 0)
		if over != 0 {
			return 0, 0, 0, errors.New("a gauge is beyond 2^63 bytes")
		}
		delta, carry, err = scale(sum, uint64(mono), b.st.Carry, b.sp.divisor)
		return delta, carry, quality, err
	case reserved:
		delta, carry, err = scale(*value, uint64(mono), b.st.Carry, b.sp.divisor)
		return delta, carry, usagev1.Quality_QUALITY_ALLOCATED, err
	default:
		delta, carry, err = scale(1, uint64(mono), b.st.Carry, b.sp.divisor)
		return delta, carry, usagev1.Quality_QUALITY_MEASURED, err
	}
}

// scale answers (a*b + carry) / divisor and the remainder.
func scale(a, b, carry, divisor uint64) (quotient, rest uint64, err error) {
	hi, lo := bits.Mul64(a, b)
	lo, c := bits.Add64(lo, carry, 0)
	hi += c
	if hi >= divisor {
		return 0, 0, fmt.Errorf("quantity %d x %d is beyond 64 bits", a, b)
	}
	quotient, rest = bits.Div64(hi, lo, divisor)
	return quotient, rest, nil
}

// split cuts an interval at every midnight and shares its quantity out in
// proportion to time; the last piece gets the rest, so that the sum is exact.
func (b *builder) split(p piece) error {
	for {
		cut := midnightAfter(p.start)
		if !cut.Before(p.end) {
			return b.add(p)
		}
		whole, part := uint64(p.end.Sub(p.start)), uint64(cut.Sub(p.start))
		first := piece{start: p.start, end: cut, quality: p.quality}
		first.delta, _, _ = scale(p.delta, part, 0, whole) // part < whole: it fits
		mono, _, _ := scale(uint64(p.mono), part, 0, whole)
		first.mono = time.Duration(mono)
		if err := b.add(first); err != nil {
			return err
		}
		p.start, p.delta, p.mono = cut, p.delta-first.delta, p.mono-first.mono
	}
}

// midnightAfter is the first midnight UTC after t.
func midnightAfter(t time.Time) time.Time {
	y, m, d := t.UTC().Date()
	return time.Date(y, m, d+1, 0, 0, 0, 0, time.UTC)
}

func (b *builder) add(p piece) error {
	total, over := bits.Add64(b.st.Total, p.delta, 0)
	if over != 0 {
		return fmt.Errorf("total %d and %d more are beyond 64 bits", b.st.Total, p.delta)
	}
	b.st.Total = total
	b.st.Seq++
	id := usagev1.ID{Sandbox: b.sub.Sandbox, Meter: b.sp.name, Generation: b.sub.Generation, Seq: b.st.Seq}
	b.recs = append(b.recs, &usagev1.Record{
		Source:      b.sub.Source,
		Id:          id.String(),
		Tenant:      b.sub.Tenant,
		Sandbox:     b.sub.Sandbox,
		SandboxName: b.sub.SandboxName,
		WorkloadRef: b.sub.WorkloadRef,
		PolicyRev:   b.sub.PolicyRev,
		Meter:       b.sp.name,
		StartNs:     p.start.UnixNano(),
		EndNs:       p.end.UnixNano(),
		MonoNs:      int64(p.mono),
		Delta:       p.delta,
		Cumulative:  total,
		Quality:     p.quality,
	})
	return nil
}
