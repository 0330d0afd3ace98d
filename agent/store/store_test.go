// SPDX-License-Identifier: Apache-2.0

package store

import (
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	bolt "go.etcd.io/bbolt"

	"github.com/bulkheadhq/bulkhead/agent/budget"
	"github.com/bulkheadhq/bulkhead/agent/meter"
	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/tenant"
)

var update = flag.Bool("update", false, "write testdata")

func open(t *testing.T, path string) *Store {
	t.Helper()
	s, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func rec(id, name string) sandbox.Record {
	return sandbox.Record{
		ID: id, State: sandbox.Admitted, CreatedBy: "uid:0", Created: time.Date(2026, 11, 24, 1, 2, 3, 4, time.UTC), PolicyRev: 1,
		Spec: sandbox.Spec{Name: name, Tenant: tenant.Path("acme/vision"), Image: "busybox", Limits: sandbox.Limits{CPUMillis: 500, MemoryBytes: 64 << 20, PIDs: 16}},
	}
}

func reserve(t *testing.T, s *Store, r sandbox.Record) sandbox.Record {
	t.Helper()
	got, err := s.Reserve(r, 10, nil)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestReserveReleaseDelete(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	s := open(t, path)
	a := reserve(t, s, rec("aaaaaaaaaaaa", "one"))
	b := reserve(t, s, rec("bbbbbbbbbbbb", "two"))
	if a.Slot != 1 || b.Slot != 2 {
		t.Fatalf("slots: got %d and %d, want 1 and 2", a.Slot, b.Slot)
	}
	var taken *NameTakenError
	if _, err := s.Reserve(rec("cccccccccccc", "one"), 10, nil); !errors.As(err, &taken) || taken.ID != a.ID {
		t.Errorf("same name: got %v, want NameTakenError of %s", err, a.ID)
	}
	if err := s.Release(a.ID); err != nil {
		t.Fatal(err)
	}
	if c := reserve(t, s, rec("cccccccccccc", "three")); c.Slot != 1 {
		t.Errorf("slot after a release: got %d, want 1", c.Slot)
	}
	if err := s.Release(a.ID); err != nil { // once more: the slot is another's now
		t.Fatal(err)
	}
	if d := reserve(t, s, rec("dddddddddddd", "four")); d.Slot != 3 {
		t.Errorf("a second release took another's slot: got %d, want 3", d.Slot)
	}
	if err := s.PutMarks(map[string]meter.Mark{a.ID: {BootID: "x"}}); err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(a.ID); err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(a.ID); err != nil {
		t.Errorf("delete twice: %v", err)
	}
	if marks, err := s.Marks(); err != nil || len(marks) != 0 {
		t.Errorf("marks after delete: %v, %v", marks, err)
	}
	reserve(t, s, rec("eeeeeeeeeeee", "one")) // the name is free again
	if err := s.Put(rec("ffffffffffff", "x")); !errors.Is(err, ErrNotFound) {
		t.Errorf("put without reserve: got %v, want ErrNotFound", err)
	}
}

func TestSurvivesReopen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	s := open(t, path)
	want := reserve(t, s, rec("aaaaaaaaaaaa", "one"))
	want.State = sandbox.Running
	want.Log(want.Created, "started", "x")
	if err := s.Put(want); err != nil {
		t.Fatal(err)
	}
	mark := meter.Begin(want.Created, time.Second, "boot", 1<<20)
	if err := s.PutMarks(map[string]meter.Mark{want.ID: mark}); err != nil {
		t.Fatal(err)
	}
	id := s.NodeID()
	s.Close()
	s = open(t, path)
	got, err := s.Load()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]sandbox.Record{want}, got, cmpopts.EquateComparable(sandbox.Plan{})); diff != "" {
		t.Error(diff)
	}
	marks, err := s.Marks()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]meter.Mark{want.ID: mark}, marks, cmpopts.EquateEmpty()); diff != "" {
		t.Error(diff)
	}
	if s.NodeID() != id || len(id) != 36 {
		t.Errorf("node id: got %q, was %q", s.NodeID(), id)
	}
}

func TestSecondOpenIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	open(t, path)
	if _, err := Open(path); !errors.Is(err, ErrLocked) {
		t.Errorf("second open: got %v, want ErrLocked", err)
	}
}

func TestTakenSlots(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "bulkhead.db"))
	taken := map[uint32]string{1: "stranger", 3: "stranger"}
	for i, want := range []uint32{2, 4} {
		if r, err := s.Reserve(rec(fmt.Sprintf("aaaaaaaaaaa%c", 'a'+i), fmt.Sprint(i)), 4, taken); err != nil || r.Slot != want {
			t.Errorf("got slot %d, %v, want %d", r.Slot, err, want)
		}
	}
	if _, err := s.Reserve(rec("bbbbbbbbbbbb", "x"), 4, taken); !errors.Is(err, ErrNoSlot) {
		t.Errorf("got %v, want ErrNoSlot", err)
	}
	if r, err := s.Reserve(rec("bbbbbbbbbbbb", "x"), 4, nil); err != nil || r.Slot != 1 {
		t.Errorf("once it is free: got slot %d, %v, want 1", r.Slot, err)
	}
}

