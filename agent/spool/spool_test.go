// SPDX-License-Identifier: Apache-2.0

package spool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

const node = "node-a"

// sandboxID makes the id of test sandbox n.
func sandboxID(n int) string {
	const letters = "abcdefghijklmnopqrstuvwxyz234567"
	b := []byte("aaaaaaaaaaaa")
	for i := len(b) - 1; n > 0; i-- {
		b[i] = letters[n%32]
		n /= 32
	}
	return string(b)
}

// record is what a meter would make.
func record(sandbox int, meter string, seq uint64) *usagev1.Record {
	return &usagev1.Record{
		Source: usagev1.Source(node, "boot-1"),
		Id:     usagev1.ID{Sandbox: sandboxID(sandbox), Meter: meter, Generation: 1, Seq: seq}.String(),
		Tenant: "acme/vision", Sandbox: sandboxID(sandbox), SandboxName: "web", Meter: meter,
		StartNs: int64(seq) * 1000, EndNs: int64(seq)*1000 + 1000, MonoNs: 1000,
		Delta: seq, Cumulative: seq * (seq + 1) / 2, Quality: usagev1.Quality_QUALITY_MEASURED,
	}
}

// run makes records from..to of one meter.
func run(sandbox int, meter string, from, to uint64) []*usagev1.Record {
	var out []*usagev1.Record
	for seq := from; seq <= to; seq++ {
		out = append(out, record(sandbox, meter, seq))
	}
	return out
}

func config(dir string) Config {
	return Config{Dir: dir, NodeID: node, LimitBytes: 1 << 20, SegmentBytes: minSegmentBytes}
}

func open(t testing.TB, cfg Config) *Spool {
	t.Helper()
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func reopen(t testing.TB, s *Spool) *Spool {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return open(t, s.cfg)
}

func add(t testing.TB, s *Spool, recs ...*usagev1.Record) {
	t.Helper()
	if err := s.Append(context.Background(), recs); err != nil {
		t.Fatal(err)
	}
}

// ids reads everything from seq on and checks number and chain.
func ids(t testing.TB, s *Spool, from uint64) []string {
	t.Helper()
	prev, err := s.HashAt(from - 1)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for seq := from; ; {
		recs, err := s.Read(seq, 7)
		if err != nil {
			t.Fatal(err)
		}
		if len(recs) == 0 {
			return out
		}
		for _, r := range recs {
			if err := usagev1.VerifyChain(seq-1, prev, r); err != nil {
				t.Fatal(err)
			}
			seq, prev = seq+1, r.Hash
			out = append(out, r.Id)
		}
	}
}

func recordIDs(recs []*usagev1.Record) []string {
	var out []string
	for _, r := range recs {
		out = append(out, r.Id)
	}
	return out
}

func TestAppendReadReopen(t *testing.T) {
	s := open(t, config(filepath.Join(t.TempDir(), "a", "b")))
	if got, want := s.Status(), (Status{First: 1, Bytes: s.bytes, Limit: 1 << 20}); got != want {
		t.Errorf("empty: got %+v, want %+v", got, want)
	}
	in := run(1, usagev1.MeterCPU, 1, 5)
	add(t, s, in...)
	add(t, s, run(1, usagev1.MeterCPU, 6, 6)...)
	if in[0].NodeSeq != 0 {
		t.Error("the caller's records were changed")
	}
	want := recordIDs(run(1, usagev1.MeterCPU, 1, 6))
	for range 3 {
		if diff := cmp.Diff(want, ids(t, s, 1)); diff != "" {
			t.Errorf("-want +got\n%s", diff)
		}
		recs, err := s.Read(1, 1)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(in[0], recs[0], protocmp.Transform(),
			protocmp.IgnoreFields(&usagev1.Record{}, "node_seq", "prev_hash", "hash")); diff != "" {
			t.Errorf("-want +got\n%s", diff)
		}
		s = reopen(t, s)
	}
	st := s.Status()
	if st.First != 1 || st.Last != 6 || st.Acked != 0 || st.Full || st.Err != nil {
		t.Errorf("got %+v", st)
	}
	if recs, err := s.Read(7, 10); err != nil || len(recs) != 0 {
		t.Errorf("past the end: got %d records, %v", len(recs), err)
	}
}

func TestAckPrunesWholeSegments(t *testing.T) {
	s := open(t, config(t.TempDir()))
	for seq := uint64(1); seq <= 60; seq++ {
		add(t, s, record(1, usagev1.MeterCPU, seq))
	}
	if n := len(s.segments); n < 4 {
		t.Fatalf("only %d segments", n)
	}
	second := s.segments[1].first
	if err := s.Ack(second - 2); err != nil {
		t.Fatal(err)
	}
	if got := s.Status().First; got != 1 {
		t.Errorf("a segment with a record that is not acknowledged is gone: first is %d", got)
	}
	before := s.Status().Bytes
	if err := s.Ack(second - 1); err != nil {
		t.Fatal(err)
	}
	if got := s.Status(); got.First != second || got.Acked != second-1 || got.Bytes >= before {
		t.Errorf("got %+v, want first %d", got, second)
	}
	if _, err := s.Read(1, 1); !errors.Is(err, ErrPruned) {
		t.Errorf("got %v, want ErrPruned", err)
	}
	for range 2 {
		if got := ids(t, s, second); len(got) != 60-int(second)+1 {
			t.Errorf("%d records left", len(got))
		}
		s = reopen(t, s)
		if got := s.Status(); got.First != second || got.Acked != second-1 || got.Last != 60 {
			t.Errorf("after reopen: got %+v", got)
		}
	}
	if err := s.Ack(3); err != nil {
		t.Errorf("an old acknowledgement: %v", err)
	}
	if got := s.Status().Acked; got != second-1 {
		t.Errorf("an old acknowledgement moved it to %d", got)
	}
	if err := s.Ack(61); !errors.Is(err, ErrUnknown) {
		t.Errorf("got %v, want ErrUnknown", err)
	}
	if err := s.Ack(60); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s)
	add(t, s, record(1, usagev1.MeterCPU, 61))
	if got := s.Status(); got.Last != 61 || got.Acked != 60 {
		t.Errorf("got %+v", got)
	}
	if diff := cmp.Diff([]string{record(1, usagev1.MeterCPU, 61).Id}, ids(t, s, 61)); diff != "" {
		t.Error(diff)
	}
}

