// SPDX-License-Identifier: Apache-2.0

package spool

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

// disk follows what of a directory would survive a loss of power. It learns of
// each step before it is done and takes it as done when the next one comes.
type disk struct {
	dir     string
	synced  map[string][]byte // by the name a file has now: its content at its last fsync
	durable map[string][]byte // what the directory held, by its last fsync, and what those files hold
	op      string
	path    string
}

func newDisk(dir string) *disk {
	return &disk{dir: dir, synced: make(map[string][]byte), durable: make(map[string][]byte)}
}

func (d *disk) files(t testing.TB) map[string][]byte {
	t.Helper()
	out := make(map[string][]byte)
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Name() == "lock" {
			continue
		}
		b, err := os.ReadFile(filepath.Join(d.dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		out[e.Name()] = b
	}
	return out
}

// done takes the last step as done.
func (d *disk) done(t testing.TB) {
	_, what, _ := strings.Cut(d.op, ":")
	name := filepath.Base(d.path)
	switch what {
	case "fsync", "truncsync":
		now := d.files(t)
		d.synced[name] = now[name]
		if _, known := d.durable[name]; known {
			d.durable[name] = now[name]
		}
	case "rename":
		d.synced[name] = d.synced[name+tempSuffix]
		delete(d.synced, name+tempSuffix)
	case "dirsync":
		d.durable = make(map[string][]byte)
		for name := range d.files(t) {
			d.durable[name] = d.synced[name]
		}
	case "remove":
		delete(d.synced, name)
	}
	d.op = ""
}

// torn is one of the many states that a loss of power may leave: some of the
// blocks that were not fsynced, some of the names.
func (d *disk) torn(t testing.TB, rng *rand.Rand) map[string][]byte {
	now := d.files(t)
	out := maps.Clone(d.durable)
	for name := range now {
		if _, known := d.durable[name]; !known && rng.IntN(2) == 0 {
			out[name] = d.synced[name]
		}
	}
	for name := range d.durable {
		if _, still := now[name]; !still && rng.IntN(2) == 0 {
			delete(out, name)
		}
	}
	if b, renamed := d.synced["ack"]; renamed && rng.IntN(2) == 0 {
		out["ack"] = b
	}
	for name, old := range out {
		cur, still := now[name]
		if !still || !bytes.HasPrefix(cur, old[:min(len(old), len(cur))]) {
			continue
		}
		if len(cur) < len(old) { // a truncation that is not on disk yet
			if rng.IntN(2) == 0 {
				out[name] = slices.Clone(cur)
			}
			continue
		}
		const block = 64
		b := append(slices.Clone(old), make([]byte, len(cur)-len(old))...)
		for at := len(old); at < len(cur); at += block {
			if rng.IntN(3) > 0 {
				copy(b[at:], cur[at:min(at+block, len(cur))])
			}
		}
		if rng.IntN(3) == 0 {
			b = b[:len(old)+rng.IntN(len(cur)-len(old)+1)]
		}
		out[name] = b
	}
	return out
}

// story is what was promised so far.
type story struct {
	kept     []*usagev1.Record // appended, by node_seq
	inFlight []*usagev1.Record // the batches being appended
	acked    uint64
	acking   uint64
}

// check opens a state and holds it against the story.
func (st *story) check(t *testing.T, what string, files map[string][]byte) {
	t.Helper()
	dir := t.TempDir()
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s, err := Open(config(dir))
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	defer s.Close()
	got := s.Status()
	if got.Acked < st.acked || got.Acked > max(st.acked, st.acking) {
		t.Fatalf("%s: acknowledged up to %d, want %d or %d", what, got.Acked, st.acked, st.acking)
	}
	if got.First > got.Acked+1 {
		t.Fatalf("%s: first is %d and only %d are acknowledged", what, got.First, got.Acked)
	}
	n := uint64(len(st.kept))
	if got.Last < n || got.Last > n+uint64(len(st.inFlight)) {
		t.Fatalf("%s: last is %d, want %d to %d", what, got.Last, n, n+uint64(len(st.inFlight)))
	}
	verify := func() {
		t.Helper()
		all := recordIDs(append(slices.Clone(st.kept), st.inFlight...))
		first := s.Status().First
		if found, want := ids(t, s, first), all[first-1:s.Status().Last]; !slices.Equal(found, want) {
			t.Fatalf("%s: found %v, want %v", what, found, want)
		}
	}
	verify()
	if len(st.inFlight) > 0 {
		add(t, s, st.inFlight...)
	}
	if got := s.Status().Last; got != n+uint64(len(st.inFlight)) {
		t.Fatalf("%s: after the batch was appended again last is %d, want %d", what, got, n+uint64(len(st.inFlight)))
	}
	verify()
	if err := s.Ack(s.Status().Last); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// The process is killed, or the power is lost, before every single change of
// the disk. No record that was kept is lost, none is there twice, and a batch
// is whole or absent.
func TestCrashAtEveryStep(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	cfg := config(t.TempDir())
	d := newDisk(cfg.Dir)
	var st story
	steps := make(map[string]int)
	cfg.Fault = func(op, path string) error {
		d.done(t)
		steps[op]++
		what := fmt.Sprintf("%s %s (%d)", op, filepath.Base(path), steps[op])
		st.check(t, "killed before "+what, d.files(t))
		st.check(t, "power lost before "+what, d.durable)
		for range 2 {
			st.check(t, "power lost, blocks torn, before "+what, d.torn(t, rng))
		}
		d.op, d.path = op, path
		return nil
	}
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if !t.Failed() { // a check that fails in the middle of a write leaves it locked
			s.Close()
		}
	}()
	next := make(map[int]uint64)
	batch := func(sandbox, n int) []*usagev1.Record {
		from := next[sandbox] + 1
		next[sandbox] += uint64(n)
		return run(sandbox, usagev1.MeterCPU, from, next[sandbox])
	}
	for i := range 15 {
		st.inFlight = batch(i%3, 1+rng.IntN(4))
		add(t, s, st.inFlight...)
		st.kept, st.inFlight = append(st.kept, st.inFlight...), nil
		if i%5 == 2 {
			// Two appends that share an fsync. As one story: what survives is a prefix.
			a, b := batch(7, 2), batch(8, 1)
			st.inFlight = append(slices.Clone(a), b...)
			s.io.Lock()
			for _, err := range s.writeGroup([]*request{{recs: a}, {recs: b}}) {
				if err != nil {
					t.Fatal(err)
				}
			}
			s.io.Unlock()
			st.kept, st.inFlight = append(st.kept, st.inFlight...), nil
		}
		if i%4 == 3 {
			st.acking = uint64(len(st.kept) - rng.IntN(3))
			if err := s.Ack(st.acking); err != nil {
				t.Fatal(err)
			}
			st.acked = st.acking
		}
		if i%7 == 6 {
			if err := s.Forget(sandboxID(5)); err != nil {
				t.Fatal(err)
			}
			next[5] = 0
			st.inFlight = batch(5, 1)
			st.inFlight[0].Id = usagev1.ID{Sandbox: sandboxID(5), Meter: usagev1.MeterCPU, Generation: uint64(i), Seq: 1}.String()
			add(t, s, st.inFlight...)
			st.kept, st.inFlight = append(st.kept, st.inFlight...), nil
		}
	}
	if got := ids(t, s, s.Status().First); len(got) == 0 {
		t.Error("nothing left to check at the end")
	}
	for _, op := range []string{
		"segment:create", "segment:write", "segment:fsync", "segment:rename", "segment:dirsync",
		"append:write", "append:fsync", "forget:write", "prune:remove",
		"ack:create", "ack:write", "ack:fsync", "ack:rename", "ack:dirsync",
	} {
		if steps[op] == 0 {
			t.Errorf("the story never came to %s", op)
		}
	}
}

// A step fails: the append or acknowledgement says so, keeps nothing, and works
// when it is tried again. A crash in between is as good as any.
func TestFailAtEveryStep(t *testing.T) {
	for _, op := range []string{
		"segment:create", "segment:write", "segment:fsync", "segment:rename", "segment:dirsync",
		"append:write", "append:fsync", "ack:create", "ack:write", "ack:fsync", "ack:rename", "ack:dirsync",
		"prune:remove",
	} {
		for _, repair := range []string{"", "append:truncate", "append:truncsync"} {
			t.Run(op+" "+repair, func(t *testing.T) {
				cfg := config(t.TempDir())
				var st story
				armed, failed := false, 0
				cfg.Fault = func(at, path string) error {
					if !armed {
						return nil
					}
					if at == op || at == repair {
						failed++
						return fmt.Errorf("no space left, says the test")
					}
					return nil
				}
				s := open(t, cfg)
				d := newDisk(cfg.Dir)
				for seq := uint64(1); seq <= 40; seq++ {
					st.inFlight = []*usagev1.Record{record(1, usagev1.MeterCPU, seq)}
					armed = seq%3 == 0
					for try := 0; ; try++ {
						err := s.Append(context.Background(), st.inFlight)
						if err == nil {
							break
						}
						if try > 2 || !armed {
							t.Fatalf("append %d, try %d: %v", seq, try, err)
						}
						if got := s.Status().Last; got != seq-1 {
							t.Fatalf("a failed append left something: last is %d, want %d", got, seq-1)
						}
						if got := ids(t, s, s.Status().First); uint64(len(got)) != seq-s.Status().First {
							t.Fatalf("readers see %d records", len(got))
						}
						st.check(t, "killed after a failed append", d.files(t))
						armed = try == 0 // fails twice, then the disk is well
					}
					if s.Status().Err != nil {
						t.Fatalf("after a good append: %v", s.Status().Err)
					}
					st.kept, st.inFlight = append(st.kept, st.inFlight...), nil
					armed = seq%3 == 0
					st.acking = seq - 1
					for try := 0; ; try++ {
						err := s.Ack(st.acking)
						if err == nil {
							break
						}
						if try > 0 || !armed {
							t.Fatalf("ack %d, try %d: %v", st.acking, try, err)
						}
						st.check(t, "killed after a failed acknowledgement", d.files(t))
						armed = false
					}
					st.acked = st.acking
				}
				st.check(t, "at the end", d.files(t))
				if failed == 0 {
					t.Error("the step was never taken")
				}
			})
		}
	}
}

// A forget that fails is tried again; it never harms the records around it.
func TestForgetFails(t *testing.T) {
	cfg := config(t.TempDir())
	broken := false
	cfg.Fault = func(op, _ string) error {
		if broken && op == "forget:write" {
			return fmt.Errorf("no space left, says the test")
		}
		return nil
	}
	s := open(t, cfg)
	add(t, s, record(1, usagev1.MeterCPU, 1))
	broken = true
	if err := s.Forget(sandboxID(1)); err == nil {
		t.Error("got no error")
	}
	add(t, s, record(1, usagev1.MeterCPU, 1), record(1, usagev1.MeterCPU, 2))
	broken = false
	if err := s.Forget(sandboxID(1)); err != nil {
		t.Error(err)
	}
	s = reopen(t, s)
	if got := ids(t, s, 1); len(got) != 2 {
		t.Errorf("got %v", got)
	}
}

// What a failed write leaves may look like good frames in the right place. It
// must be gone before anything else is written.
func TestNothingOfAFailedGroupComesBack(t *testing.T) {
	cfg := config(t.TempDir())
	fail := ""
	cfg.Fault = func(op, _ string) error {
		if op == fail {
			fail = ""
			return fmt.Errorf("no space left, says the test")
		}
		return nil
	}
	s := open(t, cfg)
	add(t, s, record(1, usagev1.MeterCPU, 1), record(9, usagev1.MeterCPU, 1))
	fail = "append:write" // half of it is written: two frames of the same size as those of the next batch
	var group []*request
	for i := 2; i < 6; i++ {
		group = append(group, &request{recs: run(i, usagev1.MeterCPU, 1, 1)})
	}
	s.io.Lock()
	for i, err := range s.writeGroup(group) {
		if err == nil {
			t.Errorf("batch %d of a failed group: no error", i)
		}
	}
	s.io.Unlock()
	add(t, s, record(6, usagev1.MeterCPU, 1))
	s = reopen(t, s)
	want := recordIDs([]*usagev1.Record{record(1, usagev1.MeterCPU, 1), record(9, usagev1.MeterCPU, 1), record(6, usagev1.MeterCPU, 1)})
	if got := ids(t, s, 1); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}

	// A forget frame that is not durable yet goes with the failed write behind it.
	if err := s.Forget(sandboxID(9)); err != nil {
		t.Fatal(err)
	}
	fail = "append:write"
	if err := s.Append(context.Background(), run(7, usagev1.MeterCPU, 1, 1)); err == nil {
		t.Error("no error")
	}
	add(t, s, record(7, usagev1.MeterCPU, 1))
	add(t, s, record(7, usagev1.MeterCPU, 2))
	s = reopen(t, s)
	if got := ids(t, s, 1); len(got) != 5 {
		t.Errorf("got %v", got)
	}
}

// After an fsync that failed the kernel may have dropped pages that it once
// took: the file gets no more data.
func TestFailedFsyncEndsTheSegment(t *testing.T) {
	cfg := config(t.TempDir())
	fail := false
	cfg.Fault = func(op, _ string) error {
		if fail && op == "append:fsync" {
			fail = false
			return fmt.Errorf("input/output error, says the test")
		}
		return nil
	}
	s := open(t, cfg)
	add(t, s, record(1, usagev1.MeterCPU, 1))
	fail = true
	if err := s.Append(context.Background(), run(1, usagev1.MeterCPU, 2, 2)); err == nil {
		t.Error("no error")
	}
	add(t, s, record(1, usagev1.MeterCPU, 2))
	if got := s.segments[len(s.segments)-1].first; got != 2 {
		t.Errorf("the newest segment begins at %d, want 2", got)
	}
}