func TestSlotsRunOut(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "db"))
	for i := range 3 {
		if _, err := s.Reserve(rec(fmt.Sprintf("aaaaaaaaaaa%c", 'a'+i), fmt.Sprint(i)), 3, nil); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Reserve(rec("bbbbbbbbbbbb", "x"), 3, nil); !errors.Is(err, ErrNoSlot) {
		t.Errorf("got %v, want ErrNoSlot", err)
	}
	if recs, err := s.Load(); err != nil || len(recs) != 3 {
		t.Errorf("a refused reservation left something: %d records, %v", len(recs), err)
	}
}

func TestConcurrentReserve(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "db"))
	var mu sync.Mutex
	slots := map[uint32]bool{}
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			r, err := s.Reserve(rec(sandbox.NewID(), sandbox.NewID()+"-x"), 100, nil)
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			if slots[r.Slot] {
				t.Errorf("slot %d twice", r.Slot)
			}
			slots[r.Slot] = true
		})
	}
	wg.Wait()
}

func TestLaterSchemaIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	s := open(t, path)
	err := s.db.Update(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketMeta).Put(keyVersion, binary.BigEndian.AppendUint32(nil, version+1))
	})
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	if _, err := Open(path); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("schema %d", version+1)) {
		t.Errorf("got %v, want an error that names the schema", err)
	}
}

// TestReleasedSchemas opens a file of every released schema. A new schema adds
// its own with -update; the old ones are never written again.
func TestReleasedSchemas(t *testing.T) {
	name := filepath.Join("testdata", fmt.Sprintf("v%d.db", version))
	if *update {
		os.Remove(name)
		s := open(t, name)
		reserve(t, s, rec("aaaaaaaaaaaa", "one"))
		s.Close()
	}
	files, err := filepath.Glob("testdata/v*.db")
	if err != nil || len(files) != version {
		t.Fatalf("one file per schema: got %v, %v", files, err)
	}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		copied := filepath.Join(t.TempDir(), "db")
		if err := os.WriteFile(copied, data, 0o600); err != nil {
			t.Fatal(err)
		}
		s := open(t, copied)
		recs, err := s.Load()
		if err != nil || len(recs) != 1 || recs[0].Spec.Name != "one" {
			t.Errorf("%s: got %v, %v", f, recs, err)
		}
		if err := s.PutBudgets(map[string]budget.Entry{"tenant/acme": {Window: 3600, Spent: 7}}, nil); err != nil {
			t.Errorf("%s: %v", f, err)
		}
	}
}

// TestPutAll: of records of which one is not there, none is written.
func TestPutAll(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	s := open(t, path)
	a, b := reserve(t, s, rec("aaaaaaaaaaaa", "one")), reserve(t, s, rec("bbbbbbbbbbbb", "two"))
	a.PolicyRev, b.PolicyRev = 2, 2
	if err := s.PutAll([]sandbox.Record{a, rec("cccccccccccc", "three"), b}); !errors.Is(err, ErrNotFound) {
		t.Errorf("with a stranger among them: got %v, want ErrNotFound", err)
	}
	revs := func() (out []uint64) {
		recs, err := s.Load()
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range recs {
			out = append(out, r.PolicyRev)
		}
		return out
	}
	if diff := cmp.Diff([]uint64{1, 1}, revs()); diff != "" {
		t.Errorf("after a refusal: %s", diff)
	}
	if err := s.PutAll([]sandbox.Record{a, b}); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s = open(t, path)
	if diff := cmp.Diff([]uint64{2, 2}, revs()); diff != "" {
		t.Error(diff)
	}
}

func TestBudgets(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	s := open(t, path)
	want := map[string]budget.Entry{"tenant/acme": {Window: 3600, Spent: 1 << 40}, "sandbox/aaaaaaaaaaaa/acme": {Window: 7200}}
	if err := s.PutBudgets(want, nil); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s = open(t, path)
	got, err := s.Budgets()
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("%v\n%s", err, diff)
	}
	if err := s.PutBudgets(map[string]budget.Entry{"tenant/acme": {Window: 7200, Spent: 1}}, []string{"sandbox/aaaaaaaaaaaa/acme", "tenant/never"}); err != nil {
		t.Fatal(err)
	}
	got, err = s.Budgets()
	if diff := cmp.Diff(map[string]budget.Entry{"tenant/acme": {Window: 7200, Spent: 1}}, got); err != nil || diff != "" {
		t.Errorf("%v\n%s", err, diff)
	}
}