// What is spooled is known for ever, in whichever segment it was.
func TestDuplicatesAreDropped(t *testing.T) {
	s := open(t, config(t.TempDir()))
	for seq := uint64(1); seq <= 40; seq++ {
		add(t, s, record(1, usagev1.MeterCPU, seq), record(1, usagev1.MeterWall, seq), record(2, usagev1.MeterCPU, seq))
	}
	again := func(when string) {
		t.Helper()
		add(t, s, record(1, usagev1.MeterCPU, 40), record(1, usagev1.MeterWall, 40))
		add(t, s, run(2, usagev1.MeterCPU, 1, 40)...)
		if got := s.Status().Last; got != 120 {
			t.Fatalf("%s: last is %d, want 120", when, got)
		}
	}
	again("at once")
	s = reopen(t, s)
	again("after reopen")
	if err := s.Ack(120); err != nil {
		t.Fatal(err)
	}
	again("after acknowledgement")
	s = reopen(t, s)
	again("after acknowledgement and reopen")

	other := record(1, usagev1.MeterCPU, 40)
	other.Delta--
	fresh := record(3, usagev1.MeterCPU, 1)
	for name, tc := range map[string]struct {
		recs []*usagev1.Record
		want error
	}{
		"other content":       {[]*usagev1.Record{fresh, other}, ErrConflict},
		"only old ones":       {[]*usagev1.Record{fresh, record(1, usagev1.MeterCPU, 39)}, ErrConflict},
		"a hole":              {[]*usagev1.Record{fresh, record(1, usagev1.MeterCPU, 42)}, ErrSkipped},
		"a hole in the batch": {[]*usagev1.Record{fresh, record(4, usagev1.MeterCPU, 1), record(4, usagev1.MeterCPU, 3)}, ErrSkipped},
		"malformed":           {[]*usagev1.Record{fresh, {}}, usagev1.ErrInvalid},
	} {
		if err := s.Append(context.Background(), tc.recs); !errors.Is(err, tc.want) {
			t.Errorf("%s: got %v, want %v", name, err, tc.want)
		}
	}
	if got := s.Status().Last; got != 120 {
		t.Errorf("a refused batch left something: last is %d", got)
	}
	newer := record(1, usagev1.MeterCPU, 1)
	newer.Id = usagev1.ID{Sandbox: sandboxID(1), Meter: usagev1.MeterCPU, Generation: 2, Seq: 1}.String()
	add(t, s, newer, record(1, usagev1.MeterWall, 40), record(1, usagev1.MeterWall, 41))
	if got := s.Status().Last; got != 122 {
		t.Errorf("last is %d, want 122", got)
	}
}

func TestForget(t *testing.T) {
	s := open(t, config(t.TempDir()))
	add(t, s, record(1, usagev1.MeterCPU, 1), record(2, usagev1.MeterCPU, 1))
	if diff := cmp.Diff([]string{sandboxID(1), sandboxID(2)}, s.Sandboxes()); diff != "" {
		t.Error(diff)
	}
	if err := s.Forget(sandboxID(1)); err != nil {
		t.Fatal(err)
	}
	if err := s.Forget(sandboxID(9)); err != nil {
		t.Errorf("a sandbox that was never seen: %v", err)
	}
	add(t, s, record(2, usagev1.MeterCPU, 2))
	for range 2 {
		if diff := cmp.Diff([]string{sandboxID(2)}, s.Sandboxes()); diff != "" {
			t.Error(diff)
		}
		if got := len(ids(t, s, 1)); got != 3 {
			t.Errorf("%d records, want 3", got)
		}
		s = reopen(t, s)
	}
	// Forgetting at the end of a segment, then beginning the next one.
	if err := s.Forget(sandboxID(2)); err != nil {
		t.Fatal(err)
	}
	add(t, s, run(3, usagev1.MeterCPU, 1, 20)...)
	add(t, s, run(3, usagev1.MeterCPU, 21, 21)...)
	s = reopen(t, s)
	if diff := cmp.Diff([]string{sandboxID(3)}, s.Sandboxes()); diff != "" {
		t.Error(diff)
	}
}

func TestFull(t *testing.T) {
	cfg := config(t.TempDir())
	cfg.LimitBytes = 4 * minSegmentBytes
	s := open(t, cfg)
	var n uint64
	fill := func() {
		t.Helper()
		for {
			err := s.Append(context.Background(), run(1, usagev1.MeterCPU, n+1, n+3))
			if errors.Is(err, ErrFull) {
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			n += 3
		}
	}
	fill()
	if got := s.Status(); !got.Full || got.Last != n || got.Bytes > got.Limit {
		t.Errorf("got %+v, want full with last %d", got, n)
	}
	if got := len(ids(t, s, 1)); got != int(n) {
		t.Errorf("%d records, want %d", got, n)
	}
	if err := s.Ack(n / 2); err != nil {
		t.Fatal(err)
	}
	if s.Status().Full {
		t.Error("still full after an acknowledgement")
	}
	was := n
	fill()
	if n == was {
		t.Error("no room after an acknowledgement")
	}
	// All of it acknowledged while full, the newest segment too.
	if err := s.Ack(n); err != nil {
		t.Fatal(err)
	}
	if got := s.Status(); got.First != n+1 || got.Last != n || got.Full {
		t.Errorf("got %+v", got)
	}
	if got, err := s.HashAt(n); err != nil || len(got) != 32 {
		t.Errorf("hash of the last one: %x, %v", got, err)
	}
	was = n
	fill()
	if n-was < was/2 {
		t.Errorf("only %d records fit after everything was acknowledged", n-was)
	}
	s = reopen(t, s)
	if got := s.Status(); got.Last != n || got.Bytes > got.Limit {
		t.Errorf("got %+v", got)
	}
}

// Full of records that are acknowledged already: no acknowledgement will come
// to make room.
func TestFullOfAcknowledged(t *testing.T) {
	s := open(t, config(t.TempDir()))
	add(t, s, run(1, usagev1.MeterCPU, 1, 5)...)
	if err := s.Ack(5); err != nil {
		t.Fatal(err)
	}
	s.cfg.LimitBytes = s.bytes + 100
	add(t, s, record(1, usagev1.MeterCPU, 6))
	if got := s.Status(); got.First != 6 || got.Last != 6 || got.Full {
		t.Errorf("got %+v", got)
	}
	s.cfg.LimitBytes = 1 << 20
	s = reopen(t, s)
	if got := s.Status(); got.First != 6 || got.Last != 6 || got.Acked != 5 {
		t.Errorf("got %+v", got)
	}
}

// A batch may be larger than a segment, and must leave room for another.
func TestTooLarge(t *testing.T) {
	s := open(t, config(t.TempDir()))
	add(t, s, run(1, usagev1.MeterCPU, 1, 500)...)
	add(t, s, run(1, usagev1.MeterCPU, 501, 501)...)
	if n := len(s.segments); n != 2 {
		t.Errorf("%d segments, want 2", n)
	}
	err := s.Append(context.Background(), run(2, usagev1.MeterCPU, 1, 3000))
	if !errors.Is(err, ErrTooLarge) {
		t.Errorf("got %v, want ErrTooLarge", err)
	}
	s = reopen(t, s)
	if got := len(ids(t, s, 1)); got != 501 {
		t.Errorf("%d records, want 501", got)
	}
}

func TestLockedByAnother(t *testing.T) {
	s := open(t, config(t.TempDir()))
	if _, err := Open(s.cfg); !errors.Is(err, ErrLocked) {
		t.Errorf("got %v, want ErrLocked", err)
	}
	reopen(t, s)
}

func TestOtherNode(t *testing.T) {
	s := open(t, config(t.TempDir()))
	s.Close()
	cfg := s.cfg
	cfg.NodeID = "node-b"
	if _, err := Open(cfg); err == nil || !strings.Contains(err.Error(), "belongs to node node-a") {
		t.Errorf("got %v", err)
	}
	reopen(t, s)
}

func TestConfigIsChecked(t *testing.T) {
	dir := t.TempDir()
	for _, cfg := range []Config{
		{NodeID: node}, {Dir: dir},
		{Dir: dir, NodeID: node, LimitBytes: 1000},
		{Dir: dir, NodeID: node, LimitBytes: 1 << 20, SegmentBytes: 1 << 19},
	} {
		if _, err := Open(cfg); err == nil {
			t.Errorf("%+v was accepted", cfg)
		}
	}
	s := open(t, Config{Dir: dir, NodeID: node})
	if got := s.Status().Limit; got != DefaultLimitBytes {
		t.Errorf("default limit is %d", got)
	}
}

func TestClosed(t *testing.T) {
	s := open(t, config(t.TempDir()))
	add(t, s, record(1, usagev1.MeterCPU, 1))
	s.Close()
	if err := s.Append(context.Background(), run(1, usagev1.MeterCPU, 2, 2)); !errors.Is(err, ErrClosed) {
		t.Errorf("append: got %v", err)
	}
	if err := s.Ack(1); !errors.Is(err, ErrClosed) {
		t.Errorf("ack: got %v", err)
	}
	if err := s.Forget(sandboxID(1)); !errors.Is(err, ErrClosed) {
		t.Errorf("forget: got %v", err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("close again: %v", err)
	}
}

func TestChanged(t *testing.T) {
	s := open(t, config(t.TempDir()))
	ch := s.Changed()
	select {
	case <-ch:
		t.Fatal("changed before anything was appended")
	default:
	}
	add(t, s, record(1, usagev1.MeterCPU, 1))
	<-ch
	ch = s.Changed()
	add(t, s, record(1, usagev1.MeterCPU, 1))
	select {
	case <-ch:
		t.Fatal("changed by a duplicate")
	default:
	}
}

// Appends that meet share an fsync, and each gets its own outcome.
func TestGroupCommit(t *testing.T) {
	cfg := config(t.TempDir())
	cfg.SegmentBytes = cfg.LimitBytes / 4
	var mu sync.Mutex
	syncs := 0
	release := make(chan struct{})
	entered := make(chan struct{}, 100)
	cfg.Fault = func(op, _ string) error {
		if op == "append:fsync" {
			mu.Lock()
			syncs++
			first := syncs == 1
			mu.Unlock()
			if first {
				entered <- struct{}{}
				<-release
			}
		}
		return nil
	}
	s := open(t, cfg)
	const n = 30
	errs := make([]error, n)
	var wg sync.WaitGroup
	start := func(i int, rec *usagev1.Record) {
		wg.Go(func() { errs[i] = s.Append(context.Background(), []*usagev1.Record{rec}) })
	}
	start(0, record(1, usagev1.MeterCPU, 1))
	<-entered
	for i := 1; i < n-1; i++ {
		start(i, record(i+1, usagev1.MeterCPU, 1))
	}
	start(n-1, record(1, usagev1.MeterCPU, 5)) // skips: refused, and no other with it
	for {
		s.mu.Lock()
		waiting := len(s.waiting)
		s.mu.Unlock()
		if waiting == n-1 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	// One that gives up while it waits leaves nothing.
	ctx, cancel := context.WithCancel(context.Background())
	gaveUp := make(chan error)
	go func() { gaveUp <- s.Append(ctx, run(99, usagev1.MeterCPU, 1, 1)) }()
	cancel()
	if err := <-gaveUp; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want context.Canceled", err)
	}
	close(release)
	wg.Wait()
	for i, err := range errs[:n-1] {
		if err != nil {
			t.Errorf("append %d: %v", i, err)
		}
	}
	if !errors.Is(errs[n-1], ErrSkipped) {
		t.Errorf("got %v, want ErrSkipped", errs[n-1])
	}
	if syncs != 2 {
		t.Errorf("%d fsyncs for %d appends, want 2", syncs, n)
	}
	if got := len(ids(t, s, 1)); got != n-1 {
		t.Errorf("%d records, want %d", got, n-1)
	}
}

// Writers, a shipper and somebody who looks, all at once; meant for -race.
func TestConcurrentUse(t *testing.T) {
	cfg := config(t.TempDir())
	cfg.LimitBytes = 64 * minSegmentBytes
	s := open(t, cfg)
	const writers, each = 8, 60
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for seq := uint64(1); seq <= each; seq++ {
				if err := s.Append(context.Background(), run(w, usagev1.MeterCPU, seq, seq)); err != nil {
					t.Error(err)
					return
				}
			}
			if err := s.Forget(sandboxID(w)); err != nil {
				t.Error(err)
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	var looks sync.WaitGroup
	looks.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			s.Status()
			s.Sandboxes()
			if err := s.Scan(func(*usagev1.Record) error { return nil }); err != nil {
				t.Error(err)
				return
			}
		}
	})
	next, prev := uint64(1), usagev1.ZeroHash()
	for next <= writers*each {
		ch := s.Changed()
		recs, err := s.Read(next, 5)
		if err != nil {
			t.Fatal(err)
		}
		if len(recs) == 0 {
			select {
			case <-ch:
			case <-done:
				if s.Status().Last < writers*each {
					t.Fatalf("last is %d", s.Status().Last)
				}
			}
			continue
		}
		for _, r := range recs {
			if err := usagev1.VerifyChain(next-1, prev, r); err != nil {
				t.Fatal(err)
			}
			next, prev = next+1, r.Hash
		}
		if err := s.Ack(next - 1); err != nil {
			t.Fatal(err)
		}
	}
	<-done
	looks.Wait()
}

func TestScan(t *testing.T) {
	s := open(t, config(t.TempDir()))
	for seq := uint64(1); seq <= 50; seq++ {
		add(t, s, record(1, usagev1.MeterCPU, seq))
	}
	var got []string
	if err := s.Scan(func(r *usagev1.Record) error { got = append(got, r.Id); return nil }); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(recordIDs(run(1, usagev1.MeterCPU, 1, 50)), got); diff != "" {
		t.Error(diff)
	}
	stop := fmt.Errorf("enough")
	n := 0
	err := s.Scan(func(*usagev1.Record) error {
		if n++; n == 3 {
			return stop
		}
		return nil
	})
	if !errors.Is(err, stop) || n != 3 {
		t.Errorf("got %v after %d", err, n)
	}
	for seq := uint64(0); seq <= 50; seq++ {
		h, err := s.HashAt(seq)
		if err != nil {
			t.Fatal(err)
		}
		if seq < 50 {
			recs, _ := s.Read(seq+1, 1)
			if string(recs[0].PrevHash) != string(h) {
				t.Errorf("hash of %d is not what %d follows", seq, seq+1)
			}
		}
	}
	if _, err := s.HashAt(51); !errors.Is(err, ErrUnknown) {
		t.Errorf("got %v, want ErrUnknown", err)
	}
}

func TestNothingIsWrittenForNothing(t *testing.T) {
	s := open(t, config(t.TempDir()))
	before, _ := os.ReadFile(s.segments[0].path)
	add(t, s)
	after, _ := os.ReadFile(s.segments[0].path)
	if len(before) != len(after) {
		t.Error("an empty batch was written")
	}
}
